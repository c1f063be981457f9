"""A training step of one preset: tokens a second, model FLOP utilisation, memory, and where the time goes.

    python benchmarks/train_step.py                                              # blackmamba_340m_1p5b, 8 x 2048 tokens
    python benchmarks/train_step.py --preset blackmamba_630m_2p8b --remat full
    python benchmarks/train_step.py --preset default --rows 2 --no-trace         # small, for a CPU

The step is that of `train.py`, its state donated; tokens are random. The breakdown is of a profile of three steps: each kernel
counts for the part whose named scope its operation stands in, fused ones for the scope of their root. Of a part's floor, the
least time it could take, products count at the device's peak and reads and writes at the bandwidth of a copy in the same run:
parameters, gradients and moments once, activations as often as forward and backward passes must. A part without a share has
no floor of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from harness import machine, profiled
from jax.sharding import Mesh

import configs
from bm_jax.config import Config, ModelConfig
from bm_jax.metrics import device_peak_flops, model_flops_per_token
from bm_jax.model import count_parameters
from bm_jax.optimizer import make_optimizer
from bm_jax.sharding import batch_sharding, make_mesh
from bm_jax.train_step import init_state, make_train_step, state_shardings

PARTS = {
    "optimizer": r"/optimizer/",
    "unembedding and loss": r"[/(](loss|unembedding)[/)]",
    "scan": r"/mamba/.*\bscan/",
    "conv": r"/mamba/.*\bconv/",
    "projections": r"/mamba/",
    "router": r"/router/",
    "dispatch": r"/experts/.*\bdispatch/",
    "experts": r"/experts/|/mlp/",
    "attention": r"/attention/",
    "stacks over depth": r"dynamic_update_index_in_dim|/broadcast_in_dim$",
    "norms and residual": r"/(moe|periods|Model)[/.]",
}
"""Regular expressions of the operations' names, the first one that matches counts."""
TRACED = 3


@dataclasses.dataclass(frozen=True)
class Options:
    preset: str = "blackmamba_340m_1p5b"
    rows: int | None = None
    """Windows of a step; None for the preset's."""
    length: int | None = None
    """Tokens of a window; None for the preset's."""
    remat: Literal["none", "dots", "full"] | None = None
    """As run.remat; None for the preset's."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """As optimizer.name."""
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """As optimizer.first_moment_dtype."""
    unroll: int = 1
    """As model.scan_unroll."""
    rounds: int = 5
    repeat: int = 4
    """Steps in one timing."""
    trace: bool = True
    json: Path | None = None


def main(options: Options) -> None:
    config = configs.load(options.preset)
    rows, length = options.rows or config.data.batch_size, options.length or config.data.sequence_length
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, scan_unroll=options.unroll),
        data=dataclasses.replace(config.data, batch_size=rows, sequence_length=length),
        optimizer=dataclasses.replace(config.optimizer, name=options.optimizer, first_moment_dtype=options.first_moment_dtype),
        run=dataclasses.replace(config.run, remat=options.remat or config.run.remat),
    )
    tokens, device = rows * length, jax.devices()[0]
    mesh = make_mesh(dataclasses.replace(config.mesh, data=1), jax.devices()[:1])
    jax.set_mesh(mesh)
    state, step, batch = prepare(config, mesh)
    lowered = step.lower(state, batch)
    compiled = lowered.compile()
    state, metrics = compiled(state, batch)
    state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        for _ in range(options.repeat):
            state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - start) / options.repeat)
    taken, peak = statistics.median(times), device_peak_flops(device)
    flops = model_flops_per_token(config.model, length)
    print(f"{device.device_kind}, {options.preset}, {rows} x {length} tokens, remat {config.run.remat}, {options.optimizer}")
    print(
        f"  {tokens / taken:,.0f} tokens/s, {taken * 1e3:.1f} ms a step ({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}); "
        f"{flops / 1e9:.3g} GFLOP a token"
        + (f", {tokens / taken * flops / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else ""),
        flush=True,
    )
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if memory:
        print(f"  peak memory {memory / 1e9:.1f} GB")
    results = {"seconds": times, "tokens": tokens, "peak bytes": memory, "objective": float(metrics["objective"])}
    if options.trace:
        # Kernels launched one by one, as those of a CUDA graph do not say which instruction they are.
        options_of = {"xla_gpu_enable_command_buffer": ""} if device.platform == "gpu" else {}
        traced = lowered.compile(compiler_options=options_of)

        def run() -> None:
            nonlocal state, metrics
            for _ in range(TRACED):
                state, metrics = traced(state, batch)
            jax.block_until_ready(metrics)

        parts, longest = breakdown(run, traced.as_text())
        floors = floor_seconds(config, tokens, copy_bandwidth(), peak) if peak else {}
        results |= {"parts": parts, "floors": floors, "longest": longest}
        if parts:
            print(f"  of a step's {sum(parts.values()) / TRACED * 1e3:.1f} ms in kernels:")
            for name, spent in sorted(parts.items(), key=lambda item: -item[1]):
                floor = f", floor {floors[name] * 1e3:6.2f} ms, {floors[name] * TRACED / spent:4.0%}" if name in floors else ""
                print(f"    {name:22} {spent / TRACED * 1e3:7.2f} ms{floor}")
            print("  the longest kernels, ms a step:")
            for (part, name, where), (count, spent) in longest[:24]:
                print(f"    {spent * 1e3:7.2f}  {count:6.1f} x  {part:20} {name[:44]:44} {where[-80:]}")
        else:
            print(f"  no breakdown: nothing is known of the kernels of a {device.device_kind}")
    if options.json:
        values = {"options": dataclasses.asdict(options), "results": results, "machine": machine()}
        options.json.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


def prepare(config: Config, mesh: Mesh) -> tuple[Any, Any, dict[str, jax.Array]]:
    """State, jitted step, and a batch of random tokens, as `bm_jax.train` has them; `mesh` is the current one."""
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    initialize = lambda: init_state(config, optimizer)  # noqa: E731
    shardings = state_shardings(jax.eval_shape(initialize), optimizer, mesh)
    state = jax.jit(initialize, out_shardings=shardings)()
    step = jax.jit(make_train_step(config, optimizer), donate_argnums=0, out_shardings=(shardings, None))
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size)
    return state, step, jax.device_put({"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}, batch_sharding(mesh))


def operation_names(text: str) -> dict[str, str]:
    """What each instruction of a compiled program comes from: named scopes and an operation."""
    found = re.finditer(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE)
    return {match[1]: match[2] for match in found}


def part_of(name: str) -> str:
    """The part that an operation of this name belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")


