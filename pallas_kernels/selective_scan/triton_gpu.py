"""The selective scan in Triton, called through jax-triton, for Ampere and later, forward and backward.

Every lane owns one channel of one batch row through one chunk of its time, and all its states, so that sums over states stay
in the lane. A program has one or two warps. Time is split until there are programs enough to fill a GPU: a first kernel finds
what each chunk adds to the state that leaves it and the sum of its steps, from which every chunk finds the state that enters
it.

The forward kernel can keep the state before every START-th token. The backward kernel takes these tokens in reverse: it
recomputes their states from the one kept, writes down those before each tile, and runs the adjoint recurrence
`g[t] = C[t] dy[t] + decay[t+1] g[t+1]` a tile at a time. The sums over channels, of dB and dC, cross lanes through memory. A
program walks over several strips of channels and adds up their shares in that order, without atomics: two runs agree bit for
bit. Run on an H100; times, and what else was tried, in benchmarks/README.md.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dispatch import Call
from pallas_kernels.lanes import ceil_div
from pallas_kernels.selective_scan.fused import Inputs, differentiable, refuse_float64
from pallas_kernels.selective_scan.shapes import survives

LOG2E = math.log2(math.e)
TILE = {"forward": 8, "backward": 2}
"""Tokens that are read together."""
START = 32
"""Tokens between two states that are kept, a multiple of both tiles."""
STATES_OF_WARP = 512
"""So that each of 32 lanes has the 16 states of a channel."""

# Found by measuring, on a GPU with 132 processors.
WARPS = 6200
"""The forward kernel's time is split until there are about so many warps."""
PAIRED = 528
"""Warps of whole time from which the forward kernel's programs have two: they share what they read of B and C."""
RESIDENT = 8 * 132
"""Warps of the backward kernel that run at once."""
SUMMARY_COST = 0.12
"""Time that the first kernel adds to the backward pass."""
SHORTEST = {"forward": 96, "backward": 128}
"""Fewest tokens of a chunk."""
MOST = 64
"""Most chunks."""

OFFSETS = 2**30
"""Elements of a chunk that 32 bits can number with room to spare."""
MOST_ROWS = 65535
"""Batch rows: they are the last axis of the grid."""

f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def installed() -> str | None:
    """Why jax-triton cannot be used, or None."""
    try:
        version = importlib.metadata.version("jax-triton")
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed: pip install 'blackmamba-jax[triton]'"
    if not version.startswith("0.3.") or version == "0.3.0":
        return f"it needs jax-triton 0.3.1 or later, before 0.4, this is {version}: pip install 'blackmamba-jax[triton]'"
    return None


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if call.target.platform != "gpu" or call.target.capability < 8:
        return f"it needs a GPU of compute capability 8.0 (Ampere) or later, this is {call.target.kind}"
    u = call.arguments["u"]
    if u is not None and u.shape[0] > MOST_ROWS:
        return f"a GPU starts at most {MOST_ROWS} rows of programs, the batch has {u.shape[0]}"
    return installed() or refuse_float64(call)


class Plan(NamedTuple):
    """How the work of one kernel is divided."""

    batch: int
    length: int
    channels: int
    states: int
    """A power of two."""
    block: int
    """Channels of a strip."""
    chunk: int
    strips: int
    """That a program walks over."""
    softplus: bool
    tile: int
    warps: int

    @property
    def chunks(self) -> int:
        return max(1, ceil_div(self.length, self.chunk))

    @property
    def padded_length(self) -> int:
        return self.chunks * self.chunk

    @property
    def groups(self) -> int:
        return ceil_div(ceil_div(self.channels, self.block), self.strips)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.groups, self.chunks, self.batch


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _split(plan: Plan, chunks: int) -> Plan:
    """The plan with its time in so many chunks, or fewer of a whole number of START tokens; more where offsets ask for it."""
    chunks = max(chunks, ceil_div(plan.length * plan.channels, OFFSETS))
    return plan._replace(chunk=ceil_div(ceil_div(plan.length, chunks), START) * START)


