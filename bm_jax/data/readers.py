"""Text files as documents: which files, how they are divided into units of work, how a unit is read.

A `Span` is part of one file, in that file's own terms: a byte range of .txt and .jsonl, the whole of .jsonl.gz and
.jsonl.zst (they cannot be entered in the middle), a range of row groups of .parquet, a range of rows of a `datasets`
data set. A unit is a list of spans. How spans and units are cut depends on the inputs and two sizes only, so the result
does not depend on who reads them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gzip
import importlib
import io
import itertools
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from bm_jax.data.errors import DataError

SUFFIXES = {".txt": "txt", ".jsonl": "jsonl", ".jsonl.gz": "gz", ".jsonl.zst": "zst", ".parquet": "parquet"}
HUB = "hf:"
CUT_SEARCH_BYTES = 1 << 20
"""How far, in bytes, a cut through a long text file is moved to fall on a paragraph, line, word or character."""


@dataclasses.dataclass(frozen=True)
class Input:
    """One file, or one `datasets` data set."""

    path: str
    """Absolute path, or `hf:NAME?config=C&split=S`."""
    kind: str
    bytes: int
    version: str
    """Changes when the content does: modification time, or the data set's fingerprint."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Part `start` .. `stop` of input number `input`; `bytes` is its share of the work."""

    input: int
    start: int
    stop: int
    bytes: int


class BadText(Exception):
    """One line, row or file cannot be used; the message says why."""


def find_inputs(paths: Sequence[str | os.PathLike[str]]) -> list[Input]:
    """Every file that `paths` name, folders searched recursively, in a fixed order. DataError if there is nothing."""
    inputs: list[Input] = []
    known = ", ".join(SUFFIXES)
    for given in [os.fspath(path) for path in paths]:
        if given.startswith(HUB):
            inputs.append(_hub_input(given))
            continue
        path = Path(given).resolve()
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.is_file() and _kind(p)]
            if not found:
                raise DataError(f"{given} contains no {known} files")
        elif not path.exists():
            hint = f". A data set of the hub is written {HUB}{given}" if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given) else ""
            raise DataError(f"there is no file or folder {given}{hint}")
        elif not _kind(path):
            raise DataError(f"{given} is not a kind of file that can be read; known are {known}")
        else:
            found = [path]
        for file in found:
            status = file.stat()
            inputs.append(Input(str(file), _kind(file), status.st_size, str(status.st_mtime_ns)))
    path, times = collections.Counter(source.path for source in inputs).most_common(1)[0] if inputs else ("", 0)
    if times > 1:
        raise DataError(f"{path} is given {times} times")
    if not inputs:
        raise DataError("no input: give text files, folders of them, or hf:NAME")
    return inputs


def _kind(path: Path) -> str:
    return next((kind for suffix, kind in SUFFIXES.items() if path.name.lower().endswith(suffix)), "")


def plan_units(inputs: Sequence[Input], unit_bytes: int, document_bytes: int) -> list[list[Span]]:
    """Units of about `unit_bytes` of input; documents of text files have about `document_bytes` at most (0: any)."""
    units: list[list[Span]] = []
    size = unit_bytes
    for number, source in enumerate(inputs):
        for span in _spans(number, source, unit_bytes, document_bytes):
            if size >= unit_bytes:
                units.append([])
                size = 0
            units[-1].append(span)
            size += span.bytes
    return units


