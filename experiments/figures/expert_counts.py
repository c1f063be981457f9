"""What more experts bring, and what balances them: BlackMamba's variants of `python -m experiments.learning`.

    python -m experiments.figures.expert_counts
    python -m experiments.figures.expert_counts --metrics learning.json --output pictures

Left: held-out bits per byte at the end against the number of experts, dense Mamba as the line to beat. Right: learning curves
of three routers: Sinkhorn, switch with its load-balancing loss, and switch without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.figures import command, learning_runs, style
from experiments.figures.metrics import STORED

EXPERTS = {
    1: "blackmamba_1_expert",
    4: "blackmamba_4_experts",
    8: "blackmamba",
    16: "blackmamba_16_experts",
    32: "blackmamba_32_experts",
}
ROUTERS = {
    "Sinkhorn": "blackmamba",
    "switch with loss": "blackmamba_switch",
    "switch without loss": "blackmamba_unbalanced",
}


def draw(metrics: Path) -> Figure:
    """The two panels."""
    runs = learning_runs.read_runs(metrics)
    used = [run for run in runs if run.system in (*EXPERTS.values(), *ROUTERS.values(), "mamba")]
    title = "BlackMamba with more experts, and with other routers"
    figure, (left, right) = style.figure(title, 2, note=learning_runs.note(used), width=5.4)
    ends = {n: learning_runs.mean(learning_runs.of(runs, name, metrics))[-1].bits for n, name in EXPERTS.items()}
    dense = learning_runs.mean(learning_runs.of(runs, "mamba", metrics))[-1].bits
    style.plot(left, ends, ends.values(), style.line("blackmamba"), f"BlackMamba {ends[max(ends)]:.3f}")
    style.plot(left, [min(ends), max(ends)], [dense, dense], style.line("mamba"), f"Mamba, dense {dense:.3f}")
    style.describe(left, "At the end, by number of experts", "experts", "held-out bits per byte")
    style.scale(left, "x", 2, list(ends))
    for number, (label, name) in enumerate(ROUTERS.items()):
        curve = learning_runs.mean(learning_runs.of(runs, name, metrics))
        shown = curve[len(curve) // 5 :]
        line = style.other_line(number, f"{label} {curve[-1].bits:.3f}")
        style.plot(right, [point.steps for point in shown], [point.bits for point in shown], line)
    style.describe(right, "8 experts, by router", "optimizer steps", "held-out bits per byte")
    for axes in (left, right):
        style.label_ends(axes)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    command.build("expert_counts", __doc__, draw, {"metrics": STORED / "learning.json"}, arguments)


if __name__ == "__main__":
    main()
