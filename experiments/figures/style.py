"""The one look of all figures: grey and black, labels at the ends of lines, told apart by dashes and markers when printed.

A figure is made in four steps:

    figure, (left, right) = style.figure("What it shows", 2, note="device, settings, source")
    style.plot(left, lengths, seconds, style.line("mamba"))
    style.label_ends(left)
    style.save(figure, directory, "name")

A model has its line in every figure, whatever it is drawn beside (`line`); series that are no models get theirs by number
(`other_line`). The same metrics give the same bytes of SVG, whose text is text.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

DPI = 150
LABEL_SIZE = 9
"""Points, of the labels at lines' ends."""
DARK = "0.35"
"""The lightest grey of text."""
SAVED: dict[Any, str] = {"svg.fonttype": "none", "svg.hashsalt": "blackmamba-jax", "font.family": "sans-serif"}
"""Matplotlib's settings while a figure is written: text stays text, and ids are the same each time."""


class Line(NamedTuple):
    """How a series is drawn. Any two of `MODELS`, and any two of the others, differ in dashes and in marker."""

    label: str
    grey: str
    """From "0", black, to "1"; none is lighter than 0.5."""
    dashes: tuple[float, ...]
    """Lengths of strokes and gaps in widths of the line; empty for a solid one."""
    marker: str
    filled: bool
    width: float = 1.5

    def named(self, label: str) -> Line:
        """The same with another label."""
        return self._replace(label=label)


MODELS = {
    "blackmamba": Line("BlackMamba", "0", (), "o", True, 2.0),
    "mamba": Line("Mamba", "0.35", (5, 1.6), "s", False),
    "moe_mamba": Line("MoE-Mamba", "0.35", (8, 1.6, 1.2, 1.6), "P", True),
    "jamba": Line("Jamba", "0.45", (4, 1.4, 1.2, 1.4), "D", True),
    "transformer": Line("Transformer", "0.3", (1.2, 1.2), "v", True),
    "transformer_moe": Line("Transformer-MoE", "0.5", (2.6, 1.2), "^", False),
}
"""By how the names of presets begin."""
OTHERS = (
    Line("", "0", (), "o", True, 2.0),
    Line("", "0.35", (5, 1.6), "s", False),
    Line("", "0.45", (1.2, 1.2), "^", True),
    Line("", "0.2", (4, 1.4, 1.2, 1.4), "D", False),
    Line("", "0.5", (2.6, 1.2), "v", True),
    Line("", "0.35", (8, 1.6, 1.2, 1.6), "P", False),
)


def line(name: str) -> Line:
    """The line of a model, by the name of its preset: the same in all figures.

    Raises:
        ValueError: the name begins like none of `MODELS`.
    """
    found = [key for key in MODELS if name == key or name.startswith(f"{key}_")]
    if not found:
        raise ValueError(f"no line is set for a model named {name!r}: names begin with {', '.join(MODELS)}")
    return MODELS[max(found, key=len)]


def other_line(number: int, label: str) -> Line:
    """The line of series number 0, 1, ... of a figure whose series are no models.

    Raises:
        ValueError: there are not so many lines that can be told apart.
    """
    if number >= len(OTHERS):
        raise ValueError(f"{len(OTHERS)} lines can be told apart in black and white, a figure wants one more: {label!r}")
    return OTHERS[number].named(label)


def figure(
    title: str,
    panels: int = 1,
    *,
    note: str = "",
    width: float = 5.0,
    height: float = 3.9,
    widths: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side.

    Args:
        title: what the figure says, one line.
        panels: how many.
        note: small, at the bottom, wrapped: device, settings, where the numbers are from.
        width: of a panel and its labels, inches.
        height: of the figure, inches.
        widths: of the panels, relative to each other.
    """
    made = Figure(figsize=(width * panels, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.05))
    made.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    if note:
        fits = int(width * panels * 18)  # letters of that size beside each other
        wrapped = "\n".join(textwrap.fill(each, fits) for each in note.split("\n"))
        made.supxlabel(wrapped, x=0.01, ha="left", fontsize=7.5, color=DARK)
    axes = made.subplots(1, panels, squeeze=False, width_ratios=widths)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="0.9", linewidth=0.8)
        each.set_axisbelow(True)
        each.tick_params(labelsize=8.5)
    return made, list(axes)


def describe(axes: Axes, title: str, x: str, y: str) -> None:
    """Write what a panel shows, and its axes' quantities and units."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)


def plot(axes: Axes, x: Iterable[float], y: Iterable[float], line: Line, label: str | None = None) -> Line2D:
    """Draw a series; `label`, that of the line if None, is what `label_ends` writes beside its last point."""
    (drawn,) = axes.plot(
        list(x),
        list(y),
        color=line.grey,
        linewidth=line.width,
        linestyle=(0, line.dashes) if line.dashes else "solid",
        label=line.label if label is None else label,
        **marker(line),
    )
    return drawn


def marker(line: Line) -> dict[str, Any]:
    """The line's marker, as arguments of `Axes.plot`."""
    face = line.grey if line.filled else "white"
    return {
        "marker": line.marker, "markersize": 5, "markerfacecolor": face, "markeredgecolor": line.grey, "markeredgewidth": 1.1,
    }  # fmt: skip


def scale(axes: Axes, which: Literal["x", "y"], base: int, ticks: Sequence[float], labels: Sequence[str] | None = None) -> None:
    """Make an axis logarithmic, with ticks where given and no others; `labels` are `short` of them if None."""
    set_scale, axis = (axes.set_xscale, axes.xaxis) if which == "x" else (axes.set_yscale, axes.yaxis)
    set_scale("log", base=base)
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_ticks(list(ticks), [short(tick) for tick in ticks] if labels is None else list(labels))


def from_zero(axes: Axes, *, steps: bool = False) -> None:
    """Both axes linear from 0; whole numbers along x where it counts `steps`."""
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=steps))


