"""Speed of generation: tokens a second, against the time in which the memory can give what a step reads, and beside it all else
that a user waits for.

    python benchmarks/generate.py --preset blackmamba_340m_1p5b --batch 1 --batch 64 --prefill 8x2048 --engine 64 --trace

Weights are random and in the preset's compute dtype. For each batch: `LanguageModel.decode` called again and again with all
rows going (temperature 1, no end), the bytes that a step must read (each weight that is used once, experts as often as random
routing asks for them, states read and written), and their time at the bandwidth of a copy in the same run. `--trace` counts the
kernels of a step. `--prefill` reads prompts of a batch; the time to the first token is that of a prompt of 512 tokens, alone.
`--engine` compares the engine with all its slots busy with the loop at that batch. `--weights int8` runs with int8 weights.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import machine, profiled

import configs
from bm_jax import decoding, state
from bm_jax.config import ModelConfig
from bm_jax.data.tokenizer import ByteTokenizer
from bm_jax.engine import Engine
from bm_jax.language_model import LanguageModel
from bm_jax.model import init_parameters, unrolled
from bm_jax.sampling import SamplingConfig

FIRST_PROMPT = 512


class Endless(ByteTokenizer):
    """Any ids, and none that ends a document."""

    end_of_document = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def _decode(self, ids: list[int]) -> str:
        return bytes(i % 128 for i in ids).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="blackmamba_340m_1p5b")
    parser.add_argument("--batch", type=int, action="append", help="rows decoded together; may be repeated")
    parser.add_argument("--weights", choices=["int8"])
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row in one timing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", help="prompts to read, as 8x2048")
    parser.add_argument("--engine", type=int, help="slots of an engine, all busy")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = configs.load(options.preset).model
    parameters = jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(0))
    model = LanguageModel(config, parameters, Endless(config.vocab_size), weights=options.weights)
    bandwidth = copy_bandwidth()
    print(f"{jax.devices()[0].device_kind}, {options.preset}, weights {options.weights or config.compute_dtype}")
    print(f"copies at {bandwidth / 1e12:.3f} TB/s", flush=True)
    results: dict[str, Any] = {"preset": options.preset, "weights": options.weights, "bandwidth": bandwidth}
    for batch in options.batch or [1]:
        results[f"decode {batch}"] = decode(model, batch, bandwidth, options)
    results["first token"] = first_token(model, options.rounds)
    if options.prefill:
        batch, length = map(int, options.prefill.split("x"))
        results[f"prefill {options.prefill}"] = prefill(model, batch, length, options)
    if options.engine:
        raw = results.get(f"decode {options.engine}") or decode(model, options.engine, bandwidth, options)
        results["engine"] = engine(model, options.engine, options.engine / statistics.median(raw["seconds"]), options)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    results |= {"peak bytes": peak, "machine": machine()}
    if peak:
        print(f"  peak memory {peak / 2**30:.2f} GiB, the float32 parameters among it")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def decode(model: LanguageModel, batch: int, bandwidth: float, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step."""
    rows, going = begin(model, batch)

    def draw(tokens: int) -> None:
        nonlocal going
        for _ in range(tokens // decoding.CHUNK):
            going, _ = model.decode(going, rows, decoding.CHUNK, limited=False)
        np.asarray(going.token)

    draw(2 * decoding.CHUNK)
    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        draw(options.tokens)
        times.append((time.perf_counter() - start) / (options.tokens // decoding.CHUNK * decoding.CHUNK))
    step, read = statistics.median(times), step_bytes(model, batch)
    floor = read / bandwidth
    kernels = count_kernels(lambda: draw(4 * decoding.CHUNK), 4 * decoding.CHUNK) if options.trace else None
    print(
        f"  batch {batch}: {batch / step:,.0f} tokens/s ({batch / max(times):,.0f} to {batch / min(times):,.0f}), "
        f"{step * 1e6:.0f} us a step; {read / 1e6:,.0f} MB in at least {floor * 1e6:.0f} us, {floor / step:.0%}"
        + ("" if kernels is None else f"; {kernels['a step']:.1f} kernels, {kernels['us']:.0f} us in them"),
        flush=True,
    )
    if kernels is not None:
        print_longest(kernels)
    return {"seconds": times, "bytes": read, "kernels": kernels}


def begin(model: LanguageModel, batch: int) -> tuple[decoding.Rows, decoding.Going]:
    """Rows that never end, and one token read."""
    config = model.config
    settings = [SamplingConfig(max_tokens=2**31 - 1, seed=row) for row in range(batch)]
    rows = jax.device_put(decoding.make_rows(settings, batch, end=Endless.end_of_document, vocab_size=config.vocab_size))
    room = 8192 if "attention" in config.kinds else 0
    cache = model.decoding_cache(state.empty(unrolled(config), batch, room).cache, batch)
    number = jnp.zeros(batch, jnp.int32)
    return rows, decoding.Going(cache, None, number + 1, number + 0, number == 0)


def step_bytes(model: LanguageModel, batch: int) -> float:
    """What a step reads and writes at least."""
    config, (parameters, head) = model.config, model.inference
    X = config.moe.experts
    used = X * (1 - (1 - 1 / X) ** (batch * config.moe.top_k)) / X
    read = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path((parameters["periods"], head)):
        expert = any(getattr(key, "key", None) == "moe" for key in path) and leaf.nbytes > 1e6
        read += leaf.nbytes * (used if expert else 1)
    return read + 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states_of(config, batch)))


def states_of(config: ModelConfig, batch: int) -> Any:
    """Shapes of what Mamba layers keep; keys and values are not counted."""
    cache = jax.eval_shape(lambda: state.empty(unrolled(config), batch, 1).cache)
    return [kinds["mamba"] for kinds in cache.layers.values() if "mamba" in kinds]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of a GiB (of 64 MiB on a CPU)."""
    size = 2**30 if jax.default_backend() == "gpu" else 2**26
    x = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        y = x
        for _ in range(8):
            y = add(y)
        y.block_until_ready()
        times.append((time.perf_counter() - start) / 8)
    return 2 * size / statistics.median(times[1:])


def first_token(model: LanguageModel, rounds: int) -> dict[str, Any]:
    """Seconds from a prompt's ids to its first token."""
    ids = np.random.default_rng(0).integers(0, 256, FIRST_PROMPT).tolist()
    rows = decoding.make_rows([SamplingConfig()], 1, end=Endless.end_of_document, vocab_size=model.config.vocab_size)

    def run() -> None:
        read = model.prefill([ids])
        np.asarray(decoding.choose(model.inference[1], read.hidden, rows, np.zeros(1, np.int32), None, model.config).token)

    run()
    times = [timed(run) for _ in range(rounds)]
    print(f"  first token after {FIRST_PROMPT}: {statistics.median(times) * 1e3:.1f} ms ({spread(times)})", flush=True)
    return {"seconds": times}


def prefill(model: LanguageModel, batch: int, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to read a batch of prompts."""
    rows = np.random.default_rng(0).integers(0, 256, (batch, length)).tolist()
    run = lambda: jax.block_until_ready(model.prefill(rows).hidden)  # noqa: E731
    run()
    times = [timed(run) for _ in range(options.rounds)]
    rate = batch * length / statistics.median(times)
    print(
        f"  prefill {batch} x {length}: {rate:,.0f} tokens/s, {statistics.median(times) * 1e3:.1f} ms ({spread(times)})",
        flush=True,
    )
    kernels = count_kernels(run, 1) if options.trace else None
    if kernels is not None:
        print_longest(kernels)
    return {"seconds": times, "kernels": kernels}


def engine(model: LanguageModel, slots: int, raw: float, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second with all slots busy, in the middle of a run: compiling and reading prompts are over by then."""
    tokens = 4 * options.tokens
    with Engine(model, slots=slots, queue=slots, chunk=64) as running:
        done = threading.Semaphore(0)
        for seed in range(slots):
            config = SamplingConfig(max_tokens=2 * tokens, seed=seed)
            running.submit([1, seed % 250], config, lambda event: done.release() if event.completion or event.error else None)
        marks = []
        while len(marks) < 2:
            now = running.statistics
            counted, over = now.generated_tokens, not (now.active or now.waiting)
            if counted >= slots * tokens * (0.5 if not marks else 1.5) or over:
                marks.append((time.perf_counter(), counted))
            time.sleep(0.002)
        for _ in range(slots):
            done.acquire()
    (t0, n0), (t1, n1) = marks
    rate = (n1 - n0) / (t1 - t0)
    print(f"  engine of {slots} slots: {rate:,.0f} tokens/s, {rate / raw:.0%} of the loop's {raw:,.0f}", flush=True)
    return {"tokens a second": rate, "loop": raw}


def count_kernels(run: Any, steps: int) -> dict[str, Any]:
    """Kernels a step and microseconds in them, of a profile."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in profiled(run):
        found[kernel.name].append(kernel.seconds * 1e6)
    longest = sorted(found, key=lambda name: -sum(found[name]))
    return {
        "a step": sum(map(len, found.values())) / steps,
        "us": sum(map(sum, found.values())) / steps,
        "longest": {name: (len(found[name]) / steps, sum(found[name]) / steps) for name in longest[:40]},
    }


def timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def print_longest(kernels: dict[str, Any]) -> None:
    for name, (count, spent) in list(kernels["longest"].items())[:12]:
        print(f"      {spent:8.1f} us a step, {count:5.1f} x  {name[:90]}")


def spread(times: list[float]) -> str:
    return f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}"


if __name__ == "__main__":
    main()
