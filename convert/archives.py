"""Checkpoint files: tensors by name from one file, or from several with an index, pickled or as safetensors.

Nothing in a file is run: pickles are read by `torch.load(weights_only=True)`, and torch is imported for them alone.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import io
import json
import math
import pickle
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from bm_jax.model_directory import PARAMETERS
from bm_jax.parameter_folder import FILE
from bm_jax.sealed_folder import sync
from bm_jax.tensor_file import Kind, Memory, TensorFile, TensorFileError, each_once, write_tensor_file

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
"""Types that are converted."""
NAMES = ("model.safetensors", "pytorch_model.bin")


class ArchiveError(RuntimeError):
    """A checkpoint file cannot be read or written; the message names the file, the tensor and what is wrong."""


class File(Protocol):
    """One file of tensors."""

    path: Path
    tensors: dict[str, Kind]
    """Every tensor's type and shape."""

    def flat(self, name: str, start: int, stop: int, memory: Memory | None = None) -> np.ndarray:
        """Elements `start` to `stop` of a tensor as a row of numbers, perhaps in `memory`."""
        ...


def safetensors_file(path: Path) -> TensorFile:
    """A .safetensors file whose tensors can be converted."""
    try:
        file = TensorFile(path)
    except TensorFileError as error:
        raise ArchiveError(str(error)) from None
    for name, kind in file.tensors.items():
        _require_known(path, name, kind.dtype if kind.dtype in DTYPES else None, kind.dtype)
    return file


def _require_known(path: Path, name: str, known: np.dtype | None, found: Any) -> np.dtype:
    if known is None:
        raise ArchiveError(f"{path}: tensor {name} is {found}; float32, float16 and bfloat16 can be converted")
    return known


class PickledFile:
    """A .bin or .pt file as PyTorch saves it, with its tensors at the top or under one key.

    It is mapped into memory where that can be, and anew after every `MAPPED_BYTES` read: pages that were read count as memory.
    """

    MAPPED_BYTES = 2**29

    def __init__(self, path: Path, wrapper: str | None = None) -> None:
        self.path, self._wrapper, self._torch = path, wrapper, import_torch(path)
        torch = self._torch
        dtypes = {torch.float32: np.dtype(np.float32), torch.float16: np.dtype(np.float16), torch.bfloat16: BFLOAT16}
        self._mapped = zipfile.is_zipfile(path)  # files of before PyTorch 1.6 are not, and are loaded whole
        self._loaded, self._read = self._load(), 0
        self.tensors = {
            name: Kind(_require_known(path, name, dtypes.get(tensor.dtype), tensor.dtype), tuple(tensor.shape))
            for name, tensor in self._loaded.items()
        }

    def _load(self) -> dict[str, Any]:
        torch, path = self._torch, self.path
        try:
            if self._mapped:
                with zipfile.ZipFile(path) as file:
                    if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                        raise ValueError("it is a compressed zip file, which PyTorch does not write")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ArchiveError(
                f"{path} was not loaded, and nothing in it was run: it is damaged, or holds more than tensors: {reason}"
            ) from None
        if self._wrapper is not None and isinstance(loaded, dict) and isinstance(loaded.get(self._wrapper), dict):
            loaded = loaded[self._wrapper]
        if not isinstance(loaded, dict):
            raise ArchiveError(f"{path} holds {type(loaded).__name__}, not tensors by name")
        for name, tensor in loaded.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ArchiveError(f"{path}: {name!r} is {type(tensor).__name__}, not a tensor by its name")
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_neg()
            if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ArchiveError(f"{path}: tensor {name} has no number in the file for each of its elements")
        return {name: tensor.detach() for name, tensor in loaded.items()}

    def flat(self, name: str, start: int, stop: int, memory: Memory | None = None) -> np.ndarray:
        """Elements `start` to `stop` of a tensor as a row of numbers, those of the mapped file."""
        dtype = self.tensors[name].dtype
        self._read += (stop - start) * dtype.itemsize
        if self._mapped and self._read > self.MAPPED_BYTES:
            del self._loaded
            self._loaded, self._read = self._load(), 0
        part = self._loaded[name].reshape(-1)[start:stop]
        return part.view(self._torch.int16).numpy().view(dtype) if dtype == BFLOAT16 else part.numpy()


