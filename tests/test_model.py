"""The whole model: counts, decoding, documents, causality, recomputation, precision, and several devices."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
from bm_jax.cache import init_cache
from bm_jax.config import AttentionConfig, MambaConfig, MlpConfig, ModelConfig, MoeConfig
from bm_jax.model import cast_kernels, count_parameters, forward, init_parameters, logits

V = 29
SMALL = ModelConfig(
    repeats=2,
    vocab_size=V,
    width=12,
    mamba=MambaConfig(state_size=4),
    attention=AttentionConfig(heads=4, kv_heads=2, head_size=4),
    mlp=MlpConfig(width=10),
    moe=MoeConfig(experts=4, width=6),
    tie_embeddings=False,
    compute_dtype="float32",
)


def small(*layers, **changes):
    return dataclasses.replace(SMALL, layers=layers, **changes)


TOP_2 = MoeConfig(experts=4, width=6, router="topk", top_k=2, router_bias=False)
SYSTEMS = {
    "blackmamba": small("mamba", "moe"),
    "parallel pair": small("mamba+moe", mamba=MambaConfig(state_size=4, conv_width=3, expansion=1, dt_rank=2)),
    "transformer": small("attention", "mlp", final_norm="rmsnorm"),
    "window, parallel": small(
        "attention+mlp", attention=AttentionConfig(heads=4, kv_heads=1, head_size=4, rotary=False, window=3)
    ),
    "jamba": small(
        *("mamba", "mlp", "attention", "moe"),
        mamba=MambaConfig(state_size=4, inner_norms=True),
        attention=AttentionConfig(heads=2, kv_heads=1, rotary=False),
        moe=TOP_2,
    ),
}
EVERY_LAYER = SYSTEMS["jamba"]
every_system = pytest.mark.parametrize("system", SYSTEMS)


@functools.lru_cache
def parameters_of(config):
    """Parameters away from their initial values, so that no norm or bias is neutral."""
    initial = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
    r = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if "norm" in name and "bias" not in name:
            return jnp.asarray(1 + 0.3 * r.standard_normal(leaf.shape), leaf.dtype)
        if name == "A_log":
            return jnp.asarray(r.standard_normal(leaf.shape), leaf.dtype)
        fan_in = 1 if leaf.ndim < 3 else leaf.shape[-2]
        return jnp.asarray(r.standard_normal(leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, initial)


@functools.partial(jax.jit, static_argnames=("config", "training", "remat"))
def run(parameters, tokens, config, segment_ids=None, cache=None, **options):
    """Logits, cache and statistics."""
    output = forward(parameters, tokens, config, segment_ids=segment_ids, cache=cache, **options)
    return logits(parameters, output.hidden, config), output.cache, output.statistics


def tokens_of(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(V, size=shape), jnp.int32)


def close(got, wanted, tolerance=2e-5):
    """float32: some hundred roundings of 6e-8 in sums of the size of the largest logit."""
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale)


# How many parameters

COUNTS = {  # total, active
    "blackmamba_340m_1p5b": (1_458_462_072, 343_694_712),
    "blackmamba_630m_2p8b": (2_783_213_584, 628_770_832),
    "default": (2_728_216, 663_832),
    "jamba": (932_269_728, 315_707_040),
    "jamba_52b": (51_570_323_328, 12_110_311_296),
    "mamba": (344_871_936, 344_871_936),
    "moe_mamba": (2_477_679_360, 156_132_096),
    "transformer": (342_473_728, 342_473_728),
    "transformer_moe": (1_034_525_696, 342_662_144),
}
MATCHED = 343_694_712  # the dense comparison systems are as large as BlackMamba 340M/1.5B is active


@pytest.mark.parametrize("preset", configs.names())
def test_the_counts_of_every_preset(preset):
    assert count_parameters(configs.load(preset).model) == COUNTS[preset]


def test_the_readme_states_the_counts():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    for preset, (total, active) in COUNTS.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{preset}` |"))
        assert row.endswith(f"| {total:,} | {active:,} |")


def test_count_by_the_published_formula():
    """BLACKMAMBA per layer, from shapes: 3 I D + I C + I + I (dt + 2 S) + I dt + I + I S + I + D, and the experts."""
    c = ModelConfig(repeats=15, vocab_size=50304, width=1152, moe=MoeConfig(experts=8, width=3072))
    i, d, s, conv, dt = c.inner_width, c.width, c.mamba.state_size, c.mamba.conv_width, c.dt_rank
    mamba = 3 * i * d + i * conv + i + i * (dt + 2 * s) + i * dt + i + i * s + i + d
    assert (i, dt, mamba) == (2304, 72, 8_422_272)
    expert, router = 3 * d * c.moe.width, 8 * d + 8
    ends = c.vocab_size * d + 2 * d
    assert count_parameters(c).total == 15 * (mamba + 8 * expert + router + d) + ends
    assert count_parameters(c).active == 15 * (mamba + expert + router + d) + ends


@pytest.mark.parametrize("preset", configs.names())
def test_every_preset_has_a_model_of_its_size(preset):
    config = configs.load(preset).model
    count = count_parameters(config)
    assert count.active == count.total or "moe" in config.kinds
    if preset in ("mamba", "transformer", "transformer_moe"):
        assert abs(count.active / MATCHED - 1) < 0.02, count
    if preset == "jamba_52b":
        assert abs(count.total / 52e9 - 1) < 0.02, count
        assert abs(count.active / 12e9 - 1) < 0.05, count


# Decoding


B, L, L_PACKED = 5, 10, 8  # one set of shapes for the next two tests, since compiling is what takes time


@every_system
def test_prefill_and_steps_equal_the_full_forward(system):
    config, parameters, tokens = SYSTEMS[system], parameters_of(SYSTEMS[system]), tokens_of(0, B, L)
    whole, no_cache, _ = run(parameters, tokens, config)
    assert no_cache is None
    for prefill in (1, 2, 3, 7) if config == EVERY_LAYER else (1, 3):
        pieces, start, cache = [], 0, init_cache(config, B, L)
        for stop in (prefill, *range(prefill + 1, L + 1)):
            got, cache, _ = run(parameters, tokens[:, start:stop], config, cache=cache)
            pieces.append(got)
            start = stop
        close(np.concatenate(pieces, 1), np.asarray(whole))
        np.testing.assert_array_equal(cache.length, [L] * B)
        np.testing.assert_array_equal(cache.positions, [L] * B)


@every_system
def test_packing_padding_and_decoding_after_them(system):
    """Each document gets what it gets alone: packed, left padded, without and with a cache, and in later steps."""
    config, parameters = SYSTEMS[system], parameters_of(SYSTEMS[system])
    ids = np.array([
        [3, 3, 3, 5, 5, 5, 3, 3],  # the third document has the first one's id
        [0, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 1],
        [0, 2, 4, 4, 4, 4, 4, 4],
    ], np.int32)  # fmt: skip
    tokens, later = tokens_of(1, B, L_PACKED), tokens_of(2, B, L - L_PACKED)
    got, cache, _ = run(parameters, tokens, config, jnp.asarray(ids), init_cache(config, B, L))
    np.testing.assert_array_equal(cache.positions, [2, 5, 8, 1, 6])
    for t in range(L - L_PACKED):
        step, cache, _ = run(parameters, later[:, t : t + 1], config, cache=cache)
        got = np.concatenate([got, step], 1)
    assert all(np.isfinite(leaf).all() for leaf in (got, *jax.tree.leaves(cache)))
    if config == EVERY_LAYER:
        without, _, _ = run(parameters, tokens, config, jnp.asarray(ids))
        assert np.isfinite(without).all()

    documents = [(0, 0, 3), (0, 3, 6), (0, 6, L), (1, 3, L), (2, 0, L), (3, 7, L), (4, 1, 2), (4, 2, L)]
    tokens = np.concatenate([tokens, later], 1)
    # A document alone: at the start of a row, what follows it being of no account (causality has a test of its own).
    alone = np.asarray(tokens_of(3, 2 * B, L)).copy()
    for i, (row, start, stop) in enumerate(documents):
        alone[i, : stop - start] = tokens[row, start:stop]
    wanted = np.concatenate([run(parameters, jnp.asarray(half), config)[0] for half in (alone[:B], alone[B:])])
    for i, (row, start, stop) in enumerate(documents):
        close(got[row, start:stop], wanted[i, : stop - start])
        if config == EVERY_LAYER:
            stop = min(stop, L_PACKED)
            close(without[row, start:stop], wanted[i, : stop - start])


@pytest.mark.slow
def test_packed_windows_continue_in_a_second_call():
    """A row cut inside a document, and at a boundary, with ids in both calls."""
    config = EVERY_LAYER
    parameters, tokens = parameters_of(config), tokens_of(1, 2, 8)
    ids = jnp.array([[1, 1, 2, 2, 2, 2, 2, 3], [0, 0, 0, 0, 7, 7, 7, 7]], jnp.int32)
    whole, _, _ = run(parameters, tokens, config, ids)
    first, cache, _ = run(parameters, tokens[:, :4], config, ids[:, :4], init_cache(config, 2, 8))
    second, cache, _ = run(parameters, tokens[:, 4:], config, ids[:, 4:], cache)
    close(np.concatenate([first, second], 1), np.asarray(whole))
    np.testing.assert_array_equal(cache.positions, [1, 4])


def test_a_cache_for_attention_needs_room():
    with pytest.raises(ValueError, match="max_length of at least 1, got 0"):
        init_cache(SYSTEMS["transformer"], 2)
    cache = init_cache(SYSTEMS["blackmamba"], 2)
    assert set(cache.layers["layer_1"]) == set()  # experts keep nothing


# Causality


@every_system
def test_causality_through_gradients(system):
    """d logits[t] / d embedding[s] is exactly zero for s > t, and not for s <= t."""
    config, length = SYSTEMS[system], 5
    parameters = parameters_of(config)
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(V), jnp.float32)

    @jax.jit
    def jacobian(embedding):
        def value(embedding):
            replaced = parameters | {"embedding": embedding}  # one row a token, so that a row's gradient is a token's
            output = forward(replaced, jnp.arange(length)[None], config)
            return logits(replaced, output.hidden, config)[0] @ direction

        return jax.lax.map(lambda row: jax.vjp(value, embedding)[1](row)[0], jnp.eye(length))

    reached = np.any(np.asarray(jacobian(parameters["embedding"]))[:, :length] != 0, axis=-1)
    np.testing.assert_array_equal(reached, np.tril(np.ones((length, length), bool)))


def test_no_gradient_crosses_documents_or_padding_in_training():
    """With a router that does not look at the batch, as Sinkhorn's must."""
    config = small("mamba", "attention", "moe", moe=TOP_2, repeats=1)
    parameters = parameters_of(config)
    ids = jnp.array([[0, 0, 1, 1, 2, 2, 2]], jnp.int32)

    @jax.jit
    @jax.grad
    def gradient(embedding):
        replaced = parameters | {"embedding": embedding}
        output = forward(replaced, jnp.arange(7)[None], config, segment_ids=ids, training=True)
        return jnp.sum(jnp.square(logits(replaced, output.hidden, config)[0, 4:]))

    reached = np.any(np.asarray(gradient(parameters["embedding"])) != 0, axis=-1)
    np.testing.assert_array_equal(reached[:7], [False] * 4 + [True] * 3)


