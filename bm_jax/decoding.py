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

from bm_jax.cache import Cache
from bm_jax.config import ModelConfig
from bm_jax.decode_step import Kernel, advance
from bm_jax.model import Parameters, forward
from bm_jax.model import logits as unembed
from bm_jax.sampling import Logprobs, SamplingConfig, Seen, add_bias, log_probabilities, penalize, row_keys, sample

CHUNK = 16
"""Most tokens a row gets in one call of `decode`; the host reads them when the call returns."""
LIST = 32
"""Room for ids in a row's lists (stop tokens, biased ids); with more of them in a batch it is `MANY`, or a power of two."""
MANY = 1024


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
        longest = max(map(len, values), default=0)
        room = LIST if longest <= LIST else max(MANY, 1 << (longest - 1).bit_length())
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


def seen_before(configs: Sequence[SamplingConfig], prompt: Array) -> Seen | None:
    """What `choose` must know of the ids read, bool `[B, V]`; None where no row asks for what needs it."""
    if not any(map(needs_seen, configs)):
        return None
    return Seen(jnp.asarray(prompt), jnp.zeros(prompt.shape, jnp.int32))


def needs_seen(config: SamplingConfig) -> bool:
    """Whether more than a row's logits is needed: penalties, bias or log-probabilities are asked for."""
    plain = SamplingConfig()
    needs = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs")
    return any(getattr(config, name) != getattr(plain, name) for name in needs)


class Choice(NamedTuple):
    """A token for each row."""

    token: Array
    """int32 `[B]`."""
    seen: Seen | None
    """What it was given, with these tokens."""
    logprobs: Logprobs | None
    """None where `seen` is."""


@partial(jax.jit, static_argnames=("config", "limited"))
def choose(
    head: Parameters,
    hidden: Array,
    rows: Rows,
    index: Array,
    seen: Seen | None,
    config: ModelConfig,
    limited: bool | None = None,
) -> Choice:
    """Draw token number `index` `[B]` of each row from the hidden values `[B, 1, M]` of the token before it.

    `limited` as for `bm_jax.sampling.sample`.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    with jax.named_scope("sampling"):
        logits = raw = unembed(head, hidden, config)[:, -1]
        if seen is not None:
            logits = add_bias(raw, rows.bias_ids, rows.bias)
            logits = penalize(logits, seen, rows.repetition_penalty, rows.presence_penalty, rows.frequency_penalty)
        keys = row_keys(rows.seed, index)
        limits = (rows.temperature, rows.top_k, rows.top_p, rows.vocab_size)
        token = sample(logits, keys, *limits, min_p=rows.min_p, limited=limited)
        if seen is None:
            return Choice(token, None, None)
        seen = seen._replace(drawn=seen.drawn.at[jnp.arange(len(token)), token].add(1))
        return Choice(token, seen, log_probabilities(raw, token, rows.vocab_size))


class Going(NamedTuple):
    """Where each row of a batch is, between calls of `decode`."""

    cache: Cache
    """Holds everything before `token`."""
    seen: Seen | None
    """From `seen_before` and the tokens drawn since; None where no row needs it."""
    token: Array
    """The last id drawn `[B]`, not fed yet."""
    number: Array
    """How many tokens were drawn so far `[B]`."""
    alive: Array
    """Rows that go on `[B]`; a row stops after its end-of-document id, one of its stop tokens, or its `max_tokens`."""


class Drawn(NamedTuple):
    """What one call of `decode` drew."""

    ids: Array
    """`[B, CHUNK]`, -1 after a row's end."""
    logprobs: Logprobs | None
    """Arrays `[B, CHUNK, ...]`, where they are asked for."""


@partial(jax.jit, static_argnames=("steps", "config", "kernel"), donate_argnames=("going",))
def decode(
    parameters: Parameters,
    head: Parameters,
    going: Going,
    rows: Rows,
    steps: int,
    config: ModelConfig,
    kernel: Kernel | None = None,
) -> tuple[Going, Drawn]:
    """Feed and draw up to `steps` tokens, stopping as soon as every row has ended.

    Args:
        parameters: of the model.
        head: the parameters that `bm_jax.model.logits` needs.
        going: where each row is.
        rows: what is asked.
        steps: at most CHUNK.
        config: the model.
        kernel: that a step through the layers is one kernel; parameters and cache are then those of
            `bm_jax.decode_step.advance`, and all steps are taken.
    """

    def step_of(token: Array, cache: Cache) -> tuple[Array, Cache]:
        if kernel is not None:
            return advance(parameters, token, cache, config, kernel)
        output = forward(parameters, token[:, None], config, cache=cache)
        assert output.cache is not None
        return output.hidden, output.cache

    def unfinished(carry):
        step, going, _ = carry
        return (step < steps) & jnp.any(going.alive)

    def body(carry):
        step, (cache, seen, token, number, alive), drawn = carry
        hidden, cache = step_of(token, cache)
        token, seen, logprobs = choose(head, hidden, rows, number, seen, config, None if kernel is None else kernel.limited)
        new = Drawn(jnp.where(alive, token, -1), logprobs)
        drawn = jax.tree.map(lambda all_, one: all_.at[:, step].set(one), drawn, new)
        number = number + 1
        ended = (token == rows.end) | jnp.any(token[:, None] == rows.stop_tokens, axis=1) | (number >= rows.max_tokens)
        return step + 1, Going(cache, seen, token, number, alive & ~ended), drawn

    B = len(going.token)
    drawn = Drawn(jnp.full((B, CHUNK), -1, jnp.int32), None)
    if going.seen is not None:
        logits = jax.ShapeDtypeStruct(going.seen.drawn.shape, jnp.float32)
        of_one = jax.eval_shape(log_probabilities, logits, going.token)
        empty = jax.tree.map(lambda leaf: jnp.zeros((B, CHUNK, *leaf.shape[1:]), leaf.dtype), of_one)
        drawn = drawn._replace(logprobs=empty)
    carry = (jnp.int32(0), going, drawn)
    if kernel is None:
        _, going, drawn = jax.lax.while_loop(unfinished, body, carry)
    else:  # a GPU would wait for the host to say whether the loop goes on
        _, going, drawn = jax.lax.fori_loop(0, steps, lambda _, carry: body(carry), carry)
    return going, drawn
