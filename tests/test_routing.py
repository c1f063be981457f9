"""Routers against NumPy, and the balance Sinkhorn promises at the default iteration count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bm_jax import routing as routing_module
from bm_jax.config import MoeConfig
from bm_jax.routing import jitter

SINKHORN = MoeConfig()
ROUTERS = [
    SINKHORN,
    MoeConfig(router="switch"),
    MoeConfig(router="topk", top_k=2),
    MoeConfig(router="topk", top_k=3, normalize_gates=True),
]
# Compiled once a shape: an eager call would compile every operation in it.
route = jax.jit(routing_module.route, static_argnames=("config", "training"))
sinkhorn = jax.jit(routing_module.sinkhorn, static_argnames=("iterations", "temperature"))
identify = functools.partial(pytest.mark.parametrize, "config", ids=lambda c: f"{c.router}{c.top_k}")


def draw(seed, tokens, experts=8, sd=2.0, bias_sd=2.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (sd * rng.normal(size=(tokens, experts)) + bias_sd * rng.normal(size=experts)).astype(dtype)


def gradient_of(function):
    return jax.jit(jax.grad(function))


def numpy_softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def numpy_sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def numpy_sinkhorn(logits, passes=2000):
    """The balanced plan, by scaling rows and columns of exp(logits) in float64."""
    plan = np.exp(logits.astype(np.float64))
    tokens, experts = plan.shape
    for _ in range(passes):
        plan /= experts * plan.sum(axis=0, keepdims=True)
        plan /= tokens * plan.sum(axis=1, keepdims=True)
    return plan


def balance(log_plan):
    """Largest relative error of a row or column sum, and the argmax load's max over mean, in float64."""
    log_plan = np.asarray(log_plan, np.float64)
    tokens, experts = log_plan.shape
    plan = np.exp(log_plan)
    error = max(np.abs(plan.sum(axis=1) * tokens - 1).max(), np.abs(plan.sum(axis=0) * experts - 1).max())
    return error, np.bincount(log_plan.argmax(axis=1), minlength=experts).max() * experts / tokens


@functools.partial(jax.jit, static_argnames=("temperature", "iterations"))
def plans(logits, temperature=1.0, iterations=SINKHORN.sinkhorn_iterations):
    return jax.lax.map(lambda x: sinkhorn(x, iterations, temperature=temperature), logits)


# Sinkhorn


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("experts", [2, 5, 8])
def test_sinkhorn_converges_to_the_numpy_plan(experts, temperature):
    logits = draw(0, 257, experts)
    expected = numpy_sinkhorn(logits / temperature)
    actual = np.asarray(sinkhorn(jnp.asarray(logits), 200, temperature=temperature))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(np.exp(actual), expected, rtol=2e-4, atol=1e-9)
    np.testing.assert_array_equal(actual.argmax(axis=1), expected.argmax(axis=1))


def test_each_iteration_is_a_row_then_a_column_scaling():
    logits = draw(1, 64).astype(np.float64)
    plan = np.exp(logits - logits.mean(axis=0))
    for iterations in range(4):
        rows = plan / (64 * plan.sum(axis=1, keepdims=True))
        actual = sinkhorn(jnp.asarray(logits, jnp.float32), iterations)
        np.testing.assert_allclose(np.exp(actual), rows, rtol=1e-4)
        plan = rows / (8 * rows.sum(axis=0, keepdims=True))


BOUNDS = [("mild", 512, 60), ("hard", 512, 60), ("mild", 4096, 10), ("hard", 4096, 10), ("mild", 16384, 4),
          ("hard", 16384, 8), ("mild", 65536, 1), ("hard", 65536, 2)]  # fmt: skip


@pytest.mark.parametrize("temperature", sorted({SINKHORN.sinkhorn_temperature, 0.5, 1.0}))
@pytest.mark.parametrize(("difficulty", "tokens", "seeds"), BOUNDS)
def test_balance_at_the_default_iteration_count(difficulty, tokens, seeds, temperature):
    sd, bias_sd, bound = {"mild": (1.0, 0.5, 0.01), "hard": (2.0, 2.0, 0.05)}[difficulty]
    logits = np.stack([draw(1000 * tokens + seed, tokens, sd=sd, bias_sd=bias_sd) for seed in range(seeds)])
    error, load = np.transpose([balance(plan) for plan in plans(jnp.asarray(logits), temperature=temperature)])
    assert error.max() <= bound / 2, "half the promised bound: seeds not tried here must meet it too"
    if difficulty == "hard":
        # At temperature 1 and 512 tokens 0.6% of batches exceed 1.2 however long it iterates, so two may.
        share = 1 - 2 / seeds if (tokens, temperature) == (512, 1.0) else 1
        limit = {512: 1.2, 4096: 1.12, 16384: 1.06, 65536: 1.03}[tokens]
        assert np.mean(load <= limit) >= share, np.sort(load)[-3:]


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_stay_finite_and_roughly_balanced(scale):
    logits = jnp.asarray(draw(3, 2048, sd=1, bias_sd=1)) * scale
    plan = np.asarray(sinkhorn(logits, SINKHORN.sinkhorn_iterations))
    assert np.isfinite(plan).all()
    assert balance(plan)[1] < 1.25
    routing = route(logits, SINKHORN, training=True)
    assert np.isfinite(routing.gate).all()
    assert np.isfinite(routing.statistics.entropy)


