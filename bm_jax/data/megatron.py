"""Megatron-LM indexed datasets: PREFIX.bin (ids) and PREFIX.idx (lengths, offsets, boundaries).

The index is, little-endian: the magic `MMIDIDX\\0\\0`; uint64 version, 1; uint8 dtype code; uint64 number of sequences
S; uint64 number of document boundaries D (documents + 1); int32 sequence lengths [S]; int64 byte offsets in the .bin
[S]; int64 document boundaries as sequence numbers [D]. Documents are taken as stored: an end-of-document id is there
only if the file was written with one.
"""

from __future__ import annotations

import functools
import os
import struct
from pathlib import Path

import numpy as np

from bm_jax.data.errors import DataError
from bm_jax.data.stream import FileNumbers, Piece, TokenStream

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def megatron_prefix(path: str | os.PathLike[str]) -> Path | None:
    """The prefix that `path` names (itself, PREFIX.bin or PREFIX.idx) if both files exist, otherwise None."""
    text = os.fspath(path)
    prefix = text[:-4] if text.endswith((".bin", ".idx")) else text
    return Path(prefix) if os.path.isfile(prefix + ".bin") and os.path.isfile(prefix + ".idx") else None


def read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """dtype of the ids and exclusive document ends in tokens, int64 [documents], of a Megatron index."""
    data = path.read_bytes()
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise DataError(f"{path} is not a Megatron index: it should begin with {MAGIC!r}, found {data[:9]!r}")
    _, version, code, sequences, boundaries = HEADER.unpack_from(data)
    if version != 1 or code not in DTYPES:
        raise DataError(
            f"{path} has version {version} and dtype code {code}; supported are version 1 and the integer codes "
            f"{', '.join(map(str, DTYPES))}"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if len(data) < expected:
        raise DataError(f"{path} is truncated: its header asks for {expected:,} bytes, found {len(data):,}. Copy it again")
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
    documents = np.frombuffer(data, "<i8", boundaries, HEADER.size + 12 * sequences)
    dtype = np.dtype(DTYPES[code])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if np.any(lengths < 0) or np.any(offsets != starts[:-1] * dtype.itemsize):
        raise DataError(f"{path} does not list its sequences end to end; rewrite it with Megatron's merge tool")
    if not boundaries or documents[0] != 0 or documents[-1] != sequences or np.any(np.diff(documents) < 0):
        raise DataError(f"{path} is damaged: document boundaries must ascend from 0 to {sequences}, the sequences")
    return dtype, starts[documents[1:]]


def open_megatron(prefix: str | os.PathLike[str], held_out_tokens: int, vocab_size: int) -> dict[str, TokenStream]:
    """Train and validation streams of PREFIX.bin, read as they are asked for.

    Validation is as many whole documents from the end as have at most `held_out_tokens` tokens together, but at least
    one if there are two. The format records no tokenizer, so only the ids can be checked, when they are read.
    """
    binary = Path(f"{os.fspath(prefix)}.bin")
    dtype, ends = read_index(Path(f"{os.fspath(prefix)}.idx"))
    total = int(ends[-1]) if len(ends) else 0
    found = binary.stat().st_size
    if found != total * dtype.itemsize:
        raise DataError(
            f"{binary} has {found:,} bytes, but its index describes {total * dtype.itemsize:,}. Copy both files again"
        )
    if not total:
        raise DataError(f"{binary} contains no tokens")
    starts = np.concatenate([[0], ends[:-1]])
    first = int(np.searchsorted(starts, total - held_out_tokens))
    first = min(first, len(ends) - 1) if len(ends) > 1 else 1
    first = max(first, 1)
    cut, files = int(ends[first - 1]), (binary, binary.with_suffix(".idx"))
    numbers = functools.partial(FileNumbers, binary, dtype)
    return {
        "train": TokenStream([Piece(numbers(0, cut), ends[:first], str(binary), files)], vocab_size),
        "validation": TokenStream([Piece(numbers(cut, total - cut), ends[first:] - cut, str(binary), files)], vocab_size),
    }
