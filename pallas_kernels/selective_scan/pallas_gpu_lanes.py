"""What the lanes of the GPU kernels do: see `pallas_gpu`, whose kernels these programs are.

A block of 128 lanes owns a strip of channels of one batch row through one chunk of its time. The programs read and write the
arrays that `pallas_gpu` names; each walks over tiles of time, and inside a tile over tokens.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lanes import WARP, WARPGROUP, Lanes, ceil_div, scatter_sum

LOG2E = math.log2(math.e)
STATES = 16
"""States of one scan."""
OWN = 4
"""States of a channel that one lane holds."""
START = 32
"""Tokens between two states that are kept for the backward pass."""
PART = 4
"""Tokens whose states the backward kernel holds in registers."""
UNROLL = 4
"""Tokens of the forward recurrence between two branches."""
ALIGNED = 8
"""What channels are padded to a multiple of."""
GAP = 4
"""Words left free in shared memory after each group of channels, so that lanes which meet there meet different banks."""

# Found by measuring, on a GPU with 132 processors.
VECTORS = {1: 4, 2: 8}
"""Channels that a lane takes where states play no part, by the channels whose states it holds."""
BLOCKS = {1: 7 * 132, 2: 3 * 132}
LONG, LONG_BLOCKS = 4096, {1: 10 * 132, 2: 9 * 132}
"""Blocks that keep the GPU busy, likewise: time is split until there are so many; the second from LONG tokens on."""
SPAN = 128
"""Fewest tokens of a chunk of time."""
MANY = 6 * 132
"""Blocks from which the forward kernel's lanes hold two channels each: they read B and C once for both."""
TOGETHER = 3
"""Blocks of the backward kernel that start together, to cap its registers so that three fit a processor."""


class Plan(NamedTuple):
    """How the work of one call is divided."""

    batch: int
    length: int
    channels: int
    """A multiple of ALIGNED."""
    span: int
    """Tokens of a chunk, a multiple of START."""
    softplus: bool
    each: int
    """Channels that a lane holds states of, 1 or 2."""
    vector: int
    """Channels that a lane takes where states play no part."""

    @property
    def strip(self) -> int:
        """Channels of a block."""
        return WARPGROUP // OWN * self.each

    @property
    def tile(self) -> int:
        """Tokens of a strip's channels that the block's lanes take, `vector` channels each."""
        return WARPGROUP * self.vector // self.strip

    @property
    def chunks(self) -> int:
        return ceil_div(self.length, self.span)

    @property
    def strips(self) -> int:
        return ceil_div(self.channels, self.strip)

    @property
    def blocks(self) -> int:
        return self.batch * self.strips * self.chunks


