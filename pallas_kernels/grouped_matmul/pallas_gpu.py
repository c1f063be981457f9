"""The grouped product in Pallas Mosaic GPU, for Hopper: forward, and the gradients of both arguments.

A block is one producer warpgroup, which copies tiles of both arguments into a ring in shared memory, and two consumers,
which multiply 64 rows each. Blocks stay on their processor and take one output tile after the other, so that the
producer fetches the next tile's first parts while the consumers write the last one. The tiles of a group start at its
first row, rounded down to what copies allow; of the first and the last one, only the group's own rows are stored. A
consumer without rows in a tile lets the other have the tensor cores.

The gradient of the matrices sums over a group's rows, a part of them at a time; rows of other groups are set to zero in
shared memory. Every output element is one block's sum in a fixed order: two runs agree bit for bit. Products of bfloat16
or float16 are summed in float32.
Run on an H100; times, and what else was tried, in benchmarks/README.md.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import Call
from pallas_kernels.grouped_matmul.shapes import refuse
from pallas_kernels.versions import mosaic_accumulator, mosaic_kernel, mosaic_load, mosaic_transpose

ROWS = 128
"""Rows of an output tile; each consumer takes half of them."""
HALF = ROWS // 2
DEPTH = 64
"""Length of the sums between two copies into the ring: 128 bytes, the width of shared memory's swizzle."""
WIDTHS = (256, 192, 128)
"""Columns of an output tile, most preferred first."""
ALIGNED = 8
"""Copies start at multiples of so many rows."""
SHARED_BYTES = 224 * 1024
"""Shared memory of a block: of its ring, and of one tile on its way out."""
PRODUCER = 2
"""The warpgroup that copies; the ones before it multiply."""
SWIZZLED = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
MINIMUM = 128
"""Rows from which these kernels are preferred to plain XLA."""


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if call.target.platform != "gpu" or call.target.capability != 9:
        return f"it needs a GPU of compute capability 9.0 (Hopper), this is {call.target.kind}"
    return refuse(call, (jnp.bfloat16, jnp.float16), ALIGNED, DEPTH)


class Tiles(NamedTuple):
    """Output tiles in rows: which group's, and where. `[tiles]` each, int32."""

    group: Array
    """One past the last group for rows of no group."""
    row: Array
    """First row."""
    low: Array
    """First row of the group."""
    high: Array
    """One past the group's last row."""


