"""Metrics of a run: `metrics.jsonl`, TensorBoard, the progress bar, and the floating-point operations of a model."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar
from tqdm import TqdmWarning

from bm_jax.config import GATED_ACTIVATIONS, ModelConfig
from bm_jax.data.shards import naming

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # where Jupyter has no ipywidgets the bar is drawn in text
    from tqdm.auto import tqdm

FILE = "metrics.jsonl"
EVENTS: Any = event_pb2
NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

PEAK_FLOPS = {
    # Dense bfloat16 operations a second of one JAX device (float16 where the chip has no bfloat16: T4, V100), from the
    # makers' data sheets, by the words of `device.device_kind`; the first entry whose words all occur counts.
    # Of TPU v2, v3 and 7x one device is half a chip.
    "tpu v2": 23e12,
    "tpu v3": 61.5e12,
    "tpu v4 lite": 137e12,
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v5p": 459e12,
    "tpu v6 lite": 918e12,
    "tpu v6e": 918e12,
    "tpu7x": 1153.5e12,
    "h100 pcie": 756e12,
    "h100 nvl": 835e12,
    "h100": 989e12,
    "h200 nvl": 835e12,
    "h200": 989e12,
    "gh200": 989e12,
    "b200": 2250e12,
    "a100": 312e12,
    "l4": 121e12,
    "t4": 65e12,
    "v100": 125e12,
}


def device_peak_flops(device: Any) -> float | None:
    """Peak dense bfloat16 operations a second of a `jax.Device`; None when unknown, as for a CPU."""
    kind = set(str(device.device_kind).lower().replace("-", " ").split())
    return next((flops for words, flops in PEAK_FLOPS.items() if kind.issuperset(words.split())), None)


def model_flops_per_token(config: ModelConfig, sequence_length: int, *, training: bool = True) -> float:
    """Floating-point operations the model needs for one token of a window; recomputation is not counted.

    Forward, by kind, with a product of `[m, k]` and `[k, n]` counted as 2 m k n and elementwise work outside the scan
    left out:

    - mamba: 6 E M (in and out projections) + 2 E K (convolution) + E (11 N + 4 R + 1) (x and dt projections and scan,
      as in Zyphra's cookbook)
    - attention: 4 M D (heads + kv_heads) + 4 D heads S, where S = L / 2 tokens are seen on average, or
      W - W^2 / (2 L) with a sliding window W < L
    - mlp: 4 M F, or 6 M F when gated
    - moe: 2 M X (router) + top_k times an mlp
    - unembedding: 2 M V

    Training is three times that: the backward pass has two products for each one of the forward pass.
    """
    M, E, L = config.width, config.inner_width, sequence_length
    mamba, attention, moe = config.mamba, config.attention, config.moe

    def mlp(width: int, activation: str) -> float:
        return (6 if activation in GATED_ACTIVATIONS else 4) * M * width

    window = min(attention.window or L, L)
    seen = window - window**2 / (2 * L)
    forward = {
        "mamba": 6 * E * M + 2 * E * mamba.conv_width + E * (11 * mamba.state_size + 4 * config.dt_rank + 1),
        "attention": (4 * M * (attention.heads + attention.kv_heads) + 4 * attention.heads * seen) * config.head_size,
        "mlp": mlp(config.mlp.width, config.mlp.activation),
        "moe": 2 * M * moe.experts + moe.top_k * mlp(moe.width, moe.activation),
    }
    layers = config.repeats * sum(forward[kind] for kind in config.kinds)
    return (3 if training else 1) * (layers + 2 * M * config.vocab_size)


class MetricsWriter:
    """Appends metrics to `directory/metrics.jsonl` and to TensorBoard in `directory/tensorboard`. A context manager.

    A run that goes on from step `resume_step` drops what was written after it, so that the files read as if the run had
    never stopped. Each row reaches the operating system at once: it survives the end of the process, not a power cut.
    """

    def __init__(self, directory: str | os.PathLike, resume_step: int = 0):
        self.path = Path(directory) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _rewrite(self.path, [row for row in _read_rows(self.path) if row["step"] <= resume_step])
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._tensorboard = EventFile(self.path.parent / "tensorboard", resume_step + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.close()
        except OSError:  # a full disk, which a row that was written before has met already
            if kind is None:
                raise

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one row. Values are numbers, or arrays or nested lists of them (each element a TensorBoard scalar)."""
        row = {name: _plain(value) for name, value in metrics.items()}
        with naming(self.path):
            self._file.write(_line({"step": int(step), **row}))
            self._file.flush()
        for name, value in row.items():
            for index, element in np.ndenumerate(np.asarray(value)):
                if isinstance(element, int | float | np.number):
                    self._tensorboard.write("/".join([name, *map(str, index)]), float(element), step)

    def sync(self) -> None:
        """Put the rows written so far on the disk, where they survive a power cut."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`: the run goes on from there."""
        directory = self.path.parent
        self.close()
        self.__init__(directory, step)

    def close(self) -> None:
        """Flush and close both files."""
        try:
            self._file.close()
        finally:
            self._tensorboard.close()


class EventFile:
    """Scalars for TensorBoard, each in the file once it is written.

    tensorboardX's `SummaryWriter` hands them to a thread, whose end (a clock that jumps, a full disk) stops the run for ever.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        """What other files of the folder hold from `first_step` on does not count any more."""
        directory.mkdir(parents=True, exist_ok=True)
        own = f".{os.getpid()}.{len(list(directory.iterdir()))}"  # two starts in one second must not share a file
        self._writer = EventsWriter(str(directory / "events"), own)
        start = EVENTS.SessionLog(status=EVENTS.SessionLog.START)
        self._writer.write_event(EVENTS.Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, name: str, value: float, step: int) -> None:
        """One scalar."""
        self._writer.write_event(EVENTS.Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of `directory/metrics.jsonl`, oldest first; a half-written last line is left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return _read_rows(Path(directory) / FILE)


def _plain(value: Any) -> Any:
    """`value` as Python numbers and lists."""
    if isinstance(value, str | None):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else np.asarray(value).tolist()


def _line(row: Mapping[str, Any]) -> str:
    """One line of valid JSON: a number that JSON lacks is written as the string `nan`, `inf` or `-inf`."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(item) for item in value]
        if isinstance(value, Mapping):
            return {name: finite(item) for name, item in value.items()}
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(row), allow_nan=False) + "\n"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(item) for item in value]
        return NONFINITE.get(value, value) if isinstance(value, str) else value

    rows: dict[int, dict[str, Any]] = {}
    for count, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            row = {name: number(value) for name, value in row.items()} | {"step": int(row["step"])}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            logging.getLogger(__name__).warning("line %d of %s is damaged and left out", count, path)
            continue
        rows[row["step"]] = row  # of a step that is there twice, what was written last
    return list(rows.values())


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the file by these rows, all or nothing."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(map(_line, rows))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class ProgressBar:
    """Progress of a training run: steps, loss, tokens a second, time left. A context manager.

    A bar in a terminal or notebook; elsewhere (a log file) a line at most every `interval` seconds, and a last one.
    """

    def __init__(self, total: int, initial: int = 0, *, file: TextIO | None = None, interval: float = 10.0):
        self._file = file or sys.stderr
        self._total, self._step, self._interval = total, initial, interval
        self._shown: dict[str, str] = {}
        self._printed, self._began = time.monotonic(), None
        interactive = self._file.isatty() or (file is None and "ipykernel" in sys.modules)
        self._bar = None
        if interactive:
            self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, file=file)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Show that `step` is done; a value left out stays as last given."""
        if loss is not None:
            self._shown["loss"] = f"{loss:.4f}"
        if tokens_per_second is not None:
            self._shown["tokens/s"] = f"{tokens_per_second:,.0f}"
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        if self._began is None:  # the first step compiles: the rate counts from its end
            self._began = (step, time.monotonic())
        if self._bar is None and time.monotonic() - self._printed >= self._interval:
            self._print_line()

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            print(text, file=self._file, flush=True)
        else:
            tqdm.write(text, file=self._file)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.close()
        elif self._began is not None:
            self._print_line()

    def _print_line(self) -> None:
        assert self._began is not None
        self._printed, (step, began) = time.monotonic(), self._began
        parts = [f"step {self._step}/{self._total}", *(f"{name} {value}" for name, value in self._shown.items())]
        if self._step > step:
            left = (self._total - self._step) * (self._printed - began) / (self._step - step)
            parts.append(f"{tqdm.format_interval(left)} left")
        print("  ".join(parts), file=self._file, flush=True)
