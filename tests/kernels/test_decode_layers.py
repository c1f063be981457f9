"""A token through all layers in one kernel, against the model's own step from its cache."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bm_jax.cache import init_cache
from bm_jax.config import MambaConfig, MlpConfig, ModelConfig, MoeConfig
from bm_jax.decode_step import Kernel, kernel_for, stacked, step_cache, step_parameters, step_sizes, step_weights
from bm_jax.decoding import Going, decode, make_rows
from bm_jax.language_model import inference_parameters
from bm_jax.layers import layer_norm
from bm_jax.model import forward, init_parameters, logits, unrolled
from bm_jax.sampling import SamplingConfig
from pallas_kernels import dispatch
from pallas_kernels.decode_layers import decode_layers_gpu, refusal

BLOCKS = 11


def tiny(layers=("mamba", "moe"), activation="geglu", **moe):
    moe = {"experts": 4, "width": 104, "activation": activation} | moe
    return ModelConfig(
        layers=layers, repeats=2, width=72, vocab_size=300, mlp=MlpConfig(width=48, activation=activation), moe=MoeConfig(**moe)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "batch"),
    [
        (tiny(), 1),
        (tiny(activation="swiglu", router="switch"), 3),
        (tiny(("mamba", "mlp", "moe"), "geglu_tanh", router_bias=False), 2),
        (tiny(("mamba",)), 2),
        (tiny(("mamba",)), 1),
        (tiny(("mamba", "mlp", "moe", "mamba")), 1),
    ],
    ids=["blackmamba", "switch", "three kinds", "mamba", "mamba, one row", "three kinds, one row"],
)
def test_a_step_is_that_of_the_model(config, batch):
    """Interpreted on a CPU; on a GPU, which must be of compute capability 9.0, the kernel itself."""
    parameters = init_parameters(config, jax.random.key(0))
    parameters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), parameters)
    tokens = jax.random.randint(jax.random.key(1), (batch, 6), 0, 300)
    cache = forward(parameters, tokens[:, :5], config, cache=init_cache(config, batch)).cache
    wanted = forward(parameters, tokens[:, 5:], config, cache=cache)
    residual = parameters["embedding"][tokens[:, 5]]
    arrays = step_weights(parameters, config) | step_cache(cache)
    sizes = step_sizes(config, batch, BLOCKS)
    got = decode_layers_gpu(residual, arrays, sizes, interpret=jax.default_backend() == "cpu")
    hidden = layer_norm(got["residual_out"], parameters["final_norm"], parameters["final_norm_bias"], config.norm_eps)

    def close(a, b, tolerance):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    # The model rounds what passes from operation to operation to bfloat16, 2**-9 of it, the kernel only what it multiplies;
    # four to six layers, each of them norms and products that spread an error, make up to 2e-2 of it.
    close(hidden, wanted.hidden[:, 0], 3e-2)
    for j, kind in enumerate(config.layers):
        if kind == "mamba":
            for name, value in wanted.cache.layers[f"layer_{j}"]["mamba"].items():
                close(got[f"{name}_out_{j}"], value, 3e-2)
                assert got[f"{name}_out_{j}"].dtype == value.dtype


def test_what_it_cannot_run_is_refused():
    inner_norms = MambaConfig(inner_norms=True)
    for config, message in (
        (tiny(router="topk", top_k=2), "router topk"),
        (dataclasses.replace(tiny(), mamba=inner_norms), "norms inside its Mamba layers"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            step_sizes(config, 1, BLOCKS)
    good = step_sizes(tiny(), 1, BLOCKS)
    assert refusal(good) is None
    for change, message in (
        ({"kinds": ("attention", "moe")}, "kind attention"),
        ({"activation": {"moe": "gelu"}}, "not gelu"),
        ({"states": 5}, "states"),
        ({"rank": 112}, "dt_rank"),
        ({"width": 68}, "multiple of 8"),
        ({"blocks": 100}, "each of 100 blocks"),
        ({"inner": 8 * 100}, "512 lanes"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            decode_layers_gpu(jnp.zeros((1, 72)), {}, good._replace(**change))


@pytest.mark.slow
def test_decoding_by_the_kernel_goes_on_from_the_model_s_cache():
    """The loop of `decode` with the kernel, interpreted on a CPU, against the model fed the same tokens."""
    config = dataclasses.replace(tiny(), compute_dtype="bfloat16")
    parameters = init_parameters(config, jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (2, 6), 0, 300)
    deep, (whole, head) = unrolled(config), inference_parameters(parameters, config)
    cache = forward(whole, prompts[:, :5], deep, cache=init_cache(deep, 2)).cache
    rows = make_rows([SamplingConfig(temperature=0)] * 2, 2, end=-1, vocab_size=300)
    number = jnp.zeros(2, jnp.int32)
    going = Going(stacked(cache, config), None, prompts[:, 5], number, number == 0)
    kernel = Kernel(BLOCKS, interpret=jax.default_backend() == "cpu")
    after, (ids, _) = decode(step_parameters(parameters, config), head, going, rows, 2, config, kernel)
    assert (np.asarray(ids)[:, :2] >= 0).all()
    assert (np.asarray(ids)[:, 2:] == -1).all()
    np.testing.assert_array_equal(after.token, ids[:, 1])
    np.testing.assert_array_equal(after.cache.length, [7, 7])
    output = forward(whole, jnp.stack([prompts[:, 5], ids[:, 0]], axis=1), deep, cache=cache)
    wanted = np.asarray(logits(head, output.hidden, config))
    for b in range(2):
        for step in range(2):  # the best token, but for rounding
            assert wanted[b, step, ids[b, step]] > wanted[b, step, :300].max() - 0.05 * np.abs(wanted[b, step]).max()
    for name, value in stacked(output.cache, config).layers["layer_0"]["mamba"].items():
        got, want = (np.asarray(x, np.float64) for x in (after.cache.layers["layer_0"]["mamba"][name], value))
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-2 * np.abs(want).max())


def test_where_the_kernel_is_taken(monkeypatch):
    config = dataclasses.replace(tiny(), compute_dtype="bfloat16", width=1152, moe=MoeConfig(experts=4, width=1152))

    def taken(config, batch, target=("gpu", "NVIDIA H100 80GB HBM3", 9.0)):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "target", lambda: dispatch.Target(*target))
            patch.setattr(jax, "devices", lambda: [SimpleNamespace(core_count=132)])
            return kernel_for(config, batch)

    assert taken(config, 1) == taken(config, 4) == Kernel(132)
    assert taken(config, 5) is None
    assert taken(config, 1, ("gpu", "NVIDIA A100", 8.0)) is None
    assert taken(config, 1, ("cpu", "cpu", 0.0)) is None
    for change in (
        {"compute_dtype": "float32"},
        {"residual_dtype": "bfloat16"},
        {"layers": ("attention", "moe")},
        {"layers": ("mamba", "moe") * 5},
        {"moe": MoeConfig(experts=4, width=1152, router="topk", top_k=2)},
    ):
        assert taken(dataclasses.replace(config, **change), 1) is None
    monkeypatch.setenv("PALLAS_KERNELS_IMPLEMENTATION", "decode_layers=xla")
    assert taken(config, 1) is None
