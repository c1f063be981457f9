"""Trees of arrays in files, written and read by Orbax: each device of any mesh reads its own shard.

Arrays are stored in small chunks, which are compressed, read and unpacked as one. A shard costs as many bytes as the
chunks it touches, so chunks are short along every axis that a mesh may split.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

CHUNK_BYTES = 2**23
"""Most bytes of a chunk of an array: what is compressed, and unpacked again, as one."""
MOST_EXPERTS = 64
"""Arrays `[periods, X, ...]` of at most this many experts are stored expert by expert."""
READ_BYTES = 2**28
"""Bytes of chunks that are being read at one time."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why, what is intact and what to do."""


def leaves_of(tree: Any) -> dict[str, Any]:
    """Path such as `params/embedding` -> leaf. An attribute and a dict key of one name give the same path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `leaves_of`, as nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def describe(leaves: dict[str, Any]) -> dict[str, list[Any]]:
    """Path -> [dtype, shape], as JSON values."""
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves.items()}


def require_same(folder: Path, saved: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    """Raise CheckpointError naming the first leaves that differ."""

    def show(leaf: list[Any] | None) -> str:
        return "absent" if leaf is None else f"{leaf[0]}{leaf[1]}"

    paths = [path for path in {**wanted, **saved} if saved.get(path) != wanted.get(path)]
    if paths:
        first = {path: (show(saved.get(path)), show(wanted.get(path))) for path in paths[:5]}
        listed = "".join(f"\n  {path}: {there} in the checkpoint, {here} here" for path, (there, here) in first.items())
        raise CheckpointError(
            f"checkpoint {folder} was made with another configuration: {len(paths)} of {len({**wanted, **saved})} "
            f"arrays differ, among them{listed}\nSet run.directory to another folder, or use the configuration it was "
            "made with; nothing was changed."
        )


def placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """`leaf` as a ShapeDtypeStruct with a sharding."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def bytes_of(leaf: Any) -> int:
    """Bytes of an array; 16 an element for PRNG keys, whose dtype has no size of its own."""
    return math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 16)


def save_arguments(leaves: dict[str, Any]) -> ocp.args.StandardSave:
    """What Orbax saves, and in which chunks: small ones, so that a device of any mesh reads little besides its shard."""

    def chunks(leaf: Any) -> ocp.SaveArgs:
        # Orbax halves the longest axes first and would never divide the experts, [periods, X, ...].
        experts = leaf.ndim > 3 and leaf.shape[1] <= MOST_EXPERTS
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(1,) if experts else ())

    return ocp.args.StandardSave(nest(leaves), nest({path: chunks(leaf) for path, leaf in leaves.items()}))


def read_arrays(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Path -> array for the leaves in `wanted` (ShapeDtypeStructs with shardings); the other arrays are not read.

    Each distinct shard is read once and put on its devices. Host memory holds the shards on their way there,
    `READ_BYTES` together (or one that is larger), and never a whole array that is split.
    """
    item = nest(wanted)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            chunks = leaves_of(checkpointer.metadata(folder / "state").item_metadata.tree)
        largest = max((_largest_read(leaf, chunks[path]) for path, leaf in wanted.items()), default=0)
        reader = ocp.BasePyTreeCheckpointHandler(restore_concurrent_bytes=max(READ_BYTES, largest + 1))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=reader)) as checkpointer:
            tree = checkpointer.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(
                    item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
                ),
            )
    except Exception as error:
        raise CheckpointError(f"cannot read the arrays in {folder}: {error}") from error
    return leaves_of(tree)


def _largest_read(leaf: jax.ShapeDtypeStruct, metadata: Any) -> int:
    """Bytes of the largest shard of `leaf`, counted in whole chunks, which are read and unpacked as one."""
    storage = getattr(metadata, "storage", None)
    if storage is None or len(storage.chunk_shape) != leaf.ndim:  # PRNG keys: a few bytes
        return bytes_of(leaf)

    def size(shard: tuple[slice, ...]) -> int:
        total = leaf.dtype.itemsize
        for part, length, chunk in zip(shard, leaf.shape, storage.chunk_shape, strict=True):
            start, stop, _ = part.indices(length)
            total *= -(-stop // chunk) * chunk - start // chunk * chunk
        return total

    assert leaf.sharding is not None
    shards = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    return max(size(shard) for shard in shards if shard is not None)
