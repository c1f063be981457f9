"""The model as lm-evaluation-harness asks it: `lm_eval --model bm_jax --model_args path=DIR`.

Needs lm_eval (the `evaluate` extra). The harness finds this module by the entry point `lm_eval.models`, in versions that look
for entry points; 0.4.13 does not. With any, `python -m bm_jax.evaluation.harness` takes what `lm_eval` takes.

Answers are handed to the harness's cache as they come (`--use_cache`), so an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from bm_jax.config import ConfigError
from bm_jax.evaluation.scoring import BATCH_TOKENS, Row, Scorer
from bm_jax.language_model import LanguageModel

# The harness would fork processes to estimate errors; in a process where JAX runs threads they may hang.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

MAX_NEW_TOKENS = 256
"""Most tokens generated where a task does not say."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """A `LanguageModel` behind the harness's interface.

    Args:
        path: a model directory, or the directory of a training run.
        scorer: of the model, in place of `path`.
        batch_tokens: tokens scored at once, padding included.
        max_length: most tokens that one is predicted from, as the harness's other models have it: longer contexts lose their
            start, longer documents are cut into windows. None is no limit for a model without attention.
        weights: "int8" or None, as for `LanguageModel`.
        progress: whether bars are shown.
        batch_size: and the two after it mean nothing here; the harness passes them to every model.

    Raises:
        ConfigError: there is no path, or its directory cannot be read.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        scorer: Scorer | None = None,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        weights: Any = None,
        progress: bool = True,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if scorer is None:
            if path is None:
                raise ConfigError("bm_jax: give the model's directory: --model_args path=DIR")
            limit = None if max_length is None else int(max_length)
            scorer = Scorer(LanguageModel.load(str(path), weights=weights), batch_tokens=int(batch_tokens), max_length=limit)
        self.path, self.progress, self.scorer, self.model = path, progress, scorer, scorer.model

    @property
    def eot_token_id(self) -> int:
        """The end-of-document id, which stands before a text without a context."""
        return self.model.tokenizer.end_of_document

    @property
    def tokenizer_name(self) -> str:
        """Identifies what requests were made with."""
        return self.model.tokenizer.fingerprint[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, without special ones."""
        return self.model.tokenizer.encode(string)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        return {"path": self.path, "tokenizer": self.tokenizer_name, "max_length": self.scorer.max_length}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation after its context, and whether greedy decoding would write it."""
        rows = []
        longest = self.scorer.max_length
        for text, context, continuation in requests:
            if not continuation or (longest is not None and len(continuation) > longest):
                wanted = "at least one" if longest is None else f"1 to {longest}"
                raise ValueError(
                    f"loglikelihood: a continuation has {len(continuation)} tokens, must have {wanted}: {text!r:.300}"
                )
            ids = [*(context or [self.eot_token_id]), *continuation]
            ids = ids if longest is None else ids[-longest - 1 :]
            rows.append(Row(ids, len(ids) - len(continuation)))
        answers: list[Any] = [None] * len(rows)
        for number, scores in self._bar(self.scorer.score(rows), len(rows), "scoring", disable_tqdm):
            answers[number] = float(np.sum(scores.logprobs, dtype=np.float64)), bool(scores.greedy.all())
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of whole texts, each after the end-of-document id."""
        texts = [request.args[0] for request in requests]
        rows, owners = [], []
        for number, text in enumerate(texts):
            parts = self.scorer.document_rows(self.tok_encode(text))
            rows += parts
            owners += [number] * len(parts)
        sums, left = np.zeros(len(texts)), np.bincount(owners, minlength=len(texts))
        for row, scores in self._bar(self.scorer.score(rows), len(rows), "scoring texts", disable_tqdm):
            number = owners[row]
            sums[number] += np.sum(scores.logprobs, dtype=np.float64)
            left[number] -= 1
            if not left[number]:
                self.cache_hook.add_partial("loglikelihood_rolling", (texts[number],), float(sums[number]))
        return sums.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each context until a stop string, the end of the document or the limit; greedy unless asked otherwise.

        Equal requests are drawn with seeds that follow each other.
        """
        asked = [_asked(*cast(tuple[str, dict[str, Any]], request.args)) for request in requests]
        prompts, seeds, times = [], [], Counter[str]()
        for request, one in zip(requests, asked, strict=True):
            ids = self.tok_encode(request.args[0]) or [self.eot_token_id]
            if self.scorer.max_length is not None:
                ids = ids[-max(1, self.scorer.max_length - one.limit) :]
            prompts.append(ids)
            seeds.append((one.seed + times[repr(request.args)]) % 2**32)
            times[repr(request.args)] += 1
        answers = [""] * len(requests)
        numbers = [number for number, one in enumerate(asked) if one.limit > 0]
        # Those that are alike together, the longest first.
        numbers.sort(key=lambda number: (repr(asked[number]), -len(prompts[number])))
        with tqdm(total=len(numbers), desc="generating", disable=disable_tqdm or not self.progress) as bar:
            for _, group in groupby(numbers, lambda number: asked[number]._replace(seed=0)):
                alike = list(group)
                for start in range(0, len(alike), self.model.max_batch):
                    turn = alike[start : start + self.model.max_batch]
                    one = asked[turn[0]]
                    given = {"max_tokens": one.limit, "stop": one.until, "seed": [seeds[n] for n in turn]}
                    wrote = self.model.generate([prompts[n] for n in turn], **given, **dict(one.options))
                    for number, completion in zip(turn, wrote, strict=True):
                        answers[number] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[number].args, completion.text)
                    bar.update(len(turn))
        return answers

    def _bar(self, items: Iterable[Any], total: int, what: str, quiet: bool) -> Iterable[Any]:
        return tqdm(items, total=total, desc=what, disable=quiet or not self.progress)


