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
LOSSES = {"load_balance_loss": 0.01, "router_z_loss": 0.001}
ROUTERS = [
    MoeConfig(**LOSSES),
    MoeConfig(router="switch", **LOSSES),
    MoeConfig(router="topk", top_k=2, **LOSSES),
    MoeConfig(router="topk", top_k=3, normalize_gates=True, **LOSSES),
]
identify = functools.partial(pytest.mark.parametrize, "config", ids=lambda c: f"{c.router}{c.top_k}")

# Compiling is most of the time here, so tests share compiled functions, and most shapes are [TOKENS, 8].
TOKENS = 300
EVERY = jnp.ones(TOKENS, bool)
route = jax.jit(routing_module.route, static_argnames=("config", "training", "parts"))
sinkhorn = jax.jit(routing_module.sinkhorn)


@functools.partial(jax.jit, static_argnames=("config", "training"))
def gradient(logits, gate_weight, loss_weight, config, training=True, mask=EVERY):
    """Gradient of `sum(gate_weight * gate) + loss_weight * loss` with respect to the logits."""

    def objective(x):
        routing = routing_module.route(x, config, training=training, mask=mask)
        return jnp.sum(gate_weight * routing.gate) + loss_weight * routing.statistics.loss

    return jax.grad(objective)(logits)


