"""The table of layouts covers every parameter once, and what does not fit a mesh is refused."""

from __future__ import annotations

import dataclasses
import functools
import re
import types

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

import configs
from bm_jax.config import Config, ConfigError, MambaConfig, MeshConfig, ModelConfig, MoeConfig
from bm_jax.model import init_parameters
from bm_jax.sharding import AXES, PARAMETER_SPECS, constrain, make_mesh, parameter_shardings, parameter_spec, path_name

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
        spec = parameter_spec(path_name(path), leaf.ndim)  # raises unless exactly one row matches
        assert len(spec) in (0, leaf.ndim), path_name(path)
        named = [axis for axis in spec if axis is not None]
        assert len(set(named)) == len(named)
        assert set(named) <= set(AXES)


def test_every_row_is_used():
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract(EVERY_PARAMETER))]
    for pattern, _ in PARAMETER_SPECS:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern
    assert all(sum(bool(re.fullmatch(pattern, path)) for pattern, _ in PARAMETER_SPECS) == 1 for path in paths)


def test_plain_activations_have_no_axis_for_the_halves():
    assert parameter_spec("periods/layer_0/mlp/w_in", 4) == PartitionSpec(None, "fsdp", None, "tensor")
    assert parameter_spec("periods/layer_0/mlp/w_in", 3) == PartitionSpec(None, "fsdp", "tensor")
    assert parameter_spec("periods/layer_0/moe/w_in", 4) == PartitionSpec(None, "expert", "fsdp", "tensor")


def test_an_unknown_parameter_is_refused():
    with pytest.raises(KeyError, match="covered by 0 rows"):
        parameter_spec("periods/layer_0/mamba/mystery", 2)


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
            spec = parameter_spec(path_name(path), leaf.ndim)
            for size, axis in zip(leaf.shape, spec, strict=False):
                assert size % sizes.get(axis, 1) == 0, (path_name(path), leaf.shape, sizes)


def test_constrain_without_a_mesh_does_nothing():
    x = jax.numpy.ones((2, 3))
    assert constrain(x, "batch", None) is x
