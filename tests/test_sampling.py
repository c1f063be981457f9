"""Sampling: the mask and the frequencies are those of a statement in NumPy, and a row's draw is its own."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bm_jax.config import ConfigError
from bm_jax.decoding import make_rows
from bm_jax.sampling import (
    MOST_ALTERNATIVES,
    SamplingConfig,
    Seen,
    add_bias,
    candidates,
    log_probabilities,
    penalize,
    row_keys,
    sample,
)

draw = jax.jit(sample)


def distribution(logits, temperature, top_k, top_p, vocab_size=None, min_p=0.0):
    """The statement: probabilities `[V]` that one row is drawn with, token by token in float64."""
    logits = np.asarray(logits, np.float64)
    ids = list(range(len(logits) if vocab_size is None else vocab_size))
    ids.sort(key=lambda i: (-logits[i], i))
    if temperature == 0:
        ids, temperature = ids[:1], 1.0
    if top_k:
        ids = ids[:top_k]
    weights = np.array([np.exp((logits[i] - logits[ids[0]]) / temperature) for i in ids])
    weights /= weights.sum()
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    kept = before < top_p if top_p < 1 else np.ones(len(ids), bool)
    kept &= weights >= min_p * weights[0]
    margin = np.min(np.abs(before - top_p)) if top_p < 1 else 1.0  # distance to another choice, for float32
    if min_p:
        margin = min(margin, np.min(np.abs(weights / weights[0] - min_p)))
    out = np.zeros(len(logits))
    out[np.array(ids)[kept]] = weights[kept] / weights[kept].sum()
    return out, margin


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-6, 6).map(lambda i: i / 2), min_size=9, max_size=9),
    top_k=st.integers(-1, 12),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
)
def test_candidates_are_those_of_the_statement(logits, top_k, top_p, min_p):
    expected, margin = distribution(logits, 1.0, max(top_k, 0), top_p, min_p=min_p)
    assume(margin > 1e-5)
    row = jnp.asarray([logits], jnp.float32)
    limits = (jnp.array([top_k]), jnp.array([top_p], jnp.float32), jnp.array([min_p], jnp.float32))
    found = jax.jit(candidates)(row, *limits)
    np.testing.assert_array_equal(np.asarray(found[0]), expected > 0)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 3, 1.0),
        (1.0, 0, 0.6),
        (1.7, 6, 0.8),
        (0.0, 0, 1.0),
        (1, 1, 1),
    ],
)
def test_frequencies(temperature, top_k, top_p):
    draws, V = 20_000, 12
    logits = np.random.default_rng(3).normal(size=V).astype(np.float32) * 1.5
    expected, margin = distribution(logits, temperature, top_k, top_p, vocab_size=10)
    assert margin > 1e-4
    keys = row_keys(jnp.full(draws, 7, jnp.uint32), jnp.arange(draws))
    rows = [jnp.full(draws, value, dtype) for value, dtype in ((temperature, "f4"), (top_k, "i4"), (top_p, "f4"))]
    ids = draw(jnp.broadcast_to(jnp.asarray(logits), (draws, V)), keys, *rows, 10)
    counts = np.bincount(np.asarray(ids), minlength=V)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = np.sum((counts - draws * expected)[possible] ** 2 / (draws * expected[possible]))
    freedom = possible.sum() - 1
    assert chi_square <= freedom + 5 * np.sqrt(2 * freedom)


def mixed_rows(B, V, seed=0):
    """Logits and parameters of every kind."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, V)).astype(np.float32) * 3
    temperature = rng.choice([0.0, 0.3, 1.0, 4.0], B).astype(np.float32)
    top_k = rng.choice([0, 1, 5, V, 2 * V], B).astype(np.int32)
    top_p = rng.choice([1.0, 0.9, 0.2], B).astype(np.float32)
    return logits, temperature, top_k, top_p