def draw(seed, tokens=TOKENS, experts=8, sd=2.0, bias_sd=2.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (sd * rng.normal(size=(tokens, experts)) + bias_sd * rng.normal(size=experts)).astype(dtype)


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


@jax.jit
def plans(logits, temperature):
    """The plan of each batch at the default iteration count."""
    count = SINKHORN.sinkhorn_iterations
    return jax.lax.map(lambda x: routing_module.sinkhorn(x, count, temperature=temperature), logits)


# Sinkhorn


@pytest.mark.parametrize(("experts", "temperature"), [(2, 1.0), (8, 1.0), (8, 0.5), (8, 3.0)])
def test_sinkhorn_converges_to_the_numpy_plan(experts, temperature):
    logits = draw(0, TOKENS, experts)
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


BOUNDS = [("mild", 512, 60), ("hard", 512, 60), ("mild", 4096, 10), ("hard", 4096, 10), ("mild", 16384, 6),
          ("hard", 16384, 6), ("mild", 65536, 2), ("hard", 65536, 2)]  # fmt: skip


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
    logits = draw(5)
    routing = route(jnp.asarray(logits), SINKHORN, training=True)
    plan = sinkhorn(
        jnp.asarray(logits), SINKHORN.sinkhorn_iterations, temperature=SINKHORN.sinkhorn_temperature
    )  # fmt: skip
    index = np.asarray(plan).argmax(axis=1)
    assert routing.index.shape == routing.gate.shape == (TOKENS, 1)
    assert (routing.index.dtype, routing.gate.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(routing.index[:, 0], index)
    np.testing.assert_allclose(routing.gate[:, 0], numpy_sigmoid(logits)[np.arange(TOKENS), index], rtol=1e-6)
    assert (index != logits.argmax(axis=1)).mean() > 0.2, "these logits need balancing, so gates are not all the best"


def test_sinkhorn_inference_is_the_largest_sigmoid_of_each_token_alone():
    logits = draw(6)
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


@pytest.mark.parametrize(("k", "normalize"), [(1, False), (2, False), (2, True), (8, False), (8, True)])
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


@pytest.mark.parametrize("training", [True, False])
def test_gradient_reaches_the_logits_only_through_the_chosen_sigmoid(training):
    logits = draw(9)
    weight = np.random.default_rng(0).normal(size=(TOKENS, 1)).astype(np.float32)
    index = np.asarray(route(logits, ROUTERS[0], training=training, mask=EVERY).index)

    @jax.grad
    def expected(x):
        return (weight * jnp.take_along_axis(jax.nn.sigmoid(x), index, axis=1)).sum()

    actual = gradient(logits, weight, 0.0, ROUTERS[0], training)
    np.testing.assert_allclose(actual, expected(jnp.asarray(logits)), rtol=1e-5, atol=1e-9)


@identify(ROUTERS[1:])
def test_gradient_of_softmax_gates(config):
    logits = draw(10)
    weight = np.random.default_rng(0).normal(size=(TOKENS, config.top_k)).astype(np.float32)
    index = np.argsort(-logits, axis=1)[:, : config.top_k]

    @jax.grad
    def expected(x):
        gate = jnp.take_along_axis(jax.nn.softmax(x), index, axis=1)
        gate = gate / gate.sum(axis=1, keepdims=True) if config.normalize_gates else gate
        return (weight * gate).sum()

    actual = gradient(logits, weight, 0.0, config)
    np.testing.assert_allclose(actual, expected(jnp.asarray(logits)), rtol=1e-4, atol=1e-6)


def test_statistics_other_than_the_loss_carry_no_gradient():
    @jax.grad
    def total(x):
        statistics = route(x, ROUTERS[0], training=True, mask=EVERY).statistics
        return statistics.load[0] + statistics.entropy + statistics.dropped

    np.testing.assert_array_equal(total(jnp.asarray(draw(11))), 0)


# Statistics and losses


def numpy_losses(logits, index):
    """Load-balance loss and z-loss, before their coefficients."""
    p = numpy_softmax(logits.astype(np.float64))
    fraction = np.bincount(np.asarray(index).ravel(), minlength=8) / index.size
    z = np.log(np.exp(logits.astype(np.float64)).sum(axis=1)) ** 2
    return 8 * (p.mean(axis=0) * fraction).sum(), z.mean()


@identify(ROUTERS)
def test_statistics_and_losses(config):
    logits = draw(12)
    routing = route(logits, config, training=True, mask=EVERY)
    p = numpy_softmax(logits.astype(np.float64))
    statistics = routing.statistics
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(statistics))
    load = np.bincount(np.asarray(routing.index).ravel(), minlength=8) / routing.index.size
    np.testing.assert_allclose(statistics.load, load, rtol=1e-6)
    np.testing.assert_allclose(statistics.load.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(statistics.entropy, -(p * np.log(p)).sum(axis=1).mean(), rtol=1e-5)
    assert statistics.dropped == 0
    balance_loss, z_loss = numpy_losses(logits, routing.index)
    np.testing.assert_allclose(statistics.loss, 0.01 * balance_loss + 0.001 * z_loss, rtol=1e-5)


def test_each_loss_alone():
    logits = draw(13)
    balance_loss, z_loss = numpy_losses(logits, logits.argmax(axis=1))
    for settings, expected in [
        ({"load_balance_loss": 0.5}, 0.5 * balance_loss),
        ({"router_z_loss": 0.25}, 0.25 * z_loss),
        ({}, 0),
    ]:
        config = MoeConfig(router="switch", **settings)
        np.testing.assert_allclose(route(logits, config, training=True).statistics.loss, expected, rtol=1e-5)


def test_gradient_of_the_losses():
    logits = draw(14, dtype=np.float64)
    p = numpy_softmax(logits)
    fraction = np.bincount(logits.argmax(axis=1), minlength=8) / TOKENS
    balance_loss = 8 * p * (fraction - (p * fraction).sum(axis=1, keepdims=True)) / TOKENS
    z_loss = 2 * np.log(np.exp(logits).sum(axis=1, keepdims=True)) * p / TOKENS
    actual = gradient(logits.astype(np.float32), np.zeros((TOKENS, 1), np.float32), 1.0, ROUTERS[1])
    np.testing.assert_allclose(actual, 0.01 * balance_loss + 0.001 * z_loss, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_loss_is_its_coefficient_at_perfect_balance(k):
    logits = np.tile(3 * np.eye(8) + 2 * np.roll(np.eye(8), 1, axis=1), (4, 1)).astype(np.float32)
    config = MoeConfig(router="topk", top_k=k, load_balance_loss=0.25)
    np.testing.assert_allclose(route(logits, config, training=True).statistics.loss, 0.25, rtol=1e-6)


# Mask


@pytest.mark.parametrize(
    ("config", "training"),
    [(ROUTERS[0], True), (ROUTERS[0], False), (ROUTERS[1], True), (ROUTERS[3], True)],
    ids=["sinkhorn", "sinkhorn-inference", "switch", "topk"],
)
def test_mask_equals_removing_the_tokens(config, training):
    logits = draw(15)
    mask = np.random.default_rng(1).random(TOKENS) < 0.6
    dirty = np.where(mask[:, None], logits, np.nan)
    masked = route(dirty, config, training=training, mask=mask)
    alone = route(logits[mask], config, training=training)
    np.testing.assert_array_equal(masked.index[mask], alone.index)
    np.testing.assert_allclose(masked.gate[mask], alone.gate, rtol=1e-5)
    np.testing.assert_array_equal(masked.gate[~mask], 0)
    for a, b in zip(masked.statistics, alone.statistics, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    slope = gradient(dirty, np.ones((TOKENS, config.top_k), np.float32), 1.0, config, training, mask)
    assert np.isfinite(slope).all()
    assert np.any(np.asarray(slope)[mask] != 0)
    np.testing.assert_array_equal(slope[~mask], 0)


def test_masked_plan_equals_the_plan_of_the_rest():
    logits = draw(16)
    mask = np.arange(TOKENS) < 123
    masked = sinkhorn(logits, 8, mask=mask)
    np.testing.assert_allclose(masked[:123], sinkhorn(logits[:123], 8), rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(masked[123:]) == -np.inf)


@identify(ROUTERS)
@pytest.mark.parametrize("fill", [1.0, np.nan])
def test_all_tokens_masked_gives_zeros(config, fill):
    logits = fill * draw(17)
    routing = route(logits, config, training=True, mask=~EVERY)
    assert np.all((np.asarray(routing.index) >= 0) & (np.asarray(routing.index) < 8))
    for leaf in (routing.gate, *routing.statistics):
        np.testing.assert_array_equal(leaf, 0)
    weight = np.ones((TOKENS, config.top_k), np.float32)
    np.testing.assert_array_equal(gradient(logits, weight, 1.0, config, True, ~EVERY), 0)


# Edges, types and transformations


@identify([SINKHORN, MoeConfig(router="switch"), MoeConfig(router="topk")])
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (5, 1)])
def test_one_expert_or_few_tokens(config, shape):
    logits = jnp.asarray(draw(18, *shape))
    routing = route(logits, config, training=True)
    assert routing.index.shape == (shape[0], 1)
    assert np.all((np.asarray(routing.index) >= 0) & (np.asarray(routing.index) < shape[1]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(routing))
    if shape[1] == 1:
        expected = jax.nn.sigmoid(logits) if config.router == "sinkhorn" else jnp.ones((shape[0], 1))
        np.testing.assert_allclose(routing.gate, expected, rtol=1e-6)


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.asarray(draw(19)).astype(jnp.bfloat16)
    actual = route(logits, ROUTERS[0], training=True, mask=EVERY)
    expected = route(logits.astype(jnp.float32), ROUTERS[0], training=True, mask=EVERY)
    np.testing.assert_array_equal(actual.index, expected.index)
    np.testing.assert_allclose(actual.gate, expected.gate, rtol=1e-6)
    assert all(leaf.dtype == jnp.float32 for leaf in (actual.gate, *actual.statistics))


def test_float64_logits_stay_float64():
    with jax.enable_x64(True):
        logits = draw(20, dtype=np.float64)
        plan = sinkhorn(logits, 150)
        assert plan.dtype == jnp.float64
        np.testing.assert_allclose(np.exp(plan), numpy_sinkhorn(logits), rtol=1e-11)
        for config in (ROUTERS[0], ROUTERS[2]):
            routing = route(logits, config, training=True, mask=EVERY)
            assert routing.index.dtype == jnp.int32
            assert all(leaf.dtype == jnp.float64 for leaf in (routing.gate, *routing.statistics))


@identify([ROUTERS[0], ROUTERS[3]])
def test_vmap(config):
    logits = np.stack([draw(21 + i) for i in range(3)])
    mask = np.random.default_rng(2).random((3, TOKENS)) < 0.8
    batched = jax.vmap(lambda x, m: route(x, config, training=True, mask=m))(logits, mask)
    for i in range(3):
        expected = route(logits[i], config, training=True, mask=mask[i])
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


def test_local_sinkhorn_balances_each_part_by_itself():
    r = np.random.default_rng(7)
    logits = jnp.asarray(r.standard_normal((64, 8)) + 2 * np.repeat(r.standard_normal((4, 8)), 16, axis=0))
    mask = jnp.asarray(r.random(64) < 0.8)
    local = MoeConfig(experts=8, sinkhorn_scope="local")
    whole = route(logits, local, training=True, mask=mask, parts=4)
    for k in range(4):
        part = slice(16 * k, 16 * k + 16)
        alone = route(logits[part], local, training=True, mask=mask[part])
        np.testing.assert_array_equal(whole.index[part], alone.index)
        np.testing.assert_allclose(whole.gate[part], alone.gate, rtol=1e-6)
    together = route(logits, MoeConfig(experts=8), training=True, mask=mask, parts=4)
    assert np.any(together.index != whole.index)  # the parts prefer different experts
    np.testing.assert_array_equal(together.index, route(logits, MoeConfig(experts=8), training=True, mask=mask).index)
