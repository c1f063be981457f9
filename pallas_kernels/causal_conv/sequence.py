"""The causal convolution of a sequence that is split over devices, for use inside `jax.shard_map`.

A shard needs the K - 1 tokens before it. They come from the shard before, or from as many shards as hold K - 1 tokens,
and take the place of `causal_conv`'s initial state, so whichever kernel serves one device serves each shard.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.causal_conv.api import causal_conv
from pallas_kernels.collectives import axis_size, from_earlier, from_last


def causal_conv_over(
    axis_name: str,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`causal_conv` of the sequence whose shards, in order, lie along mesh axis `axis_name`.

    Call it inside `jax.shard_map(..., check_vma=False)`: its loops start from constants, which the check takes to be
    replicated. Arguments and results are those of `causal_conv`, with L the
    tokens of one shard, which may be fewer than K - 1: x and segment_ids are split along L; weight, bias and
    initial_state (the K - 1 inputs before the first token of the whole sequence) are the same on every shard along the
    axis, and so is the returned state (after the last token of the whole sequence). y stays split.

    Raises:
        ValueError: `axis_name` is not an axis of a surrounding shard_map, or a rank or size that does not fit.
        TypeError: segment_ids that are not integers.
    """
    axis_size("causal_conv_over", axis_name)
    if x.ndim != 3 or weight.ndim != 2:
        raise ValueError(f"causal_conv_over: x must be [B, L, E] and weight [K, E], got {x.shape} and {weight.shape}")
    batch, _, channels = x.shape
    width = weight.shape[0]
    state = (batch, width - 1, channels)
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(f"causal_conv_over: initial_state must have shape {state}, got {initial_state.shape}")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(f"causal_conv_over: segment_ids must have shape {x.shape[:2]}, got {segment_ids.shape}")
    if x.shape[1] > 0 and width > 1:  # `causal_conv` names what is wrong with the rest
        initial_state = _context(axis_name, x, width - 1, initial_state, segment_ids)
    y, final = causal_conv(x, weight, bias, initial_state=initial_state, segment_ids=segment_ids, implementation=implementation)
    return y, from_last(axis_name, final)


def _context(axis_name: str, x: Array, width: int, initial_state: Array | None, segment_ids: Array | None) -> Array:
    """The `width` inputs before this shard `[B, width, E]`, zero where the segment of its first token does not reach."""
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], width, x.shape[2]), x.dtype)
    # Tokens before the first shard are those of the initial state: shard i has the last `width` of it and i shards.
    position = lax.axis_index(axis_name) * x.shape[1] + jnp.arange(-width, 0)
    before = jnp.take(initial_state.astype(x.dtype), position + width, axis=1, mode="clip")
    context = jnp.where((position < 0)[:, None], before, _preceding(axis_name, x, width))
    if segment_ids is None:
        return context
    # The initial state belongs to the segment of the first token, whichever it is: no change of id lies before that.
    ids = jnp.concatenate([_preceding(axis_name, segment_ids, width), segment_ids[:, :1]], axis=1)
    changes = (ids[:, 1:] != ids[:, :-1]) & (position >= 0)
    reaches = jnp.flip(jnp.cumsum(jnp.flip(changes, axis=1), axis=1), axis=1) == 0
    return jnp.where(reaches[..., None], context, 0)


def _preceding(axis_name: str, x: Array, width: int) -> Array:
    """The `width` tokens `[B, width, ...]` before this shard of `[B, L, ...]`; zeros before the first shard."""
    pieces, hops = [], 0
    while width > 0:
        hops += 1
        piece = x[:, -min(width, x.shape[1]) :]
        pieces.insert(0, from_earlier(axis_name, piece, hops))
        width -= piece.shape[1]
    return jnp.concatenate(pieces, axis=1)