def _spans(number: int, source: Input, unit_bytes: int, document_bytes: int) -> Iterator[Span]:
    if source.kind == "txt" and document_bytes and source.bytes > document_bytes:
        cuts = _text_cuts(source, document_bytes)
        yield from (Span(number, a, b, b - a) for a, b in itertools.pairwise(cuts))
    elif source.kind == "jsonl":
        cuts = [*range(0, source.bytes, unit_bytes), source.bytes]
        yield from (Span(number, a, b, b - a) for a, b in itertools.pairwise(cuts))
    elif source.kind == "parquet":
        import pyarrow.parquet

        try:
            metadata = pyarrow.parquet.read_metadata(source.path)
        except Exception as error:  # pyarrow has several unrelated exception types for a damaged file
            raise DataError(f"{source.path} is not a readable parquet file: {error}") from error
        for group in range(metadata.num_row_groups):
            yield Span(number, group, group + 1, metadata.row_group(group).total_byte_size)
    elif source.kind == "hub":
        rows = len(_hub_data(source.path))
        step = max(1, rows * unit_bytes // max(source.bytes, 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield Span(number, start, stop, (stop - start) * source.bytes // max(rows, 1))
    elif source.bytes:
        yield Span(number, 0, source.bytes, source.bytes)


def _text_cuts(source: Input, document_bytes: int) -> list[int]:
    """Offsets that divide a text file: after the first blank line past every multiple, else line break, else space."""
    cuts = [0]
    with open(source.path, "rb") as file:
        while source.bytes - cuts[-1] > document_bytes:
            position = cuts[-1] + document_bytes
            file.seek(position)
            ahead = file.read(CUT_SEARCH_BYTES)
            found = next((m for p in (rb"\n\s*\n", rb"\n", rb" ") if (m := re.search(p, ahead))), None)
            if found is None:
                found = re.search(rb"(?=[\x00-\x7f\xc0-\xff])", ahead)  # the start of a character
            if found is None or position + found.end() >= source.bytes:
                break
            cuts.append(position + found.end())
    return [*cuts, source.bytes]


def read_span(
    source: Input, span: Span, field: str, advance: Callable[[int], None]
) -> Iterator[tuple[int, str | BadText | None]]:
    """The documents of a span, in order, each with its line or row number counted from 1 at the span's start.

    BadText in place of the text of a line that cannot be used, None for a blank line; number 0 is the whole span.
    `advance(bytes)` is called for what was read. Raises DataError when the file as a whole cannot be read further.
    """
    if source.kind == "txt":
        yield 0, _read_text(source, span)
        advance(span.bytes)
        return
    records = {"parquet": _parquet_rows, "hub": _hub_rows}.get(source.kind, _json_lines)
    for number, record in enumerate(records(source, span, field, advance), start=1):
        try:
            text = _json_text(record, field) if isinstance(record, bytes) else _checked(record, field)
        except BadText as error:
            yield number, error
        else:
            yield number, text


def _read_text(source: Input, span: Span) -> str | BadText:
    with open(source.path, "rb") as file:
        file.seek(span.start)
        data = file.read(span.stop - span.start)
    try:
        return data.decode("utf-8-sig" if span.start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {span.start + error.start:,}"
        return BadText(f"not UTF-8 text at {where} ({error.reason}); convert the file, for example with iconv")


def _json_text(line: bytes, field: str) -> str | None:
    """The text of one JSON line; None for a blank line."""
    if not line.strip():
        return None
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadText(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise BadText(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadText(f"expected a JSON object, found {type(value).__name__}")
    if field not in value:
        raise BadText(f"no field {field!r}; it has {', '.join(map(repr, list(value)[:8])) or 'none'}")
    return _checked(value[field], field)


def _checked(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise BadText(f"field {field!r} is {type(text).__name__}, not text")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadText(f"field {field!r} contains half a surrogate pair") from None
    return text


def _json_lines(source: Input, span: Span, _field: str, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The lines that begin inside the span."""
    try:
        with open(source.path, "rb") as raw:
            lines = _decompressed(source, raw)
            if source.kind != "jsonl":
                done = 0
                for line in lines:
                    advance(raw.tell() - done)
                    done = raw.tell()
                    yield line
                advance(source.bytes - done)
                return
            position = span.start
            if position:  # the line that crosses the start belongs to the span before
                raw.seek(position - 1)
                position += len(raw.readline()) - 1
                advance(min(position, span.stop) - span.start)
            while position < span.stop and (line := raw.readline()):
                position += len(line)
                advance(min(position, span.stop) - max(position - len(line), span.start))
                yield line
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {source.path}: {error}. It is damaged or incomplete; replace or remove it") from error


def _decompressed(source: Input, raw: BinaryIO) -> BinaryIO:
    if source.kind == "gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if source.kind == "zst":
        import zstandard

        return io.BufferedReader(_ZstdReader(zstandard, raw, source.path), 1 << 20)
    return raw


class _ZstdReader(io.RawIOBase):
    """A Zstandard stream that raises OSError when it is damaged or ends early, which the library's reader hides."""

    def __init__(self, zstandard: Any, raw: BinaryIO, path: str) -> None:
        self._error, self._raw, self._path = zstandard.ZstdError, raw, path
        self._make = zstandard.ZstdDecompressor
        self._frame, self._ready, self._inside = self._make().decompressobj(), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._raw.read(1 << 17)
            if not data:
                if self._inside:
                    raise OSError("the compressed data ends in the middle")
                return 0
            while data:
                try:
                    self._ready += self._frame.decompress(data)
                except self._error as error:
                    raise OSError(str(error)) from error
                self._inside, data = not self._frame.eof, self._frame.unused_data
                if not self._inside:
                    self._frame = self._make().decompressobj()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _parquet_rows(source: Input, span: Span, field: str, advance: Callable[[int], None]) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(map(repr, file.schema_arrow.names[:8]))
                raise DataError(f"{source.path} has no column {field!r}; it has {names}. Choose one with --text-field")
            for batch in file.iter_batches(1024, row_groups=list(range(span.start, span.stop)), columns=[field]):
                yield from batch.column(0).to_pylist()
    except DataError:
        raise
    except Exception as error:  # pyarrow has several unrelated exception types for a damaged file
        raise DataError(f"cannot read {source.path}: {error}. It is damaged; replace or remove it") from error
    advance(span.bytes)


@functools.lru_cache(maxsize=4)
def _hub_data(name: str) -> Any:
    """The `datasets` data set that `hf:NAME?config=C&split=S` names; NAME may also be a local folder."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(f"{name} needs the package `datasets`: pip install 'blackmamba-jax[hub]'") from None
    name, _, query = name.removeprefix(HUB).partition("?")
    options = dict(urllib.parse.parse_qsl(query))
    unknown = set(options) - {"config", "split"}
    if unknown:
        raise DataError(f"hf:{name}?{query} has the option {min(unknown)!r}; known are config and split")
    if os.path.isfile(os.path.join(name, "state.json")):
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name, options.get("config"), split=options.get("split", "train"))


def _hub_input(name: str) -> Input:
    data = _hub_data(name)
    return Input(name, "hub", int(data.data.nbytes), str(data._fingerprint))


def _hub_rows(source: Input, span: Span, field: str, advance: Callable[[int], None]) -> Iterator[Any]:
    data = _hub_data(source.path)
    if field not in data.column_names:
        raise DataError(f"{source.path} has no column {field!r}; it has {', '.join(data.column_names)}")
    for start in range(span.start, span.stop, 1024):
        stop = min(start + 1024, span.stop)
        yield from data[start:stop][field]
        advance(span.bytes * (stop - start) // (span.stop - span.start))
