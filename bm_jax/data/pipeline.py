"""From a DataConfig to batches: sources -> packed windows -> shuffle -> mix -> batch.

    data = open_data(config, vocab_size)
    batches = data.train_batches()             # endless; next(batches), batches.get_state(), batches.set_state(state)
    for name, source in data.validation_batches(batch_size=8, limit=16).items():
        for batch in source: ...

A batch is {"tokens": int32 [B, L + 1], "segment_ids": int32 [B, L + 1]} as numpy arrays. Inputs are the first L
columns, targets the last L. Segment ids count the documents of a row from 1; 0 marks padding, which occurs only in
validation.

The order of training windows is a function of the seed and the position alone, so the iterator's state is one number
and a restart is exact.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bm_jax.config import ConfigError, DataConfig
from bm_jax.data.bundled import open_shakespeare
from bm_jax.data.errors import DataError
from bm_jax.data.megatron import megatron_prefix, open_megatron
from bm_jax.data.shards import is_prepared, open_prepared
from bm_jax.data.stream import TokenStream, Windows
from bm_jax.data.tokenizer import Tokenizer, load_tokenizer

READ_THREADS = 2
READ_AHEAD = 4
"""Batches made ahead of the one in use."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One opened source."""

    name: str
    """Short and unique among the sources of a run; used in metric names."""
    weight: float
    train: TokenStream
    validation: TokenStream


