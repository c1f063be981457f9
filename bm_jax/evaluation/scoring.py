"""How likely a model finds text: log probabilities of given tokens, in batches of similar length, one program a shape.

Rows of any length are read in pieces with the state carried on, as a prompt is, so memory does not grow with them where the
model has no attention, and nothing is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bm_jax.cache import Cache, init_cache
from bm_jax.config import ModelConfig
from bm_jax.language_model import LONGEST, PIECE, SHORTEST_BUCKET, LanguageModel, bucket, compute_parameters, pieces
from bm_jax.model import Parameters, forward, unrolled
from bm_jax.model import logits as unembed

BATCH_TOKENS = 16384
"""Tokens read at once, padding included."""
UNEMBED = 2048
"""Tokens whose logits are there at once, about."""


class Row(NamedTuple):
    """Tokens of which those from `first` on are scored, each after all before it; `first` is at least 1."""

    ids: Sequence[int]
    first: int = 1


class Scores(NamedTuple):
    """Of each scored token of a row, `[ids - first]`."""

    logprobs: np.ndarray
    """Natural logarithms of their probabilities, float32."""
    greedy: np.ndarray
    """Whether each is the most likely one, bool."""


class Scorer:
    """Scores tokens with a model.

    Args:
        model: what scores.
        batch_tokens: tokens read at once, padding included: memory and speed, and results by no more than rounding.
        max_length: most tokens that one is predicted from; None is no limit, or, for a model with attention, what it holds
            (`LanguageModel.max_prompt_tokens`), which may be far more than it was trained with.

    Raises:
        ValueError: a size that is not positive.
    """

    def __init__(self, model: LanguageModel, *, batch_tokens: int = BATCH_TOKENS, max_length: int | None = None) -> None:
        if max_length is None and "attention" in model.config.kinds:
            max_length = model.max_prompt_tokens or LONGEST
        for name, value in (("batch_tokens", batch_tokens), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.batch_tokens, self.max_length = model, batch_tokens, max_length
        # A loop over depth compiles in a fraction of the time; int8 kernels exist for single layers alone.
        self._config = model.config if model.weights is None else unrolled(model.config)

    @cached_property
    def _parameters(self) -> tuple[Parameters, Parameters]:
        """Of the layers, and of the unembedding."""
        if self.model.weights is not None:
            return self.model.inference
        parameters = compute_parameters(self.model.parameters, self.model.config)
        name = "embedding" if self.model.config.tie_embeddings else "unembedding"
        return parameters, {name: parameters[name]}

    def score(self, rows: Sequence[Row]) -> Iterator[tuple[int, Scores]]:
        """Number and scores of each row, the longest rows first, as soon as they are known.

        Raises:
            ValueError: a row with nothing to score, or nothing before it, with an unknown id, or longer than `max_length` + 1.
        """
        vocabulary = self.model.config.vocab_size
        for number, row in enumerate(rows):
            if not 1 <= row.first < len(row.ids):
                raise ValueError(f"score: row {number} of {len(row.ids)} tokens cannot be scored from {row.first} on")
            if min(row.ids) < 0 or max(row.ids) >= vocabulary:
                raise ValueError(f"score: row {number} has ids outside 0 to {vocabulary - 1}")
            if self.max_length is not None and len(row.ids) > self.max_length + 1:
                raise ValueError(f"score: row {number} has {len(row.ids)} tokens, more than {self.max_length} and one")
        padded = [bucket(len(row.ids) - 1, SHORTEST_BUCKET) for row in rows]  # what rows of one batch share
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number].ids))
        while order:
            size = padded[order[0]]
            alike = [number for number in order if padded[number] == size]
            # Attention keeps all of a row, other layers nothing but a piece.
            at_once = size if "attention" in self._config.kinds else min(size, PIECE)
            batch = min(_no_more(self.batch_tokens // at_once), bucket(len(alike)))
            for start in range(0, len(alike), batch):
                numbers = alike[start : start + batch]
                yield from zip(numbers, self._score_together([rows[n] for n in numbers], batch, size), strict=True)
            order = order[len(alike) :]

    def _score_together(self, rows: Sequence[Row], batch: int, size: int) -> list[Scores]:
        """The scores of up to `batch` rows of up to `size` tokens, read side by side."""
        config, inputs = self._config, [row.ids[:-1] for row in rows]
        cache = _empty(config, batch, size if "attention" in config.kinds else 0)
        logprobs, greedy, start = [], [], 0
        for tokens, lengths in pieces(inputs, batch, PIECE, SHORTEST_BUCKET):
            targets = np.zeros_like(tokens)
            for number, row in enumerate(rows):
                part = row.ids[start + 1 : start + 1 + tokens.shape[1]]
                targets[number, : len(part)] = part
            if lengths is None:
                lengths = np.full(batch, tokens.shape[1], np.int32)
            cache, *scored = _read(*self._parameters, cache, tokens, lengths, targets, config)
            logprobs.append(scored[0])
            greedy.append(scored[1])
            start += tokens.shape[1]
        values, best = (np.concatenate(jax.device_get(parts), axis=1) for parts in (logprobs, greedy))
        return [
            Scores(values[number, row.first - 1 : len(row.ids) - 1], best[number, row.first - 1 : len(row.ids) - 1])
            for number, row in enumerate(rows)
        ]

    def document_rows(self, ids: Sequence[int]) -> list[Row]:
        """A document as rows that together score each of its tokens once, the first after the end-of-document id.

        One row, or windows of `max_length` that follow each other, each read after the token before it; the last one begins
        earlier, so that it is as long as the others.
        """
        ids = [self.model.tokenizer.end_of_document, *ids]
        step = len(ids) if self.max_length is None else self.max_length
        starts = range(0, len(ids) - 1, step)
        begins = [min(start, max(0, len(ids) - 1 - step)) for start in starts]
        return [Row(ids[b : start + step + 1], start - b + 1) for start, b in zip(starts, begins, strict=True)]


def _no_more(number: int) -> int:
    """The largest power of two that is no more, and at least 1."""
    return 1 << max(0, number.bit_length() - 1)


@partial(jax.jit, static_argnames=("config", "batch", "room"))
def _empty(config: ModelConfig, batch: int, room: int) -> Cache:
    return init_cache(config, batch, room)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _read(
    parameters: Parameters, head: Parameters, cache: Cache, tokens: Array, lengths: Array, targets: Array, config: ModelConfig
) -> tuple[Cache | None, Array, Array]:
    """Read `[B, L]` tokens on; of each target, the token after it, log probability and whether none is likelier, `[B, L]`."""
    output = forward(parameters, tokens, config, cache=cache, lengths=lengths)
    (B, L), M = tokens.shape, output.hidden.shape[-1]
    count = max(1, B * L // UNEMBED)  # both are powers of two

    def chunk(hidden_and_target: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, target = hidden_and_target
        scores = unembed(head, hidden, config)
        chosen = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(scores, axis=-1), jnp.argmax(scores, axis=-1) == target

    # The logits of one chunk are there at a time.
    logprobs, greedy = jax.lax.map(chunk, (output.hidden.reshape(count, 1, -1, M), targets.reshape(count, 1, -1)))
    return output.cache, logprobs.reshape(B, L), greedy.reshape(B, L)
