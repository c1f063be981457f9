"""The expert layer against a dense computation over every expert and token, and capacity against a plain loop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bm_jax.config import ModelConfig, MoeConfig
from bm_jax.layers import Context, activate
from bm_jax.moe import expert_capacity, moe, moe_parameters, router_logits, run_experts
from bm_jax.routing import Routing, Statistics, route

M, B, L, X = 6, 2, 11, 4
ROUTERS = {
    "sinkhorn": {},
    "switch": {"router": "switch", "router_bias": False},
    "top 2": {"router": "topk", "top_k": 2},
    "top 2, normalized": {"router": "topk", "top_k": 2, "normalize_gates": True, "activation": "gelu"},
    "top 4 of 4": {"router": "topk", "top_k": 4, "activation": "geglu"},
}
# Router biases that leave an expert empty, or give every token to one.
BIASES = {"mild": [0.0, 0.0, 0.0, 0.0], "one empty": [0.0, -30.0, 0.0, 0.0], "one takes all": [0.0, 0.0, 4.0, 0.0]}


def model(compute_dtype="float64", **options):
    moe_config = MoeConfig(**{"experts": X, "width": 5} | options)
    return ModelConfig(layers=("moe",), width=M, moe=moe_config, compute_dtype=compute_dtype)


def make(config, bias="mild"):
    r = np.random.default_rng(0)
    parameters = {name: jnp.asarray(r.standard_normal(p.shape)) for name, p in moe_parameters(config).items()}
    if "router_bias" in parameters:
        parameters["router_bias"] = jnp.asarray(BIASES[bias])
        if bias == "one takes all":
            parameters["router"] = parameters["router"] * 0.2
    return parameters, jnp.asarray(r.standard_normal((B, L, M)))


def context(mask=None):
    return Context(None, mask, jnp.zeros((B, L), jnp.int32), jnp.ones(B, bool), jnp.zeros((), jnp.int32))


layer = jax.jit(moe, static_argnames=("config", "training"))


def dense(parameters, x, config, mask, training):
    """Every expert on every token, weighed by a one-hot of the choice times the gate."""
    tokens = x.reshape(-1, M)
    logits = tokens @ parameters["router"] + parameters.get("router_bias", 0)
    routing = route(logits, config.moe, training=training, mask=None if mask is None else mask.reshape(-1))
    weight = jnp.zeros((len(tokens), X))
    for k in range(config.moe.top_k):
        weight = weight + jax.nn.one_hot(routing.index[:, k], X) * routing.gate[:, k, None]
    hidden = activate(jnp.einsum("tm,xm...->tx...", tokens, parameters["w_in"]), config.moe.activation)
    outputs = jnp.einsum("txf,xfm->txm", hidden, parameters["w_out"])
    return jnp.einsum("tx,txm->tm", weight, outputs).reshape(x.shape)


CASES = [(router, "mild", False, False) for router in ROUTERS] + [
    ("sinkhorn", "mild", True, False),
    ("sinkhorn", "mild", True, True),
    ("sinkhorn", "one empty", False, False),
    ("sinkhorn", "one takes all", False, False),
    ("sinkhorn", "one takes all", False, True),
    ("top 2", "one takes all", True, True),
    ("top 2", "one empty", False, False),
]


@functools.partial(jax.jit, static_argnames=("config", "training"))
def sparse_and_dense(parameters, x, mask, d_out, config, training):
    """Gradients of sum(y * d_out) and y itself, by the layer and by the dense computation."""

    def sparse_loss(parameters, x):
        y, statistics = moe(parameters, x, context(mask), config, training=training)
        return jnp.sum(y * d_out), (y, statistics)

    def dense_loss(parameters, x):
        y = dense(parameters, x, config, mask, training)
        return jnp.sum(y * d_out), y

    sparse = jax.grad(sparse_loss, argnums=(0, 1), has_aux=True)(parameters, x)
    return sparse, jax.grad(dense_loss, argnums=(0, 1), has_aux=True)(parameters, x)


@pytest.mark.parametrize(("router", "bias", "training", "masked"), CASES)
def test_equals_the_dense_computation_in_value_and_gradient(router, bias, training, masked, x64):
    config = model(**ROUTERS[router])
    parameters, x = make(config, bias)
    r = np.random.default_rng(1)
    mask = jnp.asarray(r.random((B, L)) < 0.6) if masked else None
    d_out = jnp.asarray(r.standard_normal((B, L, M)))
    both = sparse_and_dense(parameters, x, mask, d_out, config, training)
    (gradients, (y, statistics)), (wanted_gradients, wanted) = both
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), gradients, wanted_gradients)
    assert np.isclose(statistics.load.sum(), 1)
    assert statistics.dropped == 0
    if bias == "one empty":
        assert statistics.load[1] == 0
        assert not np.any(gradients[0]["w_in"][1])
    if bias == "one takes all" and not training and config.moe.top_k == 1:
        assert statistics.load[2] == 1
    if masked:
        assert not np.any(np.asarray(y)[~np.asarray(mask)])
        assert not np.any(np.asarray(gradients[1])[~np.asarray(mask)])


def test_what_padding_holds_does_not_matter():
    """Neither in the output of other tokens nor in any gradient of a parameter."""
    config = model("float32")
    parameters, x = make(config)
    mask = jnp.ones((B, L), bool).at[0, :4].set(False)
    dirty = x.at[0, :4].set(1e3)

    @jax.jit
    def run(parameters, x):
        def loss(parameters):
            y, statistics = moe(parameters, x, context(mask), config, training=True)
            return jnp.sum(jnp.square(y)), (y, statistics)

        return jax.grad(loss, has_aux=True)(parameters)

    clean = run(parameters, x)
    for a, b in zip(jax.tree.leaves(run(parameters, dirty)), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_all_padding_gives_zero(capacity_factor):
    config = model("float32", capacity_factor=capacity_factor)
    parameters, x = make(config)
    y, statistics = layer(parameters, x, context(jnp.zeros((B, L), bool)), config=config, training=True)
    assert not np.any(y)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(statistics))


def plain_loop(parameters, tokens, index, gate, config, mask, capacity):
    """Tokens in order; each expert takes what it has room for."""
    taken, out, dropped, wanted = np.zeros(X, int), np.zeros_like(tokens), 0, 0
    for t in range(len(tokens)):
        if mask is not None and not mask[t]:
            continue
        for k in range(config.top_k):
            expert = index[t, k]
            wanted += 1
            if taken[expert] >= capacity:
                dropped += 1
                continue
            taken[expert] += 1
            hidden = np.einsum("m,m...->...", tokens[t], parameters["w_in"][expert])
            hidden = np.asarray(activate(jnp.asarray(hidden), config.activation))
            out[t] += gate[t, k] * hidden @ parameters["w_out"][expert]
    return out, dropped / max(wanted, 1)


@pytest.mark.parametrize("capacity", [1, 3, 100])
@pytest.mark.parametrize(("top_k", "masked"), [(1, False), (2, True)])
def test_capacity_drops_as_a_plain_loop_does(top_k, masked, capacity, x64):
    config = MoeConfig(experts=X, width=5, router="topk", top_k=top_k)
    parameters, x = make(model())
    r = np.random.default_rng(2)
    tokens = x.reshape(-1, M)
    index = np.stack([r.permutation(X)[:top_k] for _ in tokens])
    gate = r.random((len(tokens), top_k))
    mask = r.random(len(tokens)) < 0.7 if masked else None
    zero = jnp.zeros(())
    routing = Routing(jnp.asarray(index, jnp.int32), jnp.asarray(gate), Statistics(jnp.zeros(X), zero, zero, zero))
    run = jax.jit(functools.partial(run_experts, config=config, capacity=capacity))
    y, dropped = run(parameters, tokens, routing, mask=None if mask is None else jnp.asarray(mask))
    arrays = {name: np.asarray(value) for name, value in parameters.items()}
    wanted, wanted_dropped = plain_loop(arrays, np.asarray(tokens), index, gate, config, mask, capacity)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(dropped, wanted_dropped, rtol=0, atol=1e-6)
    assert (wanted_dropped > 0) == (capacity < 100)


def test_dense_capacity_and_dropless_dispatch_agree_where_nothing_drops(x64, monkeypatch):
    """Values and gradients of grouped products over the chosen experts, with room for all, and of every expert on every row."""
    parameters, x = make(model())
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal((B, L, M)))

    def run(config):
        def loss(parameters, x):
            y, statistics = moe(parameters, x, context(), config, training=True)
            return jnp.sum(y * d_out), (y, statistics.dropped)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, x)

    dropless = run(model())
    capacity = run(model(capacity_factor=float(X)))
    monkeypatch.setenv("PALLAS_KERNELS_IMPLEMENTATION", "grouped_matmul=reference")
    dense_dispatch = run(model())
    assert dropless[1][1] == capacity[1][1] == 0
    for other in (capacity, dense_dispatch):
        # Sums of at most 22 products in float64.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), dropless, other)
    # With too little room, what is dropped is counted.
    assert run(model(capacity_factor=0.5))[1][1] > 0


def test_capacity_holds_in_training_only():
    config = model("float32", capacity_factor=0.5, router="switch")
    assert expert_capacity(B * L, config.moe) == 3  # ceil(0.5 * 22 / 4)
    assert expert_capacity(B * L, MoeConfig()) is None
    parameters, x = make(config, "one takes all")
    _, statistics = layer(parameters, x, context(), config=config, training=True)
    np.testing.assert_allclose(statistics.dropped, 1 - 3 / 22, rtol=1e-6)
    _, statistics = layer(parameters, x, context(), config=config, training=False)
    assert statistics.dropped == 0


def test_jitter_changes_training_only():
    config = model("float32", input_jitter=0.5)
    parameters, x = make(config)
    outputs = [layer(parameters, x, context(), config=config, training=True, key=jax.random.key(i))[0] for i in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.any(outputs[0] != outputs[2])
    plain = layer(parameters, x, context(), config=model("float32"), training=False)[0]
    np.testing.assert_array_equal(layer(parameters, x, context(), config=config, training=False)[0], plain)


def test_router_is_computed_in_float32():
    """In bfloat16 compute, a logit difference below bfloat16's resolution still decides."""
    config = model("bfloat16")
    parameters, x = make(config)
    parameters = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), parameters)
    parameters["router_bias"] = jnp.array([4.0, 4.0, 4.001, 4.0])
    _, statistics = layer(parameters, x.astype(jnp.bfloat16), context(), config=config, training=False)
    np.testing.assert_array_equal(statistics.load, [0, 0, 1, 0])
    assert statistics.load.dtype == jnp.float32


def test_router_products_are_as_exact_as_float32():
    """Of bfloat16 tokens and a float32 router, against float64, in value and gradient; and a choice too close for bfloat16."""
    r = np.random.default_rng(0)
    x = jnp.asarray(r.standard_normal((200, 96)), jnp.bfloat16)
    router = jnp.asarray(r.standard_normal((96, 5)), jnp.float32)
    d = jnp.asarray(r.standard_normal((200, 5)), jnp.float32)
    logits, pullback = jax.vjp(router_logits, x, router)
    wide = [np.asarray(a, np.float64) for a in (x, router, d)]
    for got, wanted, limit in (
        (logits, wide[0] @ wide[1], 1e-6),  # 96 and 200 terms in float32, each rounded to 6e-8
        (pullback(d)[1], wide[0].T @ wide[2], 1e-6),
        (pullback(d)[0], wide[2] @ wide[1].T, 2**-8),  # rounded to bfloat16, as x is
    ):
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0, atol=limit * np.abs(wanted).max())
    close = jnp.stack([jnp.ones(96), jnp.full(96, 1 + 2.0**-14)], axis=1)
    assert (jnp.argmax(router_logits(jnp.ones((3, 96), jnp.bfloat16), close), axis=1) == 1).all()
