"""Reading what `python -m experiments.learning` wrote, for several figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.figures.metrics import Metrics, MetricsError, read


class Point(NamedTuple):
    """Of a learning curve."""

    steps: float
    flops: float
    seconds: float
    bits: float
    """A byte of held-out text."""


class Run(NamedTuple):
    """One training run."""

    system: str
    size: str
    seed: int
    device: str
    tokens_per_step: float
    bytes_per_token: float
    """Of held-out text."""
    active: float
    """Parameters that a token passes through, without embeddings."""
    curve: list[Point]
    loads: list[tuple[int, dict[str, list[list[float]]]]]
    """Steps, and of each way of routing ("training", "inference") the load of each expert in each layer."""


def read_runs(path: Path) -> list[Run]:
    """All runs of a file, at least one.

    Raises:
        MetricsError: the file is not as the command writes it.
    """
    return [_run(run) for run in read(path).objects("runs")]


def _run(run: Metrics) -> Run:
    plan = run.at("plan")
    curve = [
        Point(*(point.number(name) for name in ("step", "flops", "seconds", "bits_per_byte")))
        for point in run.objects("validation")
    ]
    loads = []
    for entry in run.objects("expert_load", empty=True):
        loads.append((int(entry.number("step")), {how: entry.rows(how) for how in ("training", "inference")}))
    return Run(
        plan.text("system"), plan.text("size"), int(plan.number("seed")), run.text("device"),
        run.number("tokens_per_step"), run.number("bytes_per_token"), run.number("active_without_embeddings"), curve, loads,
    )  # fmt: skip


def mean(runs: Sequence[Run]) -> list[Point]:
    """The mean curve of runs of one system with other seeds.

    Raises:
        MetricsError: they were measured at other steps.
    """
    if len({tuple(point.steps for point in run.curve) for run in runs}) != 1:
        raise MetricsError(f"the runs of {runs[0].system} were measured at other steps than each other")
    return [
        Point(*(sum(values) / len(runs) for values in zip(*points, strict=True)))
        for points in zip(*(run.curve for run in runs), strict=True)
    ]


def of(runs: Sequence[Run], system: str, path: Path) -> list[Run]:
    """The runs of one system.

    Raises:
        MetricsError: there are none.
    """
    found = [run for run in runs if run.system == system]
    if not found:
        raise MetricsError(f"{path}: runs: there is none of {system}")
    return found


def note(runs: Sequence[Run], drawn: str = "mean") -> str:
    """Device, size and tokens, for the bottom of a figure; of several seeds of a system their `drawn` is drawn."""
    active = [run.active / 1e6 for run in runs]
    tokens = {run.curve[-1].steps * run.tokens_per_step for run in runs}
    seeds = [run.system for run in runs]
    several = [name for name in dict.fromkeys(seeds) if seeds.count(name) > 1]
    sizes = dict.fromkeys(f"{size:.3g}" for size in (min(active), max(active)))
    text = "tiny models, of no use; " if any(run.size == "tiny" for run in runs) else ""
    text += f"{', '.join(sorted({run.device for run in runs}))}; {' to '.join(sizes)} M active parameters "
    text += f"without embeddings; {' or '.join(f'{count / 1e6:,.3g}' for count in sorted(tokens))} M tokens"
    counts = " or ".join(map(str, sorted({seeds.count(name) for name in several})))
    return text + (f"; {' and '.join(several)}: {drawn} of {counts} seeds, others one" if several else "")