def plan_of(batch: int, length: int, channels: int, softplus: bool, each: int) -> Plan:
    """The division by blocks whose lanes hold `each` channels, with time in chunks where there are too few of them."""
    whole = Plan(batch, length, channels, length, softplus, each, VECTORS[each])
    blocks = (LONG_BLOCKS if length >= LONG else BLOCKS)[each]
    chunks = max(1, min(blocks // whole.blocks, length // SPAN))
    return whole._replace(span=ceil_div(ceil_div(length, chunks), START) * START)


def plan_forward(batch: int, length: int, channels: int, softplus: bool) -> Plan:
    """Two channels a lane, which save reading B and C, where even so there are enough blocks."""
    plan = plan_of(batch, length, channels, softplus, 2)
    return plan if batch * plan.strips >= MANY else plan_of(batch, length, channels, softplus, 1)


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


class Work:
    """What one lane works on, in the two divisions of a strip, and the steps that the programs have in common.

    For the recurrence it owns `each` channels from `channel` on and a `quarter` of their states. Where states play no part
    it takes `vector` channels, from `column` on, of one token of a tile. A lane whose channels the strip leaves outside the
    array reads others in their place and writes nothing.
    """

    def __init__(self, plan: Plan, lanes: Lanes, refs: SimpleNamespace):
        self.plan, self.lanes, self.refs = plan, lanes, refs
        self.strip, rest = lanes.block % plan.strips, lanes.block // plan.strips
        self.chunk, self.row = rest % plan.chunks, rest // plan.chunks
        self.first = self.chunk * plan.span
        """First token of the chunk."""
        self.end = lanes.smaller(self.first + plan.span, plan.length)
        """One past the last token of the chunk."""

        self.quarter = lanes.thread % OWN
        offset = lanes.thread // OWN * plan.each
        channel = self.strip * plan.strip + offset
        self.channel, self.inside = lanes.smaller(channel, plan.channels - plan.each), channel < plan.channels
        group, place = offset // plan.vector, offset % plan.vector
        self.step_place = group * (2 * plan.vector + GAP) + place * 2
        self.sum_place = group * (OWN * plan.vector + GAP) + place * OWN + self.quarter * plan.each
        self.slope_place = group * (plan.vector + GAP) + place
        """Places of the first channel in the rows of shared memory."""

        groups = plan.strip // plan.vector
        self.token, self.group = lanes.thread // groups, lanes.thread % groups
        column = self.strip * plan.strip + self.group * plan.vector
        self.column, self.column_inside = lanes.smaller(column, plan.channels - plan.vector), column < plan.channels

    def has(self, name: str) -> bool:
        """Whether the call has this array."""
        return hasattr(self.refs, name)

    def states(self, ref: Any, *leading: Any) -> list[Any]:
        """The lane's states, channel by channel, from `ref[*leading, channels, STATES]`."""
        places = [(*leading, self.channel + c, self.quarter * OWN) for c in range(self.plan.each)]
        return [value for place in places for value in self.lanes.load(ref, place, OWN)]

    def keep_states(self, values: list[Any], ref: Any, *leading: Any, where: Any = None) -> None:
        where = self.inside if where is None else where & self.inside
        for c in range(self.plan.each):
            self.lanes.store(ref, (*leading, self.channel + c, self.quarter * OWN), values[c * OWN : (c + 1) * OWN], where)

    def entering(self, edge: str, reverse: bool) -> list[Any]:
        """The state (or its gradient, in reverse) that enters the chunk: that at the edge, through the chunks between."""
        lanes, refs, last = self.lanes, self.refs, self.plan.chunks - 1
        state = self.states(getattr(refs, edge), self.row) if self.has(edge) else [0.0] * (self.plan.each * OWN)
        if last == 0:
            return state

        def body(i: Any, state: list[Any]) -> list[Any]:
            k = last - i if reverse else i
            decays, increments = (self.states(ref, self.row, k) for ref in (refs.decays, refs.increments))
            return [lanes.fma(d, h, b) for d, h, b in zip(decays, state, increments, strict=True)]

        return lanes.loop(last - self.chunk if reverse else self.chunk, body, state)

    def fetch(self, ref: Any, time: Any) -> list[Any]:
        """The lane's `vector` channels of one token, or of the last one where `time` is beyond it."""
        return self.lanes.fetch(ref, (self.row, self.lanes.smaller(time, self.plan.length - 1), self.column), self.plan.vector)

    def read(self, ref: Any, time: Any) -> list[Any]:
        return self.lanes.unpack(self.fetch(ref, time))

    def of_channels(self, ref: Any) -> list[Any]:
        """The lane's `vector` channels of `ref[channels]`."""
        return self.lanes.load(ref, (self.column,), self.plan.vector)

    def steps(self, dt: list[Any], time: Any) -> list[Any]:
        """Step sizes of one token, 0 outside the array: there the state stays as it is and takes nothing in."""
        if self.has("dt_bias"):
            dt = [a + b for a, b in zip(dt, self.of_channels(self.refs.dt_bias), strict=True)]
        steps = [_softplus(self.lanes, x) for x in dt] if self.plan.softplus else dt
        return [self.lanes.select(self.column_inside & (time < self.plan.length), step, 0.0) for step in steps]

    def slopes(self, time: Any) -> list[Any]:
        """Gradients of the output before the gate, of one token, 0 outside the array."""
        dy = self.read(self.refs.dy, time)
        if self.has("z"):
            dy = [d * x * _sigmoid(self.lanes, x) for d, x in zip(dy, self.read(self.refs.z, time), strict=True)]
        return [self.lanes.select(self.column_inside & (time < self.plan.length), d, 0.0) for d in dy]

    def put_steps(self, token: Any, steps: list[Any], values: list[Any]) -> None:
        both = [x for pair in zip(steps, values, strict=True) for x in pair]
        self.lanes.store(self.refs.step_rows, (token, self.group * (2 * self.plan.vector + GAP)), both)

    def put_tokens(self, first: Any, tokens: int, names: str) -> None:
        """Bring the rows of B or C or both, and the flags of `keep`, of `tokens` tokens from `first` on to shared memory."""
        lanes, refs, last = self.lanes, self.refs, self.plan.length - 1
        half = tokens * OWN
        lane = lanes.thread % half
        time = lanes.smaller(first + lane // OWN, last)
        # Where half the lanes are enough, each half takes one array.
        takers = [None, None] if half == WARPGROUP else [lanes.thread < half, lanes.thread > half - 1]
        for k, name in enumerate(names):
            values = lanes.load(getattr(refs, name), (self.row, time, lane % OWN * OWN), OWN)
            lanes.store(refs.rows, (lane // OWN, (lane % OWN * len(names) + k) * OWN), values, takers[k])
        if self.has("keep"):
            lane = lanes.thread % tokens
            flag = lanes.load(refs.keep, (self.row, lanes.smaller(first + lane, last)), 1)[0]
            # The steps past the last token are 0 and must leave the state as it is.
            flag = lanes.select(first + lane < last + 1, flag, 1.0)
            lanes.store(refs.keep_rows, (lane,), [flag], lanes.thread < tokens)

    def step_at(self, token: Any) -> tuple[list[Any], list[Any]]:
        """(steps, values) of the lane's channels, as `put_steps` left them."""
        both = self.lanes.load(self.refs.step_rows, (token, self.step_place), 2 * self.plan.each)
        return both[::2], both[1::2]

    def row_at(self, token: Any) -> tuple[list[Any], list[Any]]:
        """The token's B and C, of the lane's states."""
        both = self.lanes.load(self.refs.rows, (token, self.quarter * 2 * OWN), 2 * OWN)
        return both[:OWN], both[OWN:]

    def kept(self, token: Any) -> Any:
        """Whether the state survives into `token`, or None where all do."""
        return self.lanes.load(self.refs.keep_rows, (token,), 1)[0] > 0 if self.has("keep") else None

    def where_kept(self, kept: Any, values: list[Any]) -> list[Any]:
        return values if kept is None else [self.lanes.select(kept, value, 0.0) for value in values]

    def advance(
        self, rates: list[Any], steps: list[Any], inputs: list[Any], row: list[Any], kept: Any, state: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """The lane's decays and next state, from each channel's step and step * x, and the token's B."""
        decays = [self.lanes.exp2(steps[k // OWN] * rate) for k, rate in enumerate(rates)]
        state = self.where_kept(kept, state)
        return decays, [self.lanes.fma(decays[k], h, inputs[k // OWN] * row[k % OWN]) for k, h in enumerate(state)]


def summary_program(adjoint: bool, plan: Plan, lanes: Lanes, refs: SimpleNamespace) -> None:
    """What each chunk adds to the state that leaves it, and its decay of the one that enters it.

    The state leaves at the last token and the walk is from there to the first; the adjoint state leaves at the first.
    """
    work = Work(plan, lanes, refs)
    rates = work.states(refs.A)
    own = plan.each * OWN
    tiles = (work.end - work.first + (plan.tile - 1)) // plan.tile
    # The last chunk in walking order of the states hands nothing on.
    needed = (work.chunk if adjoint else (plan.chunks - 1) - work.chunk) * (plan.span // plan.tile)

    def decays(passed: list[Any], alive: list[Any]) -> list[Any]:
        values = [lanes.exp2(passed[k // OWN] * rates[k]) for k in range(own)]
        return [value * alive[0] for value in values] if alive else values

    def tile(i: Any, carry: list[Any]) -> tuple[Any, list[Any]]:
        start = work.first + (i if adjoint else tiles - 1 - i) * plan.tile
        time = start + work.token
        steps = work.steps(work.read(refs.dt, time), time)
        if adjoint:
            values = work.slopes(time)
        else:
            u = work.read(refs.u, time)
            values = [step * x for step, x in zip(steps, u, strict=True)]
        work.put_steps(work.token, steps, values)
        work.put_tokens(start, plan.tile, "C" if adjoint else "B")
        lanes.barrier()

        def token(j: Any, carry: list[Any]) -> list[Any]:
            total, passed, alive = carry[:own], carry[own : own + plan.each], carry[own + plan.each :]
            t = j if adjoint else (plan.tile - 1) - j
            steps, values = work.step_at(t)
            row = lanes.load(refs.rows, (t, work.quarter * OWN), OWN)
            after = [a + b for a, b in zip(passed, steps, strict=True)]
            still = work.where_kept(work.kept(t), alive)
            weights = decays(after, still) if adjoint else decays(passed, alive)
            total = [lanes.fma(weights[k], values[k // OWN] * row[k % OWN], total[k]) for k in range(own)]
            return [*total, *after, *still]

        carry = _unrolled(lanes, plan.tile, token, carry)
        return functools.reduce(lanes.maximum, decays(carry[own : own + plan.each], carry[own + plan.each :])) > 0, carry

    # Sums, the time that has passed in each channel, and 1 until a segment ends.
    start = [0.0] * (own + plan.each) + ([1.0] if work.has("keep") else [])
    carry = lanes.loop_while_any(lanes.smaller(tiles, needed), tile, start)
    work.keep_states(carry[:own], refs.increments, work.row, work.chunk)
    work.keep_states(decays(carry[own : own + plan.each], carry[own + plan.each :]), refs.decays, work.row, work.chunk)


def _unrolled(lanes: Lanes, count: int, body: Callable[[Any, list[Any]], list[Any]], carry: list[Any]) -> list[Any]:
    """A loop of `count` turns, UNROLL of them at a time."""

    def several(k: Any, carry: list[Any]) -> list[Any]:
        for q in range(UNROLL):
            carry = body(k * UNROLL + q, carry)
        return carry

    return lanes.loop(count // UNROLL, several, carry)


def forward_program(plan: Plan, lanes: Lanes, refs: SimpleNamespace) -> None:
    """y, the final state and, where asked for, the state at every START-th token."""
    work = Work(plan, lanes, refs)
    rates = work.states(refs.A)
    own = plan.each * OWN
    streams = [getattr(refs, name) for name in ("u", "dt", "z") if work.has(name)]

    def fetch(start: Any) -> list[Any]:
        return [piece for ref in streams for piece in work.fetch(ref, start + work.token)]

    def tile(i: Any, carry: list[Any]) -> list[Any]:
        state, fetched = carry[:own], carry[own:]
        start = work.first + i * plan.tile
        time = start + work.token
        size = len(fetched) // len(streams)
        x, dt, *z = (lanes.unpack(fetched[k * size : (k + 1) * size]) for k in range(len(streams)))
        steps = work.steps(dt, time)
        work.put_steps(work.token, steps, [step * a for step, a in zip(steps, x, strict=True)])
        work.put_tokens(start, plan.tile, "BC")
        if work.has("starts"):
            work.keep_states(state, refs.starts, work.row, start // START, where=start % START < 1)
        fetched = fetch(start + plan.tile)
        lanes.barrier()

        def token(t: Any, state: list[Any]) -> list[Any]:
            steps, inputs = work.step_at(t)
            B, C = work.row_at(t)
            _, state = work.advance(rates, steps, inputs, B, work.kept(t), state)
            shares = [_dot(lanes, state[c * OWN : (c + 1) * OWN], C) for c in range(plan.each)]
            lanes.store(refs.sum_rows, (t, work.sum_place), shares)
            return state

        state = _unrolled(lanes, plan.tile, token, state)
        lanes.barrier()
        y = []
        for k in range(0, plan.vector, plan.each):
            shares = lanes.load(refs.sum_rows, (work.token, work.group * (OWN * plan.vector + GAP) + k * OWN), plan.each * OWN)
            y += [functools.reduce(operator.add, shares[c :: plan.each]) for c in range(plan.each)]
        if work.has("D"):
            skip = work.of_channels(refs.D)
            y = [lanes.fma(d, a, b) for d, a, b in zip(skip, x, y, strict=True)]
        if z:
            y = [a * (gate * _sigmoid(lanes, gate)) for a, gate in zip(y, z[0], strict=True)]
        lanes.store(refs.y, (work.row, time, work.column), y, work.column_inside & (time < work.end))
        return [*state, *fetched]

    state = work.entering("state", reverse=False)
    tiles = (work.end - work.first + (plan.tile - 1)) // plan.tile
    state = lanes.loop(tiles, tile, [*state, *fetch(work.first)])[:own]
    work.keep_states(state, refs.final, work.row, where=work.chunk > plan.chunks - 2)


def _dot(lanes: Lanes, x: list[Any], y: list[Any]) -> Any:
    total = x[0] * y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        total = lanes.fma(a, b, total)
    return total


def backward_program(plan: Plan, lanes: Lanes, refs: SimpleNamespace) -> None:
    """Gradients of every input: of B and C a share for each strip, of what has no time a share for each chunk."""
    work = Work(plan, lanes, refs)
    rates = work.states(refs.A)
    lane, warp = lanes.thread % WARP, lanes.thread // WARP
    parts = START // PART
    private = warp * (WARP * 2 * OWN)
    """Where the warp's share of a row of `part_rows` begins."""
    count = (work.end - work.first + (START - 1)) // START

    def token(t: Any, state: list[Any]) -> tuple[list[Any], list[Any], Any]:
        steps, x = work.step_at(t)
        B = lanes.load(refs.rows, (t, work.quarter * 2 * OWN), OWN)
        kept = work.kept(t)
        inputs = [step * a for step, a in zip(steps, x, strict=True)]
        return *work.advance(rates, steps, inputs, B, kept, state), kept

    def put_part(s: Any, state: list[Any]) -> None:
        for c in range(2):
            lanes.store(refs.part_rows, (s, private + c * WARP * OWN + lane * OWN), state[c * OWN : (c + 1) * OWN])

    def slope_at(t: Any) -> list[Any]:
        return lanes.load(refs.slope_rows, (t, work.slope_place), 2)

    def tile(i: Any, carry: list[Any]) -> list[Any]:
        start = work.first + (count - 1 - i) * START
        for half in range(START // plan.tile):
            row = work.token + half * plan.tile
            time = start + row
            u, dt = (work.read(ref, time) for ref in (refs.u, refs.dt))
            work.put_steps(row, work.steps(dt, time), u)
            lanes.store(refs.slope_rows, (row, work.group * (plan.vector + GAP)), work.slopes(time))
        work.put_tokens(start, START, "BC")
        lanes.barrier()

        def forward(s: Any, state: list[Any]) -> list[Any]:
            put_part(s, state)
            for q in range(PART):
                _, state, _ = token(s * PART + q, state)
            return state

        put_part(parts - 1, lanes.loop(parts - 1, forward, work.states(refs.starts, work.row, start // START)))
        carry = lanes.loop(parts, functools.partial(part, start), carry)
        lanes.barrier()
        t = lanes.thread // OWN
        total = [0.0] * plan.vector
        for w in range(WARPGROUP // WARP):
            place = w * (WARP * 2 * OWN) + t % PART * (2 * STATES) + lanes.thread % OWN * plan.vector
            total = [a + b for a, b in zip(lanes.load(refs.part_rows, (t // PART, place), plan.vector), total, strict=True)]
        lanes.store(refs.dBC, (work.row, work.strip, start + t, lanes.thread % OWN * plan.vector), total, start + t < work.end)
        return carry

    def part(start: Any, j: Any, carry: list[Any]) -> list[Any]:
        """The adjoint recurrence through PART tokens; each lane of four finishes one of them for its pair of channels."""
        g, dA, sums = carry[: 2 * OWN], carry[2 * OWN : 4 * OWN], carry[4 * OWN :]
        s = (parts - 1) - j
        mine = s * PART + work.quarter
        time = start + mine
        outer = (work.row, lanes.smaller(time, plan.length - 1), work.channel)
        dy = lanes.fetch(refs.dy, outer, 2)
        z = lanes.fetch(refs.z, outer, 2) if work.has("z") else None

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
            lanes.warp_barrier()
        by_channel: list[Any] = []
        by_state: list[Any] = []
        for low in reversed(range(0, PART, 2)):
            of_channel: list[Any] = [[], []]
            of_state: list[Any] = [[], []]
            for q in (low + 1, low):
                t = s * PART + q
                steps, x = work.step_at(t)
                slopes = slope_at(t)
                B, C = work.row_at(t)
                g = [lanes.fma(C[k % OWN], slopes[k // OWN], g[k]) for k in range(2 * OWN)]
                through = work.where_kept(kept[q], [g[k] * decays[q][k] for k in range(2 * OWN)])
                exponents = [through[k] * states[q][k] for k in range(2 * OWN)]
                dA = [lanes.fma(exponents[k], steps[k // OWN], dA[k]) for k in range(2 * OWN)]
                own = [slice(c * OWN, (c + 1) * OWN) for c in range(2)]
                of_channel[q - low] = [
                    *(_dot(lanes, states[q + 1][c], C) for c in own),
                    *(_dot(lanes, g[c], B) for c in own),
                    *(_dot(lanes, exponents[c], rates[c]) for c in own),
                ]
                inputs = [step * a for step, a in zip(steps, x, strict=True)]
                of_state[q - low] = [
                    *(_dot(lanes, inputs, [g[n], g[OWN + n]]) for n in range(OWN)),
                    *(_dot(lanes, slopes, [states[q + 1][n], states[q + 1][OWN + n]]) for n in range(OWN)),
                ]
                g = through
                lanes.warp_barrier()
            by_channel = scatter_sum(lanes, of_channel[0] + of_channel[1], (1,)) + by_channel
            by_state = scatter_sum(lanes, of_state[0] + of_state[1], (16,)) + by_state

        sums_by_state = scatter_sum(lanes, by_state, (8, 4))
        y, gB, d_exponent = _pairs(scatter_sum(lanes, by_channel, (2,)))
        lanes.warp_barrier()
        token_of_lane = lane // 8 % 2 * 2 + lane // 16
        place = token_of_lane * (2 * STATES) + lane // OWN % 2 * STATES + work.quarter * OWN
        lanes.store(refs.part_rows, (s, private + place), sums_by_state)

        steps, x = work.step_at(mine)
        slopes = slope_at(mine)
        written = work.inside & (time < work.end)
        skip = lanes.load(refs.D, (work.channel,), 2) if work.has("D") else [0.0, 0.0]
        if z is not None:
            d_gate = []
            for c, (d, gate) in enumerate(zip(lanes.unpack(dy), lanes.unpack(z), strict=True)):
                sigmoid = _sigmoid(lanes, gate)
                d_gate.append(d * (y[c] + skip[c] * x[c]) * sigmoid * (1 + gate * (1 - sigmoid)))
            lanes.store(refs.dz, (work.row, time, work.channel), d_gate, written)
        du = [lanes.fma(steps[c], gB[c], skip[c] * slopes[c]) for c in range(2)]
        d_step = [lanes.fma(x[c], gB[c], d_exponent[c] * (1 / LOG2E)) for c in range(2)]
        if plan.softplus:
            d_step = [d * _slope_of_softplus(lanes, step) for d, step in zip(d_step, steps, strict=True)]
        lanes.store(refs.du, (work.row, time, work.channel), du, written)
        lanes.store(refs.ddt, (work.row, time, work.channel), d_step, written)
        d_step = [lanes.select(time < work.end, d, 0.0) for d in d_step]
        sums = [a + b for a, b in zip(sums, [*(p * a for p, a in zip(slopes, x, strict=True)), *d_step], strict=True)]
        return [*g, *dA, *sums]

    g = work.entering("d_final", reverse=True)
    carry = lanes.loop(count, tile, [*g, *[0.0] * (2 * OWN + 4)])
    g, dA, sums = carry[: 2 * OWN], carry[2 * OWN : 4 * OWN], carry[4 * OWN :]
    work.keep_states(g, refs.d_state, work.row, where=work.chunk < 1)
    work.keep_states(dA, refs.dA, work.row, work.chunk)
    for stride in (1, 2):
        sums = [value + lanes.exchange(value, stride) for value in sums]
    lanes.store(refs.dD, (work.row, work.chunk, work.channel), sums[:2], work.inside & (work.quarter < 1))
    lanes.store(refs.d_bias, (work.row, work.chunk, work.channel), sums[2:], work.inside & (work.quarter < 1))


def _pairs(values: list[Any]) -> list[list[Any]]:
    return [values[k : k + 2] for k in range(0, len(values), 2)]


def shared_arrays(plan: Plan, tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shared arrays of the programs, of `tokens` tokens."""
    groups = plan.strip // plan.vector
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return {
        "step_rows": f32((tokens, groups * (2 * plan.vector + GAP))),
        "rows": f32((tokens, 2 * STATES)),
        "keep_rows": f32((tokens,)),
        "sum_rows": f32((tokens, groups * (OWN * plan.vector + GAP))),
        "slope_rows": f32((tokens, groups * (plan.vector + GAP))),
        "part_rows": f32((tokens // PART, WARPGROUP * 2 * OWN)),
    }
