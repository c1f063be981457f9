"""Chats as prompts: the chat template that comes with a model, rendered and turned into ids.

A template is a Jinja program of whoever published the model. It runs in Jinja's sandbox with the settings and functions
that transformers gives it, so the same messages give the same text. Special tokens count only where the template wrote
them: a message that spells one out is text.

Needs jinja2 (the `serve` extra).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bm_jax.config import ConfigError
from bm_jax.data.tokenizer import FILE_NAME, ByteTokenizer, Tokenizer
from bm_jax.server.request_fields import ApiError

FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the model wrote, for training; here its content is simply there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A chat template with the tokenizer that it writes for.

    Args:
        source: of the template.
        tokenizer: of the model.
        named: special tokens by the name that the template knows them by, such as eos_token.
        special: ids of all special tokens by their text.
        ends: ids that end a turn, beside the tokenizer's end of document.

    Raises:
        ConfigError: the template is not one.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        named: Mapping[str, str] | None = None,
        special: Mapping[str, int] | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is wrong in line {error.lineno}: {error.message}") from None
        self._tokenizer, self._named, self._special = tokenizer, dict(named or {}), dict(special or {})
        self._texts = {i: text for text, i in self._special.items()}
        self.ends = tuple(ends)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._splits = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The chat template of a model directory; None where it has none.

        Raises:
            ConfigError: a file of the directory is damaged.
        """
        config = _read_object(directory / TOKENIZER_CONFIG)
        file = directory / FILE
        source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ConfigError(f"{directory / TOKENIZER_CONFIG}: chat_template must be text")
        named = {name: text for name, value in config.items() if name.endswith("_token") and (text := _content(value))}
        special: dict[str, int] = {}
        if not isinstance(tokenizer, ByteTokenizer):
            added = tokenizers.Tokenizer.from_file(str(directory / FILE_NAME)).get_added_tokens_decoder()
            special = {token.content: i for i, token in added.items() if token.special}
        ends = _read_object(directory / GENERATION_CONFIG).get("eos_token_id")
        found = [*(ends if isinstance(ends, list) else [ends]), special.get(named.get("eos_token", ""))]
        ids = {i for i in found if isinstance(i, int) and 0 <= i < tokenizer.vocab_size}
        return cls(source, tokenizer, named=named, special=special, ends=sorted(ids))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the messages, up to where the model's answer begins.

        Raises:
            ApiError: the template refuses the messages, or fails.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._named)
        except jinja2.TemplateError as error:
            message = f"the chat template refuses the messages: {str(error)[:200]}"
        except Exception as error:  # a template is a program like any other, and may fail in any way
            message = f"the chat template cannot render the messages: {type(error).__name__}"
        raise ApiError(400, message, param="messages")

    def encode(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Ids of the prompt that the messages make.

        Raises:
            ApiError: as in `render`.
        """
        if self._splits is None:
            return tuple(self._tokenizer.encode(self.render(messages)))
        # A special token that a message spells out travels through the template as its id between two marks.
        said = set("".join(text for message in messages for text in message.values()))
        mark = next((chr(i) for i in range(0xE000, 0xF900) if chr(i) not in said), None)
        if mark is None:
            raise ApiError(400, "messages use every private character of Unicode", param="messages")

        def veiled(text: str) -> str:
            assert self._splits is not None
            return self._splits.sub(lambda found: f"{mark}{self._special[found[0]]}{mark}", text)

        text = self.render([{name: veiled(value) for name, value in message.items()} for message in messages])
        ids: list[int] = []
        for part in self._splits.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                plain = re.sub(f"{mark}([0-9]+){mark}", lambda found: self._texts.get(int(found[1]), found[0]), part)
                ids += self._tokenizer.encode(plain)
        return tuple(ids)


def _content(token: Any) -> str | None:
    """The text of a special token, which is written as text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def _to_json(value: Any, **options: Any) -> str:
    """Unlike Jinja's own, without escapes for HTML."""
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
