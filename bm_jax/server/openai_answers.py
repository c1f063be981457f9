"""What the server says, in the words of OpenAI's API: whole answers, pieces of streams, log-probabilities, usage."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from bm_jax.completion import Completion, Detokenizer, TokenLogprob
from bm_jax.data.tokenizer import ByteTokenizer, Tokenizer
from bm_jax.server.openai_api import Generation

FINISH = {"stop": "stop", "end": "stop", "length": "length"}
DONE = b"data: [DONE]\n\n"


def dump(values: Any) -> bytes:
    """JSON as UTF-8; half characters, which only a client's own words can bring, as JSON's escapes."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "backslashreplace")


def server_sent(values: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + dump(values) + b"\n\n"


class Answer:
    """The words for one request's answer, as a whole or piece by piece.

    Args:
        generation: the request, its prompts as ids.
        model: the name that clients know.
    """

    def __init__(self, generation: Generation, model: str, tokenizer: Tokenizer) -> None:
        self._generation, self._tokenizer = generation, tokenizer
        self._prompt_tokens = sum(map(len, generation.prompts))
        chat = generation.chat
        kind = ("chat.completion.chunk" if generation.stream else "chat.completion") if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._spoken = [_Spoken(tokenizer, prompt) for prompt in generation.prompts for _ in range(generation.n)]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer with every choice."""
        choices = []
        for index, completion in enumerate(completions):
            text: dict[str, Any] = {"text": completion.text}
            if self._generation.chat:
                text = {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
            logprobs = self._logprobs(index, completion.tokens, completion.logprobs)
            choices.append({"index": index, **text, "logprobs": logprobs, "finish_reason": FINISH[completion.finish_reason]})
        return self._head | {"choices": choices, "usage": self._usage(sum(len(c.tokens) for c in completions))}

    def opening(self) -> list[bytes]:
        """What a stream begins with: in a chat, who speaks."""
        if not self._generation.chat:
            return []
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(index, delta, None, None) for index in range(len(self._spoken))]

    def piece(
        self,
        index: int,
        text: str,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob] | None,
        completion: Completion | None,
    ) -> bytes:
        """What a stream says when text of a choice has become certain (maybe none), or when it is complete."""
        said = self._logprobs(index, tokens, logprobs) if tokens else None
        finish = None if completion is None else FINISH[completion.finish_reason]
        if not text and said is None and finish is None:
            return b""
        if not self._generation.chat:
            return self._chunk(index, {"text": text}, said, finish)
        chunk = self._chunk(index, {"delta": {"content": text}}, said, None) if text or said else b""
        return chunk + (self._chunk(index, {"delta": {}}, None, finish) if finish else b"")

    def closing(self, completion_tokens: int) -> bytes:
        """What a stream ends with."""
        if not self._generation.include_usage:
            return DONE
        return server_sent(self._head | {"choices": [], "usage": self._usage(completion_tokens)}) + DONE

    def _chunk(self, index: int, text: dict[str, Any], logprobs: Any, finish: str | None) -> bytes:
        choice = {"index": index, **text, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._generation.include_usage else {}
        return server_sent(self._head | {"choices": [choice]} | usage)

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        prompt = self._prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt + completion_tokens,
        }

    def _logprobs(self, index: int, tokens: Sequence[int], said: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if said is None:
            return None
        if self._generation.chat:
            content = [
                self._entry(token, one.logprob) | {"top_logprobs": [self._entry(*pair) for pair in one.top]}
                for token, one in zip(tokens, said, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [token_text(self._tokenizer, token) for token in tokens],
            "token_logprobs": [one.logprob for one in said],
            # As OpenAI does, with the token drawn among them.
            "top_logprobs": [
                {token_text(self._tokenizer, i): value for i, value in (*one.top, (token, one.logprob))}
                for token, one in zip(tokens, said, strict=True)
            ],
            "text_offset": [self._spoken[index].offset(token) for token in tokens],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        whole = token_bytes(self._tokenizer, token)
        return {
            "token": token_text(self._tokenizer, token),
            "logprob": logprob,
            "bytes": None if whole is None else list(whole),
        }


class _Spoken:
    """Where in the text of a choice its tokens begin."""

    def __init__(self, tokenizer: Tokenizer, prompt: Any) -> None:
        self._tokenizer, self._detokenizer, self._length = tokenizer, Detokenizer(tokenizer, prompt), 0

    def offset(self, token: int) -> int:
        """Characters before this token; of a token that is a part of a character, before that character."""
        settled, own = self._detokenizer.push([token]), self._tokenizer.decode([token])
        before, self._length = self._length, self._length + len(settled)
        whole = "\ufffd" not in own and settled.endswith(own)
        return self._length - len(own) if whole else before


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    """The bytes that an id stands for; None where it stands for no text, or the tokenizer does not tell."""
    if isinstance(tokenizer, ByteTokenizer) and token < 256:
        return bytes([token])
    text = tokenizer.decode([token])
    return text.encode() if text and "\ufffd" not in text else None


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of an id, or `token_id:7` for one that is a part of a character or no text, so that names stay apart."""
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else f"token_id:{token}"
