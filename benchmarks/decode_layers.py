"""Time of a decoding step's layers as one kernel, against the time in which the memory can give what they read.

    python benchmarks/decode_layers.py --preset blackmamba_340m_1p5b --batch 1 --json layers.json      # needs a Hopper GPU

The layers alone: no embedding, unembedding or drawing. Weights are random. A step is a call; the bandwidth is that of a copy
of the largest weight, in the same run. A step is counted as reading the experts of each token.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness import machine, repeated, seconds

from bm_jax.cache import init_cache
from bm_jax.decode_step import step_cache, step_sizes, step_weights
from bm_jax.model import init_parameters
from pallas_kernels.decode_layers import decode_layers_gpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="blackmamba_340m_1p5b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=50, help="steps in one timing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = importlib.import_module(f"configs.{options.preset}").config.model
    B = options.batch
    blocks: Any = getattr(jax.devices()[0], "core_count", None)
    if not blocks:
        parser.error(f"needs a GPU, this is {jax.devices()[0].device_kind}")
    weights = jax.jit(lambda key: step_weights(init_parameters(config, key), config))(jax.random.key(0))
    arrays = weights | step_cache(jax.jit(lambda: init_cache(config, B))())
    residual = jnp.ones((B, config.width))
    sizes = step_sizes(config, B, blocks)

    def step(residual: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
        return decode_layers_gpu(residual, arrays, sizes)["residual_out"]

    read = 0.0
    for name, array in arrays.items():
        moe = config.layers[int(name.rpartition("_")[2])] == "moe" and name.startswith(("w_in", "w_out"))
        read += array.nbytes * (min(B, config.moe.experts) / config.moe.experts if moe else 1)
    largest = max(weights, key=lambda name: weights[name].nbytes)
    runs = {
        "layers": repeated(step, options.repeat),
        "copy": repeated(lambda residual, arrays: arrays[largest] + 1, options.repeat),
    }
    arguments = (residual, arrays)
    for run in runs.values():
        jax.block_until_ready(run(*arguments))
    times = seconds(runs, arguments, options.repeat, options.rounds)
    taken, copied = (statistics.median(times[name]) for name in runs)
    bandwidth = 2 * weights[largest].nbytes / copied
    floor = read / bandwidth
    print(f"{jax.devices()[0].device_kind}, {options.preset}, batch {B}: {read / 1e6:.0f} MB a step")
    print(f"  copies at {bandwidth / 1e12:.2f} TB/s, so at least {floor * 1e6:.0f} us")
    spread = f"{min(times['layers']) * 1e6:.0f} to {max(times['layers']) * 1e6:.0f}"
    print(f"  {taken * 1e6:.0f} us ({spread}), {floor / taken:.0%} of the copies' speed, {B / taken:,.0f} tokens/s")
    if options.json:
        values = {"times": times, "bytes": math.ceil(read), "machine": machine()}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
