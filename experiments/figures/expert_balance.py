"""Load of the busiest expert in each layer over training, for three routers, as `python -m experiments.learning` measures it.

    python -m experiments.figures.expert_balance
    python -m experiments.figures.expert_balance --metrics learning.json --output pictures

A load of 1 is an equal share; where there are several seeds, the worst of them is drawn. Sinkhorn has two panels: the balanced
choice of training, which looks at the whole batch, and the choice of inference, which looks at each token alone.
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
    """A panel for each way of routing, all with the same scale; a line a layer."""
    runs = learning_runs.read_runs(metrics)
    note = learning_runs.note([run for run in runs if run.system in {system for _, system, _ in PANELS}], "worst")
    note += f"; a line for each MoE layer, labelled: the one that ends highest (black), the first and the last; dashed: {GOAL}"
    figure, panels = style.figure("Load of the busiest expert, layer by layer", len(PANELS), note=note, width=3.7)
    highest = 1.0
    for axes, (title, system, how) in zip(panels, PANELS, strict=True):
        steps, load = worst_loads(learning_runs.of(runs, system, metrics), how, metrics)
        highest = max(highest, load.max())
        lines = {int(load[-1].argmax()): 0}
        for layer, number in ((0, 1), (load.shape[1] - 1, 2)):
            lines.setdefault(layer, number)
        for layer, busiest in enumerate(load.T):
            if layer in lines:
                style.plot(axes, steps, busiest, style.other_line(lines[layer], f"layer {layer}: {busiest[-1]:.2f}"))
            else:
                axes.plot(steps, busiest, color="0.5", linewidth=0.8, zorder=1.5, label="_layer")
        axes.axhline(GOAL, color="0.4", linewidth=0.9, linestyle=(0, (2, 2)), label="_goal")
        style.describe(axes, title, "optimizer steps", "load, times an equal share" if axes is panels[0] else "")
    ticks = [tick for tick in (1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if tick <= 1.15 * highest]
    for axes in panels:
        style.scale(axes, "y", 2, ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(0.95, max(1.3, 1.1 * highest))
        axes.set_xlim(left=0)
        style.label_ends(axes)
    return figure


def worst_loads(runs: Sequence[learning_runs.Run], how: str, path: Path) -> tuple[list[int], np.ndarray]:
    """Steps, and at each the load of each layer's busiest expert `[steps, layers]`: the highest of runs with other seeds.

    Raises:
        MetricsError: a run has no loads, or other steps or layers than another.
    """
    steps = [[step for step, _ in run.loads] for run in runs]
    if [] in steps:
        raise MetricsError(f"{path}: a run of {runs[0].system} has no expert_load")
    loads = [[[max(layer) * len(layer) for layer in layers[how]] for _, layers in run.loads] for run in runs]
    if len({(tuple(at), *map(len, load)) for at, load in zip(steps, loads, strict=True)}) > 1:
        raise MetricsError(f"{path}: the runs of {runs[0].system} have expert_load of other steps or layers than each other")
    return steps[0], np.max(loads, axis=0)


def main(arguments: Sequence[str] | None = None) -> None:
    command.build("expert_balance", __doc__, draw, {"metrics": STORED / "learning.json"}, arguments)


if __name__ == "__main__":
    main()
