"""What the operators split over a sequence axis exchange between devices, for use inside `jax.shard_map`."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def axis_size(operator: str, axis_name: str) -> int:
    """The number of shards along `axis_name`.

    Raises:
        ValueError: the code does not run inside a `jax.shard_map` over that axis.
    """
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"{operator}: axis_name {axis_name!r} is not an axis of a surrounding jax.shard_map; call it inside one"
        ) from None


def from_earlier(axis_name: str, x: Array, hops: int = 1) -> Array:
    """`x` of the shard `hops` before this one; zeros where there is none."""
    size = lax.axis_size(axis_name)
    return lax.ppermute(x, axis_name, [(i, i + hops) for i in range(size - hops)])


def from_last(axis_name: str, x: Array) -> Array:
    """`x` of the last shard on every shard, in the dtype of `x`."""
    last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1
    # A sum with one term that is not zero is exact in any type, but gradients are summed too: in at least float32.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return lax.psum(jnp.where(last, wide, 0), axis_name).astype(x.dtype)
