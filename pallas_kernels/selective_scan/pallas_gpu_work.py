"""How the GPU scan's work is divided, and what its programs have in common: see `pallas_gpu`."""

from __future__ import annotations

import functools
import math
import operator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lanes import WARPGROUP, Lanes, ceil_div

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


def sigmoids(lanes: Lanes, values: list[Any]) -> list[Any]:
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
            dy = [d * x * s for d, x, s in zip(dy, z, sigmoids(self.lanes, z), strict=True)]
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