def test_a_row_is_drawn_alike_alone_and_among_others():
    B, V = 24, 40
    logits, temperature, top_k, top_p = mixed_rows(B, V)
    seed, index = np.arange(B, dtype=np.uint32) % 5, np.arange(B, dtype=np.int32)
    together = np.asarray(draw(logits, row_keys(seed, index), temperature, top_k, top_p))
    order = np.random.default_rng(1).permutation(B)
    moved = draw(logits[order], row_keys(seed[order], index[order]), temperature[order], top_k[order], top_p[order])
    np.testing.assert_array_equal(np.asarray(moved), together[order])
    for b in range(B):
        one = slice(b, b + 1)
        alone = draw(logits[one], row_keys(seed[one], index[one]), temperature[one], top_k[one], top_p[one])
        assert int(alone[0]) == together[b]


def test_limits_that_limit_nothing_change_no_draw():
    B, V = 64, 30
    logits, *_ = mixed_rows(B, V)
    keys, ones = row_keys(np.zeros(B, np.uint32), np.arange(B)), np.ones(B, np.float32)
    free = draw(logits, keys, ones, np.zeros(B, np.int32), ones)
    np.testing.assert_array_equal(draw(logits, keys, ones, np.full(B, V), ones), free)
    np.testing.assert_array_equal(draw(logits, keys, ones, np.full(B, 10 * V), ones), free)


def test_the_caller_may_say_whether_rows_have_limits():
    """Then nothing is looked at while running, and the draws are the same."""
    B, V = 24, 40
    logits, temperature, top_k, top_p = mixed_rows(B, V)
    keys = row_keys(np.arange(B, dtype=np.uint32), np.zeros(B, np.int32))
    said = partial(sample, logits, keys, temperature)
    np.testing.assert_array_equal(said(top_k, top_p, limited=True), said(top_k, top_p))
    none = np.zeros(B, np.int32), np.ones(B, np.float32)
    np.testing.assert_array_equal(said(*none, limited=False), said(*none))
    np.testing.assert_array_equal(said(top_k, top_p, limited=False), said(*none))
    assert not SamplingConfig().limited
    assert all(SamplingConfig(**limit).limited for limit in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}))


def test_the_least_top_p_is_greedy():
    """However little probability is asked for, the most likely id has it, also where float32 has no number so small."""
    logits, *_ = mixed_rows(50, 30)
    keys, ones = row_keys(np.zeros(50, np.uint32), np.arange(50)), np.ones(50, np.float32)
    for top_p in (1e-10, 1e-45, 1e-300):
        ids = draw(logits, keys, ones, np.zeros(50, np.int32), np.full(50, top_p, np.float32))
        np.testing.assert_array_equal(ids, logits.argmax(1))


def test_seed_and_token_index_both_change_the_draw():
    B = 200
    zeros = np.zeros((B, 1000), np.float32)
    parameters = np.ones(B, np.float32), np.zeros(B, np.int32), np.ones(B, np.float32)
    by_index = draw(zeros, row_keys(np.zeros(B, np.uint32), np.arange(B)), *parameters)
    by_seed = draw(zeros, row_keys(np.arange(B, dtype=np.uint32), np.zeros(B, np.int32)), *parameters)
    assert len(set(by_index.tolist())) > 150
    assert len(set(by_seed.tolist())) > 150
    assert np.mean(np.asarray(by_index) == np.asarray(by_seed)) < 0.05
    largest = row_keys(np.full(1, 2**32 - 1, np.uint32), np.zeros(1, np.int32))
    assert jax.random.key_data(largest).shape == (1, 2)


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-38, 1e-30, 1.0, 1e30, 1e38, 3e38])
def test_padding_is_never_drawn(temperature):
    B, V = 500, 16
    logits = np.full((B, V), -3.0, np.float32)
    logits[:, 11:] = 100.0
    logits[:, 4] = -2.5
    rows = np.full(B, temperature, np.float32), np.zeros(B, np.int32), np.ones(B, np.float32)
    ids = np.asarray(draw(logits, row_keys(np.zeros(B, np.uint32), np.arange(B)), *rows, 11))
    assert ids.max() < 11
    if temperature < 1e-20:
        assert (ids == 4).all()
    else:
        assert len(set(ids.tolist())) == 11


