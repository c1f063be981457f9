"""Prepared data on disk: token shards, their manifest, and the checks made when they are opened.

A prepared folder holds

    manifest.json           what follows, see `Manifest`; written last, so a folder without it is unfinished
    tokenizer.json          the tokenizer; `load_tokenizer(folder)` gives it back
    train-00000.tokens      ids, little-endian uint16 (uint32 from 65,537 ids on), documents end to end
    train-00000.ends        exclusive end of each document in that file, little-endian uint64
    validation-00000.tokens, validation-00000.ends, ...

Every document lies whole in one shard and ends with the end-of-document id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bm_jax.config import ConfigError, from_dict
from bm_jax.data.errors import DataError
from bm_jax.data.stream import FileNumbers, Piece, TokenStream
from bm_jax.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
FORMAT = "bm_jax tokens"
VERSION = 1
SPLITS = ("train", "validation")
ENDS_DTYPE = np.dtype("<u8")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One pair of files, NAME.tokens and NAME.ends."""

    name: str
    tokens: int
    documents: int
    max_id: int
    tokens_sha256: str
    ends_sha256: str


@dataclasses.dataclass(frozen=True)
class Splits:
    """The shards of each split, in reading order."""

    train: tuple[Shard, ...] = ()
    validation: tuple[Shard, ...] = ()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json records."""

    format: str
    version: int
    tokenizer_name: str
    tokenizer_fingerprint: str
    tokenizer_ids: int
    end_of_document: int
    dtype: str
    """`uint16` or `uint32`."""
    plan: str
    """SHA-256 (hex) of the inputs and options the folder was made from."""
    inputs: tuple[str, ...]
    skipped_lines: int
    """Lines, rows or files that could not be used."""
    skipped_examples: tuple[str, ...]
    """The first few of them: where and why."""
    empty_documents: int
    splits: Splits

    def tokens(self, split: str) -> int:
        """Tokens in `split`, end-of-document ids included."""
        return sum(shard.tokens for shard in getattr(self.splits, split))

    def documents(self, split: str) -> int:
        """Documents in `split`."""
        return sum(shard.documents for shard in getattr(self.splits, split))


def token_dtype(ids: int) -> np.dtype:
    """The smallest of little-endian uint16 and uint32 that holds `ids` different ids."""
    return np.dtype("<u2" if ids <= 1 << 16 else "<u4")


def write_durably(path: Path, text: str) -> None:
    """Replace `path` by `text` so that after a crash it holds either the old content or the new."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with naming(path), open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as those of writing, gets the name of this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes one shard under temporary names; `finish` gives it its name, so a named shard is always complete."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self._folder, self._name = folder, name
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end_of_document = np.array([tokenizer.end_of_document], self._dtype)
        self._paths = {kind: folder / f"{name}.{kind}.{os.getpid()}.partial" for kind in ("tokens", "ends")}
        self._files: dict[str, Any] = {}
        self._sums = {kind: hashlib.sha256() for kind in self._paths}
        self._tokens = self._documents = 0
        self._max_id = tokenizer.end_of_document

    def add(self, ids: np.ndarray) -> None:
        """Append one document, given without its end-of-document id."""
        if len(ids):
            self._max_id = max(self._max_id, int(ids.max()))
        self._write("tokens", ids.astype(self._dtype))
        self._write("tokens", self._end_of_document)
        self._tokens += len(ids) + 1
        self._documents += 1
        self._write("ends", np.array([self._tokens], ENDS_DTYPE))

    def _write(self, kind: str, values: np.ndarray) -> None:
        if kind not in self._files:
            self._files[kind] = open(self._paths[kind], "wb")  # noqa: SIM115  # closed by finish or close
        data = values.tobytes()
        self._files[kind].write(data)
        self._sums[kind].update(data)

    def finish(self) -> Shard | None:
        """Name the shard and return its record; None, and no files, if it has no documents."""
        if not self._documents:
            return None
        for kind, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._paths[kind], self._folder / f"{self._name}.{kind}")
        sync_folder(self._folder)
        sums = {kind: checksum.hexdigest() for kind, checksum in self._sums.items()}
        return Shard(self._name, self._tokens, self._documents, self._max_id, sums["tokens"], sums["ends"])

    def close(self) -> None:
        """Drop what was not finished; harmless after `finish`."""
        for kind, file in self._files.items():
            file.close()
            self._paths[kind].unlink(missing_ok=True)


