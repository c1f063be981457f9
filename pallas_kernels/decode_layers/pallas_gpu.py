"""One token through every layer of a model in one Mosaic GPU kernel, for Hopper.

A step of decoding reads each weight once: its floor is the memory's bandwidth. As many kernels as layers have products would
wait more for each other than for memory. Here one block of 512 lanes runs on each processor from the first layer to the
last; where a product needs all of the one before, blocks send each other what they made as letters, which a reader waits
for one by one, and what the next product reads, as far as it does not depend on values, is under way by then.

A block owns a share of the rows of every product, rows being outputs: weights lie `[out, in]`. A warp multiplies a row, or
a part of it, 16 bytes a lane at a time. A Mamba layer sends four times, an expert or MLP layer twice:

    in_proj rows of the block's channels, convolution, its share of x_proj's sums | one sum or none in each block |
        dt, scan step, gate | out_proj
    router in every block alike, w_in rows of the expert chosen, activation | w_out

Letters are used again in the next layer of their kind: by then every block has posted what it made of all of them.

It decodes small batches, see `bm_jax.decode_step`. What it takes on an H100 is in benchmarks/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.lanes import WARP, LanesTogether, ceil_div, launch_together

THREADS = 512
WARPS = THREADS // WARP
VECTOR = 8
"""Elements of a row that a lane takes at a time."""
LOG2E = math.log2(math.e)
X_BYTES = 210 * 1024
"""Of a block's shared memory of 227 KiB, what a product's factors may have."""
COPIED_BYTES = 160 * 1024
"""Of a block's shared memory of 227 KiB, what weights copied ahead may have."""
COLUMNS = 128
"""Most columns of x_proj."""


class Sizes(NamedTuple):
    """What the kernel is specialised for."""

    kinds: tuple[str, ...]
    """Layers of one period: mamba, moe or mlp."""
    repeats: int
    batch: int
    width: int
    inner: int
    states: int
    taps: int
    """Of the convolution."""
    rank: int
    """Of dt, padded to a multiple of VECTOR."""
    experts: int
    hidden: Mapping[str, int]
    """Width of moe and mlp layers."""
    activation: Mapping[str, str]
    softmax_gate: bool
    router_bias: bool
    eps: float
    blocks: int

    @property
    def columns(self) -> int:
        """Of x_proj."""
        return self.rank + 2 * self.states

    @property
    def copied(self) -> int:
        """Elements of in_proj that a block copies to shared memory a layer ahead: its share, if it fits and gains by it.

        It gains at one token: with more, whose experts differ, memory is busy, and the copy was measured to delay those.
        """
        share = 2 * ceil_div(self.inner, self.blocks) * self.width
        return share if "mamba" in self.kinds and self.batch == 1 and 2 * share <= COPIED_BYTES else 0


class Row(NamedTuple):
    """A row, or a part of one, that a warp multiplies."""

    number: Any
    """`row * parts + part`, beyond the last one for a warp that has none."""
    row: Any
    places: list[tuple[Any, Any]]
    """Of each piece: its first column for this lane, and whether it is inside (None: always)."""
    weights: Sequence[Callable[[], list[Any]]] = ()
    """Of each piece, once it is under way: its numbers, when they are there."""