def test_padding_takes_no_place_in_top_k_or_top_p():
    B, V = 300, 16
    logits = np.linspace(0, 15, V, dtype=np.float32)[None].repeat(B, 0)
    keys, ones = row_keys(np.zeros(B, np.uint32), np.arange(B)), np.ones(B, np.float32)
    ids = draw(logits, keys, 5 * ones, np.full(B, 3), ones, 10)
    assert set(np.asarray(ids).tolist()) == {7, 8, 9}
    ids = draw(logits, keys, 0.01 * ones, np.zeros(B, np.int32), 0.5 * ones, 10)
    assert set(np.asarray(ids).tolist()) == {9}


def test_greedy_takes_the_first_of_equals():
    logits = np.zeros((2, 8), np.float32)
    logits[1, [3, 6]] = 1
    keys = row_keys(np.zeros(2, np.uint32), np.arange(2))
    ids = draw(logits, keys, np.zeros(2, np.float32), np.zeros(2, np.int32), np.ones(2, np.float32))
    assert ids.tolist() == [0, 3]


def test_changing_what_is_asked_compiles_nothing():
    function = jax.jit(lambda *arguments: sample(*arguments))
    for seed in range(3):
        logits, temperature, top_k, top_p = mixed_rows(4, 20, seed)
        function(logits, row_keys(np.full(4, seed, np.uint32), np.arange(4)), temperature, top_k, top_p, 20 - seed)
    assert function._cache_size() == 1


def test_rows_of_arrays():
    asked = [
        SamplingConfig(max_tokens=5, top_k=3, stop_tokens=tuple(range(9)), presence_penalty=0.5),
        SamplingConfig(top_p=0.5, seed=9, logit_bias={4: -1.0, 2: 3.0}),
    ]
    rows = make_rows(asked, 4, end=7, vocab_size=9)
    assert rows.stop_tokens.shape == (4, 32)
    assert rows.stop_tokens[0].tolist() == [*range(9), *[-1] * 23]
    assert (rows.stop_tokens[1:] == -1).all()
    assert rows.bias_ids[1].tolist() == [4, 2, *[-1] * 30]
    assert rows.bias[1].tolist() == [-1, 3, *[0] * 30]
    assert rows.presence_penalty.tolist() == [0.5, 0, 0, 0]
    assert rows.repetition_penalty.tolist() == [1] * 4
    assert rows.max_tokens.tolist() == [5, 256, 0, 0]
    assert rows.top_k.tolist() == [3, 0, 0, 0]
    assert rows.top_p.tolist() == [1, 0.5, 1, 1]
    assert rows.seed.tolist() == [0, 9, 0, 0]
    assert (int(rows.end), int(rows.vocab_size)) == (7, 9)
    for many, room in ((32, 32), (33, 1024), (1024, 1024), (1025, 2048)):  # two sizes of programs, for most
        rows = make_rows([SamplingConfig(logit_bias=dict.fromkeys(range(many), 1.0))], 1, end=7, vocab_size=9)
        assert rows.bias_ids.shape == rows.bias.shape == (1, room)
        assert rows.bias[0].sum() == many


IDS = st.lists(st.integers(0, 6), max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.tuples(IDS, IDS),
    drawn=st.tuples(IDS, IDS),
    penalties=st.tuples(*[st.tuples(st.floats(0.2, 3), st.floats(-2, 2), st.floats(-2, 2))] * 2),
    seed=st.integers(0, 99),
)
def test_penalties_are_those_of_the_statement(prompts, drawn, penalties, seed):
    logits = np.random.default_rng(seed).normal(size=(2, 7)).astype(np.float32)
    expected = logits.astype(np.float64)
    for row, (repetition, presence, frequency) in enumerate(penalties):
        for i in range(7):
            if i in prompts[row] or i in drawn[row]:
                expected[row, i] *= 1 / repetition if expected[row, i] > 0 else repetition
            if i in drawn[row]:
                expected[row, i] -= presence + frequency * drawn[row].count(i)
    seen = Seen(
        jnp.array([[i in row for i in range(7)] for row in prompts]),
        jnp.array([[row.count(i) for i in range(7)] for row in drawn], jnp.int32),
    )
    found = jax.jit(penalize)(logits, seen, *np.array(penalties, np.float32).T)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-5)


