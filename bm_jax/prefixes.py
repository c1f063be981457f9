"""States of prompts that were read, to go on from: a bounded store, the least recently used going first."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from bm_jax import state
from bm_jax.state import State


class Prefixes:
    """States after the first tokens of prompts: after each whole piece, and after the whole prompt.

    Args:
        chunk: tokens of a piece.
        most_bytes: of all states kept; 0 for none.
    """

    def __init__(self, chunk: int, most_bytes: int) -> None:
        self._chunk, self._most = chunk, most_bytes
        self._kept: collections.OrderedDict[bytes, State] = collections.OrderedDict()
        self._bytes = 0

    def find(self, keys: Mapping[int, bytes]) -> tuple[int, State | None]:
        """The longest part of a prompt with these keys that there is a state of, in tokens, and that state."""
        for length in sorted(keys, reverse=True):
            if keys[length] in self._kept:
                self._kept.move_to_end(keys[length])
                return length, self._kept[keys[length]]
        return 0, None

    def keep(self, keys: Mapping[int, bytes], length: int, read: State) -> None:
        """Keep a copy of the state after the first `length` tokens of a prompt, of which `keys` are known."""
        key = keys[length]
        if key in self._kept or self._most == 0:
            return
        kept = self.copy(read, 1 << (length - 1).bit_length())
        size = state.size_in_bytes(kept)
        if size > self._most:
            return
        self._kept[key] = kept
        self._bytes += size
        while self._bytes > self._most:
            self._bytes -= state.size_in_bytes(self._kept.popitem(last=False)[1])

    @staticmethod
    def copy(read: State, room: int) -> State:
        """The same in memory of its own, attention having room for at most so many tokens."""
        return state.with_room(read, min(state.room(read), room)).fork([0])

    def keys(self, ids: Sequence[int]) -> dict[int, bytes]:
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
