"""The mixture-of-experts layer: route, sort tokens by expert, grouped products, undo the sort, weigh by the gates."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from bm_jax.config import ModelConfig, MoeConfig
from bm_jax.initialization import Parameter, linear, zeros
from bm_jax.layers import Context, activate, hidden_shape
from bm_jax.routing import Routing, Statistics, jitter, route
from bm_jax.shapes import Hidden
from pallas_kernels.grouped_matmul import grouped_matmul


def moe_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of the layer: router and stacked experts."""
    M, X, F = config.width, config.moe.experts, config.moe.width
    parameters = {
        "router": linear((M, X), fan_in=M),
        "w_in": linear((X, M, *hidden_shape(F, config.moe.activation)), fan_in=M),
        "w_out": linear((X, F, M), fan_in=F),
    }
    if config.moe.router_bias:
        parameters["router_bias"] = zeros((X,))
    return parameters


def moe(
    parameters: dict[str, Array],
    x: Hidden,
    context: Context,
    config: ModelConfig,
    *,
    training: bool,
    key: Array | None = None,
) -> tuple[Hidden, Statistics]:
    """Send every token to its experts and sum what they return, weighed by the gates.

    Args:
        parameters: as declared by `moe_parameters`.
        x: normed hidden values `[B, L, M]`.
        context: padding tokens are sent to no expert and get zero.
        config: the model.
        training: routing of training (Sinkhorn, capacity, jitter) or of inference.
        key: for input jitter; None for none.

    Returns:
        `[B, L, M]` in the compute dtype, and the routing statistics of this call.
    """
    dtype = jnp.dtype(config.compute_dtype)
    tokens = x.reshape(-1, x.shape[-1])
    mask = None if context.mask is None else context.mask.reshape(-1)
    with jax.named_scope("router"):
        inputs = tokens.astype(jnp.promote_types(dtype, jnp.float32))
        if key is not None:
            inputs = jitter(inputs, key, config.moe.input_jitter)
        logits = jnp.dot(inputs, parameters["router"], precision=jax.lax.Precision.HIGHEST)
        if config.moe.router_bias:
            logits = logits + parameters["router_bias"]
        routing = route(logits, config.moe, training=training, mask=mask)
    with jax.named_scope("experts"):
        capacity = expert_capacity(len(tokens), config.moe) if training else None
        y, dropped = run_experts(parameters, tokens.astype(dtype), routing, config.moe, mask=mask, capacity=capacity)
    return y.reshape(x.shape), routing.statistics._replace(dropped=dropped)


def expert_capacity(tokens: int, config: MoeConfig) -> int | None:
    """Assignments an expert takes before it drops (Fedus et al. 2021, equation 3); None for no limit."""
    if config.capacity_factor is None:
        return None
    return math.ceil(config.capacity_factor * tokens * config.top_k / config.experts)


def run_experts(
    parameters: dict[str, Array],
    tokens: Array,
    routing: Routing,
    config: MoeConfig,
    *,
    mask: Array | None = None,
    capacity: int | None = None,
) -> tuple[Array, Array]:
    """Apply to each token `[T, M]` the experts of `routing`, weighed by the gates.

    Assignments are sorted by expert, so that each expert's rows are consecutive, multiplied in one grouped product and
    put back. With a capacity, an expert keeps its first assignments in token order and drops the rest; a token whose
    assignments are all dropped gets zero.

    Returns:
        `[T, M]` in the dtype of `tokens`, and the fraction of assignments dropped (of tokens not masked).
    """
    T, K = routing.index.shape
    X = config.experts
    expert = routing.index if mask is None else jnp.where(mask[:, None], routing.index, X)  # X: no expert
    expert = expert.reshape(-1)
    wanted = jnp.sum(expert[:, None] == jnp.arange(X), axis=0)
    group_sizes, dropped = wanted, jnp.zeros((), jnp.float32)
    order = jnp.argsort(expert, stable=True)
    if capacity is not None:
        rank = jnp.arange(T * K) - (jnp.cumsum(wanted) - wanted)[jnp.minimum(expert[order], X - 1)]
        kept = jnp.zeros(T * K, bool).at[order].set(rank < capacity)
        expert = jnp.where(kept, expert, X)
        order = jnp.argsort(expert, stable=True)
        group_sizes = jnp.minimum(wanted, capacity)
        dropped = 1 - jnp.sum(group_sizes) / jnp.maximum(jnp.sum(wanted), 1)

    place = jnp.argsort(order)
    rows = permute(jnp.repeat(tokens, K, axis=0), order, place)
    w_in, w_out = (parameters[name].astype(tokens.dtype) for name in ("w_in", "w_out"))
    hidden = grouped_matmul(rows, w_in.reshape(X, w_in.shape[1], -1), group_sizes)
    hidden = activate(hidden.reshape(-1, *w_in.shape[2:]), config.activation)
    out = permute(grouped_matmul(hidden, w_out, group_sizes), place, order).reshape(T, K, -1)
    return jnp.sum(out * routing.gate[..., None].astype(out.dtype), axis=1), dropped


@jax.custom_vjp
def permute(x: Array, order: Array, inverse: Array) -> Array:
    """x[order] along the first axis, for a permutation and its inverse; the gradient is a gather too, not a scatter."""
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, cotangent: (cotangent[inverse], None, None),
)
