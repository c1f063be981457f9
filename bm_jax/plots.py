"""Pictures of a run: the loss curves and the load of the experts. Matplotlib is imported when a picture is drawn."""

from __future__ import annotations

import os
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]


def plot_losses(metrics: Rows, path: str | os.PathLike) -> None:
    """Draw training and validation loss against steps as a PNG at `path`.

    `metrics` are the rows of `read_metrics`: `loss` and `validation_loss` where present (`objective` for want of
    `loss`), in nats a token.

    Raises:
        ValueError: no row has a loss.
    """
    training = _series(metrics, "loss") or _series(metrics, "objective")
    validation = _series(metrics, "validation_loss")
    if not training and not validation:
        raise ValueError("the metrics hold no loss to draw")
    figure = _figure(7, 4.2)
    axes = figure.add_subplot()
    labels = []
    if training:
        axes.plot(*zip(*training, strict=True), color="0.55", linewidth=1.2, marker=_marker(training))
        labels.append((*training[-1], f"training {training[-1][1]:.3f}", "0.4"))
    if validation:
        axes.plot(*zip(*validation, strict=True), color="black", linewidth=1.6, marker="o", markersize=4)
        labels.append((*validation[-1], f"validation {validation[-1][1]:.3f}", "black"))
    axes.set(title="Loss", xlabel="step", ylabel="nats per token")
    _finish(axes)
    _label_ends(axes, labels)
    figure.savefig(path, dpi=150)


def plot_expert_load(metrics: Rows, path: str | os.PathLike) -> None:
    """Draw the load of each expert in each MoE layer as a PNG at `path`, in inference routing; 1 is an equal share.

    Left: the last row that has `expert_load` (layers x experts). Right: the busiest expert's load over training.

    Raises:
        ValueError: no row has `expert_load`, as for a model without MoE layers.
    """
    reports = _series(metrics, "expert_load", axes=2)
    if not reports:
        raise ValueError("the metrics hold no expert_load to draw; has the model a MoE layer?")
    steps = [step for step, _ in reports]
    loads = np.array([load for _, load in reports], np.float64)
    loads /= np.maximum(loads.mean(axis=-1, keepdims=True), 1e-12)
    _, layers, experts = loads.shape

    figure = _figure(4.6 + 0.42 * min(experts, 32) + 0.6, max(3.4, 1.3 + 0.3 * layers))
    left, right = figure.subplots(1, 2, width_ratios=[0.42 * min(experts, 32) + 0.6, 4.6])
    top = max(2.0, loads[-1].max())
    left.imshow(loads[-1], cmap="Greys", vmin=0, vmax=top, aspect="auto")
    if experts <= 32:
        for (layer, expert), load in np.ndenumerate(loads[-1]):
            color = "white" if load > 0.7 * top else "black"
            left.text(expert, layer, f"{load:.2f}", ha="center", va="center", fontsize=7, color=color)
        left.set_xticks(range(experts), [str(expert) for expert in range(experts)])
    left.set_yticks(range(layers), [str(layer) for layer in range(layers)])
    left.set(title=f"Load in inference routing, step {steps[-1]}", xlabel="expert", ylabel="MoE layer")

    busiest = loads.max(axis=-1)
    labels = []
    for layer in range(layers):
        shade = str(0.6 * (1 - layer / max(layers - 1, 1)))  # the deeper, the darker
        right.plot(steps, busiest[:, layer], color=shade, linewidth=1.2, marker=_marker(steps))
        labels.append((steps[-1], busiest[-1, layer], f"layer {layer}: {busiest[-1, layer]:.2f}", shade))
    right.set(title="Busiest expert in inference routing", xlabel="step", ylabel="load (1 = equal share)")
    right.set_ylim(bottom=1)
    _finish(right)
    if layers > 8:  # room for the extremes only
        labels = [max(labels, key=lambda label: label[1]), min(labels, key=lambda label: label[1])]
    _label_ends(right, labels)
    figure.savefig(path, dpi=150)


def _series(metrics: Rows, name: str, axes: int = 0) -> list[tuple[int, Any]]:
    """(step, value) of the rows whose value is finite numbers along so many axes, in the shape of the last such."""
    found = []
    for row in metrics:
        try:
            value = np.asarray(row.get(name), np.float64)
        except (TypeError, ValueError):
            continue
        if value.ndim == axes and value.size and np.all(np.isfinite(value)):
            found.append((row["step"], value))
    return [(step, value) for step, value in found if value.shape == found[-1][1].shape]


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, drawn by Agg whatever backend the process uses (savefig of a bare Figure is Agg)."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.06))


def _marker(points: Sized) -> str | None:
    """A dot where there is no line to see."""
    return "o" if len(points) == 1 else None


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, axes.dataLim.x1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _label_ends(axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Write each line's label (x, y, text, color) beside its end, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.055 * (top - bottom)
    axes.set_ylim(bottom, top)
    height = -np.inf
    for x, y, text, color in sorted(labels, key=lambda label: label[1]):
        height = max(y, height + gap)
        axes.annotate(
            text, (x, y), (1.02, height), textcoords=axes.get_yaxis_transform(), color=color, va="center", fontsize=9,
            annotation_clip=False,
        )  # fmt: skip
