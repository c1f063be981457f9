"""The selective scan in Pallas Mosaic GPU, for Hopper and later, forward and backward, written lane by lane.

A block of 128 lanes owns `CHANNELS` channels of one batch row and one chunk of its time. Four lanes share a pair of channels
and hold `OWN` of its 16 states each, in registers, so that every token's B, C and step are read from shared memory once for 8
states. What belongs to a token and channel, not to a state (softplus, skip, gate and their gradients), is computed once, by
another division of the same lanes, before and after the recurrence.

Time is split where batch and channels give too few blocks. A first kernel finds what each chunk adds to the state that
leaves it, and the decay it applies to the state that enters it (`_summary_program`). It walks from the side that
matters most and ends once every decay has underflowed to zero, which changes no bit of the result. The chunks' own kernels
then start from the exact state.

The backward kernel takes time in reverse, `START` tokens at a time: it recomputes the states from the one the forward kernel
kept, holds those of every `PART`th token in shared memory and those of one part in registers, and then runs the adjoint
recurrence `g[t] = C[t] dy[t] + decay[t+1] g[t+1]`. Sums over states and channels cross lanes in a fixed order, without
atomics: two runs agree bit for bit. More than 16 states run as several scans whose outputs and gradients add up.
Run on an H200; times in benchmarks/README.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dispatch import Call
from pallas_kernels.lanes import WARP, WARPGROUP, Lanes, ceil_div, launch, scatter_sum
from pallas_kernels.selective_scan.fused import Inputs, differentiable, refuse_float64

CHANNELS = 64
STATES = 16
OWN = 4
"""States of a channel that one lane holds."""
VECTOR = 8
"""Channels that a lane takes where states play no part."""
TILE = 16
"""Tokens between two barriers of the forward kernel."""
UNROLL = 4
START = 32
"""Tokens between two states that are kept for the backward pass."""
PART = 4
"""Tokens whose states the backward kernel holds in registers."""
BLOCKS = 5 * 132
"""Blocks that keep a Hopper GPU busy."""
SPAN = 128
"""Fewest tokens of a chunk."""

LOG2E = math.log2(math.e)
# Rows of shared memory have gaps, so that the lanes which read or write together meet different banks.
STEP_GROUP, STEP_ROW = 20, 160
"""(step, step, value, value) of four pairs of channels and a gap; eight such groups."""
SUM_GROUP, SUM_ROW = 36, 288
"""Four lanes' shares of the outputs of four pairs, and a gap."""
SLOPE_GROUP, SLOPE_ROW = 12, 96
"""The output gradients of four pairs, and a gap."""


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if call.target.platform != "gpu" or call.target.capability < 9:
        return f"it needs a GPU of compute capability 9.0 (Hopper) or later, this is {call.target.kind}"
    return refuse_float64(call)


class Plan(NamedTuple):
    """How the work of one call is divided."""

    batch: int
    length: int
    channels: int
    """A multiple of VECTOR."""
    span: int
    """Tokens of a chunk, a multiple of START."""
    softplus: bool

    @property
    def chunks(self) -> int:
        return ceil_div(self.length, self.span)

    @property
    def strips(self) -> int:
        return ceil_div(self.channels, CHANNELS)

    @property
    def blocks(self) -> int:
        return self.batch * self.strips * self.chunks


