"""int8 weights: half a step of error, products that equal those of the kernels they stand for, models that say the same."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import BYTE, random_parameters

import configs
from bm_jax import decoding, experts, generate
from bm_jax.cache import init_cache
from bm_jax.config import ConfigError, ModelConfig, MoeConfig
from bm_jax.language_model import LanguageModel, inference_parameters
from bm_jax.layers import project
from bm_jax.model import COMPUTE_KERNELS, init_parameters, unrolled
from bm_jax.quantize import (
    CONTRACTED,
    FEW_ROWS,
    Quantized,
    check_weights,
    dequantize,
    product_of_all,
    product_of_chosen,
    quantize,
    quantize_parameter,
)
from bm_jax.sampling import SamplingConfig

FAMILIES = [("mamba", "moe"), ("mamba+mlp", "attention+moe")]
tiny_config = partial(tiny_models.tiny_config, repeats=1, moe=MoeConfig(experts=4, width=24, router_bias=False))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def kernels(tree) -> list[Quantized]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return [leaf for leaf in leaves if isinstance(leaf, Quantized)]


@pytest.mark.parametrize(
    ("shape", "axes"), [((7, 5), (0,)), ((9, 2, 4), (0,)), ((3, 5, 6), (0, 1)), ((4, 6, 2, 3), (1,)), ((5, 8), (1,))], ids=str
)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_quantise_is_the_float64_statement_and_off_by_at_most_half_a_step(shape, axes, size):
    kernel = (np.random.default_rng(1).standard_cauchy(shape) * size).astype(np.float32)
    wide = kernel.astype(np.float64)
    scale = np.abs(wide).max(axis=axes, keepdims=True) / 127
    result = quantize(jnp.asarray(kernel), axes)
    assert (result.values.dtype, result.scale.dtype) == (jnp.int8, jnp.float32)
    assert result.values.shape == shape
    np.testing.assert_allclose(np.expand_dims(result.scale, axes), scale, rtol=1e-6)
    exact = wide / scale
    near_a_tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4
    np.testing.assert_array_equal(np.where(near_a_tie, 0, result.values), np.where(near_a_tie, 0, np.rint(exact)))
    assert np.all(np.abs(np.asarray(dequantize(result, axes), np.float64) - wide) <= scale * (0.5 + 1e-4))
    assert np.abs(np.asarray(result.values, int)).max() == 127


def test_channels_of_zeros_stay_zero_and_no_value_leaves_the_range():
    kernel = jnp.zeros((3, 4)).at[:, 1].set(jnp.array([1e-44, -1e-44, 3e-45])).at[:, 2].set(-5.0)
    result = quantize(kernel, (0,))
    assert not np.asarray(result.values)[:, [0, 3]].any()
    np.testing.assert_allclose(dequantize(result, (0,)), kernel, rtol=1e-6, atol=1e-44)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_product_is_that_of_the_kernel_it_stands_for(dtype):
    rng = np.random.default_rng(2)
    tolerance = {jnp.float32: 2e-6, jnp.bfloat16: 5e-3}[dtype]
    for shape, axes in (((24, 2, 6), 1), ((4, 6, 10), 2)):
        x = jnp.asarray(rng.normal(size=(3, 2, *shape[:axes])), dtype)
        kernel = quantize(jnp.asarray(rng.normal(size=shape), jnp.float32), tuple(range(axes)))
        scale = np.expand_dims(np.asarray(kernel.scale, np.float64), tuple(range(axes)))
        stands_for = np.asarray(kernel.values, np.float64) * scale
        expected = np.tensordot(np.asarray(x, np.float64), stands_for, axes=axes)
        result = project(x, kernel, dtype, axes=axes)
        assert result.dtype == dtype
        np.testing.assert_allclose(np.asarray(result, np.float64), expected, atol=tolerance * np.abs(expected).max())
        assert project(x, kernel, dtype, axes=axes, result=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(("rows", "gated"), [(1, True), (2, False), (4, True), (23, False), (FEW_ROWS // 4 + 1, True)])
def test_every_form_of_the_experts_agrees(rows, gated):
    """Rows of no expert too. One, two: the chosen ones; more: all in one product, or wide kernels."""
    rng, X, M, F = np.random.default_rng(3), 4, 12, 10
    shape = (X, M, 2, F) if gated else (X, M, F)
    w_in, w_out = (quantize(jnp.asarray(rng.normal(size=s), jnp.float32), (1,)) for s in (shape, (X, F, M)))
    x = jnp.asarray(rng.normal(size=(rows, M)), jnp.float32)
    expert = jnp.asarray(rng.integers(0, X + 1, rows), jnp.int32)
    activation = "swiglu" if gated else "gelu"
    wide = [dequantize(kernel, (1,)) for kernel in (w_in, w_out)]
    expected = np.asarray(experts.expert_products(*wide, x, expert, activation))
    assert not expected[np.asarray(expert) == X].any()
    result = experts.expert_products(w_in, w_out, x, expert, activation)
    np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max() + 1e-12)
    product = np.einsum("rk,rk...->r...", x, np.append(wide[0], np.zeros((1, *wide[0].shape[1:])), axis=0)[expert])
    for result in (product_of_chosen(x, w_in, expert), product_of_all(x, w_in, expert), product_of_all(x, wide[0], expert)):
        np.testing.assert_allclose(result, product, rtol=1e-4, atol=1e-4)


def test_one_token_reads_the_chosen_expert_alone_and_in_int8():
    """In the program as it is given to the compiler: a gather of one int8 kernel, and nothing wider than that kernel."""
    X, M, F = 8, 16, 32
    w_in, w_out = Quantized(jnp.ones((X, M, 2, F), jnp.int8), jnp.ones((X, 2, F))), Quantized(
        jnp.ones((X, F, M), jnp.int8), jnp.ones((X, M))
    )  # fmt: skip
    arguments = (w_in, w_out, jnp.ones((1, M), jnp.bfloat16), jnp.zeros(1, jnp.int32))
    jaxpr = str(jax.make_jaxpr(lambda *a: experts.expert_products(*a, "swiglu"))(*arguments))
    assert len(re.findall(r"i8\[1,\d+,\d+\] = gather", jaxpr)) == 2
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"(?:bf16|f32)\[([\d,]+)\]", jaxpr)]
    assert max(sizes) == M * 2 * F


def test_the_kernels_of_products_and_no_others_are_quantised():
    assert CONTRACTED.keys() == COMPUTE_KERNELS - {"conv_weight", "conv_bias"}
    layers = ("mamba+moe", "attention+mlp")
    config = tiny_config(layers)
    parameters, head = inference_parameters(random_parameters(config), config, "int8")
    assert isinstance(head["unembedding"], Quantized)
    leaves = jax.tree_util.tree_leaves_with_path(parameters, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    found = {path[-1].key for path, leaf in leaves if isinstance(leaf, Quantized)}
    assert found == CONTRACTED.keys()
    assert {path[-1].key for path, leaf in leaves if not isinstance(leaf, Quantized)}.isdisjoint(CONTRACTED)
    moe = parameters["periods"]["layer_0"]["moe"]
    assert moe["w_in"].scale.shape == (1, 4, 2, 24)
    assert moe["w_out"].scale.shape == (1, 4, 32)
    assert parameters["periods"]["layer_1"]["attention"]["out"].scale.shape == (1, 32)
    assert parameters["embedding"].dtype == jnp.float32


def test_half_the_bytes_of_bfloat16():
    """By shapes alone, for the published model: what is quantised takes half, and with scales and all else little more."""
    config = configs.load("blackmamba_340m_1p5b").model

    def size(weights):
        make = lambda: inference_parameters(init_parameters(config, jax.random.key(0)), config, weights)  # noqa: E731
        parameters, head = jax.eval_shape(make)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((parameters["periods"], head)))

    assert 0.5 < size("int8") / size(None) < 0.505


def stated(config: ModelConfig):
    """The parameters that the quantised ones of this model stand for."""

    def leaf(path, value):
        first = ("periods" in [entry.key for entry in path]) + ("moe" in [entry.key for entry in path])
        kernel = quantize_parameter(path, jnp.asarray(value))
        if not isinstance(kernel, Quantized):
            return value
        return np.asarray(dequantize(kernel, tuple(range(first, first + CONTRACTED[path[-1].key]))))

    return jax.tree_util.tree_map_with_path(leaf, random_parameters(config))


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def models(request) -> tuple[LanguageModel, LanguageModel, LanguageModel]:
    """A model, the same in int8, and one whose float32 parameters are those that int8 stands for."""
    config = tiny_config(request.param)
    parameters = random_parameters(config)
    int8 = LanguageModel(config, parameters, BYTE, weights="int8")
    return LanguageModel(config, parameters, BYTE), int8, LanguageModel(config, stated(config), BYTE)


def test_logits_are_those_of_the_rounded_weights_and_close_to_the_model(models):
    plain, int8, rounded = models
    ids = np.random.default_rng(4).integers(0, 256, (3, 12))
    expected, result = rounded.logits(ids), int8.logits(ids)
    np.testing.assert_allclose(result, expected, atol=2e-4 * np.abs(expected).max())
    error = np.sqrt(np.mean((result - plain.logits(ids)) ** 2) / np.mean(plain.logits(ids) ** 2))
    assert 0 < error < 0.1


@pytest.mark.parametrize("batch", [1, 4])
def test_generation_says_what_the_rounded_weights_say_at_any_batch_size(models, batch):
    _, int8, rounded = models
    prompts = ["One", "Another prompt", "x", "?"]
    expected = rounded.generate(prompts, max_tokens=8, temperature=0)
    result = int8.generate(prompts[:batch], max_tokens=8, temperature=0)
    assert [completion.tokens for completion in result] == [completion.tokens for completion in expected[:batch]]


def test_a_tied_unembedding_is_quantised_and_the_embedding_is_not():
    config = tiny_config(("mlp",), tie_embeddings=True)
    parameters = random_parameters(config)
    model = LanguageModel(config, parameters, BYTE, weights="int8")
    layers, head = inference_parameters(parameters, config, "int8")
    np.testing.assert_array_equal(layers["embedding"], parameters["embedding"])
    assert head["embedding"].scale.shape == (260,)
    plain = LanguageModel(config, parameters, BYTE)
    np.testing.assert_allclose(model.logits([1, 2, 3]), plain.logits([1, 2, 3]), atol=0.05 * np.abs(plain.logits([1])).max())


def test_the_loop_over_tokens_carries_int8():
    """The compiler must not convert the kernels before the loop: it would read the wide ones at every token."""
    config = tiny_config(moe=MoeConfig(experts=2, width=24))
    parameters, head = inference_parameters(random_parameters(config), config, "int8")
    rows = decoding.make_rows([SamplingConfig()], 1, end=-1, vocab_size=260)
    one = jnp.zeros(1, jnp.int32)
    going = decoding.Going(init_cache(unrolled(config), 1), None, one, one, jnp.ones(1, bool))
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        compiled = decoding.decode.lower(parameters, head, going, rows, 4, unrolled(config)).compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    entry = compiled.as_text().partition("ENTRY")[2]
    (loop,) = [line for line in entry.splitlines() if " while(" in line]
    wanted = {kernel.values.size for kernel in kernels(parameters)}
    found = {int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"s8\[([\d,]+)\]", loop)}
    assert wanted <= found


@pytest.mark.parametrize("weights", ["int4", "bfloat16", 8, True])
def test_unknown_weights_are_refused_by_name(weights, tmp_path):
    config = tiny_config(("mlp",))
    with pytest.raises(ConfigError, match="weights must be None, for the compute dtype, or 'int8'"):
        LanguageModel(config, random_parameters(config), BYTE, weights=weights)
    with pytest.raises(ConfigError, match="weights must be"):
        LanguageModel.load(tmp_path / "absent", weights=weights)


def test_a_mesh_of_several_devices_is_refused(monkeypatch):
    check_weights("int8")
    monkeypatch.setattr(jax.sharding, "get_mesh", lambda: type("Mesh", (), {"size": 8}))
    with pytest.raises(ConfigError, match="weights='int8' runs on one device"):
        check_weights("int8")
    check_weights(None)


def test_saved_parameters_are_the_originals(tmp_path):
    config = tiny_config(("mlp",))
    model = LanguageModel(config, random_parameters(config), BYTE, weights="int8")
    model.logits([1])
    model.save(tmp_path / "model")
    again = LanguageModel.load(tmp_path / "model", weights="int8")
    for left, right in zip(jax.tree.leaves(model.parameters), jax.tree.leaves(again.parameters), strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(again.logits([5, 6]), model.logits([5, 6]))


def test_the_command_line_takes_weights(tmp_path, capsys):
    config = dataclasses.replace(tiny_config(("mlp",)), vocab_size=257)
    model = LanguageModel(config, random_parameters(config), BYTE, weights="int8")
    model.save(tmp_path / "model")
    command = [str(tmp_path / "model"), "--prompt", "a", "--max-tokens", "5", "--temperature", "0"]
    assert generate.main([*command, "--weights", "int8"]) == 0
    (expected,) = model.generate("a", max_tokens=5, temperature=0)
    assert capsys.readouterr().out == f"a{expected.text}\n"
    with pytest.raises(SystemExit) as stop:
        generate.main([*command, "--weights", "int4"])
    assert stop.value.code == 2
    assert "--weights" in capsys.readouterr().err


@pytest.mark.parametrize("gated", [True, False])
def test_what_accelerators_do_with_few_rows_equals_what_a_cpu_does(gated, monkeypatch):
    """All experts in one product against the grouped ones, in value and in every gradient; rows of no expert among them."""
    rng, X, M, F, R = np.random.default_rng(4), 4, 12, 10, 23
    shapes = ((X, M, 2, F) if gated else (X, M, F), (X, F, M), (R, M))
    arguments = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    expert = jnp.asarray(rng.integers(0, X + 1, R), jnp.int32)

    def loss(w_in, w_out, rows):
        out = experts.expert_products(w_in, w_out, rows, expert, "swiglu" if gated else "gelu")
        return jnp.sum(jnp.sin(out)), out

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    grouped = run(*arguments)
    taken = []
    monkeypatch.setattr(experts.lax, "platform_dependent", lambda *a, cpu, default: taken.append(1) or default(*a))
    together = run(*arguments)
    assert taken
    # The loss itself is a difference of large sums.
    for got, want in zip(
        jax.tree.leaves((together[0][1], together[1])), jax.tree.leaves((grouped[0][1], grouped[1])), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
