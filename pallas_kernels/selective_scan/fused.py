"""What every kernel of the selective scan shares: its inputs as one tree, and a forward and a backward made one function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.dispatch import Call

STARTS = "selective scan starts"
"""The name, for policies of `jax.checkpoint`, of what the backward kernel needs that the forward one makes."""


class Inputs(NamedTuple):
    """The arguments of `selective_scan`; None where the caller gave none."""

    u: Array
    dt: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    z: Array | None
    dt_bias: Array | None
    initial_state: Array | None
    segment_ids: Array | None


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """The scan with the signature of `selective_scan`, made of two kernels.

    `forward(inputs, dt_softplus, keep)` returns y, the final state and `starts`: whatever the backward kernel needs beyond
    the inputs, None unless `keep`. `backward(inputs, starts, dy, d_final, dt_softplus)` returns an `Inputs` of gradients in
    any float dtype; gradients of absent inputs, and of `segment_ids`, are ignored.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def scan(inputs: Inputs, dt_softplus: bool):
        y, final, _ = forward(inputs, dt_softplus, False)
        return y, final

    def scan_forward(inputs: Inputs, dt_softplus: bool):
        # Without the barrier, where y and starts are stacked over a loop's turns, XLA runs the kernel once more for the stack.
        y, final, starts = lax.optimization_barrier(forward(inputs, dt_softplus, True))
        return (y, final), (inputs, checkpoint_name(starts, STARTS))

    def scan_backward(dt_softplus: bool, residuals, cotangents):
        inputs, starts = residuals
        gradients = backward(inputs, starts, *cotangents, dt_softplus)

        def cast(given, gradient):
            return None if given is None or jnp.issubdtype(given.dtype, jnp.integer) else gradient.astype(given.dtype)

        return (Inputs._make(map(cast, inputs, gradients)),)

    scan.defvjp(scan_forward, scan_backward)

    def selective_scan(
        u, dt, A, B, C, D=None, *, z=None, dt_bias=None, dt_softplus=True, initial_state=None, segment_ids=None
    ) -> tuple[Array, Array]:
        return scan(Inputs(u, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids), dt_softplus)

    return selective_scan


def refuse_float64(call: Call) -> str | None:
    """The kernels keep their state in float32."""
    wide = [name for name, array in call.arguments.items() if array is not None and array.dtype == jnp.float64]
    return f"{wide[0]} is float64, which only xla and reference compute in" if wide else None
