"""Where arrays live: the mesh, one table from parameter path to PartitionSpec, and `constrain` for activations.

Mesh axes are roles. `data` and `fsdp` split the batch; `fsdp` also splits parameters; `expert` splits experts; `tensor`
splits inner channels, heads and hidden widths; `sequence` splits time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bm_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp", "expert")

P = PartitionSpec

PARAMETER_SPECS: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding", P("tensor", "fsdp")),
    (r"unembedding", P("fsdp", "tensor")),
    (r"final_norm(_bias)?", P()),
    (r"periods/.*/norm", P()),
    (r"periods/.*/mamba/in_proj", P(None, "fsdp", None, "tensor")),
    (r"periods/.*/mamba/conv_weight", P(None, None, "tensor")),
    (r"periods/.*/mamba/(conv_bias|dt_bias|D)", P(None, "tensor")),
    (r"periods/.*/mamba/(x_proj|A_log)", P(None, "tensor", None)),
    (r"periods/.*/mamba/dt_proj", P(None, None, "tensor")),
    (r"periods/.*/mamba/out_proj", P(None, "tensor", "fsdp")),
    (r"periods/.*/mamba/(dt|B|C)_norm", P()),
    (r"periods/.*/attention/(query|key|value)", P(None, "fsdp", "tensor", None)),
    (r"periods/.*/attention/out", P(None, "tensor", None, "fsdp")),
    (r"periods/.*/mlp/w_in", P(None, "fsdp", None, "tensor")),
    (r"periods/.*/mlp/w_out", P(None, "tensor", "fsdp")),
    (r"periods/.*/moe/router(_bias)?", P()),
    (r"periods/.*/moe/w_in", P(None, ("expert", "fsdp"), None, None, "tensor")),
    (r"periods/.*/moe/w_out", P(None, ("expert", "fsdp"), "tensor", None)),
)
"""Pattern of the whole parameter path, and how the array is split. The first axis of `periods` is the loop over depth.

Experts are split by `fsdp`, too: whole ones are gathered, and their gradients scattered, without a transpose. Where there are
too few of them, `fsdp` splits the model's width (`parameter_spec`).
"""


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh over the first devices, every axis of type Auto.

    Raises:
        ConfigError: the axes ask for more devices than there are, or `data = -1` leaves devices over.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.expert, config.tensor, config.sequence]
    rest = math.prod(sizes[1:])
    if config.data == -1:
        if len(devices) % rest:
            raise ConfigError(
                f"mesh axes fsdp x expert x tensor x sequence = {rest} do not divide the {len(devices)} devices; "
                "give mesh.data explicitly or change the other axes"
            )
        sizes[0] = len(devices) // rest
    count = math.prod(sizes)
    if count > len(devices):
        layout = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        raise ConfigError(f"mesh {layout} needs {count} devices, there are {len(devices)}")
    return Mesh(np.array(devices[:count]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The PartitionSpec of the parameter at a '/'-separated path, on a mesh whose axes have these sizes.

    Of two axes that share a dimension which they do not divide, the second goes to the next dimension that has none.

    Raises:
        KeyError: no row of the table, or more than one, matches the path.
    """
    rows = [spec for pattern, spec in PARAMETER_SPECS if re.fullmatch(pattern, path)]
    if len(rows) != 1:
        raise KeyError(f"parameter {path!r} is covered by {len(rows)} rows of PARAMETER_SPECS, needs exactly 1")
    spec = list(rows[0])
    if len(spec) > len(shape):  # plain activations: w_in without the axis of the two halves
        del spec[-2]
    for i, axes in enumerate(spec):
        if isinstance(axes, tuple) and shape[i] % _parts(axes, sizes):
            spec[i], spec[spec.index(None, i)] = axes
    return P(*spec)


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a PartitionSpec names."""
    return tuple(axis for entry in spec if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry))


def _parts(entry: Any, sizes: Mapping[str, int]) -> int:
    """Into how many parts one entry of a PartitionSpec splits its dimension."""
    return math.prod(sizes[axis] for axis in axes_of(P(entry)))


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree key path as 'periods/layer_0/mamba/in_proj'."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def parameter_shardings(abstract: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of parameters.

    Raises:
        ConfigError: a dimension is not a multiple of the mesh axes that split it.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = parameter_spec(name, leaf.shape, mesh.shape)
        for size, axis in zip(leaf.shape, spec, strict=False):
            parts = _parts(axis, mesh.shape)
            if size % parts:
                raise ConfigError(
                    f"parameter {name} of shape {leaf.shape}: its dimension {size} cannot be split into "
                    f"mesh.{axis} = {parts} parts; choose a mesh.{axis} that divides {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """The ShapeDtypeStructs of a tree, each with its sharding: what restoring needs to read shards alone."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch `[B, L]` is split: rows over data, fsdp and expert."""
    return NamedSharding(mesh, P(BATCH_AXES))


def layout(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """How an array is split over the current mesh, one axis name ("batch" for the batch axes) or None a dimension.

    Leaves a dimension whole that its axes do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def entry(size: int, axis: str | None) -> Any:
        names = BATCH_AXES if axis == "batch" else axis
        return names if size % _parts(names, mesh.shape) == 0 else None

    return P(*(entry(size, axis) for size, axis in zip(shape, axes, strict=True)))


def map_shards(
    function: Callable[..., Any], arguments: Mapping[str, Array | None], specs: Mapping[str, P], results: Any
) -> Any:
    """`function(**arguments)` on each device's shards of the arguments; those that are None are left out."""
    present = {name: array for name, array in arguments.items() if array is not None}
    dtypes = {name: array.dtype for name, array in present.items()}

    def shard(arrays: dict[str, Array]) -> Any:
        return function(**{name: array.astype(dtypes[name]) for name, array in arrays.items()})

    wide = {name: _widen(array, specs[name]) for name, array in present.items()}
    # Not checked for replication: the operators' loops start from constants, which the check takes to be replicated.
    mapped = jax.shard_map(shard, in_specs=({name: specs[name] for name in present},), out_specs=results, check_vma=False)
    return mapped(wide)


def _widen(array: Array, spec: P) -> Array:
    """At least float32 if several devices have the same part of it: the gradient is the sum of theirs."""
    mesh = jax.sharding.get_abstract_mesh()
    copies = mesh.size // math.prod(mesh.shape[name] for name in axes_of(spec))
    if copies == 1 or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def batch_parts(rows: int) -> int:
    """Into how many parts the current mesh splits a batch of so many rows."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)
    return parts if rows % parts == 0 else 1


def sequence_parts(length: int) -> int:
    """Into how many parts the current mesh splits sequences of this length."""
    parts = jax.sharding.get_abstract_mesh().shape.get("sequence", 1)
    return parts if length % parts == 0 else 1


def constrain(x: Array, *axes: str | None) -> Array:
    """Pin the layout of an activation, as `layout` has it. Does nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, layout(x.shape, *axes))
