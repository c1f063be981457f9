"""The selective scan in plain XLA: chunks of time, recomputed from the state at each chunk's start in the backward pass.

The residuals are the inputs and one state per chunk, O(L / CHUNK) states and never `[B, L, E, N]`. Inside a chunk the
recurrence is an associative scan on accelerators (parallel over time) and a plain loop on CPUs, where the associative
form does more work than the cores can hide. States are laid out `[N, E]`, channels minor, so that they fill vectors.

The backward pass runs the adjoint recurrence `g[t] = C[t] dy[t] + decay[t+1] g[t+1]` from the last token to the first;
every gradient is a product of g with the forward quantities. It has no atomics, so two runs agree bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.selective_scan.shapes import accumulator_dtype, survives

CHUNK = 16


class Tokens(NamedTuple):
    """What the recurrence reads at each token, time first: `[T, B, E]` or `[T, B, N]`."""

    x: Array
    """Input u `[T, B, E]`."""
    step: Array
    """Step sizes `[T, B, E]`, bias and softplus applied."""
    B: Array
    C: Array
    keep: Array | None
    """`[T, B]`, 0 where the state is reset before the token and 1 elsewhere; None for one segment."""


def selective_scan_xla(
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
    """`selective_scan` in chunks of tokens; one token alone is the bare recurrence."""
    dtype = accumulator_dtype(u, dt, A, B, C, D, z, dt_bias, initial_state)
    length = u.shape[1]
    x, step, B, C = (array.astype(dtype) for array in (u, dt, B, C))
    if dt_bias is not None:
        step = step + dt_bias.astype(dtype)
    if dt_softplus:
        step = jax.nn.softplus(step)
    if length == 1:
        y, state = _one_token(x[:, 0], step[:, 0], A.astype(dtype), B[:, 0], C[:, 0], initial_state)
    else:
        y, state = _many_tokens(x, step, A.astype(dtype), B, C, initial_state, segment_ids)
    if D is not None:
        y = y + D.astype(dtype) * x
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(u.dtype), state


def _one_token(x: Array, step: Array, A: Array, B: Array, C: Array, state: Array | None) -> tuple[Array, Array]:
    """y `[B, 1, E]` and the state `[B, E, N]`: what generation runs, with no transposition of the state."""
    increment = (step * x)[..., None] * B[:, None, :]
    if state is not None:
        increment = jnp.exp(step[..., None] * A) * state.astype(x.dtype) + increment
    return jnp.sum(increment * C[:, None, :], axis=-1)[:, None], increment


def _many_tokens(
    x: Array, step: Array, A: Array, B: Array, C: Array, initial_state: Array | None, segment_ids: Array | None
) -> tuple[Array, Array]:
    batch, length, channels = x.shape
    if initial_state is None:
        state = jnp.zeros((batch, A.shape[1], channels), x.dtype)
    else:
        state = initial_state.astype(x.dtype).swapaxes(1, 2)
    keep = None
    if segment_ids is not None:
        keep = survives(segment_ids).astype(x.dtype)
    size = min(CHUNK, length)
    tokens = jax.tree.map(lambda array: _split(array, size), Tokens(x, step, B, C, keep))
    y, state = _recurrence(tokens, A.T, state)
    return jnp.moveaxis(y.reshape(-1, batch, channels)[:length], 0, 1), state.swapaxes(1, 2)


def _split(array: Array, size: int) -> Array:
    """`[B, L, ...]` to `[chunks, size, B, ...]`. The tokens added at the end have step 0, so they leave the state as is."""
    time_major = jnp.moveaxis(array, 1, 0)
    padding = [(0, -len(time_major) % size)] + [(0, 0)] * (array.ndim - 1)
    # Step 0 makes a padding token the identity on the state only if its `keep` is 1.
    time_major = jnp.pad(time_major, padding, constant_values=1 if array.ndim == 2 else 0)
    return time_major.reshape(-1, size, *time_major.shape[1:])


@jax.custom_vjp
def _recurrence(tokens: Tokens, A: Array, state: Array) -> tuple[Array, Array]:
    """y `[chunks, T, B, E]` and the last state `[B, N, E]`, from `tokens` in chunks, A `[N, E]` and the first state."""
    return _forward(tokens, A, state)[0]


def _forward(tokens: Tokens, A: Array, state: Array):
    def chunk(state, tokens):
        y, final = lax.platform_dependent(tokens, A, state, cpu=_outputs_by_loop, default=_outputs_by_doubling)
        return final, (y, state)

    final, (y, starts) = lax.scan(chunk, state, tokens)
    return (y, final), (tokens, A, starts)


def _backward(residuals, cotangents):
    tokens, A, starts = residuals
    dy, d_final = cotangents

    def chunk(carry, inputs):
        g, dA = carry
        d_tokens, dA_chunk, g = lax.platform_dependent(*inputs, A, g, cpu=_gradients_by_loop, default=_gradients_by_doubling)
        return (g, dA + dA_chunk), d_tokens

    (d_state, dA), d_tokens = lax.scan(chunk, (d_final, jnp.zeros_like(A)), (tokens, starts, dy), reverse=True)
    return d_tokens, dA, d_state


_recurrence.defvjp(_forward, _backward)


# The functions below work on one chunk, or on one token of it: `[..., B, N, E]` states, `[..., B, E]` and `[..., B, N]` tokens.


def _decay(tokens: Tokens, A: Array) -> Array:
    decay = jnp.exp(tokens.step[..., None, :] * A)
    return decay if tokens.keep is None else decay * tokens.keep[..., None, None]


def _increment(tokens: Tokens) -> Array:
    return (tokens.step * tokens.x)[..., None, :] * tokens.B[..., :, None]


def _gradients(tokens: Tokens, A: Array, decay: Array, previous: Array, g: Array, dy: Array) -> tuple[Tokens, Array]:
    """Gradients of each token's inputs, and of the exponent `step * A`, from the adjoint state g and the state before."""
    state = decay * previous + _increment(tokens)
    d_exponent = g * previous * decay
    gB = jnp.sum(g * tokens.B[..., :, None], axis=-2)
    d_tokens = Tokens(
        x=tokens.step * gB,
        step=tokens.x * gB + jnp.sum(d_exponent * A, axis=-2),
        B=jnp.sum(g * (tokens.step * tokens.x)[..., None, :], axis=-1),
        C=jnp.sum(state * dy[..., None, :], axis=-1),
        keep=None if tokens.keep is None else jnp.zeros_like(tokens.keep),  # made from integers: no gradient is read
    )
    return d_tokens, d_exponent


