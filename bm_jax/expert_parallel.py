"""The experts on a mesh: the only shard_map of the experts.

Each device holds `X / expert` experts, split further over `fsdp` (gathered here) and `tensor` (whose shares of the output are
summed). Tokens lie split over the batch axes and `sequence`. A device sends its rows to the devices of their experts along
the `expert` axis (`bm_jax.expert_exchange`), each with room for `SLACK` times the mean or, where one gets more, for all;
runs its own experts on what it receives; and gets its rows back the same way.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from bm_jax.config import Activation
from bm_jax.expert_exchange import EXCHANGES
from bm_jax.experts import apply_experts as apply_on_one_device
from bm_jax.experts import expert_products, weigh
from bm_jax.quantize import Quantized
from bm_jax.sharding import AXES, axes_of, layout, map_shards, parameter_spec

SLACK = 1.25
"""Room for the rows that a device receives, over their mean."""
FEW = 8
"""Up to so many devices a ring sends no more for an all_to_all than for a reduce_scatter of twice the bytes, by count."""


def apply_experts(
    w_in: Array | Quantized,
    w_out: Array | Quantized,
    tokens: Array,
    expert: Array,
    gate: Array,
    activation: Activation,
    *,
    exchange: Literal["padded", "ragged"] = "padded",
) -> Array:
    """`bm_jax.experts.apply_experts` for tokens `[B, L, M]`, expert and gate `[B, L, K]`, weights of any float dtype or,
    on one device, quantised.

    `exchange` is how rows travel between the devices of the `expert` axis, see `bm_jax.expert_exchange`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        w_in, w_out = (w if isinstance(w, Quantized) else w.astype(tokens.dtype) for w in (w_in, w_out))
        rows, expert, gate = (array.reshape(-1, array.shape[-1]) for array in (tokens, expert, gate))
        return apply_on_one_device(w_in, w_out, rows, expert, gate, activation).reshape(tokens.shape)
    if isinstance(w_in, Quantized) or isinstance(w_out, Quantized):
        raise NotImplementedError("apply_experts: quantised experts run on one device")
    split = layout(tokens.shape, "batch", "sequence", None)
    weights = {"w_in": w_in, "w_out": w_out}
    specs = {
        name: P(*parameter_spec(f"periods/layer/moe/{name}", (1, *w.shape), mesh.shape)[1:]) for name, w in weights.items()
    }
    gathered = {name: next(i for i, axes in enumerate(spec) if "fsdp" in axes_of(P(axes))) for name, spec in specs.items()}
    specs |= dict.fromkeys(("tokens", "expert", "gate"), split)
    arguments = weights | {"tokens": tokens, "expert": expert, "gate": gate}
    shard = functools.partial(_shard, gathered=gathered, activation=activation, exchange=exchange)
    return map_shards(shard, arguments, specs, split)


def _shard(
    w_in: Array,
    w_out: Array,
    tokens: Array,
    expert: Array,
    gate: Array,
    *,
    gathered: dict[str, int],
    activation: Activation,
    exchange: str,
) -> Array:
    """One device's tokens through all experts, from its share of the weights, which `fsdp` splits along `gathered`."""
    shape = tokens.shape
    tokens, expert, gate = (array.reshape(-1, array.shape[-1]) for array in (tokens, expert, gate))
    w_in, w_out = (cast(Array, _gather(w, gathered[name], tokens.dtype)) for name, w in (("w_in", w_in), ("w_out", w_out)))
    T, K = expert.shape
    rows, assigned = jnp.repeat(tokens, K, axis=0), expert.reshape(-1)
    if lax.axis_size("expert") == 1:
        out = _products(w_in, w_out, rows, assigned, activation)
    else:
        out = _exchanged(w_in, w_out, rows, assigned, activation, exchange)
    return weigh(out.reshape(T, K, -1), gate).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w: Array, axis: int, dtype: jnp.dtype) -> Array:
    """The whole of a weight that `fsdp` splits along `axis`, sent in `dtype`; its gradient is summed in float32 or wider."""
    return lax.all_gather(w.astype(dtype), "fsdp", axis=axis, tiled=True)


def _scatter(axis: int, dtype: jnp.dtype, like: Array, d: Array) -> tuple[Array]:
    """A device's part of the sum of all gradients; on few devices each sends its own as they are, in `dtype`."""
    devices, wide = lax.axis_size("fsdp"), jnp.promote_types(like.dtype, jnp.float32)
    if devices > FEW:
        total = lax.psum_scatter(d.astype(wide), "fsdp", scatter_dimension=axis, tiled=True)
    else:
        parts = d.reshape(*d.shape[:axis], devices, -1, *d.shape[axis + 1 :])
        total = jnp.sum(lax.all_to_all(parts, "fsdp", axis, 0), axis=0, dtype=wide)
    return (total.astype(like.dtype),)


_gather.defvjp(lambda w, axis, dtype: (_gather(w, axis, dtype), jnp.zeros((), w.dtype)), _scatter)


def _products(w_in: Array, w_out: Array, rows: Array, expert: Array, activation: Activation) -> Array:
    out = expert_products(w_in, w_out, rows, expert, activation)
    return lax.psum(out, "tensor")


def _exchanged(w_in: Array, w_out: Array, rows: Array, expert: Array, activation: Activation, exchange: str) -> Array:
    """`_products` where the rows' experts live on any device of the `expert` axis."""
    devices, own, count = lax.axis_size("expert"), len(w_in), len(rows)
    with jax.named_scope("all_to_all"):
        travel = EXCHANGES[exchange](expert // own)  # `devices` for no expert

    def through(room: int, w_in: Array, w_out: Array, rows: Array) -> Array:
        """With room for so many rows on each device."""
        with jax.named_scope("all_to_all"):
            there = travel.there(rows, room)
            there_expert = travel.labels((expert % own).astype(jnp.int32), room, own)
        out = _products(w_in, w_out, there, there_expert, activation)
        with jax.named_scope("all_to_all"):
            return travel.back(out)

    all_room = devices * count
    room = min(all_room, math.ceil(SLACK * count / devices / 8) * 8 * devices)
    if room == all_room:
        return through(all_room, w_in, w_out, rows)
    # The same on every device, as both branches exchange rows.
    fits = lax.pmax(travel.most, AXES) <= room
    # The backward pass computes the rare branch again: what it would keep takes memory whichever branch is taken.
    rare = jax.checkpoint(functools.partial(through, all_room))
    return lax.cond(fits, functools.partial(through, room), rare, w_in, w_out, rows)
