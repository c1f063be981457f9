"""Reading prompts and drawing tokens on the device, many at a call: what `bm_jax.sampling` says, in one compiled loop.

What is asked of each row is data, arrays `[B, ...]`, so changing it compiles nothing. One thing does compile a second
program: whether any row asks for what needs more than its logits (penalties, bias, log-probabilities), as a batch that does
not should not pay for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bm_jax.cache import Cache, init_cache
from bm_jax.config import ModelConfig
from bm_jax.model import Parameters, forward
from bm_jax.model import logits as unembed
from bm_jax.sampling import Logprobs, SamplingConfig, Seen, add_bias, log_probabilities, penalize, row_keys, sample

CHUNK = 16
"""Most tokens a row gets in one call of `decode`; the host reads them when the call returns."""
LIST = 8
"""Least room for ids in a row's lists (stop tokens, biased ids); beyond, the room is a power of two."""


class Rows(NamedTuple):
    """What is asked of each row of a batch: arrays `[B]` or `[B, ...]`, and two scalars of the tokenizer.

    `make_rows` makes them on the host.
    """

    seed: Array
    temperature: Array
    top_k: Array
    """0 for no limit."""
    top_p: Array
    """1 for no limit."""
    min_p: Array
    """0 for no limit."""
    repetition_penalty: Array
    """1 for none."""
    presence_penalty: Array
    frequency_penalty: Array
    bias_ids: Array
    """`[B, J]`, -1 for none."""
    bias: Array
    """`[B, J]`."""
    stop_tokens: Array
    """`[B, S]`, -1 for none."""
    max_tokens: Array
    """0 for a row that only fills the batch."""
    end: Array
    """The end-of-document id."""
    vocab_size: Array
    """Ids from here on are never drawn."""


def make_rows(configs: Sequence[SamplingConfig], batch: int, *, end: int, vocab_size: int) -> Rows:
    """`configs` as arrays of `batch` rows; rows beyond them ask for no token."""

    def column(values: list[float], fill: float, dtype: type) -> Any:
        return np.array(values + [fill] * (batch - len(values)), dtype)

    def lists(values: list[Sequence[float]], fill: float, dtype: type) -> Any:
        room = max([LIST, *(1 << (len(row) - 1).bit_length() for row in values if row)])
        return np.array([[*row, *[fill] * (room - len(row))] for row in [*values, *[()] * (batch - len(values))]], dtype)

    return Rows(
        seed=column([c.seed for c in configs], 0, np.uint32),
        temperature=column([c.temperature for c in configs], 0, np.float32),
        top_k=column([c.top_k or 0 for c in configs], 0, np.int32),
        top_p=column([1 if c.top_p is None else c.top_p for c in configs], 1, np.float32),
        min_p=column([c.min_p for c in configs], 0, np.float32),
        repetition_penalty=column([c.repetition_penalty for c in configs], 1, np.float32),
        presence_penalty=column([c.presence_penalty for c in configs], 0, np.float32),
        frequency_penalty=column([c.frequency_penalty for c in configs], 0, np.float32),
        bias_ids=lists([list(c.logit_bias) for c in configs], -1, np.int32),
        bias=lists([list(c.logit_bias.values()) for c in configs], 0, np.float32),
        stop_tokens=lists([c.stop_tokens for c in configs], -1, np.int32),
        max_tokens=column([c.max_tokens for c in configs], 0, np.int32),
        end=cast(Any, np.array(end, np.int32)),
        vocab_size=cast(Any, np.array(vocab_size, np.int32)),
    )


def seen_before(
    configs: Sequence[SamplingConfig], prompts: Sequence[Sequence[int]], batch: int, vocab_size: int
) -> Seen | None:
    """What `choose` must know of the prompts; None where no row asks for what needs it."""
    plain = SamplingConfig()
    needs = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs")
    if all(getattr(config, name) == getattr(plain, name) for config in configs for name in needs):
        return None
    prompt = np.zeros((batch, vocab_size), bool)
    for row, ids in enumerate(prompts):
        prompt[row, ids] = True
    return Seen(jnp.asarray(prompt), jnp.zeros((batch, vocab_size), jnp.int32))


@partial(jax.jit, static_argnames=("config", "batch", "max_length"))
def empty_cache(config: ModelConfig, batch: int, max_length: int) -> Cache:
    """`init_cache`, compiled."""
    return init_cache(config, batch, max_length)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def prefill(
    parameters: Parameters, tokens: Array, segment_ids: Array, cache: Cache, config: ModelConfig
) -> tuple[Array, Cache]:
    """Read a piece of the prompts `[B, L]` into the cache; the hidden values of its last tokens `[B, 1, M]`."""
    output = forward(parameters, tokens, config, segment_ids=segment_ids, cache=cache)
    assert output.cache is not None
    return output.hidden[:, -1:], output.cache


