"""What a client may ask for, in the words of OpenAI's API: from the bytes of a body to a checked `Generation`.

Fields of that API which ask for what is not offered here are refused, not ignored, unless they hold the value that asks
for nothing (`request_fields.NOTHING_ASKED`). What that API does not have, but this model's sampler does, are `top_k`,
`min_p`, `repetition_penalty` and `stop_token_ids`.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bm_jax.config import ConfigError
from bm_jax.sampling import MOST_ALTERNATIVES, SamplingConfig
from bm_jax.server.request_fields import ApiError, Fields, Limits, check_text, parse_object, show, wrong

if TYPE_CHECKING:
    from bm_jax.server.chat_template import ChatTemplate

MOST_STOPS = 16
LONGEST_STOP = 256
"""In characters: looking for a stop string takes time that grows with its square."""
MOST_BIASES = 1024


@dataclasses.dataclass(frozen=True)
class Served:
    """What requests are checked against."""

    name: str
    """Of the model, as clients ask for it."""
    vocab_size: int
    """Of the tokenizer."""
    room: int | None
    """Tokens that a prompt and its completion may have together, where the model has attention layers."""
    limits: Limits
    chat: ChatTemplate | None = None


@dataclasses.dataclass(frozen=True)
class Generation:
    """A checked request."""

    prompts: tuple[str | tuple[int, ...], ...]
    options: SamplingConfig
    seeded: bool
    """Whether the client chose the seed."""
    n: int
    stream: bool
    include_usage: bool
    user: str
    chat: bool

    def requests(self) -> Iterator[tuple[str | tuple[int, ...], SamplingConfig]]:
        """Prompt and options of every choice: prompt 0 `n` times, with seeds one after another, then prompt 1, ...

        As in `LanguageModel.generate`, each prompt starts from the seed that was given; without one all differ.
        """
        for row, prompt in enumerate(self.prompts):
            for i in range(self.n):
                step = i if self.seeded else row * self.n + i
                yield prompt, dataclasses.replace(self.options, seed=(self.options.seed + step) % 2**32)


def read_completion(body: bytes, served: Served) -> Generation:
    """The request that the body of a POST to /v1/completions makes."""
    fields = Fields(parse_object(body))
    _check_model(fields, served)
    prompts = _read_prompts(fields.take("prompt"), served.vocab_size)
    logprobs = fields.integer("logprobs", None, 0, MOST_ALTERNATIVES)
    max_tokens = fields.integer("max_tokens", min(16, served.limits.max_tokens), 1, served.limits.max_tokens)
    best_of = fields.integer("best_of", None, 1, served.limits.choices)
    generation = _read_common(fields, served, prompts, max_tokens=max_tokens, logprobs=logprobs)
    if best_of not in (None, generation.n):
        raise wrong("best_of", "equal to n", best_of)
    return generation


def read_chat(body: bytes, served: Served) -> Generation:
    """The request that the body of a POST to /v1/chat/completions makes; its prompt is what the chat template writes."""
    if served.chat is None:
        message = f"the model {served.name!r} has no chat template, so it cannot chat: use /v1/completions"
        raise ApiError(404, message, code="no_chat_template")
    fields = Fields(parse_object(body))
    _check_model(fields, served)
    prompt = served.chat.encode(_read_messages(fields.take("messages")))
    limit = served.limits.max_tokens
    asked = [fields.integer(name, None, 1, limit) for name in ("max_completion_tokens", "max_tokens")]
    if None not in asked:
        raise ApiError(400, "give max_completion_tokens or max_tokens, not both", param="max_tokens")
    longest = limit if served.room is None else max(1, min(limit, served.room - len(prompt)))
    wanted, top = fields.boolean("logprobs"), fields.integer("top_logprobs", None, 0, MOST_ALTERNATIVES)
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    max_tokens = next((value for value in asked if value is not None), longest)
    logprobs = (top or 0) if wanted else None
    return _read_common(fields, served, (prompt,), max_tokens=max_tokens, logprobs=logprobs, ends=served.chat.ends)


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.text("model", served.name)
    if name != served.name:
        message = f"there is no model {show(name)} here, only {show(served.name)}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _read_common(
    fields: Fields,
    served: Served,
    prompts: tuple[str | tuple[int, ...], ...],
    *,
    max_tokens: int,
    logprobs: int | None,
    ends: tuple[int, ...] | None = None,
) -> Generation:
    """What both endpoints take. `ends`: ids that end a turn of a chat; None for a plain completion."""
    n = fields.integer("n", 1, 1, served.limits.choices)
    if n * len(prompts) > served.limits.choices:
        message = f"{len(prompts)} prompts times n = {n} are more than the {served.limits.choices} completions allowed"
        raise ApiError(400, message, param="n")
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    stops = [*_read_stop_tokens(fields.take("stop_token_ids"), served.vocab_size), *(ends or ())]
    options: dict[str, Any] = {
        "temperature": fields.number("temperature", 1.0, 0, 2),
        "top_k": None if (k := fields.integer("top_k", 0, -1, 2**31 - 1)) < 1 else k,
        "top_p": None if (p := fields.number("top_p", None, 0, 1)) is None else max(p, 1e-6),  # 0: the most likely
        "min_p": fields.number("min_p", 0.0, 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.01, 100),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2, 2),
        "logit_bias": _read_bias(fields.take("logit_bias"), served.vocab_size),
        "stop": _read_stop(fields.take("stop")),
    }
    stream, usage = fields.boolean("stream"), False
    if (choice := fields.take("stream_options")) is not None:
        if not stream:
            raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
        inner = Fields(choice, "stream_options")
        usage = inner.boolean("include_usage")
        inner.boolean("include_obfuscation")
        inner.end()
    user = fields.text("user", "")
    fields.end()
    try:
        config = SamplingConfig(
            max_tokens=max_tokens,
            logprobs=logprobs,
            seed=secrets.randbelow(2**32) if seed is None else seed % 2**32,
            stop_tokens=tuple(stops),
            **options,
        )
    except ConfigError as error:
        raise ApiError(400, str(error).removeprefix("SamplingConfig.")) from None
    return Generation(prompts, config, seed is not None, n, stream, usage, user, chat=ends is not None)


def _read_prompts(value: Any, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    """A text, texts, ids, or lists of ids."""
    if value is None:
        raise ApiError(400, "prompt is required", param="prompt")
    if isinstance(value, str):
        return (check_text(value, "prompt"),)
    if not isinstance(value, list) or not value:
        raise wrong("prompt", "a string, a list of strings, a list of token ids, or a list of such lists, not empty", value)
    if isinstance(value[0], int):
        return (_read_ids(value, "prompt", vocab_size),)
    return tuple(
        check_text(prompt, f"prompt[{i}]") if isinstance(value[0], str) else _read_ids(prompt, f"prompt[{i}]", vocab_size)
        for i, prompt in enumerate(value)
    )


def _read_ids(values: Any, name: str, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise wrong(name, "a list of token ids", values)
    for i, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise wrong(f"{name}[{i}]", f"a token id from 0 to {vocab_size - 1}", value)
    return tuple(values)


def _read_stop_tokens(values: Any, vocab_size: int) -> tuple[int, ...]:
    ids = () if values is None else _read_ids(values, "stop_token_ids", vocab_size)
    if len(ids) > MOST_STOPS:
        raise wrong("stop_token_ids", f"a list of at most {MOST_STOPS} ids", values)
    return ids


def _read_stop(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > MOST_STOPS:
        raise wrong("stop", f"a string or a list of at most {MOST_STOPS} strings", value)
    for string in strings:
        if not 1 <= len(check_text(string, "stop")) <= LONGEST_STOP:
            raise wrong("stop", f"made of strings of 1 to {LONGEST_STOP} characters", string)
    return tuple(strings)


def _read_bias(value: Any, vocab_size: int) -> dict[int, float]:
    """Token ids as strings, which is all that JSON has for keys, with numbers from -100 to 100."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise wrong("logit_bias", f"an object of at most {MOST_BIASES} token ids and numbers", value)
    bias = {}
    for key, number in value.items():
        if not re.fullmatch("0|[1-9][0-9]{0,9}", key, re.ASCII) or int(key) >= vocab_size:
            raise wrong("logit_bias", f"an object whose keys are token ids from 0 to {vocab_size - 1}", key)
        if not isinstance(number, int | float) or isinstance(number, bool) or not -100 <= number <= 100:
            raise wrong("logit_bias", "an object whose values are numbers from -100 to 100", number)
        bias[int(key)] = float(number)
    return bias


