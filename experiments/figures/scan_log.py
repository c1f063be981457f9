"""The rows of a log of `benchmarks/selective_scan.py`: which pass of which implementation took how long, and its floor."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from experiments.figures.metrics import MetricsError, read_text

SHAPE = re.compile(r"(\d+,\d+,\d+) x (\d+) states, (\w+)")
ROW = re.compile(r"  (forward(?: \+ backward)?) +(\w+) +([\d.]+) ms \([^)]*\) +([\d.]+)% of floor")
DEVICE = re.compile(r"(\S.*): [\d.e+]+ exponentials and [\d.e+]+ bytes a second")


class Row(NamedTuple):
    """One pass of one implementation."""

    shape: str
    """B,L,E: sequences, tokens, channels."""
    states: int
    dtype: str
    of: str
    """The pass: forward, or forward + backward."""
    implementation: str
    milliseconds: float
    floor: float
    """Milliseconds that exponentials or bytes take at the least, by the ceilings measured in the same run."""


class ScanLog(NamedTuple):
    """A log's devices and rows, in its order."""

    devices: tuple[str, ...]
    rows: tuple[Row, ...]


def read_scan_log(path: str | os.PathLike[str]) -> ScanLog:
    """Read a log, which may hold several runs; lines of other programs are passed over.

    Raises:
        MetricsError: it is not there, or has no device or no row.
    """
    devices: dict[str, None] = {}
    rows: list[Row] = []
    shape: re.Match[str] | None = None
    for text in read_text(path).splitlines():
        if device := DEVICE.fullmatch(text):
            devices[device[1]] = None
        elif found := SHAPE.fullmatch(text):
            shape = found
        elif not text.startswith("  "):
            shape = None  # another program's
        elif shape and (row := ROW.match(text)):
            milliseconds, share = float(row[3]), float(row[4]) / 100
            if not milliseconds or not share:
                raise MetricsError(f"{path}: a row without a time or a floor: {text.strip()}")
            rows.append(Row(shape[1], int(shape[2]), shape[3], row[1], row[2], milliseconds, milliseconds * share))
    for what, found in (("device line", devices), ("row of a pass", rows)):
        if not found:
            raise MetricsError(f"{path}: no {what} as benchmarks/selective_scan.py prints it")
    return ScanLog(tuple(devices), tuple(rows))