def short(number: float) -> str:
    """A count as on an axis, in powers of 1024 where it is a multiple of one: 256, 4k, 1M."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size and number % size == 0:
            return f"{number / size:g}{letter}"
    return f"{number:,g}"


def label_ends(axes: Axes) -> None:
    """Write each series' label to the right of where the last one ends, moved apart where labels would overlap.

    A thin line leads to each label that is not beside its series' end. Call it last: limits of the axes are fixed by it.
    """
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    whole = axes.get_figure(root=True)
    assert whole is not None
    whole.draw_without_rendering()  # only now the layout knows the panel's height
    gap = 1.25 * LABEL_SIZE / (axes.get_window_extent().height * 72 / whole.dpi)
    ends: list[tuple[float, float, Line2D]] = []
    for drawn in axes.get_lines():
        label, points = str(drawn.get_label()), np.asarray(drawn.get_xydata())
        if label and not label.startswith("_") and len(points):
            x, y = axes.transAxes.inverted().transform(axes.transData.transform(points[-1]))
            ends.append((float(y), float(x), drawn))
    ends.sort(key=lambda end: end[:2])
    last = max((x for _, x, _ in ends), default=1)
    for (y, x, drawn), place in zip(ends, spread([y for y, _, _ in ends], gap), strict=True):
        lead = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "linestyle": (0, (1, 2)), "shrinkA": 0, "shrinkB": 4}
        lead["relpos"] = (0, 0.5)  # not through the label
        moved = x < last - 0.01 or abs(place - y) > gap / 8
        axes.annotate(
            str(drawn.get_label()), (x, y), (last + 0.07, place), xycoords="axes fraction", textcoords="axes fraction",
            arrowprops=lead if moved else None, color=min(str(drawn.get_color()), DARK), va="center",
            fontsize=LABEL_SIZE, annotation_clip=False,
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Increasing places moved as little as needed so that they lie at least `gap` apart, and half of it within 0 to 1.

    Neighbours that are too close become a block around the mean of where they should be, until no two blocks touch. More of
    them than there is room for stand out on both sides alike.
    """
    blocks: list[list[float]] = []  # [middle, count] each

    def half(block: list[float]) -> float:
        return gap * block[1] / 2

    for place in places:
        blocks.append([place, 1])
        while len(blocks) > 1 and blocks[-1][0] - half(blocks[-1]) < blocks[-2][0] + half(blocks[-2]) - 1e-9:
            last, before = blocks.pop(), blocks.pop()
            count = last[1] + before[1]
            blocks.append([(last[0] * last[1] + before[0] * before[1]) / count, count])
    apart = [middle + gap * (i - (count - 1) / 2) for middle, count in blocks for i in range(math.ceil(count))]
    edge = min(gap / 2, (1 - gap * (len(apart) - 1)) / 2)
    return [min(max(place, edge + gap * i), 1 - edge - gap * (len(apart) - 1 - i)) for i, place in enumerate(apart)]


def save(figure: Figure, directory: str | os.PathLike[str], name: str) -> tuple[Path, Path]:
    """Write NAME.png and NAME.svg into a folder, which is made where it is not there; their paths."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    picture, drawing = folder / f"{name}.png", folder / f"{name}.svg"
    with matplotlib.rc_context(SAVED):
        figure.savefig(picture, dpi=DPI, metadata={"Software": None})
        figure.savefig(drawing, metadata={"Date": None, "Creator": None})
    return picture, drawing
