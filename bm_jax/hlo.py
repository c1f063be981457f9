"""What a compiled program moves, read from its HLO text: collectives over the network, bytes to and from device memory.

Both are counted a run of the program and a device. A loop counts as often as it says, or as its condition's bound says. A
conditional counts one branch: in `usual` the last, which is the one of a true predicate (in this program: gradients are
finite, rows fit in their room), in `most` the largest.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id iota "
    "add-dependency opt-barrier domain".split()
)
"""Operations that move nothing themselves."""

ARRAY = re.compile(r"\b(pred|token|[a-z]\w*?\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
OVERLAPPED = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')
"""libtpu repeats a collective in every fusion that it runs beside; in the one that starts it this is -1."""
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of collective, or a sum of several."""

    count: float = 0
    payload: float = 0
    """Bytes of the whole arrays that a device gives, or for all-gather gets."""
    sent: float = 0
    """Bytes a device sends when a ring of its group does it: 2 (n - 1) / n of the payload for all-reduce, (n - 1) / n of it for
    all-gather, reduce-scatter and all-to-all, all of it for the others."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.payload + other.payload, self.sent + other.sent)

    def times(self, factor: float) -> Traffic:
        """`factor` runs of it."""
        return Traffic(self.count * factor, self.payload * factor, self.sent * factor)


@dataclasses.dataclass(frozen=True)
class Movement:
    """What one run of a program, or of a part of it, moves on each device."""

    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    memory: float = 0
    """Bytes read from and written to device memory."""
    unbounded: int = 0
    """Loops without a known bound, counted once."""

    @property
    def total(self) -> Traffic:
        """All collectives."""
        return sum(self.collectives.values(), Traffic())

    def __add__(self, other: Movement) -> Movement:
        kinds = dict.fromkeys((*self.collectives, *other.collectives))
        both = {k: self.collectives.get(k, Traffic()) + other.collectives.get(k, Traffic()) for k in kinds}
        return Movement(both, self.memory + other.memory, self.unbounded + other.unbounded)

    def times(self, factor: float) -> Movement:
        """`factor` runs of it."""
        return Movement({k: t.times(factor) for k, t in self.collectives.items()}, self.memory * factor, self.unbounded)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    constant: str
    """What stands between the parentheses."""
    attributes: str
    is_root: bool

    def called(self, *names: str) -> list[str]:
        """The computations that these attributes name."""
        found = []
        for name in names:
            if match := re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                found += re.findall(r"[\w.\-]+", match[1])
        return found


def size_in_bytes(shape: str, fast_memory: bool = False) -> float:
    """Bytes of an array's or a tuple's shape as HLO writes it; with `fast_memory`, without what lies in memory space 1."""
    total = 0.0
    for dtype, dimensions, layout in ARRAY.findall(shape):
        if fast_memory and "S(1)" in layout:
            continue
        bits = 8 if dtype == "pred" else 0 if dtype == "token" else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(n) for n in dimensions.split(",") if n) * bits / 8
    return total


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Every computation of a module, instructions by name in their order, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if match := HEADER.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif " = " in line and line.startswith(" "):
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, shape, rest[:opening], NAME.findall(inside), inside, rest[closing + 1 :], left.startswith("ROOT "))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"HLO line without its closing parenthesis: {text[:200]}")


class Program:
    """A compiled program's text, taken apart.

    Args:
        text: `jax.stages.Compiled.as_text()`.
        fast_memory: memory space 1 is on the chip, as in programs for TPUs, and costs no traffic.
    """

    def __init__(self, text: str, *, fast_memory: bool = False) -> None:
        self.computations, self.entry = parse(text)
        self.fast_memory = fast_memory
        header = text[: text.find("\n")]
        counts = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)]
        self.devices = math.prod(counts)

    def usual(self) -> Movement:
        """With the last branch of every conditional."""
        return self._movement(self.entry, False, {})

    def most(self) -> Movement:
        """With the largest branch of every conditional, by bytes sent and by bytes of memory."""
        return self._movement(self.entry, True, {})

    def _movement(self, name: str, largest: bool, known: dict[str, Movement], inside: bool = False) -> Movement:
        """One run of a computation; `inside` a fusion only collectives count."""
        if name not in known:
            total = Movement()
            for instruction in self.computations.get(name, {}).values():
                total += self._of(instruction, name, largest, known, inside)
            known[name] = total
        return known[name]

    def _of(self, at: Instruction, where: str, largest: bool, known: dict[str, Movement], inside: bool) -> Movement:
        run = lambda name, inside=inside: self._movement(name, largest, known, inside)  # noqa: E731
        if at.opcode == "while":
            trips = self.trips(at)
            body = sum((run(name) for name in at.called("body", "condition")), Movement())
            return body.times(trips or 1) + Movement(unbounded=int(trips is None))
        if at.opcode == "conditional":
            branches = [run(name) for name in at.called("branch_computations", "false_computation", "true_computation")]
            if not largest:
                return branches[-1]
            heaviest = max(branches, key=lambda branch: branch.total.sent)
            return dataclasses.replace(heaviest, memory=max(branch.memory for branch in branches))
        moved = Movement() if inside else Movement(memory=self.memory(at, self.computations[where]))
        kind = at.opcode.removesuffix("-start")
        if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a fusion of libtpu in which each device keeps its part
        if kind in COLLECTIVES:
            overlapped = OVERLAPPED.search(at.attributes)
            if overlapped and overlapped[1] != "-1":
                return moved  # the same collective going on, while the fusion multiplies
            moved += Movement({kind: self._collective(kind, at, where)})
            if overlapped:
                given = [self.computations[where][name].shape for name in at.operands]
                moved += Movement(memory=sum(size_in_bytes(shape, self.fast_memory) for shape in (*given, at.shape)))
        elif at.opcode == "fusion":
            moved += sum((run(name, True) for name in at.called("calls")), Movement())
        elif at.opcode in ("call", "async-start"):
            moved = sum((run(name) for name in at.called("to_apply", "calls")), Movement())
        return moved

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs: what the compiler noted, else the constant that its condition compares with, else None."""
        if match := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes):
            return int(match[1])
        bounds = [bound for name in loop.called("condition") for bound in self._bounds(name)]
        return max(bounds) if bounds else None

    def _bounds(self, name: str) -> Iterator[int]:
        computation = self.computations.get(name, {})
        for instruction in computation.values():
            for called in instruction.called("calls", "to_apply"):
                if "compare" in {inner.opcode for inner in self.computations.get(called, {}).values()}:
                    yield from self._bounds(called)
            if instruction.opcode == "constant" and re.fullmatch(r"\d+", instruction.constant) and "32[]" in instruction.shape:
                yield int(instruction.constant)

    def _collective(self, kind: str, at: Instruction, where: str) -> Traffic:
        shapes = self.computations[where]
        given = sum(size_in_bytes(shapes[name].shape) for name in at.operands if name in shapes)
        n = self.group_size(at)
        if kind == "all-gather":
            return Traffic(1, given * n, given * (n - 1))
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": (n - 1) / n, "all-to-all": (n - 1) / n}
        return Traffic(1, given, given * share.get(kind, 1))

    def group_size(self, at: Instruction) -> int:
        """Devices that take part in a collective together."""
        if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", at.attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
            return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[2]))
        if match := re.search(r"replica_groups=\[([\d,]+)\]", at.attributes):
            return int(match[1].split(",")[-1])
        if match := re.search(r"replica_groups=\{\{([\d,]+)\}", at.attributes):
            return match[1].count(",") + 1
        return self.devices

    def memory(self, at: Instruction, computation: dict[str, Instruction]) -> float:
        """Bytes of device memory that an instruction reads and writes; of a stack of arrays only the slice it takes or sets."""
        if at.opcode in FREE or at.opcode.endswith(("-done", "-update")):
            return 0
        if at.opcode.endswith("-start") and at.opcode not in ("copy-start", "slice-start"):
            return 0
        size = lambda shape: size_in_bytes(shape, self.fast_memory)  # noqa: E731
        shapes = [computation[name].shape for name in at.operands if name in computation]
        if at.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * size(at.shape)
        if at.opcode == "dynamic-update-slice":
            return 2 * size(shapes[1])
        if at.opcode in ("copy-start", "slice-start"):  # (source, destination, ...) or ((source), destination, ...)
            arrays = [match[0] for match in ARRAY.finditer(at.shape)]
            source, destination = arrays[:2]
            read = 0 if self.fast_memory and "S(1)" in source else size_in_bytes(destination)
            return read + size(destination)
        if at.opcode == "fusion":
            return self._fusion(at, shapes)
        return size(at.shape) + sum(map(size, shapes))

    def _fusion(self, at: Instruction, shapes: list[str]) -> float:
        """Reads of a fusion's arguments, by what uses them, and writes of its results."""
        size = lambda shape: size_in_bytes(shape, self.fast_memory)  # noqa: E731
        inner = {n: i for name in at.called("calls") for n, i in self.computations.get(name, {}).items()}
        aliased = (
            {int(i) for i in re.findall(r"\}: \((\d+), \{", at.attributes)} if "output_to_operand" in at.attributes else set()
        )
        total, in_place = 0.0, 0.0
        for parameter in (i for i in inner.values() if i.opcode == "parameter"):
            whole = size(shapes[int(parameter.constant)])
            if int(parameter.constant) in aliased:
                in_place += whole  # passes through
                continue
            users = [i for i in inner.values() if parameter.name in i.operands]
            if users and all(
                u.opcode in ("dynamic-slice", "slice", "gather") and u.operands[0] == parameter.name for u in users
            ):
                total += min(whole, sum(size_in_bytes(u.shape) for u in users))
            elif users and all(u.opcode == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users):
                updates = sum(size_in_bytes(inner[u.operands[1]].shape) for u in users)
                in_place += whole - min(whole, updates)  # written where it lies
            else:
                total += whole
        return total + max(size(at.shape) - in_place, 0)
