"""A model's parameters and cache as `pallas_kernels.decode_layers` wants them: the one kernel that is a step of decoding."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from bm_jax.cache import Cache
from bm_jax.config import ModelConfig
from bm_jax.model import Parameters
from pallas_kernels.decode_layers import Sizes


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