def is_prepared(folder: Path) -> bool:
    """Whether `folder` holds finished prepared data."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        DataError: there is none, or it is damaged or of another version.
    """
    path = Path(folder) / MANIFEST
    remedy = "make the folder with `python -m bm_jax.data prepare INPUT... OUT`"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} is not prepared data: there is no {path}. To fix it, {remedy}") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Delete the folder and {remedy}") from None
    found = (values.get("format"), values.get("version")) if isinstance(values, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise DataError(
            f"{path} has format {found[0]!r} version {found[1]!r}; this code reads {FORMAT!r} version {VERSION}. "
            f"To fix it, {remedy} again"
        )
    try:
        manifest = from_dict(Manifest, values, where=str(path))
        if manifest.dtype not in ("uint16", "uint32"):
            raise ConfigError(f"dtype must be uint16 or uint32, got {manifest.dtype!r}")
    except (ConfigError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). Delete the folder and {remedy}") from None
    return manifest


def _require_size(path: Path, expected: int) -> None:
    """DataError unless the file has exactly so many bytes."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing although the manifest lists it. Copy it again or prepare again") from None
    if found != expected:
        problem = "truncated" if found < expected else "too long"
        raise DataError(
            f"{path} is {problem}: the manifest says {expected:,} bytes, found {found:,}. Copy it again or prepare again"
        )


def open_prepared(
    folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> dict[str, TokenStream]:
    """The train and validation streams of a prepared folder; tokens are read as they are asked for.

    Every shard's size is checked, the tokenizer's fingerprint if `tokenizer` is given, and the ids against the
    model's `vocab_size` if that is given.

    Raises:
        DataError: one of these is wrong; the message names the file, expected, found and what to do.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{folder} was prepared with tokenizer {manifest.tokenizer_name!r} (fingerprint "
            f"{manifest.tokenizer_fingerprint[:12]}, {manifest.tokenizer_ids:,} ids), but the configuration has "
            f"{tokenizer.name!r} (fingerprint {tokenizer.fingerprint[:12]}, {tokenizer.vocab_size:,} ids). Set "
            f"data.tokenizer to {'byte' if manifest.tokenizer_name == 'byte' else folder} or prepare the text again"
        )
    if vocab_size is not None and manifest.tokenizer_ids > vocab_size:
        raise DataError(
            f"{folder} uses {manifest.tokenizer_ids:,} token ids, more than model.vocab_size = {vocab_size:,}. "
            f"Set model.vocab_size to at least {manifest.tokenizer_ids:,}"
        )
    limit = vocab_size if vocab_size is not None else manifest.tokenizer_ids
    streams = {}
    for split in SPLITS:
        pieces = []
        for shard in getattr(manifest.splits, split):
            path = folder / f"{shard.name}.tokens"
            dtype = np.dtype(manifest.dtype).newbyteorder("<")
            _require_size(path, shard.tokens * dtype.itemsize)
            _require_size(path.with_suffix(".ends"), shard.documents * ENDS_DTYPE.itemsize)
            ends = np.fromfile(path.with_suffix(".ends"), ENDS_DTYPE)  # not a map, see `FileNumbers`
            if shard.max_id >= limit:
                raise DataError(f"{path} contains token id {shard.max_id}, but the model has ids 0 to {limit - 1}")
            last = int(ends[-1]) if len(ends) else 0
            if last != shard.tokens:
                raise DataError(
                    f"{path.with_suffix('.ends')} is damaged: its last document ends at token {last:,}, "
                    f"expected {shard.tokens:,}. Copy it again or prepare again"
                )
            files = (path, path.with_suffix(".ends"), folder / MANIFEST)
            pieces.append(Piece(FileNumbers(path, dtype, 0, shard.tokens), ends, str(path), files))
        streams[split] = TokenStream(pieces, limit)
    return streams


def check_sums(folder: str | os.PathLike[str]) -> None:
    """Read every byte of a prepared folder's shards and check it against the manifest.

    Raises:
        DataError: names every file that is wrong.
    """
    if problems := _wrong_sums(Path(folder), read_manifest(folder)):
        raise _damaged(folder, problems)


def _wrong_sums(folder: Path, manifest: Manifest) -> list[str]:
    """The files whose SHA-256 is not the recorded one."""
    problems = []
    for shard in (shard for split in SPLITS for shard in getattr(manifest.splits, split)):
        for kind, expected in (("tokens", shard.tokens_sha256), ("ends", shard.ends_sha256)):
            path = folder / f"{shard.name}.{kind}"
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                problems.append(f"{path}: SHA-256 should be {expected[:16]}..., found {found[:16]}...")
    return problems


def _damaged(folder: str | os.PathLike[str], problems: list[str]) -> DataError:
    return DataError(f"{folder} is damaged; copy it again or prepare again:\n  " + "\n  ".join(problems))


def verify(folder: str | os.PathLike[str]) -> Manifest:
    """Read every byte of a prepared folder and check it against the manifest.

    Checks sizes, checksums, that the ids exist, that documents end with the end-of-document id and that the tokenizer
    is the recorded one. Returns the manifest.

    Raises:
        DataError: names every file that is wrong.
    """
    from bm_jax.data.tokenizer import load_tokenizer

    folder = Path(folder)
    manifest = read_manifest(folder)
    open_prepared(folder, load_tokenizer(folder))
    problems = _wrong_sums(folder, manifest)
    for shard in (shard for split in SPLITS for shard in getattr(manifest.splits, split)):
        tokens = np.memmap(folder / f"{shard.name}.tokens", np.dtype(manifest.dtype).newbyteorder("<"), "r")
        ends = np.fromfile(folder / f"{shard.name}.ends", ENDS_DTYPE).astype(np.int64)
        if int(tokens.max()) >= manifest.tokenizer_ids:
            problems.append(f"{shard.name}.tokens: id {int(tokens.max())} of {manifest.tokenizer_ids}")
        last_ids = tokens[np.clip(ends, 1, len(tokens)) - 1]
        if np.any(np.diff(ends, prepend=0) < 1) or np.any(last_ids != manifest.end_of_document):
            problems.append(f"{shard.name}.ends: some documents do not end with id {manifest.end_of_document}")
    if problems:
        raise _damaged(folder, problems)
    return manifest
