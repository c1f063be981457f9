"""`Lanes` as MLIR: each operation of a program becomes one operation of a kernel that Mosaic GPU compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, math, nvvm, scf, vector

from pallas_kernels.lanes import LETTER_BYTES, VECTOR_BYTES, WARPGROUP


class Ref(NamedTuple):
    """An array in device or shared memory."""

    pointer: Any
    strides: tuple[int, ...]
    element: Any
    shared: bool
    constant: bool


class Number:
    """A float32, int32 or boolean of a lane."""

    def __init__(self, value: Any):
        self.value = value

    @property
    def is_float(self) -> bool:
        return isinstance(self.value.type, ir.F32Type)

    def lift(self, other: Any) -> Number:
        """`other`, a constant of this value's type where it is a Python number."""
        if isinstance(other, Number):
            return other
        return Number(utils.c(float(other) if self.is_float else int(other), self.value.type))

    def _binary(self, other: Any, for_floats: Callable, for_integers: Callable, swapped: bool = False) -> Number:
        pair = (self.lift(other), self) if swapped else (self, self.lift(other))
        operation = for_floats if self.is_float else for_integers
        options = {"fastmath": arith.FastMathFlags.contract} if self.is_float else {}
        return Number(operation(pair[0].value, pair[1].value, **options))

    def __add__(self, other: Any) -> Number:
        return self._binary(other, arith.addf, arith.addi)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Number:
        return self._binary(other, arith.subf, arith.subi)

    def __rsub__(self, other: Any) -> Number:
        return self._binary(other, arith.subf, arith.subi, swapped=True)

    def __mul__(self, other: Any) -> Number:
        return self._binary(other, arith.mulf, arith.muli)

    __rmul__ = __mul__

    def __neg__(self) -> Number:
        return 0 - self

    def __floordiv__(self, other: Any) -> Number:
        return Number(arith.divui(self.value, self.lift(other).value))

    def __mod__(self, other: Any) -> Number:
        return Number(arith.remui(self.value, self.lift(other).value))

    def _compare(self, other: Any, for_floats: Any, for_integers: Any) -> Number:
        other = self.lift(other)
        if self.is_float:
            return Number(arith.cmpf(for_floats, self.value, other.value))
        return Number(arith.cmpi(for_integers, self.value, other.value))

    def __lt__(self, other: Any) -> Number:
        return self._compare(other, arith.CmpFPredicate.OLT, arith.CmpIPredicate.slt)

    def __gt__(self, other: Any) -> Number:
        return self._compare(other, arith.CmpFPredicate.OGT, arith.CmpIPredicate.sgt)

    def __and__(self, other: Number) -> Number:
        return Number(arith.andi(self.value, other.value))

    def __or__(self, other: Number) -> Number:
        return Number(arith.ori(self.value, other.value))