class Asked(NamedTuple):
    """What a request wants generated."""

    limit: int
    """Most tokens."""
    until: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    """Of `LanguageModel.generate`."""
    seed: int


def _asked(context: str, arguments: dict[str, Any]) -> Asked:
    """A request's arguments, in the terms of the harness and of transformers, or ValueError for those there are not."""
    values: Any = normalize_gen_kwargs(dict(arguments), MAX_NEW_TOKENS)
    until = tuple(text for text in handle_stop_sequences(values.pop("until", None), eos=None) if text)
    limit, drawn, seed = int(values.pop("max_gen_toks")), values.pop("do_sample", False), int(values.pop("seed", None) or 0)
    beams = values.pop("num_beams", 1)
    unknown = sorted(set(values) - set(SAMPLING)) + ([f"num_beams={beams}"] if beams != 1 else [])
    if unknown:
        raise ValueError(f"generate_until: a request asks for {', '.join(unknown)}, which there is not: {context!r:.200}")
    options = {name: values[name] for name in SAMPLING if values.get(name) is not None}
    if options.get("top_k") == 0:  # all, for transformers
        del options["top_k"]
    if not drawn or options.get("top_p") == 0:  # of nothing but the likeliest
        options = {name: value for name, value in options.items() if name == "repetition_penalty"} | {"temperature": 0.0}
    return Asked(limit, until, tuple(sorted(options.items())), seed)


class _Plain(pickle.Unpickler):
    """Reads numbers, texts and tuples of them."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it has a {module_name}.{global_name}")


def check_answers(path: Path) -> None:
    """Read the answers that the harness's cache keeps in this file, which need not exist.

    Raises:
        sqlite3.DatabaseError: the file, or an answer in it, is damaged, or an answer is something else than numbers and text.
    """
    if not path.exists():
        return
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'unnamed'").fetchone():
            return  # nothing was kept yet
        for key, value in connection.execute("SELECT key, value FROM unnamed"):
            try:
                _Plain(io.BytesIO(value)).load()
            except Exception as error:  # what damaged pickles raise is not limited to a few types
                raise sqlite3.DatabaseError(f"the answer {key!s:.12} is damaged ({error})") from error


def main() -> int:
    """The command `lm_eval` of any version, with this model; the exit status."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "bm_jax" not in model_registry:
        model_registry.register("bm_jax", target="bm_jax.evaluation.harness:HarnessModel")
    try:
        cli_evaluate()
    except (ConfigError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
