"""The grouped product in plain XLA: one batched product when the groups are near balance, `lax.ragged_dot` otherwise.

XLA's ragged product runs far below the speed of a dense one on CPUs and GPUs. Routing that works keeps groups near the
mean, so groups are first tried padded to `SLACK` times the mean, as one dense batched product. Larger groups take the
ragged product: same result, any load. Both directions decide at run time, inside the compiled program.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

SLACK = 1.25
MULTIPLE = 8


def _capacity(rows: int, groups: int) -> int:
    """Rows each group is padded to."""
    return min(rows, math.ceil(SLACK * rows / groups / MULTIPLE) * MULTIPLE)


def _batched(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """The product when no group is larger than the capacity."""
    rows, groups = lhs.shape[0], rhs.shape[0]
    capacity = _capacity(rows, groups)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    # Slot s of group x holds row starts[x] + s; slots past the group's end hold some other row, which nobody reads.
    slots = jnp.minimum(starts[:, None] + jnp.arange(capacity), rows - 1)
    filled = jnp.arange(capacity) < group_sizes[:, None]
    padded = jnp.where(filled[..., None], lhs[slots], 0)
    out = jnp.einsum("xck,xkn->xcn", padded, rhs)
    row = jnp.arange(rows)
    group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), groups - 1)
    slot = jnp.minimum(row - starts[group], capacity - 1)
    rows_out = out.reshape(groups * capacity, -1)[group * capacity + slot]
    return jnp.where((row < ends[-1])[:, None], rows_out, 0)


def _ragged(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """The product at any load."""
    out = lax.ragged_dot(lhs, rhs, group_sizes)
    return jnp.where((jnp.arange(lhs.shape[0]) < jnp.sum(group_sizes))[:, None], out, 0)


def _dispatch(lhs: Array, rhs: Array, group_sizes: Array, function) -> Array:
    fits = jnp.max(group_sizes) <= _capacity(lhs.shape[0], rhs.shape[0])
    return lax.cond(fits, lambda: function(_batched), lambda: function(_ragged))


@jax.custom_vjp
def grouped_matmul_xla(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """`grouped_matmul` as a dense batched product where the loads allow it."""
    return _dispatch(lhs, rhs, group_sizes, lambda product: product(lhs, rhs, group_sizes))


def _forward(lhs: Array, rhs: Array, group_sizes: Array):
    return grouped_matmul_xla(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(residuals, d_out: Array):
    lhs, rhs, group_sizes = residuals

    def gradients(product):
        return jax.vjp(lambda lhs, rhs: product(lhs, rhs, group_sizes), lhs, rhs)[1](d_out)

    return *_dispatch(lhs, rhs, group_sizes, gradients), None


grouped_matmul_xla.defvjp(_forward, _backward)
