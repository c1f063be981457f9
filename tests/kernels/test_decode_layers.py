"""A token through all layers in one kernel, against the model's own step from its cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bm_jax.cache import init_cache
from bm_jax.config import MambaConfig, MlpConfig, ModelConfig, MoeConfig
from bm_jax.decode_step import step_cache, step_sizes, step_weights
from bm_jax.layers import layer_norm
from bm_jax.model import forward, init_parameters
from pallas_kernels.decode_layers import decode_layers_gpu, refusal

BLOCKS = 11


def tiny(layers=("mamba", "moe"), activation="geglu", **moe):
    moe = {"experts": 4, "width": 104, "activation": activation} | moe
    return ModelConfig(
        layers=layers, repeats=2, width=72, vocab_size=300, mlp=MlpConfig(width=48, activation=activation), moe=MoeConfig(**moe)
    )


@pytest.mark.parametrize(
    ("config", "batch"),
    [
        (tiny(), 1),
        (tiny(activation="swiglu", router="switch"), 3),
        (tiny(("mamba", "mlp", "moe"), "geglu_tanh", router_bias=False), 2),
        (tiny(("mamba",)), 2),
    ],
    ids=["blackmamba", "switch", "three kinds", "mamba"],
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
    got = decode_layers_gpu(residual, arrays, step_sizes(config, batch, BLOCKS), interpret=jax.default_backend() == "cpu")
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
