"""How far BlackMamba and MoE-Mamba are ahead of a dense Mamba, against the bytes read for each active parameter.

    python -m experiments.figures.lead_over_mamba
    python -m experiments.figures.lead_over_mamba --metrics learning.json --small small.json --cpu cpu.json

From `python -m experiments.learning` at three settings, a file each. Each point is of one step in both runs, and where there
are several seeds, of their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.figures import command, learning_runs, style
from experiments.figures.learning_runs import Run
from experiments.figures.metrics import STORED, MetricsError

MODELS = ("blackmamba", "moe_mamba")
TICKS = (0.1, 1, 10, 100, 1000)


def draw(metrics: Path, small: Path, cpu: Path) -> Figure:
    """A panel a model, a line a setting; where a file has no runs of a model, its panel has no line of it."""
    settings = [(path, learning_runs.read_runs(path)) for path in (metrics, small, cpu)]
    note = "\n".join([*(_setting(runs) for _, runs in settings), "Bytes: the tokens read times the bytes of a held-out token"])
    title = "Ahead of dense Mamba, by active parameters and text read"
    figure, panels = style.figure(title, 2, note=note, width=5.0, height=4.2)
    for axes, model in zip(panels, MODELS, strict=True):
        for number, (path, runs) in enumerate(settings):
            dense = learning_runs.mean(learning_runs.of(runs, "mamba", path))
            those = [run for run in runs if run.system == model]
            if not those:
                continue
            curve = learning_runs.mean(those)
            if [point.steps for point in curve] != [point.steps for point in dense]:
                raise MetricsError(f"{path}: {model} was measured at other steps than mamba")
            read = those[0].tokens_per_step * those[0].bytes_per_token / those[0].active
            leads = [other.bits - point.bits for point, other in zip(curve, dense, strict=True)]
            line = style.other_line(number, f"{_name(those[0])} {leads[-1]:+.3f}")
            style.plot(axes, [point.steps * read for point in curve], leads, line)
        axes.axhline(0, color="0", linewidth=0.8)
        above = f"{style.line(model).label}: above 0 it is ahead"
        style.describe(axes, above, "bytes read for each active parameter", "bits per byte below Mamba's")
        style.scale(axes, "x", 10, TICKS)
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        style.label_ends(axes)
    return figure


def _name(run: Run) -> str:
    """Active parameters, and all bytes read."""
    return f"{run.active / 1e6:.2g} M, {run.curve[-1].steps * run.tokens_per_step * run.bytes_per_token / 1e6:.3g} MB"


def _setting(runs: Sequence[Run]) -> str:
    systems = [run.system for run in runs]
    seeds = ", ".join(f"{style.line(name).label} {systems.count(name)}" for name in ("mamba", *MODELS) if name in systems)
    return f"{_name(runs[0])}: {runs[0].device}, {runs[0].curve[-1].steps:,.0f} steps, seeds: {seeds}"


def main(arguments: Sequence[str] | None = None) -> None:
    files = {"metrics": "learning.json", "small": "learning_small.json", "cpu": "learning_small_cpu.json"}
    command.build("lead_over_mamba", __doc__, draw, {option: STORED / name for option, name in files.items()}, arguments)


if __name__ == "__main__":
    main()