def row_tiles(group_sizes: Array, rows: int) -> tuple[Tiles, Array]:
    """The tiles of ROWS rows that hold rows of each group, and of no group; and how many are before each, `[X + 2]`."""
    sizes = group_sizes.astype(jnp.int32)
    low = jnp.minimum(_sums_before(sizes), rows)  # sizes past the last row must not reach past the arrays
    high = jnp.concatenate([low[1:], jnp.full(1, rows, jnp.int32)])
    first = low // ALIGNED * ALIGNED
    count = jnp.where(high > low, -((first - high) // ROWS), 0)
    start = _sums_before(count)
    tile = jnp.arange((rows + len(low) * (ROWS + ALIGNED)) // ROWS, dtype=jnp.int32)
    group = jnp.sum(tile[:, None] >= start[1:-1], axis=1)
    return Tiles(group, first[group] + (tile - start[group]) * ROWS, low[group], high[group]), start


def _sums_before(x: Array) -> Array:
    """Sums of the elements before each position, `[X]` -> `[X + 1]`, in one small kernel as `jnp.cumsum` is not."""
    return jnp.sum(jnp.where(jnp.arange(len(x) + 1)[:, None] > jnp.arange(len(x)), x, 0), axis=1)


def width(columns: int) -> int:
    """Columns of a tile: few past the last column of the output, then as many as possible."""
    return min(WIDTHS, key=lambda width: (-(-columns // width) * width, -width))


def processors() -> int:
    """Streaming multiprocessors of the device that code is traced for, each of which gets one block."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    count = getattr(described, "num_cores", None) or getattr(jax.devices()[0], "core_count", None)
    return count or 132  # the H100's, where code is compiled without a GPU


class Ring(NamedTuple):
    """Shared memory that tiles of both arguments pass through, and the barriers of its slots."""

    left: Any
    right: Any
    out: Any
    """`[consumer, part, HALF, DEPTH]`: a tile on its way out."""
    full: Any
    empty: Any


def _stages(width: int) -> int:
    return (SHARED_BYTES - ROWS * width * 2) // ((ROWS + width) * DEPTH * 2)


def _ring(left: tuple[int, int], right: tuple[int, int], width: int, dtype: Any) -> Ring:
    stages = _stages(width)

    def shared(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=SWIZZLED)

    return Ring(
        left=shared(stages, *left),
        right=shared(stages, *right),
        out=shared(PRODUCER, width // DEPTH, HALF, DEPTH),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=PRODUCER, num_barriers=stages),
    )


def _each(tiles: Any, locate: Any, count: Any, tile: Any) -> Any:
    """`done = tile(where, parts, done)` for every tile; where the next one is, past the last too, is read before it begins."""

    def step(k: Any, carry: Any) -> Any:
        where, done = carry
        after = locate(k + 1)
        return after, tile(where, count(where), done)

    return lax.fori_loop(0, tiles, step, (locate(jnp.int32(0)), jnp.int32(0)))[1]


def _produce(ring: Ring, stages: int, tiles: Any, locate: Any, count: Any, copy: Any) -> None:
    """Copy the parts of every tile into the ring, as slots become free."""

    def tile(where: Any, parts: Any, done: Any) -> Any:
        def part(index: Any, step: Any) -> Any:
            slot = lax.rem(step, stages)

            @pl.when(step >= stages)
            def _() -> None:
                plgpu.barrier_wait(ring.empty.at[slot])

            copy(where, index, slot)
            return step + 1

        return lax.fori_loop(0, parts, part, done)

    done = _each(tiles, locate, count, tile)

    @pl.loop(jnp.maximum(done - stages, 0), done)
    def _(step: Any) -> None:
        plgpu.barrier_wait(ring.empty.at[lax.rem(step, stages)])


def _consume(
    ring: Ring, stages: int, tiles: Any, locate: Any, count: Any, active: Any, multiply: Any, store: Any, width: int
) -> None:
    """Multiply the parts of every tile, and store it."""

    def tile(where: Any, parts: Any, done: Any) -> Any:
        def release(step: Any) -> None:
            plgpu.barrier_arrive(ring.empty.at[lax.rem(step, stages)])

        def sums(accumulator: Any) -> Any:
            def part(index: Any, step: Any) -> Any:
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(ring.full.at[slot])
                multiply(where, index, slot, accumulator)
                plgpu.wgmma_wait(1)

                @pl.when(index > 0)
                def _() -> None:
                    release(step - 1)

                return step + 1

            lax.fori_loop(0, parts, part, done)
            plgpu.wgmma_wait(0)

            @pl.when(parts > 0)
            def _() -> None:
                release(done + parts - 1)

            return accumulator[...]

        @pl.when(active(where))
        def _() -> None:
            store(where, pl.run_scoped(sums, mosaic_accumulator((HALF, width))))

        @pl.when(jnp.logical_not(active(where)))
        def _() -> None:
            def part(_: Any, step: Any) -> Any:
                plgpu.barrier_wait(ring.full.at[lax.rem(step, stages)])
                release(step)
                return step + 1

            lax.fori_loop(0, parts, part, done)

        return done + parts

    _each(tiles, locate, count, tile)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(out: Any, staging: Any, row: Any, column: Any, columns: int, tile: Any) -> None:
    """Write the tile `[HALF, width]` through shared memory, leaving out the columns past the output's last."""
    parts = range(tile.shape[1] // DEPTH)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
    for k in parts:
        staging[k] = tile[:, k * DEPTH : (k + 1) * DEPTH]
    plgpu.commit_smem()
    for k in parts:

        @pl.when(column + k * DEPTH < columns)
        def _(k: int = k) -> None:
            plgpu.copy_smem_to_gmem(staging.at[k], out.at[pl.ds(row, HALF), pl.ds(column + k * DEPTH, DEPTH)])


def _store_some(out: Any, row: Any, column: Any, columns: int, low: Any, high: Any, tile: Any) -> None:
    """Write rows `low` to `high` of the tile `[HALF, width]` from the lanes that hold them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, *[plgpu.Layout.WG_SPLAT(())] * 4))
    def write(_: Any, out: Any, tile: Any, *numbers: Any) -> None:
        # Imported here, so that machines without a GPU need not have what only compiles for one.
        from pallas_kernels.grouped_matmul.store_mosaic import store_rows

        store_rows(out, tile, *(number.registers.item() for number in numbers), columns=columns)

    write(out, tile, row, column, low, high)


def _store_rows(out: Any, staging: Any, row: Any, column: Any, columns: int, low: Any, high: Any, tile: Any) -> None:
    """`_store_some` where there are no lanes: row by row through shared memory."""
    for k in range(tile.shape[1] // DEPTH):
        plgpu.wait_smem_to_gmem(0)
        staging[0] = tile[:, k * DEPTH : (k + 1) * DEPTH]
        plgpu.commit_smem()
        for i in range(HALF):

            @pl.when((column + k * DEPTH < columns) & (row + i >= low) & (row + i < high))
            def _(i: int = i, k: int = k) -> None:
                plgpu.copy_smem_to_gmem(staging.at[0, pl.ds(i, 1)], out.at[pl.ds(row + i, 1), pl.ds(column + k * DEPTH, DEPTH)])


def _launch(body: Any, ring: Ring, output: jax.ShapeDtypeStruct, arguments: tuple[Array, ...], interpret: Any) -> Array:
    kernel = mosaic_kernel(
        lambda *refs: body(*refs[:-5], Ring(*refs[-5:])),
        outputs=output,
        scratch=tuple(ring),
        grid=(processors(),),
        grid_names=("processor",),
        num_threads=PRODUCER + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"interpret": interpret} if interpret else {}),
    )
    return kernel(*arguments)


def _own(tiles: Any) -> tuple[Any, Any]:
    """This block's number, and how many of the tiles it takes, as many apart as there are blocks."""
    block, blocks = lax.axis_index("processor"), processors()
    return block, lax.div(tiles - block + blocks - 1, jnp.int32(blocks))


def _specialize(produce: Any, consume: Any) -> None:
    """Give each warpgroup its part, and the consumers the producer's registers."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        produce()

    @pl.when(warpgroup < PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        consume(warpgroup)


BAND = 16
"""Tiles in rows that share the columns of the matrices while these are in the cache."""


def product(lhs: Array, rhs: Array, group_sizes: Array, *, transposed: bool = False, interpret: Any = None) -> Array:
    """`[T, K]` times each group's `[K, N]`, or its `[N, K]` `transposed`: `[T, N]`."""
    rows, depth = lhs.shape
    columns = rhs.shape[1 if transposed else 2]
    wide = width(columns)
    stages, across, parts = _stages(wide), -(-columns // wide), depth // DEPTH
    groups = len(group_sizes)
    tiles, before = row_tiles(group_sizes, rows)

    def body(group: Any, row: Any, low: Any, high: Any, before: Any, lhs: Any, rhs: Any, out: Any, ring: Ring) -> None:
        down = before[groups + 1]
        block, mine = _own(down * across)

        def locate(k: Any) -> Any:
            # Down a band of rows first, then to the next columns.
            tile = jnp.minimum(block + k * processors(), down * across - 1)
            band = lax.div(tile, jnp.int32(BAND * across))
            within = tile - band * (BAND * across)
            tall = jnp.minimum(BAND, down - band * BAND)
            column = lax.div(within, tall)
            index = band * BAND + within - column * tall
            return group[index], row[index], low[index], high[index], column * wide

        def count_parts(where: Any) -> Any:
            return jnp.where(where[0] < groups, parts, 0)

        def copy(where: Any, part: Any, slot: Any) -> None:
            own, row, _, _, column = where
            deep = pl.ds(part * DEPTH, DEPTH)
            here = (pl.ds(column, wide), deep) if transposed else (deep, pl.ds(column, wide))
            plgpu.copy_gmem_to_smem(lhs.at[pl.ds(row, ROWS), deep], ring.left.at[slot], ring.full.at[slot])
            plgpu.copy_gmem_to_smem(rhs.at[own, *here], ring.right.at[slot], ring.full.at[slot])

        def consume(warpgroup: Any) -> None:
            def multiply(where: Any, index: Any, slot: Any, accumulator: Any) -> None:
                left, right = ring.left.at[slot, pl.ds(warpgroup * HALF, HALF)], ring.right.at[slot]
                plgpu.wgmma(accumulator, left, mosaic_transpose(right) if transposed else right)

            def active(where: Any) -> Any:
                row = where[1] + warpgroup * HALF
                return (row < where[3]) & (row + HALF > where[2])

            def store(where: Any, tile: Any) -> None:
                _, row, low, high, column = where
                row = row + warpgroup * HALF
                whole = (row >= low) & (row + HALF <= high)
                tile = tile.astype(out.dtype)

                @pl.when(whole)
                def _() -> None:
                    _store(out, ring.out.at[warpgroup], row, column, columns, tile)

                @pl.when(jnp.logical_not(whole))
                def _() -> None:
                    if interpret:
                        _store_rows(out, ring.out.at[warpgroup], row, column, columns, low, high, tile)
                    else:
                        _store_some(out, row, column, columns, low, high, tile)

            _consume(ring, stages, mine, locate, count_parts, active, multiply, store, wide)

        _specialize(lambda: _produce(ring, stages, mine, locate, count_parts, copy), consume)

    ring = _ring((ROWS, DEPTH), (wide, DEPTH) if transposed else (DEPTH, wide), wide, lhs.dtype)
    output = jax.ShapeDtypeStruct((rows, columns), lhs.dtype)
    return _launch(body, ring, output, (*tiles, before, lhs, rhs), interpret)


def matrix_gradient(lhs: Array, d_out: Array, group_sizes: Array, *, interpret: Any = None) -> Array:
    """Each group's rows of `lhs` `[T, K]` transposed, times its rows of `d_out` `[T, N]`: `[X, K, N]`."""
    depth, columns = lhs.shape[1], d_out.shape[1]
    wide = width(columns)
    stages, across, down = _stages(wide), -(-columns // wide), -(-depth // ROWS)
    groups = len(group_sizes)
    sizes = group_sizes.astype(jnp.int32)
    index = jnp.arange(groups)
    low = jnp.minimum(_sums_before(sizes), len(lhs))
    # Large groups first, so that blocks which take one tile more than others take a small one.
    before = (sizes[:, None] < sizes) | ((sizes[:, None] == sizes) & (index[:, None] > index))
    order = jnp.argmax(jnp.sum(before, axis=1)[:, None] == index, axis=0).astype(jnp.int32)

    def body(order: Any, low: Any, lhs: Any, d_out: Any, out: Any, ring: Ring) -> None:
        block, mine = _own(jnp.int32(groups * down * across))

        def locate(k: Any) -> Any:
            tile = jnp.minimum(block + k * processors(), groups * down * across - 1)
            rank = lax.div(tile, jnp.int32(down * across))
            within = tile - rank * (down * across)
            column = lax.div(within, jnp.int32(down))
            group = order[rank]
            start, end = low[group], low[group + 1]
            return group, start, end, (within - column * down) * ROWS, column * wide

        def begin(where: Any) -> Any:
            return lax.div(where[1], jnp.int32(ALIGNED)) * ALIGNED

        def count_parts(where: Any) -> Any:
            _, start, end, _, _ = where
            return jnp.where(end > start, lax.div(end - begin(where) + DEPTH - 1, jnp.int32(DEPTH)), 0)

        def copy(where: Any, part: Any, slot: Any) -> None:
            _, _, _, row, column = where
            deep = pl.ds(begin(where) + part * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(lhs.at[deep, pl.ds(row, ROWS)], ring.left.at[slot], ring.full.at[slot])
            plgpu.copy_gmem_to_smem(d_out.at[deep, pl.ds(column, wide)], ring.right.at[slot], ring.full.at[slot])

        def consume(warpgroup: Any) -> None:
            def multiply(where: Any, index: Any, slot: Any, accumulator: Any) -> None:
                _, start, end, _, _ = where
                left, right = ring.left.at[slot, :, pl.ds(warpgroup * HALF, HALF)], ring.right.at[slot]
                row = begin(where) + index * DEPTH

                @pl.when((row < start) | (row + DEPTH > end))
                def _() -> None:
                    # Both consumers set the same rows of `right` to zero. One may read them while the other writes, but
                    # it has written the same zeros itself.
                    rows = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (DEPTH, DEPTH), 0), plgpu.Layout.WGMMA) + row
                    inside = (rows >= start) & (rows < end)
                    for part in [left, *(right.at[:, pl.ds(k, DEPTH)] for k in range(0, wide, DEPTH))]:
                        values = mosaic_load(part, plgpu.Layout.WGMMA)
                        part[...] = jnp.where(inside, values, jnp.zeros_like(values))
                    plgpu.commit_smem()

                plgpu.wgmma(accumulator, mosaic_transpose(left), right)

            def store(where: Any, tile: Any) -> None:
                group, _, _, row, column = where
                row = row + warpgroup * HALF
                _store(out.at[group], ring.out.at[warpgroup], row, column, columns, tile.astype(out.dtype))

            def active(where: Any) -> Any:
                return where[3] + warpgroup * HALF < depth

            _consume(ring, stages, mine, locate, count_parts, active, multiply, store, wide)

        _specialize(lambda: _produce(ring, stages, mine, locate, count_parts, copy), consume)

    ring = _ring((DEPTH, ROWS), (DEPTH, wide), wide, lhs.dtype)
    output = jax.ShapeDtypeStruct((groups, depth, columns), lhs.dtype)
    return _launch(body, ring, output, (order, low, lhs, d_out), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(lhs: Array, rhs: Array, group_sizes: Array, interpret: Any) -> Array:
    return product(lhs, rhs, group_sizes, interpret=interpret)


def _forward(lhs: Array, rhs: Array, group_sizes: Array, interpret: Any):
    return product(lhs, rhs, group_sizes, interpret=interpret), (lhs, rhs, group_sizes)


def _backward(interpret: Any, residuals: Any, d_out: Array):
    lhs, rhs, group_sizes = residuals
    d_lhs = product(d_out, rhs, group_sizes, transposed=True, interpret=interpret)
    return d_lhs, matrix_gradient(lhs, d_out, group_sizes, interpret=interpret), None


_grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul_gpu(lhs: Array, rhs: Array, group_sizes: Array, interpret: Any = None) -> Array:
    """`grouped_matmul` by these kernels; `interpret` is Pallas's `InterpretParams`, for tests."""
    return _grouped_matmul(lhs, rhs, group_sizes, interpret)
