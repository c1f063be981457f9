"""Memory and time against the length of the context, as `benchmarks/context_length.py --json FILE` writes them.

python -m experiments.figures.context_length
python -m experiments.figures.context_length --metrics context.json --output pictures
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import command, style
from experiments.figures.metrics import STORED, Metrics, MetricsError, read

MOST_TICKS = 7
PREFIXES = {2**30: "GiB", 2**20: "MiB", 2**10: "KiB", 1: "B"}


def draw(metrics: Path) -> Figure:
    """Left: memory while reading. Middle: bytes of what is kept of the text. Right: time to read it."""
    file = read(metrics)
    curves, settings = file.at("curves").items(), file.at("settings")
    shrink = settings.number("shrink")
    device = "a CPU" if file.text("device") == "cpu" else file.text("device")
    title = f"Reading a long context on {device}" + (f", models shrunk {shrink:g} times" if shrink != 1 else "")
    figure, (left, middle, right) = style.figure(title, 3, note=note(curves, settings), width=5.2, height=4.2)
    style.describe(left, "Memory while reading, weights included", "tokens read", "")
    style.describe(middle, "State that is kept of the text", "tokens read", "")
    style.describe(right, "Time to read", "tokens read", "")
    draw_panel(left, curves, "program", size_text, 2)
    draw_panel(middle, curves, "state", size_text, 2)
    draw_panel(right, curves, "seconds", seconds_text, 10)
    return figure


def note(curves: Sequence[tuple[str, Metrics]], settings: Metrics) -> str:
    """What was run, and why lines end."""
    active = [curve.number("active") / 1e6 for _, curve in curves]
    lines = [
        f"One sequence of random ids, random weights, read in pieces of {settings.number('piece'):g} tokens "
        f"({settings.number('attention_piece'):g} with attention); active parameters: {min(active):,.3g} to {max(active):,.3g} "
        "M; left: by the compiler's count of what reading a piece needs."
    ]
    peaks = [
        (name, max(curve.at("points").series("peak").values())) for name, curve in curves if curve.at("points").filled("peak")
    ]
    if peaks:
        each = ", ".join(f"{style.line(name).label} {size_text(peak)}" for name, peak in peaks)
        lines.append(f"The most that the device's allocator gave out, compiling included: {each}.")
    for name, curve in curves:
        stopped = curve.text_or_none("stopped")
        lines += [f"{style.line(name).label}: {stopped}."] if stopped else []
    return "\n".join(lines)


def draw_panel(axes: Axes, curves: Sequence[tuple[str, Metrics]], key: str, text: Callable[[float], str], base: int) -> None:
    """A line a model, both axes logarithmic; ticks of the upright one are powers of `base`, or some of them.

    Labels have the last value, and its length where others go on.
    """
    everything: list[float] = []
    lengths = {length for _, curve in curves for length in curve.at("points").series(key)}
    for name, curve in curves:
        values, line = curve.at("points").series(key), style.line(name)
        if any(value <= 0 for value in (*values, *values.values())):
            raise MetricsError(f"{curve.path}: {'/'.join((*curve.keys, 'points', key))} should hold numbers above 0")
        everything += values.values()
        if values:
            last = max(values)
            early = f" at {style.short(last)}" if last < max(lengths) else ""
            style.plot(axes, values, values.values(), line, f"{line.label} {text(values[last])}{early}")
    if not lengths:
        raise MetricsError(f"{curves[0][1].path}: no model of curves has a length in points/{key}")
    style.scale(axes, "x", 2, thinned([2**i for i in powers(min(lengths), max(lengths), 2)]))
    ticks = thinned([float(base) ** i for i in powers(min(everything), max(everything), base)])
    style.scale(axes, "y", base, ticks, [text(tick) for tick in ticks])
    least, most = min(*ticks, *everything), max(*ticks, *everything)
    margin = max((most / least) ** 0.06, 1.2)
    axes.set_ylim(least / margin, most * margin)
    style.label_ends(axes)


def powers(least: float, most: float, base: int) -> range:
    """Exponents of the powers of `base` from the one at or below the least value to the one at or above the most."""
    return range(math.floor(math.log(least, base) + 1e-9), math.ceil(math.log(most, base) - 1e-9) + 1)


def thinned(ticks: Sequence[float]) -> Sequence[float]:
    """Every second, third, ... of them, so that there are at most `MOST_TICKS`."""
    return ticks[:: -(-len(ticks) // MOST_TICKS)]


def size_text(size: float) -> str:
    """Bytes with a unit."""
    unit = next(unit for unit in PREFIXES if size >= unit or unit == 1)
    return f"{size / unit:.3g} {PREFIXES[unit]}"


def seconds_text(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    command.build("context_length", __doc__, draw, {"metrics": STORED / "context_length.json"}, arguments)


if __name__ == "__main__":
    main()
