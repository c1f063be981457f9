"""Causal grouped-query attention with optional rotary positions and sliding window (the comparison systems' mixer)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from bm_jax.config import ModelConfig
from bm_jax.initialization import Parameter, linear
from bm_jax.layers import Context, keep, project
from bm_jax.shapes import Hidden
from pallas_kernels.dispatch import target


def attention_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of the mixer, without biases."""
    M, H, G, size = config.width, config.attention.heads, config.attention.kv_heads, config.head_size
    return {
        "query": linear((M, H, size), fan_in=M),
        "key": linear((M, G, size), fan_in=M),
        "value": linear((M, G, size), fan_in=M),
        "out": linear((H, size, M), fan_in=H * size),
    }


def rotate(x: Array, positions: Array, base: float) -> Array:
    """Rotary positions (Su et al. 2021, equation 34): x `[B, L, H, D]`, positions `[B, L]`; pairs are (i, i + D / 2)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = x[..., :half], x[..., half:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attention(
    parameters: dict[str, Array],
    x: Hidden,
    cache: dict[str, Array] | None,
    context: Context,
    config: ModelConfig,
) -> tuple[Hidden, dict[str, Array] | None]:
    """Attend to the tokens of the same document at or before each token.

    Args:
        parameters: as declared by `attention_parameters`.
        x: normed hidden values `[B, L, M]`.
        cache: `key` and `value` `[B, S, G, D]`, filled up to `context.cached`, or None to attend within x alone. The
            caller keeps the tokens fed within S.
        context: documents, positions and padding.
        config: the model.

    Returns:
        `[B, L, M]` in the compute dtype, and the cache with these tokens written (None when none was given).
    """
    dtype = jnp.dtype(config.compute_dtype)
    query, key, value = (keep(project(x, parameters[name], dtype)) for name in ("query", "key", "value"))
    if config.attention.rotary:
        query = rotate(query, context.positions, config.attention.rotary_base)
        key = rotate(key, context.positions, config.attention.rotary_base)
    first = context.cached
    if cache is not None:
        place = (jnp.arange(len(x))[:, None], first[:, None] + jnp.arange(x.shape[1]))
        key, value = (
            cache[name].at[place].set(new.astype(cache[name].dtype), mode="drop", unique_indices=True)  # padding may be beyond
            for name, new in (("key", key), ("value", value))
        )
        cache = {"key": key, "value": value}

    # A document is a run of slots, so a token sees the slots from its document's first to its own.
    slot = jnp.arange(key.shape[1])
    own = (first[:, None] + jnp.arange(x.shape[1]))[..., None]
    oldest = own - context.positions[..., None]
    if config.attention.window is not None:
        oldest = jnp.maximum(oldest, own - config.attention.window + 1)
    visible = (slot >= oldest) & (slot <= own)
    key, value = key.astype(dtype), value.astype(dtype)
    mixed = jax.nn.dot_product_attention(query, key, value, mask=visible[:, None], implementation=_fused(query, key))
    return project(keep(mixed), parameters["out"], dtype, axes=2), cache


def _fused(query: Array, key: Array) -> Literal["cudnn"] | None:
    """cuDNN's flash attention, which keeps no scores, on this machine's NVIDIA GPU and where it serves; else XLA's."""
    size, lengths = query.shape[-1], (query.shape[1], key.shape[1])
    serves = (
        jax.default_backend() == "gpu"  # not for a described one: cuDNN is asked while it is traced
        and target().capability >= 8
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and size % 8 == 0
        and size <= 128
        and not any(length % 2 for length in lengths)
        and jax.sharding.get_abstract_mesh().shape.get("sequence", 1) == 1
    )
    return "cudnn" if serves else None
