"""Time of the selective scan, forward and with its backward, for every implementation that can run here, against floors.

    python benchmarks/selective_scan.py --json scan.json
    python benchmarks/selective_scan.py --check --states 8
    python benchmarks/selective_scan.py --shape 1,256,64 --rounds 2      # small, for a CPU

The floors are counted: one exponential for every token, channel and state, and every input and output moved once. The
ceilings that turn them into time, exponentials and bytes a second, are measured in the same run. Calls are repeated inside
one compiled loop, so that what is timed is the device and not the launch; implementations take turns.
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
from harness import machine, repeated, seconds
from jax import Array, lax

from pallas_kernels.dispatch import target
from pallas_kernels.lanes import WARPGROUP, launch
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan.api import IMPLEMENTATIONS

SHAPES = ("8,2048,2304", "8,2048,2944", "64,2048,2304", "1,65536,2304", "4,8192,2048", "1,2048,2304", "8,1,2304", "1,8,2304")
CHAINS, TURNS = 8, 4096
ASSOCIATIVE_BYTES = 20e9
"""`lax.associative_scan` holds every state several times over; it is left out where those would need more than this."""


def associative(u, dt, A, B, C, D, *, z, dt_bias) -> tuple[Array, Array]:
    """The scan as most people write it in JAX."""
    step = jax.nn.softplus(dt.astype(jnp.float32) + dt_bias)
    decay = jnp.exp(step[..., None] * A)
    increment = (step * u)[..., None] * B[:, :, None, :].astype(jnp.float32)
    combine = lambda first, second: (first[0] * second[0], second[0] * first[1] + second[1])  # noqa: E731
    states = lax.associative_scan(combine, (decay, increment), axis=1)[1]
    y = jnp.einsum("blen,bln->ble", states, C.astype(jnp.float32)) + D * u
    return (y * jax.nn.silu(z.astype(jnp.float32))).astype(u.dtype), states[:, -1]


def make(batch: int, length: int, channels: int, states: int, dtype: str, dt_dtype: str) -> dict[str, Array]:
    """Random arguments with step sizes as a model's."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    wide, narrow = (batch, length, channels), (batch, length, states)
    values = {"u": normal(*wide), "dt": normal(*wide), "B": normal(*narrow), "C": normal(*narrow), "z": normal(*wide)}
    rest = {
        "A": -jnp.broadcast_to(jnp.arange(1.0, states + 1), (channels, states)),
        "D": normal(channels),
        "dt_bias": normal(channels) - 4,
    }
    return {name: value.astype(dt_dtype if name == "dt" else dtype) for name, value in values.items()} | rest


def call(function: Any, a: dict[str, Array]) -> tuple[Array, Array]:
    return function(a["u"], a["dt"], a["A"], a["B"], a["C"], a["D"], z=a["z"], dt_bias=a["dt_bias"])


def forward(function: Any, a: dict[str, Array], dy: Array) -> Any:
    return call(function, a)[0]


def both(function: Any, a: dict[str, Array], dy: Array) -> Any:
    y, pullback = jax.vjp(lambda a: call(function, a)[0], a)
    return y, pullback(dy)[0]


