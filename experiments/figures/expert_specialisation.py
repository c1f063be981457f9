"""What each expert takes: the tokens that tell most of it, by layer, as `python -m experiments.expert_tokens` finds them.

    python -m experiments.figures.expert_specialisation
    python -m experiments.figures.expert_specialisation --metrics expert_tokens.json --output pictures

Under an expert's share of the text are the tokens that it gets most beyond their share of the text, the most telling first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.figures import command, style
from experiments.figures.metrics import STORED, MetricsError, read

SHOWN = 5
EXPERTS = 8
"""More have no room."""
LONGEST = 14
"""Characters of a token that are shown."""
SIGNS = {" ": "␣", "\n": "↵", "\t": "→"}


def draw(metrics: Path) -> Figure:
    """A row a layer, a column an expert; cells are shaded by the expert's share of the text."""
    file = read(metrics)
    layers = file.lists("layers")
    most = max(len(layer) for layer in layers)
    columns = min(most, EXPERTS)
    note = f"{file.text('model')}; {file.number('tokens'):,.0f} tokens of {file.text('text')}, inference routing; "
    note += "percent of all tokens, then those that tell most of the expert\n␣ a space, ↵ a line break, → a tab" + (
        f"; the first {columns} of {most} experts" if most > columns else ""
    )
    height = 0.9 + 1.1 * len(layers)
    figure, (axes,) = style.figure("What each expert takes", note=note, width=1.2 * columns + 0.6, height=height)
    for row, layer in enumerate(layers):
        for column, expert in enumerate(layer[:columns]):
            share, top = expert.number("share"), expert.objects("top", empty=True)
            if not 0 <= share <= 1:
                raise MetricsError(f"{metrics}: a share should lie in 0 to 1, is {share}")
            grey = f"{1 - 0.35 * min(1.0, share * len(layer) / 6):.3f}"
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=grey, edgecolor="white", linewidth=2))
            axes.text(
                column + 0.06,
                row + 0.14,
                "<1%" if share < 0.005 else f"{100 * share:.0f}%",
                fontsize=8,
                fontweight="bold",
                va="center",
            )
            for place, token in enumerate(top[:SHOWN]):
                text = "".join(SIGNS.get(sign, sign if sign.isprintable() else "�") for sign in token.text("text"))
                shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
                axes.text(column + 0.06, row + 0.3 + 0.15 * place, shown, fontsize=8, va="center", parse_math=False)
    style.describe(axes, "", "expert", "MoE layer")
    axes.set_xlim(0, columns)
    axes.set_ylim(len(layers), 0)
    axes.set_xticks([column + 0.5 for column in range(columns)], [str(column) for column in range(columns)])
    axes.set_yticks([row + 0.5 for row in range(len(layers))], [str(row) for row in range(len(layers))])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(visible=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    command.build("expert_specialisation", __doc__, draw, {"metrics": STORED / "expert_tokens.json"}, arguments)


if __name__ == "__main__":
    main()
