"""The selective scan in Pallas for TPUs, forward and backward.

A program owns a block of channels of one batch row and walks over time in chunks; the state `[N, channels]`, channels along
the lanes, stays in vector memory from chunk to chunk. Softplus, skip, gate and their gradients work on whole chunks before
and after the recurrence. B and C come packed, eight tokens to a tile `[N, 8]`, so that a token's column is a static slice
which the hardware broadcasts over the lanes.

The forward kernel can keep the state at each chunk's start. The backward kernel takes the chunks in reverse, recomputes their
states into vector memory, and runs the adjoint recurrence `g[t] = C[t] dy[t] + decay[t+1] g[t+1]`. Its sums over channels
are written for each block of channels and added up outside, in a fixed order: two runs agree bit for bit.

No TPU has run this. Values are checked in interpret mode, and the kernels are compiled ahead of time for v5e, v6e, v5p and
tpu7x (tests/kernels/test_pallas_tpu.py). What is known of speed is the compiler's schedule, counted by benchmarks/
tpu_schedule.py: with 16 states and E = 2304 a time step of 128 channels takes 7.9 bundles in the forward kernel's inner loop on
v5e, without spills, and 9.8 in all; 31.4 in all going backward, where the inner loop spills.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Call
from pallas_kernels.selective_scan.fused import Inputs, differentiable, refuse_float64
from pallas_kernels.selective_scan.shapes import survives

LOG2E = math.log2(math.e)
SUBLANES, LANES = 8, 128
GROUP = SUBLANES
"""Tokens whose B and C share a tile."""
CHUNK = 128
"""Tokens between two states that are kept."""
BUNDLES = {512: 287, 384: 236, 256: 219, 128: 178}
"""Instruction bundles that a group of tokens takes in the forward kernel, by the channels of a block, with 16 states on v5e."""
STATE_BYTES = 4 << 20
"""Vector memory that the backward kernel gives to the states of a chunk."""


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if call.target.platform != "tpu":
        return f"it needs a TPU, this is {call.target.kind}"
    A = call.arguments["A"]
    states = 0 if A is None else A.shape[1]
    if states > 64:
        return f"N must be at most 64 for a chunk's states to fit vector memory, got {states}"
    return refuse_float64(call)


class Plan(NamedTuple):
    """How the work of one call is divided."""

    batch: int
    length: int
    channels: int
    states: int
    """A multiple of SUBLANES."""
    chunk: int
    block: int
    softplus: bool

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, pl.cdiv(self.channels, self.block), pl.cdiv(self.length, self.chunk)

    @property
    def joined(self) -> int:
        """Groups whose gradients of B and C lie side by side in the lanes: memory is padded to all LANES of them."""
        return math.gcd(self.chunk // GROUP, LANES // (2 * GROUP))

    @property
    def padded_length(self) -> int:
        return self.grid[2] * self.chunk

    @property
    def padded_channels(self) -> int:
        return self.grid[1] * self.block


def _plan(inputs: Inputs, softplus: bool) -> Plan:
    (batch, length, channels), states = inputs.u.shape, _up(inputs.A.shape[1], SUBLANES)
    block = min(BUNDLES, key=lambda size: math.ceil(channels / size) * BUNDLES[size])
    rows = 2 * SUBLANES  # of a tile of bfloat16
    chunk = min(CHUNK, STATE_BYTES // (4 * states * block) // rows * rows, _up(length, rows))
    return Plan(batch, length, channels, states, chunk, block, softplus)


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def _pad(array: Array, sizes: dict[int, int], value: float = 0) -> Array:
    """`array` with its axes lengthened to `sizes`."""
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(array.shape)]
    return jnp.pad(array, widths, constant_values=value) if any(after for _, after in widths) else array


def _pack(plan: Plan, array: Array) -> Array:
    """`[batch, L, N]` to `[batch, L / GROUP, N, GROUP]` float32."""
    array = _pad(array.astype(jnp.float32), {1: plan.padded_length, 2: plan.states})
    return array.reshape(plan.batch, -1, GROUP, plan.states).swapaxes(2, 3)


def _unpack(plan: Plan, tiles: Array) -> tuple[Array, Array]:
    """Gradients of B and C, still padded, from `[batch, L / (GROUP * joined), N, joined * 2 * GROUP]`."""
    tiles = tiles.reshape(plan.batch, -1, plan.states, plan.joined, 2, GROUP)
    rows = jnp.moveaxis(tiles, (3, 5, 2), (2, 3, 5)).reshape(plan.batch, plan.padded_length, 2, plan.states)
    return rows[:, :, 0], rows[:, :, 1]


def _arrays(plan: Plan, inputs: Inputs) -> dict[str, Array]:
    """The kernels' inputs by name; absent ones are left out. Only the small ones are padded: see `_inside`."""
    u, dt, A, B, C, D, z, dt_bias, state, segment_ids = inputs
    f32, row = jnp.float32, {0: plan.padded_channels}
    tiles = [_pack(plan, B), _pack(plan, C)]
    if segment_ids is not None:
        same = _pad(survives(segment_ids).astype(f32), {1: plan.padded_length}, 1).reshape(plan.batch, -1, 1, GROUP)
        tiles.append(jnp.broadcast_to(same, tiles[0].shape))
    arrays = {
        "u": u,
        "dt": dt,
        "tiles": jnp.concatenate(tiles, axis=-1),
        "A": _pad(A.astype(f32) * LOG2E, row | {1: plan.states}).T,
    }
    if z is not None:
        arrays["z"] = z
    for name, of_channels in (("dt_bias", dt_bias), ("D", D)):
        if of_channels is not None:
            arrays[name] = _pad(of_channels.astype(f32), row)[None]
    if state is not None:
        arrays["state"] = _lanes(plan, state)
    return arrays


