"""How many Sinkhorn iterations balance the experts, and what they cost.

Prints the table of `bm_jax.routing.sinkhorn`, the worst case over many random batches of router logits; then, against
the multiplicative form of Megatron-LM (`P = d0 * exp(logits) * d1` from `d1 = 1`) in the same run, the iterations each
needs and the time of a call. The multiplicative form has no exponential in its loop, and overflows at logits of 89.

    python benchmarks/sinkhorn.py            # about a minute on two cores
    python benchmarks/sinkhorn.py --seeds 50
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from harness import compare, write_json

from bm_jax.config import MoeConfig
from bm_jax.routing import sinkhorn

EXPERTS = 8
ITERATIONS = (1, 2, 4, 8, 16)
DIFFICULTIES = {"mild": (1.0, 0.5), "hard": (2.0, 2.0)}
"""Standard deviation of the logits, and of a bias per expert added to them."""


def draw(key: jax.Array, tokens: int, difficulty: str) -> jax.Array:
    """Random router logits [T, X]."""
    spread, bias_spread = DIFFICULTIES[difficulty]
    key_logits, key_bias = jax.random.split(key)
    bias = bias_spread * jax.random.normal(key_bias, (EXPERTS,))
    return spread * jax.random.normal(key_logits, (tokens, EXPERTS)) + bias


def balance(log_plan: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest relative deviation of a row or column sum from uniform, and the argmax load's max / mean."""
    tokens, experts = log_plan.shape
    plan = jnp.exp(log_plan)
    rows, columns = plan.sum(axis=1) * tokens, plan.sum(axis=0) * experts
    deviation = jnp.maximum(jnp.abs(rows - 1).max(), jnp.abs(columns - 1).max())
    load = (jnp.argmax(log_plan, axis=1)[:, None] == jnp.arange(experts)).mean(axis=0) * experts
    return deviation, load.max()


@functools.partial(jax.jit, static_argnames=("tokens", "difficulty", "iterations", "temperature"))
def measure(
    keys: jax.Array, *, tokens: int, difficulty: str, iterations: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """`balance` of one batch a key."""
    return jax.lax.map(lambda key: balance(sinkhorn(draw(key, tokens, difficulty), iterations, temperature=temperature)), keys)


def multiplicative(logits: jax.Array, iterations: int) -> jax.Array:
    """The peer: Megatron-LM's Sinkhorn with a fixed number of iterations; returns the log of the plan."""
    tokens, experts = logits.shape
    cost = jnp.exp(logits)

    def iterate(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row = 1 / (tokens * ((state[1] * cost).sum(axis=1) + 1e-8))
        return row, 1 / (experts * ((row[:, None] * cost).sum(axis=0) + 1e-8))

    row, column = jax.lax.fori_loop(0, iterations, iterate, (jnp.ones(tokens), jnp.ones(experts)))
    return jnp.log(row[:, None] * cost * column)


def iterations_to(plan: Callable[[int], jax.Array], tolerance: float = 0.01) -> int:
    """The fewest iterations that bring every row and column sum within `tolerance` of uniform, at most 100."""
    return next(n for n in range(1, 101) if balance(plan(n))[0] <= tolerance or n == 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="batches of 512 tokens; larger batches get fewer")
    parser.add_argument("--json", help="where the comparison of times is written")
    arguments = parser.parse_args()
    seeds = arguments.seeds
    sizes = {512: seeds, 16384: max(seeds // 10, 1), 65536: max(seeds // 50, 1)}
    print(f"Worst of {', '.join(f'{n} batches of {t}' for t, n in sizes.items())} tokens, {EXPERTS} experts.")
    print("Each cell: largest deviation of a row or column sum / argmax load max over mean.\n")
    names = [f"{difficulty} {tokens}" for difficulty in DIFFICULTIES for tokens in sizes]
    print("temperature iterations  " + "  ".join(f"{name:>13}" for name in names))
    for temperature in (1.0, 0.5):
        for iterations in ITERATIONS:
            cells = []
            for difficulty in DIFFICULTIES:
                for tokens, count in sizes.items():
                    deviation, load = measure(
                        jax.random.split(jax.random.key(tokens), count), tokens=tokens, difficulty=difficulty,
                        iterations=iterations, temperature=temperature,
                    )  # fmt: skip
                    cells.append(f"{100 * deviation.max():6.2f}% /{load.max():5.2f}")
            print(f"{temperature:11} {iterations:10}  " + "  ".join(cells), flush=True)

    keys = jax.random.split(jax.random.key(1), 10 * seeds)
    print(f"\nArgmax load of the converged plan, {10 * seeds} hard batches of 512 tokens:")
    for temperature in (1.0, 0.5):
        _, load = measure(keys, tokens=512, difficulty="hard", iterations=16, temperature=temperature)
        median, high = jnp.quantile(load, jnp.array([0.5, 0.99]))
        above = 100 * (load > 1.2).mean()
        line = f"median {median:.3f}, 99% {high:.3f}, max {load.max():.3f}, above 1.2 {above:.2f}%"
        print(f"  temperature {temperature}: {line}")

    default = MoeConfig()
    iterations, temperature = default.sinkhorn_iterations, default.sinkhorn_temperature
    logits = draw(jax.random.key(2), 1024, "hard")
    print(f"\n[1024, {EXPERTS}] hard logits, temperature {temperature}:")
    ours = iterations_to(lambda n: sinkhorn(logits, n, temperature=temperature))
    theirs = iterations_to(lambda n: multiplicative(logits / temperature, n))
    print(f"  iterations to 1%: {ours}, multiplicative {theirs}, ratio {theirs / ours:.2f}")
    functions = [
        jax.jit(lambda x: sinkhorn(x, iterations, temperature=temperature)),
        jax.jit(lambda x: multiplicative(x / temperature, iterations)),
    ]
    ours, theirs = (lambda function=function: function(logits).block_until_ready() for function in functions)
    comparison = compare(f"{iterations} iterations", ("ours", ours), {"multiplicative": theirs}, rounds=200)
    print(f"\n{comparison}")
    if arguments.json is not None:
        write_json(arguments.json, [comparison], {"seeds": seeds})


if __name__ == "__main__":
    main()