def _read_messages(value: Any) -> list[dict[str, str]]:
    """Messages with a role and text; lists of text parts become one text."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", "a list of messages, not empty", value)
    messages = []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        fields = Fields(message, where)
        role, content, name = fields.text("role"), fields.take("content"), fields.text("name")
        if role not in ("system", "developer", "user", "assistant"):
            raise wrong(f"{where}.role", '"system", "developer", "user" or "assistant"', role)
        # Clients send back whole answers, with fields that are empty there.
        for empty in ("tool_calls", "annotations"):
            if (found := fields.take(empty)) not in (None, []):
                raise wrong(f"{where}.{empty}", "absent or empty: it is not supported", found)
        fields.end()
        if isinstance(content, list) and content:
            content = "\n".join(_read_part(part, f"{where}.content[{j}]") for j, part in enumerate(content))
        if not isinstance(content, str):
            raise wrong(f"{where}.content", "a string or a list of text parts", content)
        messages.append({"role": role, "content": check_text(content, f"{where}.content")} | ({"name": name} if name else {}))
    return messages


def _read_part(value: Any, where: str) -> str:
    fields = Fields(value, where)
    kind, text = fields.text("type"), fields.text("text")
    if kind != "text" or text is None:
        raise wrong(f"{where}.type", 'a part {"type": "text", "text": ...}', kind)
    fields.end()
    return text
