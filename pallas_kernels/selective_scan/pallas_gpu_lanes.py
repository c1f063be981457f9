"""What the lanes of the GPU kernels do: see `pallas_gpu`, whose kernels these programs are.

A block of 128 lanes owns a strip of channels of one batch row through one chunk of its time. The programs read and write the
arrays that `pallas_gpu` names; each walks over tiles of time, and inside a tile over tokens.
"""

from __future__ import annotations

import functools
import math
import operator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lanes import WARP, WARPGROUP, Lanes, ceil_div, scatter_sum

LOG2E = math.log2(math.e)
STATES = 16
"""States of one scan."""
EACH = 2
"""Channels that a lane holds states of."""
OWN = 4
"""States of a channel that one lane of the backward kernel holds, and lanes that share a channel there."""
START = 32
"""Tokens between two states that are kept for the backward pass."""
PART = 4
"""Tokens whose states the backward kernel holds in registers."""
TILE = 16
"""Tokens that the lanes of a block bring to shared memory together."""
AHEAD = 2
"""Tokens that the forward recurrence reads before it stores what those before them give."""
UNDERFLOW = -150.0
"""2 to this power is 0 in float32."""
ALIGNED = 8
"""What channels are padded to a multiple of."""
PAIR = 2
"""States whose B lie together in a row, followed by their C."""
GAP = 4
"""Words left free in shared memory after each group of channels, so that lanes which meet there meet different banks."""

# Found by measuring, on a GPU with 132 processors.
UNROLL = {4: 4, 2: 16}
"""Tokens of the forward recurrence between two branches, by the states of a channel that a lane holds."""
WIDE, NARROW = 330, 231
"""Blocks from which time stays whole: of lanes with four states of two channels, which read least, or else with two."""
BLOCKS, LONG_BLOCKS = 3 * 132, 9 * 132
"""Time is split until there are so many blocks; the second from LONG tokens on."""
LONG = 4096
SPAN = 128
"""Fewest tokens of a chunk of time."""
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
    own: int
    """States of a channel that a lane holds."""

    @property
    def share(self) -> int:
        """Lanes that hold the states of one channel."""
        return STATES // self.own

    @property
    def vector(self) -> int:
        """Channels that a lane takes where states play no part: a strip's through TILE tokens make one share a lane."""
        return self.own * EACH

    @property
    def strip(self) -> int:
        """Channels of a block."""
        return WARPGROUP // self.share * EACH

    @property
    def chunks(self) -> int:
        return ceil_div(self.length, self.span)

    @property
    def strips(self) -> int:
        return ceil_div(self.channels, self.strip)

    @property
    def blocks(self) -> int:
        return self.batch * self.strips * self.chunks


