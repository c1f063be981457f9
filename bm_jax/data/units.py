"""One unit of work of `prepare`: read some spans of text, tokenize them, write at most one shard for each split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bm_jax.data.readers import BadText, Input, Span, read_span
from bm_jax.data.shards import SPLITS, ShardWriter, write_durably
from bm_jax.data.tokenizer import Tokenizer

WORK = "work"
"""Folder, inside the one being prepared, of the records of finished units."""
BATCH_CHARACTERS = 1_000_000
"""Documents are handed to the tokenizer in batches of about this many characters."""
EXAMPLES = 10
"""How many skipped lines are named."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that decides what prepared data contains. Two runs with equal plans write identical files."""

    inputs: tuple[Input, ...]
    tokenizer: str
    """Fingerprint."""
    text_field: str
    validation_fraction: float
    unit_bytes: int
    document_bytes: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class UnitRecord:
    """What became of one unit."""

    threshold: int
    """Documents whose hash is below it were held out."""
    shards: dict
    """Split -> record of its shard; absent if it has no document."""
    lowest: int | None
    highest: int | None
    """Smallest and largest hash of the unit's documents; None without documents."""
    lines: list
    """Lines or rows of each span."""
    skipped: int
    examples: list
    """The first skipped: [number of the span, line within it (0: all of it), why]."""
    empty: int
    """Documents without text."""


def document_hash(text: str) -> int:
    """Uniform in 0 .. 2**64 - 1, a function of the text alone, so that equal documents fall into the same split."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def run_unit(
    number: int,
    unit: Sequence[Span],
    plan: Plan,
    folder: Path,
    tokenizer: Tokenizer,
    threshold: int,
    advance: Callable[[int], None],
) -> UnitRecord:
    """Write the shards of unit `number` into `folder`, then its record; `advance(bytes)` reports progress."""
    names = {split: f"{split}-{number:05d}" for split in SPLITS}
    writers = {split: ShardWriter(folder, name, tokenizer) for split, name in names.items()}
    pending: list[str] = []
    hashes: list[int] = []
    lines, examples = [0] * len(unit), []
    skipped = empty = characters = 0

    def flush() -> None:
        for text, ids in zip(pending, tokenizer.encode_batch(pending), strict=True):
            value = document_hash(text)
            hashes.append(value)
            writers["validation" if value < threshold else "train"].add(ids)
        pending.clear()

    try:
        for index, span in enumerate(unit):
            for line, text in read_span(plan.inputs[span.input], span, plan.text_field, advance):
                lines[index] = line
                if isinstance(text, BadText):
                    skipped += 1
                    if len(examples) < EXAMPLES:
                        examples.append([index, line, str(text)])
                elif text:
                    pending.append(text)
                    characters += len(text)
                elif text is not None:
                    empty += 1
                if characters >= BATCH_CHARACTERS:
                    flush()
                    characters = 0
        flush()
        shards = {}
        for split, writer in writers.items():
            shard = writer.finish()
            if shard is not None:
                shards[split] = dataclasses.asdict(shard)
            else:  # an earlier run of this unit, with another threshold, may have left one
                for kind in ("tokens", "ends"):
                    (folder / f"{names[split]}.{kind}").unlink(missing_ok=True)
    finally:
        for writer in writers.values():
            writer.close()
    lowest, highest = (min(hashes), max(hashes)) if hashes else (None, None)
    record = UnitRecord(threshold, shards, lowest, highest, lines, skipped, examples, empty)
    write_durably(folder / WORK / f"{number:05d}.json", json.dumps(dataclasses.asdict(record)))
    return record
