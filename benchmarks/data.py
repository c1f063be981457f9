"""How fast text becomes token shards, and how fast training batches are read back.

    python benchmarks/data.py corpus/*.jsonl --tokenizer tokenizer.json      # prepares into a temporary folder
    python benchmarks/data.py prepared/                                      # only reads

The peer of preparing is the plain loop in one process, the `tokenizers` library's `encode(document)` for one whole
document after another, on a sample of the same documents in the same run. Tokens per second of processor time, summed
over all processes, are printed too: unlike the others they mean the same on a busy machine. The peer of reading is
`numpy.memmap` slices at random offsets stacked to batches of the same shape (no segment ids, no shuffling without
replacement, no resume).
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tokenizers
import tyro
from harness import Comparison, compare, write_json

from bm_jax.config import DataConfig
from bm_jax.data import open_data, prepare, read_manifest
from bm_jax.data.readers import find_inputs, plan_units, read_span

SAMPLE_CHARACTERS = 4_000_000


@dataclasses.dataclass(frozen=True)
class Options:
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Text to prepare, or one prepared folder to read."""
    tokenizer: str = "byte"
    text_field: str = "text"
    workers: int | None = None
    sequence_length: int = 2048
    batch_size: int = 8
    batches: int = 300
    """Batches read in each round."""
    json: Path | None = None
    """Where the result is written."""


def main(options: Options) -> None:
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.inputs[0])
        if not (folder / "manifest.json").exists():
            folder = Path(temporary) / "prepared"
            results |= measure_preparing(options, folder)
        reading = compare_reading(options, folder)
    for name, value in results.items():
        print(f"{name:36s} {value:14,.2f}")
    print(reading)
    if options.json is not None:
        write_json(options.json, [reading], dataclasses.asdict(options) | results)


def measure_preparing(options: Options, folder: Path) -> dict[str, float]:
    """Wall time of `prepare` (process start and fsync included) against encoding one document after another."""
    start, start_cpu = time.perf_counter(), processor_seconds()
    manifest = prepare(
        options.inputs, folder, tokenizer=options.tokenizer, text_field=options.text_field, workers=options.workers
    )
    seconds, seconds_cpu = time.perf_counter() - start, processor_seconds() - start_cpu
    tokens = manifest.tokens("train") + manifest.tokens("validation")
    sources = find_inputs(options.inputs)
    spans = [span for unit in plan_units(sources, 1_000_000, 1_000_000) for span in unit]
    sample: list[str] = []
    for span in np.random.default_rng(0).permutation(len(spans)):  # spread over all the sources
        found = read_span(sources[spans[span].input], spans[span], options.text_field, lambda _: None)
        sample += [text for _, text in found if isinstance(text, str)]
        if sum(map(len, sample)) > SAMPLE_CHARACTERS:
            break
    results = {
        "prepare: tokens": tokens,
        "prepare: MB of input": sum(source.bytes for source in sources) / 1e6,
        "prepare: seconds": seconds,
        "prepare: MB/s": sum(source.bytes for source in sources) / 1e6 / seconds,
        "prepare: tokens/s": tokens / seconds,
        "prepare: tokens/processor second": tokens / seconds_cpu,
    }
    if options.tokenizer == "byte":
        return results
    path = Path(options.tokenizer)
    peer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    start, start_cpu = time.perf_counter(), processor_seconds()
    count = sum(len(peer.encode(text).ids) + 1 for text in sample)
    seconds, seconds_cpu = time.perf_counter() - start, processor_seconds() - start_cpu
    return results | {
        "one by one: tokens/s": count / seconds,
        "one by one: tokens/processor second": count / seconds_cpu,
        "prepare / one by one": results["prepare: tokens/s"] / (count / seconds),
    }


def processor_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def compare_reading(options: Options, folder: Path) -> Comparison:
    """Training batches through the pipeline, and of bare random slices of the largest shard."""
    manifest = read_manifest(folder)
    config = DataConfig(
        sources=(str(folder),),
        tokenizer=str(folder),
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
    )
    batches = open_data(config, manifest.tokenizer_ids).train_batches()
    largest = max(manifest.splits.train, key=lambda shard: shard.tokens)
    tokens = np.memmap(folder / f"{largest.name}.tokens", manifest.dtype, "r")
    random = np.random.default_rng(0)
    count = options.batch_size * options.sequence_length * options.batches

    def read() -> None:
        for _ in range(options.batches):
            next(batches)

    def slice_bare() -> None:
        for _ in range(options.batches):
            offsets = random.integers(0, len(tokens) - options.sequence_length - 1, options.batch_size)
            np.stack([tokens[i : i + options.sequence_length + 1].astype(np.int32) for i in offsets])

    return compare("reading", ("training batches", read), {"bare slices": slice_bare}, work=count, unit="tokens")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
