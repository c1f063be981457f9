"""The experts of one device: rows sorted by expert, grouped products, the sort undone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from bm_jax.config import Activation
from bm_jax.layers import activate, keep
from bm_jax.quantize import FEW_ROWS, Quantized, dequantize, product_of_all, product_of_chosen
from pallas_kernels.grouped_matmul import grouped_matmul

CHUNK = 128
"""Rows counted in one product by `places`."""


def apply_experts(
    w_in: Array | Quantized,
    w_out: Array | Quantized,
    tokens: Array,
    expert: Array,
    gate: Array,
    activation: Activation,
) -> Array:
    """The sum of what each token's experts make of it, weighed by the gates.

    Args:
        w_in: `[X, M, F]`, or `[X, M, 2, F]` for a gated activation, in the dtype of `tokens` or quantised.
        w_out: `[X, F, M]`, likewise.
        tokens: `[T, M]`.
        expert: integers `[T, K]`; X is no expert, which gives zero.
        gate: `[T, K]`.
        activation: of the experts, see `bm_jax.layers.activate`.

    Returns:
        `[T, M]` in the dtype of `tokens`.
    """
    T, K = expert.shape
    rows = expert_products(w_in, w_out, jnp.repeat(tokens, K, axis=0), expert.reshape(-1), activation)
    return weigh(rows.reshape(T, K, -1), gate)


def weigh(rows: Array, gate: Array) -> Array:
    """`[T, K, M]`, `[T, K]` -> `[T, M]`: the sum over a token's experts, weighed by their gates."""
    return jnp.sum(rows * gate[..., None].astype(rows.dtype), axis=1)


def expert_products(
    w_in: Array | Quantized, w_out: Array | Quantized, rows: Array, expert: Array, activation: Activation
) -> Array:
    """Each row `[R, M]` through its expert `[R]`; X is no expert, which gives zero.

    A batch that is decoded has few rows, and what costs is reading weights: accelerators then take all experts in one product.
    """
    R, X, quantised = len(rows), len(w_out[0] if isinstance(w_out, Quantized) else w_out), isinstance(w_in, Quantized)

    def through(product: Callable[..., Array], rows: Array, expert: Array) -> Array:
        return product(activate(product(rows, w_in, expert), activation), w_out, expert)

    chosen, every = partial(through, product_of_chosen), partial(through, product_of_all)
    if R <= X // 2:
        return chosen(rows, expert) if quantised else _grouped_products(w_in, w_out, rows, expert, activation)
    grouped = partial(_grouped_products, w_in, w_out, activation=activation)
    if R * X > FEW_ROWS:
        return grouped(rows, expert)
    return lax.platform_dependent(rows, expert, cpu=chosen if quantised and R <= X else grouped, default=every)


def _grouped_products(
    w_in: Array | Quantized, w_out: Array | Quantized, rows: Array, expert: Array, activation: Activation
) -> Array:
    """`expert_products` by sorting rows; kernels in int8 are made wide, as with many rows reading them costs little."""

    def widened(kernel: Array | Quantized) -> Array:
        return dequantize(kernel, axes=(1,)).astype(rows.dtype) if isinstance(kernel, Quantized) else kernel

    w_in, w_out = widened(w_in), widened(w_out)
    with jax.named_scope("dispatch"):
        place, group_sizes = map(keep, places(expert, len(w_in)))
        order = keep(inverse(place))
        sorted_rows = take_rows(rows, order, place)
    hidden = grouped_matmul(sorted_rows, w_in.reshape(*w_in.shape[:2], -1), group_sizes)
    # Without the barrier, where it is stacked over a loop's turns, XLA computes the product once more for the stack.
    hidden = lax.optimization_barrier(hidden)
    hidden = activate(keep(hidden).reshape(-1, *w_in.shape[2:]), activation)
    out = grouped_matmul(hidden, w_out, group_sizes)
    with jax.named_scope("dispatch"):
        return keep(take_rows(out, place, order))


def places(group: Array, groups: int) -> tuple[Array, Array]:
    """Where each of the rows goes when they are sorted by group, keeping their order within it; and the groups' sizes.

    A counting sort: rows of a group among the CHUNK before, by a product with a triangle of ones, and in earlier chunks.

    Args:
        group: integers `[R]`; `groups` is no group, whose rows come last.
        groups: number of groups.

    Returns:
        int32 `[R]`, a permutation, and int32 `[groups]`.
    """
    rows = len(group)
    member = jnp.pad(group, (0, -rows % CHUNK), constant_values=groups)[:, None] == jnp.arange(groups + 1)
    chunks = member.reshape(-1, CHUNK, groups + 1)
    triangle = jnp.tri(CHUNK, dtype=jnp.bfloat16)  # ones and zeros: exact in bfloat16, and their sums in float32
    within = jnp.einsum("ij,cjg->cig", triangle, chunks.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    within = within.astype(jnp.int32)
    total = within[:, -1]
    earlier = jnp.cumsum(total, axis=0, dtype=jnp.int32) - total
    sizes = jnp.sum(total, axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    place = jnp.sum(jnp.where(chunks, within + (earlier + starts)[:, None] - 1, 0), axis=2, dtype=jnp.int32)
    return place.reshape(-1)[:rows], sizes[:groups]


def inverse(permutation: Array) -> Array:
    """The permutation that undoes this one."""
    empty = jnp.zeros_like(permutation)
    return empty.at[permutation].set(
        jnp.arange(len(permutation), dtype=permutation.dtype), unique_indices=True, mode="promise_in_bounds"
    )


@jax.custom_vjp
def take_rows(x: Array, index: Array, inverse: Array, valid: Array | None = None, inverse_valid: Array | None = None) -> Array:
    """`x[index]` along the first axis, for an index that takes no row twice, and zero where `valid` is false.

    `inverse` says where each row of x went, `inverse_valid` whether it went anywhere: the gradient is a gather too, not a
    scatter.
    """
    return _take(x, index, valid)


def _take(x: Array, index: Array, valid: Array | None) -> Array:
    return x[index] if valid is None else jnp.where(valid[:, None], x[index], 0)


take_rows.defvjp(
    lambda x, index, inverse, valid=None, inverse_valid=None: (_take(x, index, valid), (inverse, inverse_valid)),
    lambda residuals, cotangent: (_take(cotangent, *residuals), None, None, None, None),
)