def test_heavy_tailed_logits_are_balanced():
    logits = np.random.default_rng(4).standard_t(3, size=(2048, 8)).astype(np.float32) * 2 + np.arange(8)
    error, load = balance(sinkhorn(jnp.asarray(logits, jnp.float32), SINKHORN.sinkhorn_iterations))
    assert error < 0.05
    assert load < 1.2


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_iteration_count_is_fixed():
    equations = list(primitives(jax.make_jaxpr(lambda x: routing_module.sinkhorn(x, 7))(jnp.zeros((16, 4))).jaxpr))
    assert not [e for e in equations if e.primitive.name in ("while", "cond")]
    assert [e.params["length"] for e in equations if e.primitive.name == "scan"] == [7]


# Training and inference


def test_sinkhorn_training_takes_its_index_from_the_plan_and_its_gate_from_the_sigmoid():
    logits = draw(5, 512)
    routing = route(jnp.asarray(logits), SINKHORN, training=True)
    plan = sinkhorn(
        jnp.asarray(logits), SINKHORN.sinkhorn_iterations, temperature=SINKHORN.sinkhorn_temperature
    )  # fmt: skip
    index = np.asarray(plan).argmax(axis=1)
    assert routing.index.shape == routing.gate.shape == (512, 1)
    assert (routing.index.dtype, routing.gate.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(routing.index[:, 0], index)
    np.testing.assert_allclose(routing.gate[:, 0], numpy_sigmoid(logits)[np.arange(512), index], rtol=1e-6)
    assert (index != logits.argmax(axis=1)).mean() > 0.2, "these logits need balancing, so gates are not all the best"


def test_sinkhorn_inference_is_the_largest_sigmoid_of_each_token_alone():
    logits = draw(6, 512)
    routing = route(jnp.asarray(logits), SINKHORN, training=False)
    np.testing.assert_array_equal(routing.index[:, 0], logits.argmax(axis=1))
    np.testing.assert_allclose(routing.gate[:, 0], numpy_sigmoid(logits).max(axis=1), rtol=1e-6)
    alone = route(jnp.asarray(logits[7:8]), SINKHORN, training=False)
    assert alone.index[0, 0] == routing.index[7, 0]
    text = str(jax.make_jaxpr(lambda x: routing_module.route(x, SINKHORN, training=False))(jnp.asarray(logits)))
    assert "scan" not in text


def test_saturated_sigmoids_do_not_tie():
    logits = jnp.array([[20.0, 40.0, 30.0], [30.0, 20.0, 40.0]])
    assert np.all(np.asarray(jax.nn.sigmoid(logits)) == 1)
    assert route(logits, MoeConfig(experts=3), training=False).index[:, 0].tolist() == [1, 2]


def test_switch_takes_the_most_probable_expert():
    logits = draw(7, 200)
    for training in (True, False):
        routing = route(jnp.asarray(logits), MoeConfig(router="switch"), training=training)
        np.testing.assert_array_equal(routing.index[:, 0], logits.argmax(axis=1))
        np.testing.assert_allclose(routing.gate[:, 0], numpy_softmax(logits).max(axis=1), rtol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_topk_takes_the_best_of_a_softmax_over_all_experts(k, normalize):
    logits = draw(8, 200)
    config = MoeConfig(router="topk", top_k=k, normalize_gates=normalize)
    routing = route(jnp.asarray(logits), config, training=True)
    index = np.argsort(-logits, axis=1)[:, :k]
    gate = np.take_along_axis(numpy_softmax(logits.astype(np.float64)), index, axis=1)
    gate = gate / gate.sum(axis=1, keepdims=True) if normalize else gate
    np.testing.assert_array_equal(routing.index, index)
    np.testing.assert_allclose(routing.gate, gate, rtol=1e-5, atol=1e-7)


# Gradients


def test_gradient_reaches_the_logits_only_through_the_chosen_sigmoid():
    logits = jnp.asarray(draw(9, 128))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(128, 1)), jnp.float32)
    for training in (True, False):
        index = route(logits, SINKHORN, training=training).index
        actual = gradient_of(lambda x, t=training: (weight * route(x, SINKHORN, training=t).gate).sum())(logits)
        expected = gradient_of(lambda x, i=index: (weight * jnp.take_along_axis(jax.nn.sigmoid(x), i, axis=1)).sum())(
            logits
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_of_topk_gates(normalize):
    logits = jnp.asarray(draw(10, 64))
    config = MoeConfig(router="topk", top_k=2, normalize_gates=normalize)
    index = route(logits, config, training=True).index

    def expected(x):
        gate = jnp.take_along_axis(jax.nn.softmax(x), index, axis=1)
        gate = gate / gate.sum(axis=1, keepdims=True) if normalize else gate
        return (gate * jnp.array([1.0, -2.0])).sum()

    actual = gradient_of(lambda x: (route(x, config, training=True).gate * jnp.array([1.0, -2.0])).sum())(logits)
    np.testing.assert_allclose(actual, gradient_of(expected)(logits), rtol=1e-4, atol=1e-6)


def test_statistics_other_than_the_loss_carry_no_gradient():
    def total(x):
        statistics = route(x, MoeConfig(load_balance_loss=0.1), training=True).statistics
        return statistics.load[0] + statistics.entropy + statistics.dropped

    np.testing.assert_array_equal(gradient_of(total)(jnp.asarray(draw(11, 32))), 0)


# Statistics and losses


@identify(ROUTERS)
def test_statistics(config):
    logits = draw(12, 300)
    routing = route(jnp.asarray(logits), config, training=True)
    p = numpy_softmax(logits.astype(np.float64))
    statistics = routing.statistics
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(statistics))
    load = np.bincount(np.asarray(routing.index).ravel(), minlength=8) / routing.index.size
    np.testing.assert_allclose(statistics.load, load, rtol=1e-6)
    np.testing.assert_allclose(statistics.load.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(statistics.entropy, -(p * np.log(p)).sum(axis=1).mean(), rtol=1e-5)
    assert statistics.dropped == 0
    assert statistics.loss == 0


@identify(ROUTERS)
def test_losses(config):
    logits = draw(13, 300)
    base = {"router": config.router, "top_k": config.top_k, "normalize_gates": config.normalize_gates}
    mask = np.arange(300) % 3 != 0
    x, m = jnp.asarray(logits), jnp.asarray(mask)
    routing = route(x, MoeConfig(**base, load_balance_loss=0.01), training=True, mask=m)
    p = numpy_softmax(logits[mask].astype(np.float64))
    fraction = np.bincount(np.asarray(routing.index)[mask].ravel(), minlength=8) / (mask.sum() * config.top_k)
    balance_loss = 8 * 0.01 * (p.mean(axis=0) * fraction).sum()
    np.testing.assert_allclose(routing.statistics.loss, balance_loss, rtol=1e-5)
    z = 0.001 * (np.log(np.exp(logits[mask].astype(np.float64)).sum(axis=1)) ** 2).mean()
    actual = route(x, MoeConfig(**base, router_z_loss=0.001), training=True, mask=m).statistics.loss
    np.testing.assert_allclose(actual, z, rtol=1e-5)
    both = MoeConfig(**base, load_balance_loss=0.01, router_z_loss=0.001)
    np.testing.assert_allclose(route(x, both, training=True, mask=m).statistics.loss, z + balance_loss, rtol=1e-5)
    gradient = gradient_of(lambda x: route(x, both, training=True, mask=m).statistics.loss)(x)
    assert np.abs(gradient[mask]).max() > 0
    np.testing.assert_array_equal(gradient[~mask], 0)


@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_loss_is_its_coefficient_at_perfect_balance(k):
    logits = jnp.tile(3 * jnp.eye(8) + 2 * jnp.roll(jnp.eye(8), 1, axis=1), (4, 1))
    config = MoeConfig(router="topk", top_k=k, load_balance_loss=0.25)
    np.testing.assert_allclose(route(logits, config, training=True).statistics.loss, 0.25, rtol=1e-6)


# Mask


@identify(ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_mask_equals_removing_the_tokens(config, training):
    logits = draw(14, 400)
    mask = np.random.default_rng(1).random(400) < 0.6
    dirty = np.where(mask[:, None], logits, np.nan)
    config = MoeConfig(
        router=config.router, top_k=config.top_k, normalize_gates=config.normalize_gates,
        load_balance_loss=0.01, router_z_loss=0.01,
    )  # fmt: skip
    masked = route(jnp.asarray(dirty), config, training=training, mask=jnp.asarray(mask))
    alone = route(jnp.asarray(logits[mask]), config, training=training)
    np.testing.assert_array_equal(masked.index[mask], alone.index)
    np.testing.assert_allclose(masked.gate[mask], alone.gate, rtol=1e-5)
    np.testing.assert_array_equal(masked.gate[~mask], 0)
    for a, b in zip(masked.statistics, alone.statistics, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    gradient = gradient_of(lambda x: route(x, config, training=training, mask=jnp.asarray(mask)).gate.sum())
    np.testing.assert_array_equal(gradient(jnp.asarray(dirty))[~mask], 0)


def test_masked_plan_equals_the_plan_of_the_rest():
    logits = draw(15, 300)
    mask = np.arange(300) < 123
    masked = sinkhorn(jnp.asarray(logits), 8, mask=jnp.asarray(mask))
    np.testing.assert_allclose(masked[:123], sinkhorn(jnp.asarray(logits[:123]), 8), rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(masked[123:]) == -np.inf)


@identify(ROUTERS)
def test_all_tokens_masked_gives_zeros(config):
    losses = MoeConfig(
        router=config.router, top_k=config.top_k, normalize_gates=config.normalize_gates,
        load_balance_loss=0.01, router_z_loss=0.01,
    )  # fmt: skip
    mask = jnp.zeros(32, bool)
    for logits in (jnp.asarray(draw(16, 32)), jnp.full((32, 8), jnp.nan)):
        routing = route(logits, losses, training=True, mask=mask)
        assert np.all((np.asarray(routing.index) >= 0) & (np.asarray(routing.index) < 8))
        for leaf in (routing.gate, *routing.statistics):
            np.testing.assert_array_equal(leaf, 0)
        gradient = gradient_of(lambda x: route(x, losses, training=True, mask=mask).statistics.loss)(logits)
        np.testing.assert_array_equal(gradient, 0)


# Edges, types and transformations


@identify([SINKHORN, MoeConfig(router="switch"), MoeConfig(router="topk")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (5, 1), (3, 8)])
def test_one_expert_or_few_tokens(config, training, shape):
    logits = jnp.asarray(draw(17, *shape))
    routing = route(logits, config, training=training)
    assert routing.index.shape == (shape[0], 1)
    assert np.all((np.asarray(routing.index) >= 0) & (np.asarray(routing.index) < shape[1]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(routing))
    if shape[1] == 1:
        expected = jax.nn.sigmoid(logits) if config.router == "sinkhorn" else jnp.ones((shape[0], 1))
        np.testing.assert_allclose(routing.gate, expected, rtol=1e-6)


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.asarray(draw(18, 64)).astype(jnp.bfloat16)
    for config in ROUTERS:
        actual = route(logits, config, training=True)
        jax.tree.map(np.testing.assert_array_equal, actual, route(logits.astype(jnp.float32), config, training=True))
        assert actual.gate.dtype == jnp.float32
    assert sinkhorn(logits, 4).dtype == jnp.float32


def test_float64_logits_stay_float64():
    with jax.enable_x64(True):
        logits = draw(19, 128, dtype=np.float64)
        plan = sinkhorn(jnp.asarray(logits), 100)
        assert plan.dtype == jnp.float64
        np.testing.assert_allclose(np.exp(plan), numpy_sinkhorn(logits), rtol=1e-11)
        for config in ROUTERS:
            routing = route(jnp.asarray(logits), config, training=True, mask=jnp.arange(128) < 100)
            assert routing.index.dtype == jnp.int32
            assert all(leaf.dtype == jnp.float64 for leaf in (routing.gate, *routing.statistics))


@identify(ROUTERS)
def test_jit_and_vmap(config):
    logits = jnp.asarray(np.stack([draw(20 + i, 96) for i in range(3)]))
    mask = jnp.asarray(np.random.default_rng(2).random((3, 96)) < 0.8)
    one = functools.partial(route, config=config, training=True)
    batched = jax.jit(jax.vmap(lambda x, m: one(x, mask=m)))(logits, mask)
    for i in range(3):
        expected = one(logits[i], mask=mask[i])
        np.testing.assert_array_equal(batched.index[i], expected.index)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-7), batched, expected)


def test_jitter_is_uniform_multiplicative_noise():
    x = jax.random.normal(jax.random.key(0), (200, 50)) + 5
    ratio = np.asarray(jax.jit(jitter)(x, jax.random.key(1), 0.1) / x)
    assert ratio.min() >= 0.9 - 1e-6
    assert ratio.max() <= 1.1 + 1e-6
    np.testing.assert_allclose([ratio.mean(), ratio.std()], [1, 0.1 / np.sqrt(3)], atol=2e-3)
    np.testing.assert_array_equal(jitter(x, jax.random.key(1), 0.0), x)
    assert jitter(x.astype(jnp.bfloat16), jax.random.key(1), 0.1).dtype == jnp.bfloat16
