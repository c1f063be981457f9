"""Layouts that can be made, and estimates of what they need, counted from shapes with no compiler.

An estimate stands where no compiler is at hand, and says which layouts are worth compiling. Its memory is off by up to about a
third, so a layout it calls fitting is only known to fit once it is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from bm_jax.cache import init_cache
from bm_jax.config import GATED_ACTIVATIONS, Config, ConfigError, MeshConfig, ModelConfig
from bm_jax.decoding import CHUNK
from bm_jax.expert_parallel import FEW, SLACK
from bm_jax.hlo import Movement, Traffic
from bm_jax.metrics import model_flops_per_token
from bm_jax.model import COMPUTE_KERNELS, init_parameters
from bm_jax.plan_report import Program
from bm_jax.sharding import AXES, BATCH_AXES, axes_of, parameter_shardings, path_name
from bm_jax.topologies import Topology

REMAT = ("none", "dots", "full")
LARGEST_TENSOR = 8


@functools.lru_cache
def _parameter_shapes(model: ModelConfig) -> Any:
    return jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))


def _shardings(config: Config) -> Any:
    # No devices are needed to split shapes.
    mesh: Any = AbstractMesh(_sizes(config.mesh), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return parameter_shardings(_parameter_shapes(config.model), mesh)


def _sizes(mesh: MeshConfig) -> tuple[int, ...]:
    return tuple(getattr(mesh, axis) for axis in AXES)


def batch_parts(mesh: MeshConfig) -> int:
    """Into how many parts a mesh splits the rows of a batch."""
    return math.prod(getattr(mesh, axis) for axis in BATCH_AXES)


def check_layout(config: Config, topology: Topology) -> None:
    """Refuse what does not divide.

    Raises:
        ConfigError: the mesh is not as large as the topology, or does not divide the batch or a parameter.
    """
    count = math.prod(_sizes(config.mesh))
    if count != topology.size:
        raise ConfigError(f"the mesh is for {count} devices, {topology.name} has {topology.size}")
    rows, parts = config.data.batch_size // config.run.accumulation, batch_parts(config.mesh)
    if rows % parts:
        raise ConfigError(
            f"data.batch_size / run.accumulation = {rows} rows cannot be split over the {parts} devices of the mesh axes "
            f"{', '.join(BATCH_AXES)}; choose a batch size that is a multiple of {parts * config.run.accumulation}"
        )
    _shardings(config)


def with_layout(config: Config, mesh: MeshConfig, batch_size: int, remat: str) -> Config:
    """The configuration in another layout; ConfigError where it does not divide the model."""
    data = dataclasses.replace(config.data, batch_size=batch_size)
    run = dataclasses.replace(config.run, remat=remat)
    return dataclasses.replace(config, mesh=mesh, data=data, run=run)


def meshes(config: Config, devices: int) -> Iterator[MeshConfig]:
    """Every mesh of so many devices that divides the model, and keeps the size of the sequence axis."""
    sequence = config.mesh.sequence if devices % config.mesh.sequence == 0 else 1
    for expert in _divisors(config.model.moe.experts if "moe" in config.model.kinds else 1):
        for tensor in (t for t in _divisors(devices) if t <= LARGEST_TENSOR):
            for fsdp in _divisors(devices):
                data, rest = divmod(devices, expert * tensor * fsdp * sequence)
                if rest == 0 and data:
                    mesh = MeshConfig(data, fsdp, expert, tensor, sequence)
                    try:
                        _shardings(dataclasses.replace(config, mesh=mesh))
                    except ConfigError:
                        continue
                    yield mesh


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def layouts(config: Config, topology: Topology) -> Iterator[Config]:
    """Every mesh, with batches from one row a part on and about the size asked for, and every remat policy."""
    accumulation = config.run.accumulation
    for mesh in meshes(config, topology.size):
        least = batch_parts(mesh) * accumulation
        near = max(round(config.data.batch_size / least), 1)
        for rows in sorted({1, max(near // 2, 1), near, 2 * near}):
            for remat in REMAT:
                yield with_layout(config, mesh, rows * least, remat)


def nearest(mesh: MeshConfig, batch_size: int, remat: str, candidates: Iterable[Config]) -> list[Config]:
    """`candidates`, those that differ least from what is asked for first: by factors of two, remat policies counting half."""

    def distance(other: Config) -> float:
        pairs = [*zip(_sizes(mesh), _sizes(other.mesh), strict=True), (batch_size, other.data.batch_size)]
        moved = sum(abs(math.log2(b / a)) for a, b in pairs)
        return moved + 0.5 * abs(REMAT.index(remat) - REMAT.index(other.run.remat))

    return sorted(candidates, key=distance)


def estimate(config: Config, topology: Topology) -> Program:
    """The train step of a layout that `check_layout` takes, from shapes alone.

    Parameters, their two moments and their gradients are counted exactly. Activations are what `run.remat` keeps of each
    period, one period's working set and the logits; traffic is what each axis of the mesh implies.
    """
    model, mesh = config.model, config.mesh
    local = config.data.batch_size * config.data.sequence_length / (config.run.accumulation * batch_parts(mesh) * mesh.sequence)
    shapes, shardings = _parameter_shapes(model), _shardings(config)
    parameters = sum(
        4.0 * math.prod(s.shard_shape(leaf.shape))
        for leaf, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )
    products, others = _activations(model, mesh)
    residual = 4.0 * model.width
    kept = {"none": residual + products + others, "dots": residual + products, "full": residual}[config.run.remat]
    activations = local * (kept * model.repeats + (products + others if config.run.remat != "none" else 0))
    logits = local * model.vocab_size / mesh.tensor * (4 + 4 + 2)
    memory = {
        "parameters": parameters, "optimizer state": 2 * parameters, "gradients": parameters, "activations": activations,
        "logits": logits,
    }  # fmt: skip
    again = 4 / 3 if config.run.remat == "full" else 1
    tokens = config.data.batch_size * config.data.sequence_length
    flops = model_flops_per_token(model, config.data.sequence_length) * tokens / topology.size * again
    # Weights are read for each pass in the compute dtype; the optimizer reads and writes three float32 arrays and the gradient.
    passes = config.run.accumulation * (3 if config.run.remat == "full" else 2)
    working = local * config.run.accumulation * (products + others) * model.repeats
    traffic = parameters * (7 + passes / 2) + 3 * working + 3 * logits * config.run.accumulation
    moved = Movement(_collectives(config, shapes, shardings, local * config.run.accumulation), traffic)
    return Program("train", memory, flops, flops, moved, moved, None)


def estimate_inference(config: Config, topology: Topology, program: str) -> Program:
    """`prefill` or `decode` of a layout that `check_layout` takes, from shapes alone: as `plan_compile` compiles them."""
    model, mesh, batch = config.model, config.mesh, config.data.batch_size
    decode = program == "decode"
    passes, length = (CHUNK, 1) if decode else (1, config.data.sequence_length)
    rows = batch / batch_parts(mesh)
    local = rows * length / (1 if decode else mesh.sequence)
    leaves = jax.tree_util.tree_leaves_with_path(_parameter_shapes(model))
    splits = jax.tree.leaves(_shardings(config))
    own = {path: float(math.prod(s.shard_shape(leaf.shape))) for (path, leaf), s in zip(leaves, splits, strict=True)}
    parameters = sum(size * (2 if path[-1].key in COMPUTE_KERNELS else 4) for path, size in own.items())
    ends = [size for path, size in own.items() if path[-1].key == ("embedding" if model.tie_embeddings else "unembedding")]
    parameters += 2 * ends[0] * decode
    room = 2 * config.data.sequence_length if "attention" in model.kinds else 0
    cache = jax.eval_shape(lambda: init_cache(model, batch, room))
    cached = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) / batch_parts(mesh) / mesh.tensor
    activations = local * (sum(_activations(model, mesh)) + 4.0 * model.width)
    memory = {"parameters": parameters, "cache": cached, "activations": activations}
    per_token = model_flops_per_token(model, length, training=False)
    if decode:
        memory["logits"] = rows * model.vocab_size * 4.0
    else:
        per_token -= 2 * model.width * model.vocab_size
    flops = per_token * batch * length * passes / topology.size
    moved = Traffic()
    for path, split in zip(own, splits, strict=True):
        if "fsdp" in axes_of(split.spec):
            payload = 2.0 * own[path] * mesh.fsdp
            moved += Traffic(1, payload, payload * (mesh.fsdp - 1) / mesh.fsdp).times(passes)
    exchanged = local * model.moe.top_k * SLACK * 2.0 * model.width
    count = 2 * passes * model.repeats * model.kinds.count("moe") * (mesh.expert > 1)
    exchange = Traffic(1, exchanged, exchanged * (mesh.expert - 1) / mesh.expert).times(count)
    collectives = {kind: t for kind, t in {"all-gather": moved, "all-to-all": exchange}.items() if t.sent}
    traffic = passes * (parameters + 2 * cached + 2 * activations * model.repeats)
    movement = Movement(collectives, traffic)
    return Program(program, memory, flops, flops, movement, movement, None)


def _activations(model: ModelConfig, mesh: MeshConfig) -> tuple[float, float]:
    """Bytes a token that a period makes: results of matrix products, and everything else the backward pass reads."""
    width, inner, compute = model.width, model.inner_width / mesh.tensor, 2.0
    moe, attention = model.moe, model.attention

    def mlp(width: int, activation: str) -> tuple[float, float]:
        halves = 2 if activation in GATED_ACTIVATIONS else 1
        return compute * halves * width / mesh.tensor, compute * width / mesh.tensor

    def mamba() -> tuple[float, float]:
        rank = model.dt_rank + 2 * model.mamba.state_size
        return compute * (2 * inner + rank + width) + 4 * inner, compute * (4 * inner + width)

    def heads() -> tuple[float, float]:
        size = model.head_size / mesh.tensor
        return compute * size * (2 * attention.heads + 2 * attention.kv_heads), compute * width

    def experts() -> tuple[float, float]:
        first, second = mlp(moe.width, moe.activation)
        rows = SLACK * moe.top_k
        return rows * first, rows * (second + 4 * compute * width)

    kinds = {"mamba": mamba, "attention": heads, "moe": experts, "mlp": lambda: mlp(model.mlp.width, model.mlp.activation)}
    found = [kinds[kind]() for kind in model.kinds]
    return sum(products for products, _ in found), sum(others for _, others in found)


def _collectives(config: Config, shapes: Any, shardings: Any, local: float) -> dict[str, Traffic]:
    """What the axes of a mesh make each device send in a step; `local` tokens are its own."""
    model, mesh = config.model, config.mesh
    full = config.run.remat == "full"
    totals: dict[str, Traffic] = dict.fromkeys(("all-reduce", "all-gather", "reduce-scatter", "all-to-all"), Traffic())

    def add(kind: str, parts: int, payload: float, times: float = 1) -> None:
        share = (2 if kind == "all-reduce" else 1) * (parts - 1) / parts
        if share and payload:
            totals[kind] += Traffic(1, payload, payload * share).times(times)

    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        own = math.prod(sharding.shard_shape(leaf.shape))
        axes = axes_of(sharding.spec)
        copies = math.prod(getattr(mesh, axis) for axis in (*BATCH_AXES, "sequence") if axis not in axes)
        add("all-reduce", copies, 4.0 * own)
        if "fsdp" in axes:
            add("all-gather", mesh.fsdp, 2.0 * own * mesh.fsdp, (3 if full else 2) * config.run.accumulation)
            exchanged = "moe" in path_name(path) and mesh.fsdp <= FEW
            kind, size = ("all-to-all", 2.0) if exchanged else ("reduce-scatter", 4.0)
            add(kind, mesh.fsdp, size * own * mesh.fsdp, config.run.accumulation)
    moe_layers = model.repeats * model.kinds.count("moe")
    passes = 3 if full else 2
    rows = local * model.moe.top_k * SLACK * 2.0 * model.width
    add("all-to-all", mesh.expert, rows, 2 * passes * moe_layers)
    add("all-reduce", mesh.tensor, local * 2.0 * model.width, passes * model.repeats * len(model.kinds))
    return {kind: traffic for kind, traffic in totals.items() if traffic.count}
