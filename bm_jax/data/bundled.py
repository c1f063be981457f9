"""The bundled corpus: Shakespeare's plays, so that training needs no download. See shakespeare/NOTICE."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bm_jax.data.stream import Piece, TokenStream
from bm_jax.data.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "shakespeare"
HELD_OUT_EVERY = 8
"""Every eighth play in alphabetical order of file name is held out."""


def shakespeare_texts() -> dict[str, dict[str, str]]:
    """The plays: {"train": {file name: text}, "validation": {file name: text}}."""
    paths = sorted(FOLDER.glob("*.txt"))
    splits: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    for number, path in enumerate(paths, start=1):
        split = "validation" if number % HELD_OUT_EVERY == 0 else "train"
        splits[split][path.name] = path.read_text(encoding="utf-8")
    return splits


def open_shakespeare(tokenizer: Tokenizer, vocab_size: int) -> dict[str, TokenStream]:
    """Train and validation streams of the plays, one document each, tokenized in memory (2 MB of text)."""
    streams = {}
    for split, texts in shakespeare_texts().items():
        ids = [np.append(a, np.int32(tokenizer.end_of_document)) for a in tokenizer.encode_batch(list(texts.values()))]
        ends = np.cumsum([len(a) for a in ids])
        files = tuple(FOLDER / name for name in texts)
        streams[split] = TokenStream([Piece(np.concatenate(ids), ends, "the bundled shakespeare", files)], vocab_size)
    return streams
