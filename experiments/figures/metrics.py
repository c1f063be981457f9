"""Reading files of metrics: JSON whose keys are looked up one by one, so that an error names the file and the key."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

STORED = Path(__file__).resolve().parent.parent / "metrics"
"""The files that are kept with the code."""


class MetricsError(ValueError):
    """A file of metrics that is not there, not readable, or without what a figure needs; the message names file and key."""


class Metrics:
    """A file of metrics, or an object within one.

    Args:
        path: of the file.
        value: the object.
        keys: that lead to it.
    """

    def __init__(self, path: Path, value: dict[str, Any], keys: tuple[str, ...] = ()) -> None:
        self.path, self.value, self.keys = path, value, keys

    def at(self, key: str) -> Metrics:
        """The object of that key."""
        return Metrics(self.path, self._get(key, dict, "an object"), (*self.keys, key))

    def items(self) -> list[tuple[str, Metrics]]:
        """All keys and their objects, at least one."""
        if not self.value:
            raise MetricsError(f"{self.path}: {'/'.join(self.keys) or 'the file'} is empty")
        return [(key, self.at(key)) for key in self.value]

    def text(self, key: str) -> str:
        """The text of that key."""
        return self._get(key, str, "a text")

    def text_or_none(self, key: str) -> str | None:
        """The text of that key; None where it is null."""
        return self._get(key, str | None, "a text or null")

    def number(self, key: str) -> float:
        """The finite number of that key."""
        value = self._get(key, int | float, "a number")
        if isinstance(value, bool) or not math.isfinite(value):
            raise MetricsError(f"{self._where(key)} should be a finite number, is {value!r}")
        return value

    def numbers(self, key: str) -> list[float]:
        """The list of finite numbers of that key."""
        values = self._get(key, list, "a list of numbers")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise MetricsError(f"{self._where(key)} should hold finite numbers, holds {value!r}")
        return values

    def objects(self, key: str, *, empty: bool = False) -> list[Metrics]:
        """The list of objects of that key, at least one unless it may be `empty`."""
        values = self._get(key, list, "a list of objects")
        if not values and not empty:
            raise MetricsError(f"{self._where(key)} is empty")
        for value in values:
            if not isinstance(value, dict):
                raise MetricsError(f"{self._where(key)} should hold objects, holds {type(value).__name__}")
        return [Metrics(self.path, value, (*self.keys, f"{key}[{number}]")) for number, value in enumerate(values)]

    def lists(self, key: str) -> list[list[Metrics]]:
        """The list of lists of objects of that key, none of them empty."""
        values = self._get(key, list, "a list of lists of objects")
        inner = [Metrics(self.path, {f"{key}[{n}]": value}, self.keys).objects(f"{key}[{n}]") for n, value in enumerate(values)]
        if not inner:
            raise MetricsError(f"{self._where(key)} is empty")
        return inner

    def rows(self, key: str) -> list[list[float]]:
        """The list of equally long lists of finite numbers of that key."""
        values = self._get(key, list, "a list of lists of numbers")
        found = [Metrics(self.path, {str(n): row}, (*self.keys, key)).numbers(str(n)) for n, row in enumerate(values)]
        if not found or len(set(map(len, found))) != 1:
            raise MetricsError(f"{self._where(key)} should hold rows of one length")
        return found

    def series(self, key: str) -> dict[int, float]:
        """The object of that key, whose keys are whole numbers and values finite numbers, in increasing order of keys."""
        found = self.at(key)
        try:
            places = sorted((int(place), place) for place in found.value)
        except ValueError:
            raise MetricsError(f"{self._where(key)} should have whole numbers as keys, has {', '.join(found.value)}") from None
        return {number: found.number(place) for number, place in places}

    def filled(self, key: str) -> bool:
        """Whether the object of that key holds anything, and nothing that is null."""
        values = self.at(key).value.values()
        return bool(values) and None not in values

    def _get(self, key: str, kind: Any, what: str) -> Any:
        if key not in self.value:
            raise MetricsError(f"{self._where(key)} is missing; there are {', '.join(self.value) or 'no keys'}")
        value = self.value[key]
        if not isinstance(value, kind):
            raise MetricsError(f"{self._where(key)} should be {what}, is {type(value).__name__}")
        return value

    def _where(self, key: str) -> str:
        return f"{self.path}: {'/'.join((*self.keys, key))}"


def read(path: str | os.PathLike[str]) -> Metrics:
    """A file of metrics.

    Raises:
        MetricsError: it is not there, or is no JSON object.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise MetricsError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise MetricsError(f"{path}: should be a JSON object, is {type(value).__name__}")
    return Metrics(Path(path), value)


def read_text(path: str | os.PathLike[str]) -> str:
    """A file's text, with an error that names it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise MetricsError(f"{path}: no metrics can be read: {reason}") from None