def breakdown(run: Any, text: str) -> tuple[dict[str, float], list[Any]]:
    """Seconds in each part, and count and seconds a step of each kernel, the longest first, of a profile of `run`.

    `text` is the compiled program, which says where each instruction comes from.
    """
    names = operation_names(text)
    parts: dict[str, float] = collections.defaultdict(float)
    kernels: dict[Any, list[float]] = collections.defaultdict(list)
    for kernel in profiled(run):
        name = names.get(kernel.instruction, "")
        parts[part_of(name)] += kernel.seconds
        kernels[part_of(name), kernel.name, name].append(kernel.seconds)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    return dict(parts), [(key, (len(spent) / TRACED, sum(spent) / TRACED)) for key, spent in longest[:60]]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of a GiB."""
    x, add = jnp.zeros(2**28, jnp.float32), jax.jit(lambda x: x + 1)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(add(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(times[1:])


def floor_seconds(config: Config, tokens: int, bandwidth: float, peak: float) -> dict[str, float]:
    """The least time of each part, forward and backward, see the top of the file; activations in 2 bytes."""
    model: ModelConfig = config.model
    M, E, N, R, moe = model.width, model.inner_width, model.mamba.state_size, model.dt_rank, model.moe
    layers = {kind: model.repeats * list(model.kinds).count(kind) for kind in set(model.kinds)}
    mamba, experts = layers.get("mamba", 0), layers.get("moe", 0)
    products = lambda flops: 3 * tokens * flops / peak  # noqa: E731
    moved = lambda numbers: 2 * tokens * numbers / bandwidth  # noqa: E731
    moment = {"float32": 4, "bfloat16": 2}[config.optimizer.first_moment_dtype]
    gated = 3 if "glu" in moe.activation else 2
    floors = {
        # parameters, gradients and two moments read, all but gradients written (of Muon more: it has products of its own)
        "optimizer": count_parameters(model).total * (4 * (3 + 2) + 2 * moment) / bandwidth,
        "unembedding and loss": products(2 * M * model.vocab_size),
        "projections": mamba * products(2 * E * (3 * M + 2 * R + 2 * N)),
        # u, z, dt (of 4 bytes) in, y out; backward those and dy in, three gradients out
        "scan": mamba * moved((1 + 1 + 2 + 1) + (1 + 1 + 2 + 1) + (1 + 1 + 2)) * E,
        "conv": mamba * moved(2 + 3) * E,
        "router": experts * moved(1 + 2) * M,
        "dispatch": experts * moved(4 * 2) * M * moe.top_k,
        "experts": experts * products(2 * gated * M * moe.width * moe.top_k),
    }
    return {name: seconds for name, seconds in floors.items() if seconds}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
