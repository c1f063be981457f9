"""The operators along time on a mesh: the only shard_map of the convolution and the scan.

Each function has the signature and the results of the operator of the same name. Where the mesh splits the sequence, its
shards exchange what passes from one to the next; a sequence that its devices do not divide (a decoding step) stays whole.
The scan runs in a shard_map on every mesh of several devices, as XLA cannot split a kernel by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from bm_jax.sharding import layout
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
    return _map(partial(conv_operator.causal_conv_over, AXIS), arguments, specs, (specs["x"], state))


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
    return _map(function, arguments, specs, (tokens, state))


def splits(length: int) -> bool:
    """Whether the current mesh splits a sequence of this many tokens."""
    parts = jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)
    return parts > 1 and length % parts == 0


def _map(
    function: Callable[..., tuple[Array, Array]],
    arguments: dict[str, Array | None],
    specs: dict[str, P],
    results: tuple[P, P],
) -> tuple[Array, Array]:
    """`function(**arguments)` on each device's shards of the arguments."""
    present = {name: array for name, array in arguments.items() if array is not None}
    dtypes = {name: array.dtype for name, array in present.items()}

    def shard(arrays: dict[str, Array]) -> tuple[Array, Array]:
        return function(**{name: array.astype(dtypes[name]) for name, array in arrays.items()})

    wide = {name: _widen(array, specs[name]) for name, array in present.items()}
    # Not checked for replication: the operators' loops start from constants, which the check takes to be replicated.
    mapped = jax.shard_map(shard, in_specs=({name: specs[name] for name in present},), out_specs=results, check_vma=False)
    return mapped(wide)


def _widen(array: Array, spec: P) -> Array:
    """At least float32 if several devices have the same part of it: the gradient is the sum of theirs."""
    mesh = jax.sharding.get_abstract_mesh()
    named = [name for entry in spec if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)]
    copies = mesh.size // math.prod(mesh.shape[name] for name in named)
    if copies == 1 or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
