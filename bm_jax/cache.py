"""The decoding cache: everything the model keeps of the tokens it has read, as a plain pytree.

Mamba layers keep a constant amount (convolution taps and scan state); attention layers keep keys and values.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from bm_jax.config import ModelConfig


class Cache(NamedTuple):
    """State after some tokens; `forward` takes one and returns the next.

    A row goes on with the document of its last token. Rows of different lengths are padded on the right, with the `lengths`
    of `forward`, or on the left, with `segment_ids` of 0: only then the padding counts as fed. Attention layers must be fed
    at most the `max_length` tokens that they were given room for.
    """

    layers: dict[str, dict[str, dict[str, Array]]]
    """By layer of the period and kind; arrays `[repeats, B, ...]`."""
    segment: Array
    """Segment id of the last token `[B]`."""
    positions: Array
    """Tokens of that segment so far `[B]`."""
    length: Array
    """Tokens fed so far `[B]`."""


def init_cache(config: ModelConfig, batch: int, max_length: int = 0) -> Cache:
    """An empty cache for `batch` rows.

    `max_length` is the number of tokens that the cache will be fed; only attention layers allocate
    room by it. Taps, keys and values are in the compute dtype, scan states in float32.
    """
    if "attention" in config.kinds and max_length < 1:
        raise ValueError(f"init_cache: a model with attention layers needs max_length of at least 1, got {max_length}")
    R, B, dtype = config.repeats, batch, jnp.dtype(config.compute_dtype)
    E, N, K = config.inner_width, config.mamba.state_size, config.mamba.conv_width
    heads = (R, B, max_length, config.attention.kv_heads, config.head_size)

    def layer(kind: str) -> dict[str, Array]:
        if kind == "mamba":
            state = jnp.zeros((R, B, E, N), jnp.promote_types(dtype, jnp.float32))
            return {"conv": jnp.zeros((R, B, K - 1, E), dtype), "state": state}
        return {"key": jnp.zeros(heads, dtype), "value": jnp.zeros(heads, dtype)}

    layers = {
        f"layer_{i}": {kind: layer(kind) for kind in kinds.split("+") if kind in ("mamba", "attention")}
        for i, kinds in enumerate(config.layers)
    }
    return Cache(layers, jnp.ones(B, jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32))
