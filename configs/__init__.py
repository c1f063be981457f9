"""Presets: one module each, holding one value `config` and a first docstring line that says what it is."""

from __future__ import annotations

import importlib
import pkgutil

from bm_jax.config import Config, ConfigError, near_miss


def names() -> list[str]:
    """Every preset's name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Config:
    """The preset of that name; raises ConfigError naming near misses when there is none."""
    if name not in names():
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(names())}{near_miss(name, names())}")
    return importlib.import_module(f"configs.{name}").config


def summary(name: str) -> str:
    """What a preset is, in one line."""
    load(name)
    return (importlib.import_module(f"configs.{name}").__doc__ or "").strip().splitlines()[0]