def _lanes(plan: Plan, state: Array) -> Array:
    """`[batch, E, N]` to `[batch, N, E]` float32, padded."""
    return _pad(state.astype(jnp.float32), {1: plan.padded_channels, 2: plan.states}).swapaxes(1, 2)


def _specs(plan: Plan, reverse: bool, packed: int) -> dict[str, pl.BlockSpec]:
    """Blocks by array name; time runs backwards where `reverse`, and a tile of B, C and flags is `packed` wide."""
    last = plan.grid[2] - 1

    def spec(shape: tuple[int | None, ...], index: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, e, t: index(b, e, last - t if reverse else t))

    groups, width = plan.chunk // GROUP, plan.states
    wide = spec((None, plan.chunk, plan.block), lambda b, e, t: (b, t, e))
    row = spec((1, plan.block), lambda b, e, t: (0, e))
    state = spec((None, width, plan.block), lambda b, e, t: (b, 0, e))
    return {
        **dict.fromkeys(("u", "dt", "z", "dy", "y", "du", "ddt", "dz"), wide),
        **dict.fromkeys(("D", "dt_bias"), row),
        **dict.fromkeys(("state", "d_final", "final", "d_state", "dA"), state),
        **dict.fromkeys(("dD", "d_bias"), spec((None, 1, plan.block), lambda b, e, t: (b, 0, e))),
        "A": spec((width, plan.block), lambda b, e, t: (0, e)),
        "starts": spec((None, None, width, plan.block), lambda b, e, t: (b, t, 0, e)),
        "tiles": spec((None, groups, width, packed), lambda b, e, t: (b, t, 0, 0)),
        "d_tiles": spec((None, None, groups // plan.joined, width, plan.joined * 2 * GROUP), lambda b, e, t: (b, e, t, 0, 0)),
    }


def _call(
    body: Callable, plan: Plan, inputs: dict[str, Array], outputs: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, tuple[int, ...]], reverse: bool, interpret: Any,
) -> dict[str, Array]:  # fmt: skip
    """Run `body(plan, refs)`, where `refs` has the blocks of all arrays by name, over the plan's grid."""
    names = [*inputs, *outputs, *scratch]
    specs = _specs(plan, reverse, inputs["tiles"].shape[-1])
    results = pl.pallas_call(
        lambda *refs: body(plan, dict(zip(names, refs, strict=True))),
        grid=plan.grid,
        in_specs=[specs[name] for name in inputs],
        out_specs=[specs[name] for name in outputs],
        out_shape=list(outputs.values()),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=body.__name__.strip("_"),
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _softplus(x: Array) -> Array:
    """log(1 + exp(x)), to float32's relative precision also where it is tiny."""
    e = jnp.exp(-jnp.abs(x))
    tail = jnp.where(e < 0.01, e * (1 - e * (0.5 - e * (1 / 3 - e * 0.25))), jnp.log(1 + e))
    return jnp.maximum(x, 0) + tail


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))


