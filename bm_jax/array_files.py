"""Trees of arrays in files, written and read by Orbax: each device of any mesh reads its own shard.

Arrays are stored in small chunks, which are compressed, read and unpacked as one. A shard costs as many bytes as the
chunks it touches, so chunks are short along every axis that a mesh may split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from bm_jax.leaves import CheckpointError, bytes_of, leaves_of, nest

CHUNK_BYTES = 2**23
"""Most bytes of a chunk of an array: what is compressed, and unpacked again, as one."""
MOST_EXPERTS = 64
"""Arrays `[periods, X, ...]` of at most this many experts are stored expert by expert."""
READ_BYTES = 2**28
"""Bytes of chunks that are being read at one time."""


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
