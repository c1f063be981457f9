"""Speed of the grouped product and of its gradients, for every implementation that can run here, against a dense one.

    python benchmarks/grouped_matmul.py --json grouped.json
    python benchmarks/grouped_matmul.py --shape 256,64,128,4 --dtype float32 --rounds 2      # small, for a CPU

The dense product is one batched product of as many rows a group: what the same work costs where no load is uneven.
`lax.ragged_dot` is what JAX offers. Forward + backward is the product and the gradients of both arguments. Calls are repeated
in one compiled loop; implementations take turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import machine, repeated, seconds
from jax import Array, lax

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS

SHAPES = ("16384,1152,6144,8", "16384,3072,1152,8")


def loads(rows: int, groups: int) -> dict[str, np.ndarray]:
    """Sizes of the groups: even, and from few to about twice the mean."""
    even = np.full(groups, rows // groups)
    even[0] += rows - even.sum()
    skewed = np.linspace(0.05, 1.95, groups) * rows / groups
    skewed = np.random.default_rng(0).permutation(skewed).astype(int)
    skewed[0] += rows - skewed.sum()
    return {"even": even.astype(np.int32), "skewed": skewed.astype(np.int32)}


def dense(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """As if every group had the mean's rows."""
    rows = lhs.reshape(len(rhs), -1, lhs.shape[1])
    return jnp.einsum("xtk,xkn->xtn", rows, rhs).reshape(lhs.shape[0], -1)


def forward(function: Any, lhs: Array, rhs: Array, group_sizes: Array, d_out: Array) -> Array:
    return function(lhs, rhs, group_sizes)


def both(function: Any, lhs: Array, rhs: Array, group_sizes: Array, d_out: Array) -> Any:
    out, pullback = jax.vjp(lambda lhs, rhs: function(lhs, rhs, group_sizes), lhs, rhs)
    return out, pullback(d_out)


def errors(function: Any, arguments: tuple) -> float:
    """The largest difference from the reference, over results and gradients, each over its largest value."""
    wanted = both(functools.partial(grouped_matmul, implementation="reference"), *arguments)
    got = both(function, *arguments)

    def error(x: Array, y: Array) -> float:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))

    return max(jax.tree.leaves(jax.tree.map(error, got, wanted)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="T,K,N,X; may be repeated")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=20, help="calls in one timed program")
    parser.add_argument("--implementation", action="append", help="may be repeated; all, and lax.ragged_dot, if not given")
    parser.add_argument("--check", action="store_true", help="compare with the reference, time nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(jax.devices()[0].device_kind)
    rows = []
    for text in options.shape or SHAPES:
        T, K, N, X = map(int, text.split(","))
        keys = jax.random.split(jax.random.key(0), 3)
        lhs, rhs, d_out = (
            jax.random.normal(key, shape).astype(options.dtype)
            for key, shape in zip(keys, ((T, K), (X, K, N), (T, N)), strict=True)
        )
        functions: dict[str, Any] = {"dense": dense} if T % X == 0 else {}
        for name in options.implementation or [name for name in IMPLEMENTATIONS if name != "reference"]:
            functions[name] = functools.partial(grouped_matmul, implementation=name)
        if options.implementation is None:
            functions["ragged_dot"] = lax.ragged_dot
        for load, sizes in loads(T, X).items():
            print(f"{text}, {options.dtype}, {load} loads: {sizes.min()} to {sizes.max()} rows")
            arguments = (lhs, rhs, jnp.asarray(sizes), d_out)
            for name, one, products in (("forward", forward, 1), ("forward + backward", both, 3)):
                runs = {}
                for form, function in functions.items():
                    try:
                        runs[form] = repeated(functools.partial(one, function), options.repeat)
                        jax.block_until_ready(runs[form](*arguments))
                    except NotImplementedError as error:
                        print(f"  {form}: {error}")
                        runs.pop(form)
                    else:
                        if options.check and one is both and form != "dense":
                            print(f"  {form}: error {errors(function, arguments):.2e}")
                if options.check:
                    continue
                for form, times in seconds(runs, arguments, options.repeat, options.rounds).items():
                    median, work = statistics.median(times), products * 2 * T * K * N
                    rows.append({"shape": text, "load": load, "pass": name, "implementation": form, "seconds": times})
                    print(
                        f"  {name:18} {form:11} {median * 1e3:8.3f} ms ({min(times) * 1e3:.3f} to {max(times) * 1e3:.3f})  "
                        f"{work / median / 1e12:6.1f} TFLOP/s",
                        flush=True,
                    )
    if options.json:
        values = {"device": jax.devices()[0].device_kind, "rows": rows, "machine": machine()}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