def _inside(plan: Plan, values: Array, time: Array) -> Array:
    """`values` `[chunk, block]` of chunk `time`, 0 outside the array: what the last blocks read there is undefined."""
    if plan.length == plan.padded_length and plan.channels == plan.padded_channels:
        return values
    token = lax.broadcasted_iota(jnp.int32, values.shape, 0) + time * plan.chunk
    channel = lax.broadcasted_iota(jnp.int32, values.shape, 1) + pl.program_id(1) * plan.block
    return jnp.where((token < plan.length) & (channel < plan.channels), values, 0.0)


class _RowSums:
    """`[GROUP, block]` whose row j is the sum over the rows of array j of GROUP `[N, block]`, added in this order or backwards.

    Eight sums at once: in each of three steps two partial results become one, which takes turns in its rows between them.
    Merging as soon as there are two keeps few of them alive.
    """

    def __init__(self, backwards: bool = False) -> None:
        self._backwards = backwards
        self._parts: list[tuple[int, Array]] = []

    def add(self, value: Array) -> None:
        part, step = functools.reduce(jnp.add, [value[k : k + SUBLANES] for k in range(0, len(value), SUBLANES)]), 1
        while self._parts and self._parts[-1][0] == step:
            even = lax.broadcasted_iota(jnp.int32, part.shape, 0) // step % 2 == 0
            pair = self._parts.pop()[1], part
            first, second = reversed(pair) if self._backwards else pair
            other = pltpu.roll(jnp.where(even, second, first), SUBLANES - step, axis=0)
            part, step = jnp.where(even, first, second) + other, 2 * step
        self._parts.append((step, part))

    def result(self) -> Array:
        ((_, rows),) = self._parts
        return rows


def _wide(plan: Plan, ref: Any, time: Array) -> Array:
    """The block of u, dt, z or dy in float32."""
    return _inside(plan, ref[...].astype(jnp.float32), time)


def _step(plan: Plan, refs: dict[str, Any], time: Array) -> tuple[Array, Array]:
    """(dt with its bias, step size) of the chunk; step 0, which leaves the state as it is, outside the array."""
    raw = _wide(plan, refs["dt"], time)
    if "dt_bias" in refs:
        raw = raw + refs["dt_bias"][...]
    return raw, _inside(plan, _softplus(raw), time) if plan.softplus else _inside(plan, raw, time)


def _column(tile: Array, j: int, which: int) -> Array:
    """B (0), C (1) or the flag (2) of token j of a group: `[N, 1]`."""
    place = which * GROUP + j
    return tile[:, place : place + 1]


