"""Time of the whole MoE layer, forward and with its backward, against a dense batched MLP that does the same active work.

    python benchmarks/moe_layer.py --json layer.json
    python benchmarks/moe_layer.py --preset default --batch 4 --length 64 --rounds 2         # small, for a CPU

The dense peer multiplies the tokens, cut in as many equal parts as there are experts, by the experts' matrices in batched
products: no router, no sort, even loads. Beside the layer in training, it times the layer with another number of Sinkhorn
iterations, whose difference is what an iteration costs, and the experts alone with the choices made. Weights are in the
compute dtype. Gradients are those of all weights and of the input.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness import machine, repeated, seconds
from jax import Array

from bm_jax.experts import apply_experts
from bm_jax.layers import Context, activate
from bm_jax.moe import moe, moe_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="blackmamba_340m_1p5b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=10, help="calls in one timed program")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = importlib.import_module(f"configs.{options.preset}").config.model
    X, shape = model.moe.experts, (options.batch, options.length, model.width)
    dtype = jnp.dtype(model.compute_dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    parameters = {
        name: parameter.initializer(jax.random.fold_in(keys[0], k), parameter.shape, jnp.dtype(jnp.float32))
        for k, (name, parameter) in enumerate(moe_parameters(model).items())
    }
    weights = {name: parameters[name].astype(dtype) for name in ("w_in", "w_out")}
    rest = {name: value for name, value in parameters.items() if name not in weights}
    x, dy = (jax.random.normal(key, shape).astype(dtype) for key in keys[1:3])
    context = Context(None, None, jnp.zeros(shape[:2], jnp.int32), jnp.zeros(shape[0], bool), jnp.zeros((), jnp.int32))
    choice = jax.random.permutation(keys[3], jnp.arange(options.batch * options.length) % X)[:, None]
    iterations = model.moe.sinkhorn_iterations

    def layer(count: int) -> Any:
        config = dataclasses.replace(model, moe=dataclasses.replace(model.moe, sinkhorn_iterations=count))
        return lambda weights, rest, x: moe(weights | rest, x, context, config, training=True)[0]

    def dense(weights: dict[str, Array], rest: dict[str, Array], x: Array) -> Array:
        tokens = x.reshape(X, -1, model.width)
        hidden = jnp.einsum("xtm,xmaf->xtaf", tokens, weights["w_in"])
        return jnp.einsum("xtf,xfm->xtm", activate(hidden, model.moe.activation), weights["w_out"]).reshape(x.shape)

    def experts(weights: dict[str, Array], rest: dict[str, Array], x: Array) -> Array:
        tokens, gate = x.reshape(-1, model.width), jnp.ones(choice.shape, jnp.float32)
        return apply_experts(weights["w_in"], weights["w_out"], tokens, choice, gate, model.moe.activation).reshape(x.shape)

    functions = {
        "dense": dense,
        "experts": experts,
        "layer": layer(iterations),
        f"layer, {3 * iterations} iterations": layer(3 * iterations),
    }

    def forward(function: Any) -> Any:
        return lambda weights, rest, x, dy: function(weights, rest, x)

    def both(function: Any) -> Any:
        def run(weights, rest, x, dy):
            y, pullback = jax.vjp(function, weights, rest, x)
            return y, pullback(dy)

        return run

    print(f"{jax.devices()[0].device_kind}: {options.preset}, {options.batch} x {options.length} tokens, {X} experts")
    rows = []
    for name, one in (("forward", forward), ("forward + backward", both)):
        runs = {form: repeated(one(function), options.repeat) for form, function in functions.items()}
        arguments = (weights, rest, x, dy)
        seconds(runs, arguments, options.repeat, 1)
        times = seconds(runs, arguments, options.repeat, options.rounds)
        medians = {form: statistics.median(values) for form, values in times.items()}
        for form, values in times.items():
            rows.append({"pass": name, "form": form, "seconds": values})
            print(
                f"  {name:18} {form:20} {medians[form] * 1e3:8.3f} ms ({min(values) * 1e3:.3f} to {max(values) * 1e3:.3f})  "
                f"{medians[form] / medians['dense']:5.2f} of dense"
            )
        more = (medians[f"layer, {3 * iterations} iterations"] - medians["layer"]) / 2
        print(f"  {name:18} Sinkhorn, {iterations} iterations: {more * 1e3:.3f} ms, {more / medians['layer']:.1%} of the layer")
    if options.json:
        values = {"device": jax.devices()[0].device_kind, "rows": rows, "machine": machine()}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
