"""The selective scan: one function in front of every implementation."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from pallas_kernels.dispatch import Call, Implementation, explain, resolve
from pallas_kernels.selective_scan.pallas_gpu import refusal as pallas_gpu_refusal
from pallas_kernels.selective_scan.pallas_gpu import selective_scan_gpu
from pallas_kernels.selective_scan.pallas_tpu import refusal as pallas_tpu_refusal
from pallas_kernels.selective_scan.pallas_tpu import selective_scan_tpu
from pallas_kernels.selective_scan.reference import selective_scan_reference
from pallas_kernels.selective_scan.shapes import check_arguments
from pallas_kernels.selective_scan.triton_gpu import refusal as triton_gpu_refusal
from pallas_kernels.selective_scan.triton_gpu import selective_scan_triton
from pallas_kernels.selective_scan.xla import selective_scan_xla


def _from(tokens: int) -> Callable[[Call], bool]:
    """Preferred from so many tokens on: a shorter call costs less than a kernel's start."""

    def preferred(call: Call) -> bool:
        u = call.arguments["u"]
        return u is not None and u.shape[1] >= tokens

    return preferred


IMPLEMENTATIONS = {
    "pallas_gpu": Implementation(selective_scan_gpu, pallas_gpu_refusal, preferred=_from(2)),
    "triton_gpu": Implementation(selective_scan_triton, triton_gpu_refusal, preferred=_from(32)),
    "pallas_tpu": Implementation(selective_scan_tpu, pallas_tpu_refusal, preferred=_from(32)),
    "xla": Implementation(selective_scan_xla),
    "reference": Implementation(selective_scan_reference),
}
"""In order of preference. The first number of tokens is measured (`benchmarks/README.md`), the others are not."""


def selective_scan(
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
    """Run the selective state-space recurrence along time (Gu and Dao 2023, equations 1a, 2 and algorithm 2).

    With `step = softplus(dt + dt_bias)`, for every batch row b, channel e and state n:

        h[t] = exp(step[t] * A) * h[t-1] + step[t] * B[t] * u[t]
        y[t] = (sum over n of C[t] * h[t] + D * u[t]) * silu(z[t])

    Args:
        u: input `[B, L, E]`.
        dt: step sizes before bias and softplus `[B, L, E]`.
        A: `[E, N]`, negative for a decaying state.
        B: `[B, L, N]`.
        C: `[B, L, N]`.
        D: skip `[E]`, or None for no skip.
        z: gate `[B, L, E]`, or None for no gate.
        dt_bias: `[E]`, or None.
        dt_softplus: whether the step is passed through softplus.
        initial_state: h before the first token `[B, E, N]`; zero when None.
        segment_ids: integers `[B, L]`; the state is set to zero before a token whose id differs from the token's before
            it. The first token continues `initial_state` whatever its id.
        implementation: a key of `IMPLEMENTATIONS`, or None to choose.

    Returns:
        y `[B, L, E]` in the dtype of `u`, and the state after the last token `[B, E, N]`. The recurrence runs in float32
        (float64 when an argument is float64), and the returned state keeps that dtype. Both results have gradients (reverse
        mode, first order) in every array argument but `segment_ids`, and can be mapped by `jax.vmap`.

    Raises:
        ValueError: a rank or size that does not fit, naming the argument.
        TypeError: an argument of the wrong dtype.
        NotImplementedError: a named implementation that does not exist or cannot serve the call.
    """
    check_arguments(u, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids)
    arguments = dict(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state, segment_ids=segment_ids)
    function = resolve("selective_scan", implementation, IMPLEMENTATIONS, arguments)
    return function(
        u, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
        initial_state=initial_state, segment_ids=segment_ids,
    )  # fmt: skip


def explain_selective_scan(**arguments: Array | None) -> str:
    """What `selective_scan` would run for these array arguments and why, one line an implementation.

    Takes the names of `selective_scan`'s arguments; a `jax.ShapeDtypeStruct` serves in the place of an array.
    """
    return explain("selective_scan", IMPLEMENTATIONS, arguments)
