"""A model directory: a model with its tokenizer, self-contained.

config.json      {"format": "blackmamba-jax model", "version": 2, "model": fields of ModelConfig}
tokenizer.json   see `bm_jax.data.tokenizer`
params/          float32 parameters, see `bm_jax.parameter_folder`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bm_jax.config import Config, ConfigError, ModelConfig, from_dict, to_dict
from bm_jax.data.tokenizer import Tokenizer
from bm_jax.model import Parameters, init_parameters
from bm_jax.parameter_folder import load_parameters
from bm_jax.sharding import path_name

FORMAT, VERSION = "blackmamba-jax model", 2
PARAMETERS = "params"
SOURCE = "source.json"
"""What importing a checkpoint keeps for the way back, see `convert`."""
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files that come along as they are where an imported checkpoint has them: PyTorch code reads them."""


def shapes_of(parameters: Parameters) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return {path_name(path): np.shape(leaf) for path, leaf in leaves}


@lru_cache
def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return shapes_of(jax.eval_shape(lambda: init_parameters(config, jax.random.key(0))))


def check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConfigError unless parameters of these shapes by path are those of `config`."""
    expected = _expected_shapes(config)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ConfigError(
                f"the parameters are not those of the configuration: {name} should be {expected.get(name, 'absent')}, "
                f"is {found.get(name, 'absent')}"
            )


def read_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The model that a model directory or a training run's directory holds.

    Raises:
        ConfigError: neither, or its config.json is damaged or of another version.
    """
    return _read_config(Path(directory))[0]


def read_parameters(directory: str | os.PathLike[str], abstract: Any = None) -> Parameters:
    """The parameters of a model directory, or of a training run's newest checkpoint.

    With `abstract` (a pytree of `jax.ShapeDtypeStruct`) they get its structure and shardings, each device reading its own
    shards; without, they are on the first device.

    Raises:
        ConfigError: something is missing, damaged or of another shape; the message says what and where.
    """
    path = Path(directory)
    folder = parameters_of(path)
    if folder is not None:
        return load_parameters(folder, abstract)
    from bm_jax.checkpoint import restore_parameters  # slow to import

    return restore_parameters(path, abstract)


def parameters_of(directory: Path) -> Path | None:
    """The folder of a model directory's parameters; None for a training run's directory, which has checkpoints.

    Raises:
        ConfigError: neither, or something is missing or damaged.
    """
    if _read_config(directory)[1]:
        return None
    if not (directory / PARAMETERS).is_dir():
        raise ConfigError(f"{directory} has no {PARAMETERS} folder: the model directory is incomplete")
    return directory / PARAMETERS


def bring_companions(source: Path, destination: Path, names: Sequence[str] = COMPANIONS) -> None:
    """Copy those of these files that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def write_description(directory: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """What a model directory holds beside the parameters."""
    tokenizer.save(directory)
    wrapped = {"format": FORMAT, "version": VERSION, "model": to_dict(config)}
    (directory / "config.json").write_text(json.dumps(wrapped, indent=2) + "\n", encoding="utf-8")


def _read_config(path: Path) -> tuple[ModelConfig, bool]:
    """The model that a directory holds, and whether it is a training run's."""
    file = path / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "no config.json in it" if path.is_dir() else "no such directory"
        raise ConfigError(f"{path} is neither a model nor a run directory: {what}") from None
    except NotADirectoryError:
        raise ConfigError(f"{path} is a file; give the directory of a model or of a training run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is damaged: it is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a JSON object, found {type(values).__name__}")
    if "format" not in values:
        return from_dict(Config, values, where=f"{file}: Config").model, True
    if values["format"] != FORMAT or values.get("version") != VERSION:
        raise ConfigError(
            f"{file} has format {values['format']!r} version {values.get('version')!r}; this program reads "
            f"{FORMAT!r} version {VERSION}"
        )
    return from_dict(ModelConfig, values.get("model"), where=f"{file}: model"), False
