"""The model as lm-evaluation-harness asks it: `lm_eval --model bm_jax --model_args path=DIR`.

Needs lm_eval (the `evaluate` extra). The harness finds this module by the entry point `lm_eval.models`, in versions that look
for entry points; 0.4.13 does not. With any, `python -m bm_jax.evaluation.harness` takes what `lm_eval` takes.

Answers are handed to the harness's cache as they come (`--use_cache`), so an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from bm_jax.evaluation.scoring import BATCH_TOKENS, Row, Scorer
from bm_jax.language_model import LanguageModel

# The harness would fork processes to estimate errors; in a process where JAX runs threads they may hang.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

MAX_NEW_TOKENS = 256
"""Most tokens generated where a task does not say."""
IGNORED = frozenset({"device", "max_batch_size", "batch_size"})
"""What the harness passes to every model and has no meaning here."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """A `LanguageModel` behind the harness's interface.

    Args:
        path: a model directory, or the directory of a training run.
        model: the model itself, in place of `path`.
        batch_tokens: tokens scored at once, padding included.
        max_length: most tokens that one is predicted from, as the harness's other models have it: longer contexts lose their
            start, longer documents are cut into windows. None is no limit for a model without attention.
        weights: "int8" or None, as for `LanguageModel`.
        progress: whether bars are shown.

    Raises:
        ConfigError: the directory cannot be read.
        TypeError: an argument that there is not.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        model: LanguageModel | None = None,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        weights: Any = None,
        progress: bool = True,
        **others: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(others) - IGNORED):
            raise TypeError(f"bm_jax: no model_args {', '.join(unknown)}; there are path, batch_tokens, max_length, weights")
        if (path is None) == (model is None):
            raise TypeError("bm_jax: give the model's directory: --model_args path=DIR")
        self.model = model if model is not None else LanguageModel.load(str(path), weights=weights)
        self.path, self.progress = path, progress
        self.scorer = Scorer(self.model, batch_tokens=int(batch_tokens), max_length=max_length)

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
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not continuation:
                missing = "context" if continuation else "continuation"
                raise ValueError(f"loglikelihood: the {missing} of request {number} has no tokens")
            ids = [*context, *continuation]
            if self.scorer.max_length is not None:
                ids = ids[-self.scorer.max_length - 1 :]
            rows.append(Row(ids, max(1, len(ids) - len(continuation))))
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
        """Text after each context until a stop string, the end of the document or the limit; greedy unless asked otherwise."""
        prompts: list[list[int]] = []
        asked: list[tuple[int, tuple[str, ...], tuple[tuple[str, Any], ...]]] = []
        for number, request in enumerate(requests):
            context, arguments = cast(tuple[str, dict[str, Any]], request.args)
            values: Any = normalize_gen_kwargs(dict(arguments), MAX_NEW_TOKENS)
            until = tuple(handle_stop_sequences(values.pop("until", None), eos=None))
            limit, greedy = int(values.pop("max_gen_toks")), not values.pop("do_sample", False)
            options = {"temperature": 0.0} if greedy else {name: values[name] for name in SAMPLING if name in values}
            if unknown := sorted(set(values) - {*SAMPLING, "num_beams", "seed"}):
                raise ValueError(f"generate_until: request {number} asks for {', '.join(unknown)}, which there is not")
            asked.append((limit, until, tuple(sorted(options.items()))))
            ids = self.tok_encode(context) or [self.eot_token_id]
            if self.scorer.max_length is not None:
                ids = ids[-max(1, self.scorer.max_length - limit) :]
            prompts.append(ids)
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda number: (repr(asked[number]), -len(prompts[number])))
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm or not self.progress) as bar:
            while order:
                like = asked[order[0]]
                numbers = [number for number in order[: self.model.max_batch] if asked[number] == like]
                limit, until, options = like
                wrote = self.model.generate([prompts[n] for n in numbers], max_tokens=limit, stop=until, **dict(options))
                for number, completion in zip(numbers, wrote, strict=True):
                    answers[number] = completion.text
                    self.cache_hook.add_partial("generate_until", requests[number].args, completion.text)
                bar.update(len(numbers))
                order = order[len(numbers) :]
        return answers

    def _bar(self, items: Iterable[Any], total: int, what: str, quiet: bool) -> Iterable[Any]:
        return tqdm(items, total=total, desc=what, disable=quiet or not self.progress)


def main() -> None:
    """The command `lm_eval` of any version, with this model."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "bm_jax" not in model_registry:
        model_registry.register("bm_jax", target="bm_jax.evaluation.harness:HarnessModel")
    cli_evaluate()


if __name__ == "__main__":
    main()
