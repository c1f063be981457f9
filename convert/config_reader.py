"""Reading the fields of a config.json with their types checked, and saying what a format cannot express."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bm_jax.config import ConfigError

Fields = Mapping[str, Any]
MOST_LAYERS = 10_000


class Reader:
    """Fields of a config.json, taken one by one with their types checked."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    def get(self, name: str, default: Any) -> Any:
        """The field; where it is null or missing, the default."""
        value = self.fields.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ConfigError(f"config.json: {name} must be a whole number from {least} to {most}, got {short(value)}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e30 < value < 1e30:
            raise ConfigError(f"config.json: {name} must be a number, got {short(value)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {name} must be true or false, got {short(value)}")
        return value

    def object(self, name: str) -> Reader:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ConfigError(f"config.json: {name} must be an object, got {short(value)}")
        return Reader(value)

    def must_be(self, name: str, wanted: Any) -> None:
        value = self.fields.get(name, wanted)
        if value != wanted:
            raise ConfigError(f"config.json: {name} is {short(value)}; only {wanted!r} can be converted")


def short(value: Any) -> str:
    """A value from a file, for a message."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of more than 30 digits"
    return text if len(text) < 80 else f"{text[:80]}..."


def period(kinds: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The shortest run of layers that repeats to give all of them, and how often."""
    for length in range(1, len(kinds) + 1):
        if len(kinds) % length == 0 and kinds == kinds[:length] * (len(kinds) // length):
            return kinds[:length], len(kinds) // length
    raise ConfigError("a model has at least one layer")


def refuse(format: str, problems: Mapping[str, bool]) -> None:
    """Raise ConfigError naming the problems that are there."""
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ConfigError(f"{format} cannot express this model: it has {', '.join(found)}")