# Recomputation and unrolling change nothing


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def loss_and_gradient(parameters, tokens, config, remat="none"):
    def loss(parameters):
        values, _, statistics = run(parameters, tokens, config, training=True, remat=remat)
        targets = jnp.roll(tokens, -1, axis=1)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(values), targets[..., None], axis=-1)
        return -jnp.mean(chosen) + jnp.sum(statistics.loss)

    return jax.value_and_grad(loss)(parameters)


EVERY_KIND = small(
    "mamba+moe",
    moe=MoeConfig(experts=4, width=6, load_balance_loss=0.01, router_z_loss=0.001),
    tie_embeddings=True,
)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_nothing(remat):
    parameters, tokens = parameters_of(EVERY_KIND), tokens_of(0, 2, 6)
    loss, gradient = loss_and_gradient(parameters, tokens, EVERY_KIND)
    other_loss, other = loss_and_gradient(parameters, tokens, EVERY_KIND, remat)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        close(a, np.asarray(b))


@pytest.mark.slow
def test_what_is_kept_is_not_routed_again():
    """With "dots" the backward pass takes the forward pass's choice; with "full" it balances the experts once more."""
    config, tokens = small("mamba", "moe", moe=MoeConfig(experts=4, width=6)), tokens_of(0, 2, 6)
    parameters = parameters_of(config)

    def loops(remat):
        text = loss_and_gradient.lower(parameters, tokens, config, remat).compile().as_text()
        return sum(" while(" in line and "/route/" in line for line in text.splitlines())

    assert (loops("dots"), loops("full")) == (1, 2)