def exponentials(lanes: Any, refs: Any) -> None:
    """CHAINS chains of TURNS exponentials in every lane."""

    def several(_: Any, values: list[Any]) -> list[Any]:
        for _ in range(16):
            values = [lanes.exp2(-value) for value in values]
        return values

    (x,) = lanes.load(refs.x, (lanes.thread,), 1)
    values = lanes.loop(TURNS // 16, several, [x + k for k in range(CHAINS)])
    lanes.store(refs.y, (lanes.block, lanes.thread), [functools.reduce(lambda a, b: a + b, values)])


def ceilings(rounds: int) -> dict[str, float]:
    """Exponentials and bytes a second that this machine reaches, the first in a kernel of nothing else where one can run."""
    on_gpu = jax.default_backend() == "gpu"
    size = 1 << (27 if on_gpu else 20)
    x = jax.random.uniform(jax.random.key(0), (size,))
    if on_gpu and target().capability >= 9:
        blocks = 132 * 16
        shape = jax.ShapeDtypeStruct((blocks, WARPGROUP), jnp.float32)
        many = jax.jit(lambda x: launch(exponentials, blocks, {"x": x[:WARPGROUP]}, {"y": shape}, {})["y"])
        count = blocks * WARPGROUP * CHAINS * TURNS
    else:
        many = jax.jit(lambda x: lax.fori_loop(0, 256, lambda _, x: jnp.exp2(x - 1), x[: size // 32], unroll=32))
        count = size // 32 * 256
    copy = repeated(lambda x: x + 1, 10)
    runs = {"exp": many, "copy": copy}
    seconds(runs, (x,), 1, 1)
    times = seconds(runs, (x,), 1, rounds)
    return {
        "exponentials": count / statistics.median(times["exp"]),
        "bytes": 10 * 8 * size / statistics.median(times["copy"]),
    }


def measure(shape: tuple[int, int, int], options: argparse.Namespace, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """One row a pass and implementation."""
    batch, length, channels = shape
    a = make(batch, length, channels, options.states, options.dtype, options.dt_dtype or options.dtype)
    dy = jax.random.normal(jax.random.key(1), shape).astype(options.dtype)
    functions: dict[str, Any] = {
        name: functools.partial(selective_scan, implementation=name)
        for name in IMPLEMENTATIONS
        if name != "reference" and name in (options.implementation or IMPLEMENTATIONS)
    }
    if options.implementation is None and batch * length * channels * options.states * 4 * 8 < ASSOCIATIVE_BYTES:
        functions["associative_scan"] = associative
    rows = []
    exponentials = batch * length * channels * options.states
    for name, one in (("forward", forward), ("forward + backward", both)):
        runs, memory = {}, {}
        for form, function in functions.items():
            single = functools.partial(one, function)
            try:
                analysis = jax.jit(single).lower(a, dy).compile().memory_analysis()
                runs[form] = repeated(single, options.repeat)
                jax.block_until_ready(runs[form](a, dy))
            except NotImplementedError as error:
                print(f"  {form}: {error}")
                runs.pop(form, None)
                continue
            assert analysis is not None
            kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
            memory[form] = (kept + analysis.temp_size_in_bytes) / kept
        results = jax.eval_shape(functools.partial(one, associative), a, dy)
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((a, results)))
        # The backward pass needs each exponential once more, and reads the inputs and dy again.
        passes, extra = (1, 0) if one is forward else (2, moved // 3)
        floor = max(passes * exponentials / ceiling["exponentials"], (moved + extra) / ceiling["bytes"])
        times = seconds(runs, (a, dy), options.repeat, options.rounds)
        medians = {form: statistics.median(values) for form, values in times.items()}
        ratios = {peer: medians.get(peer, float("nan")) for peer in ("xla", "associative_scan")}
        for form, values in times.items():
            rows.append(
                {
                    "shape": shape, "pass": name, "implementation": form, "seconds": values, "median": medians[form],
                    "fraction of floor": floor / medians[form], "floor": floor, "memory over kept": memory[form],
                    **{f"times faster than {peer}": ratios[peer] / medians[form] for peer in ratios if peer in medians},
                }
            )  # fmt: skip
            print(
                f"  {name:18} {form:16} {medians[form] * 1e3:9.3f} ms ({min(values) * 1e3:.3f} to {max(values) * 1e3:.3f})  "
                f"{floor / medians[form]:5.1%} of floor  {ratios['xla'] / medians[form]:6.2f}x xla  "
                f"{ratios['associative_scan'] / medians[form]:6.2f}x associative  memory {memory[form]:.2f}",
                flush=True,
            )
    return rows


def check(states: int) -> None:
    """Compare every implementation that serves this machine with the plain loop, in value and in every gradient.

    Float32's rounding over a hundred dependent steps and some hundred terms stays below 1e-5 of the largest value; results
    in bfloat16 are rounded once more, by at most 2**-8 of it.
    """
    bad = []
    for length, channels, dtype in ((1, 130, "float32"), (33, 130, "float32"), (257, 64, "float32"), (64, 192, "bfloat16")):
        a = make(2, length, channels, states, dtype, dtype) | {"dt_bias": jnp.linspace(-6, 2, channels)}
        extra = {
            "initial_state": jax.random.normal(jax.random.key(2), (2, channels, states)),
            "segment_ids": jnp.arange(length)[None] // jnp.array([[5], [31]]),
        }
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), a)
        dy = jax.random.normal(jax.random.key(1), (2, length, channels)).astype(dtype)

        def results(name, a, dy, extra=extra):
            def loss(a):
                y, final = call(functools.partial(selective_scan, implementation=name, **extra), a)
                return jnp.sum(y.astype(jnp.float32) * dy) + jnp.sum(final), (y, final)

            gradients, (y, final) = jax.jit(jax.grad(loss, has_aux=True))(a)
            return {"y": y, "final state": final} | {f"gradient of {key}": value for key, value in gradients.items()}

        wanted = results("reference", wide, dy)
        for name in IMPLEMENTATIONS:
            try:
                got = results(name, a, dy)
            except NotImplementedError:
                continue
            for key, value in got.items():
                error = jnp.max(jnp.abs(value.astype(jnp.float32) - wanted[key])) / jnp.max(jnp.abs(wanted[key]))
                limit = 1e-5 + (2.0**-8 if value.dtype == jnp.bfloat16 else 0)
                if not error <= limit:
                    bad.append(f"{name}, L={length}, {dtype}: {key} is off by {error:.1e}, at most {limit:.1e}")
            print(f"checked {name} at L={length}, E={channels}, N={states}, {dtype}")
    if bad:
        raise SystemExit("\n".join(bad))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="B,L,E; may be repeated")
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dt-dtype", help="of dt, where it differs: the models here pass float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=5, help="calls in one timed program")
    parser.add_argument(
        "--implementation", action="append", help="may be repeated; all, and lax.associative_scan, if not given"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="compare values and gradients with the reference, time nothing")
    options = parser.parse_args()
    if options.check:
        return check(options.states)
    device = jax.devices()[0].device_kind
    ceiling = ceilings(options.rounds)
    print(f"{device}: {ceiling['exponentials']:.3g} exponentials and {ceiling['bytes']:.3g} bytes a second")
    rows = []
    for text in options.shape or SHAPES:
        print(f"{text} x {options.states} states, {options.dtype}")
        batch, length, channels = map(int, text.split(","))
        rows += measure((batch, length, channels), options, ceiling)
    if options.json:
        values = {"device": device, "ceilings": ceiling, "rows": rows, "machine": machine()}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
