"""Memory and time against the length of what was read, up to a million tokens: four models of one active size.

    XLA_PYTHON_CLIENT_MEM_FRACTION=.95 python benchmarks/context_length.py --json context.json      # one GPU
    python -m experiments.figures.context_length --metrics context.json              # draws it
    python benchmarks/context_length.py --presets mamba --json context.json          # one more model, added to that file
    python benchmarks/context_length.py --shrink 16 --lengths 1024 4096 --attention-lengths 1024 4096   # a CPU

BlackMamba 340M/1.5B, Mamba, Jamba and a Transformer with random weights in the compute dtype of their presets read random ids
as `LanguageModel.prefill` does: piece after piece through `bm_jax.state.read_on`, from nothing to each length, one sequence.
Each model has a process of its own, so that the peak of the device's memory is its own, too. Models without attention read all
lengths by one program; attention has room for keys and values of the whole length, and a program for each length. The parts of
`LanguageModel` beside it, the unembedding of the last token among them, take no part.

Three sizes are written for each length, in bytes: `state`, of the arrays of the `State` that is kept, exact everywhere;
`program`, by the compiler's count what the program that reads a piece needs, with the parameters and the state; and `peak`, the
most that the device's allocator gave out so far, null where it does not say, as on a CPU. The last counts what making the
parameters and compiling took, too, and cannot be set back: it is a check, and `program` is what is drawn.

A model stops at a length that does not fit, and at one during which its `--budget` of seconds is spent; `stopped` says why.
Time is of reading alone, the median of `--repeats` readings, of fewer where one takes longer than `LONG` seconds.

`--shrink N` divides the models' sizes as in latency_curve.py.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from harness import machine, usable_cores
from latency_curve import shrunk

import configs
from bm_jax import state
from bm_jax.config import ModelConfig
from bm_jax.language_model import inference_parameters
from bm_jax.model import Parameters, count_parameters, init_parameters, unrolled

LONG = 3.0
STRIDE = 16
"""Pieces between two looks at the clock."""


@dataclasses.dataclass(frozen=True)
class Options:
    presets: tuple[str, ...] = ("blackmamba_340m_1p5b", "mamba", "jamba", "transformer")
    lengths: tuple[int, ...] = tuple(1024 << i for i in range(11))
    """Tokens read by models without attention, increasing multiples of `piece`."""
    attention_lengths: tuple[int, ...] = tuple(1024 << i for i in range(0, 11, 2))
    """The same of models with attention, multiples of `attention_piece`: fewer, as each needs a program of its own."""
    piece: int = 1024
    """Tokens read at once by models without attention."""
    attention_piece: int = 256
    """The same of models with attention, whose scores need memory for this times the length."""
    repeats: int = 3
    budget: float | None = 300
    """Seconds of reading for each model; None for no limit."""
    shrink: int = 1
    """Divide the models' sizes by this."""
    json: Path | None = None
    """Written after each model. What it holds of other models, from the same device and settings, is kept."""


class Point(NamedTuple):
    """What one length took."""

    seconds: float
    state: int
    program: int
    peak: int | None


