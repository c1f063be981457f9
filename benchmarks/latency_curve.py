"""Time to generate against length, as the figure of BlackMamba (arXiv 2402.01771): four models of one active size.

    python benchmarks/latency_curve.py --json latency.json --budget 25           # one GPU, under two minutes
    python -m experiments.figures.generation_time --metrics latency.json         # draws it
    python benchmarks/latency_curve.py --shrink 16 --lengths 64 128 256 512      # a CPU, small models

BlackMamba 340M/1.5B, Mamba, a Transformer-MoE and a Transformer, with random weights in the compute dtype of their presets, one
after the other, each alone in memory. The prompt is one token; tokens are drawn by the library's loop (`decoding.decode`,
`CHUNK` at a call, each read by the host before the next call), one kernel a step where there is one, with temperature 1, and
nothing ends early. All programs are compiled before, side by side; times are of drawing alone. Attention gets room for keys
and values as a server would give it: for 256 tokens, and twice as much whenever that is full; moving to the new room is in the
times.

A model whose drawing takes longer than `--budget` stops at the last length reached. `--shrink N` divides widths, hidden widths,
heads and depths by N and the vocabulary by N squared: the models stay alike in active size, roughly.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from drawing import Drawing, compile_drawing, decoding_parameters, kernel_of, rooms
from harness import machine, usable_cores

import configs
from bm_jax.config import ModelConfig
from bm_jax.decode_step import Kernel
from bm_jax.decoding import CHUNK
from bm_jax.model import Parameters, count_parameters, init_parameters

FIRST_ROOM = 256
STRIDE = 256
"""Tokens between two looks at the clock."""


@dataclasses.dataclass(frozen=True)
class Options:
    presets: tuple[str, ...] = ("blackmamba_340m_1p5b", "mamba", "transformer_moe", "transformer")
    """The first is the one that others are compared with."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    """Tokens drawn, increasing."""
    batch: int = 1
    """Sequences generated at once."""
    repeats: int = 1
    """Passes over all lengths; medians are taken."""
    budget: float | None = None
    """Seconds of drawing for each model; None for no limit."""
    growth: int = 2
    """How many times more room attention gets when it is full: more means fewer programs to compile, and slower tokens."""
    shrink: int = 1
    """Divide the models' sizes by this."""
    json: Path | None = None


class Curve(NamedTuple):
    """One model's."""

    total: int
    active: int
    """Parameters that one token passes through."""
    one_kernel: bool
    """Whether a step through its layers is one kernel."""
    seconds: dict[int, float]
    """Tokens drawn, and the time that it took: medians over passes."""
    passes: int
    stopped: str | None
    """Why there are fewer lengths or passes than were asked for."""

    def per_token(self) -> dict[int, float]:
        """Seconds a token in the interval that ends at each length."""
        ends = [0, *self.seconds]
        times = [0.0, *self.seconds.values()]
        return {ends[i]: (times[i] - times[i - 1]) / (ends[i] - ends[i - 1]) for i in range(1, len(ends))}


def main(options: Options) -> None:
    lengths = options.lengths
    if list(lengths) != sorted(set(lengths)) or lengths[0] < 1 or any(length % CHUNK for length in lengths):
        raise SystemExit(f"--lengths must be increasing multiples of {CHUNK}, got {lengths}")
    print(f"{jax.devices()[0].device_kind}, batch {options.batch}, random weights\n", flush=True)
    models = {preset: shrunk(configs.load(preset).model, options.shrink) for preset in options.presets}
    programs, curves = compile_all(models, options), dict[str, Curve]()
    for preset, model in models.items():
        curve = curves[preset] = measure(model, programs.pop(preset), options)
        how = "a step is one kernel" if curve.one_kernel else "steps by XLA"
        print(f"{preset}: {curve.total:,} parameters, {curve.active:,} active; {how}; {curve.passes} passes", flush=True)
        if curve.stopped:
            print(f"  {curve.stopped}", flush=True)
    print(f"\n{table(curves)}")
    if options.json is not None:
        values = {
            "curves": {name: curve._asdict() | {"per_token": curve.per_token()} for name, curve in curves.items()},
            "fastest": {length: fastest(curves, length) for length in options.lengths},
            "settings": dataclasses.asdict(options),
            "device": jax.devices()[0].device_kind,
            "machine": machine(),
        }
        options.json.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


def shrunk(model: ModelConfig, by: int) -> ModelConfig:
    """The model with sizes divided by `by`, none below 1."""

    def less(size: int, by: int = by) -> int:
        return max(1, round(size / by))

    return dataclasses.replace(
        model,
        repeats=less(model.repeats),
        width=less(model.width),
        vocab_size=less(model.vocab_size, by**2),
        attention=dataclasses.replace(
            model.attention, heads=less(model.attention.heads), kv_heads=less(model.attention.kv_heads)
        ),
        mlp=dataclasses.replace(model.mlp, width=less(model.mlp.width)),
        moe=dataclasses.replace(model.moe, width=less(model.moe.width)),
    )