def split(most: int, length: int) -> tuple[int, int]:
    """In how many parts warps take rows of this length, of which a block has so many, and how many pieces a part has."""
    pieces = ceil_div(length // VECTOR, WARP)
    # A part costs its pieces, and about two more for its sum.
    parts = min(range(1, pieces + 1), key=lambda p: ceil_div(most * p, WARPS) * (ceil_div(pieces, p) + 2))
    return parts, ceil_div(pieces, parts)


class _Step:
    """The program of one step; methods are its phases."""

    def __init__(self, sizes: Sizes, lanes: LanesTogether, refs: SimpleNamespace) -> None:
        self.sizes, self.lanes, self.refs = sizes, lanes, refs
        self.warp, self.lane = lanes.thread // WARP, lanes.thread % WARP

    def share(self, total: int) -> tuple[Any, Any, int]:
        """First and number of the items that this block owns of so many, and the most that any block has."""
        n = self.sizes.blocks
        first = self.lanes.block * total // n
        return first, (self.lanes.block + 1) * total // n - first, ceil_div(total, n)

    # --- products ----------------------------------------------------------------------------------------------------

    def fetch_rows(
        self, ref: Any, lead: tuple[Any, ...], first: Any, count: Any, most: int, length: int
    ) -> tuple[list[Row], int]:
        """Start reading rows `first` to `first + count` of `ref[lead]`; with the number of parts that a row has."""
        lanes, fetched = self.lanes, []
        rows, parts = self.rows(first, count, most, length)
        for row in rows:
            loads = [lanes.fetch(ref, (*lead, row.row, at), VECTOR) for at, _ in row.places]
            fetched.append(row._replace(weights=[partial(lanes.unpack, load) for load in loads]))
        return fetched, parts

    def copied_rows(self, first: Any, count: Any, most: int, length: int) -> tuple[list[Row], int]:
        """Rows whose weights lie in `copied`, the block's first one first."""
        lanes, found = self.lanes, []
        rows, parts = self.rows(first, count, most, length)
        for row in rows:
            places = [((row.row - first) * length + at,) for at, _ in row.places]
            found.append(row._replace(weights=[partial(lanes.load, self.refs.copied, place, VECTOR) for place in places]))
        return found, parts

    def rows(self, first: Any, count: Any, most: int, length: int) -> tuple[list[Row], int]:
        """Which rows and parts of them this lane's warp takes."""
        lanes, (parts, each), rows = self.lanes, split(most, length), []
        exact = parts * each * WARP * VECTOR == length

        def columns(part: Any) -> list[tuple[Any, Any]]:
            pieces = [(part * each + j) * WARP + self.lane for j in range(each)]
            if exact:
                return [(piece * VECTOR, None) for piece in pieces]
            return [(lanes.smaller(piece, length // VECTOR - 1) * VECTOR, piece < length // VECTOR) for piece in pieces]

        whole = columns(0)
        for turn in range(ceil_div(most * parts, WARPS)):
            number = self.warp + turn * WARPS
            row = first + lanes.smaller(number // parts, count - 1)
            rows.append(Row(number, row, whole if parts == 1 else columns(number % parts)))
        return rows, parts

    def multiply(self, rows: Sequence[Row], tokens: Sequence[int]) -> None:
        """The rows' products with `x`, of these tokens, to `parts`, each part by itself."""
        lanes = self.lanes
        weights = [[take() for take in row.weights] for row in rows]
        places, totals = [], []
        for b in tokens:
            seen: dict[int, list[Any]] = {}  # rows read whole have the same columns
            for r, row in enumerate(rows):
                total = 0.0
                for (column, inside), weight in zip(row.places, weights[r], strict=True):
                    if id(column) not in seen:
                        seen[id(column)] = lanes.load(self.refs.x, (b, column), VECTOR)
                    piece = 0.0
                    for w, value in zip(weight, seen[id(column)], strict=True):
                        piece = lanes.fma(w, value, piece)
                    total = total + (piece if inside is None else lanes.select(inside, piece, 0.0))
                places.append((b, row.number))
                totals.append(total)
        for (b, number), total in zip(places, self.warp_sums(totals), strict=True):
            lanes.store(self.refs.parts, (b, number), [total], where=self.lane < 1)

    def row(self, b: int, number: Any, parts: int) -> Any:
        """The product of the block's row `number`, from its parts."""
        return sum(self.lanes.load(self.refs.parts, (b, number * parts + p), 1)[0] for p in range(parts))

    def warp_sums(self, values: list[Any], span: int = WARP) -> list[Any]:
        """Each summed over `span` neighbouring lanes, side by side."""
        stride = span // 2
        while stride:
            values = [x + self.lanes.exchange(x, stride) for x in values]
            stride //= 2
        return values

    def warp_sum(self, x: Any, span: int = WARP) -> Any:
        return self.warp_sums([x], span)[0]

    # --- what layers have in common ------------------------------------------------------------------------------------

    def stamp(self, i: Any, j: int) -> Any:
        """Of the letters posted in layer `j` of period `i`, the residual's aside: that is stamped for the next layer."""
        return i * len(self.sizes.kinds) + (j + 1)

    def places(self) -> list[tuple[Any, Any]]:
        """Which pairs of a row of the residual this lane has, and whether they are inside (None: always)."""
        lanes, M, places = self.lanes, self.sizes.width, []
        for k in range(ceil_div(M, 2 * THREADS)):
            at = (lanes.thread + k * THREADS) * 2
            places.append((at, None) if (k + 1) * 2 * THREADS <= M else (lanes.smaller(at, M - 2), at < M))
        return places

    def norm_weights(self, i: Any, j: int) -> list[list[Any]]:
        return [self.lanes.load(getattr(self.refs, f"norm_{j}"), (i, at), 2) for at, _ in self.places()]

    def normed(self, i: Any, j: int, weights: list[list[Any]]) -> None:
        """`x` = RMSNorm of the residual, which other blocks made."""
        lanes, refs = self.lanes, self.refs
        residual = [
            [lanes.collect(refs.residual_sent, [(b, at)], 2, self.stamp(i, j), inside)[0] for at, inside in self.places()]
            for b in range(self.sizes.batch)
        ]
        for b, pairs in enumerate(residual):
            squares = sum(v * v for pair in pairs for v in pair)  # zeros where a lane has none
            lanes.store(refs.sums, (b, self.warp), [self.warp_sum(squares)], where=self.lane < 1)
        lanes.barrier()
        for b, pairs in enumerate(residual):
            mean = self.warp_sum(lanes.load(refs.sums, (b, self.lane % WARPS), 1)[0], WARPS) * (1 / self.sizes.width)
            factor = lanes.inverse_root(mean + self.sizes.eps)
            for pair, (at, inside), weight in zip(pairs, self.places(), weights, strict=True):
                values = [lanes.round_bfloat16(v * factor * w) for v, w in zip(pair, weight, strict=True)]
                lanes.store(refs.x, (b, at), values, where=inside)
        lanes.barrier()

    def gather(self, letters: Any, length: int, stamp: Any) -> None:
        """`x` = rows of `letters`, which other blocks posted."""
        lanes, width = self.lanes, 4
        for b in range(self.sizes.batch):
            pieces = [lanes.thread + k * THREADS for k in range(ceil_div(length, THREADS * width))]
            places = [(b, lanes.smaller(piece, length // width - 1) * width) for piece in pieces]
            for piece, place, values in zip(pieces, places, lanes.collect(letters, places, width, stamp), strict=True):
                lanes.store(self.refs.x, place, values, where=piece < length // width)
        lanes.barrier()

    def own_residual(self) -> list[Any]:
        """The block's part of the residual, which no other block writes: a lane has one number of each token."""
        lanes, (first, count, _) = self.lanes, self.share(self.sizes.width)
        at = first + lanes.smaller(lanes.thread, count - 1)
        return [lanes.load(self.refs.residual_out, (b, at), 1)[0] for b in range(self.sizes.batch)]

    def add(self, before: Sequence[Any], parts: int, stamp: Any, gates: Sequence[Any] | None = None) -> None:
        """The products just made, times the gates, to the block's part of the residual, as it was before."""
        own = self.lanes.smaller(self.lanes.thread, self.share(self.sizes.width)[1] - 1)
        for b, value in enumerate(before):
            product = self.row(b, own, parts)
            self.write_residual(b, own, value + (product * gates[b] if gates else product), stamp)

    def write_residual(self, b: int, own: Any, value: Any, stamp: Any) -> None:
        lanes, (first, count, _) = self.lanes, self.share(self.sizes.width)
        lanes.post(self.refs.residual_sent, (b, first + own), value, stamp, where=lanes.thread < count)
        lanes.store(self.refs.residual_out, (b, first + own), [value], where=lanes.thread < count)

    def sigmoid(self, x: Any) -> Any:
        return self.lanes.reciprocal(1.0 + self.lanes.exp2(x * -LOG2E))

    def softplus(self, x: Any) -> Any:
        """log(1 + e^x), to a few units of the last place relative to its value."""
        lanes = self.lanes
        power = lanes.exp2(lanes.magnitude(x) * -LOG2E)
        series = power * (1.0 - power * (0.5 - power * (1 / 3 - power * 0.25)))
        return lanes.maximum(x, 0.0) + lanes.select(power < 2.0**-6, series, lanes.log2(1.0 + power) * (1 / LOG2E))

    def activate(self, gate: Any, value: Any, activation: str) -> Any:
        lanes = self.lanes
        if activation == "swiglu":
            return gate * self.sigmoid(gate) * value
        if activation == "geglu_tanh":
            inner = gate * (1.0 + gate * gate * 0.044715) * (2 * math.sqrt(2 / math.pi))
            return gate * self.sigmoid(inner) * value
        # erf by Abramowitz and Stegun 7.1.26, to 1.5e-7.
        z = lanes.magnitude(gate) * math.sqrt(0.5)
        t = lanes.reciprocal(1.0 + z * 0.3275911)
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = series * lanes.exp2(z * z * -LOG2E) * 0.5  # of the normal distribution beyond |gate|
        return gate * lanes.select(gate > 0.0, 1.0 - tail, tail) * value

    # --- layers ------------------------------------------------------------------------------------------------------

    def copy_next(self, i: Any, j: int) -> None:
        """Start copying what the layer after layer `j` of period `i` reads first, if that is one of Mamba; -1: before all."""
        s, after = self.sizes, (j + 1) % len(self.sizes.kinds)
        if s.copied and s.kinds[after] == "mamba":
            first, count, _ = self.share(s.inner)
            turn, wanted = (i, True) if after > j else (i + 1, s.repeats > i + 1)
            index = (turn, first * 2, self.lanes.block * 0)
            self.lanes.copy(self.refs.copied, getattr(self.refs, f"in_proj_{after}"), index, count * (2 * s.width), wanted)

    def mamba(self, i: Any, j: int) -> Iterator[None]:
        s = self.sizes
        self.project_in(i, j)
        ahead = self.fetch_scan(i, j)
        rows, parts = self.fetch_rows(getattr(self.refs, f"out_proj_{j}"), (i,), *self.share(s.width), s.inner)
        self.copy_next(i, j)
        before = self.own_residual()
        yield
        self.sum_columns(self.stamp(i, j))
        yield
        self.scan(i, j, *ahead)
        yield
        self.gather(self.refs.y, s.inner, self.stamp(i, j))
        self.multiply(rows, range(s.batch))
        self.lanes.barrier()
        self.add(before, parts, self.stamp(i, j) + 1)
        yield

    def project_in(self, i: Any, j: int) -> None:
        """`u` and the gate `z` of the block's channels, and what these add to x_proj's sums, to `partial`."""
        s, lanes, refs, T = self.sizes, self.lanes, self.refs, self.lanes.thread
        own = lambda name: getattr(refs, f"{name}_{j}")  # noqa: E731
        first, count, most = self.share(s.inner)
        scale = self.norm_weights(i, j)
        share = (first * 2, count * 2, most * 2, s.width)
        rows, parts = self.copied_rows(*share) if s.copied else self.fetch_rows(own("in_proj"), (i,), *share)
        column = lanes.smaller(T, s.columns - 1)
        x_proj = [lanes.fetch(own("x_proj"), (i, first + lanes.smaller(T * 0 + c, count - 1), column), 1) for c in range(most)]
        mine = lanes.smaller(T, count - 1)
        weights = [lanes.load(own("conv_weight"), (i, k, first + mine), 1)[0] for k in range(s.taps)]
        bias = lanes.load(own("conv_bias"), (i, first + mine), 1)[0]
        earlier = [[lanes.load(own("conv"), (i, b, k, first + mine), 1)[0] for k in range(s.taps - 1)] for b in range(s.batch)]
        self.normed(i, j, scale)
        if s.copied:
            lanes.copied(i * s.kinds.count("mamba") + s.kinds[:j].count("mamba"))
        self.multiply(rows, range(s.batch))
        lanes.barrier()
        for b in range(s.batch):
            taps = [*earlier[b], self.row(b, mine * 2, parts)]
            z = self.row(b, mine * 2 + 1, parts)
            for k in range(s.taps - 1):
                lanes.store(own("conv_out"), (i, b, k, first + mine), [taps[k + 1]], where=count > T)
            u = bias
            for weight, tap in zip(weights, taps, strict=True):
                u = lanes.fma(weight, tap, u)
            lanes.store(refs.u, (b, T), [lanes.select(count > T, u * self.sigmoid(u), 0.0)], where=most > T)
            lanes.store(refs.z, (b, T), [z * self.sigmoid(z)], where=most > T)
        lanes.barrier()
        for b in range(s.batch):
            total = 0.0
            for c, weight in enumerate(x_proj):
                total = lanes.fma(lanes.unpack(weight)[0], lanes.load(refs.u, (b, c), 1)[0], total)
            lanes.post(refs.partial, (T + b * s.columns, lanes.block), total, self.stamp(i, j), where=s.columns > T)

    def sum_columns(self, stamp: Any) -> None:
        """dt's low rank, B and C of the tokens: each the sum of all blocks' `partial`, by a warp of some block."""
        s, lanes, refs = self.sizes, self.lanes, self.refs
        items = s.batch * s.columns
        item = lanes.block + self.warp * s.blocks
        column, has = lanes.smaller(item, items - 1), item < items
        total = 0.0
        blocks = [self.lane + k * WARP for k in range(ceil_div(s.blocks, WARP))]
        places = [(column, lanes.smaller(block, s.blocks - 1)) for block in blocks]
        for block, (value,) in zip(blocks, lanes.collect(refs.partial, places, 1, stamp, has), strict=True):
            total = total + lanes.select(block < s.blocks, value, 0.0)
        lanes.post(refs.low_sent, (column,), self.warp_sum(total), stamp, where=has & (self.lane < 1))

    def fetch_scan(self, i: Any, j: int) -> tuple[Any, ...]:
        """What `scan` reads and no other block writes: dt_proj, eight lanes a channel; the rest, a lane a state."""
        s, lanes, T = self.sizes, self.lanes, self.lanes.thread
        own = lambda name: getattr(self.refs, f"{name}_{j}")  # noqa: E731
        first, count, _ = self.share(s.inner)
        owner = first + lanes.smaller(T // 8, count - 1)
        dt_proj = []
        for k in range(ceil_div(s.rank, 8 * VECTOR)):
            piece = k * 8 + T % 8
            at = lanes.smaller(piece, s.rank // VECTOR - 1) * VECTOR
            dt_proj.append((at, piece < s.rank // VECTOR, lanes.fetch(own("dt_proj"), (i, owner, at), VECTOR)))
        dt_bias = lanes.load(own("dt_bias"), (i, owner), 1)[0]
        channel, n = first + lanes.smaller(T // s.states, count - 1), T % s.states
        rate = lanes.load(own("A"), (i, channel, n), 1)[0]
        skip = lanes.load(own("D"), (i, channel), 1)[0]
        states = [lanes.load(own("state"), (i, b, channel, n), 1)[0] for b in range(s.batch)]
        return dt_proj, dt_bias, rate, skip, states

    def scan(self, i: Any, j: int, dt_proj: list[Any], dt_bias: Any, rate: Any, skip: Any, states: list[Any]) -> None:
        """One step of the block's channels: the next state, and the gated output to `y`."""
        s, lanes, refs, T = self.sizes, self.lanes, self.refs, self.lanes.thread
        first, count, most = self.share(s.inner)
        inside, places = s.columns > T, [(lanes.smaller(T, s.columns - 1) + b * s.columns,) for b in range(s.batch)]
        for b, (value,) in enumerate(lanes.collect(refs.low_sent, places, 1, self.stamp(i, j), inside)):
            lanes.store(refs.low, (b, T), [value], where=inside)
        lanes.barrier()
        for b in range(s.batch):
            total = 0.0
            for at, inside, fetched in dt_proj:
                piece = 0.0
                for w, value in zip(lanes.unpack(fetched), lanes.load(refs.low, (b, at), VECTOR), strict=True):
                    piece = lanes.fma(w, value, piece)
                total = total + lanes.select(inside, piece, 0.0)
            step = self.softplus(self.warp_sum(total, 8) + dt_bias)
            lanes.store(refs.steps, (b, T // 8), [step], where=(T % 8 < 1) & (most > T // 8))
        lanes.barrier()
        own, n, inside = lanes.smaller(T // s.states, count - 1), T % s.states, count * s.states > T
        for b, state in enumerate(states):
            step, u = (lanes.load(ref, (b, own), 1)[0] for ref in (refs.steps, refs.u))
            B, C = (lanes.load(refs.low, (b, n + (s.rank + k * s.states)), 1)[0] for k in range(2))
            state = lanes.fma(lanes.exp2(step * rate), state, step * u * B)
            lanes.store(getattr(refs, f"state_out_{j}"), (i, b, first + own, n), [state], where=inside)
            y = self.warp_sum(state * C, s.states) + skip * u
            y = y * lanes.load(refs.z, (b, own), 1)[0]
            lanes.post(refs.y, (b, first + own), y, self.stamp(i, j), where=inside & (n < 1))

    def moe(self, i: Any, j: int) -> Iterator[None]:
        s, lanes, refs = self.sizes, self.lanes, self.refs
        own = lambda name: getattr(refs, f"{name}_{j}")  # noqa: E731
        X, M, T = s.experts, s.width, lanes.thread
        self.copy_next(i, j)  # while nothing else can be read, as the expert is not known
        scale = self.norm_weights(i, j)
        router = []
        for turn in range(ceil_div(X, WARPS)):
            x = self.warp + turn * WARPS
            pieces = []
            for k in range(ceil_div(M, WARP * 4)):
                piece = k * WARP + self.lane
                at = lanes.smaller(piece, M // 4 - 1) * 4
                pieces.append((at, piece < M // 4, lanes.fetch(own("router"), (i, lanes.smaller(x, X - 1), at), 4)))
            router.append((x, pieces))
        bias = [lanes.load(own("router_bias"), (i, T * 0 + x), 1)[0] if s.router_bias else 0.0 for x in range(X)]
        self.normed(i, j, scale)
        for x, pieces in router:
            for b in range(s.batch):
                total = 0.0
                for at, inside, fetched in pieces:
                    values = lanes.load(refs.x, (b, at), 4)
                    piece = sum(w * value for w, value in zip(lanes.unpack(fetched), values, strict=True))
                    total = total + lanes.select(inside, piece, 0.0)
                lanes.store(refs.scores, (b, x), [self.warp_sum(total)], where=(self.lane < 1) & (x < X))
        lanes.barrier()
        experts, gates = [], []
        for b in range(s.batch):
            scores = [lanes.load(refs.scores, (b, T * 0 + x), 1)[0] + bias[x] for x in range(X)]
            best, expert = scores[0], T * 0
            for x in range(1, X):
                better = scores[x] > best
                best, expert = lanes.select(better, scores[x], best), lanes.choose(better, x, expert)
            if s.softmax_gate:
                gates.append(lanes.reciprocal(sum(lanes.exp2((score - best) * LOG2E) for score in scores)))
            else:
                gates.append(self.sigmoid(best))
            experts.append(expert)
        lanes.barrier()  # `scores` is free again
        yield from self.feed_forward(i, j, "moe", [(expert,) for expert in experts], gates)

    def mlp(self, i: Any, j: int) -> Iterator[None]:
        self.copy_next(i, j)
        self.normed(i, j, self.norm_weights(i, j))
        yield from self.feed_forward(i, j, "mlp", None, None)

    def feed_forward(
        self, i: Any, j: int, kind: str, experts: list[tuple[Any]] | None, gates: list[Any] | None
    ) -> Iterator[None]:
        """`w_out(activation(w_in(x)))`, with each token's expert's weights."""
        s, lanes, refs, T = self.sizes, self.lanes, self.refs, self.lanes.thread
        w_in, w_out, F = getattr(refs, f"w_in_{j}"), getattr(refs, f"w_out_{j}"), s.hidden[kind]
        first, count, most = self.share(F)
        row0, rows_own, rows_most = self.share(s.width)
        # Tokens that read the same weights.
        together = [((i,), range(s.batch))] if experts is None else [((i, *e), [b]) for b, e in enumerate(experts)]
        parts = 1
        for lead, tokens in together:
            rows, parts = self.fetch_rows(w_in, lead, first * 2, count * 2, most * 2, s.width)
            self.multiply(rows, tokens)
        lanes.barrier()
        mine = lanes.smaller(T, count - 1)
        for b in range(s.batch):
            value = self.activate(self.row(b, mine * 2, parts), self.row(b, mine * 2 + 1, parts), s.activation[kind])
            lanes.post(refs.hidden, (b, first + mine), value, self.stamp(i, j), where=count > T)
        ahead = len(together) == 1
        fetched = [self.fetch_rows(w_out, together[0][0], row0, rows_own, rows_most, F)] if ahead else []
        before = self.own_residual()
        yield
        self.gather(refs.hidden, F, self.stamp(i, j))
        for k, (lead, tokens) in enumerate(together):
            rows, parts = fetched[k] if ahead else self.fetch_rows(w_out, lead, row0, rows_own, rows_most, F)
            self.multiply(rows, tokens)
        lanes.barrier()
        self.add(before, parts, self.stamp(i, j) + 1, gates)
        yield

    def all(self) -> Iterator[None]:
        lanes, refs, (first, count, _) = self.lanes, self.refs, self.share(self.sizes.width)
        own = lanes.smaller(lanes.thread, count - 1)
        self.copy_next(lanes.block * 0, -1)
        for b in range(self.sizes.batch):
            self.write_residual(b, own, lanes.load(refs.residual, (b, first + own), 1)[0], self.stamp(0, 0))
        yield

        def period(i: Any) -> Iterator[None]:
            for j, kind in enumerate(self.sizes.kinds):
                lanes.anew()  # or addresses of all layers would be made before the loop, and fill the registers
                yield from getattr(_Step(self.sizes, lanes, refs), kind)(i, j)

        yield from lanes.repeat(self.sizes.repeats, period)


def refusal(sizes: Sizes) -> str | None:
    """Why the kernel cannot run a model of these sizes, or None."""
    s, share = sizes, lambda total: ceil_div(total, sizes.blocks)
    if unknown := set(s.kinds) - {"mamba", "moe", "mlp"}:
        return f"it has no layers of kind {', '.join(sorted(unknown))}"
    if plain := {s.activation[kind] for kind in s.hidden} - {"swiglu", "geglu", "geglu_tanh"}:
        return f"it has gated activations alone, not {', '.join(sorted(plain))}"
    if "mamba" in s.kinds and (s.states not in (4, 8, 16, 32) or s.columns > COLUMNS):
        return f"it takes 4, 8, 16 or 32 states, and dt_rank + 2 * states up to {COLUMNS}; got {s.states} and {s.rank}"
    if any(size % VECTOR for size in (s.width, s.inner, s.rank, *s.hidden.values())):
        return f"every width must be a multiple of {VECTOR}"
    if any(total < s.blocks for total in (s.width, s.inner, *s.hidden.values())):
        return f"each of {s.blocks} blocks needs a part of every width"
    widest = max((s.width, s.inner, *s.hidden.values()))
    if 4 * s.batch * widest + 2 * s.copied > X_BYTES:
        return f"{s.batch} tokens of {widest} numbers do not fit a block's shared memory"
    if "mamba" in s.kinds and s.batch * s.columns > WARPS * s.blocks:
        return f"{s.batch * s.columns} columns of x_proj are more than the {WARPS} warps of {s.blocks} blocks"
    if max(share(s.inner) * max(s.states, 8), share(s.width), *(share(width) for width in s.hidden.values())) > THREADS:
        return f"a block has {THREADS} lanes for its share of the channels"
    return None


def decode_layers_gpu(residual: Array, arrays: Mapping[str, Array], sizes: Sizes, interpret: bool = False) -> dict[str, Array]:
    """The kernel: `residual` `[B, M]` float32 through all layers.

    Args:
        residual: before the first layer.
        arrays: for layer j of the period, over its repeats L, with X experts, F hidden and r `sizes.rank`: `norm_j`
            `[L, M]`. Of mamba: `in_proj_j` `[L, 2 E, M]`, the rows of a channel (input, gate) side by side; `conv_weight_j`
            `[L, K, E]`, `conv_bias_j` `[L, E]`; `x_proj_j` `[L, E, r + 2 N]` and `dt_proj_j` `[L, E, r]`, zero where r is
            padded; `dt_bias_j`, `D_j` `[L, E]`; `A_j` `[L, E, N]`, times log2(e); `out_proj_j` `[L, M, E]`; and the cache,
            `conv_j` `[L, B, K - 1, E]` and `state_j` `[L, B, E, N]`. Of moe: `router_j` `[L, X, M]`, `router_bias_j`
            `[L, X]`, `w_in_j` `[L, X, 2 F, M]`, gate and value of a unit side by side, `w_out_j` `[L, X, M, F]`; of mlp the
            same two without X. Products' weights and the convolution's are bfloat16, the rest float32.
        sizes: of everything.
        interpret: run on numpy.

    Returns:
        `residual_out`, and `conv_out_j` and `state_out_j` of every Mamba layer.

    Raises:
        NotImplementedError: a model that the kernel cannot run; the message says why.
    """
    if (reason := refusal(sizes)) is not None:
        raise NotImplementedError(f"decode_layers: {reason}")
    s, B = sizes, sizes.batch
    widest = max(s.width, s.inner, *s.hidden.values())
    outputs = {
        "residual_out": jax.ShapeDtypeStruct((B, s.width), jnp.float32),
    }
    for j, kind in enumerate(s.kinds):
        if kind == "mamba":
            for name in ("conv", "state"):
                before = arrays[f"{name}_{j}"]
                outputs[f"{name}_out_{j}"] = jax.ShapeDtypeStruct(before.shape, before.dtype)
    channels = ceil_div(s.inner, s.blocks)
    rows = ceil_div(s.width, s.blocks)
    products = [(rows, size) for size in (s.inner, *s.hidden.values())]
    products += [(2 * ceil_div(size, s.blocks), s.width) for size in (s.inner, *s.hidden.values())]
    parts = max(ceil_div(most * split(most, length)[0], WARPS) * WARPS for most, length in products)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    letters = {"residual_sent": f32(B, s.width)}
    if "mamba" in s.kinds:
        letters |= {"y": bf16(B, s.inner), "partial": f32(B * s.columns, s.blocks), "low_sent": f32(B * s.columns)}
    if s.hidden:
        letters |= {"hidden": bf16(B, max(s.hidden.values()))}
    shared = {
        "x": f32(B, widest),
        "parts": f32(B, parts),
        "sums": f32(B, WARPS), "scores": f32(B, max(s.experts, 1)), "u": f32(B, channels), "z": f32(B, channels),
        "steps": f32(B, channels), "low": f32(B, COLUMNS),
    }  # fmt: skip
    if s.copied:
        shared = {"copied": bf16(s.copied)} | shared
    inputs = {"residual": residual} | dict(arrays)

    def program(lanes: LanesTogether, refs: SimpleNamespace) -> Iterator[None]:
        return _Step(sizes, lanes, refs).all()

    return launch_together(program, s.blocks, THREADS, inputs, outputs, letters, shared, interpret)
