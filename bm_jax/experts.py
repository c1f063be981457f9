"""The experts of one device: rows sorted by expert, grouped products, the sort undone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from bm_jax.config import Activation
from bm_jax.layers import activate
from pallas_kernels.grouped_matmul import grouped_matmul


def apply_experts(w_in: Array, w_out: Array, tokens: Array, expert: Array, gate: Array, activation: Activation) -> Array:
    """The sum of what each token's experts make of it, weighed by the gates.

    Args:
        w_in: `[X, M, F]`, or `[X, M, 2, F]` for a gated activation, in the dtype of `tokens`.
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


def expert_products(w_in: Array, w_out: Array, rows: Array, expert: Array, activation: Activation) -> Array:
    """Each row `[R, M]` through its expert `[R]`; X is no expert, which gives zero."""
    order = jnp.argsort(expert, stable=True)
    place = jnp.argsort(order)
    group_sizes = jnp.sum(expert[:, None] == jnp.arange(len(w_in)), axis=0)
    hidden = grouped_matmul(take_rows(rows, order, place), w_in.reshape(*w_in.shape[:2], -1), group_sizes)
    hidden = activate(hidden.reshape(-1, *w_in.shape[2:]), activation)
    return take_rows(grouped_matmul(hidden, w_out, group_sizes), place, order)


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
