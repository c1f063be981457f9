"""The operators along time on a mesh: the only shard_map of the convolution and the scan.

Each function has the signature and the results of the operator of the same name. Where the mesh splits the sequence, its
shards exchange what passes from one to the next; a sequence that its devices do not divide (a decoding step) stays whole.
The scan runs in a shard_map on every mesh of several devices, as XLA cannot split a kernel by itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from bm_jax.sharding import layout, map_shards
from pallas_kernels import causal_conv as conv_operator
from pallas_kernels import selective_scan as scan_operator

AXIS = "sequence"


def causal_conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.causal_conv.causal_conv`, with x `[B, L, E]` split over batch, sequence and tensor axes."""
    arguments: dict[str, Any] = dict(x=x, weight=weight, bias=bias, initial_state=initial_state, segment_ids=segment_ids)
    if not splits(x.shape[1]):
        return conv_operator.causal_conv(**arguments)
    batch, time, channels = layout(x.shape, "batch", AXIS, "tensor")
    state = P(batch, None, channels)
    specs = {
        "x": P(batch, time, channels),
        "weight": P(None, channels),
        "bias": P(channels),
        "initial_state": state,
        "segment_ids": P(batch, time),
    }
    return map_shards(partial(conv_operator.causal_conv_over, AXIS), arguments, specs, (specs["x"], state))


def selective_scan(
    u: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    z: Array | None = None,
    dt_bias: Array | None = None,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.selective_scan.selective_scan`, with u `[B, L, E]` split over batch, sequence and tensor axes."""
    arguments: dict[str, Any] = dict(
        u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state, segment_ids=segment_ids
    )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return scan_operator.selective_scan(**arguments)
    split = splits(u.shape[1])
    function = partial(scan_operator.selective_scan_over, AXIS) if split else scan_operator.selective_scan
    batch, time, channels = layout(u.shape, "batch", AXIS if split else None, "tensor")
    tokens, state = P(batch, time, channels), P(batch, channels, None)
    specs = dict.fromkeys(("u", "dt", "z"), tokens) | dict.fromkeys(("B", "C"), P(batch, time, None))
    specs |= dict.fromkeys(("D", "dt_bias"), P(channels))
    specs |= {"A": P(channels, None), "initial_state": state, "segment_ids": P(batch, time)}
    return map_shards(function, arguments, specs, (tokens, state))


def splits(length: int) -> bool:
    """Whether the current mesh splits a sequence of this many tokens."""
    parts = jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)
    return parts > 1 and length % parts == 0
