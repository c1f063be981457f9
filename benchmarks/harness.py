"""Comparisons in one run: contestants take turns, medians are compared, the result is printed and written as JSON.

Contestants run A B A B ..., so that a slow minute of the machine falls on both, and each round gives a ratio of its own.
When a peer has several forms or settings, each is timed once before and the fastest one competes.

Processor time (all threads) is kept beside the wall clock: on a machine that others use too it is the steadier of the two,
but it also counts the waiting that a thread pool does by spinning.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import lax

PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers", "mambapy", "tokenizers")


class Timing(NamedTuple):
    """One call."""

    wall: float
    """Seconds on the clock."""
    processor: float
    """Seconds of processor time of this process, all threads together."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Times of two contestants that did the same work."""

    name: str
    work: float
    """What one call did, in `unit`."""
    unit: str
    ours: str
    peer: str
    timings: dict[str, tuple[Timing, ...]]
    """Calls of both, one a round."""
    first: dict[str, Timing]
    """The first call of each contestant, compilation included."""
    screened: dict[str, Timing] = dataclasses.field(default_factory=dict)
    """The call of each peer by which the fastest was chosen; empty when there was one."""

    def __post_init__(self) -> None:
        if not self.timings[self.ours] or len(self.timings[self.ours]) != len(self.timings[self.peer]):
            raise ValueError(f"{self.name}: a comparison needs at least one round, and as many of each contestant")

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times faster than the peer we were by the clock, in each round."""
        return tuple(p.wall / o.wall for o, p in zip(self.timings[self.ours], self.timings[self.peer], strict=True))

    @property
    def ratio(self) -> float:
        """Median of `ratios`."""
        return statistics.median(self.ratios)

    @property
    def processor_ratio(self) -> float:
        """Median over rounds of the peer's processor time over ours."""
        pairs = zip(self.timings[self.ours], self.timings[self.peer], strict=True)
        return statistics.median(p.processor / o.processor for o, p in pairs)

    def rate(self, contestant: str) -> float:
        """Work a second, in the median round."""
        return self.work / statistics.median(timing.wall for timing in self.timings[contestant])

    def __str__(self) -> str:
        width = max(map(len, self.timings))
        lines = [self.name]
        for name, timings in self.timings.items():
            wall, processor = zip(*timings, strict=True)
            lines.append(
                f"  {name:{width}}  {self.rate(name):12,.0f} {self.unit}/s   median {_format(statistics.median(wall))} "
                f"({_format(min(wall))} to {_format(max(wall))}), processor {_format(statistics.median(processor))}, "
                f"first call {_format(self.first[name].wall)}"
            )
        lines += [f"  (not chosen: {name}, {_format(t.wall)})" for name, t in self.screened.items() if name != self.peer]
        lines.append(
            f"  ratio {self.ratio:.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f} over {len(self.ratios)} rounds), "
            f"in processor time {self.processor_ratio:.2f}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, the ratios included."""

        def plain(timings: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: value._asdict() if isinstance(value, Timing) else [timing._asdict() for timing in value]
                for name, value in timings.items()
            }

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {name: plain(values[name]) for name in ("timings", "first", "screened")}
        return values | {"ratio": self.ratio, "processor_ratio": self.processor_ratio}


def compare(
    name: str,
    ours: tuple[str, Callable[[], object]],
    peers: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    work: float = 1,
    unit: str = "calls",
) -> Comparison:
    """Call each contestant once to compile and warm up, choose the fastest peer, then call it and ours in turns.

    Args:
        name: what is compared.
        ours: our name, and a function that returns when its work is done.
        peers: the same for forms of the peer.
        rounds: timed calls of each.
        work: what one call does, in `unit`.
        unit: for example "tokens".
    """
    first = {ours[0]: measure(ours[1])} | {peer: measure(function) for peer, function in peers.items()}
    screened = {peer: measure(function) for peer, function in peers.items()} if len(peers) > 1 else {}
    peer = min(screened, key=lambda name: screened[name].wall) if screened else next(iter(peers))
    timings: dict[str, list[Timing]] = {ours[0]: [], peer: []}
    for _ in range(rounds):
        timings[ours[0]].append(measure(ours[1]))
        timings[peer].append(measure(peers[peer]))
    fixed = {contestant: tuple(values) for contestant, values in timings.items()}
    return Comparison(name, work, unit, ours[0], peer, fixed, first, screened)


def measure(function: Callable[[], object]) -> Timing:
    """Time one call."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return Timing(time.perf_counter() - wall, time.process_time() - processor)


def write_json(path: str | os.PathLike[str], comparisons: Sequence[Comparison], settings: Mapping[str, Any]) -> None:
    """Write the comparisons, what was asked for, and what they ran on."""
    values = {
        "comparisons": [comparison.to_dict() for comparison in comparisons],
        "settings": dict(settings),
        "machine": machine(),
    }
    Path(path).write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the numbers depend on: system, processor cores this process may use, versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "packages": versions,
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _format(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def repeated(function: Any, count: int) -> Any:
    """`count` calls one after the other in one program."""

    @jax.jit
    def run(*arguments):
        def again(_, last):
            # The barrier ties each call to the one before it, so none is dropped or moved out of the loop.
            fresh, _ = lax.optimization_barrier((arguments, last))
            return function(*fresh)

        return lax.fori_loop(0, count - 1, again, function(*arguments))

    return run


def seconds(runs: dict[str, Any], arguments: tuple, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times[name].append((time.perf_counter() - start) / count)
    return times


class Kernel(NamedTuple):
    """What a GPU ran once."""

    name: str
    seconds: float
    instruction: str
    """Of the compiled program; the kernel's name where the profile does not say."""


def profiled(run: Callable[[], object]) -> list[Kernel]:
    """The kernels that all GPUs ran while `run` did, which must wait for them; none on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        path = max(Path(folder).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    return [
        Kernel(e["name"], e["dur"] / 1e6, e.get("args", {}).get("hlo_op", e["name"]))
        for e in events
        if e.get("ph") == "X" and "Stream" in threads.get((e["pid"], e["tid"]), "")
    ]
