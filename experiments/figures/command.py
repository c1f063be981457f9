"""What the commands of all figures share: arguments, messages, and where pictures go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.figures import style
from experiments.figures.metrics import MetricsError

PICTURES = Path(__file__).resolve().parent.parent / "pictures"


def build(
    name: str,
    description: str | None,
    draw: Callable[..., Figure],
    inputs: Mapping[str, Path],
    arguments: Sequence[str] | None = None,
) -> None:
    """Draw a figure from the files that the command line names, and write it as PNG and SVG.

    Args:
        name: of the figure, and of its files without their endings.
        description: for `--help`.
        draw: takes the paths of its input files by name.
        inputs: names of the files, each an option, and where they are if it is not given.
        arguments: of the command line; those of the process if None.

    Raises:
        SystemExit: a file is not as it should be, or none can be written; the message names it, and the key.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.figures.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, path in inputs.items():
        parser.add_argument(
            f"--{option}", type=Path, default=path, help=f"the file {path.name} of this repository if not given"
        )
    parser.add_argument("--output", type=Path, default=PICTURES, help="folder of the pictures")
    values = vars(parser.parse_args(arguments))
    try:
        figure = draw(**{option: values[option] for option in inputs})
    except MetricsError as error:
        raise SystemExit(f"{name}: {error}") from None
    try:
        paths = style.save(figure, values["output"], name)
    except OSError as error:
        raise SystemExit(f"{name}: {error.filename}: {error.strerror}; give another --output") from None
    for path in paths:
        print(path)