def import_torch(path: Path) -> Any:
    """PyTorch, for a pickled file.

    Raises:
        ArchiveError: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise ArchiveError(f"{path} is a pickled file, which needs PyTorch: pip install torch") from None
    return torch


class Archive:
    """All tensors of a checkpoint."""

    def __init__(self, files: list[File]) -> None:
        self.files = files
        self.tensors: dict[str, Kind] = {}
        self._file: dict[str, File] = {}
        for file in files:
            for name, kind in file.tensors.items():
                if name in self._file:
                    raise ArchiveError(f"tensor {name} is in {self._file[name].path} and again in {file.path}")
                self.tensors[name], self._file[name] = kind, file

    def path(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._file[name].path

    def read(self, name: str, memory: Memory | None = None) -> np.ndarray:
        """One tensor, perhaps in `memory`."""
        shape = self.tensors[name].shape
        return self.flat(name, 0, math.prod(shape), memory).reshape(shape)

    def flat(self, name: str, start: int, stop: int, memory: Memory | None = None) -> np.ndarray:
        """Elements `start` to `stop` of a tensor as a row of numbers, perhaps in `memory`."""
        try:
            return self._file[name].flat(name, start, stop, memory)
        except TensorFileError as error:
            raise ArchiveError(str(error)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


def open_archive(path: Path, wrapper: str | None = None) -> Archive:
    """The tensors of a folder or of one file; `wrapper` is the key that a pickled file may hold them under.

    Raises:
        ArchiveError: nothing to read, or it is damaged, incomplete or unsafe.
    """
    if not path.exists():
        raise ArchiveError(f"{path} does not exist")
    if path.is_file():
        return Archive([_open(path, wrapper)])
    if (path / PARAMETERS / FILE).exists():  # a model directory of ours
        return Archive([safetensors_file(path / PARAMETERS / FILE)])
    for name in NAMES:
        index = path / f"{name}.index.json"
        if index.exists():
            return _open_sharded(index, wrapper)
        if (path / name).exists():
            return Archive([_open(path / name, wrapper)])
    raise ArchiveError(f"{path} has no {' or '.join(NAMES)}, nor an index of several")


def _open(path: Path, wrapper: str | None) -> File:
    if path.suffix == ".safetensors":
        return safetensors_file(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return PickledFile(path, wrapper)
    raise ArchiveError(f"{path}: expected a .safetensors, .bin, .pt or .pth file")


def _open_sharded(index: Path, wrapper: str | None) -> Archive:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise ArchiveError(f"{index} has no weight_map of tensor names to files")
    names = sorted(set(placed.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ArchiveError(f"{index} names the file {name!r}, which is not in its folder")
        if not (index.parent / name).exists():
            raise ArchiveError(f"{index} names the file {name}, which is missing")
    archive = Archive([_open(index.parent / name, wrapper) for name in names])
    for tensor, name in placed.items():
        if tensor not in archive.tensors:
            raise ArchiveError(f"{index} says that tensor {tensor} is in {name}, which does not hold it")
        if archive.path(tensor).name != name:
            raise ArchiveError(f"{index} says that tensor {tensor} is in {name}, but it is in {archive.path(tensor).name}")
    extra = [tensor for tensor in archive if tensor not in placed]
    if extra:
        raise ArchiveError(f"{archive.path(extra[0])} holds tensor {extra[0]}, which {index} does not name")
    return archive


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ArchiveError: it is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=each_once)
    except FileNotFoundError:
        raise ArchiveError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArchiveError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ArchiveError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def write_archive(
    folder: Path, tensors: Mapping[str, Kind], arrays: Iterable[np.ndarray], pickled: bool, wrapper: str | None
) -> Path:
    """Write one file in `folder`, as safetensors or pickled, of these tensors, whose arrays follow in their order.

    Returns its path. An array is written while the next is made, and no longer read when the one after that is asked for.
    """
    if not pickled:
        write_tensor_file(folder / NAMES[0], tensors, arrays, {"format": "pt"})
        return folder / NAMES[0]
    _write_pickled(folder / NAMES[1], tensors, arrays, wrapper)
    return folder / NAMES[1]


def _write_pickled(path: Path, tensors: Mapping[str, Kind], arrays: Iterable[np.ndarray], wrapper: str | None) -> None:
    """What `torch.save` writes of a dict of tensors, without having them all at once."""
    torch = import_torch(path)
    types = dict(zip(DTYPES, (torch.FloatStorage, torch.HalfStorage, torch.BFloat16Storage), strict=True))

    class Storage(NamedTuple):
        key: str
        kind: Kind

    class Tensor(NamedTuple):
        storage: Storage

        def __reduce__(self) -> tuple[Any, ...]:
            shape = self.storage.kind.shape
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, Storage):
                return None
            return "storage", types[obj.kind.dtype], obj.key, "cpu", math.prod(obj.kind.shape)

    state = {name: Tensor(Storage(str(i), kind)) for i, (name, kind) in enumerate(tensors.items())}
    text = io.BytesIO()
    Pickler(text, protocol=2).dump(state if wrapper is None else {wrapper: state})
    with open(path, "wb", buffering=0) as file, concurrent.futures.ThreadPoolExecutor(1) as pool:
        archive = torch._C.PyTorchFileWriter(file)
        try:
            archive.write_record("data.pkl", text.getvalue(), len(text.getvalue()))
            pending = pool.submit(archive.write_record, "byteorder", sys.byteorder, len(sys.byteorder))
            for i, array in enumerate(arrays):
                pending.result()
                data = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                pending = pool.submit(archive.write_record, f"data/{i}", data.untyped_storage(), data.nbytes)
            pending.result()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # it must be called: the writer ends the process otherwise
                archive.write_end_of_file()
            raise
        archive.write_end_of_file()
    sync(path)