def test_unrolling_changes_nothing():
    config, tokens = SYSTEMS["blackmamba"], tokens_of(0, B, L)
    parameters = parameters_of(config)
    unrolled, _, statistics = run(parameters, tokens, dataclasses.replace(config, scan_unroll=2))
    rolled, _, wanted = run(parameters, tokens, config)
    close(unrolled, np.asarray(rolled))
    np.testing.assert_array_equal(statistics.load, wanted.load)


def test_recomputing_keeps_less():
    """What the forward pass hands to the backward pass: full < dots < none."""
    config = dataclasses.replace(EVERY_KIND, repeats=8)
    shapes = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
    tokens = jnp.zeros((2, 64), jnp.int32)

    def kept(remat):
        def residuals(parameters):
            loss = lambda p: jnp.sum(forward(p, tokens, config, training=True, remat=remat).hidden)  # noqa: E731
            return jax.vjp(loss, parameters)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, shapes)))

    assert kept("full") < kept("dots") < kept("none")


# Precision


def test_bfloat16_is_close_to_float32():
    """Without experts, whose choice jumps."""
    config = small("mamba", "attention", "mlp")
    parameters, tokens = parameters_of(config), tokens_of(0, 2, 16)
    exact, _, _ = run(parameters, tokens, config)
    half, _, _ = run(parameters, tokens, dataclasses.replace(config, compute_dtype="bfloat16"))
    assert half.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(half - exact)) / np.mean(np.square(exact)))
    # Three periods, each some ten roundings of 2**-9; a step's error grows by its decay exponent. Seen: 0.046.
    assert 1e-4 < error < 0.08


