"""What is learned: held-out bits per byte against steps, training FLOPs and time, from `python -m experiments.learning`.

    python -m experiments.figures.loss_against_flops
    python -m experiments.figures.loss_against_flops --metrics learning.json --output pictures

BlackMamba, Mamba, Transformer, Transformer-MoE and MoE-Mamba at one active size; where there are several seeds, their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.figures import command, learning_runs, style
from experiments.figures.metrics import STORED

SYSTEMS = ("blackmamba", "mamba", "moe_mamba", "transformer", "transformer_moe")


def draw(metrics: Path) -> Figure:
    """Three panels with the same curves; the first checkpoints, far above the others, are left out."""
    runs = [run for run in learning_runs.read_runs(metrics) if run.system in SYSTEMS]
    note = learning_runs.note(runs)
    figure, panels = style.figure("Learning from the same text, at one active size", 3, note=note, width=4.9)
    quantities = (
        ("steps", "optimizer steps", 1.0),
        ("flops", "training PFLOP", 1e15),
        ("seconds", "minutes of steps alone, without compiling", 60.0),
    )
    for axes, (name, what, unit) in zip(panels, quantities, strict=True):
        for system in dict.fromkeys(run.system for run in runs):
            curve = learning_runs.mean([run for run in runs if run.system == system])
            points = [(getattr(point, name) / unit, point.bits) for point in curve]
            shown = points[len(points) // 5 :]
            line = style.line(system)
            style.plot(axes, [x for x, _ in shown], [y for _, y in shown], line, f"{line.label} {points[-1][1]:.3f}")
        style.describe(axes, f"Against {'time' if name == 'seconds' else what}", what, "held-out bits per byte")
        style.label_ends(axes)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    command.build("loss_against_flops", __doc__, draw, {"metrics": STORED / "learning.json"}, arguments)


if __name__ == "__main__":
    main()
