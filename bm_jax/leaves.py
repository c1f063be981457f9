"""Trees of arrays as leaves by path, which is how files hold them, and the error of those files."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import jax


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


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one it came from, says that there is no room (Orbax hides the number in its text)."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
