"""Norms, activations, the dense MLP and every initial value, against NumPy and the published rules."""

from __future__ import annotations

import math
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from bm_jax.config import GATED_ACTIVATIONS, Activation, MambaConfig, MlpConfig, ModelConfig, MoeConfig
from bm_jax.initialization import inverse_softplus_step
from bm_jax.layers import activate, hidden_shape, layer_norm, mlp, mlp_parameters, project, rms_norm
from bm_jax.model import init_parameters


def erf(x):
    return np.vectorize(math.erf)(x)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


PLAIN = {"swiglu": silu, "geglu": gelu, "geglu_tanh": gelu_tanh, "gelu": gelu, "silu": silu}


def test_every_activation_is_tested():
    assert set(PLAIN) == set(typing.get_args(Activation))


@pytest.mark.parametrize("activation", PLAIN)
def test_activations(activation, x64):
    gated = activation in GATED_ACTIVATIONS
    assert hidden_shape(7, activation) == ((2, 7) if gated else (7,))
    x = 3 * np.random.default_rng(0).standard_normal((5, *hidden_shape(7, activation)))
    wanted = PLAIN[activation](x[:, 0]) * x[:, 1] if gated else PLAIN[activation](x)
    np.testing.assert_allclose(activate(jnp.asarray(x), activation), wanted, rtol=1e-12, atol=1e-14)


def test_norms(x64):
    r = np.random.default_rng(0)
    x, scale, bias = 5 + r.standard_normal((3, 4, 16)), r.standard_normal(16), r.standard_normal(16)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-2), rms, rtol=1e-12)
    centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2) * scale + bias
    got = layer_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), 1e-2)
    np.testing.assert_allclose(got, centred, rtol=1e-12)


def test_norms_of_half_types_compute_and_return_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64)), jnp.bfloat16)
    one, zero = jnp.ones(64), jnp.zeros(64)
    for half, full in (
        (rms_norm(x, one, 1e-5), rms_norm(x.astype(jnp.float32), one, 1e-5)),
        (layer_norm(x, one, zero, 1e-5), layer_norm(x.astype(jnp.float32), one, zero, 1e-5)),
    ):
        assert half.dtype == jnp.float32
        np.testing.assert_array_equal(half, full)
    large = jnp.full((1, 64), 300.0, jnp.float16)  # its square is not a float16
    np.testing.assert_allclose(rms_norm(large, one, 1e-5), 1, rtol=1e-5)


@pytest.mark.parametrize("activation", PLAIN)
def test_mlp(activation, x64):
    config = ModelConfig(layers=("mlp",), width=6, mlp=MlpConfig(width=5, activation=activation), compute_dtype="float64")
    r = np.random.default_rng(0)
    parameters = {name: r.standard_normal(p.shape) for name, p in mlp_parameters(config).items()}
    x = r.standard_normal((2, 3, 6))
    if activation in GATED_ACTIVATIONS:
        gate, up = x @ parameters["w_in"][:, 0], x @ parameters["w_in"][:, 1]
        wanted = (PLAIN[activation](gate) * up) @ parameters["w_out"]
    else:
        wanted = PLAIN[activation](x @ parameters["w_in"]) @ parameters["w_out"]
    got = mlp(jax.tree.map(jnp.asarray, parameters), jnp.asarray(x), config)
    np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)


def test_project_contracts_any_trailing_shape():
    x, kernel = jnp.ones((2, 3, 4)), jnp.ones((4, 5, 6))
    assert project(x, kernel, jnp.dtype("bfloat16")).shape == (2, 3, 5, 6)
    assert project(x, kernel, jnp.dtype("bfloat16")).dtype == jnp.bfloat16


def test_shape_annotations_are_checked_while_testing():
    with pytest.raises(jaxtyping.TypeCheckError, match="x"):
        mlp({}, jnp.ones((2, 3)), ModelConfig())


# Initial values


def uniform_within(values, bound):
    """Fills [-bound, bound] evenly: extremes reached, mean and variance as they should be."""
    values = np.asarray(values, np.float64).reshape(-1)
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > 0.98 * bound
    deviation = bound / math.sqrt(3)
    assert abs(values.mean()) < 5 * deviation / math.sqrt(len(values))
    assert abs(values.std() / deviation - 1) < 5 / math.sqrt(len(values))


