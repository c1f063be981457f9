"""The parameters of a model directory: one safetensors file in a sealed folder, written as a stream, read shard by shard."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bm_jax.leaves import CheckpointError, describe, is_disk_full, leaves_of, nest, placed, require_same
from bm_jax.sealed_folder import problem_with, publish, remove_folder, seal
from bm_jax.tensor_file import Kind, TensorFile, TensorFileError, write_tensor_file

FILE = "parameters.safetensors"
"""Leaves by path, as `periods/layer_0/mamba/in_proj`."""
BLOCK_BYTES = 2**26


def save_parameters(directory: str | os.PathLike[str], params: Any) -> None:
    """Write `params` (a pytree of arrays, dtypes kept) as folder `directory`; all or nothing.

    Raises:
        CheckpointError: `directory` exists (nothing is overwritten), or cannot be written.
    """
    leaves = leaves_of(params)
    kinds = {path: Kind(np.dtype(leaf.dtype), tuple(leaf.shape)) for path, leaf in leaves.items()}
    write_parameters(directory, kinds, (block for leaf in leaves.values() for block in _rows(leaf)))


def _rows(leaf: Any) -> Iterator[np.ndarray]:
    """A leaf in the order of its elements, some `BLOCK_BYTES` at a time on the host."""
    if not leaf.ndim:
        yield np.asarray(leaf)
        return
    rows = max(1, BLOCK_BYTES * len(leaf) // max(1, leaf.size * leaf.dtype.itemsize))
    for start in range(0, len(leaf), rows):
        yield np.asarray(leaf[start : start + rows])


def write_parameters(directory: str | os.PathLike[str], leaves: Mapping[str, Kind], blocks: Iterable[np.ndarray]) -> None:
    """As `save_parameters`, from blocks that follow each other as the elements of the leaves do: none need be in memory whole.

    Errors of making a block are raised as they are.
    """
    folder = Path(directory).absolute()
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; choose another folder or remove it first.")
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_folder(partial)
        partial.mkdir()
        written = write_tensor_file(partial / FILE, leaves, blocks)
        seal(partial, {FILE: [written.bytes, written.sha256]})
        publish(partial, folder)
    except OSError as error:
        full = "disk full: " if is_disk_full(error) else ""
        raise CheckpointError(f"cannot write the parameters to {folder}: {full}{error}") from error
    finally:
        remove_folder(partial)


@contextlib.contextmanager
def open_parameters(directory: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """The file of a folder that `save_parameters` wrote. All of it is verified meanwhile: use what was read after the block.

    Raises:
        CheckpointError: there is none, or it is damaged; at the end of the block, or in place of what the damage led to.
    """
    folder = Path(directory).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"cannot read the parameters in {folder}: there is no such folder.")
    problem: object = None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        verifying = pool.submit(problem_with, folder)
        try:
            yield TensorFile(folder / FILE)
        except TensorFileError as error:
            problem = error
        finally:
            problem = verifying.result() or problem
            if problem:
                raise CheckpointError(f"cannot read the parameters in {folder}: {problem}.")


def _read(file: TensorFile, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf; each distinct shard is read once and put on its devices."""
    assert leaf.sharding is not None
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    owners: dict[tuple[Any, ...], list[Any]] = {}
    for device, index in indices.items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), leaf.shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    shards = {}
    for bounds, devices in owners.items():
        block = file.read(path, tuple(slice(*bound) for bound in bounds))
        shards |= {device: jax.device_put(block, device) for device in devices}
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, [shards[device] for device in indices])


def load_parameters(directory: str | os.PathLike[str], abstract: Any = None) -> Any:
    """The parameters that `save_parameters` wrote as folder `directory`.

    With `abstract` (a pytree of `jax.ShapeDtypeStruct`) they get its structure and shardings, each device reading its own
    shard; without, they are a nested dict on the first device.

    Raises:
        CheckpointError: there are none, they are damaged, or they differ from `abstract` in path, shape or dtype.
    """
    with open_parameters(directory) as file:
        saved = {path: jax.ShapeDtypeStruct(kind.shape, kind.dtype) for path, kind in file.tensors.items()}
        wanted = saved if abstract is None else leaves_of(abstract)
        require_same(Path(directory), describe(saved), describe(wanted))
        found = {path: _read(file, path, placed(leaf)) for path, leaf in wanted.items()}
    return nest(found) if abstract is None else jax.tree.unflatten(jax.tree.structure(abstract), list(found.values()))