@every_system
def test_compute_and_residual_dtypes(system):
    config = dataclasses.replace(SYSTEMS[system], compute_dtype="bfloat16", residual_dtype="bfloat16")
    cache = jax.eval_shape(lambda: init_cache(config, 2, 4))
    shapes = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
    output = jax.eval_shape(lambda p, c: forward(p, tokens_of(0, 2, 4), config, cache=c), shapes, cache)
    assert output.hidden.dtype == jnp.bfloat16
    assert jax.tree.structure(output.cache) == jax.tree.structure(cache)
    for new, old in zip(jax.tree.leaves(output.cache), jax.tree.leaves(cache), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    if output.statistics is not None:
        assert {leaf.dtype for leaf in output.statistics} == {jnp.dtype("float32")}


def test_float64_agrees_with_float32():
    config = SYSTEMS["blackmamba"]
    parameters, tokens = parameters_of(config), tokens_of(0, B, L)
    single, _, _ = run(parameters, tokens, config)
    wide = dataclasses.replace(config, compute_dtype="float64", residual_dtype="float64")
    with jax.enable_x64(True):
        double, _, _ = run(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), parameters), tokens, wide)
    assert double.dtype == jnp.float64
    close(single, np.asarray(double))


# Ends


def test_tied_and_untied_embeddings():
    config = SYSTEMS["blackmamba"]
    parameters = parameters_of(config)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, config.width)), jnp.float32)
    close(logits(parameters, hidden, config), np.asarray(hidden) @ np.asarray(parameters["unembedding"]))
    tied = dataclasses.replace(config, tie_embeddings=True)
    assert "unembedding" not in parameters_of(tied)
    close(logits(parameters_of(tied), hidden, tied), np.asarray(hidden) @ np.asarray(parameters_of(tied)["embedding"]).T)


@pytest.mark.parametrize("final_norm", ["layernorm", "rmsnorm"])
def test_final_norm(final_norm):
    """Branches that add nothing leave the embedding, normed."""
    config = small("mlp", final_norm=final_norm)
    parameters = jax.tree.map(lambda leaf: leaf, parameters_of(config))
    parameters["periods"] = jax.tree.map(jnp.zeros_like, parameters["periods"])
    tokens = tokens_of(0, 1, 4)
    hidden = jax.jit(forward, static_argnames="config")(parameters, tokens, config).hidden
    x = np.asarray(parameters["embedding"])[np.asarray(tokens)]
    if final_norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * np.asarray(parameters["final_norm"])
    assert ("final_norm_bias" in parameters) == (final_norm == "layernorm")
    close(hidden, wanted + np.asarray(parameters.get("final_norm_bias", 0)))


# Routing statistics


def test_statistics_are_in_order_of_depth():
    config = small("moe", "mlp", "mamba+moe")
    parameters = jax.tree.map(jnp.asarray, parameters_of(config))
    wanted = [[1, 2], [3, 0]]  # by period and MoE layer: the expert that a large bias picks
    for column, layer in enumerate(("layer_0", "layer_2")):
        bias = np.zeros((2, 4), np.float32)
        for period in range(2):
            bias[period, wanted[period][column]] = 100
        parameters["periods"][layer]["moe"]["router_bias"] = jnp.asarray(bias)
    _, _, statistics = run(parameters, tokens_of(0, 2, 5), config)
    np.testing.assert_array_equal(statistics.load, np.eye(4)[[1, 2, 3, 0]])
    assert run(parameters_of(SYSTEMS["transformer"]), tokens_of(0, 2, 9), SYSTEMS["transformer"])[2] is None


