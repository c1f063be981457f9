"""Kernels written lane by lane: one Python program that Mosaic GPU compiles for a warpgroup, or numpy runs on a CPU.

A program is a function of a `Lanes` and of named arrays. It says what one lane of a block of `WARPGROUP` lanes does, as
CUDA code would, and traces once: Python's loops unroll, `Lanes.loop` does not. Where arrays of a Pallas kernel fix how
work is spread over lanes, a program chooses: which lane owns which channel, what stays in registers, which sums cross
lanes and how. `launch` runs it on the GPU through `plgpu.kernel`. With `interpret=True` numpy does what the lanes would, one
vector of 128 for each value, with outputs and shared memory poisoned by NaN and races between warps reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.versions import mosaic_kernel

WARP = 32
WARPGROUP = 128
VECTOR_BYTES = 16
"""Most that a lane loads or stores at once."""


class Lanes(Protocol):
    """What a program may do besides `+ - * // %` and comparisons on values; `//` and `%` are for non-negative integers."""

    thread: Any
    """Number of the lane in its block, 0 to 127."""
    block: Any
    """Number of the block."""

    def fetch(self, ref: Any, index: Sequence[Any], width: int) -> Any:
        """`width` neighbours along the last axis from `index` on, aligned to their size, not yet waited for."""
        ...

    def unpack(self, fetched: Any) -> list[Any]:
        """The float32 values of a fetch."""
        ...

    def load(self, ref: Any, index: Sequence[Any], width: int) -> list[Any]:
        """`unpack` of `fetch`."""
        ...

    def store(self, ref: Any, index: Sequence[Any], values: Sequence[Any], where: Any = None) -> None:
        """Write neighbours along the last axis, in the array's dtype; lanes where `where` is false write nothing."""
        ...

    def exp2(self, x: Any) -> Any: ...
    def log2(self, x: Any) -> Any: ...
    def reciprocal(self, x: Any) -> Any: ...
    def inverse_root(self, x: Any) -> Any: ...
    def magnitude(self, x: Any) -> Any: ...
    def maximum(self, x: Any, y: Any) -> Any: ...
    def minimum(self, x: Any, y: Any) -> Any: ...
    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x * y + z."""
        ...

    def smaller(self, x: Any, y: Any) -> Any:
        """The smaller of two integers."""
        ...

    def choose(self, condition: Any, yes: Any, no: Any) -> Any:
        """`select` between integers."""
        ...

    def select(self, condition: Any, yes: Any, no: Any) -> Any: ...
    def round_bfloat16(self, x: Any) -> Any:
        """x rounded to bfloat16, still a float32."""
        ...

    def exchange(self, x: Any, stride: int) -> Any:
        """The value of x that the lane `thread ^ stride` holds; both are in one warp."""
        ...

    def loop(self, count: Any, body: Callable[[Any, list[Any]], list[Any]], carry: list[Any]) -> list[Any]:
        """`carry = body(i, carry)` for i from 0 to count - 1; `count` is the same in every lane of the block."""
        ...

    def loop_while_any(
        self, count: Any, body: Callable[[Any, list[Any]], tuple[Any, list[Any]]], carry: list[Any]
    ) -> list[Any]:
        """As `loop`, ended early once no lane of the block returns a true first value. It is a barrier after each turn."""
        ...

    def barrier(self) -> None:
        """Wait for the block: what was stored before it, by any lane, is read after it."""
        ...

    def warp_barrier(self) -> None:
        """As `barrier`, among the lanes of a warp."""
        ...


class LanesTogether(Lanes, Protocol):
    """Those of a program that all blocks run together, see `launch_together`."""

    def repeat(self, count: int, body: Callable[[Any], Iterator[None]]) -> Iterator[None]:
        """`body(i)`, a part of the program and a generator like it, for i from 0 to count - 1."""
        ...

    def anew(self) -> None:
        """Read `thread` and `block` again: the compiler cannot keep in registers what was made of them before."""
        ...

    def copy(self, shared: Any, ref: Any, index: Sequence[Any], count: Any, wanted: Any = True) -> None:
        """Start copying `count` elements of an input, in memory from `index` on, to the start of an array of one axis.

        It is another unit that copies, which takes a number of bytes divisible by 16 from such an address, one copy at a
        time: call it, alike in every lane, after a barrier behind the last use of `shared`. Where `wanted` is false nothing is
        copied and nothing may be waited for.
        """
        ...

    def copied(self, number: Any) -> None:
        """Wait for the copy of this number, the first being 0; all lanes may read it then."""
        ...

    def post(self, letters: Any, index: Sequence[Any], value: Any, stamp: Any, where: Any = None) -> None:
        """Write a letter, rounded to the letters' dtype, and its stamp."""
        ...

    def collect(
        self, letters: Any, places: Sequence[Sequence[Any]], width: int, stamp: Any, where: Any = None
    ) -> list[list[Any]]:
        """Wait until the `width` neighbours from each place on bear this stamp, and read them: of a place, its values.

        A place's letters have at most VECTOR_BYTES, stamps included, and are aligned to their size. Lanes where `where` is
        false wait for nothing and get zeros.
        """
        ...


