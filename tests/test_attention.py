"""Attention against a NumPy float64 loop over tokens and heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bm_jax.attention import attention, attention_parameters, rotate
from bm_jax.config import AttentionConfig, ModelConfig
from bm_jax.layers import Context

M, B, L = 12, 2, 7
VARIANTS = {
    "plain": AttentionConfig(heads=3, kv_heads=3, rotary=False),
    "rotary": AttentionConfig(heads=3, kv_heads=3),
    "grouped": AttentionConfig(heads=4, kv_heads=2, head_size=6, rotary_base=100.0),
    "one key head, window": AttentionConfig(heads=3, kv_heads=1, window=3),
    "window of one": AttentionConfig(heads=2, kv_heads=1, window=1),
}
IDS = np.array([[1, 1, 1, 2, 2, 1, 1], [0, 0, 4, 4, 4, 4, 4]])  # an id that comes back; left padding


def model(variant):
    return ModelConfig(layers=("attention",), width=M, attention=VARIANTS[variant], compute_dtype="float64")


def make(config):
    r = np.random.default_rng(0)
    parameters = {name: r.standard_normal(p.shape) for name, p in attention_parameters(config).items()}
    return parameters, r.standard_normal((B, L, M))


def document_positions(ids):
    positions = np.zeros_like(ids)
    for b, row in enumerate(ids):
        for t in range(1, len(row)):
            positions[b, t] = positions[b, t - 1] + 1 if row[t] == row[t - 1] else 0
    return positions


def numpy_rotate(x, position, base):
    """One head of one token, as complex numbers."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def oracle(parameters, x, config, ids):
    c = config.attention
    positions = document_positions(ids)
    out = np.zeros_like(x)
    project = {name: np.einsum("blm,mhd->blhd", x, parameters[name]) for name in ("query", "key", "value")}
    for b in range(B):
        for t in range(L):
            seen = [s for s in range(t - positions[b, t], t + 1) if c.window is None or s > t - c.window]
            for head in range(c.heads):
                group = head // (c.heads // c.kv_heads)
                query = project["query"][b, t, head]
                keys = [project["key"][b, s, group] for s in seen]
                if c.rotary:
                    query = numpy_rotate(query, positions[b, t], c.rotary_base)
                    keys = [numpy_rotate(k, positions[b, s], c.rotary_base) for k, s in zip(keys, seen, strict=True)]
                score = np.array([query @ key for key in keys]) / np.sqrt(config.head_size)
                weight = np.exp(score - score.max())
                weight /= weight.sum()
                mixed = sum(w * project["value"][b, s, group] for w, s in zip(weight, seen, strict=True))
                out[b, t] += mixed @ parameters["out"][head]
    return out


def context(ids):
    ids = jnp.asarray(ids)
    positions = jnp.asarray(document_positions(np.asarray(ids)))
    return Context(ids, ids != 0, positions, jnp.ones(B, bool), jnp.zeros(B, jnp.int32))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_the_loop(variant, packed, x64):
    config = model(variant)
    parameters, x = make(config)
    ids = IDS if packed else np.ones((B, L), int)
    got, cache = jax.jit(attention, static_argnums=4)(parameters, jnp.asarray(x), None, context(ids), config)
    assert cache is None
    # float64 finds mistakes; but JAX computes the scores in float32, and so are the angles of rotary positions.
    np.testing.assert_allclose(got, oracle(parameters, x, config, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["grouped", "one key head, window"])
def test_a_longer_cache_changes_nothing(variant, x64):
    """Slots that hold nothing yet are never seen, whatever is in them."""
    config = model(variant)
    parameters, x = make(config)
    attend = jax.jit(attention, static_argnums=4)
    without, _ = attend(parameters, jnp.asarray(x), None, context(IDS), config)
    shape = (B, L + 4, config.attention.kv_heads, config.head_size)
    cache = {"key": jnp.full(shape, 1e6), "value": jnp.full(shape, 1e6)}
    got, cache = attend(parameters, jnp.asarray(x), cache, context(IDS), config)
    np.testing.assert_allclose(got, without, rtol=0, atol=1e-4)
    assert np.all(np.asarray(cache["key"][:, L:]) == 1e6)


def test_rotation_is_relative(x64):
    r = np.random.default_rng(0)
    query, key = (jnp.asarray(r.standard_normal((1, 1, 1, 8))) for _ in range(2))

    def score(i, j):
        return float(jnp.sum(rotate(query, jnp.array([[i]]), 1e4) * rotate(key, jnp.array([[j]]), 1e4)))

    np.testing.assert_allclose(score(9, 4), score(6, 1), rtol=1e-5)
    np.testing.assert_allclose(score(5, 5), float(jnp.sum(query * key)), rtol=1e-5)
    assert abs(score(9, 4) - score(4, 9)) > 1e-2


def test_half_types_stay_half():
    config = ModelConfig(layers=("attention",), width=M, attention=VARIANTS["grouped"], compute_dtype="bfloat16")
    parameters, x = make(config)
    parameters = {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()}
    got, _ = jax.jit(attention, static_argnums=4)(parameters, jnp.asarray(x, jnp.bfloat16), None, context(IDS), config)
    assert got.dtype == jnp.bfloat16
    # Three roundings to 2**-9 of values of size up to 100.
    np.testing.assert_allclose(np.asarray(got, np.float64), oracle(parameters, x, config, IDS), rtol=0, atol=1.5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("variant", ["plain", "grouped", "one key head, window"])
def test_flash_attention_is_attention(variant, cached):
    """In bfloat16 the GPU's fused kernel, forward and backward, is as close to float32 as XLA's own bfloat16."""
    wide = dataclasses.replace(VARIANTS[variant], head_size=64, window=VARIANTS[variant].window and 100)
    config = ModelConfig(layers=("attention",), width=256, attention=wide, compute_dtype="bfloat16")
    r = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(r.standard_normal(p.shape) / 16, jnp.float32) for name, p in attention_parameters(config).items()
    }
    rows, length, room = 2, 256, 640
    x = jnp.asarray(r.standard_normal((rows, length, 256)), jnp.float32)
    ids = np.ones((rows, length), np.int32) if cached else np.repeat([[1, 2, 2, 3], [0, 4, 4, 4]], length // 4, axis=1)
    before = jnp.full((rows,), 128 if cached else 0, jnp.int32)
    positions = jnp.asarray(document_positions(ids)) + before[:, None]
    around = Context(None if cached else jnp.asarray(ids), None, positions, jnp.ones(rows, bool), before)
    shape = (rows, room, config.attention.kv_heads, 64)
    kept = {name: jnp.asarray(r.standard_normal(shape), jnp.float32) for name in ("key", "value")} if cached else None
    weight = jnp.asarray(r.standard_normal(x.shape), jnp.float32)

    def run(dtype):
        def loss(parameters, x):
            cache = None if kept is None else {name: part.astype(dtype) for name, part in kept.items()}
            y, _ = attention(parameters, x.astype(dtype), cache, around, dataclasses.replace(config, compute_dtype=dtype))
            return jnp.sum(y.astype(jnp.float32) * weight), y

        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        assert ("fmha" in step.lower(parameters, x).as_text()) == (dtype == "bfloat16")
        with jax.default_matmul_precision("highest"):
            return step(parameters, x)

    for got, wanted in zip(jax.tree.leaves(run("bfloat16")), jax.tree.leaves(run("float32")), strict=True):
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
        assert np.linalg.norm(got - wanted) < 0.02 * np.linalg.norm(wanted)
