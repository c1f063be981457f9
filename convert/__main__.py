"""Checkpoints of PyTorch models to this project and back.

    python -m convert import SRC DST                       # recognised from config.json and tensor names; SRC may be on the hub
    python -m convert export SRC DST --format blackmamba   # or mamba, hf-mamba, hf-jamba, hf-mixtral
    python -m convert verify A B                           # tensor by tensor

The exit status is 0 when all went well, 1 after an error or where `verify` finds a difference, 2 after an error in the command
line. Nothing is overwritten, and nothing half-written is left.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convert.convert import Summary


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (the process's own when None); the exit status."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax starts: converting needs no accelerator
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is removed
    options = _parser().parse_args(arguments)
    # Slow imports, which --help need not wait for.
    from bm_jax.checkpoint import CheckpointError
    from bm_jax.config import ConfigError
    from bm_jax.data.errors import DataError
    from convert.archives import ArchiveError

    try:
        return {"import": _import, "export": _export, "verify": _verify}[options.command](options)
    except (ArchiveError, CheckpointError, ConfigError, OSError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
    except (MemoryError, RecursionError) as error:
        print(f"error: a file asks for more than this machine has: {type(error).__name__} {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="make a model directory of a checkpoint")
    importing.add_argument("source", help="folder with config.json, a file beside one, or owner/name on the Hugging Face hub")
    importing.add_argument("destination", type=Path, help="folder that does not exist yet")
    importing.add_argument("--revision", help="branch, tag or commit on the hub")
    importing.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="what the model computes in; bfloat16")
    importing.add_argument(
        "--expert-activation",
        choices=("released", "swiglu", "geglu", "geglu_tanh"),
        default="released",
        help="of BlackMamba's gated experts: released reproduces the released code's logits (erf GELU), swiglu is the paper's",
    )
    importing.add_argument("--tokenizer", help="tokenizer.json, its folder, or byte; the one beside config.json if not given")
    exporting = commands.add_parser("export", help="make a checkpoint of a model directory or a run")
    exporting.add_argument("source", type=Path)
    exporting.add_argument("destination", type=Path, help="folder that does not exist yet")
    exporting.add_argument("--format", required=True, help="blackmamba, mamba, hf-mamba, hf-jamba or hf-mixtral")
    exporting.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of all tensors; those they were imported in, or float32"
    )
    exporting.add_argument("--layout", help="'experts apart' or 'experts fused' where the format has both")
    comparing = commands.add_parser("verify", help="compare two checkpoints tensor by tensor")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    return parser


def _import(options: argparse.Namespace) -> int:
    from convert import import_checkpoint

    summary = import_checkpoint(
        options.source,
        options.destination,
        revision=options.revision,
        expert_activation=options.expert_activation,
        compute_dtype=options.dtype,
        tokenizer=options.tokenizer,
        progress=True,
    )
    _report(summary, options.destination)
    moe = {"moe", "mlp"} & set(summary.config.kinds)
    if summary.format == "blackmamba" and moe and options.expert_activation == "released":
        print(
            f"Experts use {summary.config.moe.activation}, as the released inference code does; the paper says swiglu "
            "(--expert-activation swiglu)."
        )
    return 0


def _export(options: argparse.Namespace) -> int:
    from convert import export_checkpoint

    summary = export_checkpoint(
        options.source, options.destination, options.format, dtype=options.dtype, layout=options.layout, progress=True
    )
    _report(summary, options.destination)
    return 0


def _report(summary: Summary, destination: Path) -> None:
    from bm_jax.model import count_parameters
    from convert.plan import preset_of
    from convert.tables import FORMATS

    count, preset = count_parameters(summary.config), preset_of(summary.config)
    print(f"{FORMATS[summary.format].title} ({summary.layout}): {destination}")
    print(f"  tensors     {summary.tensors:>15,}")
    print(f"  parameters  {summary.parameters:>15,}, all of the model's; {count.active:,} active a token")
    if preset is not None:
        print(f"  preset      {preset:>15}")


def _verify(options: argparse.Namespace) -> int:
    from convert import compare

    differences = compare(options.first, options.second)
    differing = [difference for difference in differences if not difference.identical]
    for difference in differing:
        types = "" if difference.types[0] == difference.types[1] else f" ({difference.types[0]}, {difference.types[1]})"
        print(f"{difference.name}{types}: differs by up to {difference.largest:.3g}, at {list(difference.at)}")
    print(f"{len(differences) - len(differing)} of {len(differences)} tensors are identical")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