LETTER_BYTES = {"float32": 8, "bfloat16": 4}
"""Of a value and its stamp, which one access writes or reads; the stamp of a bfloat16 has 16 bits."""


def scatter_sum(lanes: Lanes, values: Sequence[Any], strides: Sequence[int]) -> list[Any]:
    """Sum over the lanes that differ in the bits `strides`, each lane keeping its share of the sums.

    Every stride halves the list: lanes with that bit of `thread` clear keep the first half, the others the second.
    """
    for stride in strides:
        upper = (lanes.thread // stride) % 2 > 0
        half = len(values) // 2
        values = [
            lanes.select(upper, b, a) + lanes.exchange(lanes.select(upper, a, b), stride)
            for a, b in zip(values[:half], values[half:], strict=True)
        ]
    return list(values)


def launch(
    program: Callable[[Lanes, SimpleNamespace], None],
    blocks: int,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    shared: Mapping[str, jax.ShapeDtypeStruct],
    together: int = 1,
    interpret: bool = False,
) -> dict[str, Array]:
    """Run `program(lanes, arrays)` in `blocks` blocks; `arrays` has an attribute for each input, output and shared array.

    Args:
        outputs: shape and dtype of each array the program writes; elements it does not write are undefined.
        shared: shape and dtype of each array that the lanes of a block share.
        together: blocks that the GPU starts as one. They share nothing, but the compiler then gives each lane at most
            65536 / (128 * together) registers, so that this many blocks fit a processor.
        interpret: run on numpy, in order of the blocks.
    """
    names = [*inputs, *outputs, *shared]
    if interpret:

        def run(*arrays: Array) -> list[np.ndarray]:
            results = [np.full(s.shape, np.nan, s.dtype) for s in outputs.values()]
            for block in range(blocks):
                scratch = [np.full(s.shape, np.nan, s.dtype) for s in shared.values()]
                lanes = _NumpyLanes(block, scratch)
                refs = [*map(np.asarray, arrays), *results, *scratch]
                with np.errstate(all="ignore"):
                    program(lanes, SimpleNamespace(**dict(zip(names, refs, strict=True))))
            return results

        results = jax.pure_callback(run, list(outputs.values()), *inputs.values(), vmap_method="sequential")
        return dict(zip(outputs, results, strict=True))

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def lanewise(_: Any, *refs: Any) -> None:
            # Imported here, so that machines without a GPU need not have what only compiles for one.
            from pallas_kernels.lanes_mosaic import MosaicLanes

            lanes = MosaicLanes(together)
            wrapped = [lanes.ref(ref, constant=k < len(inputs)) for k, ref in enumerate(refs)]
            with lanes.only_if(lanes.block < blocks):
                program(lanes, SimpleNamespace(**dict(zip(names, wrapped, strict=True))))

        lanewise(*refs)

    kernel = mosaic_kernel(
        body,
        outputs=tuple(outputs.values()),
        scratch=[plgpu.SMEM((together, *s.shape), s.dtype) for s in shared.values()],
        grid=(ceil_div(blocks, together),),
        grid_names=("block",),
        num_threads=together,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return dict(zip(outputs, kernel(*inputs.values()), strict=True))


def launch_together(
    program: Callable[[LanesTogether, SimpleNamespace], Iterator[None]],
    blocks: int,
    threads: int,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    letters: Mapping[str, jax.ShapeDtypeStruct],
    shared: Mapping[str, jax.ShapeDtypeStruct],
    interpret: bool = False,
) -> dict[str, Array]:
    """As `launch`, with all blocks running at the same time, one of `threads` lanes on each processor of the GPU.

    Blocks pass values to each other as `letters`, arrays of float32 or bfloat16 whose elements bear a stamp, 0 at first: a
    reader waits for the stamp it wants, so that a value crosses the GPU in one write and one read, with no barrier between.
    Nothing else that one block writes may be read by another. A letter may be written again once all its readers have read
    it, which the writer must know from their own letters.

    The program is a generator: it yields before it collects letters of other blocks that were posted since it last did. All
    blocks yield as often. `blocks` must not be more than the GPU has processors.
    """
    names = [*inputs, *outputs, *shared, *letters]
    if interpret:

        def run(*arrays: Array) -> list[np.ndarray]:
            results = [np.full(s.shape, np.nan, s.dtype) for s in outputs.values()]
            posted = [_NumpyLetters(s) for s in letters.values()]
            running = []
            for block in range(blocks):
                scratch = [np.full(s.shape, np.nan, s.dtype) for s in shared.values()]
                refs = [*map(np.asarray, arrays), *results, *scratch, *posted]
                lanes = _NumpyLanes(block, scratch, threads)
                running.append(program(lanes, SimpleNamespace(**dict(zip(names, refs, strict=True)))))
            states: set[str | None] = {None}
            with np.errstate(all="ignore"):
                while states == {None}:
                    states = {next(block, "ended") for block in running}
            if states != {"ended"}:
                raise RuntimeError("some blocks wait for others that have ended")
            return results

        results = jax.pure_callback(run, list(outputs.values()), *inputs.values(), vmap_method="sequential")
        return dict(zip(outputs, results, strict=True))

    words = [s.size * LETTER_BYTES[s.dtype.name] // 4 for s in letters.values()]
    ends = [VECTOR_BYTES // 4 * sum(ceil_div(n, VECTOR_BYTES // 4) for n in words[: k + 1]) for k in range(len(words))]

    def body(*arguments: Any) -> None:
        *refs, copies = arguments
        room = pl.get_global(plgpu.SemaphoreType.REGULAR((ends[-1],)))  # the global memory that is zero at first

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(refs) + 2))
        def lanewise(_: Any, room: Any, copies: Any, *refs: Any) -> None:
            # Imported here, so that machines without a GPU need not have what only compiles for one.
            from pallas_kernels.lanes_mosaic import MosaicLanesTogether

            lanes = MosaicLanesTogether(copies)
            wrapped = [lanes.ref(ref, constant=k < len(inputs)) for k, ref in enumerate(refs)]
            wrapped += [lanes.letters(room, first, s) for first, s in zip([0, *ends], letters.values(), strict=False)]
            for _ in program(lanes, SimpleNamespace(**dict(zip(names, wrapped, strict=True)))):
                pass

        lanewise(room, copies, *refs)

    kernel = mosaic_kernel(
        body,
        outputs=tuple(outputs.values()),
        scratch=[*(plgpu.SMEM(s.shape, s.dtype) for s in shared.values()), plgpu.SMEM((2,), jnp.int32)],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=threads // WARPGROUP,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return dict(zip(outputs, kernel(*inputs.values()), strict=True))


class _NumpyLetters:
    """Letters on numpy."""

    def __init__(self, kind: jax.ShapeDtypeStruct):
        self.values = np.full(kind.shape, np.nan, kind.dtype)
        self.stamps = np.zeros(kind.shape, int)


class _NumpyLanes:
    """Lanes on numpy: every value is a vector of a number for each lane, or one number where all lanes agree."""

    def __init__(self, block: int, shared: Sequence[np.ndarray], size: int = WARPGROUP):
        self.block = block
        self.size = size
        self.thread = np.arange(size)
        self._warp = self.thread // WARP
        self._copies: list[tuple[np.ndarray, np.ndarray]] = []
        # For each element of shared memory, since the last barrier: the warps that read it and those that wrote it, as bits.
        self._shared = {id(array): (np.zeros(array.shape, int), np.zeros(array.shape, int)) for array in shared}

    def _access(self, ref: np.ndarray, index: Sequence[Any], where: Any, writes: bool) -> tuple[np.ndarray, ...]:
        """The index broadcast to the lanes that take part, checked for bounds and races."""
        active = np.broadcast_to(True if where is None else where, (self.size,))
        full = tuple(np.broadcast_to(k, (self.size,))[active] for k in index)
        if any(((k < 0) | (k >= size)).any() for k, size in zip(full, ref.shape, strict=True)):
            raise IndexError(f"a lane of block {self.block} left an array of shape {ref.shape}")
        if id(ref) in self._shared:
            reads, written = self._shared[id(ref)]
            bit = 1 << self._warp[active]
            if ((written[full] & ~bit) | ((reads[full] & ~bit) if writes else 0)).any():
                raise RuntimeError(f"warps of block {self.block} race for an element of a shared array of shape {ref.shape}")
            np.bitwise_or.at(written if writes else reads, full, bit)
        return full

    def fetch(self, ref: np.ndarray, index: Sequence[Any], width: int) -> list[list[np.ndarray]]:
        *leading, last = index
        size = min(width, VECTOR_BYTES // ref.dtype.itemsize)
        return [
            [ref[self._access(ref, (*leading, last + k), None, False)].astype(np.float32) for k in range(first, first + size)]
            for first in range(0, width, size)
        ]

    def unpack(self, fetched: list[list[np.ndarray]]) -> list[np.ndarray]:
        return [value for piece in fetched for value in piece]

    def load(self, ref: np.ndarray, index: Sequence[Any], width: int) -> list[np.ndarray]:
        return self.unpack(self.fetch(ref, index, width))

    def store(self, ref: np.ndarray, index: Sequence[Any], values: Sequence[Any], where: Any = None) -> None:
        *leading, last = index
        active = np.broadcast_to(True if where is None else where, (self.size,))
        for k, value in enumerate(values):
            ref[self._access(ref, (*leading, last + k), where, True)] = np.broadcast_to(value, (self.size,))[active]

    def exp2(self, x: Any) -> Any:
        return np.exp2(np.float32(x))

    def log2(self, x: Any) -> Any:
        return np.log2(np.float32(x))

    def reciprocal(self, x: Any) -> Any:
        return np.float32(1) / x

    def inverse_root(self, x: Any) -> Any:
        return np.float32(1) / np.sqrt(x)

    def magnitude(self, x: Any) -> Any:
        return np.abs(x)

    def maximum(self, x: Any, y: Any) -> Any:
        return np.maximum(x, np.float32(y))

    def minimum(self, x: Any, y: Any) -> Any:
        return np.minimum(x, np.float32(y))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return np.float32(x) * y + z

    def smaller(self, x: Any, y: Any) -> Any:
        return np.minimum(x, y)

    def choose(self, condition: Any, yes: Any, no: Any) -> Any:
        return np.where(condition, yes, no)

    def round_bfloat16(self, x: Any) -> Any:
        return np.asarray(x, jnp.bfloat16).astype(np.float32)

    def select(self, condition: Any, yes: Any, no: Any) -> Any:
        return np.where(condition, np.float32(yes), np.float32(no))

    def exchange(self, x: Any, stride: int) -> Any:
        return np.broadcast_to(x, (self.size,))[self.thread ^ stride]

    def loop(self, count: Any, body: Callable, carry: list[Any]) -> list[Any]:
        for i in range(int(count)):
            carry = body(i, carry)
        return carry

    def loop_while_any(self, count: Any, body: Callable, carry: list[Any]) -> list[Any]:
        for i in range(int(count)):
            more, carry = body(i, carry)
            self.barrier()
            if not np.any(more):
                break
        return carry

    def barrier(self) -> None:
        for reads, written in self._shared.values():
            reads[...] = written[...] = 0

    def warp_barrier(self) -> None:
        pass

    def repeat(self, count: int, body: Callable[[Any], Iterator[None]]) -> Iterator[None]:
        for i in range(count):
            yield from body(i)

    def anew(self) -> None:
        pass

    def copy(self, shared: np.ndarray, ref: np.ndarray, index: Sequence[Any], count: Any, wanted: Any = True) -> None:
        if np.all(wanted):
            first = np.ravel_multi_index(tuple(int(k) for k in index), ref.shape)
            self._copies.append((shared, ref.reshape(-1)[first : first + int(count)]))
            shared[...] = np.nan  # until it is there

    def copied(self, number: Any) -> None:
        if len(self._copies) != int(number) + 1:
            raise RuntimeError(f"block {self.block} waits for copy {number} of {len(self._copies)}")
        shared, values = self._copies[-1]
        shared[: len(values)] = values

    def post(self, letters: _NumpyLetters, index: Sequence[Any], value: Any, stamp: Any, where: Any = None) -> None:
        self.store(letters.values, index, [value], where)
        active = np.broadcast_to(True if where is None else where, (self.size,))
        letters.stamps[self._access(letters.stamps, index, where, True)] = np.broadcast_to(stamp, (self.size,))[active]

    def collect(
        self, letters: _NumpyLetters, places: Sequence[Sequence[Any]], width: int, stamp: Any, where: Any = None
    ) -> list[list[np.ndarray]]:
        active = np.broadcast_to(True if where is None else where, (self.size,))
        collected = []
        for *leading, last in places:
            values = []
            for k in range(width):
                own = self._access(letters.stamps, (*leading, last + k), where, False)
                if (letters.stamps[own] != np.broadcast_to(stamp, (self.size,))[active]).any():
                    raise RuntimeError(f"block {self.block} waits for letters that nobody has posted, or that are gone")
                values.append(np.zeros(self.size, np.float32))
                values[-1][active] = letters.values[own]
            collected.append(values)
        return collected


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return math.ceil(a / b)
