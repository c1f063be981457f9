"""Ids drawn, as text: never a part of a character, up to a stop string, with the model's word on each token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from bm_jax.data.tokenizer import Tokenizer
from bm_jax.sampling import Logprobs, SamplingConfig

Reason = Literal["stop", "length", "end", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt."""

    text: str
    """Without the prompt, without the stop string."""
    tokens: tuple[int, ...]
    """Ids drawn, without the end-of-document id; with finish_reason "stop", up to the one that completed the string."""
    finish_reason: Reason
    """A stop string or token, `max_tokens`, the end-of-document id, or somebody had enough (`bm_jax.engine`)."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of each of `tokens`, where they were asked for."""


class TokenLogprob(NamedTuple):
    """What the model said of one token drawn, before bias, penalties and temperature."""

    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...]
    """The most likely ids with theirs, best first."""


class Detokenizer:
    """Ids to text bit by bit, never handing out a part of a character.

    `push` returns the text that no later id can change; what it returned, followed by `flush`, is the text of all ids.
    """

    CONTEXT = 8
    """Ids kept for what is decoded next: some tokenizers decode a first id differently."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-self.CONTEXT :])
        text = tokenizer.decode(self._ids)
        # A prompt may end with U+FFFD itself, which is no part of a character then.
        whole = _settled(text) == len(text) or list(tokenizer.encode(text)) == self._ids
        self._done = text if whole else text[: _settled(text)]

    def push(self, ids: Sequence[int]) -> str:
        """Text that `ids` settle."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        settled = _settled(text)
        if settled < len(text) and not text[:settled].startswith(self._done):
            return ""  # a tokenizer that shows a whole run of bytes as broken until its last character is complete
        piece, self._done = text[len(self._done) : settled], text[:settled]
        if len(self._ids) > 4 * self.CONTEXT:
            kept, held = self._tokenizer.decode(self._ids[-self.CONTEXT :]), len(text) - settled
            if text.endswith(kept) and len(kept) > held:
                self._ids, self._done = self._ids[-self.CONTEXT :], kept[: len(kept) - held]
        return piece

    def flush(self) -> str:
        """Text held back: at most a character that was never completed, as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        piece, self._done = text[len(self._done) :], text
        return piece


def _settled(text: str) -> int:
    """Length of `text` without what may be the start of a character: up to three bytes, each shown as U+FFFD."""
    end = len(text)
    while end > max(0, len(text) - 3) and text[end - 1] == "\ufffd":
        end -= 1
    return end


class Writer:
    """Assembles one completion from the ids drawn: text, stop strings, end."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], config: SamplingConfig) -> None:
        self._config, self._end = config, tokenizer.end_of_document
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._held = ""
        self._written: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        """Of `tokens`, and perhaps of some after them, where they are asked for."""
        self.completion: Completion | None = None

    def push(self, ids: Sequence[int], logprobs: Logprobs | None = None) -> str:
        """Take ids drawn (at most what is left of `max_tokens`) and the model's word on each, if asked for.

        Returns the text that is certain now.
        """
        ids = list(ids)
        if logprobs is not None and self._config.logprobs is not None:
            for i in range(len(ids)):
                top = zip(logprobs.top_ids[i].tolist(), logprobs.top[i].tolist(), strict=True)
                likely = tuple(pair for pair in top if pair[1] > -math.inf)[: self._config.logprobs]
                self.logprobs.append(TokenLogprob(float(logprobs.chosen[i]), likely))
        ended = ids[-1] in (self._end, *self._config.stop_tokens) if ids else False
        reason: Literal["end", "stop"] = "end" if ended and ids[-1] == self._end else "stop"
        if ended:
            ids.pop()
        # With stop strings one at a time, to know which id completed one.
        for part in [[i] for i in ids] if self._config.stop else [ids]:
            self.tokens += part
            if self._take(self._detokenizer.push(part)):
                return self._release("stop")
        if not ended and len(self.tokens) < self._config.max_tokens:
            return self._release(None)
        stopped = self._take(self._detokenizer.flush())
        return self._release("stop" if stopped else reason if ended else "length")

    def cancel(self) -> str:
        """Complete it as it is; returns what was held back."""
        return self._release("cancelled")

    def _take(self, text: str) -> bool:
        """Append text to what is held; when that completes a stop string, cut there and say so."""
        self._held += text
        found = [(self._held.find(s) + len(s), self._held.find(s)) for s in self._config.stop if s in self._held]
        if found:
            self._held = self._held[: min(found)[1]]
        return bool(found)

    def _release(self, reason: Reason | None) -> str:
        """Hand out what is held, but for the start of a possible stop string while the completion goes on."""
        keep = 0
        if reason is None:
            for s in self._config.stop:
                keep = max([keep, *(n for n in range(1, len(s)) if self._held.endswith(s[:n]))])
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        self._written.append(text)
        if reason is not None:
            said = None if self._config.logprobs is None else tuple(self.logprobs[: len(self.tokens)])
            self.completion = Completion("".join(self._written), tuple(self.tokens), reason, said)
        return text