def _plan(batch: int, length: int, channels: int, softplus: bool) -> Plan:
    chunks = max(1, min(BLOCKS // (batch * ceil_div(channels, CHANNELS)), length // SPAN))
    return Plan(batch, length, channels, ceil_div(ceil_div(length, chunks), START) * START, softplus)


class Place(NamedTuple):
    """What a lane works on."""

    row: Any
    strip: Any
    chunk: Any
    first: Any
    """First token of the chunk."""
    end: Any
    """One past the chunk's last token."""
    pair: Any
    """Number of the lane's pair of channels in the strip."""
    quarter: Any
    """Which of the states of that pair the lane holds."""
    channel: Any
    """First channel of the pair, moved inside the array where the strip leaves it."""
    inside: Any
    """Whether it was inside."""


def _place(lanes: Lanes, plan: Plan) -> Place:
    strip, rest = lanes.block % plan.strips, lanes.block // plan.strips
    chunk, row = rest % plan.chunks, rest // plan.chunks
    pair = lanes.thread // OWN
    channel = strip * CHANNELS + pair * 2
    first = chunk * plan.span
    end = lanes.smaller(first + plan.span, plan.length)
    inside = channel < plan.channels
    return Place(row, strip, chunk, first, end, pair, lanes.thread % OWN, lanes.smaller(channel, plan.channels - 2), inside)


def _states(lanes: Lanes, at: Place, ref: Any, *leading: Any) -> list[Any]:
    """The lane's states of both channels from `ref[*leading, channels, STATES]`."""
    return [
        value for c in range(2) for value in lanes.load(ref, (*leading, at.channel + c, at.quarter * OWN), OWN)
    ]  # fmt: skip


def _keep_states(lanes: Lanes, at: Place, values: list[Any], ref: Any, *leading: Any, where: Any = None) -> None:
    where = at.inside if where is None else where & at.inside
    for c in range(2):
        lanes.store(ref, (*leading, at.channel + c, at.quarter * OWN), values[c * OWN : (c + 1) * OWN], where)


def _entering(lanes: Lanes, plan: Plan, at: Place, refs: SimpleNamespace, edge: str, reverse: bool) -> list[Any]:
    """The state (or its gradient, in reverse) that enters the lane's chunk: that at the edge, through the chunks between."""
    zero = [0.0] * (2 * OWN)
    state = _states(lanes, at, getattr(refs, edge), at.row) if hasattr(refs, edge) else zero
    if plan.chunks == 1:
        return state

    def body(i: Any, state: list[Any]) -> list[Any]:
        k = (plan.chunks - 1) - i if reverse else i
        decays, increments = (_states(lanes, at, ref, at.row, k) for ref in (refs.decays, refs.increments))
        return [lanes.fma(d, h, b) for d, h, b in zip(decays, state, increments, strict=True)]

    return lanes.loop((plan.chunks - 1) - at.chunk if reverse else at.chunk, body, state)


def _softplus(lanes: Lanes, x: Any) -> Any:
    """log(1 + exp(x)), to float32's relative precision also where it is tiny."""
    e = lanes.exp2(lanes.maximum(x, -x) * -LOG2E)
    series = e * (1 - e * (0.5 - e * (1 / 3 - e * 0.25)))
    return lanes.maximum(x, 0.0) + lanes.select(e < 0.01, series, lanes.log2(e + 1) * (1 / LOG2E))


def _slope_of_softplus(lanes: Lanes, step: Any) -> Any:
    """The derivative of softplus where its value is `step`: 1 - exp(-step)."""
    series = step * (1 - step * (0.5 - step * (1 / 6 - step * (1 / 24))))
    return lanes.select(step < 0.05, series, 1 - lanes.exp2(step * -LOG2E))


def _sigmoid(lanes: Lanes, x: Any) -> Any:
    return lanes.reciprocal(1 + lanes.exp2(x * -LOG2E))


class Strip(NamedTuple):
    """Where a lane stands when a tile is divided by token and channel: token `token + k * TILE`, VECTOR channels."""

    token: Any
    group: Any
    """Number of its VECTOR channels in the strip, also that of a group in a row of shared memory."""
    column: Any
    """First of them, moved inside the array where the strip leaves it."""
    inside: Any


def _strip(lanes: Lanes, plan: Plan, at: Place) -> Strip:
    group = lanes.thread % VECTOR
    column = at.strip * CHANNELS + group * VECTOR
    return Strip(lanes.thread // VECTOR, group, lanes.smaller(column, plan.channels - VECTOR), column < plan.channels)


def _fetch(lanes: Lanes, plan: Plan, at: Place, by: Strip, ref: Any, time: Any) -> list[Any]:
    """VECTOR channels of one token, or of the last one where `time` is beyond it."""
    return lanes.fetch(ref, (at.row, lanes.smaller(time, plan.length - 1), by.column), VECTOR)


def _steps(lanes: Lanes, plan: Plan, refs: SimpleNamespace, by: Strip, dt: list[Any], time: Any) -> list[Any]:
    """Step sizes of one token, 0 outside the array: there the state stays as it is and takes nothing in."""
    if hasattr(refs, "dt_bias"):
        dt = [a + b for a, b in zip(dt, lanes.load(refs.dt_bias, (by.column,), VECTOR), strict=True)]
    steps = [_softplus(lanes, x) for x in dt] if plan.softplus else dt
    return [lanes.select(by.inside & (time < plan.length), step, 0.0) for step in steps]


def _slopes(lanes: Lanes, plan: Plan, at: Place, by: Strip, refs: SimpleNamespace, time: Any) -> list[Any]:
    """Gradients of the output before the gate, of one token, 0 outside the array."""
    dy = lanes.unpack(_fetch(lanes, plan, at, by, refs.dy, time))
    if hasattr(refs, "z"):
        z = lanes.unpack(_fetch(lanes, plan, at, by, refs.z, time))
        dy = [d * x * _sigmoid(lanes, x) for d, x in zip(dy, z, strict=True)]
    return [lanes.select(by.inside & (time < plan.length), d, 0.0) for d in dy]


def _put_steps(lanes: Lanes, by: Strip, ref: Any, token: Any, steps: list[Any], values: list[Any]) -> None:
    for k in range(0, VECTOR, 2):
        lanes.store(ref, (token, by.group * STEP_GROUP + 2 * k), [*steps[k : k + 2], *values[k : k + 2]])


def _put_tokens(lanes: Lanes, plan: Plan, at: Place, refs: SimpleNamespace, first: Any, tokens: int, names: str) -> None:
    """Bring the rows of B and C, and the flags of `keep`, for `tokens` tokens from `first` on to shared memory."""
    lane = lanes.thread % (tokens * OWN)
    time = lanes.smaller(first + lane // OWN, plan.length - 1)
    for k, name in enumerate(names):
        values = lanes.load(getattr(refs, name), (at.row, time, lane % OWN * OWN), OWN)
        # Where half the lanes are enough, each half takes one array.
        mine = None if tokens * OWN == WARPGROUP else lanes.thread < tokens * OWN if k == 0 else lanes.thread > tokens * OWN - 1
        lanes.store(getattr(refs, name + "_rows"), (lane // OWN, lane % OWN * OWN), values, mine)
    if hasattr(refs, "keep"):
        lane = lanes.thread % tokens
        flag = lanes.load(refs.keep, (at.row, lanes.smaller(first + lane, plan.length - 1)), 1)
        lanes.store(refs.keep_rows, (lane,), flag, lanes.thread < tokens)


def _step_at(lanes: Lanes, at: Place, ref: Any, token: Any) -> tuple[list[Any], list[Any]]:
    """(steps, values) of the lane's pair, as `_put_steps` left them."""
    four = lanes.load(ref, (token, at.pair // 4 * STEP_GROUP + at.pair % 4 * 4), 4)
    return four[:2], four[2:]


def _kept(lanes: Lanes, refs: SimpleNamespace, token: Any) -> Any:
    """Whether the state survives into `token`, or None where all do."""
    return lanes.load(refs.keep_rows, (token,), 1)[0] > 0 if hasattr(refs, "keep") else None


def _where_kept(lanes: Lanes, kept: Any, values: list[Any]) -> list[Any]:
    return values if kept is None else [lanes.select(kept, value, 0.0) for value in values]


def _advance(
    lanes: Lanes, rates: list[Any], steps: list[Any], inputs: list[Any], row: list[Any], kept: Any, state: list[Any]
) -> tuple[list[Any], list[Any]]:
    """(decays, next state) of the lane, from each channel's step and step * x, and the token's B."""
    decays = [lanes.exp2(steps[k // OWN] * rates[k]) for k in range(2 * OWN)]
    state = _where_kept(lanes, kept, state)
    return decays, [lanes.fma(decays[k], state[k], inputs[k // OWN] * row[k % OWN]) for k in range(2 * OWN)]


def _summary_program(plan: Plan, adjoint: bool, lanes: Lanes, refs: SimpleNamespace) -> None:
    """What each chunk adds to the state that leaves it, and its decay of the one that enters it.

    Forward in meaning, it walks from the chunk's last token to the first; for the adjoint state, which leaves at the first
    token, from the first to the last.
    """
    at = _place(lanes, plan)
    by = _strip(lanes, plan, at)
    rates = _states(lanes, at, refs.A)
    tiles = (at.end - at.first + (TILE - 1)) // TILE
    # The last chunk in walking order of the states hands nothing on.
    needed = (at.chunk if adjoint else (plan.chunks - 1) - at.chunk) * (plan.span // TILE)
    row_name = "C" if adjoint else "B"

    def tile(i: Any, carry: list[Any]) -> tuple[Any, list[Any]]:
        start = at.first + (i if adjoint else tiles - 1 - i) * TILE
        time = start + by.token
        steps = _steps(lanes, plan, refs, by, lanes.unpack(_fetch(lanes, plan, at, by, refs.dt, time)), time)
        if adjoint:
            values = _slopes(lanes, plan, at, by, refs, time)
        else:
            u = lanes.unpack(_fetch(lanes, plan, at, by, refs.u, time))
            values = [step * x for step, x in zip(steps, u, strict=True)]
        _put_steps(lanes, by, refs.step_rows, by.token, steps, values)
        _put_tokens(lanes, plan, at, refs, start, TILE, row_name)
        lanes.barrier()

        def token(j: Any, carry: list[Any]) -> list[Any]:
            total, decay = carry[: 2 * OWN], carry[2 * OWN :]
            t = j if adjoint else (TILE - 1) - j
            steps, values = _step_at(lanes, at, refs.step_rows, t)
            row = lanes.load(getattr(refs, row_name + "_rows"), (t, at.quarter * OWN), OWN)
            through = [lanes.exp2(steps[k // OWN] * rates[k]) * decay[k] for k in range(2 * OWN)]
            through = _where_kept(lanes, _kept(lanes, refs, t), through)
            weights = through if adjoint else decay
            total = [lanes.fma(weights[k], values[k // OWN] * row[k % OWN], total[k]) for k in range(2 * OWN)]
            return [*total, *through]

        carry = _unrolled(lanes, TILE, token, carry)
        largest = functools.reduce(lanes.maximum, [lanes.maximum(d, -d) for d in carry[2 * OWN :]])
        return largest > 0, carry

    carry = lanes.loop_while_any(lanes.smaller(tiles, needed), tile, [0.0] * (2 * OWN) + [1.0] * (2 * OWN))
    _keep_states(lanes, at, carry[: 2 * OWN], refs.increments, at.row, at.chunk)
    _keep_states(lanes, at, carry[2 * OWN :], refs.decays, at.row, at.chunk)


def _unrolled(lanes: Lanes, count: int, body: Callable[[Any, list[Any]], list[Any]], carry: list[Any]) -> list[Any]:
    """A loop of `count` turns, UNROLL of them at a time."""

    def several(k: Any, carry: list[Any]) -> list[Any]:
        for q in range(UNROLL):
            carry = body(k * UNROLL + q, carry)
        return carry

    return lanes.loop(count // UNROLL, several, carry)


def _forward_program(plan: Plan, lanes: Lanes, refs: SimpleNamespace) -> None:
    at = _place(lanes, plan)
    by = _strip(lanes, plan, at)
    rates = _states(lanes, at, refs.A)
    streams = [getattr(refs, name) for name in ("u", "dt", "z") if hasattr(refs, name)]

    def fetch(start: Any) -> list[Any]:
        return [piece for ref in streams for piece in _fetch(lanes, plan, at, by, ref, start + by.token)]

    def tile(i: Any, carry: list[Any]) -> list[Any]:
        state, fetched = carry[: 2 * OWN], carry[2 * OWN :]
        start = at.first + i * TILE
        time = start + by.token
        size = len(fetched) // len(streams)
        x, dt, *z = (lanes.unpack(fetched[k * size : (k + 1) * size]) for k in range(len(streams)))
        steps = _steps(lanes, plan, refs, by, dt, time)
        _put_steps(lanes, by, refs.step_rows, by.token, steps, [step * a for step, a in zip(steps, x, strict=True)])
        _put_tokens(lanes, plan, at, refs, start, TILE, "BC")
        if hasattr(refs, "starts"):
            _keep_states(lanes, at, state, refs.starts, at.row, start // START, where=start % START < 1)
        fetched = fetch(start + TILE)
        lanes.barrier()

        def token(t: Any, state: list[Any]) -> list[Any]:
            steps, inputs = _step_at(lanes, at, refs.step_rows, t)
            B, C = (lanes.load(ref, (t, at.quarter * OWN), OWN) for ref in (refs.B_rows, refs.C_rows))
            _, state = _advance(lanes, rates, steps, inputs, B, _kept(lanes, refs, t), state)
            shares = [_dot(lanes, state[c * OWN : (c + 1) * OWN], C) for c in range(2)]
            lanes.store(refs.sum_rows, (t, at.pair // 4 * SUM_GROUP + at.pair % 4 * 8 + at.quarter * 2), shares)
            return state

        state = _unrolled(lanes, TILE, token, state)
        lanes.barrier()
        y = []
        for k in range(VECTOR // 2):
            shares = lanes.load(refs.sum_rows, (by.token, by.group * SUM_GROUP + k * 8), 8)
            y += [(shares[c] + shares[2 + c]) + (shares[4 + c] + shares[6 + c]) for c in range(2)]
        if hasattr(refs, "D"):
            skip = lanes.load(refs.D, (by.column,), VECTOR)
            y = [lanes.fma(d, a, b) for d, a, b in zip(skip, x, y, strict=True)]
        if z:
            y = [a * (gate * _sigmoid(lanes, gate)) for a, gate in zip(y, z[0], strict=True)]
        lanes.store(refs.y, (at.row, time, by.column), y, by.inside & (time < at.end))
        return [*state, *fetched]

    state = _entering(lanes, plan, at, refs, "state", reverse=False)
    tiles = (at.end - at.first + (TILE - 1)) // TILE
    state = lanes.loop(tiles, tile, [*state, *fetch(at.first)])[: 2 * OWN]
    _keep_states(lanes, at, state, refs.final, at.row, where=at.chunk > plan.chunks - 2)


def _dot(lanes: Lanes, x: list[Any], y: list[Any]) -> Any:
    total = x[0] * y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        total = lanes.fma(a, b, total)
    return total


def _backward_program(plan: Plan, lanes: Lanes, refs: SimpleNamespace) -> None:
    at = _place(lanes, plan)
    by = _strip(lanes, plan, at)
    rates = _states(lanes, at, refs.A)
    lane, warp = lanes.thread % WARP, lanes.thread // WARP
    parts = START // PART
    private = warp * (WARP * 2 * OWN)
    """Where the warp's share of a row of `part_rows` begins."""
    count = (at.end - at.first + (START - 1)) // START

    def token(t: Any, state: list[Any]) -> tuple[list[Any], list[Any], Any]:
        steps, x = _step_at(lanes, at, refs.step_rows, t)
        B = lanes.load(refs.B_rows, (t, at.quarter * OWN), OWN)
        kept = _kept(lanes, refs, t)
        decays, state = _advance(lanes, rates, steps, [s * a for s, a in zip(steps, x, strict=True)], B, kept, state)
        return decays, state, kept

    def put_part(s: Any, state: list[Any]) -> None:
        for c in range(2):
            lanes.store(refs.part_rows, (s, private + c * WARP * OWN + lane * OWN), state[c * OWN : (c + 1) * OWN])

    def slope_at(t: Any) -> list[Any]:
        return lanes.load(refs.slope_rows, (t, at.pair // 4 * SLOPE_GROUP + at.pair % 4 * 2), 2)

    def tile(i: Any, carry: list[Any]) -> list[Any]:
        start = at.first + (count - 1 - i) * START
        for half in range(START // TILE):
            row = by.token + half * TILE
            time = start + row
            u, dt = (lanes.unpack(_fetch(lanes, plan, at, by, ref, time)) for ref in (refs.u, refs.dt))
            _put_steps(lanes, by, refs.step_rows, row, _steps(lanes, plan, refs, by, dt, time), u)
            lanes.store(refs.slope_rows, (row, by.group * SLOPE_GROUP), _slopes(lanes, plan, at, by, refs, time))
        _put_tokens(lanes, plan, at, refs, start, START, "BC")
        lanes.barrier()

        def forward(s: Any, state: list[Any]) -> list[Any]:
            put_part(s, state)
            for q in range(PART):
                _, state, _ = token(s * PART + q, state)
            return state

        put_part(parts - 1, lanes.loop(parts - 1, forward, _states(lanes, at, refs.starts, at.row, start // START)))
        carry = lanes.loop(parts, functools.partial(part, start), carry)
        lanes.barrier()
        t = lanes.thread // OWN
        total = [0.0] * VECTOR
        for w in range(WARPGROUP // WARP):
            place = w * (WARP * 2 * OWN) + t % PART * (2 * STATES) + lanes.thread % OWN * VECTOR
            total = [a + b for a, b in zip(lanes.load(refs.part_rows, (t // PART, place), VECTOR), total, strict=True)]
        lanes.store(refs.dBC, (at.row, at.strip, start + t, lanes.thread % OWN * VECTOR), total, start + t < at.end)
        return carry

    def part(start: Any, j: Any, carry: list[Any]) -> list[Any]:
        """The adjoint recurrence through PART tokens; each lane of four finishes one of them for its pair of channels."""
        g, dA, sums = carry[: 2 * OWN], carry[2 * OWN : 4 * OWN], carry[4 * OWN :]
        s = (parts - 1) - j
        mine = s * PART + at.quarter
        time = start + mine
        outer = (at.row, lanes.smaller(time, plan.length - 1), at.channel)
        dy = lanes.fetch(refs.dy, outer, 2)
        z = lanes.fetch(refs.z, outer, 2) if hasattr(refs, "z") else None

        state = [
            value
            for c in range(2)
            for value in lanes.load(refs.part_rows, (s, private + c * WARP * OWN + lane * OWN), OWN)
        ]  # fmt: skip
        states, decays, kept = [state], [], []
        for q in range(PART):
            decay, state, flag = token(s * PART + q, state)
            states.append(state)
            decays.append(decay)
            kept.append(flag)
        by_channel: list[list[Any]] = [[]] * PART
        by_state: list[list[Any]] = [[]] * PART
        for q in reversed(range(PART)):
            t = s * PART + q
            steps, x = _step_at(lanes, at, refs.step_rows, t)
            slopes = slope_at(t)
            B, C = (lanes.load(ref, (t, at.quarter * OWN), OWN) for ref in (refs.B_rows, refs.C_rows))
            g = [lanes.fma(C[k % OWN], slopes[k // OWN], g[k]) for k in range(2 * OWN)]
            through = _where_kept(lanes, kept[q], [g[k] * decays[q][k] for k in range(2 * OWN)])
            exponents = [through[k] * states[q][k] for k in range(2 * OWN)]
            dA = [lanes.fma(exponents[k], steps[k // OWN], dA[k]) for k in range(2 * OWN)]
            own = [slice(c * OWN, (c + 1) * OWN) for c in range(2)]
            by_channel[q] = [
                *(_dot(lanes, states[q + 1][c], C) for c in own),
                *(_dot(lanes, g[c], B) for c in own),
                *(_dot(lanes, exponents[c], rates[c]) for c in own),
            ]
            inputs = [step * a for step, a in zip(steps, x, strict=True)]
            by_state[q] = [
                *(_dot(lanes, inputs, [g[n], g[OWN + n]]) for n in range(OWN)),
                *(_dot(lanes, slopes, [states[q + 1][n], states[q + 1][OWN + n]]) for n in range(OWN)),
            ]
            g = through

        sums_by_state = scatter_sum(lanes, [value for values in by_state for value in values], (16, 8, 4))
        y, gB, d_exponent = _pairs(scatter_sum(lanes, [value for values in by_channel for value in values], (2, 1)))
        lanes.warp_barrier()
        token_of_lane = lane // 16 * 2 + lane // 8 % 2
        place = token_of_lane * (2 * STATES) + lane // OWN % 2 * STATES + at.quarter * OWN
        lanes.store(refs.part_rows, (s, private + place), sums_by_state)

        steps, x = _step_at(lanes, at, refs.step_rows, mine)
        slopes = slope_at(mine)
        written = at.inside & (time < at.end)
        skip = lanes.load(refs.D, (at.channel,), 2) if hasattr(refs, "D") else [0.0, 0.0]
        if z is not None:
            d_gate = []
            for c, (d, gate) in enumerate(zip(lanes.unpack(dy), lanes.unpack(z), strict=True)):
                sigmoid = _sigmoid(lanes, gate)
                d_gate.append(d * (y[c] + skip[c] * x[c]) * sigmoid * (1 + gate * (1 - sigmoid)))
            lanes.store(refs.dz, (at.row, time, at.channel), d_gate, written)
        du = [lanes.fma(steps[c], gB[c], skip[c] * slopes[c]) for c in range(2)]
        d_step = [lanes.fma(x[c], gB[c], d_exponent[c] * (1 / LOG2E)) for c in range(2)]
        if plan.softplus:
            d_step = [d * _slope_of_softplus(lanes, step) for d, step in zip(d_step, steps, strict=True)]
        lanes.store(refs.du, (at.row, time, at.channel), du, written)
        lanes.store(refs.ddt, (at.row, time, at.channel), d_step, written)
        d_step = [lanes.select(time < at.end, d, 0.0) for d in d_step]
        sums = [a + b for a, b in zip(sums, [*(p * a for p, a in zip(slopes, x, strict=True)), *d_step], strict=True)]
        return [*g, *dA, *sums]

    g = _entering(lanes, plan, at, refs, "d_final", reverse=True)
    carry = lanes.loop(count, tile, [*g, *[0.0] * (2 * OWN + 4)])
    g, dA, sums = carry[: 2 * OWN], carry[2 * OWN : 4 * OWN], carry[4 * OWN :]
    _keep_states(lanes, at, g, refs.d_state, at.row, where=at.chunk < 1)
    _keep_states(lanes, at, dA, refs.dA, at.row, at.chunk)
    for stride in (1, 2):
        sums = [value + lanes.exchange(value, stride) for value in sums]
    lanes.store(refs.dD, (at.row, at.chunk, at.channel), sums[:2], at.inside & (at.quarter < 1))
    lanes.store(refs.d_bias, (at.row, at.chunk, at.channel), sums[2:], at.inside & (at.quarter < 1))


def _pairs(values: list[Any]) -> list[list[Any]]:
    return [values[k : k + 2] for k in range(0, len(values), 2)]


def _pad(array: Array, axis: int, multiple: int) -> Array:
    """`array` with zeros to a multiple of `multiple` along `axis`."""
    missing = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, missing if k == axis else 0) for k in range(array.ndim)]) if missing else array


def _arrays(inputs: Inputs) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """The programs' inputs: those that every group of STATES states shares, and those of each group."""
    f32 = jnp.float32
    shared = {"u": _pad(inputs.u, 2, VECTOR), "dt": _pad(inputs.dt, 2, VECTOR)}
    if inputs.z is not None:
        shared["z"] = _pad(inputs.z, 2, VECTOR)
    if inputs.dt_bias is not None:
        shared["dt_bias"] = _pad(inputs.dt_bias.astype(f32), 0, VECTOR)
    if inputs.segment_ids is not None:
        same = inputs.segment_ids[:, 1:] == inputs.segment_ids[:, :-1]
        shared["keep"] = jnp.pad(same.astype(f32), ((0, 0), (1, 0)), constant_values=1)

    def split(array: Array) -> list[Array]:
        array = _pad(array, array.ndim - 1, STATES)
        return jnp.split(array, array.shape[-1] // STATES, axis=-1)

    A = split(_pad(inputs.A.astype(f32) * LOG2E, 0, VECTOR))
    groups = [{"A": a, "B": b, "C": c} for a, b, c in zip(A, split(inputs.B), split(inputs.C), strict=True)]
    if inputs.initial_state is not None:
        for group, state in zip(groups, split(_pad(inputs.initial_state.astype(f32), 1, VECTOR)), strict=True):
            group["state"] = state
    if inputs.D is not None:
        groups[0]["D"] = _pad(inputs.D.astype(f32), 0, VECTOR)
    return shared, groups


def _pick(arrays: dict[str, Array], names: str) -> dict[str, Array]:
    return {name: arrays[name] for name in names.split() if name in arrays}


_ROWS = {"step_rows": (TILE, STEP_ROW), "B_rows": (TILE, STATES), "C_rows": (TILE, STATES), "keep_rows": (TILE,)}
_LONG_ROWS = {name: (START, *shape[1:]) for name, shape in _ROWS.items()}


def _run(program: Callable, plan: Plan, inputs: dict[str, Array], outputs: dict, shared: dict, interpret: bool) -> dict[str, Array]:
    shared = {name: shape for name, shape in shared.items() if name != "keep_rows" or "keep" in inputs}
    return launch(functools.partial(program, plan), plan.blocks, inputs, outputs, shared, interpret)


def _summaries(plan: Plan, arrays: dict[str, Array], adjoint: bool, interpret: bool) -> dict[str, Array]:
    """Each chunk's increments and decays `[batch, chunks, channels, STATES]`; nothing where there is one chunk."""
    if plan.chunks == 1:
        return {}
    kind = jax.ShapeDtypeStruct((plan.batch, plan.chunks, plan.channels, STATES), jnp.float32)
    names, row = ("dt z dy C A dt_bias keep", "C_rows") if adjoint else ("dt u B A dt_bias keep", "B_rows")
    return _run(
        _adjoint_summary_program if adjoint else _state_summary_program,
        plan, _pick(arrays, names), {"increments": kind, "decays": kind}, _pick(_ROWS, f"step_rows {row} keep_rows"), interpret,
    )  # fmt: skip


def _state_summary_program(plan: Plan, lanes: Lanes, refs: SimpleNamespace) -> None:
    _summary_program(plan, False, lanes, refs)


def _adjoint_summary_program(plan: Plan, lanes: Lanes, refs: SimpleNamespace) -> None:
    _summary_program(plan, True, lanes, refs)


def _forward(inputs: Inputs, dt_softplus: bool, keep_starts: bool, interpret: bool) -> tuple[Array, Array, list[Array] | None]:
    (batch, length, width), states = inputs.u.shape, inputs.A.shape[1]
    shared, groups = _arrays(inputs)
    plan = _plan(batch, length, shared["u"].shape[2], dt_softplus)
    of_state = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs = {
        "y": jax.ShapeDtypeStruct(shared["u"].shape, inputs.u.dtype if len(groups) == 1 else jnp.float32),
        "final": of_state((batch, plan.channels, STATES)),
    }
    if keep_starts:
        outputs["starts"] = of_state((batch, ceil_div(length, START), plan.channels, STATES))
    results = []
    for group in groups:
        arrays = shared | group | _summaries(plan, shared | group, False, interpret)
        arrays = _pick(arrays, "u dt z B C A D dt_bias keep state decays increments")
        results.append(_run(_forward_program, plan, arrays, outputs, _ROWS | {"sum_rows": (TILE, SUM_ROW)}, interpret))
    y = sum(result["y"] for result in results)[:, :, :width].astype(inputs.u.dtype)
    final = jnp.concatenate([result["final"] for result in results], axis=-1)[:, :width, :states]
    return y, final, [result["starts"] for result in results] if keep_starts else None


def _backward(
    inputs: Inputs, starts: list[Array], dy: Array, d_final: Array, dt_softplus: bool, interpret: bool
) -> Inputs:
    (batch, length, width), states = inputs.u.shape, inputs.A.shape[1]
    shared, groups = _arrays(inputs)
    plan = _plan(batch, length, shared["u"].shape[2], dt_softplus)
    shared["dy"] = _pad(dy, 2, VECTOR)
    d_final = _pad(_pad(d_final, 1, VECTOR), 2, STATES)
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
    scratch = _LONG_ROWS | {"slope_rows": (START, SLOPE_ROW), "part_rows": (START // PART, WARPGROUP * 2 * OWN)}
    results = []
    for k, group in enumerate(groups):
        arrays = shared | group | {"starts": starts[k], "d_final": d_final[..., k * STATES : (k + 1) * STATES]}
        arrays |= _summaries(plan, arrays, True, interpret)
        names = "u dt z dy B C A D dt_bias keep starts d_final decays increments"
        results.append(_run(_backward_program, plan, _pick(arrays, names), outputs, scratch, interpret))

    def total(name: str) -> Array:
        return sum(result[name] for result in results)[:, :, :width]

    def joined(name: str) -> Array:
        return jnp.concatenate([result[name] for result in results], axis=-1)

    dBC = [jnp.sum(result["dBC"], axis=1) for result in results]
    return Inputs(
        u=total("du"),
        dt=total("ddt"),
        A=jnp.sum(joined("dA"), axis=(0, 1))[:width, :states],
        B=jnp.concatenate([rows[..., :STATES] for rows in dBC], axis=-1)[..., :states],
        C=jnp.concatenate([rows[..., STATES:] for rows in dBC], axis=-1)[..., :states],
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
