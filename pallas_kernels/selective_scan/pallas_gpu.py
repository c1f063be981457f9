"""The selective scan in Pallas Mosaic GPU, for Hopper and later, forward and backward, written lane by lane.

A block of 128 lanes owns a strip of channels of one batch row through one chunk of its time. Four or eight lanes share two
channels and hold four or two of the 16 states of each in registers. What belongs to a token and channel but to no state
(softplus, skip, gate and their gradients) is computed once, by another division of the same lanes, before and after the
recurrence.

Time is split where batch and channels give too few blocks. A first kernel finds what each chunk adds to the state that
leaves it, and how much time passes in it (`summary_program`). It walks away from the edge where that state leaves, and ends
once every decay has underflowed to zero, where the rest of the chunk adds nothing. The chunks then start from their true
states.

The backward kernel takes time in reverse, `START` tokens at a time: it recomputes the states from the one the forward kernel
kept, holds those of every `PART`th token in shared memory and those of one part in registers, and then runs the adjoint
recurrence `g[t] = C[t] dy[t] + decay[t+1] g[t+1]`. Sums over states and channels cross lanes in a fixed order, without
atomics: two runs agree bit for bit. More than 16 states run as several scans, whose outputs and gradients add up.
Run on an H100; times, and what else was tried, in benchmarks/README.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dispatch import Call
from pallas_kernels.lanes import ceil_div, launch
from pallas_kernels.selective_scan.fused import Inputs, differentiable, refuse_float64
from pallas_kernels.selective_scan.pallas_gpu_lanes import backward_program, forward_program, summary_program
from pallas_kernels.selective_scan.pallas_gpu_work import (
    ALIGNED,
    PAIR,
    START,
    STATES,
    TILE,
    TOGETHER,
    Plan,
    plan_forward,
    plan_split,
    shared_arrays,
)
from pallas_kernels.selective_scan.shapes import survives


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if call.target.platform != "gpu" or call.target.capability < 9:
        return f"it needs a GPU of compute capability 9.0 (Hopper) or later, this is {call.target.kind}"
    return refuse_float64(call)


def _pad(array: Array, axis: int, multiple: int, mode: str = "constant") -> Array:
    """`array` with zeros, or with its last values, to a multiple of `multiple` along `axis`."""
    missing = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, missing if k == axis else 0) for k in range(array.ndim)], mode=mode) if missing else array


def _arrays(inputs: Inputs) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """The programs' inputs: those that every group of STATES states shares, and those of each group."""
    f32 = jnp.float32
    # Channels and states that are only there to fill a group decay like the last one: at a rate of 0 they never would.
    shared = {"u": _pad(inputs.u, 2, ALIGNED), "dt": _pad(inputs.dt, 2, ALIGNED, "edge")}
    if inputs.z is not None:
        shared["z"] = _pad(inputs.z, 2, ALIGNED)
    if inputs.dt_bias is not None:
        shared["dt_bias"] = _pad(inputs.dt_bias.astype(f32), 0, ALIGNED, "edge")
    if inputs.segment_ids is not None:
        shared["keep"] = survives(inputs.segment_ids).astype(f32)

    def split(array: Array, mode: str = "constant") -> list[Array]:
        array = _pad(array, array.ndim - 1, STATES, mode)
        return jnp.split(array, array.shape[-1] // STATES, axis=-1)

    A = split(_pad(inputs.A.astype(f32), 0, ALIGNED, "edge"), "edge")
    groups = [{"A": a, "BC": _pairs(b, c)} for a, b, c in zip(A, split(inputs.B), split(inputs.C), strict=True)]
    if inputs.initial_state is not None:
        for group, state in zip(groups, split(_pad(inputs.initial_state.astype(f32), 1, ALIGNED)), strict=True):
            group["state"] = state
    if inputs.D is not None:
        groups[0]["D"] = _pad(inputs.D.astype(f32), 0, ALIGNED)
    return shared, groups


def _pairs(B: Array, C: Array) -> Array:
    """B and C `[batch, L, STATES]` as one float32 array `[batch, L, 2 * STATES]`, in turns of PAIR."""
    both = [x.astype(jnp.float32).reshape(*x.shape[:2], -1, PAIR) for x in (B, C)]
    return jnp.stack(both, axis=3).reshape(*B.shape[:2], 2 * STATES)


def _total(arrays: list[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


def _pick(arrays: dict, names: str) -> dict:
    return {name: arrays[name] for name in names.split() if name in arrays}


def _run(
    program: Callable,
    plan: Plan,
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    tokens: int,
    shared: str,
    interpret: bool,
    together: int = 1,
) -> dict[str, Array]:
    """Launch `program` with the arrays of `tokens` tokens that `shared` names."""
    arrays = _pick(shared_arrays(plan, tokens), shared + (" keep_rows" if "keep" in inputs else ""))
    return launch(functools.partial(program, plan), plan.blocks, inputs, outputs, arrays, together, interpret)


def _summaries(plan: Plan, arrays: dict[str, Array], adjoint: bool, interpret: bool) -> dict[str, Array]:
    """Increments `[batch, chunks - 1, channels, STATES]` and time of the chunks but the last; nothing where there is one."""
    if plan.chunks == 1:
        return {}
    of_chunks = plan.batch, plan.chunks - 1, plan.channels
    inputs = _pick(arrays, "dt z dy BC A dt_bias keep" if adjoint else "dt u BC A dt_bias keep")
    outputs = {
        "increments": jax.ShapeDtypeStruct((*of_chunks, STATES), jnp.float32),
        "passed": jax.ShapeDtypeStruct(of_chunks, jnp.float32),
    }
    return _run(functools.partial(summary_program, adjoint), plan, inputs, outputs, TILE, "step_rows rows", interpret)


def _forward(inputs: Inputs, dt_softplus: bool, keep_starts: bool, interpret: bool) -> tuple[Array, Array, list[Array] | None]:
    (batch, length, width), states = inputs.u.shape, inputs.A.shape[1]
    shared, groups = _arrays(inputs)
    plan = plan_forward(batch, length, shared["u"].shape[2], dt_softplus)
    of_state = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs = {
        "y": jax.ShapeDtypeStruct(shared["u"].shape, inputs.u.dtype if len(groups) == 1 else jnp.float32),
        "final": of_state((batch, plan.channels, STATES)),
    }
    if keep_starts:
        outputs["starts"] = of_state((batch, ceil_div(length, START), plan.channels, STATES))
    results, rows = [], "step_rows rows sum_rows"
    for group in groups:
        arrays = shared | group | _summaries(plan, shared | group, False, interpret)
        arrays = _pick(arrays, "u dt z BC A D dt_bias keep state passed increments")
        results.append(_run(forward_program, plan, arrays, outputs, TILE, rows, interpret))
    y = _total([result["y"] for result in results])[:, :, :width].astype(inputs.u.dtype)
    final = jnp.concatenate([result["final"] for result in results], axis=-1)[:, :width, :states]
    return y, final, [result["starts"] for result in results] if keep_starts else None


def _backward(inputs: Inputs, starts: list[Array], dy: Array, d_final: Array, dt_softplus: bool, interpret: bool) -> Inputs:
    (batch, length, width), states = inputs.u.shape, inputs.A.shape[1]
    shared, groups = _arrays(inputs)
    plan = plan_split(batch, length, shared["u"].shape[2], dt_softplus)
    shared["dy"] = _pad(dy, 2, ALIGNED)
    d_final = _pad(_pad(d_final, 1, ALIGNED), 2, STATES)
    one = len(groups) == 1
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs = {"d" + name: jax.ShapeDtypeStruct(shared[name].shape, shared[name].dtype if one else jnp.float32)
               for name in ("u", "dt", "z") if name in shared}  # fmt: skip
    outputs |= {
        "dBC": f32((batch, plan.strips, length, 2 * STATES)),
        "dA": f32((batch, plan.chunks, plan.channels, STATES)),
        "dD": f32((batch, plan.chunks, plan.channels)),
        "d_bias": f32((batch, plan.chunks, plan.channels)),
        "d_state": f32((batch, plan.channels, STATES)),
    }
    results, kept = [], "step_rows rows slope_rows part_rows"
    for k, group in enumerate(groups):
        arrays = shared | group | {"starts": starts[k], "d_final": d_final[..., k * STATES : (k + 1) * STATES]}
        arrays |= _summaries(plan, arrays, True, interpret)
        names = "u dt z dy BC A D dt_bias keep starts d_final passed increments"
        results.append(_run(backward_program, plan, _pick(arrays, names), outputs, START, kept, interpret, TOGETHER))

    def total(name: str) -> Array:
        return _total([result[name] for result in results])[:, :, :width]

    def joined(name: str) -> Array:
        return jnp.concatenate([result[name] for result in results], axis=-1)

    def rows(part: slice) -> Array:
        # Sliced before the sum: sliced after it, XLA makes a kernel of each slice.
        return jnp.concatenate([jnp.sum(result["dBC"][..., part], axis=1) for result in results], axis=-1)[..., :states]

    return Inputs(
        u=total("du"),
        dt=total("ddt"),
        A=jnp.sum(joined("dA"), axis=(0, 1))[:width, :states],
        B=rows(slice(STATES)),
        C=rows(slice(STATES, None)),
        D=jnp.sum(results[0]["dD"], axis=(0, 1))[:width],
        z=total("dz") if "z" in shared else None,
        dt_bias=jnp.sum(total("d_bias"), axis=(0, 1)),
        initial_state=joined("d_state")[:, :width, :states],
        segment_ids=None,
    )


def scan_gpu(interpret: bool = False) -> Callable:
    """The scan by these kernels; `interpret` runs them on numpy, for tests."""
    return differentiable(functools.partial(_forward, interpret=interpret), functools.partial(_backward, interpret=interpret))


selective_scan_gpu = scan_gpu()
