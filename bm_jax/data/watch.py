"""Whether the files that a run reads are still those it began with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from bm_jax.data.errors import DataError
from bm_jax.data.shards import MANIFEST, verify, write_durably

RECORD = "data_files.json"
"""In the run directory: size and time of change of every file, and the SHA-256 of manifests."""


class DataWatch:
    """The data files of one run directory.

    A file that differs in size or time of change from the record counts as changed. Where it belongs to a prepared folder whose
    manifest is the recorded one, the folder is verified, so that a copy of the same data does as well.
    """

    def __init__(self, files: Iterable[Path], directory: Path) -> None:
        self._files, self._record = sorted(set(files)), directory / RECORD

    def begin(self) -> None:
        """Compare with the record of the run, or make it.

        Raises:
            DataError: a file is not what it was.
        """
        now = {str(path): seen(path) for path in self._files}
        before = json.loads(self._record.read_text()) if self._record.exists() else {}
        changed = [path for path in now if path in before and before[path] != now[path]]
        if manifests := [path for path in changed if path.endswith(MANIFEST) and before[path][2:] != now[path][2:]]:
            raise self._changed(manifests[0])
        folders = {Path(path).parent for path in changed if (Path(path).parent / MANIFEST).is_file()}
        if others := [path for path in changed if Path(path).parent not in folders]:
            raise self._changed(others[0])
        for folder in sorted(folders):
            verify(folder)
        if before != now:
            write_durably(self._record, json.dumps(now, indent=1) + "\n")

    def check(self) -> None:
        """Look whether a file has changed since `begin`.

        Raises:
            DataError: it has.
        """
        record = json.loads(self._record.read_text()) if self._files else {}
        for path in self._files:
            if seen(path, sums=False)[:2] != record[str(path)][:2]:
                raise self._changed(str(path))

    def _changed(self, path: str) -> DataError:
        return DataError(
            f"{path} is not the file that this run began with (its size or time of change differs). Restore it and run the "
            "same command again: what was read since the last checkpoint is read again. If it holds the same data, delete "
            f"{self._record}; for other data use another run.directory"
        )


def seen(path: Path, *, sums: bool = True) -> list[int | str]:
    """Size and time of change of a file, and of a manifest its SHA-256; zeros where there is none."""
    try:
        found = os.stat(path)
        own = [hashlib.sha256(path.read_bytes()).hexdigest()] if sums and path.name == MANIFEST else []
    except FileNotFoundError:
        return [0, 0]
    return [found.st_size, found.st_mtime_ns, *own]
