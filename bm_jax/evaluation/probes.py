"""Probes of what a model can hold: a needle in a haystack, and copying what it has read before.

A state of constant size cannot hold everything; these show how much it does. Both are scored by likelihood alone, so they also
mean something for models too small to answer questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from bm_jax.data.bundled import shakespeare_texts
from bm_jax.evaluation.scoring import Row, Scorer

CITIES = ("Lisbon", "Vienna", "Warsaw", "Dublin", "Geneva", "Naples", "Prague", "Bergen")


@dataclasses.dataclass(frozen=True)
class Needle:
    """How well one fact is found again in a text of one length."""

    length: int
    """Tokens of the text, about."""
    depth: float
    """Where the fact lies: 0 at the start of the text, 1 at its end."""
    accuracy: float
    """Share of the trials in which the right answer is likelier than `len(CITIES) - 1` others; 1 / len(CITIES) is chance."""
    logprob: float
    """Mean log likelihood of the right answer, in nats."""


@dataclasses.dataclass(frozen=True)
class Copying:
    """How well a sequence of random tokens is predicted when it comes a second time."""

    length: int
    """Tokens of the sequence."""
    nats_first: float
    """Mean nats a token of the first time; a model that takes all ids for equally likely has `log(number of ids)`."""
    nats_second: float
    """Of the second time."""
    accuracy: float
    """Share of the tokens of the second time that greedy decoding would write."""


def needle_in_a_haystack(
    scorer: Scorer,
    lengths: Sequence[int] = (256, 1024, 4096),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 8,
    seed: int = 0,
) -> Iterator[Needle]:
    """A sentence hidden in a held-out play says where somebody keeps a key; which city is likeliest at the end of the text?

    Raises:
        ValueError: a length that is too short for the sentence and the question.
    """
    tokenizer, rng = scorer.model.tokenizer, np.random.default_rng(seed)
    hay = tokenizer.encode("\n\n".join(shakespeare_texts()["validation"].values()))
    for length in lengths:
        for depth in depths:
            rows: list[Row] = []
            for trial in range(trials):
                answer = CITIES[trial % len(CITIES)]
                fact = tokenizer.encode(f"\nThe key is kept in {answer}.\n")
                question = tokenizer.encode("\nThe key is kept in")
                space = length - len(fact) - len(question)
                if space < 0:
                    raise ValueError(f"needle: {length} tokens are too few; sentence and question have {length - space}")
                start = int(rng.integers(0, max(1, len(hay) - space)))  # a longer text repeats it
                straw, place = (hay * (1 + space // len(hay)))[start:][:space], round(depth * space)
                context = [tokenizer.end_of_document, *straw[:place], *fact, *straw[place:], *question]
                # The right answer first, then the wrong ones.
                for city in sorted(CITIES, key=lambda city, right=answer: city != right):
                    rows.append(Row([*context, *tokenizer.encode(f" {city}")], len(context)))
            likelihood = np.zeros(len(rows))
            for number, scores in scorer.score(rows):
                likelihood[number] = np.sum(scores.logprobs, dtype=np.float64)
            likelihood = likelihood.reshape(trials, len(CITIES))
            right = float(np.mean(likelihood[:, 0] > likelihood[:, 1:].max(axis=1)))
            yield Needle(length, depth, right, float(likelihood[:, 0].mean()))


def copying(
    scorer: Scorer, lengths: Sequence[int] = (8, 32, 128, 512, 2048), trials: int = 8, seed: int = 0
) -> Iterator[Copying]:
    """Random tokens twice over: a model with induction heads, or a state that is large enough, knows the second half.

    Raises:
        ValueError: a length below 1.
    """
    tokenizer, rng = scorer.model.tokenizer, np.random.default_rng(seed)
    ids = np.setdiff1d(np.arange(tokenizer.vocab_size), [tokenizer.end_of_document])
    for length in lengths:
        if length < 1:
            raise ValueError(f"copying: a length must be at least 1, got {length}")
        rows = []
        for _ in range(trials):
            once = rng.choice(ids, length).tolist()
            rows.append(Row([tokenizer.end_of_document, *once, *once]))
        first, second, greedy = [], [], []
        for _, scores in scorer.score(rows):
            first.append(-scores.logprobs[:length].mean())
            second.append(-scores.logprobs[length:].mean())
            greedy.append(scores.greedy[length:].mean())
        yield Copying(length, float(np.mean(first)), float(np.mean(second)), float(np.mean(greedy)))
