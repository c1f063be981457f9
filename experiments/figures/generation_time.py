"""Time to generate against length, and time of a token, as `benchmarks/latency_curve.py --json FILE` writes them.

python -m experiments.figures.generation_time
python -m experiments.figures.generation_time --metrics latency.json --output pictures
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.figures import command, style
from experiments.figures.metrics import STORED, Metrics, read


def draw(metrics: Path) -> Figure:
    """Left: seconds to each length. Right: milliseconds of a token in the interval that ends there."""
    file = read(metrics)
    curves = file.at("curves").items()
    settings = file.at("settings")
    batch, shrink = settings.number("batch"), settings.number("shrink")
    note = f"{file.text('device')}, batch {batch:g}, prompt of one token, random weights"
    note += f", sizes of the models divided by {shrink:g}" if shrink != 1 else ""
    note += "; " + _how(curves)
    active = [curve.number("active") / 1e6 for _, curve in curves]
    note += f"; active parameters: {min(active):,.3g} to {max(active):,.3g} M"
    figure, (left, right) = style.figure("Time to generate text, for models of one active size", 2, note=note, width=5.4)
    lengths: set[int] = set()
    for name, curve in curves:
        line, seconds = style.line(name), curve.series("seconds")
        lengths |= seconds.keys()
        per_token = {length: 1e3 * value for length, value in curve.series("per_token").items()}
        if not seconds or not per_token:  # it reached no length
            continue
        last = seconds[max(seconds)]
        style.plot(left, [0, *seconds], [0, *seconds.values()], line, f"{line.label} {last:.3g} s")
        style.plot(right, per_token, per_token.values(), line, f"{line.label} {per_token[max(per_token)]:.2f} ms")
    style.describe(left, "Time to a length", "tokens generated", "seconds")
    style.describe(right, "Time of the next token", "tokens generated so far", "milliseconds a token")
    style.from_zero(left)
    left.set_xticks(_ticks(lengths), [style.short(tick) for tick in _ticks(lengths)])
    style.scale(right, "x", 2, sorted(lengths))
    right.set_ylim(bottom=0)
    for axes in (left, right):
        style.label_ends(axes)
    return figure


def _how(curves: list[tuple[str, Metrics]]) -> str:
    """By what steps are taken, where it is known."""
    one = [style.line(name).label for name, curve in curves if curve.value.get("one_kernel") is True]
    others = [style.line(name).label for name, curve in curves if curve.value.get("one_kernel") is False]
    said = [f"a step of {' and '.join(one)} is one kernel"] if one else []
    return ", ".join(said + ([f"{' and '.join(others)} by XLA"] if others else []))


def _ticks(lengths: set[int]) -> list[int]:
    """Quarters of the longest length."""
    longest = max(lengths, default=4)
    return [longest * quarter // 4 for quarter in range(5)]


def main(arguments: Sequence[str] | None = None) -> None:
    command.build("generation_time", __doc__, draw, {"metrics": STORED / "generation_time.json"}, arguments)


if __name__ == "__main__":
    main()
