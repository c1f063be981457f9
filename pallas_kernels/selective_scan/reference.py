"""The selective scan as a plain loop over time: the specification that every other implementation must match."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.selective_scan.shapes import accumulator_dtype


def selective_scan_reference(
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
) -> tuple[Array, Array]:
    """`selective_scan`, one token at a time; its gradients are those of automatic differentiation."""
    dtype = accumulator_dtype(u, dt, A, B, C, D, z, dt_bias, initial_state)
    batch, length, channels = u.shape
    x, step, A, B, C = (array.astype(dtype) for array in (u, dt, A, B, C))
    if dt_bias is not None:
        step = step + dt_bias.astype(dtype)
    if dt_softplus:
        step = jax.nn.softplus(step)
    if initial_state is None:
        initial_state = jnp.zeros((batch, channels, A.shape[1]), dtype)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)

    carry = initial_state.astype(dtype), segment_ids[:, 0]

    def token(carry, inputs):
        state, previous_ids = carry
        x_t, step_t, B_t, C_t, ids = inputs
        state = jnp.where((ids == previous_ids)[:, None, None], state, 0)
        decay = jnp.exp(step_t[:, :, None] * A)
        state = decay * state + (step_t * x_t)[:, :, None] * B_t[:, None, :]
        return (state, ids), jnp.sum(state * C_t[:, None, :], axis=-1)

    time_major = tuple(jnp.moveaxis(array, 1, 0) for array in (x, step, B, C, segment_ids))
    (state, _), outputs = jax.lax.scan(token, carry, time_major)
    y = jnp.moveaxis(outputs, 0, 1)
    if D is not None:
        y = y + D.astype(dtype) * x
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(u.dtype), state
