"""Text to token shards, on all cores, restartable.

The inputs are divided into units of work (`readers.plan_units`). A worker turns one unit into at most one shard for
each split and records it in work/NUMBER.json. A file gets its name only when it is complete and on the disk, so a
killed run continues with the units that have no record; the manifest is written last. Which documents are held out
depends on their text alone: those whose hash lies below the wanted fraction of its range.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from bm_jax.config import ConfigError, from_dict
from bm_jax.data.errors import DataError
from bm_jax.data.readers import Span, find_inputs, plan_units
from bm_jax.data.shards import (
    FORMAT,
    MANIFEST,
    SPLITS,
    VERSION,
    Manifest,
    Shard,
    Splits,
    is_prepared,
    read_manifest,
    token_dtype,
    write_durably,
)
from bm_jax.data.tokenizer import Tokenizer, load_tokenizer
from bm_jax.data.units import EXAMPLES, WORK, Plan, UnitRecord, run_unit

PLAN = "plan.json"


def prepare(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = "byte",
    text_field: str = "text",
    validation_fraction: float = 0.01,
    workers: int | None = None,
    document_bytes: int = 1_000_000,
    unit_bytes: int = 16_000_000,
    progress: bool = True,
) -> Manifest:
    """Make the prepared folder `out` from text; the same call again continues one that was interrupted.

    Args:
        inputs: .txt (a document each), .jsonl, .jsonl.gz, .jsonl.zst and .parquet files (a document a line or row), folders
            of those, or `hf:NAME?config=C&split=S` for a data set of the package `datasets`. Lines, rows and text files that
            cannot be used are skipped, counted and, the first few, named in the manifest.
        out: the folder to make.
        tokenizer: `byte`, or the path of a tokenizer.json or of its folder.
        text_field: field or column that holds the text.
        validation_fraction: share of the documents held out, chosen by a hash of their text; at least one on either side if
            there are two different ones, none for 0.
        workers: processes; default one for each core. The result does not depend on it. As always with processes, a script
            (not a notebook) needs its `if __name__ == "__main__":`.
        document_bytes: longer .txt files are divided, at a blank line or line break, into documents of about this size (0:
            never), so that one big file can be held out from and worked on in parallel.
        unit_bytes: input of one shard, about.
        progress: show a bar.

    Raises:
        DataError: there is nothing to read, a file is damaged, or `out` holds something else.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"validation_fraction must be at least 0 and less than 1, got {validation_fraction}")
    for name, value, least in (
        ("workers", workers, 1),
        ("document_bytes", document_bytes, 0),
        ("unit_bytes", unit_bytes, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    chosen = load_tokenizer(tokenizer)
    plan = Plan(tuple(find_inputs(given)), chosen.fingerprint, text_field, validation_fraction, unit_bytes, document_bytes)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not _begin(folder, plan, chosen):
            units = plan_units(plan.inputs, unit_bytes, document_bytes)
            records = _run_all(folder, plan, units, workers or _cores(), progress)
            write_durably(folder / MANIFEST, _manifest_json(plan, chosen, units, records))
        shutil.rmtree(folder / WORK, ignore_errors=True)
        (folder / PLAN).unlink(missing_ok=True)
        return read_manifest(folder)


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from preparing into `folder`; the lock ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is preparing {folder}; wait for it or choose another folder") from None
        yield
    finally:
        os.close(descriptor)


def _begin(folder: Path, plan: Plan, tokenizer: Tokenizer) -> bool:
    """Whether `folder` is finished; otherwise make it ready to work in. DataError if it holds something else."""
    if is_prepared(folder):
        if read_manifest(folder).plan == plan.hash:
            return True
        raise DataError(
            f"{folder} already holds data prepared from other inputs or with other options (or the inputs have changed "
            "since). Delete it or choose another folder"
        )
    if (folder / PLAN).exists():
        before = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        now = json.loads(plan.to_json())
        if before != now:
            changed = ", ".join(name for name in now if before.get(name) != now[name])
            raise DataError(
                f"{folder} holds an unfinished preparation that differs in: {changed}. Run it again with the same "
                "inputs and options to continue it, or delete the folder"
            )
    elif any(not path.match(f"{PLAN}.*.partial") for path in folder.iterdir()):
        raise DataError(f"{folder} is not empty and not prepared data; choose another folder")
    for left in folder.rglob("*.partial"):
        left.unlink(missing_ok=True)
    write_durably(folder / PLAN, plan.to_json())
    tokenizer.save(folder)
    (folder / WORK).mkdir(exist_ok=True)
    return False


def _run_all(folder: Path, plan: Plan, units: list[list[Span]], workers: int, progress: bool) -> list[UnitRecord]:
    """Do every unit that has no record yet, then those that the final threshold changes."""
    threshold = int(plan.validation_fraction * 2**64)
    records: dict[int, UnitRecord] = {}
    for number in range(len(units)):
        with contextlib.suppress(FileNotFoundError):
            text = (folder / WORK / f"{number:05d}.json").read_text(encoding="utf-8")
            records[number] = from_dict(UnitRecord, json.loads(text))
    todo = [number for number in range(len(units)) if number not in records]
    records |= _run(folder, plan, units, todo, threshold, workers, progress)
    hashes = [h for r in records.values() for h in (r.lowest, r.highest) if h is not None]
    if hashes and plan.validation_fraction:
        lowest, highest = min(hashes), max(hashes)
        if lowest == highest:
            threshold = 0
        elif not lowest < threshold <= highest:  # every document on one side: move the nearest one to the other
            threshold = lowest + 1 if threshold <= lowest else highest
        changed = [
            number
            for number, r in records.items()
            if r.lowest is not None and r.highest is not None and r.threshold != threshold
            and r.highest >= min(r.threshold, threshold) and r.lowest < max(r.threshold, threshold)
        ]  # fmt: skip
        records |= _run(folder, plan, units, sorted(changed), threshold, workers, progress=False)
    return [records[number] for number in range(len(units))]


def _run(
    folder: Path, plan: Plan, units: list[list[Span]], todo: list[int], threshold: int, workers: int, progress: bool
) -> dict[int, UnitRecord]:
    """Records of the units `todo`, done in this process if one worker is enough, otherwise in several."""
    from tqdm import tqdm

    sizes = [sum(span.bytes for span in unit) for unit in units]
    done = sum(sizes) - sum(sizes[number] for number in todo)
    bar = tqdm(total=sum(sizes), initial=done, unit="B", unit_scale=True, desc="preparing", disable=not (progress and todo))
    with bar:
        if min(workers, len(todo)) <= 1:
            tokenizer = load_tokenizer(folder)

            def advance(count: int) -> None:
                bar.update(count)

            return {n: run_unit(n, units[n], plan, folder, tokenizer, threshold, advance) for n in todo}
        return _run_in_processes(folder, plan, units, todo, threshold, workers, bar)


def _run_in_processes(
    folder: Path, plan: Plan, units: list[list[Span]], todo: list[int], threshold: int, workers: int, bar: Any
) -> dict[int, UnitRecord]:
    context = multiprocessing.get_context("spawn")  # a fork of a process that uses jax, which has threads, may hang
    read, stop = context.Value("q", 0), context.Value("b", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(todo)), context, _start_worker, (folder, plan, threshold, read, stop)
    )
    try:
        futures = {pool.submit(_work, number, units[number]): number for number in todo}
        waiting, shown = set(futures), 0
        while waiting:
            finished, waiting = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                future.result()
            now = read.value  # once: the workers go on counting
            bar.update(now - shown)
            shown = now
        return {number: future.result() for future, number in futures.items()}
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended unexpectedly (out of memory? or, in a script, no `if __name__ == '__main__':`). "
            "Run the same command again to continue"
        ) from error
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(folder: Path, plan: Plan, threshold: int, read: Any, stop: Any) -> None:
    """Set up a worker process: it leaves Ctrl-C to its parent and ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker.update(folder=folder, plan=plan, threshold=threshold, read=read, stop=stop, tokenizer=load_tokenizer(folder))


def _work(number: int, unit: list[Span]) -> UnitRecord:
    unreported = 0

    def report() -> None:
        if _worker["stop"].value:
            raise InterruptedError("stopped by the main process")
        with _worker["read"].get_lock():
            _worker["read"].value += unreported

    def advance(count: int) -> None:
        nonlocal unreported
        unreported += count
        if unreported > 100_000:  # not for every line: the lock is shared
            report()
            unreported = 0

    w = _worker
    record = run_unit(number, unit, w["plan"], w["folder"], w["tokenizer"], w["threshold"], advance)
    report()
    return record


def _manifest_json(plan: Plan, tokenizer: Tokenizer, units: list[list[Span]], records: list[UnitRecord]) -> str:
    """The manifest of a finished folder. DataError if there is not a single document."""
    skipped = sum(record.skipped for record in records)
    examples: list[str] = []
    lines_before: dict[int, int] = {}
    for unit, record in zip(units, records, strict=True):
        by_span: dict[int, list[tuple[int, str]]] = {}
        for index, line, why in record.examples:
            by_span.setdefault(index, []).append((line, why))
        for index, span in enumerate(unit):
            before = lines_before.get(span.input, 0)
            name = Path(plan.inputs[span.input].path).name
            for line, why in by_span.get(index, []):
                examples.append(f"{name}, line {before + line}: {why}" if line else f"{name}: {why}")
            lines_before[span.input] = before + record.lines[index]
    if all(record.lowest is None for record in records):
        why = f" {skipped} lines or files were skipped: " + "; ".join(examples[:3]) if skipped else ""
        raise DataError(f"the input contains no documents.{why}")
    shards = {split: [r.shards[split] for r in records if split in r.shards] for split in SPLITS}
    splits = Splits(**{name: tuple(from_dict(Shard, s) for s in found) for name, found in shards.items()})
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        tokenizer_name=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_ids=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        dtype=token_dtype(tokenizer.vocab_size).name,
        plan=plan.hash,
        inputs=tuple(Path(source.path).name for source in plan.inputs),
        skipped_lines=skipped,
        skipped_examples=tuple(examples[:EXAMPLES]),
        empty_documents=sum(record.empty for record in records),
        splits=splits,
    )
    return json.dumps(dataclasses.asdict(manifest), indent=1)
