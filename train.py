"""Train a model: `python train.py [PRESET] [--dotted.field value ...]`; `--help` lists presets and fields."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import shlex
import signal
import sys
import traceback
from pathlib import Path

import jax
import tyro

import configs
from bm_jax.checkpoint import CheckpointError, RunDirectoryError
from bm_jax.config import Config, ConfigError
from bm_jax.model_directory import read_config
from bm_jax.processes import connect, is_first, leave
from bm_jax.train import NonFiniteError, fit


def parse(arguments: list[str]) -> Config:
    """The configuration that the command line asks for; the default preset when it names none.

    `--init-from DIR` starts from the model in DIR: its configuration, tokenizer and parameters, in the place of the preset's.
    """
    name = "default"
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    options, arguments = own_parser().parse_known_args(arguments)
    default = configs.load(name)
    if options.init_from is not None:
        default = started_from(default, options.init_from)
    presets = "\n\n".join(f"- {preset}: {configs.summary(preset)}" for preset in configs.names())
    fields = f"The fields below are those of the preset {name}. Presets:\n\n{presets}"
    description = f"{__doc__}\n\nBeside the fields: {inspect.getdoc(own_parser)}\n\n{fields}"
    return tyro.cli(Config, default=default, args=arguments, prog="train.py", description=description)


def started_from(config: Config, directory: str) -> Config:
    """`config` with the model, tokenizer and parameters of a model directory or a run."""
    data = dataclasses.replace(config.data, tokenizer=str(Path(directory) / "tokenizer.json"))
    run = dataclasses.replace(config.run, init_from=directory)
    return dataclasses.replace(config, model=read_config(directory), data=data, run=run)


def main() -> int:
    """Run; errors of the user's making end in one clear message and status 1."""
    try:
        config = parse(sys.argv[1:])
        options, _ = own_parser().parse_known_args(sys.argv[1:])
        connect(options.coordinator, options.processes, options.process, cluster=options.distributed)
        result = fit(config, resume_from=options.resume_from)
    except (ConfigError, RunDirectoryError, CheckpointError, NonFiniteError, OSError) as error:
        return failed(f"error: {with_notes(error)}")
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().splitlines()[0][:300]
        return failed(
            f"error: process {jax.process_index()} of {jax.process_count()} lost another one, or a device failed: {reason}\n"
            "Start all processes again with the same command: the run goes on from its last checkpoint."
        )
    except KeyboardInterrupt:
        failed("\nStopped; the same command goes on from the last checkpoint.")
        return 130
    except Exception:  # a defect; other processes of the run must learn of it as well
        failed(traceback.format_exc())
        return 1
    if not is_first():
        return 0
    arguments = sys.argv[1:]
    if result.finished:
        print(f'Generate: python -m bm_jax.generate {shlex.quote(config.run.directory)} --prompt "..."')
        arguments = with_steps(arguments, 2 * max(config.run.steps, result.step))
    arguments = without(arguments, "--resume-from")
    print(f"Continue: {shlex.join(['python', sys.argv[0], *arguments])}")
    # Who sends SIGTERM asks for an orderly end, and got it.
    return 0 if result.finished or result.interrupted_by == signal.SIGTERM else 130


def with_notes(error: Exception) -> str:
    """The message and what was noted with it, such as the last good step."""
    return ". ".join(part.rstrip(".") for part in (str(error), *getattr(error, "__notes__", ()))) + "."


def own_parser() -> argparse.ArgumentParser:
    """`--init-from DIR`, `--resume-from STEP` (see `bm_jax.train.fit`), and the other processes (see `bm_jax.processes`)."""
    parser = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--init-from", metavar="DIR")
    parser.add_argument("--resume-from", metavar="STEP", type=int)
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator", metavar="HOST:PORT")
    parser.add_argument("--processes", metavar="N", type=int)
    parser.add_argument("--process", metavar="I", type=int)
    return parser


def failed(message: str) -> int:
    """Say so; one of several processes ends at once."""
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        leave()
    return 1


def with_steps(arguments: list[str], steps: int) -> list[str]:
    """The command line with another `--run.steps`."""
    return [*without(arguments, "--run.steps"), "--run.steps", str(steps)]


def without(arguments: list[str], option: str) -> list[str]:
    """The command line without an option and its value."""
    return [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if option not in (before, argument) and not argument.startswith(f"{option}=")
    ]


if __name__ == "__main__":
    sys.exit(main())
