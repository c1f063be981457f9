"""The grouped product as one dense product a group, masked: the specification."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def grouped_matmul_reference(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """`grouped_matmul`, X times the work it needs."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(lhs.shape[0])[:, None]
    out = jnp.zeros((lhs.shape[0], rhs.shape[2]), lhs.dtype)
    for group in range(rhs.shape[0]):
        inside = (rows >= ends[group] - group_sizes[group]) & (rows < ends[group])
        out = out + jnp.where(inside, jnp.where(inside, lhs, 0) @ rhs[group], 0)
    return out
