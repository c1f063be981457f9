"""Train a model: `python train.py [PRESET] [--dotted.field value ...]`; `--help` lists presets and fields."""

from __future__ import annotations

import sys

import tyro

import configs
from bm_jax.checkpoint import CheckpointError, RunDirectoryError
from bm_jax.config import Config, ConfigError
from bm_jax.train import NonFiniteError, fit


def parse(arguments: list[str]) -> Config:
    """The configuration that the command line asks for; the default preset when it names none."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["default", *arguments]
    presets = {name: (configs.summary(name), configs.load(name)) for name in configs.names()}
    return tyro.extras.overridable_config_cli(presets, args=arguments, prog="train.py", description=__doc__)


def main() -> int:
    """Run; errors of the user's making end in one clear message and status 1."""
    try:
        result = fit(parse(sys.argv[1:]))
    except (ConfigError, RunDirectoryError, CheckpointError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if result.finished else 130


if __name__ == "__main__":
    sys.exit(main())
