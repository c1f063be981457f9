"""States of prompts that were read, to go on from: a bounded store, the least recently used going first."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

from bm_jax import state
from bm_jax.state import State


class Prefixes:
    """States after the first tokens of prompts.

    Kept are the whole prompt and the first 1, 2, 4, 8, ... pieces of it, so that a prompt that shares n pieces with an earlier
    one is read from more than half of them on.

    Args:
        chunk: tokens of a piece.
        most_bytes: of all states kept; 0 for none.
    """

    def __init__(self, chunk: int, most_bytes: int) -> None:
        self._chunk, self._most = chunk, most_bytes
        self._kept: collections.OrderedDict[bytes, State] = collections.OrderedDict()
        self._bytes = 0

    def find(self, ids: Sequence[int]) -> tuple[int, State | None]:
        """The longest part of `ids` that there is a state of, in tokens, and that state."""
        if self._kept:
            keys = self._keys(ids)
            for length in sorted(keys, reverse=True):
                if keys[length] in self._kept:
                    self._kept.move_to_end(keys[length])
                    return length, self._kept[keys[length]]
        return 0, None

    def keep(self, ids: Sequence[int], length: int, read: State) -> None:
        """Keep a copy of the state after the first `length` of `ids`, if it is one of those to keep."""
        number, rest = divmod(length, self._chunk)
        if self._most == 0 or not (length == len(ids) or (rest == 0 and number & (number - 1) == 0)):
            return
        key = self._keys(ids[:length])[length]
        if key in self._kept:
            return
        kept = state.with_room(read, min(state.room(read), 1 << (length - 1).bit_length())).fork([0])
        size = state.size_in_bytes(kept)
        if size > self._most:
            return
        self._kept[key] = kept
        self._bytes += size
        while self._bytes > self._most:
            self._bytes -= state.size_in_bytes(self._kept.popitem(last=False)[1])

    def _keys(self, ids: Sequence[int]) -> dict[int, bytes]:
        """By length, what names the first tokens of `ids`: every whole piece, and all of it."""
        digest, keys = hashlib.sha256(), {}
        array = np.asarray(ids, np.int32)
        for start in range(0, len(array), self._chunk):
            part = array[start : start + self._chunk]
            digest.update(part.tobytes())
            keys[start + len(part)] = digest.copy().digest()
        return keys

    def __len__(self) -> int:
        return len(self._kept)
