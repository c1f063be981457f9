"""Choosing tokens: how the next id is drawn from logits. Every function is pure and treats each row by itself.

In order: a bias is added to the logits of some ids (`add_bias`), ids seen before are made less likely (`penalize`), and
`sample` divides by the temperature, keeps the candidates of top-k, top-p and min-p, and draws one of them.

A row's draw depends on its own logits, seed and token index alone: token `i` of a request with seed `s` is drawn with
the Threefry key `(s, i)`. The same request therefore gives the same text alone and in any row of any batch (as far as
the logits agree: products of another batch size may round differently).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bm_jax.config import ConfigError

LARGEST = 1e30
"""Of any number that may be asked for: what float32 can still divide by and subtract."""
MOST_ALTERNATIVES = 20
"""Most alternatives of a token whose log-probabilities may be asked for."""


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
    min_p: float = 0.0
    """Draw from tokens at least this many times as likely as the most likely one; 0 for all."""
    repetition_penalty: float = 1.0
    """Logits of ids in the prompt or the completion are divided by this where positive, multiplied where negative (Keskar et
    al. 2019, arXiv:1909.05858, section 4.1)."""
    presence_penalty: float = 0.0
    """Taken from the logits of ids in the completion."""
    frequency_penalty: float = 0.0
    """Taken from the logits of ids in the completion once for each time they are in it."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these ids, before penalties; -inf never draws an id, while others may be drawn."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """The completion ends before the first of these strings to be completed."""
    stop_tokens: tuple[int, ...] = ()
    """The completion ends before the first of these ids, as before the end-of-document id."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many most likely ones, before bias, penalties and temperature."""

    def __post_init__(self) -> None:
        self._check("max_tokens", _is_integer(self.max_tokens) and 1 <= self.max_tokens < 2**31, "a positive integer")
        finite = _is_number(self.temperature) and abs(self.temperature) <= LARGEST
        self._check("temperature", finite and self.temperature >= 0, "a number of at least 0 (0 is greedy), up to 1e30")
        k, p = self.top_k, self.top_p
        self._check("top_k", k is None or (_is_integer(k) and 1 <= k < 2**31), "an integer of at least 1, or None")
        self._check("top_p", p is None or (_is_number(p) and 0 < p <= 1), "greater than 0 and at most 1, or None")
        self._check("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "from 0 to 1")
        positive = _is_number(self.repetition_penalty) and 1 / LARGEST <= self.repetition_penalty <= LARGEST
        self._check("repetition_penalty", positive, "a number greater than 0 (1 for none), from 1e-30 to 1e30")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            self._check(
                name, _is_number(value) and abs(value) <= LARGEST, "a finite number (0 for none), up to 1e30 either way"
            )
        bias = self.logit_bias
        pairs = isinstance(bias, Mapping) and all(
            _is_id(i) and _is_number(b) and (abs(b) <= LARGEST or b == -math.inf) for i, b in bias.items()
        )
        self._check("logit_bias", pairs, "ids and numbers, up to 1e30 either way or -inf")
        ids = isinstance(self.stop_tokens, tuple) and all(map(_is_id, self.stop_tokens))
        self._check("stop_tokens", ids, "a tuple of ids")
        n = self.logprobs
        right = n is None or (_is_integer(n) and 0 <= n <= MOST_ALTERNATIVES)
        self._check("logprobs", right, f"an integer from 0 to {MOST_ALTERNATIVES}, or None")
        self._check("seed", _is_integer(self.seed) and 0 <= self.seed < 2**32, "an integer from 0 to 2**32 - 1")
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        self._check("stop", strings, "a tuple of strings that are not empty")

    @property
    def limited(self) -> bool:
        """Whether not all ids may be drawn: by top_k, top_p or min_p."""
        return self.top_k is not None or self.top_p is not None or self.min_p > 0

    def _check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise ConfigError(f"SamplingConfig.{name} must be {expected}, got {getattr(self, name)!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return _is_integer(value) and 0 <= value < 2**31  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


class Seen(NamedTuple):
    """Which ids each row has had."""

    prompt: Array
    """Whether an id is in the prompt, bool `[B, V]`."""
    drawn: Array
    """How many times an id has been drawn, int32 `[B, V]`."""


def add_bias(logits: Array, ids: Array, bias: Array) -> Array:
    """Logits `[B, V]` with `bias` `[B, J]` added at `ids` `[B, J]`; ids outside the vocabulary are ignored."""
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, jnp.where(ids < 0, logits.shape[-1], ids)].add(bias.astype(logits.dtype), mode="drop")


def penalize(logits: Array, seen: Seen, repetition: Array, presence: Array, frequency: Array) -> Array:
    """Logits `[B, V]` of ids seen before made smaller.

    Args:
        logits: `[B, V]`.
        seen: what each row has had.
        repetition: `[B]`, above 0: logits of ids in the prompt or drawn are divided by it where positive, else multiplied.
        presence: `[B]`, then taken from logits of ids that were drawn.
        frequency: `[B]`, taken once for each time.
    """
    scale = jnp.where(logits > 0, 1 / repetition[:, None], repetition[:, None])
    logits = jnp.where(seen.prompt | (seen.drawn > 0), logits * scale, logits)
    return logits - presence[:, None] * (seen.drawn > 0) - frequency[:, None] * seen.drawn


class Logprobs(NamedTuple):
    """Log-probabilities of a token drawn and of the most likely ones; leading axes are those of the token."""

    chosen: Array
    """Of the token drawn, float32 `[...]`."""
    top: Array
    """Of the most likely ones, falling, `[..., MOST_ALTERNATIVES]`."""
    top_ids: Array
    """Their ids, int32."""


def log_probabilities(logits: Array, token: Array, vocab_size: int | Array | None = None) -> Logprobs:
    """What the model itself says of `token` `[B]`: the logarithm of the softmax of the logits `[B, V]`, padding left out."""
    log_p = jax.nn.log_softmax(without_padding(logits.astype(jnp.float32), vocab_size), axis=-1)
    count = min(MOST_ALTERNATIVES, logits.shape[-1])
    top, ids = jax.lax.top_k(log_p, count)
    more = ((0, 0), (0, MOST_ALTERNATIVES - count))
    top, ids = jnp.pad(top, more, constant_values=-jnp.inf), jnp.pad(ids, more)
    return Logprobs(jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0], top, ids)


