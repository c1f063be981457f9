"""A step of decoding through all layers in one kernel, `pallas_kernels.decode_layers`: what it wants of a model, and when."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bm_jax.cache import Cache
from bm_jax.config import ModelConfig
from bm_jax.layers import layer_norm, rms_norm
from bm_jax.model import Parameters
from pallas_kernels import dispatch
from pallas_kernels.decode_layers import Sizes, decode_layers_gpu, refusal

MOST_ROWS = 4
"""Batches up to this are decoded by the kernel: each row's expert is read for itself, so that XLA wins with many rows."""
LONGEST_PERIOD = 8
"""The kernel's program grows with the layers of a period."""


class Kernel(NamedTuple):
    """That a step is to be one kernel."""

    blocks: int
    """The number of the GPU's processors."""
    limited: bool = True
    """Whether a row has a limit on what may be drawn, see `bm_jax.sampling.sample`."""
    interpret: bool = False


def kernel_for(config: ModelConfig, batch: int) -> Kernel | None:
    """The kernel for steps of so many rows on this machine, or None where XLA takes them."""
    target = dispatch.target()
    there = target.platform == "gpu" and int(target.capability) == 9 and not dispatch.divided()
    fits = batch <= MOST_ROWS and len(config.layers) <= LONGEST_PERIOD and config.compute_dtype == "bfloat16"
    if not (there and fits) or config.residual_dtype != "float32" or dispatch.overridden("decode_layers") == "xla":
        return None
    kernel = Kernel(jax.devices()[0].core_count)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return kernel if refusal(step_sizes(config, batch, kernel.blocks)) is None else None
    except NotImplementedError:
        return None


@partial(jax.jit, static_argnames=("config",))
def stacked(cache: Cache, config: ModelConfig) -> Cache:
    """The cache of `unrolled(config)` as that of `config`."""
    count = len(config.layers)
    layers = {
        f"layer_{j}": jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves), *(cache.layers[f"layer_{r * count + j}"] for r in range(config.repeats))
        )
        for j in range(count)
    }
    return cache._replace(layers=layers)


@partial(jax.jit, static_argnames=("config",))
def step_parameters(parameters: Parameters, config: ModelConfig) -> Parameters:
    """What `advance` needs of a model's parameters."""
    ends = ("embedding", "final_norm", "final_norm_bias")
    return {"layers": step_weights(parameters, config)} | {name: parameters[name] for name in ends if name in parameters}


def advance(parameters: Parameters, token: Array, cache: Cache, config: ModelConfig, kernel: Kernel) -> tuple[Array, Cache]:
    """`bm_jax.model.forward` of one token of each row `[B]`: hidden values `[B, 1, M]` and the next cache.

    `parameters` are those of `step_parameters`, the cache is that of `config` (see `stacked`). What passes between operations
    is rounded less than `forward` rounds it.
    """
    residual = parameters["embedding"][token].astype(jnp.float32)
    arrays: dict[str, Any] = parameters["layers"] | step_cache(cache)
    out = decode_layers_gpu(residual, arrays, step_sizes(config, len(token), kernel.blocks), kernel.interpret)
    if config.final_norm == "layernorm":
        norm = layer_norm(out["residual_out"], parameters["final_norm"], parameters["final_norm_bias"], config.norm_eps)
    else:
        norm = rms_norm(out["residual_out"], parameters["final_norm"], config.norm_eps)
    layers = {
        f"layer_{j}": {"mamba": {name: out[f"{name}_out_{j}"] for name in ("conv", "state")}} if kind == "mamba" else {}
        for j, kind in enumerate(config.layers)
    }
    cache = Cache(layers, cache.segment, cache.positions + 1, cache.length + 1)
    return norm.astype(config.compute_dtype)[:, None], cache


def step_sizes(config: ModelConfig, batch: int, blocks: int) -> Sizes:
    """What the kernel is specialised for; `blocks` is the number of the GPU's processors.

    Raises:
        NotImplementedError: the model has what the kernel lacks; the message says what.
    """
    lacks = {
        "norms inside its Mamba layers": "mamba" in config.layers and config.mamba.inner_norms,
        f"the router {config.moe.router}": "moe" in config.layers and config.moe.router == "topk",
    }
    if found := [what for what, there in lacks.items() if there]:
        raise NotImplementedError(f"decode_layers: it cannot run a model with {' and '.join(found)}")
    parts = {kind: getattr(config, kind) for kind in ("moe", "mlp") if kind in config.layers}
    return Sizes(
        kinds=config.layers,
        repeats=config.repeats,
        batch=batch,
        width=config.width,
        inner=config.inner_width,
        states=config.mamba.state_size,
        taps=config.mamba.conv_width,
        rank=config.dt_rank + -config.dt_rank % 8,
        experts=config.moe.experts,
        hidden={kind: part.width for kind, part in parts.items()},
        activation={kind: part.activation for kind, part in parts.items()},
        softmax_gate=config.moe.router == "switch",
        router_bias=config.moe.router_bias,
        eps=config.norm_eps,
        blocks=blocks,
    )


def step_weights(parameters: Parameters, config: ModelConfig) -> dict[str, Array]:
    """The parameters of all layers, outputs before inputs and products in bfloat16: a copy, made once."""
    half, found = jnp.bfloat16, {}
    for j, kind in enumerate(config.layers):
        p = parameters["periods"][f"layer_{j}"][kind]
        own = {"norm": p["norm"]}
        if kind == "mamba":
            pad = -config.dt_rank % 8
            own |= {name: p[name] for name in ("dt_bias", "D")}
            own |= {name: p[name].astype(half) for name in ("conv_weight", "conv_bias")}
            own["in_proj"] = jnp.transpose(p["in_proj"], (0, 3, 2, 1)).reshape(config.repeats, -1, config.width).astype(half)
            low, rest = jnp.split(p["x_proj"], [config.dt_rank], axis=-1)
            own["x_proj"] = jnp.concatenate([jnp.pad(low, ((0, 0), (0, 0), (0, pad))), rest], axis=-1).astype(half)
            own["dt_proj"] = jnp.pad(jnp.swapaxes(p["dt_proj"], 1, 2), ((0, 0), (0, 0), (0, pad))).astype(half)
            own["A"] = -jnp.exp(p["A_log"]) * math.log2(math.e)
            own["out_proj"] = jnp.swapaxes(p["out_proj"], 1, 2).astype(half)
        else:
            *lead, M, _, F = p["w_in"].shape
            own["w_in"] = jnp.moveaxis(p["w_in"], -3, -1).swapaxes(-3, -2).reshape(*lead, 2 * F, M).astype(half)
            own["w_out"] = jnp.swapaxes(p["w_out"], -1, -2).astype(half)
        if kind == "moe":
            own["router"] = jnp.swapaxes(p["router"], 1, 2)
            own |= {"router_bias": p["router_bias"]} if config.moe.router_bias else {}
        found |= {f"{name}_{j}": value for name, value in own.items()}
    return found


def step_cache(cache: Cache) -> dict[str, Array]:
    """The cache's arrays under the kernel's names."""
    return {
        f"{name}_{layer.removeprefix('layer_')}": value
        for layer, kinds in cache.layers.items()
        for name, value in kinds.get("mamba", {}).items()
    }
