"""Choosing tokens: how the next id is drawn from logits, and the loop that does it again and again on the device.

A row's draw depends on its own logits, seed and token index alone: token `i` of a request with seed `s` is drawn with
the Threefry key `(s, i)`. The same request therefore gives the same text alone and in any row of any batch (as far as
the logits agree: products of another batch size may round differently).

What is asked of each row is data, arrays `[B]`, so changing it compiles nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bm_jax.cache import Cache, init_cache
from bm_jax.config import ConfigError, ModelConfig
from bm_jax.model import Parameters, forward
from bm_jax.model import logits as unembed

CHUNK = 16
"""Most tokens a row gets in one call of `decode`; the host reads them when the call returns."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How one completion is drawn and when it ends."""

    max_tokens: int = 256
    temperature: float = 1.0
    """Logits are divided by this; 0 takes the most likely token every time."""
    top_k: int | None = None
    """Draw from the `top_k` most likely tokens only; None for all."""
    top_p: float | None = None
    """Draw from the fewest most likely tokens whose probabilities sum to at least this; None for all."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """The completion ends before the first of these strings to be completed."""

    def __post_init__(self) -> None:
        self._check("max_tokens", _is_integer(self.max_tokens) and 1 <= self.max_tokens < 2**31, "a positive integer")
        finite = _is_number(self.temperature) and math.isfinite(self.temperature)
        self._check("temperature", finite and self.temperature >= 0, "a finite number of at least 0 (0 is greedy)")
        k, p = self.top_k, self.top_p
        self._check("top_k", k is None or (_is_integer(k) and 1 <= k < 2**31), "an integer of at least 1, or None")
        self._check("top_p", p is None or (_is_number(p) and 0 < p <= 1), "greater than 0 and at most 1, or None")
        self._check("seed", _is_integer(self.seed) and 0 <= self.seed < 2**32, "an integer from 0 to 2**32 - 1")
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        self._check("stop", strings, "a tuple of strings that are not empty")

    def _check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise ConfigError(f"SamplingConfig.{name} must be {expected}, got {getattr(self, name)!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def candidates(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Which ids may be drawn, bool `[B, V]`: those of top-k, and of these, made a distribution again, those of top-p.

    Tokens rank by logit, equal ones by id, so exactly `top_k` are left however many are equal.

    Args:
        logits: `[B, V]`, already divided by the temperature; -inf is never a candidate's equal.
        top_k: int `[B]`, from 1; 0 or less for no limit.
        top_p: float `[B]`, in (0, 1]; a token is kept while those ranked before it sum to less. 1 for no limit.
    """
    V = logits.shape[-1]
    top_k = jnp.where(top_k < 1, V, jnp.minimum(top_k, V))[:, None]
    top_p = top_p[:, None]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranked = jnp.where(jnp.arange(V) < top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (jnp.arange(V) < top_k) & ((before < top_p) | (top_p >= 1))
    last = jnp.sum(kept, axis=-1, keepdims=True) - 1  # kept ranks are 0 .. last
    lowest, lowest_id = (jnp.take_along_axis(x, last, axis=-1) for x in (ranked, order))
    return (logits > lowest) | ((logits == lowest) & (jnp.arange(V) <= lowest_id))


def sample(
    logits: Array, keys: Array, temperature: Array, top_k: Array, top_p: Array, vocab_size: int | Array | None = None
) -> Array:
    """Draw one id a row: divide by the temperature, keep top-k, of these keep top-p, draw. int32 `[B]`.

    Args:
        logits: `[B, V]`.
        keys: random keys `[B]`.
        temperature: `[B]`, at least 0; 0 takes the most likely id, the lowest of equal ones.
        top_k: `[B]`, 0 or less for no limit.
        top_p: `[B]`, 1 for no limit.
        vocab_size: ids from here on are padding of the embedding and never drawn.
    """
    logits = logits.astype(jnp.float32)
    if vocab_size is not None:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    greedy = temperature < jnp.finfo(jnp.float32).tiny

    def draw() -> Array:
        # The largest is subtracted first, so that no temperature overflows.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(greedy, 1, temperature)[:, None]
        filtered = jnp.any((top_k > 0) | (top_p < 1))  # sorting the vocabulary costs more than all the rest
        kept = jax.lax.cond(filtered, lambda: candidates(scaled, top_k, top_p), lambda: jnp.ones_like(scaled, dtype=bool))
        return jax.vmap(jax.random.categorical)(keys, jnp.where(kept, scaled, -jnp.inf)).astype(jnp.int32)

    return jnp.where(greedy, best, jax.lax.cond(jnp.all(greedy), lambda: best, draw))


class Rows(NamedTuple):
    """What is asked of each row of a batch: arrays `[B]`, and two scalars of the tokenizer."""

    seed: Array | np.ndarray
    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    """0 for no limit."""
    top_p: Array | np.ndarray
    """1 for no limit."""
    max_tokens: Array | np.ndarray
    """0 for a row that only fills the batch."""
    end: Array | np.ndarray
    """The end-of-document id."""
    vocab_size: Array | np.ndarray
    """Ids from here on are never drawn."""


def make_rows(configs: Sequence[SamplingConfig], batch: int, *, end: int, vocab_size: int) -> Rows:
    """`configs` as arrays of `batch` rows; rows beyond them ask for no token."""

    def column(values: list[float], fill: float, dtype: type) -> np.ndarray:
        return np.array(values + [fill] * (batch - len(values)), dtype)

    return Rows(
        seed=column([c.seed for c in configs], 0, np.uint32),
        temperature=column([c.temperature for c in configs], 0, np.float32),
        top_k=column([c.top_k or 0 for c in configs], 0, np.int32),
        top_p=column([1 if c.top_p is None else c.top_p for c in configs], 1, np.float32),
        max_tokens=column([c.max_tokens for c in configs], 0, np.int32),
        end=np.array(end, np.int32),
        vocab_size=np.array(vocab_size, np.int32),
    )


def row_keys(seed: Array, index: Array) -> Array:
    """Keys `[B]` for token `index[b]` of a request with seed `seed[b]`."""
    # Threefry by name: the other generators give a row another draw in another batch.
    words = jnp.stack([seed.astype(jnp.uint32), index.astype(jnp.uint32)], axis=-1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


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


@partial(jax.jit, static_argnames=("config",))
def choose(head: Parameters, hidden: Array, rows: Rows, index: Array, config: ModelConfig) -> Array:
    """Draw token number `index` `[B]` of each row from the hidden values `[B, 1, M]` of the token before it."""
    with jax.named_scope("sampling"):
        logits = unembed(head, hidden, config)[:, -1]
        keys = row_keys(jnp.asarray(rows.seed), index)
        return sample(logits, keys, rows.temperature, rows.top_k, rows.top_p, rows.vocab_size)  # type: ignore[arg-type]


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def decode(
    parameters: Parameters,
    head: Parameters,
    cache: Cache,
    rows: Rows,
    token: Array,
    index: Array,
    alive: Array,
    config: ModelConfig,
) -> tuple[Array, Cache]:
    """Feed and draw up to CHUNK tokens, stopping as soon as every row has ended.

    Args:
        parameters: of the model.
        head: the parameters that `bm_jax.model.logits` needs.
        cache: holds everything before `token`.
        rows: what is asked.
        token: the last id drawn `[B]`, not fed yet.
        index: tokens drawn so far `[B]`.
        alive: rows that go on `[B]`; a row stops after its end-of-document id or its `max_tokens`.
        config: the model.

    Returns:
        ids `[B, CHUNK]`, -1 after a row's end, and the cache.
    """

    def going(carry):
        step, *_, alive, _ = carry
        return (step < CHUNK) & jnp.any(alive)

    def body(carry):
        step, cache, token, index, alive, drawn = carry
        output = forward(parameters, token[:, None], config, cache=cache)
        assert output.cache is not None
        token = choose(head, output.hidden, rows, index, config)
        drawn = drawn.at[:, step].set(jnp.where(alive, token, -1))
        index = index + 1
        return step + 1, output.cache, token, index, alive & (token != rows.end) & (index < rows.max_tokens), drawn

    drawn = jnp.full((len(token), CHUNK), -1, jnp.int32)
    carry = (jnp.int32(0), cache, token, index, alive, drawn)
    carry = jax.lax.while_loop(going, body, carry)
    return carry[-1], carry[1]