@pytest.fixture(scope="module")
def initial():
    """Parameters of a model with every kind of layer, and its configuration."""
    config = ModelConfig(
        layers=("mamba", "moe", "attention", "mlp"),
        repeats=2,
        width=96,
        vocab_size=300,
        mamba=MambaConfig(inner_norms=True),
        moe=MoeConfig(experts=4, width=40),
        mlp=MlpConfig(width=40),
        tie_embeddings=False,
        initializer_range=0.05,
    )
    return config, jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(0, impl="rbg"))


def test_linear_maps_start_as_torch_linear_does(initial):
    config, parameters = initial
    M, E, R, K = config.width, config.inner_width, config.dt_rank, config.mamba.conv_width
    mamba, moe, attention, mlp = (parameters["periods"][f"layer_{i}"][k] for i, k in enumerate(config.layers))
    for values, fan_in in [
        (mamba["in_proj"], M), (mamba["conv_weight"], K), (mamba["conv_bias"], K), (mamba["x_proj"], E),
        (mamba["dt_proj"], R), (moe["router"], M), (moe["w_in"], M), (moe["w_out"], 40), (mlp["w_in"], M),
        (mlp["w_out"], 40), (attention["query"], M), (attention["key"], M), (attention["value"], M),
        (attention["out"], M),
    ]:  # fmt: skip
        uniform_within(values, fan_in**-0.5)
    uniform_within(mamba["out_proj"], E**-0.5 / math.sqrt(config.depth))


def test_state_space_parameters_start_as_published(initial):
    _, parameters = initial
    mamba = parameters["periods"]["layer_0"]["mamba"]
    np.testing.assert_allclose(np.exp(mamba["A_log"]), np.broadcast_to(np.arange(1, 17), mamba["A_log"].shape), rtol=1e-6)
    assert np.all(np.asarray(mamba["D"]) == 1)
    steps = np.logaddexp(0, np.asarray(mamba["dt_bias"], np.float64)).reshape(-1)
    assert steps.min() >= 1e-3 * (1 - 1e-4)
    assert steps.max() <= 1e-1 * (1 + 1e-4)
    place = np.sort((np.log(steps) - math.log(1e-3)) / math.log(100))  # uniform in [0, 1]
    assert np.abs(place - np.linspace(0, 1, len(place))).max() < 1.63 / math.sqrt(len(place))  # Kolmogorov, 1%


def test_dt_floor():
    config = MambaConfig(dt_min=1e-6, dt_max=1e-1, dt_floor=1e-2)
    bias = inverse_softplus_step((128,), config).initializer(jax.random.key(0), (128,), jnp.dtype("float32"))
    steps = np.logaddexp(0, np.asarray(bias, np.float64))
    np.testing.assert_allclose(steps.min(), 1e-2, rtol=1e-4)
    assert np.mean(steps < 1.001e-2) > 0.5


def test_the_rest_starts_as_published(initial):
    _, parameters = initial
    for name in ("embedding", "unembedding"):
        values = np.asarray(parameters[name])
        assert abs(values.std() / 0.05 - 1) < 5 / math.sqrt(values.size)
        assert np.abs(values).max() > 3.5 * 0.05  # normal, not uniform
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    for name, leaf in flat.items():
        assert leaf.dtype == jnp.float32, name
        if "norm" in name or "router_bias" in name:
            assert np.all(np.asarray(leaf) == (0 if "bias" in name else 1)), name


def test_layers_and_periods_start_differently(initial):
    _, parameters = initial
    for layer in parameters["periods"].values():
        for branch in layer.values():
            for name, leaf in branch.items():
                if name not in ("norm", "router_bias", "A_log", "D", "dt_norm", "B_norm", "C_norm"):
                    assert np.any(np.asarray(leaf[0]) != np.asarray(leaf[1])), name


def test_parameters_are_float32_even_where_float64_is_enabled(x64):
    shapes = jax.eval_shape(lambda: init_parameters(ModelConfig(), jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
