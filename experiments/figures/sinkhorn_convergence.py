"""Sinkhorn's balance against iterations from a plain and from a centred start, and what the iterations cost.

    python -m experiments.figures.sinkhorn_convergence
    python -m experiments.sinkhorn_convergence --json FILE       # makes the metrics, in seconds on a CPU

The cost is of H100s: `python benchmarks/moe_layer.py` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import command, style
from experiments.figures.metrics import STORED, Metrics, MetricsError, read

TOLERANCE = 0.01
SMALLEST = 1e-4
"""Deviations below a hundredth of the tolerance are not drawn."""


def draw(metrics: Path, cost: Path) -> Figure:
    """Left: largest deviation of a row or column sum. Middle: load of the busiest expert. Right: share of a layer's time."""
    file, costs = read(metrics), read(cost)
    experts, temperature = file.number("experts"), file.number("temperature")
    batches = file.series("batches")
    worst = " and ".join(f"{count:g} of {tokens:,} tokens" for tokens, count in batches.items())
    note = f"Left and middle: worst of random batches of hard router logits, {worst}; {experts:g} experts, "
    note += f"temperature {temperature:g}. Centred: each expert's mean logit is taken from its logits first.\n"
    note += f"Left: deviations below {SMALLEST:.2%} are not drawn. Right: {costs.text('device')}, two cards, the MoE layer of "
    note += "BlackMamba 340M/1.5B in training, 8 x 2048 tokens, 8 iterations."
    title = "Sinkhorn routing: how soon the experts are balanced from each start, and what that costs"
    figure, (left, middle, right) = style.figure(title, 3, note=note, width=4.3, widths=[1, 1, 0.9])
    default = file.number("default_iterations")
    draw_curves(left, file, "deviation")
    draw_curves(middle, file, "load")
    for axes in (left, middle):
        most = max(file.numbers("iterations"))
        axes.set_xlim(-0.03 * most, 1.03 * most)  # whole markers at both ends
        axes.set_xticks([n for n in (0, 2, 4, 8, 12, 16) if n <= most])
        axes.axvline(default, color="0.75", linewidth=0.8, zorder=0)
    style.describe(left, "Largest deviation of a row or column sum", "iterations", "deviation from uniform")
    style.scale(left, "y", 10, [1e-4, 1e-3, 1e-2, 1e-1, 1, 10], ["0.01%", "0.1%", "1%", "10%", "100%", "1000%"])
    left.axhline(TOLERANCE, color="0.6", linewidth=0.8, zorder=0)
    left.text(default + 0.9, TOLERANCE * 0.93, "within 1%", fontsize=8, color=style.DARK, va="top")
    style.describe(middle, "Load of the busiest expert", "iterations", "tokens, times an equal share")
    style.scale(middle, "y", 2, [1, 1.25, 1.5, 2, 3, 4, 6, 8], ["1", "1.25", "1.5", "2", "3", "4", "6", "8"])
    middle.text(default + 0.2, 7.8, "the default", fontsize=8, color=style.DARK, va="top")
    draw_cost(right, costs)
    for axes in (left, middle):
        style.label_ends(axes)
    return figure


def draw_curves(axes: Axes, file: Metrics, key: str) -> None:
    """A line for each start and size of batch, the centred start's, which is used, before the plain one's."""
    iterations = file.numbers("iterations")
    number = 0
    for start, sizes in sorted(file.at("curves").items()):
        for tokens, curve in sizes.items():
            values = curve.numbers(key)
            if len(values) != len(iterations):
                raise MetricsError(
                    f"{file.path}: curves/{start}/{tokens}/{key} has {len(values)} values, not {len(iterations)}"
                )
            points = [(n, value) for n, value in zip(iterations, values, strict=True) if key == "load" or value >= SMALLEST]
            label = f"{start}, {int(tokens):,} tokens"
            style.plot(axes, [n for n, _ in points], [value for _, value in points], style.other_line(number, label))
            number += 1


def draw_cost(axes: Axes, costs: Metrics) -> None:
    """A bar for each pass and card; the goal is of the first pass."""
    share, goal = costs.at("share"), costs.number("goal")
    for key, values in {"goal": [goal], **{f"share/{name}": share.numbers(name) for name in share.value}}.items():
        if not values or not all(0 < value <= 1 for value in values):
            raise MetricsError(f"{costs.path}: {key} should be of numbers above 0 and up to 1, is {str(values)[1:-1]}")
    place, places, names = 0.0, [], []
    for first, name in enumerate(share.value):
        values = share.numbers(name)
        if first == 0:
            axes.plot([100 * goal] * 2, [-0.5, len(values) - 0.4], color="0", linewidth=1, linestyle=(0, (2, 2)), label="_goal")
            axes.text(
                100 * goal, len(values) - 0.35, f"goal: at most {goal:.0%}", fontsize=8, va="top", ha="center", color=style.DARK
            )
        for card, value in enumerate(values):
            axes.barh(place, 100 * value, 0.8, color="white" if card else "0.55", edgecolor="0", hatch="////" if card else None)
            at_edge = axes.get_yaxis_transform()  # beside the bars, where nothing is in the way
            axes.text(1.02, place, f"{value:.1%}", transform=at_edge, va="center", fontsize=8.5)
            places.append(place)
            names.append(f"{name},\ncard {card + 1}")
            place += 1
        place += 0.7
    axes.set_yticks(places, names)
    axes.set_xlim(0, 105 * max([goal, *(max(share.numbers(name)) for name in share.value)]))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    style.describe(axes, "Sinkhorn's share of time", "% of a MoE layer's time", "")


def main(arguments: Sequence[str] | None = None) -> None:
    inputs = {"metrics": STORED / "sinkhorn_convergence.json", "cost": STORED / "sinkhorn_cost.json"}
    command.build("sinkhorn_convergence", __doc__, draw, inputs, arguments)


if __name__ == "__main__":
    main()