def plan_split(batch: int, length: int, channels: int, softplus: bool) -> Plan:
    """The division by lanes with four states of two channels, with time in chunks where that gives too few blocks."""
    whole = Plan(batch, length, channels, length, softplus, own=4)
    chunks = max(1, min((LONG_BLOCKS if length >= LONG else BLOCKS) // whole.blocks, length // SPAN))
    return whole._replace(span=ceil_div(ceil_div(length, chunks), START) * START)


def plan_forward(batch: int, length: int, channels: int, softplus: bool) -> Plan:
    """Smaller strips of channels rather than chunks of time, which cost a pass more, where they give blocks enough."""
    wide, narrow = (Plan(batch, length, channels, length, softplus, own) for own in (4, 2))
    if wide.blocks >= WIDE:
        return wide
    return narrow if narrow.blocks >= NARROW else plan_split(batch, length, channels, softplus)


LOG1P = (
    0.99999994, -0.49999493, 0.33319098, -0.24842982, 0.19106008, -0.13663246, 0.07822595, -0.029505229, 0.0052326908
)  # fmt: skip
"""log(1 + e) / e for e from 0 to 1, by powers of e: within 3e-8, least squares weighted until the errors were even."""


def _softplus(lanes: Lanes, x: Any) -> Any:
    """log(1 + exp(x)), to float32's relative precision also where it is tiny."""
    e = lanes.exp2(lanes.magnitude(x) * -LOG2E)
    series = LOG1P[-1]
    for coefficient in LOG1P[-2::-1]:
        series = lanes.fma(e, series, coefficient)
    return lanes.fma(e, series, lanes.maximum(x, 0.0))


def _slope_of_softplus(lanes: Lanes, step: Any) -> Any:
    """The derivative of softplus where its value is `step`: 1 - exp(-step)."""
    series = step * (1 - step * (0.5 - step * (1 / 6 - step * (1 / 24))))
    return lanes.select(step < 0.05, series, 1 - lanes.exp2(step * -LOG2E))


def _sigmoids(lanes: Lanes, values: list[Any]) -> list[Any]:
    """1 / (1 + exp(-x)), at least 2**-63: two share a reciprocal, which is slow, and the product must not overflow."""
    below = [1 + lanes.exp2(lanes.minimum(x * -LOG2E, 63.0)) for x in values]
    results = []
    for pair in (below[k : k + 2] for k in range(0, len(below), 2)):
        inverse = lanes.reciprocal(functools.reduce(operator.mul, pair))
        results += [inverse * pair[1], inverse * pair[0]] if len(pair) == 2 else [inverse]
    return results


class Work:
    """What one lane works on, in the two divisions of a strip, and the steps that the programs have in common.

    For the recurrence it has EACH channels from `channel` on and the states of its `part`, `own` of them. Where states play no
    part it takes `vector` channels, from `column` on, of one token of a tile. A lane whose channels the strip leaves outside
    the array reads others in their place and writes nothing.
    """

    def __init__(self, plan: Plan, lanes: Lanes, refs: SimpleNamespace):
        self.plan, self.lanes, self.refs = plan, lanes, refs
        self.strip, rest = lanes.block % plan.strips, lanes.block // plan.strips
        self.chunk, self.row = rest % plan.chunks, rest // plan.chunks
        self.first = self.chunk * plan.span
        """First token of the chunk."""
        self.end = lanes.smaller(self.first + plan.span, plan.length)
        """One past the last token of the chunk."""

        self.part = lanes.thread % plan.share
        offset = lanes.thread // plan.share * EACH
        channel = self.strip * plan.strip + offset
        self.channel, self.inside = lanes.smaller(channel, plan.channels - EACH), channel < plan.channels
        group, place = offset // plan.vector, offset % plan.vector
        self.step_place = group * (2 * plan.vector + GAP) + place * 2
        self.sum_place = group * (plan.share * plan.vector + GAP) + place * plan.share + self.part * EACH
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
        own = self.plan.own
        places = [(*leading, self.channel + c, self.part * own) for c in range(EACH)]
        return [value for place in places for value in self.lanes.load(ref, place, own)]

    def rates(self) -> list[Any]:
        """A of the lane's states, for powers of two."""
        return [a * LOG2E for a in self.states(self.refs.A)]

    def keep_states(self, values: list[Any], ref: Any, *leading: Any, where: Any = None) -> None:
        where, own = self.inside if where is None else where & self.inside, self.plan.own
        for c in range(EACH):
            self.lanes.store(ref, (*leading, self.channel + c, self.part * own), values[c * own : (c + 1) * own], where)

    def entering(self, edge: str, rates: list[Any], reverse: bool) -> list[Any]:
        """The state (or its gradient, in reverse) that enters the chunk: that at the edge, through the chunks between."""
        lanes, refs, last = self.lanes, self.refs, self.plan.chunks - 1
        state = self.states(getattr(refs, edge), self.row) if self.has(edge) else [0.0] * (EACH * self.plan.own)
        if last == 0:
            return state

        def body(i: Any, state: list[Any]) -> list[Any]:
            k = (last - 1) - i if reverse else i
            passed = lanes.load(refs.passed, (self.row, k, self.channel), EACH)
            increments = self.states(refs.increments, self.row, k)
            return [lanes.fma(d, h, b) for d, h, b in zip(self.decays(rates, passed), state, increments, strict=True)]

        return lanes.loop(last - self.chunk if reverse else self.chunk, body, state)

    def decays(self, rates: list[Any], passed: list[Any]) -> list[Any]:
        """What is left of the lane's states after some time in each of its channels; nothing after infinitely much."""
        lanes, own = self.lanes, self.plan.own
        times = [passed[k // own] for k in range(len(rates))]
        return [lanes.select(t < math.inf, lanes.exp2(t * rate), 0.0) for t, rate in zip(times, rates, strict=True)]

    def fetch(self, ref: Any, time: Any) -> list[Any]:
        """The lane's `vector` channels of one token, or of the last one where `time` is beyond it."""
        return self.lanes.fetch(ref, (self.row, self.lanes.smaller(time, self.plan.length - 1), self.column), self.plan.vector)

    def read(self, ref: Any, time: Any) -> list[Any]:
        return self.lanes.unpack(self.fetch(ref, time))

    def of_channels(self, ref: Any) -> list[Any]:
        """The lane's `vector` channels of `ref[channels]`."""
        return self.lanes.load(ref, (self.column,), self.plan.vector)

    @functools.cached_property
    def bias(self) -> list[Any] | None:
        return self.of_channels(self.refs.dt_bias) if self.has("dt_bias") else None

    def step(self, dt: Any, c: int) -> Any:
        """The step size of the lane's channel c."""
        x = dt if self.bias is None else dt + self.bias[c]
        return _softplus(self.lanes, x) if self.plan.softplus else x

    def steps(self, dt: list[Any], time: Any) -> list[Any]:
        """Step sizes of one token, 0 outside the array: there the state stays as it is and takes nothing in."""
        steps = [self.step(x, c) for c, x in enumerate(dt)]
        return [self.lanes.select(self.column_inside & (time < self.plan.length), step, 0.0) for step in steps]

    def slopes(self, time: Any) -> list[Any]:
        """Gradients of the output before the gate, of one token, 0 outside the array."""
        dy = self.read(self.refs.dy, time)
        if self.has("z"):
            z = self.read(self.refs.z, time)
            dy = [d * x * s for d, x, s in zip(dy, z, _sigmoids(self.lanes, z), strict=True)]
        return [self.lanes.select(self.column_inside & (time < self.plan.length), d, 0.0) for d in dy]

    def put_steps(self, token: Any, steps: list[Any], values: list[Any]) -> None:
        both = [x for pair in zip(steps, values, strict=True) for x in pair]
        self.lanes.store(self.refs.step_rows, (token, self.group * (2 * self.plan.vector + GAP)), both)

    def fetch_tokens(self, first: Any, tokens: int) -> list[Any]:
        """The lane's part of the rows of B and C, and of the flags of `keep`, of `tokens` tokens from `first` on."""
        lanes, last = self.lanes, self.plan.length - 1
        fetched = []
        for place in self._places(tokens):
            time = lanes.smaller(first + place // (STATES // 2), last)
            fetched.append(lanes.fetch(self.refs.BC, (self.row, time, place % (STATES // 2) * 4), 4)[0])
        if self.has("keep"):
            lane = lanes.thread % tokens
            flag = lanes.load(self.refs.keep, (self.row, lanes.smaller(first + lane, last)), 1)[0]
            # The steps past the last token are 0 and must leave the state as it is.
            fetched.append(lanes.select(first + lane < last + 1, flag, 1.0))
        return fetched

    def put_tokens(self, fetched: list[Any], tokens: int) -> None:
        """Bring what `fetch_tokens` gave to shared memory."""
        lanes, places = self.lanes, self._places(tokens)
        for place, piece in zip(places, fetched, strict=False):
            lanes.store(self.refs.rows, (place // (STATES // 2), place % (STATES // 2) * 4), lanes.unpack([piece]))
        if self.has("keep"):
            lanes.store(self.refs.keep_rows, (lanes.thread % tokens,), [fetched[-1]], lanes.thread < tokens)

    def _places(self, tokens: int) -> list[Any]:
        """The lane's four neighbours, counted in fours, of each turn that the block needs for the rows of `tokens` tokens."""
        return [self.lanes.thread + k * WARPGROUP for k in range(tokens * 2 * STATES // (4 * WARPGROUP))]

    def step_at(self, token: Any) -> tuple[list[Any], list[Any]]:
        """(steps, values) of the lane's channels, as `put_steps` left them."""
        both = self.lanes.load(self.refs.step_rows, (token, self.step_place), 2 * EACH)
        return both[::2], both[1::2]

    def row_at(self, token: Any) -> tuple[list[Any], list[Any]]:
        """The token's B and C, of the lane's states."""
        own = self.plan.own
        both = self.lanes.load(self.refs.rows, (token, self.part * 2 * own), 2 * own)
        B, C = ([both[k] for k in range(2 * own) if k // PAIR % 2 == which] for which in (0, 1))
        return B, C

    def kept(self, token: Any) -> Any:
        """Whether the state survives into `token`, or None where all do."""
        return self.lanes.load(self.refs.keep_rows, (token,), 1)[0] > 0 if self.has("keep") else None

    def where_kept(self, kept: Any, values: list[Any]) -> list[Any]:
        return values if kept is None else [self.lanes.select(kept, value, 0.0) for value in values]

    def advance(
        self, rates: list[Any], steps: list[Any], inputs: list[Any], row: list[Any], kept: Any, state: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """The lane's decays and next state, from each channel's step and step * x, and the token's B."""
        own = self.plan.own
        decays = [self.lanes.exp2(steps[k // own] * rate) for k, rate in enumerate(rates)]
        state = self.where_kept(kept, state)
        return decays, [self.lanes.fma(decays[k], h, inputs[k // own] * row[k % own]) for k, h in enumerate(state)]


def summary_program(adjoint: bool, plan: Plan, lanes: Lanes, refs: SimpleNamespace) -> None:
    """What each chunk adds to the state that leaves it, and the time that passes in it, infinite where a segment begins.

    The state leaves at the last token and the walk is from there to the first; the adjoint state leaves at the first.
    """
    work = Work(plan, lanes, refs)
    rates = work.rates()
    own, all = plan.own, EACH * plan.own
    tiles = (work.end - work.first + (TILE - 1)) // TILE
    # The last chunk, in the order in which states go through them, hands nothing on.
    needed = (work.chunk if adjoint else (plan.chunks - 1) - work.chunk) * (plan.span // TILE)

    def weights_after(passed: list[Any], alive: list[Any]) -> list[Any]:
        values = [lanes.exp2(passed[k // own] * rates[k]) for k in range(all)]
        return [value * alive[0] for value in values] if alive else values

    def tile(i: Any, carry: list[Any]) -> tuple[Any, list[Any]]:
        start = work.first + (i if adjoint else tiles - 1 - i) * TILE
        time = start + work.token
        fetched = work.fetch_tokens(start, TILE)
        steps = work.steps(work.read(refs.dt, time), time)
        if adjoint:
            values = work.slopes(time)
        else:
            u = work.read(refs.u, time)
            values = [step * x for step, x in zip(steps, u, strict=True)]
        work.put_steps(work.token, steps, values)
        work.put_tokens(fetched, TILE)
        lanes.barrier()

        def token(j: Any, carry: list[Any]) -> list[Any]:
            total, passed, alive = carry[:all], carry[all : all + EACH], carry[all + EACH :]
            t = j if adjoint else (TILE - 1) - j
            steps, values = work.step_at(t)
            row = work.row_at(t)[adjoint]
            after = [a + b for a, b in zip(passed, steps, strict=True)]
            still = work.where_kept(work.kept(t), alive)
            weights = weights_after(after, still) if adjoint else weights_after(passed, alive)
            total = [lanes.fma(weights[k], values[k // own] * row[k % own], total[k]) for k in range(all)]
            return [*total, *after, *still]

        for j in range(TILE):
            carry = token(j, carry)
        passed, alive = carry[all : all + EACH], carry[all + EACH :]
        slowest = functools.reduce(lanes.maximum, [passed[k // own] * rates[k] for k in range(all)])
        more = slowest > UNDERFLOW
        return more & (alive[0] > 0) if alive else more, carry

    # Sums, the time that has passed in each channel, and 1 until a segment ends.
    start = [0.0] * (all + EACH) + ([1.0] if work.has("keep") else [])
    carry = lanes.loop_while_any(lanes.smaller(tiles, needed), tile, start)
    passed, alive = carry[all : all + EACH], carry[all + EACH :]
    if alive:
        passed = [lanes.select(alive[0] > 0, time, math.inf) for time in passed]
    # Of all chunks but the last one.
    place, handed_on = (work.chunk - 1, work.chunk > 0) if adjoint else (work.chunk, work.chunk < plan.chunks - 1)
    work.keep_states(carry[:all], refs.increments, work.row, place, where=handed_on)
    lanes.store(refs.passed, (work.row, place, work.channel), passed, work.inside & (work.part < 1) & handed_on)


def forward_program(plan: Plan, lanes: Lanes, refs: SimpleNamespace) -> None:
    """y, the final state and, where asked for, the state at every START-th token."""
    work = Work(plan, lanes, refs)
    own, all = plan.own, EACH * plan.own
    rates = work.rates()
    unroll = UNROLL[own]
    streams = [getattr(refs, name) for name in ("u", "dt", "z") if work.has(name)]
    skip = work.of_channels(refs.D) if work.has("D") else None

    def fetch(start: Any) -> list[Any]:
        pieces = [piece for ref in streams for piece in work.fetch(ref, start + work.token)]
        return pieces + work.fetch_tokens(start, TILE)

    size = len(work.fetch(streams[0], work.first))

    def tile(i: Any, carry: list[Any]) -> list[Any]:
        state, fetched, tokens = carry[:all], carry[all : all + size * len(streams)], carry[all + size * len(streams) :]
        start = work.first + i * TILE
        time = start + work.token
        u, dt, *z = (lanes.unpack(fetched[k : k + size]) for k in range(0, len(fetched), size))
        steps = work.steps(dt, time)
        work.put_steps(work.token, steps, [step * x for step, x in zip(steps, u, strict=True)])
        work.put_tokens(tokens, TILE)
        if work.has("starts"):
            work.keep_states(state, refs.starts, work.row, start // START, where=start % START < 1)
        ahead = fetch(start + TILE)
        lanes.barrier()

        def several(k: Any, state: list[Any]) -> list[Any]:
            def read(first: int) -> list[Any]:
                tokens = [k * unroll + (first + q) for q in range(AHEAD)]
                return [(t, *work.step_at(t), *work.row_at(t), work.kept(t)) for t in tokens]

            later = read(0)
            for first in range(0, unroll, AHEAD):
                now, later = later, read(first + AHEAD) if first + AHEAD < unroll else []
                sums = []
                for t, steps, inputs, B, C, kept in now:
                    _, state = work.advance(rates, steps, inputs, B, kept, state)
                    sums.append((t, [_dot(lanes, state[c * own : (c + 1) * own], C) for c in range(EACH)]))
                for t, of_channels in sums:
                    lanes.store(refs.sum_rows, (t, work.sum_place), of_channels)
            return state

        state = several(0, state) if unroll == TILE else lanes.loop(TILE // unroll, several, state)
        lanes.barrier()
        y = []
        for k in range(0, plan.vector, EACH):
            place = work.group * (plan.share * plan.vector + GAP) + k * plan.share
            shares = lanes.load(refs.sum_rows, (work.token, place), EACH * plan.share)
            y += [functools.reduce(operator.add, shares[c::EACH]) for c in range(EACH)]
        if skip is not None:
            y = [lanes.fma(d, x, a) for d, x, a in zip(skip, u, y, strict=True)]
        if z:
            y = [a * (gate * s) for a, gate, s in zip(y, z[0], _sigmoids(lanes, z[0]), strict=True)]
        lanes.store(refs.y, (work.row, time, work.column), y, work.column_inside & (time < work.end))
        return [*state, *ahead]

    state = work.entering("state", rates, reverse=False)
    tiles = (work.end - work.first + (TILE - 1)) // TILE
    state = lanes.loop(tiles, tile, [*state, *fetch(work.first)])[:all]
    work.keep_states(state, refs.final, work.row, where=work.chunk > plan.chunks - 2)


def _dot(lanes: Lanes, x: list[Any], y: list[Any]) -> Any:
    total = x[0] * y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        total = lanes.fma(a, b, total)
    return total


def backward_program(plan: Plan, lanes: Lanes, refs: SimpleNamespace) -> None:
    """Gradients of every input: of B and C a share for each strip, of what has no time a share for each chunk."""
    work = Work(plan, lanes, refs)
    rates = work.rates()
    lane, warp = lanes.thread % WARP, lanes.thread // WARP
    parts = START // PART
    private = warp * (WARP * 2 * OWN)
    """Where the warp's share of a row of `part_rows` begins."""
    count = (work.end - work.first + (START - 1)) // START

    def token(t: Any, state: list[Any]) -> tuple[list[Any], list[Any], Any]:
        steps, x = work.step_at(t)
        B, _ = work.row_at(t)
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
        for half in range(START // TILE):
            row = work.token + half * TILE
            time = start + row
            u, dt = (work.read(ref, time) for ref in (refs.u, refs.dt))
            work.put_steps(row, work.steps(dt, time), u)
            lanes.store(refs.slope_rows, (row, work.group * (plan.vector + GAP)), work.slopes(time))
        work.put_tokens(work.fetch_tokens(start, START), START)
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
        mine = s * PART + work.part
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
        place = token_of_lane * (2 * STATES) + lane // OWN % 2 * STATES + work.part * OWN
        lanes.store(refs.part_rows, (s, private + place), sums_by_state)

        steps, x = work.step_at(mine)
        slopes = slope_at(mine)
        written = work.inside & (time < work.end)
        skip = lanes.load(refs.D, (work.channel,), 2) if work.has("D") else [0.0, 0.0]
        if z is not None:
            d_gate = []
            gates = lanes.unpack(z)
            for c, (d, gate, sigmoid) in enumerate(zip(lanes.unpack(dy), gates, _sigmoids(lanes, gates), strict=True)):
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

    g = work.entering("d_final", rates, reverse=True)
    carry = lanes.loop(count, tile, [*g, *[0.0] * (2 * OWN + 4)])
    g, dA, sums = carry[: 2 * OWN], carry[2 * OWN : 4 * OWN], carry[4 * OWN :]
    work.keep_states(g, refs.d_state, work.row, where=work.chunk < 1)
    work.keep_states(dA, refs.dA, work.row, work.chunk)
    for stride in (1, 2):
        sums = [value + lanes.exchange(value, stride) for value in sums]
    lanes.store(refs.dD, (work.row, work.chunk, work.channel), sums[:2], work.inside & (work.part < 1))
    lanes.store(refs.d_bias, (work.row, work.chunk, work.channel), sums[2:], work.inside & (work.part < 1))


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
        "sum_rows": f32((tokens, groups * (plan.share * plan.vector + GAP))),
        "slope_rows": f32((tokens, groups * (plan.vector + GAP))),
        "part_rows": f32((tokens // PART, WARPGROUP * 2 * OWN)),
    }
