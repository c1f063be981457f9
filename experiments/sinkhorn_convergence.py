"""How many iterations Sinkhorn needs from a plain and from a centred start: the metrics of the figure of that name.

    python -m experiments.sinkhorn_convergence --json experiments/metrics/sinkhorn_convergence.json     # seconds on a CPU

The plain start has no column potentials, as the form of Megatron-LM, which starts from ones. The centred one is that of
`bm_jax.routing.sinkhorn`: minus each expert's mean score. Router logits are random and hard: normal with a standard deviation
of 2, and a bias of each expert of as much. What is written is the worst over batches.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bm_jax.config import MoeConfig
from bm_jax.routing import sinkhorn
from pallas_kernels.sinkhorn import sinkhorn_potentials

STARTS = ("plain", "centred")
ITERATIONS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
SPREAD = 2.0
"""Standard deviation of the logits, and of the experts' biases."""


def plan(logits: jax.Array, start: str, iterations: jax.Array, temperature: float) -> jax.Array:
    """Logarithm of the plan `[T, X]` of logits `[T, X]` after some iterations, from one of `STARTS`."""
    if start == "centred":
        return sinkhorn(logits, iterations, temperature=temperature)
    scores, tokens = logits.T / temperature, len(logits)
    column = sinkhorn_potentials(scores, jnp.ones(tokens, bool), jnp.zeros(len(scores)), iterations)
    return jax.nn.log_softmax(scores + column[:, None], axis=0).T - jnp.log(tokens)


def balance(log_plan: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest relative deviation of a row or column sum from uniform, and the busiest expert's load, 1 if all are equal."""
    tokens, experts = log_plan.shape
    sums = jnp.concatenate([jnp.exp(log_plan).sum(axis=1) * tokens, jnp.exp(log_plan).sum(axis=0) * experts])
    load = (jnp.argmax(log_plan, axis=1)[:, None] == jnp.arange(experts)).mean(axis=0) * experts
    return jnp.abs(sums - 1).max(), load.max()


@functools.partial(jax.jit, static_argnames=("start", "tokens", "experts", "temperature"))
def worst(
    keys: jax.Array, start: str, iterations: jax.Array, *, tokens: int, experts: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """The largest values of `balance` over random batches, one a key."""

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_logits, key_bias = jax.random.split(key)
        bias = SPREAD * jax.random.normal(key_bias, (experts,))
        logits = SPREAD * jax.random.normal(key_logits, (tokens, experts)) + bias
        return balance(plan(logits, start, iterations, temperature))

    return jax.tree.map(jnp.max, jax.lax.map(one, keys))


def measure(batches: dict[int, int], experts: int = 8, iterations: tuple[int, ...] = ITERATIONS) -> dict[str, Any]:
    """The metrics: of each start, at each size of a batch in tokens, the worst of so many batches."""
    temperature, curves = MoeConfig().sinkhorn_temperature, {}
    for start in STARTS:
        curves[start] = {}
        for tokens, count in batches.items():
            keys, sizes = jax.random.split(jax.random.key(tokens), count), {"tokens": tokens, "experts": experts}
            found = [worst(keys, start, jnp.asarray(n), temperature=temperature, **sizes) for n in iterations]
            # Rounded, so that machines which differ in the last bits write the same file.
            deviation, load = ([float(f"{value:.4g}") for value in values] for values in zip(*found, strict=True))
            curves[start][str(tokens)] = {"deviation": deviation, "load": load}
    return {
        "experts": experts,
        "temperature": temperature,
        "default_iterations": MoeConfig().sinkhorn_iterations,
        "batches": {str(tokens): count for tokens, count in batches.items()},
        "iterations": list(iterations),
        "curves": curves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="batches of 512 tokens; a tenth as many of 16,384")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    values = measure({512: options.seeds, 16384: max(options.seeds // 10, 1)})
    options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for start, curves in values["curves"].items():
        for tokens, curve in curves.items():
            shown = zip(values["iterations"], curve["deviation"], curve["load"], strict=True)
            print(f"{start}, {tokens} tokens: " + ", ".join(f"{n}: {d:.2%} / {load:.2f}" for n, d, load in shown))


if __name__ == "__main__":
    main()