@jax.jit
def fork(cache: Cache, rows: Array) -> Cache:
    """The cache of these rows, int `[B]`: each may be taken several times, or not at all."""
    layers = jax.tree.map(lambda leaf: leaf[:, rows], cache.layers)
    return cache._replace(layers=layers, segment=cache.segment[rows], positions=cache.positions[rows])


class Choice(NamedTuple):
    """A token for each row."""

    token: Array
    """int32 `[B]`."""
    seen: Seen | None
    """What it was given, with these tokens."""
    logprobs: Logprobs | None
    """None where `seen` is."""


@partial(jax.jit, static_argnames=("config",))
def choose(head: Parameters, hidden: Array, rows: Rows, index: Array, seen: Seen | None, config: ModelConfig) -> Choice:
    """Draw token number `index` `[B]` of each row from the hidden values `[B, 1, M]` of the token before it."""
    rows = jax.tree.map(jnp.asarray, rows)
    with jax.named_scope("sampling"):
        logits = raw = unembed(head, hidden, config)[:, -1]
        if seen is not None:
            logits = add_bias(raw, rows.bias_ids, rows.bias)
            logits = penalize(logits, seen, rows.repetition_penalty, rows.presence_penalty, rows.frequency_penalty)
        keys = row_keys(rows.seed, index)
        token = sample(logits, keys, rows.temperature, rows.top_k, rows.top_p, rows.vocab_size, min_p=rows.min_p)
        if seen is None:
            return Choice(token, None, None)
        seen = seen._replace(drawn=seen.drawn.at[jnp.arange(len(token)), token].add(1))
        return Choice(token, seen, log_probabilities(raw, token, rows.vocab_size))


class Drawn(NamedTuple):
    """What one call of `decode` drew."""

    ids: Array
    """`[B, CHUNK]`, -1 after a row's end."""
    logprobs: Logprobs | None
    """Arrays `[B, CHUNK, ...]`, where they are asked for."""
    cache: Cache
    seen: Seen | None


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache", "seen"))
def decode(
    parameters: Parameters,
    head: Parameters,
    cache: Cache,
    seen: Seen | None,
    rows: Rows,
    token: Array,
    index: Array,
    alive: Array,
    config: ModelConfig,
) -> Drawn:
    """Feed and draw up to CHUNK tokens, stopping as soon as every row has ended.

    Args:
        parameters: of the model.
        head: the parameters that `bm_jax.model.logits` needs.
        cache: holds everything before `token`.
        seen: from `seen_before`, and `token`.
        rows: what is asked.
        token: the last id drawn `[B]`, not fed yet.
        index: tokens drawn so far `[B]`.
        alive: rows that go on `[B]`; a row stops after its end-of-document id, one of its stop tokens, or its `max_tokens`.
        config: the model.
    """

    def going(carry):
        step, *_, alive, _ = carry
        return (step < CHUNK) & jnp.any(alive)

    def body(carry):
        step, cache, seen, token, index, alive, drawn = carry
        output = forward(parameters, token[:, None], config, cache=cache)
        assert output.cache is not None
        token, seen, logprobs = choose(head, output.hidden, rows, index, seen, config)
        new = (jnp.where(alive, token, -1), logprobs)
        drawn = jax.tree.map(lambda all_, one: all_.at[:, step].set(one), drawn, new)
        index = index + 1
        ended = (token == rows.end) | jnp.any(token[:, None] == rows.stop_tokens, axis=1) | (index >= rows.max_tokens)
        return step + 1, output.cache, seen, token, index, alive & ~ended, drawn

    B = len(token)
    drawn = (jnp.full((B, CHUNK), -1, jnp.int32), None)
    if seen is not None:
        of_one = jax.eval_shape(log_probabilities, jax.ShapeDtypeStruct(seen.drawn.shape, jnp.float32), token)
        drawn = (drawn[0], jax.tree.map(lambda leaf: jnp.zeros((B, CHUNK, *leaf.shape[1:]), leaf.dtype), of_one))
    carry = (jnp.int32(0), cache, seen, token, index, alive, drawn)
    _, cache, seen, *_, (ids, logprobs) = jax.lax.while_loop(going, body, carry)
    return Drawn(ids, logprobs, cache, seen)