class MosaicLanes:
    """See `pallas_kernels.lanes.Lanes`."""

    def __init__(self, together: int):
        self._i32, self._i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        self._f32 = ir.F32Type.get()
        lane = Number(utils.thread_idx())
        self.thread, self._warpgroup = lane % WARPGROUP, lane // WARPGROUP
        self.block = Number(arith.index_cast(self._i32, gpu.block_id(gpu.Dimension.x))) * together + self._warpgroup

    def ref(self, memref: Any, constant: bool) -> Ref:
        """`memref` as an array of a program; a constant one is never written."""
        kind = ir.MemRefType(memref.type)
        strides, _ = kind.get_strides_and_offset()
        pointer = utils.memref_ptr(memref)
        if kind.memory_space is None:
            pointer = llvm.addrspacecast(llvm.PointerType.get(1), pointer)
            return Ref(pointer, tuple(strides), kind.element_type, False, constant)
        # The first axis of a shared array is that of the blocks which run together.
        whole = Ref(pointer, tuple(strides), kind.element_type, True, constant)
        own = self._address(whole, (self._warpgroup, *[0] * (len(strides) - 1)), 0)
        return Ref(own, tuple(strides[1:]), kind.element_type, True, constant)

    @contextlib.contextmanager
    def only_if(self, condition: Number) -> Iterator[None]:
        """Emit what follows where `condition` holds; it is the same in every lane of a block."""
        branch = scf.IfOp(condition.value)
        with ir.InsertionPoint(branch.then_block):
            yield
            scf.yield_([])

    def _number(self, x: Any) -> Number:
        return x if isinstance(x, Number) else Number(utils.c(float(x), self._f32))

    def _address(self, ref: Ref, index: Sequence[Any], shift: int) -> Any:
        """The address of the element `shift` after `index`."""
        kind, fixed, offset = (self._i32 if ref.shared else self._i64), shift, None
        for position, stride in zip(index, ref.strides, strict=True):
            if not isinstance(position, Number):
                fixed += position * stride
                continue
            value = position.value if ref.shared else arith.extsi(kind, position.value)
            term = value if stride == 1 else arith.muli(value, utils.c(stride, kind))
            offset = term if offset is None else arith.addi(offset, term)
        # The constant comes last and alone, so that it becomes part of the instruction.
        pointer = ref.pointer if offset is None else utils.getelementptr(ref.pointer, [offset], ref.element)
        return utils.getelementptr(pointer, [fixed], ref.element) if fixed else pointer

    def _pieces(self, ref: Ref, width: int) -> list[tuple[int, int]]:
        """First element and size of each access that `width` neighbours take."""
        size = min(width, VECTOR_BYTES // utils.bytewidth(ref.element))
        return [(first, size) for first in range(0, width, size)]

    def fetch(self, ref: Ref, index: Sequence[Any], width: int) -> list[Any]:
        fetched = []
        for first, size in self._pieces(ref, width):
            address = self._address(ref, index, first)
            kind, alignment = ir.VectorType.get((size,), ref.element), size * utils.bytewidth(ref.element)
            fetched.append(llvm.load(kind, address, alignment=alignment, invariant=True if ref.constant else None))
        return fetched

    def unpack(self, fetched: list[Any]) -> list[Number]:
        numbers = []
        for piece in fetched:
            size = ir.VectorType(piece.type).shape[0]
            if ir.VectorType(piece.type).element_type == ir.BF16Type.get() and size % 2 == 0:
                # A bfloat16 is the upper half of a float32: two instructions for two of them.
                words = vector.bitcast(ir.VectorType.get((size // 2,), self._i32), piece)
                for k in range(size // 2):
                    word = vector.extract(words, [], [k])
                    halves = arith.shli(word, utils.c(16, self._i32)), arith.andi(word, utils.c(-(1 << 16), self._i32))
                    numbers += [Number(arith.bitcast(self._f32, half)) for half in halves]
                continue
            if ir.VectorType(piece.type).element_type != self._f32:
                piece = arith.extf(ir.VectorType.get((size,), self._f32), piece)
            numbers += [Number(vector.extract(piece, [], [k])) for k in range(size)]
        return numbers

    def load(self, ref: Ref, index: Sequence[Any], width: int) -> list[Number]:
        return self.unpack(self.fetch(ref, index, width))

    def store(self, ref: Ref, index: Sequence[Any], values: Sequence[Any], where: Number | None = None) -> None:
        if where is not None:
            with self.only_if(where):
                self.store(ref, index, values)
            return
        for first, size in self._pieces(ref, len(values)):
            parts = [self._number(value).value for value in values[first : first + size]]
            whole = vector.from_elements(ir.VectorType.get((size,), self._f32), parts)
            if ref.element != self._f32:
                whole = arith.truncf(ir.VectorType.get((size,), ref.element), whole)
            llvm.store(whole, self._address(ref, index, first), alignment=size * utils.bytewidth(ref.element))

    def _instruction(self, name: str, x: Any) -> Number:
        return Number(llvm.inline_asm(self._f32, [self._number(x).value], f"{name} $0, $1;", "=f,f"))

    def exp2(self, x: Any) -> Number:
        return self._instruction("ex2.approx.ftz.f32", x)

    def reciprocal(self, x: Any) -> Number:
        return self._instruction("rcp.approx.ftz.f32", x)

    def log2(self, x: Any) -> Number:
        return self._instruction("lg2.approx.ftz.f32", x)

    def inverse_root(self, x: Any) -> Number:
        return self._instruction("rsqrt.approx.ftz.f32", x)

    def magnitude(self, x: Any) -> Number:
        return Number(math.absf(self._number(x).value))

    def maximum(self, x: Any, y: Any) -> Number:
        return Number(arith.maximumf(self._number(x).value, self._number(y).value))

    def minimum(self, x: Any, y: Any) -> Number:
        return Number(arith.minimumf(self._number(x).value, self._number(y).value))

    def fma(self, x: Any, y: Any, z: Any) -> Number:
        return self._number(x) * y + z

    def smaller(self, x: Number, y: Any) -> Number:
        return Number(arith.minsi(x.value, x.lift(y).value))

    def round_bfloat16(self, x: Any) -> Number:
        return Number(arith.extf(self._f32, arith.truncf(ir.BF16Type.get(), self._number(x).value)))

    def choose(self, condition: Number, yes: Any, no: Any) -> Number:
        pair = (yes, no) if isinstance(yes, Number) else (no, yes)
        yes, no = (pair[0].lift(value) for value in (yes, no))
        return Number(arith.select(condition.value, yes.value, no.value))

    def select(self, condition: Number, yes: Any, no: Any) -> Number:
        return Number(arith.select(condition.value, self._number(yes).value, self._number(no).value))

    def exchange(self, x: Any, stride: int) -> Number:
        return Number(utils.shfl_bfly(self._number(x).value, stride))

    def _yield(self, carry: list[Any]) -> list[Any]:
        return [leaf if not isinstance(leaf, (Number, int, float)) else self._number(leaf).value for leaf in carry]

    def loop(self, count: Any, body: Callable, carry: list[Any]) -> list[Any]:
        return self._while(count, lambda i, carry: (None, body(i, carry)), carry)

    def loop_while_any(self, count: Any, body: Callable, carry: list[Any]) -> list[Any]:
        return self._while(count, body, carry)

    def _while(self, count: Any, body: Callable, carry: list[Any]) -> list[Any]:
        limit = count.value if isinstance(count, Number) else utils.c(count, self._i32)
        numbers = [isinstance(leaf, (Number, int, float)) for leaf in carry]

        def wrap(values: Sequence[Any]) -> list[Any]:
            return [Number(value) if number else value for value, number in zip(values, numbers, strict=True)]

        first = self._yield(carry)
        kinds = [value.type for value in first]
        zero, one = utils.c(0, self._i32), utils.c(1, self._i32)
        loop = scf.WhileOp([self._i32, self._i32, *kinds], [zero, one, *first])
        before = loop.before.blocks.append(self._i32, self._i32, *kinds)
        with ir.InsertionPoint(before):
            i, more, *_ = before.arguments
            unfinished = arith.cmpi(arith.CmpIPredicate.slt, i, limit)
            wanted = arith.cmpi(arith.CmpIPredicate.ne, more, zero)
            scf.condition(arith.andi(unfinished, wanted), list(before.arguments))
        after = loop.after.blocks.append(self._i32, self._i32, *kinds)
        with ir.InsertionPoint(after):
            i, _, *values = after.arguments
            more, carry = body(Number(i), wrap(values))
            scf.yield_([arith.addi(i, one), one if more is None else self._any(more), *self._yield(carry)])
        return wrap(list(loop.results)[2:])

    def _any(self, condition: Number) -> Any:
        """1 in every lane of the block if any of them has a true `condition`, else 0."""
        reduce = "barrier.cta.red.or.pred q, $2, 128, p;"
        instructions = "{.reg .pred p, q; setp.ne.u32 p, $1, 0; " + reduce + " selp.u32 $0, 1, 0, q;}"
        # The warpgroup's own barrier, as that of `mgpu.warpgroup_barrier`.
        operands = [arith.extui(self._i32, condition.value), (self._warpgroup + 1).value]
        return llvm.inline_asm(self._i32, operands, instructions, "=r,r,r", has_side_effects=True)

    def barrier(self) -> None:
        mgpu.warpgroup_barrier()

    def warp_barrier(self) -> None:
        nvvm.bar_warp_sync(utils.c(0xFFFFFFFF, self._i32))


class MosaicLanesTogether(MosaicLanes):
    """Lanes of blocks that all run at the same time, see `pallas_kernels.lanes.launch_together`."""

    def __init__(self, copies: Any):
        super().__init__(1)
        self.anew()
        self._copies = llvm.ptrtoint(self._i32, utils.memref_ptr(copies))
        """The barrier in shared memory on which copies arrive."""
        with self.only_if(self.thread < 1):
            self._emit("mbarrier.init.shared.b64 [$0], 1; fence.mbarrier_init.release.cluster;", self._copies, constraints="r")
        self.barrier()

    def anew(self) -> None:
        def read(register: str) -> Number:
            return Number(llvm.inline_asm(self._i32, [], f"mov.u32 $0, {register};", "=r", has_side_effects=True))

        self.thread, self.block = read("%tid.x"), read("%ctaid.x")

    def ref(self, memref: Any, constant: bool) -> Ref:
        kind = ir.MemRefType(memref.type)
        strides, _ = kind.get_strides_and_offset()
        pointer = utils.memref_ptr(memref)
        if kind.memory_space is None:
            return Ref(llvm.addrspacecast(llvm.PointerType.get(1), pointer), tuple(strides), kind.element_type, False, constant)
        return Ref(pointer, tuple(strides), kind.element_type, True, constant)

    def fetch(self, ref: Ref, index: Sequence[Any], width: int) -> list[Any]:
        """Of device memory, begun where it stands: loads of constants (.nc) would be put off until after the next barriers."""
        if ref.shared:
            return super().fetch(ref, index, width)
        fetched, kind = [], ".L1::no_allocate" if ref.constant else ""
        for first, size in self._pieces(ref, width):
            words, bits = max(1, size * utils.bytewidth(ref.element) // 4), min(32, size * utils.bytewidth(ref.element) * 8)
            names = [f"${k}" for k in range(words)]
            vector_of = "" if words == 1 else f".v{words}"
            text = f"ld.global{kind}{vector_of}.b{bits} {names[0] if words == 1 else '{' + ', '.join(names) + '}'}, [${words}];"
            word = ir.IntegerType.get_signless(bits)
            whole = word if words == 1 else llvm.StructType.get_literal([word] * words)
            constraints = ",".join(["=h" if bits == 16 else "=r"] * words + ["l"])
            loaded: Any = llvm.inline_asm(whole, [self._address(ref, index, first)], text, constraints, has_side_effects=True)
            parts: list[Any] = [loaded] if words == 1 else [llvm.extractvalue(word, loaded, [k]) for k in range(words)]
            packed = vector.from_elements(ir.VectorType.get((words,), word), parts)
            fetched.append(vector.bitcast(ir.VectorType.get((size,), ref.element), packed))
        return fetched

    def copy(self, shared: Ref, ref: Ref, index: Sequence[Any], count: Any, wanted: Any = True) -> None:
        first = self.thread < 1
        with self.only_if(first if wanted is True else first & wanted):
            size = utils.bytewidth(ref.element)
            text = (
                "fence.proxy.async.shared::cta; mbarrier.arrive.expect_tx.shared.b64 _, [$3], $2; "
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
            )
            to, bytes_ = llvm.ptrtoint(self._i32, shared.pointer), (count * size).value
            self._emit(text, to, self._address(ref, index, 0), bytes_, self._copies, constraints="r,l,r,r,~{memory}")

    def copied(self, number: Any) -> None:
        text = "{.reg .pred p; again_${:uid}: mbarrier.try_wait.parity.shared.b64 p, [$0], $1; @!p bra again_${:uid};}"
        self._emit(text, self._copies, (number % 2).value, constraints="r,r,~{memory}")

    def letters(self, room: Any, first: int, kind: Any) -> Ref:
        """Letters of this shape and dtype in `room`, from its word `first` on; an element of `Ref` is a value and its stamp."""
        pointer = llvm.addrspacecast(llvm.PointerType.get(1), utils.memref_ptr(room))
        strides = utils.get_contiguous_strides(kind.shape)
        element = ir.IntegerType.get_signless(8 * LETTER_BYTES[kind.dtype.name])
        return Ref(utils.getelementptr(pointer, [first], self._i32), tuple(strides), element, False, False)

    def post(self, letters: Ref, index: Sequence[Any], value: Any, stamp: Any, where: Number | None = None) -> None:
        if where is not None:
            with self.only_if(where):
                self.post(letters, index, value, stamp)
            return
        value = self._number(value) if letters.element == self._i64 else self.round_bfloat16(value)
        address, bits = self._address(letters, index, 0), arith.bitcast(self._i32, value.value)
        if letters.element == self._i64:
            text = "{.reg .b64 letter; mov.b64 letter, {$1, $2}; st.relaxed.gpu.global.b64 [$0], letter;}"
        else:
            text = "{.reg .b32 letter; or.b32 letter, $1, $2; st.relaxed.gpu.global.b32 [$0], letter;}"
        self._emit(text, address, bits, self._stamp(stamp), constraints="l,r,r,~{memory}")

    def _stamp(self, stamp: Any) -> Any:
        return stamp.value if isinstance(stamp, Number) else utils.c(stamp, self._i32)

    def collect(
        self, letters: Ref, places: Sequence[Sequence[Any]], width: int, stamp: Any, where: Number | None = None
    ) -> list[list[Number]]:
        wide, count = letters.element == self._i64, len(places) * width
        bits = 64 if wide else 32
        addresses = [f"${count + k}" for k in range(len(places))]
        wanted, taking = f"${count + len(places)}", f"${count + len(places) + 1}"
        text = [f".reg .pred p; .reg .b32 stamp; .reg .b{bits} {', '.join(f'letter{k}' for k in range(count))};"]
        if where is not None:
            text += [f"mov.b32 ${k}, 0;" for k in range(count)] + [f"setp.eq.u32 p, {taking}, 0; @p bra done_${{:uid}};"]
        text += ["again_${:uid}:"]
        for k, address in enumerate(addresses):
            names = ", ".join(f"letter{k * width + n}" for n in range(width))
            vector_of = f".v{width}" if width > 1 else ""
            text += [f"ld.relaxed.gpu.global{vector_of}.b{bits} {'{' + names + '}' if width > 1 else names}, [{address}];"]
        for k in range(count):
            apart = f"mov.b64 {{${k}, stamp}}, letter{k};" if wide else f"and.b32 stamp, letter{k}, 0xffff;"
            other = f"setp.ne.or.u32 p, stamp, {wanted}, p;" if k else f"setp.ne.u32 p, stamp, {wanted};"
            text += [apart, other] + ([] if wide else [f"and.b32 ${k}, letter{k}, 0xffff0000;"])
        text += ["@p bra again_${:uid};", "done_${:uid}:"]
        operands = [self._address(letters, place, 0) for place in places] + [self._stamp(stamp)]
        operands += [] if where is None else [arith.extui(self._i32, where.value)]
        inputs = ["l"] * len(places) + ["r"] * (1 if where is None else 2)
        constraints = ",".join(["=&r"] * count + inputs + ["~{memory}"])
        whole = self._i32 if count == 1 else llvm.StructType.get_literal([self._i32] * count)
        got: Any = llvm.inline_asm(whole, operands, "{" + " ".join(text) + "}", constraints, has_side_effects=True)
        words = [got] if count == 1 else [llvm.extractvalue(self._i32, got, [k]) for k in range(count)]
        numbers = [Number(arith.bitcast(self._f32, word)) for word in words]
        return [numbers[k : k + width] for k in range(0, count, width)]

    def barrier(self) -> None:
        # As an instruction of the compiler's own: it may copy one that it takes for any other assembly to two places, and
        # lanes of a warp would wait in both.
        gpu.barrier()

    def _emit(self, text: str, *operands: Any, constraints: str = "") -> None:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)

    def repeat(self, count: int, body: Callable[[Any], Iterator[None]]) -> Iterator[None]:
        def one(i: Any, carry: list[Any]) -> list[Any]:
            for _ in body(i):
                pass
            return carry

        self.loop(count, one, [])
        return
        yield
