"""The table of layouts covers every parameter once, and no device makes or holds more than its shards.

`check_*` run in a process with eight devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import in_eight_devices
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import configs
from bm_jax.config import Config, ConfigError, DataConfig, MambaConfig, MeshConfig, ModelConfig, MoeConfig
from bm_jax.data.pipeline import open_data
from bm_jax.loss import next_token_loss
from bm_jax.model import init_parameters
from bm_jax.optimizer import make_optimizer
from bm_jax.sharding import (
    AXES,
    PARAMETER_SPECS,
    axes_of,
    batch_sharding,
    constrain,
    make_mesh,
    parameter_shardings,
    parameter_spec,
    path_name,
    with_shardings,
)
from bm_jax.train import Run
from bm_jax.train_step import init_state, state_shardings

EVERY_PARAMETER = ModelConfig(
    layers=("mamba", "moe", "attention", "mlp", "attention+moe"),
    mamba=MambaConfig(inner_norms=True),
    tie_embeddings=False,
)
MODELS = {"every parameter": EVERY_PARAMETER} | {name: configs.load(name).model for name in configs.names()}


@functools.lru_cache
def abstract(config):
    return jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_covered_once(name):
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(MODELS[name])):
        spec = parameter_spec(path_name(path), leaf.shape, Mesh().shape)  # raises unless exactly one row matches
        assert len(spec) in (0, leaf.ndim), path_name(path)
        named = axes_of(spec)
        assert len(set(named)) == len(named)
        assert set(named) <= set(AXES)


def test_every_row_is_used():
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract(EVERY_PARAMETER))]
    for pattern, _ in PARAMETER_SPECS:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern
    assert all(sum(bool(re.fullmatch(pattern, path)) for pattern, _ in PARAMETER_SPECS) == 1 for path in paths)


@pytest.mark.parametrize("name", configs.names())
def test_moments_lie_where_their_parameters_lie(name):
    config, mesh = configs.load(name), make_mesh(MeshConfig(data=1))
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    shardings = jax.tree_util.tree_leaves_with_path(state_shardings(state, optimizer, mesh).opt_state)
    parameters = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    moments: dict[str, list[PartitionSpec]] = {}
    for (path, sharding), leaf in zip(shardings, jax.tree.leaves(state.opt_state), strict=True):
        owners = [parameter for parameter in parameters if path_name(path).endswith(f"/{parameter}")]
        owner = max(owners, key=len, default=None)  # "embedding" is also the end of "unembedding"
        if owner is None:
            assert (leaf.shape, sharding.spec) == ((), PartitionSpec()), path_name(path)
        else:
            moments.setdefault(owner, []).append(sharding.spec)
            assert leaf.shape == parameters[owner].shape
    assert moments == {path: [parameter_spec(path, leaf.shape, mesh.shape)] * 2 for path, leaf in parameters.items()}


def test_plain_activations_have_no_axis_for_the_halves():
    one = Mesh().shape
    assert parameter_spec("periods/layer_0/mlp/w_in", (3, 8, 2, 16), one) == PartitionSpec(None, "fsdp", None, "tensor")
    assert parameter_spec("periods/layer_0/mlp/w_in", (3, 8, 16), one) == PartitionSpec(None, "fsdp", "tensor")
    assert parameter_spec("periods/layer_0/moe/w_in", (3, 4, 8, 16), one) == PartitionSpec(
        None, ("expert", "fsdp"), None, "tensor"
    )


@pytest.mark.parametrize("sizes", [{"expert": 2, "fsdp": 4}, {"fsdp": 16}, {"expert": 8, "fsdp": 2}])
def test_fsdp_splits_experts_where_there_are_enough(sizes):
    for name, shape, width in (("w_in", (3, 8, 32, 2, 16), 2), ("w_in", (3, 8, 32, 16), 2), ("w_out", (3, 8, 16, 32), 3)):
        spec = parameter_spec(f"periods/layer_0/moe/{name}", shape, Mesh(**sizes).shape)
        assert spec[1] == (("expert", "fsdp") if sizes == {"expert": 2, "fsdp": 4} else "expert")
        assert spec[width] == (None if sizes == {"expert": 2, "fsdp": 4} else "fsdp")


def test_an_unknown_parameter_is_refused():
    with pytest.raises(KeyError, match="covered by 0 rows"):
        parameter_spec("periods/layer_0/mamba/mystery", (2, 3), Mesh().shape)


def devices(count):
    """Stand-ins: making a mesh only arranges devices."""
    return [types.SimpleNamespace(id=i) for i in range(count)]


def test_make_mesh():
    mesh = make_mesh(MeshConfig())
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.size == len(jax.devices())
    with pytest.raises(ConfigError, match="data=1, fsdp=1, expert=64, tensor=1, sequence=1 needs 64 devices, there are 1"):
        make_mesh(MeshConfig(data=1, expert=64))
    with pytest.raises(ConfigError, match=r"= 3 do not divide the 8 devices; give mesh.data explicitly"):
        make_mesh(MeshConfig(tensor=3), devices(8))


class Mesh:
    """Only the sizes of a mesh, for meshes larger than this machine."""

    def __init__(self, **shape):
        self.shape = dict.fromkeys(AXES, 1) | shape


def test_a_dimension_that_does_not_divide_is_refused_by_name():
    config = ModelConfig(width=96, vocab_size=257)
    with pytest.raises(ConfigError, match=r"parameter embedding of shape \(257, 96\): its dimension 257 cannot be split"):
        parameter_shardings(abstract(config), Mesh(tensor=4))
    with pytest.raises(ConfigError, match=r"into mesh.fsdp = 64 parts; choose a mesh.fsdp that divides 96"):
        parameter_shardings(abstract(dataclasses.replace(config, vocab_size=256)), Mesh(fsdp=64))


def test_experts_that_do_not_divide_are_refused():
    model = ModelConfig(moe=MoeConfig(experts=6))
    with pytest.raises(ConfigError, match=r"model.moe.experts \(6\) must be a multiple of mesh.expert \(4\)"):
        Config(model=model, mesh=MeshConfig(expert=4))
    Config(model=dataclasses.replace(model, layers=("mamba",)), mesh=MeshConfig(expert=4))  # no experts, no complaint


@pytest.mark.parametrize("preset", configs.names())
def test_presets_fit_eight_devices(preset):
    """Sizes are multiples of what a host of eight accelerators splits them into."""
    shapes = abstract(configs.load(preset).model)
    for sizes in ({"fsdp": 8}, {"tensor": 2, "fsdp": 4}):
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            spec = parameter_spec(path_name(path), leaf.shape, Mesh(**sizes).shape)
            for size, axes in zip(leaf.shape, spec, strict=False):
                parts = math.prod(sizes.get(axis, 1) for axis in axes_of(PartitionSpec(axes)))
                assert size % parts == 0, (path_name(path), leaf.shape, sizes)


def test_constrain_without_a_mesh_does_nothing():
    x = jax.numpy.ones((2, 3))
    assert constrain(x, "batch", None) is x


def shapes_in(program):
    """Every shape of a compiled program, with the line where it stands."""
    for line in program.as_text().splitlines():
        for shape in re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", line):
            yield tuple(map(int, shape.split(","))), line


STARTED = Config(
    model=ModelConfig(layers=("mamba", "moe", "attention", "mlp"), repeats=2, vocab_size=264, width=64, tie_embeddings=False),
    data=DataConfig(sequence_length=32, batch_size=8),
)


def check_initialization():
    """A mesh starts with the numbers of one device, and each device makes only its shards of them."""

    def run_on(**sizes):
        config = dataclasses.replace(STARTED, mesh=MeshConfig(**({"data": 1} | sizes)))
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            return Run(config, open_data(config.data, config.model.vocab_size), mesh)

    def numbers(state):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))]

    wanted = numbers(run_on().initialize())
    whole = sum(leaf.nbytes for leaf in wanted)
    for sizes in ({"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"tensor": 8}):
        run = run_on(**sizes)
        with jax.set_mesh(run.mesh):
            program, state = run.initialize.lower().compile(), run.initialize()
        for got, leaf in zip(numbers(state), wanted, strict=True):
            np.testing.assert_array_equal(got, leaf, strict=True)
        held = dict.fromkeys(run.mesh.devices.flat, 0)
        for shard in (shard for leaf in jax.tree.leaves(state.params) for shard in leaf.addressable_shards):
            held[shard.device] += shard.data.nbytes
        parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
        # An eighth, and what the mesh does not split: small arrays, or with fsdp 2 those that only tensor 2 splits.
        assert max(held.values()) < parameters * (0.20 if "expert" in sizes else 0.15), sizes
        # On the way there, too: outputs (parameters and two moments) and all temporary values of one device.
        memory = program.memory_analysis()
        assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 3, sizes
        largest = max(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(run.abstract))
        assert max(np.prod(shape) for shape, _ in shapes_in(program)) == largest, sizes
    # The same search finds the whole array where the layout is not asked for.
    program = jax.jit(run.initialize, out_shardings=NamedSharding(run.mesh, PartitionSpec())).lower().compile()
    assert max(np.prod(shape) for shape, _ in shapes_in(program)) == max(leaf.size for leaf in wanted)


def check_channels():
    """Values and gradients of the convolution and the scan, on E / tensor channels of a device and never on all."""
    # E = 120 and 2 E are no size of anything else.
    config = ModelConfig(layers=("mamba",), repeats=2, vocab_size=48, width=40, mamba=MambaConfig(expansion=3))
    E = config.inner_width
    for sizes in ({"data": 1, "tensor": 8}, {"data": 2, "tensor": 4}, {"data": 1, "fsdp": 2, "tensor": 4}, {"data": 8}):
        mesh = make_mesh(MeshConfig(**sizes))
        layout = parameter_shardings(abstract(config), mesh)
        batch = jax.ShapeDtypeStruct((8, 25), jnp.int32, sharding=batch_sharding(mesh))
        shapes = with_shardings(abstract(config), layout)

        def loss(parameters, batch):
            return next_token_loss(parameters, batch, config, training=True).objective

        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, layout))
        with jax.set_mesh(mesh):
            program = step.lower(shapes, {"tokens": batch, "segment_ids": batch}).compile()
        tensor = mesh.shape["tensor"]
        for scope in ("conv", "scan"):
            for direction in ("/jvp", "/transpose"):
                shapes_there = {shape for shape, line in shapes_in(program) if f"/mamba/{scope}/" in line and direction in line}
                assert any(shape[-1:] == (E // tensor,) for shape in shapes_there), (sizes, scope, direction)
        whole = [line for shape, line in shapes_in(program) if {E, 2 * E} & set(shape)]
        gathered = [line for _, line in shapes_in(program) if "all-gather" in line and re.search("/(conv|scan)/", line)]
        if tensor > 1:
            assert not whole, whole[:3]
            assert not gathered, gathered[:3]
        else:
            assert whole  # the search finds them where there are any


@pytest.mark.slow
def test_each_device_starts_with_its_shards(run_with_devices):
    in_eight_devices(run_with_devices, "test_sharding", "check_initialization()")


@pytest.mark.slow
def test_convolution_and_scan_are_split_over_channels(run_with_devices):
    in_eight_devices(run_with_devices, "test_sharding", "check_channels()")
