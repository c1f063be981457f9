"""The experts on a mesh.

Each device holds `X / expert` experts, split further over `fsdp` (gathered, `gather_experts`) and `tensor` (whose shares of the
output are summed). Tokens lie split over the batch axes and `sequence`. A device sends its rows to the devices of their
experts along the `expert` axis (`bm_jax.expert_exchange`), each with room for `SLACK` times the mean or, where one gets more,
for all; runs its own experts on what it receives; and gets its rows back the same way.
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
"""Up to so many devices a ring sends no more for an all_to_all than for a reduce_scatter of twice the bytes, by count. They are
also those on which the order of exchanges and products is set here; on more it is left to the compiler."""

Weights = dict[str, Array | Quantized]


def gather_experts(tokens: Array, weights: Weights) -> tuple[Array, Array, Weights]:
    """`w_in` and `w_out` as `apply_experts` takes them: on a mesh, in front of all axes one of the devices' own copies.

    Returns:
        The tokens for the experts; the same for the router; and the weights. The router waits for weights that `fsdp` splits
        over few devices, so that they travel while the layer before works, not between routing and the experts; and in the
        backward pass the gradient of the tokens waits for those of the weights, so that these travel while the experts work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tokens, tokens, weights
    if any(isinstance(w, Quantized) for w in weights.values()):
        raise NotImplementedError("gather_experts: quantised experts run on one device")
    arrays = cast(dict[str, Array], weights)
    specs = {name: _spec(name, w.shape) for name, w in arrays.items()}
    split = {name: next(i for i, axes in enumerate(spec) if "fsdp" in axes_of(P(axes))) for name, spec in specs.items()}

    def gather(**shards: Array) -> dict[str, Array]:
        return {name: cast(Array, _gather(w, split[name], tokens.dtype))[None] for name, w in shards.items()}

    whole = {name: _whole(spec) for name, spec in specs.items()}
    if not 1 < mesh.shape["fsdp"] <= FEW:
        return tokens, tokens, map_shards(gather, arrays, specs, whole)
    tokens, arrays = _back_after(tokens, arrays)
    early, gathered = _after(tokens, map_shards(gather, arrays, specs, whole))
    return tokens, early, gathered


@jax.custom_vjp
def _after(x: Array, others: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Both, `x` to be used once the others are there; the last of these, which the backward pass uses first, waits for none."""
    kept = {}
    for name in reversed(others):
        x, kept[name] = lax.optimization_barrier((x, others[name]))
    return x, kept


_after.defvjp(lambda *arguments: (_after(*arguments), None), lambda _, d: d)


@jax.custom_vjp
def _back_after(x: Array, others: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Both, the gradient of `x` to be used once those of the others are there."""
    return x, others


_back_after.defvjp(lambda *arguments: (arguments, None), lambda _, d: lax.optimization_barrier(d))


def _spec(name: str, shape: tuple[int, ...]) -> P:
    """How the weight of a layer is split on the current mesh."""
    return P(*parameter_spec(f"periods/layer/moe/{name}", (1, *shape), jax.sharding.get_abstract_mesh().shape)[1:])


def _whole(spec: P) -> P:
    """That of a gathered weight: without `fsdp`, and a first axis of the copies that devices have."""
    entries = [tuple(axis for axis in axes_of(P(entry)) if axis != "fsdp") or None for entry in spec]
    return P(tuple(axis for axis in AXES if axis not in axes_of(P(*entries))), *entries)


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
    """`bm_jax.experts.apply_experts` for tokens `[B, L, M]`, expert and gate `[B, L, K]`, weights as `gather_experts` returns
    them, on one device also quantised.

    `exchange` is how rows travel between the devices of the `expert` axis, see `bm_jax.expert_exchange`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        w_in, w_out = (w if isinstance(w, Quantized) else w.astype(tokens.dtype) for w in (w_in, w_out))
        rows, expert, gate = (array.reshape(-1, array.shape[-1]) for array in (tokens, expert, gate))
        return apply_on_one_device(w_in, w_out, rows, expert, gate, activation).reshape(tokens.shape)
    split = layout(tokens.shape, "batch", "sequence", None)
    arguments = {"w_in": cast(Array, w_in), "w_out": cast(Array, w_out), "tokens": tokens, "expert": expert, "gate": gate}
    specs = {name: _whole(_spec(name, arguments[name].shape[1:])) for name in ("w_in", "w_out")}
    specs |= dict.fromkeys(("tokens", "expert", "gate"), split)
    return map_shards(functools.partial(_shard, activation=activation, exchange=exchange), arguments, specs, split)


def _shard(
    w_in: Array, w_out: Array, tokens: Array, expert: Array, gate: Array, *, activation: Activation, exchange: str
) -> Array:
    """One device's tokens through all experts, from its copy of the weights."""
    shape = tokens.shape
    tokens, expert, gate = (array.reshape(-1, array.shape[-1]) for array in (tokens, expert, gate))
    w_in, w_out = w_in[0], w_out[0]
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