def _outputs_by_loop(tokens: Tokens, A: Array, state: Array) -> tuple[Array, Array]:
    def token(state, tokens):
        state = _decay(tokens, A) * state + _increment(tokens)
        return state, jnp.sum(state * tokens.C[..., :, None], axis=-2)

    final, y = lax.scan(token, state, tokens)
    return y, final


def _gradients_by_loop(tokens: Tokens, state: Array, dy: Array, A: Array, g: Array) -> tuple[Tokens, Array, Array]:
    def forward(state, tokens):
        return _decay(tokens, A) * state + _increment(tokens), state

    _, previous = lax.scan(forward, state, tokens)

    def backward(carry, inputs):
        g, dA = carry
        tokens, previous, dy = inputs
        decay = _decay(tokens, A)
        g = g + tokens.C[..., :, None] * dy[..., None, :]
        d_tokens, d_exponent = _gradients(tokens, A, decay, previous, g, dy)
        return (decay * g, dA + jnp.sum(d_exponent * tokens.step[..., None, :], axis=0)), d_tokens

    (g, dA), d_tokens = lax.scan(backward, (g, jnp.zeros_like(A)), (tokens, previous, dy), reverse=True)
    return d_tokens, dA, g


def _combine(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Composition of two affine maps h -> decay * h + increment, the earlier one first."""
    return first[0] * second[0], second[0] * first[1] + second[1]


def _outputs_by_doubling(tokens: Tokens, A: Array, state: Array) -> tuple[Array, Array]:
    decays, increments = lax.associative_scan(_combine, (_decay(tokens, A), _increment(tokens)))
    states = decays * state + increments
    return jnp.sum(states * tokens.C[..., :, None], axis=-2), states[-1]


def _gradients_by_doubling(tokens: Tokens, state: Array, dy: Array, A: Array, g: Array) -> tuple[Tokens, Array, Array]:
    decay = _decay(tokens, A)
    decays, increments = lax.associative_scan(_combine, (decay, _increment(tokens)))
    previous = jnp.concatenate([state[None], (decays * state + increments)[:-1]])
    # The adjoint of a token sees the decay of the token after it; the last one sees the chunk's incoming adjoint whole.
    sources = tokens.C[..., :, None] * dy[..., None, :]
    after = jnp.concatenate([decay[1:], jnp.ones_like(decay[:1])])
    decays, increments = lax.associative_scan(_combine, (after, sources), reverse=True)
    g = decays * g + increments
    d_tokens, d_exponent = _gradients(tokens, A, decay, previous, g, dy)
    return d_tokens, jnp.sum(d_exponent * tokens.step[..., None, :], axis=(0, 1)), decay[0] * g[0]
