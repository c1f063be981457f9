"""Probes of what a model can hold: a needle in a haystack, and copying what it has read before.

A state of constant size cannot hold everything; these show how much it does. Both are scored by likelihood alone, so they also
mean something for models too small to answer questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bm_jax.data.bundled import shakespeare_texts
from bm_jax.evaluation.scoring import Row, Scorer

CITIES = ("Lisbon", "Vienna", "Warsaw", "Dublin", "Geneva", "Naples", "Prague", "Bergen")
FACT = "\nThe key is kept in {}.\n"
QUESTION = "\nThe key is kept in"


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
        ValueError: at once, a length that is too short for the sentence and the question, or too long for `max_length`.
    """
    encode = scorer.model.tokenizer.encode
    shortest = max(len(encode(FACT.format(city))) for city in CITIES) + len(encode(QUESTION))
    answer = max(len(encode(f" {city}")) for city in CITIES)
    _check_lengths(scorer, "needle", lengths, shortest, lambda most: most - answer)
    return _needles(scorer, lengths, depths, trials, seed)


def _needles(scorer: Scorer, lengths: Sequence[int], depths: Sequence[float], trials: int, seed: int) -> Iterator[Needle]:
    tokenizer, rng = scorer.model.tokenizer, np.random.default_rng(seed)
    hay = tokenizer.encode("\n\n".join(shakespeare_texts()["validation"].values()))
    for length in lengths:
        for depth in depths:
            rows: list[Row] = []
            for trial in range(trials):
                answer = CITIES[trial % len(CITIES)]
                fact, question = tokenizer.encode(FACT.format(answer)), tokenizer.encode(QUESTION)
                space = length - len(fact) - len(question)
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
        ValueError: at once, a length below 1, or too long for `max_length`.
    """
    _check_lengths(scorer, "copying", lengths, 1, lambda most: most // 2)
    return _copies(scorer, lengths, trials, seed)


def _copies(scorer: Scorer, lengths: Sequence[int], trials: int, seed: int) -> Iterator[Copying]:
    tokenizer, rng = scorer.model.tokenizer, np.random.default_rng(seed)
    ids = np.setdiff1d(np.arange(tokenizer.vocab_size), [tokenizer.end_of_document])
    for length in lengths:
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


def _check_lengths(scorer: Scorer, probe: str, lengths: Sequence[int], shortest: int, room: Callable[[int], int]) -> None:
    """Raise ValueError unless all are from `shortest` to `room(max_length)`."""
    most = scorer.max_length
    longest = None if most is None else room(most)
    for length in lengths:
        if length < shortest:
            raise ValueError(f"{probe}: {length} tokens are too few: give --lengths of at least {shortest}")
        if longest is not None and length > longest:
            shorter = f"--lengths of {shortest} to {longest} or " if longest >= shortest else ""
            raise ValueError(
                f"{probe}: {length} tokens are too many for --max-length {most}: give {shorter}a larger --max-length"
            )
