"""Norms, activations, projections and the dense MLP: plain functions shared by every layer kind."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bm_jax.config import GATED_ACTIVATIONS, Activation, ModelConfig
from bm_jax.initialization import Parameter, linear
from bm_jax.quantize import Quantized, product
from bm_jax.shapes import Hidden


class Context(NamedTuple):
    """What a layer needs to know of the tokens besides their hidden values."""

    segment_ids: Array | None
    """`[B, L]`, or None for one document a row."""
    mask: Array | None
    """`[B, L]`, False at padding; None when there is none."""
    positions: Array
    """Tokens of the same document before each token `[B, L]`, cached ones included."""
    continues: Array
    """`[B]`, whether the first token continues the document that the cache holds."""
    cached: Array
    """Tokens fed to the cache before these `[B]`; 0 without a cache."""
    lengths: Array | None = None
    """How many of the tokens are fed `[B]`, the first ones; what comes after changes no cache. None for all."""


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / rms(x) * scale over the last axis, computed in at least float32 and returned so."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / deviation * scale + bias over the last axis, computed in at least float32 and returned so."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return rms_norm(x, scale, eps) + bias


KEPT = "kept"
"""The name of results that a backward pass which recomputes others does not."""


def keep(x: Array) -> Array:
    """`x`, which a backward pass with `run.remat` "dots" does not compute again: that would cost more than keeping it."""
    return checkpoint_name(x, KEPT)


def project(x: Array, kernel: Array | Quantized, dtype: jnp.dtype, *, axes: int = 1, result: jnp.dtype | None = None) -> Array:
    """Contract the last `axes` axes of x with the first of kernel, both cast to `dtype`, to `[..., *kernel.shape[axes:]]`.

    The dtype of what is returned is `result`, or `dtype` where that is None.
    """
    if isinstance(kernel, Quantized):
        return product(x.astype(dtype), kernel, axes).astype(result or dtype)
    return jnp.tensordot(x.astype(dtype), kernel.astype(dtype), axes=axes, preferred_element_type=result)


def hidden_shape(width: int, activation: Activation) -> tuple[int, ...]:
    """Trailing shape of an MLP's first kernel: `[2, F]` for gated activations (gate first), `[F]` for plain ones."""
    return (2, width) if activation in GATED_ACTIVATIONS else (width,)


def activate(hidden: Array, activation: Activation) -> Array:
    """Apply the activation: `[..., 2, F]` to `[..., F]` when gated (act(first) * second), `[..., F]` to itself otherwise.

    swiglu gates with SiLU, geglu with the erf form of GELU, geglu_tanh with its tanh approximation.
    """
    if activation == "swiglu":
        return jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
    if activation in ("geglu", "geglu_tanh"):
        return jax.nn.gelu(hidden[..., 0, :], approximate=activation == "geglu_tanh") * hidden[..., 1, :]
    if activation == "gelu":
        return jax.nn.gelu(hidden, approximate=False)
    return jax.nn.silu(hidden)


def mlp_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of the dense MLP layer."""
    width, hidden = config.mlp.width, hidden_shape(config.mlp.width, config.mlp.activation)
    return {
        "w_in": linear((config.width, *hidden), fan_in=config.width),
        "w_out": linear((width, config.width), fan_in=width),
    }


def mlp(parameters: dict[str, Array], x: Hidden, config: ModelConfig) -> Hidden:
    """The dense MLP: `w_out(activation(w_in(x)))`, in the compute dtype."""
    dtype = jnp.dtype(config.compute_dtype)
    hidden = activate(keep(project(x, parameters["w_in"], dtype)), config.mlp.activation)
    return project(hidden, parameters["w_out"], dtype)
