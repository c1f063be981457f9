"""Load of the busiest expert in each layer over training, for three routers, as `python -m experiments.learning` measures it.

    python -m experiments.figures.expert_balance
    python -m experiments.figures.expert_balance --metrics learning.json --output pictures

A load of 1 is an equal share. Sinkhorn has two panels: the balanced choice of training, which looks at the whole batch, and the
choice of inference, which looks at each token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.figures import command, learning_runs, style
from experiments.figures.metrics import STORED, MetricsError

GOAL = 1.2
PANELS = (
    ("Sinkhorn, in training", "blackmamba", "training"),
    ("Sinkhorn, in inference", "blackmamba", "inference"),
    ("Switch with loss", "blackmamba_switch", "training"),
    ("Switch without loss", "blackmamba_unbalanced", "training"),
)


def draw(metrics: Path) -> Figure:
    """A panel for each way of routing, all with the same scale; a line a layer, the deeper the darker."""
    runs = learning_runs.read_runs(metrics)
    note = learning_runs.note([run for run in runs if run.system in {system for _, system, _ in PANELS}])
    note += f"; a line for each MoE layer, the deeper the darker; labelled: the one that ends highest; dashed: {GOAL}"
    figure, panels = style.figure("Load of the busiest expert, layer by layer", len(PANELS), note=note, width=3.7)
    highest = 1.0
    for axes, (title, system, how) in zip(panels, PANELS, strict=True):
        run = learning_runs.of(runs, system, metrics)[0]
        if not run.loads:
            raise MetricsError(f"{metrics}: the run of {system} has no expert_load")
        steps = [step for step, _ in run.loads]
        load = np.array([[max(layer) * len(layer) for layer in loads[how]] for _, loads in run.loads])
        highest, layers = max(highest, load.max()), load.shape[1]
        worst = int(load[-1].argmax())
        for layer in range(layers):
            grey = f"{0.7 * (1 - layer / max(layers - 1, 1)):.3f}"
            axes.plot(steps, load[:, layer], color=grey, linewidth=1.1, label="_layer")
        style.plot(axes, steps[-1:], load[-1:, worst], style.other_line(0, f"{load[-1, worst]:.2f}"))
        axes.axhline(GOAL, color="0.4", linewidth=0.9, linestyle=(0, (2, 2)), label="_goal")
        style.describe(axes, title, "optimizer steps", "load, times an equal share" if axes is panels[0] else "")
    ticks = [tick for tick in (1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if tick <= 1.15 * highest]
    for axes in panels:
        style.scale(axes, "y", 2, ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(0.95, max(1.3, 1.1 * highest))
        axes.set_xlim(left=0)
        style.label_ends(axes)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    command.build("expert_balance", __doc__, draw, {"metrics": STORED / "learning.json"}, arguments)


if __name__ == "__main__":
    main()
