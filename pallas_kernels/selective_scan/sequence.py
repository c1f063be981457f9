"""The selective scan of a sequence that is split over devices, for use inside `jax.shard_map`.

The recurrence is affine in its first state, so a shard of tokens acts on the state before it as `h -> decay * h + end`:
`end` is the state that the shard leaves when it starts from zero, and `decay = exp(A * sum of its steps)`, zero where a
segment begins inside it. Three phases:

1. every device scans its shard from zero, for `end`;
2. the pairs `[B, E, N]` are gathered, and every device composes those before it into the state that enters its shard;
3. every device scans its shard again, from that state.

Both scans are `selective_scan`, so whichever kernel serves one device serves each shard. Between devices travel states,
never tokens: 2 x shards x `[B, E, N]` and one segment id a row. Gradients are those of automatic differentiation, which
runs the same three phases backwards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.collectives import axis_size, from_earlier, from_last
from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.selective_scan.shapes import accumulator_dtype, check_arguments


def selective_scan_over(
    axis_name: str,
    u: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = True,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`selective_scan` of the sequence whose shards, in order, lie along mesh axis `axis_name`.

    Call it inside `jax.shard_map(..., check_vma=False)`: its loops start from constants, which the check takes to be
    replicated. Arguments and results are those of `selective_scan`, with L the
    tokens of one shard: u, dt, B, C, z and segment_ids are split along L; A, D, dt_bias and initial_state (the state
    before the first token of the whole sequence) are the same on every shard along the axis, and so is the returned
    state (after the last token of the whole sequence). y stays split.

    Raises:
        ValueError: `axis_name` is not an axis of a surrounding shard_map, or as `selective_scan`.
        TypeError, NotImplementedError: as `selective_scan`.
    """
    shards = axis_size("selective_scan_over", axis_name)
    check_arguments(u, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids)
    dtype = accumulator_dtype(u, dt, A, B, C, D, z, dt_bias, initial_state)
    if initial_state is None:
        initial_state = jnp.zeros((u.shape[0], *A.shape), dtype)
    initial_state = initial_state.astype(dtype)

    options = {"dt_softplus": dt_softplus, "segment_ids": segment_ids, "implementation": implementation}
    if shards > 1:
        with jax.named_scope("carries"):
            # From zeros in the accumulator's type: `end` must be as wide as the whole call, whatever is left out here.
            zero = jnp.zeros_like(initial_state)
            _, end = selective_scan(u, dt, A, B, C, dt_bias=dt_bias, initial_state=zero, **options)
            decay = _total_decay(dt.astype(dtype), A.astype(dtype), dt_bias, dt_softplus, segment_ids)
            initial_state = _entering_state(axis_name, initial_state, end, decay, segment_ids)
    y, state = selective_scan(u, dt, A, B, C, D, z=z, dt_bias=dt_bias, initial_state=initial_state, **options)
    return y, from_last(axis_name, state)


def _total_decay(dt: Array, A: Array, dt_bias: Array | None, dt_softplus: bool, segment_ids: Array | None) -> Array:
    """What is left of the state after a shard `[B, E, N]`: zero where a segment begins after the shard's first token."""
    step = dt if dt_bias is None else dt + dt_bias.astype(dt.dtype)
    if dt_softplus:
        step = jax.nn.softplus(step)
    decay = jnp.exp(jnp.sum(step, axis=1)[:, :, None] * A)
    if segment_ids is None:
        return decay
    one_segment = jnp.all(segment_ids[:, 1:] == segment_ids[:, :-1], axis=1)
    return jnp.where(one_segment[:, None, None], decay, 0)


def _entering_state(axis_name: str, initial_state: Array, end: Array, decay: Array, segment_ids: Array | None) -> Array:
    """The state before this shard's first token `[B, E, N]`: zero where that token begins a segment."""
    index = lax.axis_index(axis_name)
    begins = jnp.zeros(len(end), bool)
    if segment_ids is not None:
        begins = (from_earlier(axis_name, segment_ids[:, -1]) != segment_ids[:, 0]) & (index > 0)

    def shard(state: Array, carries: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        end, decay, begins = carries
        state = jnp.where(begins[:, None, None], 0, state)
        return decay * state + end, state

    _, entering = lax.scan(shard, initial_state, lax.all_gather((end, decay, begins), axis_name))
    return entering[index]
