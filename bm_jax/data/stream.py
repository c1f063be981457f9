"""Documents as one long run of tokens, read by random access, and the windows cut from it.

A stream is the documents of one split of one source, end to end. A window of a stream for sequence length L is L + 1
tokens, of which the first L are inputs and the last L targets; windows start L tokens apart, so every token but the
stream's first is a target exactly once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bm_jax.data.errors import DataError


class FileNumbers:
    """Numbers in a file, which are read when they are asked for: `numbers[start:stop]` is an array.

    Not a memory map: where a file is truncated while it is in use, that would end the process with a signal.
    """

    def __init__(self, path: Path, dtype: np.dtype, start: int, count: int) -> None:
        self._path, self._dtype, self._start, self._count = path, np.dtype(dtype), start, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self._count)
        if step != 1:
            raise IndexError("FileNumbers: only whole slices, without a step, are read")
        size = self._dtype.itemsize
        with open(self._path, "rb") as file:
            found = os.pread(file.fileno(), (stop - start) * size, (self._start + start) * size)
        if len(found) != max(0, stop - start) * size:
            raise DataError(f"{self._path} is shorter than it was when it was opened. Copy it again and run again")
        return np.frombuffer(found, self._dtype)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a stream, normally a shard on the disk."""

    tokens: np.ndarray | FileNumbers
    """Ids, any integer dtype, [tokens]."""
    ends: np.ndarray
    """Exclusive end of each document within `tokens`, ascending integers, [documents]."""
    origin: str
    """Where the tokens lie, for error messages."""
    files: tuple[Path, ...] = ()
    """The files that they are read from."""


class TokenStream:
    """The pieces end to end. Nothing is read before `read` asks for it."""

    def __init__(self, pieces: Sequence[Piece], id_limit: int) -> None:
        """`id_limit`: ids of at least this (the model's vocab_size) are refused when they are read."""
        self._pieces = [piece for piece in pieces if len(piece.tokens)]
        self._starts = np.cumsum([0, *(len(piece.tokens) for piece in self._pieces)])
        self._id_limit = id_limit
        self.tokens = int(self._starts[-1])
        self.files = tuple(file for piece in self._pieces for file in piece.files)
        self.documents = sum(len(piece.ends) for piece in self._pieces)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start .. stop - 1 and their segment ids, both int32 [stop - start].

        The segment id is 1 for the document that holds token `start` and one more for each document after it.

        Raises:
            DataError: an id is not one of the model's.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.tokens}")
        tokens = np.empty(stop - start, np.int32)
        is_first = np.zeros(stop - start, np.int32)
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        position = start
        while position < stop:
            piece, offset = self._pieces[number], int(self._starts[number])
            until = min(stop, offset + len(piece.tokens))
            part = piece.tokens[position - offset : until - offset]
            low, high = int(part.min()), int(part.max())
            if low < 0 or high >= self._id_limit:
                raise DataError(
                    f"{piece.origin} contains token id {low if low < 0 else high}, but model and tokenizer have ids 0 to "
                    f"{self._id_limit - 1}: model.vocab_size is too small or the data was made with another tokenizer"
                )
            tokens[position - start : until - start] = part
            first, last = np.searchsorted(piece.ends, [position - offset, until - offset], side="right")
            # An end equal to `until` begins a document at the next token, in this piece or the next one.
            begins = piece.ends[first:last].astype(np.int64) + (offset - start)
            is_first[begins[begins < stop - start]] = 1
            position, number = until, number + 1
        if stop > start:
            is_first[0] = 1
        return tokens, np.cumsum(is_first, dtype=np.int32)


class Windows(Sequence[dict[str, np.ndarray]]):
    """The windows of a stream: item i is {"tokens", "segment_ids"}, both int32 [length + 1], from token i * length on.

    With `partial`, tokens left over after the last full window make one more, padded with token 0 and segment id 0.
    """

    def __init__(self, stream: TokenStream, length: int, *, partial: bool = False) -> None:
        self._stream = stream
        self._length = length
        targets = max(0, stream.tokens - 1)
        self._count = -(-targets // length) if partial else targets // length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):  # type: ignore[override]  # grain and `Sequence` disagree on slices; none are used
        index = int(index)
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        start = index * self._length
        tokens, segment_ids = self._stream.read(start, min(start + self._length + 1, self._stream.tokens))
        padding = self._length + 1 - len(tokens)
        if padding:
            tokens, segment_ids = np.pad(tokens, (0, padding)), np.pad(segment_ids, (0, padding))
        return {"tokens": tokens, "segment_ids": segment_ids}
