"""Tokenizers: bytes, built in, and any `tokenizer.json`.

`load_tokenizer("byte")` needs nothing; `load_tokenizer(path)` reads a `tokenizer.json` (or the folder that holds one)
through the `tokenizers` library. Both offer the same few methods, know their end-of-document id and have a fingerprint,
which is recorded with prepared data and checked whenever that data is opened.

Text is text: a document that spells out `<|endoftext|>` gets the ids of those characters, never the special id, so the
end-of-document id occurs only where a document ends.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bm_jax.data.errors import DataError

FILE_NAME = "tokenizer.json"
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
PIECE_CHARACTERS = 16_000
"""A long document is encoded in pieces of about this many characters: encoding time grows faster than length."""
_LINE_BREAK = re.compile(r"(?<=\S\n)(?=\S)")


class Tokenizer(abc.ABC):
    """Text to ids and back. Ids are 0 .. `vocab_size - 1`; `end_of_document` is one of them."""

    name: str
    vocab_size: int
    """Number of ids, special ones and gaps included: the smallest embedding that fits."""
    end_of_document: int
    fingerprint: str
    """SHA-256 (hex) of the definition; equal for tokenizers that give the same ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-document id."""
        return self.encode_batch([text])[0].tolist()

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as an int32 array [length]; the same as `encode` one by one, but faster."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special ids give no text; bytes that are not UTF-8 give U+FFFD.

        Raises:
            DataError: an id is outside 0 .. `vocab_size - 1`.
        """
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"cannot decode id {i}: tokenizer {self.name!r} has ids 0 to {self.vocab_size - 1}")
        return self._decode(checked)

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _definition(self) -> str:
        """Content of the `tokenizer.json` that gives this tokenizer back."""

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `directory/tokenizer.json`; `load_tokenizer(directory)` gives an equal tokenizer."""
        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{FILE_NAME}.{os.getpid()}.partial")
        temporary.write_text(self._definition(), encoding="utf-8")
        os.replace(temporary, path)
        return path


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are ids 0..255, the end of a document is 256."""

    name = "byte"
    vocab_size = 257
    end_of_document = 256
    fingerprint = hashlib.sha256(b'{"type": "byte"}').hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def _definition(self) -> str:
        return '{"type": "byte"}'


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` run by the `tokenizers` library, without its post-processor (no BOS or EOS is added)."""

    def __init__(self, definition: str, name: str) -> None:
        import tokenizers

        self.name = name
        self._text = definition
        try:
            values = json.loads(definition)
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name} is not a tokenizer.json that the tokenizers library can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        found = [vocabulary[end] for end in END_OF_DOCUMENT_NAMES if end in vocabulary]
        if not found:
            raise DataError(
                f"{name} has no end-of-document token: looked for {', '.join(END_OF_DOCUMENT_NAMES)}. "
                "Add one of them to its added_tokens"
            )
        self.end_of_document = found[0]
        for irrelevant in ("truncation", "padding"):
            values.pop(irrelevant, None)
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self._divisible = _divisible_at_line_breaks(self._tokenizer, values)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See the base class. A document of more than about 16,000 characters is encoded in pieces.

        It is cut only after a single line break between two characters that are not white space, and only when the
        pre-tokenizer is seen to separate there anyway, so the ids are those of encoding it whole. Tokenizers of which
        this is not so (SentencePiece-like ones, whose first piece differs) encode every document whole.
        """
        pieces: list[str] = []
        counts: list[int] = []
        for text in texts:
            parts = cut_at_line_breaks(text, PIECE_CHARACTERS) if self._divisible else [text]
            pieces += parts
            counts.append(len(parts))
        encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        arrays, position = [], 0
        for count in counts:
            ids = [np.asarray(e.ids, np.int32) for e in encodings[position : position + count]]
            arrays.append(ids[0] if count == 1 else np.concatenate(ids))
            position += count
        return arrays

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _definition(self) -> str:
        return self._text


def cut_at_line_breaks(text: str, characters: int) -> list[str]:
    """`text` in consecutive parts of at least `characters` (the last may be shorter), cut after lone line breaks."""
    parts, start = [], 0
    while len(text) - start > characters:
        found = _LINE_BREAK.search(text, start + characters)
        if found is None:
            break
        parts.append(text[start : found.start()])
        start = found.start()
    return [*parts, text[start:]]


def _divisible_at_line_breaks(tokenizer: Any, definition: dict[str, Any]) -> bool:
    """Whether the ids of `a + "\\n" + b` are always those of `a + "\\n"` followed by those of `b`.

    Asked of the definition (a byte-level pre-tokenizer that adds no space, a normalizer that is at most Unicode
    normalization) and of the pre-tokenizer itself, for every pair out of a set of neighbouring characters.
    """

    def steps(entry: Any, key: str) -> list[dict[str, Any]]:
        if not entry:
            return []
        return [s for inner in entry[key] for s in steps(inner, key)] if entry["type"] == "Sequence" else [entry]

    pre = steps(definition.get("pre_tokenizer"), "pretokenizers")
    normalizers = steps(definition.get("normalizer"), "normalizers")
    if not any(step["type"] == "ByteLevel" for step in pre) or any(step.get("add_prefix_space") for step in pre):
        return False
    if any(step["type"] not in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase") for step in normalizers):
        return False

    def split(text: str) -> list[str]:
        return [token for token, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    probes = ("a", "Z", "7", "12345", ".", "'s", "'", "é", "中", "𝄞", "x,", "(", "_", "a b", "...", "\u0301")
    return all(split(f"{a}\n{b}") == split(f"{a}\n") + split(b) for a in probes for b in probes)


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The built-in tokenizer `byte`, or the one defined by a `tokenizer.json` or the folder that holds it.

    Raises:
        DataError: (a ConfigError) there is no such file or it cannot be used; the message says what to do.
    """
    if str(name_or_path) == "byte":
        return ByteTokenizer()
    path = Path(name_or_path)
    if path.is_dir():
        path /= FILE_NAME
    try:
        definition = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"there is no tokenizer at {path}. Give `byte` (built in), the path of a tokenizer.json, or a folder that "
            "contains one"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a tokenizer.json: it is not UTF-8 text ({error})") from None
    try:
        values = json.loads(definition)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not a tokenizer.json: it is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a tokenizer.json: expected a JSON object, found {type(values).__name__}")
    if values == {"type": "byte"}:
        return ByteTokenizer()
    return JsonTokenizer(definition, str(path))
