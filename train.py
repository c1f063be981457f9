"""Train a model: `python train.py [PRESET] [--dotted.field value ...]`; `--help` lists presets and fields."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import tyro

import configs
from bm_jax.checkpoint import CheckpointError, RunDirectoryError
from bm_jax.config import Config, ConfigError
from bm_jax.model_directory import read_config
from bm_jax.train import NonFiniteError, fit


def parse(arguments: list[str]) -> Config:
    """The configuration that the command line asks for; the default preset when it names none.

    `--init-from DIR` starts from the model in DIR: its configuration, tokenizer and parameters, in the place of the preset's.
    """
    name = "default"
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    start = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    start.add_argument("--init-from", metavar="DIR")
    options, arguments = start.parse_known_args(arguments)
    default = configs.load(name)
    if options.init_from is not None:
        default = started_from(default, options.init_from)
    presets = "\n\n".join(f"- {preset}: {configs.summary(preset)}" for preset in configs.names())
    description = f"{__doc__}\n\nThe fields below are those of the preset {name}. Presets:\n\n{presets}"
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
        result = fit(config)
    except (ConfigError, RunDirectoryError, CheckpointError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error}. Checkpoints already saved are intact; run the same command again once this is fixed.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    arguments = sys.argv[1:]
    if result.finished:
        print(f'Generate: python -m bm_jax.generate {shlex.quote(config.run.directory)} --prompt "..."')
        arguments = with_steps(arguments, 2 * max(config.run.steps, result.step))
    print(f"Continue: {shlex.join(['python', sys.argv[0], *arguments])}")
    return 0 if result.finished else 130


def with_steps(arguments: list[str], steps: int) -> list[str]:
    """The command line with another `--run.steps`."""
    kept = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument != "--run.steps" and before != "--run.steps" and not argument.startswith("--run.steps="):
            kept.append(argument)
    return [*kept, "--run.steps", str(steps)]


if __name__ == "__main__":
    sys.exit(main())