class ValidationBatches(Sequence[dict[str, np.ndarray]]):
    """Held-out windows of one source in order, in batches made when they are asked for; the same every time.

    The last batch is filled up with rows of segment id 0. If there are more than `limit` batches, the windows are taken
    evenly over the whole split instead of from its beginning.
    """

    def __init__(self, windows: Windows, batch_size: int, limit: int | None) -> None:
        self._windows, self._batch_size = windows, batch_size
        wanted = len(windows) if limit is None else min(len(windows), limit * batch_size)
        self._chosen = [i * len(windows) // wanted for i in range(wanted)]

    def __len__(self) -> int:
        return -(-len(self._chosen) // self._batch_size)

    def __getitem__(self, index):  # type: ignore[override]  # slices are not supported
        index = range(len(self))[index]
        rows = [self._windows[i] for i in self._chosen[index * self._batch_size : (index + 1) * self._batch_size]]
        missing = self._batch_size - len(rows)
        return {key: np.pad(np.stack([row[key] for row in rows]), ((0, missing), (0, 0))) for key in rows[0]}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[i] for i in range(len(self)))


class Data:
    """The opened sources of a DataConfig. Made by `open_data`."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, sources: tuple[Source, ...]) -> None:
        self.config, self.tokenizer, self.sources = config, tokenizer, sources

    def files(self) -> list[Path]:
        """Every file that batches are read from."""
        return [file for source in self.sources for stream in (source.train, source.validation) for file in stream.files]

    def train_batches(self, start: int = 0, *, process_index: int = 0, process_count: int = 1) -> Any:
        """Endless grain iterator over training batches, from batch number `start` on.

        Each source is shuffled anew in every epoch and drawn from in the proportion of its weight (to within 1% of
        it); a source that runs out begins its next epoch. `get_state()` is a small JSON value; `set_state` of it, in
        any process with the same DataConfig, continues with the batch that would have come next.

        With `process_count` processes each gets its own consecutive rows, batch_size / process_count of them, of the
        same global batches; the state is the same in every process.
        """
        import grain

        config = self.config
        if config.batch_size % process_count:
            raise ConfigError(f"data.batch_size ({config.batch_size}) must be a multiple of {process_count} processes")
        shuffled = []
        for number, source in enumerate(self.sources):
            windows = Windows(source.train, config.sequence_length)
            if not len(windows):
                raise DataError(
                    f"source {source.name!r} has {source.train.tokens:,} training tokens, fewer than one window of "
                    f"sequence_length + 1 = {config.sequence_length + 1:,}. Use more text or a shorter sequence_length"
                )
            seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{number}".encode()).digest()[:4], "little")
            shuffled.append(grain.MapDataset.source(windows).shuffle(seed=seed).repeat())
        weights = [source.weight for source in self.sources]
        windows = grain.MapDataset.mix(shuffled, weights) if len(shuffled) > 1 else shuffled[0]
        rows = config.batch_size // process_count
        batches = grain.MapDataset.source(_Batches(windows, config.batch_size, rows, process_index * rows))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
        iterator = iter(batches.to_iter_dataset(options))
        if start:
            iterator.set_state({"next_index": start})
        return iterator

    def validation_batches(self, batch_size: int, limit: int | None = None) -> dict[str, ValidationBatches]:
        """Held-out batches by source name, padded to full batches; at most `limit` batches for each source.

        A source without held-out text has no entry.
        """
        length = self.config.sequence_length
        windows = {source.name: Windows(source.validation, length, partial=True) for source in self.sources}
        return {name: ValidationBatches(w, batch_size, limit) for name, w in windows.items() if len(w)}


class _Batches(Sequence[dict[str, np.ndarray]]):
    """Item i is rows first .. first + rows - 1 of global batch i of an endless `grain.MapDataset` of windows."""

    def __init__(self, windows: Any, batch_size: int, rows: int, first: int) -> None:
        self._windows, self._batch_size, self._rows, self._first = windows, batch_size, rows, first

    def __len__(self) -> int:
        return len(self._windows) // self._batch_size

    def __getitem__(self, index):  # type: ignore[override]  # slices are not supported
        begin = int(index) * self._batch_size + self._first
        rows = [self._windows[i] for i in range(begin, begin + self._rows)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def open_data(config: DataConfig, vocab_size: int) -> Data:
    """Open every source of `config` for a model whose ids are 0 .. `vocab_size - 1`.

    Nothing is read but manifests, indices and the bundled text.

    Raises:
        DataError: (a ConfigError) a file is missing or damaged, or tokenizer, data and model do not go together.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size:,} ids, more than model.vocab_size = "
            f"{vocab_size:,}. Set model.vocab_size to at least {tokenizer.vocab_size:,}"
        )
    names = _names(config.sources)
    weights = config.weights or (1.0,) * len(config.sources)
    sources = []
    for name, path, weight in zip(names, config.sources, weights, strict=True):
        streams = _open(path, config, tokenizer, vocab_size)
        sources.append(Source(name, weight, streams["train"], streams["validation"]))
    return Data(config, tokenizer, tuple(sources))


def _open(path: str, config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> dict[str, TokenStream]:
    if path == "shakespeare":
        return open_shakespeare(tokenizer, vocab_size)
    if is_prepared(Path(path)):
        return open_prepared(path, tokenizer, vocab_size)
    prefix = megatron_prefix(path)
    if prefix is not None:
        return open_megatron(prefix, config.held_out_tokens, min(vocab_size, tokenizer.vocab_size))
    if os.path.isdir(path):
        why = "it has no manifest.json"
        if os.path.exists(os.path.join(path, "plan.json")):
            why = "preparing it was not finished; run the same prepare command again"
    else:
        why = "it is a file" if os.path.exists(path) else "there is no such folder"
    raise DataError(
        f"cannot read the data source {path!r}: {why}. A source is a folder made by `python -m bm_jax.data prepare "
        "INPUT... OUT`, a Megatron prefix (PREFIX.bin and PREFIX.idx), or `shakespeare`"
    )


def _names(paths: Sequence[str]) -> list[str]:
    """Last component of each path, with -2, -3, ... where that is not unique."""
    names: list[str] = []
    for path in paths:
        base = Path(path).name.removesuffix(".bin").removesuffix(".idx") or Path(path).resolve().name or "data"
        name, count = base, 1
        while name in names:
            count += 1
            name = f"{base}-{count}"
        names.append(name)
    return names