def test_a_bias_is_added_to_the_ids_it_names_and_to_no_other():
    logits = jnp.arange(10, dtype=jnp.float32).reshape(2, 5)
    found = add_bias(logits, jnp.array([[3, -1, 0], [4, 7, -1]]), jnp.array([[0.5, 9.0, -np.inf], [-2.0, 9.0, 9.0]]))
    np.testing.assert_array_equal(found, [[-np.inf, 1, 2, 3.5, 4], [5, 6, 7, 8, 7]])


@pytest.mark.parametrize(("size", "vocab_size"), [(50, 47), (6, None)])
def test_log_probabilities_are_the_models_own(size, vocab_size):
    logits = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    token = np.array([1, 0, 5])
    found = jax.jit(log_probabilities)(logits, token, vocab_size)
    kept = logits[:, :vocab_size].astype(np.float64)
    expected = kept - np.log(np.exp(kept).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.chosen, expected[np.arange(3), token], rtol=1e-5)
    order = np.argsort(-expected, axis=-1)[:, :MOST_ALTERNATIVES]
    np.testing.assert_array_equal(found.top_ids[:, : order.shape[1]], order)
    np.testing.assert_allclose(found.top[:, : order.shape[1]], np.take_along_axis(expected, order, -1), rtol=1e-5)
    assert (np.asarray(found.top)[:, order.shape[1] :] == -np.inf).all()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("min_p", -0.1, "from 0 to 1"),
        ("min_p", float("nan"), "from 0 to 1"),
        ("repetition_penalty", 0.0, "greater than 0"),
        ("repetition_penalty", float("inf"), "greater than 0"),
        ("presence_penalty", float("nan"), "a finite number"),
        ("frequency_penalty", "much", "a finite number"),
        ("logit_bias", [3], "ids and numbers"),
        ("logit_bias", {"3": 1.0}, "ids and numbers"),
        ("logit_bias", {3: float("inf")}, "ids and numbers"),
        ("logit_bias", {3: float("nan")}, "ids and numbers"),
        ("stop_tokens", [3], "a tuple of ids"),
        ("stop_tokens", (-1,), "a tuple of ids"),
        ("logprobs", 21, "from 0 to 20"),
        ("logprobs", True, "from 0 to 20"),
        ("max_tokens", 0, "a positive integer"),
        ("max_tokens", 1.5, "a positive integer"),
        ("max_tokens", True, "a positive integer"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("temperature", float("inf"), "at least 0"),
        ("temperature", "hot", "at least 0"),
        ("temperature", 1e39, "up to 1e30"),
        ("presence_penalty", -1e31, "up to 1e30"),
        ("repetition_penalty", 1e-300, "from 1e-30"),
        ("logit_bias", {3: 1e39}, "up to 1e30"),
        ("top_k", 0, "at least 1"),
        ("top_k", 2.0, "at least 1"),
        ("top_p", 0.0, "greater than 0"),
        ("top_p", 1.01, "greater than 0"),
        ("top_p", float("nan"), "greater than 0"),
        ("seed", -1, "2\\*\\*32"),
        ("seed", 2**32, "2\\*\\*32"),
        ("stop", ("a", ""), "not empty"),
        ("stop", "a", "tuple of strings"),
        ("stop", (3,), "not empty"),
    ],
)
def test_bad_requests_are_named(field, value, expected):
    with pytest.raises(ConfigError, match=rf"SamplingConfig\.{field} must be .*{expected}.*, got "):
        SamplingConfig(**{field: value})


def test_numbers_of_numpy_are_fine():
    SamplingConfig(max_tokens=np.int64(3), temperature=np.float32(0.5), top_k=np.int32(2), seed=np.uint32(5))