def test_sinkhorn_balances_in_training_and_not_in_inference():
    config = SYSTEMS["blackmamba"]
    parameters = jax.tree.map(jnp.asarray, parameters_of(config))
    router = parameters["periods"]["layer_1"]["moe"]
    router["router_bias"] = jnp.zeros_like(router["router_bias"]).at[:, 0].set(10)
    tokens = tokens_of(0, B, L)
    _, _, trained = run(parameters, tokens, config, training=True)
    _, _, used = run(parameters, tokens, config)
    assert np.all(used.load[:, 0] == 1)
    assert np.all(trained.load.max(axis=1) < 0.5)


def test_jitter_needs_a_key_and_uses_it():
    config = small("moe", moe=MoeConfig(experts=4, width=6, input_jitter=0.3))
    parameters, tokens = parameters_of(config), tokens_of(0, 2, 6)
    a, b, c = (run(parameters, tokens, config, training=True, key=jax.random.key(i))[0] for i in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)
    jax.eval_shape(lambda: forward(parameters, tokens, config))  # inference needs none
    with pytest.raises(ValueError, match="give a key"):
        forward(parameters, tokens, config, training=True)


# Several devices

ON_A_MESH = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from bm_jax.config import *
from bm_jax.model import forward, init_parameters, logits
from bm_jax.sharding import batch_sharding, make_mesh, parameter_shardings

assert len(jax.devices()) == 8
config = ModelConfig(
    layers=("mamba+moe", "attention"), repeats=1, vocab_size=32, width=16,
    mamba=MambaConfig(state_size=4), attention=AttentionConfig(heads=8, kv_heads=4, head_size=4),
    moe=MoeConfig(experts=4, width=8, load_balance_loss=0.01), compute_dtype="float32",
)
rng = np.random.default_rng(0)
tokens = jnp.asarray(rng.integers(32, size=(8, 12)), jnp.int32)
ids = jnp.asarray(np.repeat([[1] * 5 + [2] * 7, [0] * 3 + [1] * 9], 4, 0), jnp.int32)

def loss(parameters, tokens, ids):
    output = forward(parameters, tokens, config, segment_ids=ids, training=True)
    values = logits(parameters, output.hidden, config)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(values), jnp.roll(tokens, -1, 1)[..., None], -1)
    return -jnp.mean(chosen) + jnp.sum(output.statistics.loss), output.statistics

step = jax.value_and_grad(loss, has_aux=True)
shapes = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
parameters = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
wanted = jax.jit(step)(parameters, tokens, ids)
for sizes in ({"data": 2, "fsdp": 2, "expert": 2}, {"tensor": 4, "sequence": 2}):
    mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)))
    with jax.set_mesh(mesh):
        shardings = parameter_shardings(shapes, mesh)
        placed = jax.device_put(parameters, shardings)
        batch = jax.device_put((tokens, ids), batch_sharding(mesh))
        got = jax.jit(step, out_shardings=((None, None), shardings))(placed, *batch)
    for path, a in jax.tree_util.tree_leaves_with_path(got):
        b = wanted
        for entry in path:
            b = getattr(b, entry.name) if hasattr(entry, "name") else b[getattr(entry, "key", getattr(entry, "idx", 0))]
        scale = max(float(jnp.abs(b).max()), 1e-3)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=3e-5 * scale, err_msg=f"{sizes} {path}")
    print(sizes, "agrees")
"""


@pytest.mark.slow
def test_one_device_equals_eight(run_with_devices):
    """Loss, routing statistics and every gradient, with the batch, parameters, experts, widths and time split."""
    assert run_with_devices(ON_A_MESH).count("agrees") == 2


@pytest.mark.slow
@pytest.mark.parametrize("system", ["blackmamba", "jamba"])
def test_kernels_cast_before_the_loop_change_nothing(system):
    """The values not at all; gradients come in the parameters' own types, rounded like those that the layers cast."""
    config = dataclasses.replace(SYSTEMS[system], compute_dtype="bfloat16")
    parameters = parameters_of(SYSTEMS[system])
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, 9)))

    def total(parameters, prepare):
        hidden = forward(prepare(parameters), tokens, config, training=True, remat="dots").hidden.astype(jnp.float32)
        return jnp.sum(hidden * jnp.sin(jnp.arange(hidden.size).reshape(hidden.shape)))

    step = jax.jit(jax.value_and_grad(total), static_argnums=1)
    value, gradients = step(parameters, lambda parameters: cast_kernels(parameters, config))
    wanted_value, wanted = step(parameters, lambda parameters: parameters)
    assert value == wanted_value
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == want.dtype == jnp.float32
        assert np.linalg.norm(got - want) <= 2**-8 * np.linalg.norm(want), jax.tree_util.keystr(path)
