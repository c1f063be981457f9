"""Tokens a second of the real train step on several meshes of this machine's devices, against one device.

    python benchmarks/scaling.py --mesh data=1 --mesh data=2 --mesh expert=2 --json scaling.json
    python benchmarks/scaling.py --preset default --mesh data=1 --rows 2 --rounds 2           # small, for a CPU

Every device gets as many rows of a batch, so twice the devices take twice the tokens a step; tokens are random. A step is
that of `train.py`, the state donated. `--trace` also profiles three steps of each mesh and prints how much of the devices'
time goes to which collective: their time while profiled, over that of a step without.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness import machine, profiled

from bm_jax.config import MeshConfig
from bm_jax.optimizer import make_optimizer
from bm_jax.sharding import batch_sharding, make_mesh
from bm_jax.train_step import init_state, make_train_step, state_shardings

COLLECTIVES = {
    "SendRecv": "all_to_all",
    "AllReduce": "all_reduce",
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
}
"""Parts of the names of NCCL's kernels, and what they do here."""


def kernel_times(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of all devices in each collective, and in all kernels (`total`), while `run` did."""
    times: dict[str, float] = collections.defaultdict(float)
    for kernel in profiled(run):
        kind = next((name for part, name in COLLECTIVES.items() if part in kernel.name), None)
        times["total"] += kernel.seconds
        if kind:
            times[kind] += kernel.seconds
    return dict(times)


def measure(text: str, options: argparse.Namespace) -> dict[str, Any]:
    """One mesh."""
    config = importlib.import_module(f"configs.{options.preset}").config
    sizes = {"data": 1} | {name: int(size) for name, size in (pair.split("=") for pair in text.split(","))}
    size = math.prod(sizes.values())
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:size])
    rows, length = options.rows * size, config.data.sequence_length
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, scan_unroll=options.unroll),
        data=dataclasses.replace(config.data, batch_size=rows),
        run=dataclasses.replace(config.run, remat=options.remat),
    )
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    with jax.set_mesh(mesh):
        initialize = lambda: init_state(config, optimizer)  # noqa: E731
        shardings = state_shardings(jax.eval_shape(initialize), optimizer, mesh)
        state = jax.jit(initialize, out_shardings=shardings)()
        step = jax.jit(make_train_step(config, optimizer), donate_argnums=0, out_shardings=(shardings, None))
        tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, config.model.vocab_size)
        batch = jax.device_put({"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}, batch_sharding(mesh))
        state, metrics = step(state, batch)
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            for _ in range(options.repeat):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            times.append((time.perf_counter() - start) / options.repeat)
        shares = {}
        if options.trace:

            def run() -> None:
                nonlocal state, metrics
                for _ in range(3):
                    state, metrics = step(state, batch)
                jax.block_until_ready(metrics)

            spent = kernel_times(run)
            shares = {name: seconds / (3 * statistics.median(times) * size) for name, seconds in spent.items()}
        stats = mesh.devices.flat[0].memory_stats() or {}
    return {
        "mesh": text,
        "devices": size,
        "tokens": rows * length,
        "seconds": times,
        "objective": float(metrics["objective"]),
        "shares of the step": shares,
        "peak bytes": stats.get("peak_bytes_in_use"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="blackmamba_340m_1p5b")
    parser.add_argument("--mesh", action="append", help="as data=2; may be repeated; compared with the first")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch for each device")
    parser.add_argument("--remat", default="none", help="of the step, as run.remat")
    parser.add_argument("--unroll", type=int, default=1, help="as model.scan_unroll")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=4, help="steps in one timing")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {options.preset}, remat {options.remat}")
    results: list[dict[str, Any]] = []
    for text in options.mesh or ["data=1"]:
        results.append(measure(text, options))
        rates = [result["tokens"] / statistics.median(result["seconds"]) for result in results]
        last = results[-1]
        spread = f"{min(last['seconds']) * 1e3:.1f} to {max(last['seconds']) * 1e3:.1f}"
        print(
            f"  {text:12} {last['tokens']:7,} tokens a step  {statistics.median(last['seconds']) * 1e3:7.1f} ms ({spread})  "
            f"{rates[-1]:9,.0f} tokens/s  {rates[-1] / rates[0]:5.2f} of {results[0]['mesh']}  "
            f"objective {last['objective']:.4f}  "
            + "  ".join(f"{name} {share:.1%}" for name, share in last["shares of the step"].items()),
            flush=True,
        )
        if options.json:
            values = {"device": jax.devices()[0].device_kind, "results": results, "machine": machine()}
            options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
