"""Bits per byte of text: what a tokenizer cannot flatter, by source.

The negative log likelihood of a document's tokens, the first after the end-of-document id, in bits, over its bytes in UTF-8.
The end of the document itself is not scored. A byte model and a token model can be compared by it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bm_jax.data.errors import DataError
from bm_jax.data.readers import BadText, find_inputs, plan_units, read_span
from bm_jax.data.shards import is_prepared, open_prepared, read_manifest
from bm_jax.data.stream import TokenStream
from bm_jax.evaluation.scoring import Scorer

logger = logging.getLogger(__name__)

TOGETHER = 1 << 17
"""Tokens of documents that are sorted by length together, about."""


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
    """Of one source."""

    documents: int
    tokens: int
    bytes: int
    """Of the text in UTF-8."""
    bits: float
    """Negative log likelihood of the text."""

    @property
    def per_byte(self) -> float:
        """Bits per byte."""
        return self.bits / self.bytes

    @property
    def perplexity(self) -> float:
        """Of a token; infinite where it is beyond what a float holds."""
        mean = self.bits * math.log(2) / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def check_source(scorer: Scorer, path: str | Path) -> None:
    """Raise the DataError that `bits_per_byte` would, as far as it is known once the first text is read."""
    if is_prepared(Path(path)):
        _open_held_out(scorer, Path(path))
    elif not any(isinstance(text, str) for _, _, text in _records(str(path))):
        raise DataError(f"{path} holds no text to measure")


def bits_per_byte(scorer: Scorer, path: str | Path, *, limit: int | None = None) -> Iterator[BitsPerByte]:
    """Bits per byte of a source, growing as documents are read; the last value is that of the whole.

    Args:
        scorer: of the model.
        path: a text file as `bm_jax.data.prepare` reads (.txt, .jsonl and others), a folder of them, or a prepared folder, of
            which the held-out documents are read.
        limit: most documents read.

    Raises:
        DataError: there is nothing at `path`, or no text; or it was prepared with another tokenizer than the model's.
    """
    documents = _held_out(scorer, Path(path)) if is_prepared(Path(path)) else _texts(scorer, str(path))
    done = BitsPerByte(0, 0, 0, 0.0)
    for together in _groups(documents, limit):
        rows, sizes = [], 0
        for ids, size in together:
            rows += scorer.document_rows(ids)
            sizes += size
        done = dataclasses.replace(done, documents=done.documents + len(together), bytes=done.bytes + sizes)
        for _, scores in scorer.score(rows):
            nats = -float(np.sum(scores.logprobs, dtype=np.float64))
            done = dataclasses.replace(done, tokens=done.tokens + len(scores.logprobs), bits=done.bits + nats / math.log(2))
        yield done
    if not done.bytes:
        raise DataError(f"{path} holds no text to measure")


def _groups(documents: Iterable[tuple[Sequence[int], int]], limit: int | None) -> Iterator[list[tuple[Sequence[int], int]]]:
    """Documents, as many at once as have `TOGETHER` tokens."""
    group, tokens = [], 0
    for number, document in enumerate(documents):
        if number == limit:
            break
        group.append(document)
        tokens += len(document[0])
        if tokens >= TOGETHER:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _texts(scorer: Scorer, path: str) -> Iterator[tuple[list[int], int]]:
    """Ids and bytes of the documents in text files; lines that cannot be used are left out, with a warning."""
    for file, number, text in _records(path):
        if isinstance(text, BadText):
            logger.warning("%s, record %d, is left out: %s", file, number, text)
        else:
            yield scorer.model.tokenizer.encode(text), len(text.encode())


def _records(path: str) -> Iterator[tuple[str, int, str | BadText]]:
    """File, number and text of each record that is not empty."""
    inputs = find_inputs([path])
    for unit in plan_units(inputs, 1 << 24, 0):
        for span in unit:
            for number, text in read_span(inputs[span.input], span, "text", lambda _: None):
                if text:
                    yield inputs[span.input].path, number, text


def _open_held_out(scorer: Scorer, folder: Path) -> TokenStream:
    """The held-out part of a prepared folder; DataError where there is none for this model."""
    tokenizer, manifest = scorer.model.tokenizer, read_manifest(folder)
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{folder} was prepared with another tokenizer than the model's, {tokenizer.name}: give its text instead"
        )
    if not manifest.documents("validation"):
        raise DataError(f"{folder} has no held-out documents; prepare it with a validation_fraction, or give its text instead")
    return open_prepared(folder, tokenizer, scorer.model.config.vocab_size)["validation"]


def _held_out(scorer: Scorer, folder: Path) -> Iterator[tuple[list[int], int]]:
    """Ids and bytes of the held-out documents of a prepared folder."""
    stream, tokenizer = _open_held_out(scorer, folder), scorer.model.tokenizer
    ids: list[int] = []
    for start in range(0, stream.tokens, TOGETHER):
        tokens, _ = stream.read(start, min(start + TOGETHER, stream.tokens))
        for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_document) + 1):
            ids += part.tolist()
            if ids and ids[-1] == tokenizer.end_of_document:
                text = ids[:-1]
                if text:
                    yield text, len(tokenizer.decode(text).encode())
                ids = []
