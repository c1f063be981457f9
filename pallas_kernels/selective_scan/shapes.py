"""Checks of the selective scan's arguments, and the dtype it computes in."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def accumulator_dtype(*arrays: Array | None) -> jnp.dtype:
    """float32, or float64 when any of `arrays` is float64."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays if array is not None))


def survives(segment_ids: Array) -> Array:
    """Whether the state survives into each token: bool `[B, L]`, true for the first one."""
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    return jnp.pad(same, ((0, 0), (1, 0)), constant_values=True)


def check_arguments(
    u: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    dt_bias: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
) -> None:
    """Raise ValueError or TypeError naming the first argument whose rank, size or dtype does not fit `u` and `A`."""
    if u.ndim != 3:
        raise ValueError(f"selective_scan: u must be [B, L, E], got shape {u.shape}")
    if A.ndim != 2:
        raise ValueError(f"selective_scan: A must be [E, N], got shape {A.shape}")
    (batch, length, channels), states = u.shape, A.shape[1]
    for name, array, sizes in (("u", u, (batch, length, channels)), ("A", A, (channels, states))):
        if min(sizes) < 1:
            raise ValueError(f"selective_scan: {name} needs at least one of everything, got shape {array.shape}")
    expected = {
        "dt": (dt, (batch, length, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, length, states)),
        "C": (C, (batch, length, states)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "dt_bias": (dt_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
        "segment_ids": (segment_ids, (batch, length)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"selective_scan: {name} must have shape {shape} to fit u {u.shape} and A {A.shape}, got {array.shape}"
            )
    for name, array in [("u", u), *((name, array) for name, (array, _) in expected.items())]:
        if array is None:
            continue
        wanted = jnp.integer if name == "segment_ids" else jnp.floating
        if not jnp.issubdtype(array.dtype, wanted):
            raise TypeError(f"selective_scan: {name} must have a {wanted.__name__} dtype, got {array.dtype}")
