"""The selective scan's kernels against their floors, forward and forward + backward.

    python -m experiments.figures.scan_floors
    python -m experiments.figures.scan_floors --metrics LOG      # what `python benchmarks/selective_scan.py` printed

The metrics are the log itself. Where it has a pass of an implementation at a shape several times, the first counts; mamba_ssm's
times are a file of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import command, style
from experiments.figures.metrics import STORED, Metrics, MetricsError, read
from experiments.figures.scan_log import Row, read_scan_log

LOG = STORED.parent.parent / "benchmarks" / "results" / "selective_scan_h100.log"
PASSES = ("forward", "forward + backward")
KERNELS = ("pallas_gpu", "triton_gpu")
PEER = "mamba_ssm"


def draw(metrics: Path, peer: Path) -> Figure:
    """A panel a pass: a row for each shape that the peer was timed at, times as multiples of the floor."""
    log, other = read_scan_log(metrics), read(peer)
    times = first_rows(log.rows)
    shapes = [shape for shape, _ in other.at("milliseconds").items() if all((shape, of, KERNELS[0]) in times for of in PASSES)]
    if not shapes:
        raise MetricsError(f"{metrics}: {KERNELS[0]} has no row of both passes at a shape of {peer}: milliseconds")
    row = times[shapes[0], PASSES[0], KERNELS[0]]
    note = (
        f"{', '.join(log.devices)}, {row.dtype}, {row.states} states; the floor is the longer of one exponential for each "
        f"token, channel and state (two with the backward pass)\nand all inputs and outputs moved once, at speeds measured in "
        f"the run of {KERNELS[0]}. {' and '.join(KERNELS)} are this library's; {PEER}, Mamba's own CUDA kernel, was timed on "
        "another day,\non a card of the same kind."
    )
    figure, axes = style.figure("Time of the selective scan, in multiples of its floor", 2, note=note, width=5.6, height=4.3)
    for panel, of in zip(axes, PASSES, strict=True):
        draw_pass(panel, of, shapes, times, other, left=panel is axes[0])
    return figure


def first_rows(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    """By shape, pass and implementation, the first row of each."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        found.setdefault((row.shape, row.of, row.implementation), row)
    return found


def draw_pass(
    axes: Axes, of: str, shapes: Sequence[str], times: dict[tuple[str, str, str], Row], peer: Metrics, *, left: bool
) -> None:
    """Markers on one line a shape, milliseconds above them."""
    lines = {name: style.other_line(i, name) for i, name in enumerate((*KERNELS, PEER))}
    for place, shape in enumerate(shapes):
        floor = times[shape, of, KERNELS[0]].floor
        taken = {name: times[shape, of, name].milliseconds for name in KERNELS if (shape, of, name) in times}
        taken[PEER] = peer.at("milliseconds").at(shape).number(of)
        axes.plot([1, max(taken.values()) / floor], [place, place], color="0.85", linewidth=1, zorder=1, label=f"_{shape}")
        for name, milliseconds in taken.items():
            at = milliseconds / floor
            label = f"_{name}" if place else name
            axes.plot([at], [place], linestyle="none", zorder=3, label=label, **style.marker(lines[name]))
            below = name == KERNELS[1]  # kernels that are as fast would write over each other
            axes.annotate(
                _short(milliseconds), (at, place), (0, -6 if below else 5), textcoords="offset points", ha="center",
                va="top" if below else "bottom", fontsize=8, color=style.DARK,
            )  # fmt: skip
    labels = []
    for shape in shapes:
        batch, length, channels = (int(n) for n in shape.split(","))
        labels.append(f"{batch} x {length:,} x {channels:,}\nfloor {_short(times[shape, of, KERNELS[0]].floor)} ms")
    axes.set_yticks(range(len(shapes)), labels)
    axes.set_ylim(len(shapes) - 0.5, -1.2)
    axes.axvline(1, color="0", linewidth=1, linestyle=(0, (2, 2)))
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    style.scale(axes, "x", 2, [1, 2, 4, 8, 16], ["floor", "2x", "4x", "8x", "16x"])
    axes.legend(loc="upper center", ncols=3, frameon=False, fontsize=style.LABEL_SIZE, handletextpad=0.1, columnspacing=1.2)
    style.describe(axes, of, "time, in multiples of the floor; numbers: ms", "sequences x tokens x channels" if left else "")


def _short(milliseconds: float) -> str:
    """As many digits as the log has below 1, three above."""
    return f"{milliseconds:.3f}" if milliseconds < 1 else f"{milliseconds:#.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    command.build("scan_floors", __doc__, draw, {"metrics": LOG, "peer": STORED / "mamba_ssm.json"}, arguments)


if __name__ == "__main__":
    main()
