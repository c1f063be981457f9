"""Folders that are found complete and unchanged, or not used: checksums, flushing to the disk, atomic rename."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
"""Size and SHA-256 of every other file of the folder."""

logger = logging.getLogger(__name__)


def _files(folder: Path) -> list[Path]:
    """Every file below `folder` but the checksums."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)


def _digests(folder: Path, known: Mapping[str, list[Any]] | None = None) -> dict[str, list[Any]]:
    """File name -> [bytes, SHA-256] of every file below `folder`; those that are `known` are not read."""

    def digest(path: Path) -> list[Any]:
        if known and str(path.relative_to(folder)) in known:
            return known[str(path.relative_to(folder))]
        with open(path, "rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]

    files = _files(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(digest, files)
        return {str(path.relative_to(folder)): value for path, value in zip(files, digests, strict=True)}


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Delete a folder, though writes that a failed save left running may add to it meanwhile."""
    if folder.is_symlink():  # what it points to is not ours
        folder.unlink()
    end = time.monotonic() + 2
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > end:
            logger.warning("could not delete %s", folder)
            return


def seal(folder: Path, known: Mapping[str, list[Any]] | None = None) -> None:
    """Write the checksums of a finished folder; afterwards everything in it is on the disk.

    `known` holds [bytes, SHA-256] of files by name, taken while they were written.
    """
    (folder / CHECKSUMS).write_text(json.dumps(_digests(folder, known), indent=1))
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def publish(source: Path, target: Path) -> None:
    """Rename atomically, and make the rename last."""
    os.rename(source, target)
    sync(target.parent)


def problem_with(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is as it was written."""
    try:
        expected, found = json.loads((folder / CHECKSUMS).read_text()), _digests(folder)
        for name, (size, digest) in expected.items():
            if name not in found:
                return f"{folder / name} is missing"
            if found[name][0] != size:
                return f"{folder / name} has {found[name][0]} bytes instead of {size}"
            if found[name][1] != digest:
                return f"the contents of {folder / name} have changed"
        for name in found:
            if name not in expected:
                return f"{folder / name} is not among those that {folder / CHECKSUMS} lists"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{folder / CHECKSUMS} or a file it lists cannot be read ({error})"
    return None
