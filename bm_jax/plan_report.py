"""What a plan found, and how it is printed."""

from __future__ import annotations

import dataclasses

from bm_jax.config import Config
from bm_jax.hlo import Movement
from bm_jax.topologies import GIB, Chip, Topology

BOUNDS = ("compute", "memory", "network")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, or an estimate of one; every number is one device's, for one run of the program."""

    name: str
    memory: dict[str, float]
    """Bytes by kind; their sum is what the device needs."""
    flops: float
    """Operations of matrix products: those of all devices, divided evenly."""
    most_flops: float
    """The same with the largest branch of every conditional."""
    moved: Movement
    most_moved: Movement
    """The same with the largest branch of every conditional."""
    seconds: float | None
    """What compiling took; None for an estimate."""

    @property
    def needed(self) -> float:
        """Bytes of device memory."""
        return sum(self.memory.values())

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that each of `BOUNDS` takes at the chip's peak; the largest is the prediction."""
        times = self.flops / chip.flops, self.moved.memory / chip.bandwidth, self.moved.total.sent / chip.network
        return dict(zip(BOUNDS, times, strict=True))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A program that the compiler refused because it does not fit."""

    name: str
    needed: float
    """Bytes that the compiler says it needs; 0 where it does not say."""
    available: float
    seconds: float


def fits(found: Program | Refusal, chip: Chip) -> bool:
    """Whether a program fits the memory of a chip."""
    return isinstance(found, Program) and found.needed <= chip.memory


def describe_layout(config: Config) -> str:
    """Mesh, batch and remat policy as the options that ask for them."""
    mesh = ",".join(f"{axis}={size}" for axis, size in dataclasses.asdict(config.mesh).items() if size != 1) or "data=1"
    return f"--mesh {mesh} --data.batch-size {config.data.batch_size} --run.remat {config.run.remat}"


def verdict(found: Program | Refusal, chip: Chip) -> str:
    """One line: fits or not, and how much it needs."""
    kind = "estimate: " if isinstance(found, Program) and found.seconds is None else ""
    if fits(found, chip):
        return f"{found.name}: {kind}fits, {found.needed / GIB:.2f} of {chip.memory / GIB:.2f} GiB a device"
    needs = f"needs {found.needed / GIB:.2f} GiB a device, " if found.needed else ""
    available = chip.memory if isinstance(found, Program) else found.available or chip.memory
    return f"{found.name}: {kind}does not fit, {needs}there are {available / GIB:.2f}"


def report(found: Program | Refusal, config: Config, topology: Topology) -> str:
    """Everything known of a program, some lines of text."""
    chip = topology.chip
    lines = [verdict(found, chip)]
    if isinstance(found, Refusal):
        return "\n".join([*lines, f"  refused by the compiler after {found.seconds:.0f} s"])
    lines += [f"  {size / GIB:9.3f} GiB  {kind}" for kind, size in found.memory.items() if size > 0]
    lines.append("  collectives a run, each device:")
    for kind, traffic in sorted(found.moved.collectives.items(), key=lambda item: -item[1].sent):
        most = found.most_moved.collectives.get(kind, traffic)
        more = f", up to {_bytes(most.sent)} when rows overflow their room" if most.sent > 1.001 * traffic.sent else ""
        lines.append(
            f"    {kind:20} {traffic.count:6.0f} x, payload {_bytes(traffic.payload)}, sent {_bytes(traffic.sent)}{more}"
        )
    if not found.moved.collectives:
        lines.append("    none")
    more = f", up to {found.most_flops:.3g}" if found.most_flops > 1.001 * found.flops else ""
    lines.append(f"  matrix FLOPs a run: {found.flops:.4g} a device{more}, {found.flops * topology.size:.4g} in all")
    if found.moved.unbounded:
        lines.append(f"  {found.moved.unbounded} loops without a known bound are counted once")
    lines.append(f"  {_prediction(found, config, chip)}")
    if found.seconds is not None:
        lines.append(f"  compiled in {found.seconds:.0f} s")
    return "\n".join(lines)


def _prediction(found: Program, config: Config, chip: Chip) -> str:
    times = found.bounds(chip)
    largest = max(times, key=lambda name: times[name])
    listed = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in times.items())
    text = f"predicted, not measured: {listed}; bound by {largest}"
    rate = tokens(found.name, config) / times[largest] if times[largest] else 0
    return f"{text}, at most {rate:,.0f} tokens/s in all"


def tokens(program: str, config: Config) -> int:
    """Tokens of one run of a program, on all devices."""
    from bm_jax.decoding import CHUNK

    return config.data.batch_size * (CHUNK if program == "decode" else config.data.sequence_length)


def speed(found: Program, config: Config, chip: Chip) -> float:
    """Predicted tokens a second, all devices together, at most."""
    return tokens(found.name, config) / max(*found.bounds(chip).values(), 1e-30)


def _bytes(size: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
