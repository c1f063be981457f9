"""Checkpoint files: tensors by name from one file, or from several with an index, pickled or as safetensors.

Nothing in a file is run: pickles are read by `torch.load(weights_only=True)`, and torch is imported for them alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
"""safetensors' names of the types that are converted."""
NAMES = ("model.safetensors", "pytorch_model.bin")


class ArchiveError(RuntimeError):
    """A checkpoint file cannot be read or written; the message names the file, the tensor and what is wrong."""


class File(Protocol):
    """One file of tensors."""

    path: Path

    def shapes(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Every tensor's type and shape."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        ...


class SafetensorsFile:
    """A .safetensors file; its header is checked whole by the `safetensors` library when it is opened."""

    def __init__(self, path: Path) -> None:
        import safetensors

        self.path = path
        try:
            self._file: Any = safetensors.safe_open(path, framework="numpy")
            self._names = list(self._file.keys())
        except (OSError, safetensors.SafetensorError) as error:
            raise ArchiveError(f"{path} is not a readable safetensors file: {error}") from None

    def shapes(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        found = {}
        for name in self._names:
            part = self._file.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ArchiveError(
                    f"{self.path}: tensor {name} is {part.get_dtype()}; float32, float16 and bfloat16 can be converted"
                )
            found[name] = DTYPES[part.get_dtype()], tuple(part.get_shape())
        return found

    def read(self, name: str) -> np.ndarray:
        import safetensors

        try:
            return self._file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise ArchiveError(f"{self.path}: tensor {name} cannot be read: {error}") from None


class PickledFile:
    """A .bin or .pt file as PyTorch saves it, with its tensors at the top or under one key."""

    def __init__(self, path: Path, wrapper: str | None = None) -> None:
        self.path = path
        torch = _torch(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ArchiveError(
                f"{path} was not loaded, and nothing in it was run: it is damaged, or holds more than tensors: {reason}"
            ) from None
        if wrapper is not None and isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
        if not isinstance(loaded, dict):
            raise ArchiveError(f"{path} holds {type(loaded).__name__}, not tensors by name")
        self._tensors: dict[str, Any] = {}
        for name, tensor in loaded.items():
            if not isinstance(tensor, torch.Tensor):
                raise ArchiveError(f"{path}: {name!r} is {type(tensor).__name__}, not a tensor")
            self._tensors[str(name)] = tensor
        self._dtypes = {torch.float32: DTYPES["F32"], torch.float16: DTYPES["F16"], torch.bfloat16: BFLOAT16}
        self._integers = torch.int16

    def shapes(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        for name, tensor in self._tensors.items():
            if tensor.dtype not in self._dtypes:
                raise ArchiveError(
                    f"{self.path}: tensor {name} is {tensor.dtype}; float32, float16 and bfloat16 can be converted"
                )
        return {name: (self._dtypes[tensor.dtype], tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name].contiguous()
        if self._dtypes[tensor.dtype] == BFLOAT16:
            return tensor.view(self._integers).numpy().view(BFLOAT16)
        return tensor.numpy()


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ArchiveError(f"{path} is a pickled file, which needs PyTorch: pip install torch") from None
    return torch


class Archive:
    """All tensors of a checkpoint."""

    def __init__(self, files: list[File]) -> None:
        self.files = files
        self.tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._file: dict[str, File] = {}
        for file in files:
            for name, kind in file.shapes().items():
                if name in self._file:
                    raise ArchiveError(f"tensor {name} is in {self._file[name].path} and again in {file.path}")
                self.tensors[name], self._file[name] = kind, file

    def path(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._file[name].path

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._file[name].read(name)

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
    for name in NAMES:
        index = path / f"{name}.index.json"
        if index.exists():
            return _open_sharded(index, wrapper)
        if (path / name).exists():
            return Archive([_open(path / name, wrapper)])
    raise ArchiveError(f"{path} has no {' or '.join(NAMES)}, nor an index of several")


def _open(path: Path, wrapper: str | None) -> File:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
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
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArchiveError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArchiveError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ArchiveError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def write_archive(folder: Path, tensors: dict[str, np.ndarray], pickled: bool, wrapper: str | None) -> Path:
    """Write all tensors to one file in `folder`, as safetensors or pickled; returns its path."""
    if not pickled:
        from safetensors.numpy import save_file

        path = folder / NAMES[0]
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, {"format": "pt"})
        return path
    path = folder / NAMES[1]
    torch = _torch(path)

    def to_torch(tensor: np.ndarray) -> Any:
        tensor = np.ascontiguousarray(tensor)
        if tensor.dtype == BFLOAT16:
            return torch.from_numpy(tensor.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(tensor)

    state = {name: to_torch(tensor) for name, tensor in tensors.items()}
    with open(path, "wb") as file:
        torch.save(state if wrapper is None else {wrapper: state}, file)
        file.flush()
        os.fsync(file.fileno())
    return path
