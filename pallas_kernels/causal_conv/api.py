"""Causal depthwise convolution: one function in front of every implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.causal_conv.reference import causal_conv_reference
from pallas_kernels.dispatch import Implementation, resolve

IMPLEMENTATIONS = {"reference": Implementation(causal_conv_reference)}


def causal_conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Convolve each channel with the tokens before it: `y[t] = bias + sum over k of weight[k] * x[t - (K - 1) + k]`.

    Args:
        x: `[B, L, E]`.
        weight: `[K, E]`; the last tap, K - 1, multiplies the token itself.
        bias: `[E]`, or None.
        initial_state: the K - 1 inputs before the first token `[B, K - 1, E]`; zero when None.
        segment_ids: integers `[B, L]`; taps that reach back across a change of id read zero. The first token continues
            `initial_state` whatever its id.
        implementation: a key of `IMPLEMENTATIONS`, or None to choose.

    Returns:
        y `[B, L, E]` in the dtype of `x`, and the state that continues after the last token `[B, K - 1, E]` in the dtype
        of `x` (zero where the last token's segment does not reach back that far).

    Raises:
        ValueError: a rank or size that does not fit, naming the argument.
    """
    if x.ndim != 3 or weight.ndim != 2:
        raise ValueError(f"causal_conv: x must be [B, L, E] and weight [K, E], got {x.shape} and {weight.shape}")
    (batch, length, channels), width = x.shape, weight.shape[0]
    if length < 1:
        raise ValueError(f"causal_conv: x needs at least one token along L, got shape {x.shape}")
    expected = {
        "weight": (weight, (width, channels)),
        "bias": (bias, (channels,)),
        "initial_state": (initial_state, (batch, width - 1, channels)),
        "segment_ids": (segment_ids, (batch, length)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"causal_conv: {name} must have shape {shape} to fit x {x.shape}, got {array.shape}")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"causal_conv: segment_ids must be integers, got {segment_ids.dtype}")
    function = resolve("causal_conv", implementation, IMPLEMENTATIONS)
    return function(x, weight, bias, initial_state=initial_state, segment_ids=segment_ids)
