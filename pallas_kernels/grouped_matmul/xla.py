"""The grouped product in plain XLA: one dense batched product when loads allow it, a slower form for any load otherwise.

XLA's ragged product runs far below the speed of a dense one on CPUs and GPUs. Routing that works keeps groups near the
mean, so groups are first tried padded to `SLACK` times the mean (`_padded`). When one is larger, the rows are cut into
blocks of one group each on CPUs (`_blocked`) and given to `lax.ragged_dot` elsewhere. The program decides while it runs.

Padding and its undoing are both gathers, forward and backward: scatters are slow on CPUs and need atomics on GPUs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

SLACK = 1.25
BLOCK_ROWS = 64


class _Slots:
    """Rows in slots `[blocks, capacity]`, each block of one group; rows of no group have no slot and come back as zero."""

    def __init__(self, row: Array, filled: Array, slot: Array, placed: Array, group: Array | None) -> None:
        self.row, self.filled, self.slot, self.placed, self.group = row, filled, slot, placed, group

    def spread(self, rows: Array) -> Array:
        """`[T, K]` to `[blocks, capacity, K]`, zero in empty slots."""
        return jnp.where(self.filled[..., None], rows[self.row], 0)

    def collect(self, blocks: Array) -> Array:
        """`[blocks, capacity, N]` to `[T, N]`."""
        return jnp.where(self.placed[:, None], blocks.reshape(-1, blocks.shape[-1])[self.slot], 0)

    def matrices(self, rhs: Array) -> Array:
        """The matrix of each block."""
        return rhs if self.group is None else rhs[self.group]

    def product(self, lhs: Array, rhs: Array) -> Array:
        return self.collect(jnp.einsum("xck,xkn->xcn", self.spread(lhs), self.matrices(rhs)))

    def gradients(self, lhs: Array, rhs: Array, d_out: Array) -> tuple[Array, Array]:
        spread = self.spread(d_out)
        d_lhs = self.collect(jnp.einsum("xcn,xkn->xck", spread, self.matrices(rhs)))
        d_rhs = jnp.einsum("xck,xcn->xkn", self.spread(lhs), spread)
        if self.group is not None:
            # A product with the blocks' one-hot groups: deterministic, and fast where a scatter is not.
            owner = (jnp.arange(len(rhs))[:, None] == self.group).astype(d_rhs.dtype)
            d_rhs = jnp.tensordot(owner, d_rhs, axes=1)
        return d_lhs, d_rhs


def _padded(rows: int, group_sizes: Array) -> _Slots:
    """One block a group, of the same capacity: right only when no group is larger than that."""
    capacity = _capacity(rows, len(group_sizes))
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    row = jnp.minimum(starts[:, None] + jnp.arange(capacity), rows - 1)
    filled = jnp.arange(capacity) < group_sizes[:, None]
    group, placed = _group_of_row(rows, ends)
    slot = group * capacity + jnp.clip(jnp.arange(rows) - starts[group], 0, capacity - 1)
    return _Slots(row, filled, slot, placed, None)


def _blocked(rows: int, group_sizes: Array) -> _Slots:
    """Each group in as many blocks of a fixed number of rows as it needs."""
    groups = len(group_sizes)
    size = min(BLOCK_ROWS, max(1, rows // groups))
    count = min(rows, rows // size + groups)
    blocks = -(-group_sizes // size)
    last_block, ends = jnp.cumsum(blocks), jnp.cumsum(group_sizes)
    first_block, starts = last_block - blocks, ends - group_sizes
    block = jnp.arange(count)
    owner = _interval(block, last_block)
    within = (block - first_block[owner])[:, None] * size + jnp.arange(size)
    filled = (within < group_sizes[owner][:, None]) & (block < last_block[-1])[:, None]
    row = jnp.clip(starts[owner][:, None] + within, 0, rows - 1)
    group, placed = _group_of_row(rows, ends)
    slot = first_block[group] * size + jnp.arange(rows) - starts[group]
    return _Slots(row, filled, jnp.clip(slot, 0, count * size - 1), placed, owner)


def _interval(index: Array, ends: Array) -> Array:
    """Which of the consecutive intervals with these ends an index falls in; the last for one past them all."""
    # Comparing with every end beats a binary search at any number of experts in use, and compiles faster.
    return jnp.minimum(jnp.sum(index[:, None] >= ends, axis=1), len(ends) - 1)


def _group_of_row(rows: int, ends: Array) -> tuple[Array, Array]:
    row = jnp.arange(rows)
    group = _interval(row, ends)
    return group, row < ends[-1]


def _capacity(rows: int, groups: int) -> int:
    """Rows each group is padded to."""
    return min(rows, math.ceil(SLACK * rows / groups / 8) * 8)


def _ragged_product(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    out = lax.ragged_dot(lhs, rhs, group_sizes)
    return jnp.where((jnp.arange(len(lhs)) < jnp.sum(group_sizes))[:, None], out, 0)


def _ragged_product_gradients(lhs: Array, rhs: Array, group_sizes: Array, d_out: Array) -> tuple[Array, Array]:
    return jax.vjp(lambda lhs, rhs: _ragged_product(lhs, rhs, group_sizes), lhs, rhs)[1](d_out)


# JAX has no vmap of ragged_dot (per-example gradients, Jacobians), so it is one product after the other.
_ragged = jax.custom_batching.sequential_vmap(_ragged_product)
_ragged_gradients = jax.custom_batching.sequential_vmap(_ragged_product_gradients)


@jax.custom_vjp
def grouped_matmul_xla(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """`grouped_matmul` as a dense batched product where the loads allow it."""
    return _by_load(
        group_sizes,
        lambda slots, lhs, rhs: slots.product(lhs, rhs),
        lambda lhs, rhs: _ragged(lhs, rhs, group_sizes),
        lhs,
        rhs,
    )


def _forward(lhs: Array, rhs: Array, group_sizes: Array):
    return grouped_matmul_xla(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(residuals, d_out: Array):
    lhs, rhs, group_sizes = residuals

    gradients = _by_load(
        group_sizes,
        lambda slots, lhs, rhs, d_out: slots.gradients(lhs, rhs, d_out),
        lambda lhs, rhs, d_out: _ragged_gradients(lhs, rhs, group_sizes, d_out),
        lhs,
        rhs,
        d_out,
    )
    return *gradients, None


grouped_matmul_xla.defvjp(_forward, _backward)


def _by_load(group_sizes: Array, in_slots, ragged, *arrays: Array):
    """`in_slots(slots, *arrays)` or `ragged(*arrays)`, as the loads and the platform ask for."""
    rows, groups = len(arrays[0]), len(group_sizes)

    def any_load(*arrays: Array):
        return lax.platform_dependent(
            *arrays, cpu=lambda *arrays: in_slots(_blocked(rows, group_sizes), *arrays), default=ragged
        )

    if rows <= groups:
        return any_load(*arrays)
    if _capacity(rows, groups) == rows:
        return in_slots(_padded(rows, group_sizes), *arrays)
    fits = jnp.max(group_sizes) <= _capacity(rows, groups)
    return lax.cond(fits, lambda *arrays: in_slots(_padded(rows, group_sizes), *arrays), any_load, *arrays)