def _forward_kernel(plan: Plan, refs: dict[str, Any]) -> None:
    time = pl.program_id(2)
    state_ref, step_ref, input_ref, y_ref = (refs[name] for name in ("carry", "step_rows", "input_rows", "y_rows"))

    @pl.when(time == 0)
    def start():
        state_ref[...] = refs["state"][...] if "state" in refs else jnp.zeros(state_ref.shape, jnp.float32)

    if "starts" in refs:
        refs["starts"][...] = state_ref[...]
    u = _wide(plan, refs["u"], time)
    _, step = _step(plan, refs, time)
    step_ref[...] = step
    input_ref[...] = step * u

    def group(g: Array, h: Array) -> Array:
        rows = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
        steps, inputs, tile = step_ref[rows, :], input_ref[rows, :], refs["tiles"][g]
        outputs = _RowSums()
        for j in range(GROUP):
            if tile.shape[1] > 2 * GROUP:
                h = jnp.where(_column(tile, j, 2) > 0, h, 0.0)
            # A comes from memory each time: held in registers, it would push others out.
            h = jnp.exp2(steps[j : j + 1] * refs["A"][...]) * h + inputs[j : j + 1] * _column(tile, j, 0)
            outputs.add(h * _column(tile, j, 1))
        y_ref[rows, :] = outputs.result()
        return h

    h = lax.fori_loop(0, plan.chunk // GROUP, group, state_ref[...])
    state_ref[...] = h
    refs["final"][...] = h
    y = y_ref[...]
    if "D" in refs:
        y = y + refs["D"][...] * u
    if "z" in refs:
        z = _wide(plan, refs["z"], time)
        y = y * (z * _sigmoid(z))
    refs["y"][...] = y.astype(refs["y"].dtype)


def _backward_kernel(plan: Plan, refs: dict[str, Any]) -> None:
    time = pl.program_id(2)
    here = plan.grid[2] - 1 - time
    g_ref, dA_ref, step_ref, u_ref, slope_ref = (refs[name] for name in ("carry", "dA", "step_rows", "u_rows", "slope_rows"))
    y_ref, gB_ref, exponent_ref, before_ref = (refs[name] for name in ("y_rows", "gB_rows", "exponent_rows", "before"))

    @pl.when(time == 0)
    def start():
        g_ref[...] = refs["d_final"][...]
        for name in ("dA", "dD", "d_bias"):
            refs[name][...] = jnp.zeros_like(refs[name])

    raw, step = _step(plan, refs, here)
    u, dy = _wide(plan, refs["u"], here), _wide(plan, refs["dy"], here)
    z = _wide(plan, refs["z"], here) if "z" in refs else None
    slope = dy if z is None else dy * (z * _sigmoid(z))
    step_ref[...], u_ref[...], slope_ref[...] = step, u, slope
    A = refs["A"][...]
    groups = plan.chunk // GROUP

    def rows_of(g: Array) -> Any:
        return pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)

    def recompute(g: Array, h: Array) -> Array:
        """Keep the state before each token, 0 where a segment starts."""
        steps, tile = step_ref[rows_of(g), :], refs["tiles"][g]
        inputs = steps * u_ref[rows_of(g), :]
        for j in range(GROUP):
            if tile.shape[1] > 2 * GROUP:
                h = jnp.where(_column(tile, j, 2) > 0, h, 0.0)
            before_ref[g * GROUP + j] = h
            h = jnp.exp2(steps[j : j + 1] * A) * h + inputs[j : j + 1] * _column(tile, j, 0)
        return h

    lax.fori_loop(0, groups, recompute, refs["starts"][...])

    def adjoint(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        adjoint_state, dA = carry
        g = groups - 1 - i
        steps, slopes, tile = step_ref[rows_of(g), :], slope_ref[rows_of(g), :], refs["tiles"][g]
        inputs = steps * u_ref[rows_of(g), :]
        rows = [_RowSums(backwards=True) for _ in range(3)]
        columns: list[list[Array]] = [[], []]
        for j in reversed(range(GROUP)):
            s, x, p = steps[j : j + 1], inputs[j : j + 1], slopes[j : j + 1]
            B, C = _column(tile, j, 0), _column(tile, j, 1)
            before, decay = before_ref[g * GROUP + j], jnp.exp2(s * A)
            h = decay * before + x * B
            adjoint_state = adjoint_state + C * p
            through = adjoint_state * decay
            exponent = through * before
            dA = dA + exponent * s
            for row, value in zip(rows, (h * C, adjoint_state * B, exponent * A), strict=True):
                row.add(value)
            for column, value in zip(columns, (adjoint_state * x, h * p), strict=True):
                column.insert(0, jnp.sum(value, axis=1, keepdims=True))
            adjoint_state = through
            if tile.shape[1] > 2 * GROUP:
                adjoint_state = jnp.where(_column(tile, j, 2) > 0, adjoint_state, 0.0)
        for ref, row in zip((y_ref, gB_ref, exponent_ref), rows, strict=True):
            ref[rows_of(g), :] = row.result()
        refs["columns"][g] = jnp.concatenate([*columns[0], *columns[1]], axis=1)
        return adjoint_state, dA

    g_ref[...], dA_ref[...] = lax.fori_loop(0, groups, adjoint, (g_ref[...], dA_ref[...]))
    for k in range(groups // plan.joined):
        neighbours = [refs["columns"][k * plan.joined + i] for i in range(plan.joined)]
        refs["d_tiles"][k] = jnp.concatenate(neighbours, axis=1)
    refs["d_state"][...] = g_ref[...]
    y, gB = y_ref[...], gB_ref[...]
    du = step * gB
    if "D" in refs:
        du, y = du + refs["D"][...] * slope, y + refs["D"][...] * u
    if z is not None:
        sigmoid = _sigmoid(z)
        refs["dz"][...] = (dy * y * sigmoid * (1 + z * (1 - sigmoid))).astype(refs["dz"].dtype)
    d_step = u * gB + exponent_ref[...] * math.log(2)
    if plan.softplus:
        d_step = d_step * _sigmoid(raw)
    d_step = _inside(plan, d_step, here)
    refs["du"][...] = du.astype(refs["du"].dtype)
    refs["ddt"][...] = d_step.astype(refs["ddt"].dtype)
    refs["dD"][...] += jnp.sum(slope * u, axis=0, keepdims=True)
    refs["d_bias"][...] += jnp.sum(d_step, axis=0, keepdims=True)


def _forward(inputs: Inputs, dt_softplus: bool, keep: bool, interpret: Any) -> tuple[Array, Array, Array | None]:
    channels, states = inputs.A.shape
    plan = _plan(inputs, dt_softplus)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs: dict[str, jax.ShapeDtypeStruct] = {
        "y": jax.ShapeDtypeStruct(inputs.u.shape, inputs.u.dtype),
        "final": f32((plan.batch, plan.states, plan.padded_channels)),
    }
    if keep:
        outputs["starts"] = f32((plan.batch, plan.grid[2], plan.states, plan.padded_channels))
    rows = (plan.chunk, plan.block)
    scratch = {"carry": (plan.states, plan.block), "step_rows": rows, "input_rows": rows, "y_rows": rows}
    results = _call(_forward_kernel, plan, _arrays(plan, inputs), outputs, scratch, False, interpret)
    final = results["final"].swapaxes(1, 2)[:, :channels, :states]
    return results["y"], final, results.get("starts")


def _backward(inputs: Inputs, starts: Array, dy: Array, d_final: Array, dt_softplus: bool, interpret: Any) -> Inputs:
    (_, length, channels), states = inputs.u.shape, inputs.A.shape[1]
    plan = _plan(inputs, dt_softplus)
    arrays = _arrays(plan, inputs)
    arrays.pop("state", None)
    arrays |= {"dy": dy, "starts": starts, "d_final": _lanes(plan, d_final)}
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs = {
        "d" + name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in ("u", "dt", "z") if name in arrays
    }
    outputs |= dict.fromkeys(("dA", "d_state"), f32((plan.batch, plan.states, plan.padded_channels)))
    outputs |= dict.fromkeys(("dD", "d_bias"), f32((plan.batch, 1, plan.padded_channels)))
    joined = plan.padded_length // (GROUP * plan.joined), plan.states, plan.joined * 2 * GROUP
    outputs["d_tiles"] = f32((plan.batch, plan.grid[1], *joined))
    scratch = dict.fromkeys(
        ("step_rows", "u_rows", "slope_rows", "y_rows", "gB_rows", "exponent_rows"), (plan.chunk, plan.block)
    ) | {"carry": (plan.states, plan.block), "before": (plan.chunk, plan.states, plan.block)}
    scratch["columns"] = (plan.chunk // GROUP, plan.states, 2 * GROUP)
    results = _call(_backward_kernel, plan, arrays, outputs, scratch, True, interpret)
    dB, dC = (rows[:, :length, :states] for rows in _unpack(plan, jnp.sum(results["d_tiles"], axis=1)))
    return Inputs(
        u=results["du"],
        dt=results["ddt"],
        A=jnp.sum(results["dA"], axis=0).T[:channels, :states],
        B=dB,
        C=dC,
        D=jnp.sum(results["dD"], axis=(0, 1))[:channels],
        z=results.get("dz"),
        dt_bias=jnp.sum(results["d_bias"], axis=(0, 1))[:channels],
        initial_state=results["d_state"].swapaxes(1, 2)[:, :channels, :states],
        segment_ids=None,
    )


def scan_tpu(interpret: Any = False) -> Callable:
    """The scan by these kernels; `interpret` as in `pallas_call`, for tests."""
    return differentiable(functools.partial(_forward, interpret=interpret), functools.partial(_backward, interpret=interpret))


selective_scan_tpu = scan_tpu()