def make(model: ModelConfig, kernel: Kernel | None) -> tuple[Parameters, Parameters]:
    """Random parameters for decoding."""
    return decoding_parameters(init_parameters(model, jax.random.key(0)), model, kernel)


def compile_all(models: dict[str, ModelConfig], options: Options) -> dict[str, dict[tuple[str, int], Any]]:
    """The programs of every model, in as many threads as there are cores."""
    start = time.perf_counter()

    def compile_one(preset: str, before: int | None, room: int) -> dict[tuple[str, int], Any]:
        model = models[preset]
        kernel = kernel_of(model, options.batch)
        shapes = jax.eval_shape(partial(make, model, kernel))
        return compile_drawing(shapes, model, batch=options.batch, kernel=kernel, room=room, before=before)

    jobs = []
    for preset, model in models.items():
        steps = rooms(model, options.lengths[-1], FIRST_ROOM, options.growth)
        jobs += [(preset, before, room) for before, room in zip([None, *steps], steps, strict=False)]
    programs: dict[str, dict[tuple[str, int], Any]] = {preset: {} for preset in models}
    with ThreadPoolExecutor(usable_cores()) as pool:
        for (preset, *_), found in zip(jobs, pool.map(lambda job: compile_one(*job), jobs), strict=True):
            programs[preset] |= found
    print(f"{len(jobs)} programs compiled in {time.perf_counter() - start:.1f} s", flush=True)
    return programs


def measure(model: ModelConfig, programs: dict[tuple[str, int], Any], options: Options) -> Curve:
    """Time one model, alone in memory."""
    count = count_parameters(model)
    kernel = kernel_of(model, options.batch)
    parameters, head = jax.jit(make, static_argnums=(0, 1))(model, kernel)
    drawing = Drawing(
        parameters,
        head,
        model,
        batch=options.batch,
        kernel=kernel,
        room=FIRST_ROOM,
        growth=options.growth,
        programs=programs,
    )
    drawing.draw(min(STRIDE, options.lengths[0]))
    end = time.perf_counter() + (options.budget or float("inf"))
    passes: list[dict[int, float]] = []
    for _ in range(options.repeats):
        drawing.restart()
        passes.append(one_pass(drawing.draw, options.lengths, end))
        if len(passes[-1]) < len(options.lengths):
            break
    stopped = None
    if len(passes[-1]) < len(options.lengths):
        stopped = f"stopped in pass {len(passes)} after {max(passes[-1], default=0)} tokens: {options.budget:g} s are spent"
    seconds = {length: statistics.median(p[length] for p in passes if length in p) for length in passes[0]}
    return Curve(count.total, count.active, kernel is not None, seconds, len(passes), stopped)


def one_pass(draw: Callable[[int], object], lengths: tuple[int, ...], end: float) -> dict[int, float]:
    """Seconds to each length, up to the last one reached before the clock shows `end`."""
    seconds: dict[int, float] = {}
    start, drawn = time.perf_counter(), 0
    for length in lengths:
        while drawn < length:
            drawn = min(drawn + STRIDE, length)
            draw(drawn)
            if time.perf_counter() > end and drawn < length:
                return seconds
        seconds[length] = time.perf_counter() - start
        if time.perf_counter() > end:
            break
    return seconds


def fastest(curves: dict[str, Curve], length: int) -> str | None:
    """The model that reached a length first; None where none did."""
    reached = {name: curve.seconds[length] for name, curve in curves.items() if length in curve.seconds}
    return min(reached, key=lambda name: reached[name]) if reached else None


def table(curves: dict[str, Curve]) -> str:
    """Seconds to each length, milliseconds a token in the interval that ends there, and the fastest."""
    lengths = sorted({length for curve in curves.values() for length in curve.seconds})
    first, *others = curves
    width = max(22, *(len(name) + 2 for name in curves))
    lines = [f"{'tokens':>7}" + "".join(f"{name:>{width}}" for name in curves) + "  fastest"]
    for length in lengths:
        cells = []
        for curve in curves.values():
            there = length in curve.seconds
            text = f"{curve.seconds[length]:.3f} s {curve.per_token()[length] * 1e3:7.3f} ms" if there else "-"
            cells.append(f"{text:>{width}}")
        lines.append(f"{length:7}" + "".join(cells) + f"  {fastest(curves, length)}")
    lines.append("(time to that length, and a token's time since the length before)")
    for name in others:
        ratios = {n: t / curves[first].seconds[n] for n, t in curves[name].seconds.items() if n in curves[first].seconds}
        if ratios:
            each = ", ".join(f"{ratio:.2f} at {length}" for length, ratio in ratios.items())
            lines.append(f"{name} takes times {first}'s: {each}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
