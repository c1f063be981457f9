"""Files of named tensors in the safetensors format: written as a stream, read by parts.

Neither side holds the file or maps it into memory: a part of a tensor costs the memory of that part.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""safetensors' names of the types that are read and written."""
SMALL = 2**12
"""Bytes that are read in one piece though not all are wanted: a page."""


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these pairs, for `json.loads(object_pairs_hook=...)`.

    Raises:
        ValueError: a name is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


class TensorFileError(RuntimeError):
    """A file cannot be read; the message names it, the tensor and what is wrong."""


class Kind(NamedTuple):
    """What a tensor is."""

    dtype: np.dtype
    shape: tuple[int, ...]


class Memory:
    """Memory that is used again and again: that of a new large array is slow, as the system gives it page by page."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """An array whose elements are not set; the one taken before is overwritten."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._bytes):
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


class TensorFile:
    """A .safetensors file, its header checked whole by the `safetensors` library when it is opened.

    Raises:
        TensorFileError: it cannot be read, is damaged, or holds a tensor of a type that is not in `DTYPES`.
    """

    def __init__(self, path: Path) -> None:
        import safetensors

        self.path = path
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                names = list(file.keys())
            with open(path, "rb", buffering=0) as raw:
                length = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(length), object_pairs_hook=each_once)
                self._descriptor = os.dup(raw.fileno())
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise TensorFileError(f"{path} is not a readable safetensors file: {error}") from None
        self.metadata: dict[str, str] = header.get("__metadata__", {})
        self.tensors: dict[str, Kind] = {}
        self._starts: dict[str, int] = {}
        for name in names:
            entry = header[name]
            if entry["dtype"] not in DTYPES:
                raise TensorFileError(f"{path}: tensor {name} is {entry['dtype']}; known are {', '.join(DTYPES)}")
            self.tensors[name] = Kind(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._starts[name] = 8 + length + entry["data_offsets"][0]

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def flat(self, name: str, start: int, stop: int, memory: Memory | None = None) -> np.ndarray:
        """Elements `start` to `stop` of a tensor as a row of numbers, in `memory` if it is given.

        Raises:
            TensorFileError: the file has changed or cannot be read.
        """
        dtype = self.tensors[name].dtype
        out = np.empty(stop - start, dtype) if memory is None else memory.take(dtype, (stop - start,))
        self._read_into(out, name, start)
        return out

    def read(self, name: str, index: tuple[int | slice, ...] = (), memory: Memory | None = None) -> np.ndarray:
        """A tensor, or the part of it that an index of integers and slices (of step 1) takes. Little else is read.

        Raises:
            TensorFileError: the file has changed or cannot be read.
        """
        dtype, shape = self.tensors[name]
        bounds = [(i, i + 1) if isinstance(i, int) else i.indices(size)[:2] for i, size in zip(index, shape, strict=False)]
        bounds += [(0, size) for size in shape[len(bounds) :]]
        sizes = tuple(max(0, stop - start) for start, stop in bounds)
        out = np.empty(sizes, dtype) if memory is None else memory.take(dtype, sizes)
        if out.size:
            self._fill(out.reshape(sizes or (1,)), name, shape or (1,), bounds or [(0, 1)], 0)
        return out[tuple(0 if isinstance(i, int) else slice(None) for i in index)]

    def _fill(self, out: np.ndarray, name: str, shape: tuple[int, ...], bounds: list[tuple[int, int]], start: int) -> None:
        """Put into `out` what `bounds` take of the block of this shape that begins at element `start`."""
        (first, last), step = bounds[0], math.prod(shape[1:])
        if out[0].size == step:
            self._read_into(out, name, start + first * step)
        elif step * out.itemsize <= SMALL:
            rows = self.flat(name, start + first * step, start + last * step).reshape(-1, *shape[1:])
            out[...] = rows[:, *(slice(*bound) for bound in bounds[1:])]
        else:
            for i in range(first, last):
                self._fill(out[i - first], name, shape[1:], bounds[1:], start + i * step)

    def _read_into(self, out: np.ndarray, name: str, start: int) -> None:
        """The elements from `start` on, as many as there are in `out`, which is contiguous."""
        left, at = out.reshape(-1).view(np.uint8).data, self._starts[name] + start * out.itemsize
        while left:
            try:
                count = os.preadv(self._descriptor, [left[: 2**30]], at)
            except OSError as error:
                raise TensorFileError(f"{self.path}: tensor {name} cannot be read: {error}") from None
            if not count:
                raise TensorFileError(f"{self.path}: tensor {name} cannot be read: the file has become shorter")
            left, at = left[count:], at + count


class Written(NamedTuple):
    """A file that was written."""

    bytes: int
    sha256: str


def write_tensor_file(
    path: Path, tensors: Mapping[str, Kind], blocks: Iterable[np.ndarray], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write a .safetensors file of these tensors from blocks, which follow each other as the elements of the tensors do.

    A block is part of one tensor or all of it. One is hashed and written while the next is made, and no longer read when
    the one after that is asked for.

    Raises:
        OSError: the disk is full, or the file cannot be written.
        ValueError: the blocks are not all of the tensors' elements, or a type is not in `DTYPES`.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in names:
            raise ValueError(f"tensor {name} is {dtype}; known are {', '.join(map(str, names))}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0

    one = functools.partial(concurrent.futures.ThreadPoolExecutor, 1)
    with open(path, "wb", buffering=0) as file, one() as hasher, one() as writer:

        def write(left: memoryview) -> None:
            while left:
                left = left[file.write(left[: 2**30]) :]

        def submit(data: memoryview) -> list[concurrent.futures.Future[None]]:
            return [hasher.submit(digest.update, data), writer.submit(write, data)]

        pending = submit(memoryview(len(text).to_bytes(8, "little") + text))
        for block in blocks:
            for future in pending:
                future.result()
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
            pending, written = submit(data), written + len(data)
        for future in pending:
            future.result()
        if written != end:
            raise ValueError(f"{path}: the blocks have {written} bytes, the tensors {end}")
        os.fsync(file.fileno())
    return Written(8 + len(text) + end, digest.hexdigest())