def without_padding(logits: Array, vocab_size: int | Array | None) -> Array:
    """Logits `[B, V]`, -inf from `vocab_size` on, where the embedding has rows of no token."""
    return logits if vocab_size is None else jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def candidates(logits: Array, top_k: Array, top_p: Array, min_p: Array | None = None) -> Array:
    """Which ids may be drawn, bool `[B, V]`: those of top-k; of these, made a distribution again, those of top-p; and of these
    those of min-p.

    Tokens rank by logit, equal ones by id, so exactly `top_k` are left however many are equal.

    Args:
        logits: `[B, V]`, already divided by the temperature; -inf is never a candidate's equal.
        top_k: int `[B]`, from 1; 0 or less for no limit.
        top_p: float `[B]`, in (0, 1]; a token is kept while those ranked before it sum to less. 1 for no limit.
        min_p: float `[B]`, in [0, 1]: the least probability, over that of the most likely token. 0 or None for no limit.
    """
    V = logits.shape[-1]
    top_k = jnp.where(top_k < 1, V, jnp.minimum(top_k, V))[:, None]
    top_p = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)[:, None]  # the most likely is kept, however little is asked for
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranked = jnp.where(jnp.arange(V) < top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (jnp.arange(V) < top_k) & ((before < top_p) | (top_p >= 1))
    last = jnp.sum(kept, axis=-1, keepdims=True) - 1  # kept ranks are 0 .. last
    lowest, lowest_id = (jnp.take_along_axis(x, last, axis=-1) for x in (ranked, order))
    chosen = (logits > lowest) | ((logits == lowest) & (jnp.arange(V) <= lowest_id))
    if min_p is None:
        return chosen
    return chosen & (logits - jnp.max(logits, axis=-1, keepdims=True) >= jnp.log(min_p)[:, None])


def sample(
    logits: Array,
    keys: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    vocab_size: int | Array | None = None,
    *,
    min_p: Array | None = None,
    limited: bool | None = None,
) -> Array:
    """Draw one id a row: divide by the temperature, keep top-k, of these top-p, of these min-p, draw. int32 `[B]`.

    Args:
        logits: `[B, V]`.
        keys: random keys `[B]`.
        temperature: `[B]`, at least 0; 0 takes the most likely id, the lowest of equal ones.
        top_k: `[B]`, 0 or less for no limit.
        top_p: `[B]`, 1 for no limit.
        vocab_size: ids from here on are padding of the embedding and never drawn.
        min_p: `[B]`, 0 for no limit.
        limited: whether any row has a limit, where the caller knows; None looks at the rows while running, and for this a GPU
            waits for the host.
    """
    min_p = jnp.zeros(len(logits)) if min_p is None else min_p
    logits = without_padding(logits.astype(jnp.float32), vocab_size)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    greedy = temperature < jnp.finfo(jnp.float32).tiny

    def draw(limited: bool | None) -> Array:
        # The largest is subtracted first, so that no temperature overflows.
        divisor = jnp.where(greedy, 1, jnp.minimum(temperature, LARGEST))[:, None]
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / divisor
        kept, everything = lambda: candidates(scaled, top_k, top_p, min_p), lambda: jnp.ones_like(scaled, dtype=bool)
        # Sorting the vocabulary costs more than all the rest.
        if limited is None:
            allowed = jax.lax.cond(jnp.any((top_k > 0) | (top_p < 1) | (min_p > 0)), kept, everything)
        else:
            allowed = kept() if limited else everything()
        return jax.vmap(jax.random.categorical)(keys, jnp.where(allowed, scaled, -jnp.inf)).astype(jnp.int32)

    drawn = jax.lax.cond(jnp.all(greedy), lambda: best, lambda: draw(None)) if limited is None else draw(limited)
    return jnp.where(greedy, best, drawn)


def row_keys(seed: Array, index: Array) -> Array:
    """Keys `[B]` for token `index[b]` of a request with seed `seed[b]`."""
    # Threefry by name: the other generators give a row another draw in another batch.
    words = jnp.stack([seed.astype(jnp.uint32), index.astype(jnp.uint32)], axis=-1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")
