"""Whether the files that a run reads are still those it began with."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bm_jax.data.errors import DataError
from bm_jax.data.shards import MANIFEST, check_sums, verify, write_durably

RECORD = "data_files.json"
"""In the run directory: size and time of change of every file, and the SHA-256 of manifests and of small files of no folder."""
SMALL = 2**24
"""Bytes up to which a file that belongs to no prepared folder is summed."""

Seen = list[int | str]


class DataWatch:
    """The data files of one run directory.

    A file that differs in size or time of change from the record counts as changed, unless the record has its SHA-256 and that
    is the same. Where it belongs to a prepared folder whose manifest is the recorded one, the folder is verified, so that a
    copy of the same data does as well. The sums of all other prepared folders are checked in the background, as bits that
    rotted leave size and time as they were.
    """

    def __init__(self, files: Iterable[Path], directory: Path) -> None:
        self._files, self._record = sorted(set(files)), directory / RECORD
        self._rotten: Exception | None = None

    def begin(self) -> None:
        """Compare with the record of the run, or make it.

        Raises:
            DataError: a file is not what it was, or the record is damaged.
        """
        before = self._recorded()
        self._begun = now = {path: seen(path) for path in self._files}
        touched = [path for path in self._files if str(path) in before and before[str(path)][:2] != now[path][:2]]
        changed = [path for path in touched if len(now[path]) == 2 or before[str(path)][2:] != now[path][2:]]
        folders = {path.parent for path in self._files if (path.parent / MANIFEST).is_file()}
        if others := [path for path in changed if path.name == MANIFEST or path.parent not in folders]:
            raise self._changed(others[0])
        suspects = {path.parent for path in changed}
        for folder in sorted(suspects):
            verify(folder)
        record = {str(path): value for path, value in now.items()}
        if before != record:
            write_durably(self._record, json.dumps(record, indent=1) + "\n")
        threading.Thread(target=self._check_sums, args=(sorted(folders - suspects),), daemon=True).start()

    def check(self) -> None:
        """Look whether a file has changed since `begin`, and what reading the folders has shown so far.

        Raises:
            DataError: it has, or a file is not what its manifest says.
        """
        for path in self._files:
            begun = self._begun[path]
            if seen(path, sums=False) != begun[:2] and (len(begun) == 2 or seen(path)[2:] != begun[2:]):
                raise self._changed(path)
        if self._rotten is not None:
            raise self._rotten

    def _check_sums(self, folders: list[Path]) -> None:
        try:
            for folder in folders:
                check_sums(folder)
        except (DataError, OSError) as error:
            self._rotten = error

    def _recorded(self) -> dict[str, Seen]:
        if not self._record.exists():
            return {}
        try:
            before: Any = json.loads(self._record.read_text(encoding="utf-8"))
            if not (isinstance(before, dict) and all(isinstance(value, list) and len(value) > 1 for value in before.values())):
                raise ValueError("it is no table of files")
        except ValueError as error:
            raise DataError(
                f"{self._record}, which says what data this run began with, is damaged ({error}). If the data are still the "
                "same, delete it"
            ) from None
        return before

    def _changed(self, path: Path) -> DataError:
        return DataError(
            f"{path} is not the file that this run began with (its size or time of change differs). Restore it and run the "
            "same command again: what was read since the last checkpoint is read again. If it holds the same data, delete "
            f"{self._record}; for other data use another run.directory"
        )


def seen(path: Path, *, sums: bool = True) -> Seen:
    """Size and time of change of a file, zeros if there is none; the SHA-256 of manifests and small files of no folder."""
    try:
        found = os.stat(path)
        alone = found.st_size <= SMALL and not (path.parent / MANIFEST).is_file()
        own = [hashlib.sha256(path.read_bytes()).hexdigest()] if sums and (path.name == MANIFEST or alone) else []
    except FileNotFoundError:
        return [0, 0]
    return [found.st_size, found.st_mtime_ns, *own]