class Curve(NamedTuple):
    """One model's."""

    total: int
    active: int
    """Parameters that one token passes through."""
    size: int
    """Bytes of the parameters, in the types that inference uses."""
    points: dict[int, Point]
    """By tokens read."""
    stopped: str | None
    """Why there are fewer lengths than were asked for."""
    device: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: an object of lengths for each quantity."""
        columns = {f: {n: getattr(point, f) for n, point in self.points.items()} for f in Point._fields}
        return {name: value for name, value in self._asdict().items() if name != "device"} | {"points": columns}


def main(options: Options) -> None:
    for lengths, piece in ((options.lengths, options.piece), (options.attention_lengths, options.attention_piece)):
        if not lengths or list(lengths) != sorted(set(lengths)) or any(n < 1 or n % piece for n in lengths):
            raise SystemExit(f"lengths must be increasing multiples of the piece, {piece}, got {lengths}")
    settings = {name: value for name, value in dataclasses.asdict(options).items() if name not in ("presets", "json")}
    settings = json.loads(json.dumps(settings))  # lists for tuples
    written = {"curves": {}, "settings": settings}
    if options.json is not None and options.json.exists():
        written = json.loads(options.json.read_text(encoding="utf-8"))
        if written["settings"] != settings:
            raise SystemExit(f"{options.json} was measured with other settings, {written['settings']}; name another file")
    for preset in options.presets:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            curve = process.submit(measure, preset, options).result()
        where = f"{preset}, {curve.device}: {curve.total:,} parameters, {curve.active:,} active, {gib(curve.size)}"
        print("\n".join([where, *table(curve), ""]), flush=True)
        if options.json is not None:  # after each model: a later one may be cut off
            if written.setdefault("device", curve.device) != curve.device:
                raise SystemExit(
                    f"{options.json} was measured on {written['device']}, this is {curve.device}; name another file"
                )
            written["curves"][preset] = curve.to_dict()
            options.json.write_text(json.dumps(written | {"machine": machine()}, indent=2) + "\n", encoding="utf-8")


def measure(preset: str, options: Options) -> Curve:
    """Read every length with one model."""
    model = shrunk(configs.load(preset).model, options.shrink)
    count, attends = count_parameters(model), "attention" in model.kinds
    lengths = options.attention_lengths if attends else options.lengths
    piece = options.attention_piece if attends else options.piece
    programs = compile_reading(model, {n: n if attends else 0 for n in lengths}, piece)
    parameters = jax.block_until_ready(jax.jit(make, static_argnums=0)(model))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    ids = np.random.default_rng(0).integers(model.vocab_size, size=(1, lengths[-1]), dtype=np.int32)
    points: dict[int, Point] = {}
    stopped, spent, most = None, 0.0, memory()
    for length in lengths:
        program = programs[length]
        needed = program if isinstance(program, str) else size_of(program)
        if isinstance(needed, str) or needed > most:
            stopped = f"{length} tokens do not fit: {needed if isinstance(needed, str) else f'{gib(needed)} of {gib(most)}'}"
            break
        fresh = partial(state.empty, unrolled(model), 1, length if attends else 0)
        left = float("inf") if options.budget is None else options.budget - spent
        try:
            times, kept = read_often(program, parameters, fresh, ids[:, :length], piece, options.repeats, left)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            stopped = f"{length} tokens do not fit: the device is out of memory"
            break
        spent += sum(times)
        if kept is None:
            stopped = f"{length} tokens were not read: the budget of {options.budget:g} s was spent"
            break
        points[length] = Point(statistics.median(times), state.size_in_bytes(kept), needed, peak())
        del kept
    return Curve(count.total, count.active, size, points, stopped, jax.devices()[0].device_kind)


def make(model: ModelConfig) -> Parameters:
    """Random parameters of `unrolled(model)`."""
    return inference_parameters(init_parameters(model, jax.random.key(0)), model)[0]


def compile_reading(model: ModelConfig, rooms: dict[int, int], piece: int) -> dict[int, Any]:
    """The program that reads a piece, for each length and the room that it needs, or a text where there is no memory for it.

    Equal rooms share one; different ones are compiled side by side.
    """
    start, config = time.perf_counter(), unrolled(model)
    parameters = jax.eval_shape(partial(make, model))
    tokens = jax.ShapeDtypeStruct((1, piece), np.int32)

    def compile_one(room: int) -> Any:
        before = jax.eval_shape(partial(state.empty, config, 1, room))
        try:
            return state.read_on.lower(parameters, before, tokens, None, config).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return "the compiler finds no place for it"

    distinct = sorted(set(rooms.values()))
    with ThreadPoolExecutor(usable_cores()) as pool:
        programs = dict(zip(distinct, pool.map(compile_one, distinct), strict=True))
    print(f"{len(distinct)} programs compiled in {time.perf_counter() - start:.1f} s", flush=True)
    return {length: programs[room] for length, room in rooms.items()}


def read_often(
    program: Any,
    parameters: Parameters,
    fresh: Callable[[], state.State],
    ids: np.ndarray,
    piece: int,
    repeats: int,
    left: float,
) -> tuple[list[float], state.State | None]:
    """Seconds of each reading, and the state at the end; None when `left` seconds did not do for one."""
    times: list[float] = []
    # A first piece that is not timed: a program's first run loads it.
    jax.block_until_ready(program(parameters, fresh(), ids[:, :piece], None))
    while True:
        read, start = jax.block_until_ready(fresh()), time.perf_counter()
        done = 0
        while done < ids.shape[1]:
            for _ in range(min(STRIDE, (ids.shape[1] - done) // piece)):
                read = program(parameters, read, ids[:, done : done + piece], None)
                done += piece
            jax.block_until_ready(read)
            if sum(times) + time.perf_counter() - start > left and done < ids.shape[1]:
                return times or [time.perf_counter() - start], read if times else None
        times.append(time.perf_counter() - start)
        if len(times) >= repeats or times[-1] > LONG or sum(times) > left:
            return times, read


def size_of(program: Any) -> int:
    """Bytes that a program needs with its arguments and results, which share memory where a result takes an argument's."""
    sizes = program.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes


def memory() -> int:
    """Bytes that this process may use: of the device, or of the machine where the device does not say."""
    found = jax.local_devices()[0].memory_stats()
    return found["bytes_limit"] if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak() -> int | None:
    """The most bytes that the device's allocator gave out; None where it does not say."""
    found = jax.local_devices()[0].memory_stats()
    return found["peak_bytes_in_use"] if found else None


def table(curve: Curve) -> list[str]:
    """A line for each length."""
    lines = [f"  {'tokens':>8} {'time':>10} {'tokens/s':>10} {'state':>11} {'program':>11} {'peak':>11}"]
    for length, point in curve.points.items():
        rate, most = length / point.seconds, "-" if point.peak is None else gib(point.peak)
        lines.append(
            f"  {length:8} {point.seconds:8.3f} s {rate:10,.0f} {gib(point.state):>11} {gib(point.program):>11} {most:>11}"
        )
    return [*lines, f"  {curve.stopped}"] if curve.stopped else lines


def gib(size: int) -> str:
    """Bytes in GiB, or MiB below one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
