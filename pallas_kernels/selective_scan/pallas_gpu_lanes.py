"""What the lanes of the GPU kernels do: see `pallas_gpu`, whose kernels these programs are.

A block of 128 lanes owns a strip of channels of one batch row through one chunk of its time. The programs read and write the
arrays that `pallas_gpu` names; each walks over tiles of time, and inside a tile over tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from types import SimpleNamespace
from typing import Any

from pallas_kernels.lanes import WARP, WARPGROUP, Lanes, scatter_sum
from pallas_kernels.selective_scan.pallas_gpu_work import (
    AHEAD,
    EACH,
    GAP,
    LOG2E,
    OWN,
    PART,
    START,
    STATES,
    TILE,
    UNDERFLOW,
    UNROLL,
    Plan,
    Work,
    sigmoids,
)


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
            between, counts = (after, still) if adjoint else (passed, alive)
            weights = [lanes.exp2(between[k // own] * rate) for k, rate in enumerate(rates)]
            longer = [lanes.fma(weights[k], values[k // own] * row[k % own], total[k]) for k in range(all)]
            # Not a product with 0: what lies beyond a segment's border may be NaN.
            total = [lanes.select(counts[0] > 0, a, b) for a, b in zip(longer, total, strict=True)] if counts else longer
            return [*total, *after, *still]

        for j in range(TILE):
            carry = token(j, carry)
        if not plan.softplus:
            return work.inside, carry  # steps may be negative, and what has underflowed come back
        passed, alive = carry[all : all + EACH], carry[all + EACH :]
        slowest = functools.reduce(lanes.maximum, [passed[k // own] * rates[k] for k in range(all)])
        more = (slowest > UNDERFLOW) & work.inside
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

    def fetch(start: Any) -> list[list[Any]]:
        return [*(work.fetch(ref, start + work.token) for ref in streams), work.fetch_tokens(start, TILE)]

    sizes = [len(pieces) for pieces in fetch(work.first)]

    def split(flat: list[Any]) -> list[list[Any]]:
        ends = itertools.accumulate(sizes)
        return [flat[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def tile(i: Any, carry: list[Any]) -> list[Any]:
        state, (*fetched, tokens) = carry[:all], split(carry[all:])
        start = work.first + i * TILE
        time = start + work.token
        u, dt, *z = map(lanes.unpack, fetched)
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
            y = [a * (gate * s) for a, gate, s in zip(y, z[0], sigmoids(lanes, z[0]), strict=True)]
        lanes.store(refs.y, (work.row, time, work.column), y, work.column_inside & (time < work.end))
        return [*state, *itertools.chain(*ahead)]

    state = work.entering("state", rates, reverse=False)
    tiles = (work.end - work.first + (TILE - 1)) // TILE
    state = lanes.loop(tiles, tile, [*state, *itertools.chain(*fetch(work.first))])[:all]
    work.keep_states(state, refs.final, work.row, where=work.chunk > plan.chunks - 2)


def _dot(lanes: Lanes, x: list[Any], y: list[Any]) -> Any:
    total = x[0] * y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        total = lanes.fma(a, b, total)
    return total


def _slope_of_softplus(lanes: Lanes, step: Any) -> Any:
    """The derivative of softplus where its value is `step`: 1 - exp(-step)."""
    series = step * (1 - step * (0.5 - step * (1 / 6 - step * (1 / 24))))
    return lanes.select(step < 0.05, series, 1 - lanes.exp2(step * -LOG2E))


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
            for c, (d, gate, sigmoid) in enumerate(zip(lanes.unpack(dy), gates, sigmoids(lanes, gates), strict=True)):
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