def _plan(inputs: Inputs, softplus: bool) -> Plan:
    """Of the whole time, by one warp."""
    (batch, length, channels), states = inputs.u.shape, _power_of_two(inputs.A.shape[1])
    block = max(1, min(STATES_OF_WARP // states, _power_of_two(channels)))
    return _split(Plan(batch, length, channels, states, block, 0, 1, softplus, 0, 1), 1)


def plan_forward(inputs: Inputs, softplus: bool) -> Plan:
    """As many chunks as give about WARPS warps, two to a program where there are many."""
    plan = _plan(inputs, softplus)._replace(tile=TILE["forward"])
    chunks = max(1, min(round(WARPS / (plan.batch * plan.groups)), MOST, ceil_div(plan.length, SHORTEST["forward"])))
    if plan.batch * plan.groups >= PAIRED:
        plan = plan._replace(block=2 * plan.block, warps=2)
    return _split(plan, chunks)


def plan_backward(inputs: Inputs, softplus: bool) -> Plan:
    """As many strips a program as leave programs enough, and the fewest chunks whose last round of programs is nearly full."""
    plan = _plan(inputs, softplus)._replace(tile=TILE["backward"])
    most = min(MOST, ceil_div(plan.length, SHORTEST["backward"]))
    for strips in (4, 2, 1):
        plan = plan._replace(strips=strips)
        if plan.batch * plan.groups * most >= RESIDENT * 0.9:
            break
    programs = plan.batch * plan.groups

    def cost(chunks: int) -> float:
        return ceil_div(programs * chunks, RESIDENT) / chunks * (1 if chunks == 1 else 1 + SUMMARY_COST)

    least = min(map(cost, range(1, most + 1)))
    return _split(plan, next(chunks for chunks in range(1, most + 1) if cost(chunks) <= 1.05 * least))


def _by_jax_triton(
    name: str, grid: tuple[int, int, int], inputs: list[Array], outputs: list[Any], options: dict, warps: int
) -> list[Array]:
    import jax_triton

    from pallas_kernels.selective_scan import triton_gpu_kernels

    kernel = getattr(triton_gpu_kernels, name)

    @jax.custom_batching.sequential_vmap  # jax-triton has no vmap
    def call(*inputs: Array) -> list[Array]:
        return jax_triton.triton_call(
            *inputs, kernel=kernel, out_shape=outputs, grid=grid, num_warps=warps, num_stages=1, **options
        )

    return call(*inputs)


def _arrays(plan: Plan, inputs: Inputs) -> dict[str, Array]:
    """The kernels' inputs by name; in the place of those that a kernel will not read, u."""
    keep = inputs.u
    if inputs.segment_ids is not None:
        missing = plan.padded_length - plan.length
        keep = jnp.pad(survives(inputs.segment_ids).astype(jnp.float32), ((0, 0), (0, missing)), constant_values=1)
    optional = {"D": inputs.D, "dt_bias": inputs.dt_bias}
    return {
        "u": inputs.u,
        "dt": inputs.dt,
        "z": inputs.u if inputs.z is None else inputs.z,
        "A": _lanes(plan, inputs.A[None] * LOG2E)[0],
        "B": _rows(plan, inputs.B),
        "C": _rows(plan, inputs.C),
        "keep": keep,
    } | {name: inputs.u if array is None else array.astype(jnp.float32) for name, array in optional.items()}


def _pad(plan: Plan, array: Array) -> Array:
    """`array` with zeros up to `plan.states` along its last axis."""
    missing = plan.states - array.shape[-1]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array


def _rows(plan: Plan, array: Array) -> Array:
    """`[batch, L, N]` to float32 with whole chunks and `plan.states`."""
    return jnp.pad(_pad(plan, array.astype(jnp.float32)), ((0, 0), (0, plan.padded_length - plan.length), (0, 0)))


def _lanes(plan: Plan, state: Array) -> Array:
    """`[batch, E, N]` to `[batch, states, E]` float32."""
    return _pad(plan, state.astype(jnp.float32)).swapaxes(1, 2)


def _options(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """What every kernel is compiled for."""
    return dict(
        LENGTH=plan.length, CHANNELS=plan.channels, STATES=plan.states, BLOCK=plan.block, CHUNK=plan.chunk, CHUNKS=plan.chunks,
        TILE=plan.tile,
        SOFTPLUS=plan.softplus, BIAS=inputs.dt_bias is not None, GATE=inputs.z is not None, KEEP=inputs.segment_ids is not None,
    )  # fmt: skip


def _summaries(plan: Plan, arrays: dict[str, Array], options: dict[str, Any], reverse: bool, call: Callable) -> list[Array]:
    """The sum of each chunk's steps `[batch, chunks, E]` and its increment `[batch, chunks, states, E]`."""
    if plan.chunks == 1:
        return [arrays["u"], arrays["u"]]  # not read
    names = ("dy", "z", "dt", "C") if reverse else ("u", "z", "dt", "B")
    inputs = [arrays[name] for name in (*names, "A", "dt_bias", "keep")]
    of_chunks = plan.batch, plan.chunks
    outputs = [f32((*of_chunks, plan.channels)), f32((*of_chunks, plan.states, plan.channels))]
    grid = (ceil_div(plan.channels, plan.block), plan.chunks, plan.batch)
    return call("summary_kernel", grid, inputs, outputs, options | {"REVERSE": reverse, "TILE": TILE["forward"]}, plan.warps)


def _forward(inputs: Inputs, dt_softplus: bool, keep: bool, call: Callable) -> tuple[Array, Array, Array | None]:
    plan = plan_forward(inputs, dt_softplus)
    arrays, options = _arrays(plan, inputs), _options(plan, inputs)
    of_states = (plan.states, plan.channels)
    enter = jnp.zeros((plan.batch, *of_states)) if inputs.initial_state is None else _lanes(plan, inputs.initial_state)
    summaries = _summaries(plan, arrays, options, False, call)
    starts = ceil_div(plan.length, START) if keep else 0
    y, final, kept = call(
        "forward_kernel",
        plan.grid,
        [*(arrays[name] for name in ("u", "dt", "z", "B", "C", "A", "D", "dt_bias", "keep")), enter, *summaries],
        [
            jax.ShapeDtypeStruct(inputs.u.shape, inputs.u.dtype), f32((plan.batch, *of_states)),
            f32((plan.batch, starts, *of_states) if keep else (1,)),
        ],
        options | dict(START=START, SKIP=inputs.D is not None, STARTS=keep),
        plan.warps,
    )  # fmt: skip
    return y, final.swapaxes(1, 2)[:, :, : inputs.A.shape[1]], kept if keep else None


def _backward(inputs: Inputs, starts: Array, dy: Array, d_final: Array, dt_softplus: bool, call: Callable) -> Inputs:
    plan, states = plan_backward(inputs, dt_softplus), inputs.A.shape[1]
    arrays, options = _arrays(plan, inputs) | {"dy": dy}, _options(plan, inputs)
    of_states, wide = (plan.states, plan.channels), inputs.u.shape
    summaries = _summaries(plan, arrays, options, True, call)
    names = ("u", "dt", "z", "dy", "B", "C", "A", "D", "dt_bias", "keep")
    du, ddt, dz, d_rows, dA, dD, d_bias, d_state, *_ = call(
        "backward_kernel",
        plan.grid,
        [*(arrays[name] for name in names), _lanes(plan, d_final), *summaries, starts],
        [
            *(jax.ShapeDtypeStruct(wide, array.dtype) for array in (inputs.u, inputs.dt)),
            jax.ShapeDtypeStruct((1,) if inputs.z is None else wide, arrays["z"].dtype),
            f32((plan.batch, plan.groups, plan.padded_length, 2, plan.states)),
            f32((plan.batch, plan.chunks, *of_states)),
            *[f32((plan.batch, plan.chunks, plan.channels))] * 2,
            f32((plan.batch, *of_states)),
            f32((plan.batch, plan.chunks, plan.groups, START // plan.tile, plan.states, plan.block)),
            f32((plan.batch, plan.chunks, plan.groups, plan.tile, 2, plan.states, plan.block)),
        ],
        options | dict(START=START, SKIP=inputs.D is not None, STRIPS=plan.strips),
        plan.warps,
    )  # fmt: skip
    d_rows = jnp.sum(d_rows, axis=1)[:, : plan.length, :, :states]
    return Inputs(
        u=du,
        dt=ddt,
        A=jnp.sum(dA, axis=(0, 1)).T[:, :states],
        B=d_rows[:, :, 0],
        C=d_rows[:, :, 1],
        D=jnp.sum(dD, axis=(0, 1)),
        z=dz,
        dt_bias=jnp.sum(d_bias, axis=(0, 1)),
        initial_state=d_state.swapaxes(1, 2)[:, :, :states],
        segment_ids=None,
    )


def scan_triton(call: Callable = _by_jax_triton) -> Callable:
    """The scan by these kernels; `call(name, grid, inputs, outputs, options, warps)` runs one."""
    return differentiable(functools.partial(_forward, call=call), functools.partial(_backward, call=call))


selective_scan_triton = scan_triton()
