"""The mixture-of-experts layer: route every token, drop what exceeds a capacity, run the experts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from bm_jax.config import ModelConfig, MoeConfig
from bm_jax.expert_parallel import Weights, apply_experts, gather_experts
from bm_jax.experts import places
from bm_jax.initialization import Parameter, linear, zeros
from bm_jax.layers import Context, hidden_shape, keep
from bm_jax.routing import Routing, Statistics, jitter, route
from bm_jax.shapes import Hidden
from bm_jax.sharding import batch_parts


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
    with jax.named_scope("experts"):
        x, inputs, weights = gather_experts(x.astype(dtype), {name: parameters[name] for name in ("w_in", "w_out")})
    mask = None if context.mask is None else context.mask.reshape(-1)
    with jax.named_scope("router"):
        inputs = inputs.reshape(-1, x.shape[-1])
        if key is not None:
            inputs = jitter(inputs.astype(jnp.promote_types(dtype, jnp.float32)), key, config.moe.input_jitter)
        logits = keep(router_logits(inputs, parameters["router"]))
        if config.moe.router_bias:
            logits = logits + parameters["router_bias"]
        routing = route(logits, config.moe, training=training, mask=mask, parts=batch_parts(len(x)))
    with jax.named_scope("experts"):
        capacity = expert_capacity(len(inputs), config.moe) if training else None
        y, dropped = run_experts(weights, x, routing, config.moe, mask=mask, capacity=capacity)
    return y, routing.statistics._replace(dropped=dropped)


def router_logits(x: Array, router: Array) -> Array:
    """`x` `[T, M]` times the float32 `router` `[M, X]`, as exact as a float32 product: `[T, X]`, in float32 or wider.

    With tokens in bfloat16, float32 factors are split in three bfloat16 parts, whose products are side by side in one that
    reads the tokens as they are; a product in float32 would convert them first.
    """
    if x.dtype != jnp.bfloat16 or router.dtype != jnp.float32:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.dot(x.astype(dtype), router, precision=jax.lax.Precision.HIGHEST)
    return _router_logits(x, router)


def _parts(x: Array) -> list[Array]:
    """float32 as three bfloat16 parts that sum to it: its leading, middle and last bits."""
    parts = []
    for _ in range(3):
        # Rounded by an operation that the compiler must not take for an exact conversion back and forth.
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _times_parts(x: Array, y: Array) -> Array:
    """`x` `[R, C]` in bfloat16 times float32 `y` `[C, X]`, summed in float32."""
    products = jnp.dot(x, jnp.concatenate(_parts(y), axis=1), preferred_element_type=jnp.float32)
    return jnp.sum(products.reshape(len(x), 3, -1), axis=1)


@jax.custom_vjp
def _router_logits(x: Array, router: Array) -> Array:
    return _times_parts(x, router)


def _router_backward(residuals: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    x, router = residuals
    d_parts, router_parts = _parts(d), _parts(router)
    # The other six of nine products are below the rounding of the result to bfloat16.
    pairs = [(0, 0), (0, 1), (1, 0)]
    left = jnp.concatenate([d_parts[i] for i, _ in pairs], axis=1)
    right = jnp.concatenate([router_parts[j] for _, j in pairs], axis=1)
    d_x = jnp.dot(left, right.T, preferred_element_type=jnp.float32)
    return d_x.astype(x.dtype), _times_parts(x.T, d)


_router_logits.defvjp(lambda x, router: (_router_logits(x, router), (x, router)), _router_backward)


def expert_capacity(tokens: int, config: MoeConfig) -> int | None:
    """Assignments an expert takes before it drops (Fedus et al. 2021, equation 3); None for no limit."""
    if config.capacity_factor is None:
        return None
    return math.ceil(config.capacity_factor * tokens * config.top_k / config.experts)


def run_experts(
    weights: Weights,
    tokens: Array,
    routing: Routing,
    config: MoeConfig,
    *,
    mask: Array | None = None,
    capacity: int | None = None,
) -> tuple[Array, Array]:
    """Apply to each token `[B, L, M]` the experts of `routing`, weighed by the gates.

    The weights are as `gather_experts` returns them. With a capacity, an expert keeps its first assignments in token order and
    drops the rest; a token whose assignments are all dropped gets zero.

    Returns:
        `[B, L, M]` in the dtype of `tokens`, and the fraction of assignments dropped (of tokens not masked).
    """
    X, shape = config.experts, (*tokens.shape[:-1], -1)
    expert = routing.index if mask is None else jnp.where(mask[:, None], routing.index, X)  # X: no expert
    dropped = jnp.zeros((), jnp.float32)
    if capacity is not None:
        expert, dropped = _drop(expert, X, capacity)
    expert, gate = expert.reshape(shape), routing.gate.reshape(shape)
    y = apply_experts(weights["w_in"], weights["w_out"], tokens, expert, gate, config.activation, exchange=config.exchange)
    return y, dropped


def _drop(expert: Array, experts: int, capacity: int) -> tuple[Array, Array]:
    """`expert` `[T, K]` without the assignments past each expert's first `capacity`, and the fraction of them."""
    flat = expert.reshape(-1)
    place, wanted = places(flat, experts)
    rank = place - (jnp.cumsum(wanted) - wanted)[jnp.minimum(flat, experts - 1)]
    kept = jnp.where(rank < capacity, flat, experts).reshape(expert.shape)
    all_wanted = jnp.sum(wanted)
    dropped = all_wanted - jnp.sum(jnp.minimum(wanted, capacity))
    return kept, (dropped / jnp.maximum(all_wanted, 1)).astype(jnp.float32)
