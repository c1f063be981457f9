"""Training: `fit(config)` joins data, model, optimizer, checkpoints and metrics.

A run directory holds everything of a run:

    config.json, tokenizer.json     what it trains, readable by `LanguageModel.load`
    checkpoints/STEP                state, data position and configuration
    metrics.jsonl, tensorboard/     one row a step
    losses.png, expert_load.png     pictures, drawn at the end

Started again with the same command, a run continues after its newest checkpoint as if it had never stopped: the state,
the data position and the random keys are functions of the step alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bm_jax.checkpoint import CheckpointError, Checkpoints, lock_run_directory
from bm_jax.config import Config, ConfigError, to_dict
from bm_jax.data.errors import DataError
from bm_jax.data.pipeline import Data, open_data
from bm_jax.data.shards import write_durably
from bm_jax.data.tokenizer import load_tokenizer
from bm_jax.data.watch import DataWatch
from bm_jax.loss import LossSums
from bm_jax.metrics import MetricsWriter, ProgressBar, device_peak_flops, model_flops_per_token, read_metrics
from bm_jax.model import count_parameters
from bm_jax.optimizer import make_optimizer
from bm_jax.processes import AnyProcess, from_first, global_array, is_first, own_rows, require_equal, require_shared
from bm_jax.sharding import BATCH_AXES, batch_sharding, make_mesh, with_shardings
from bm_jax.train_step import TrainState, init_state, make_eval_step, make_train_step, state_shardings

logger = logging.getLogger(__name__)

SKIPPED = "skipped_data.jsonl"
"""In the run directory: the data that each rewind left out, as positions of the data iterator."""
PROFILE_AFTER = 3
"""Steps of a start that are not profiled, as the first of them compile."""


class NonFiniteError(RuntimeError):
    """Loss or gradients were not finite, or too large, for `run.max_nonfinite_steps` steps in a row."""


class Result(NamedTuple):
    """What a call of `fit` reached."""

    step: int
    finished: bool
    """False when it was interrupted; the same command continues."""
    validation_loss: float | None
    """Mean nats a token over the held-out windows of every source, at the last step."""
    sample: str | None
    """Prompt and text generated at the end."""
    interrupted_by: int | None = None
    """Number of the signal that stopped it."""


def fit(config: Config, *, resume_from: int | None = None) -> Result:
    """Train until `config.run.steps`, from the newest checkpoint of the run directory if there is one.

    SIGINT and SIGTERM save a checkpoint after the current step and return. With `resume_from` the run goes back to its
    checkpoint of that step: later ones are set aside as `STEP.superseded`, and what was measured after it is dropped.

    Raises:
        ConfigError: the configuration does not fit the devices, the data, or the run that the directory holds.
        RunDirectoryError: another process is using the run directory.
        CheckpointError: checkpoints cannot be read, have another shape, or cannot be written.
        NonFiniteError: training diverged; the last checkpoint is untouched.
    """
    with Interrupt() as interrupt:
        return _fit(config, resume_from, interrupt)


def _fit(config: Config, resume_from: int | None, interrupt: Interrupt) -> Result:
    tune_allocator()
    require_equal(to_dict(config))
    resume_from = from_first(lambda: resume_from)  # no other process may think otherwise
    directory = Path(config.run.directory)
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)
    keep = {"keep_last": config.run.keep_last, "keep_every": config.run.keep_every}
    checkpoints = Checkpoints(directory / "checkpoints", **keep)
    with naming_the_last_good_step(checkpoints):
        data = open_data(config.data, config.model.vocab_size)
    with lock_run_directory(directory) if is_first() else contextlib.nullcontext(), jax.set_mesh(mesh):
        require_shared(directory)
        with checkpoints, naming_the_last_good_step(checkpoints):
            _check_same_run(config, data, directory, checkpoints)
            run = Run(config, data, mesh)
            run.begin_watch() if is_first() else None
            state, position = run.start(checkpoints, resume_from)
            first = int(state.step)
            if first < config.run.steps and is_first():
                _write_description(config, data, directory)
            with (
                MetricsWriter(directory, first) if is_first() else Silent() as writer,
                ProgressBar(config.run.steps, first) if is_first() else Silent() as bar,
            ):
                run.announce(bar, first)
                state = run.train(state, position, checkpoints, writer, bar, interrupt)
                checkpoints.wait()
            return run.finish(state)


@contextlib.contextmanager
def naming_the_last_good_step(checkpoints: Checkpoints) -> Iterator[None]:
    """Note with errors of the data, the files and the numbers which step is safe."""
    try:
        yield
    except (DataError, NonFiniteError, OSError) as error:
        try:
            checkpoints.wait()  # the save in progress may be the last good one
        except CheckpointError as failure:
            logger.error("%s", failure)
        error.add_note(checkpoints.intact())
        if isinstance(error, NonFiniteError) and (earlier := checkpoints.steps()[:-1]):
            error.add_note(f"If that one diverges again: --resume-from {earlier[-1]} goes back further")
        raise


class Silent:
    """In the place of what writes, in the processes that do not: it takes every call and does nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


class Run:
    """The compiled functions of one call of `fit`, and the loop that calls them."""

    def __init__(self, config: Config, data: Data, mesh: jax.sharding.Mesh) -> None:
        self.config, self.data, self.mesh = config, data, mesh
        optimizer = make_optimizer(config.optimizer, config.run.steps)
        initialize = lambda: init_state(config, optimizer)  # noqa: E731
        abstract = jax.eval_shape(initialize)
        shardings = state_shardings(abstract, optimizer, mesh)
        self.abstract = with_shardings(abstract, shardings)
        self.initialize = jax.jit(initialize, out_shardings=shardings)
        everywhere = NamedSharding(mesh, PartitionSpec())  # so that every process can read what was measured
        self.train_step = jax.jit(make_train_step(config, optimizer), donate_argnums=0, out_shardings=(shardings, everywhere))
        self.eval_step = jax.jit(make_eval_step(config), out_shardings=everywhere)
        self.batch_sharding = batch_sharding(mesh)
        self.last_validation: tuple[int, float | None] = (-1, None)
        self.last_state: TrainState | None = None
        self.input_seconds = 0.0
        self.interrupted_by: int | None = None
        self.first_skipped = 0  # of the steps skipped in a row, or the next step

    def start(self, checkpoints: Checkpoints, step: int | None = None) -> tuple[TrainState, dict[str, Any] | None]:
        """The state to go on from and the data position, from the checkpoint of `step`, the newest one, or the start."""
        restored = checkpoints.restore(self.abstract, step)
        if restored is not None and step is not None:
            from_first(lambda: checkpoints.supersede(step))
        if restored is None:
            state = self.initialize()
            if self.config.run.init_from is not None:
                from bm_jax.model_directory import read_parameters

                jax.tree.map(lambda leaf: leaf.delete(), state.params)  # no room for both may be left
                state = state.replace(params=read_parameters(self.config.run.init_from, self.abstract.params))
            return state, None
        return restored.state, restored.data_state

    def begin_watch(self) -> None:
        """Look whether the data are those of the run, from now on at every save."""
        self.watch = DataWatch(self.data.files(), Path(self.config.run.directory))
        self.watch.begin()

    def announce(self, bar: ProgressBar, first: int) -> None:
        """Say what is about to run."""
        config, count = self.config, count_parameters(self.config.model)
        devices = self.mesh.devices
        bar.message(
            f"{count.total:,} parameters, {count.active:,} active per token; {devices.size} x "
            f"{devices.flat[0].device_kind}; {config.data.batch_size} x {config.data.sequence_length} tokens a step; "
            + (f"continuing after step {first}" if first else "compiling the first step")
        )

    def train(
        self,
        state: TrainState,
        position: dict[str, Any] | None,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        bar: ProgressBar,
        interrupt: Interrupt,
    ) -> TrainState:
        """Step until the end or an interrupt; after a divergence go back as often as `run.rewinds` allows."""
        size, rewinds = self.config.data.batch_size, self.config.run.rewinds
        self.first_row, rows = own_rows(self.batch_sharding, (size, self.config.data.sequence_length + 1))
        batches = self.data.train_batches(process_index=self.first_row // rows, process_count=size // rows)
        if position is not None:
            batches.set_state(position)
        folder = Path(self.config.run.directory) / "profile"
        profile = Profile(folder, int(state.step) + PROFILE_AFTER, self.config.run.profile_steps)
        gone_back_to: int | None = None
        while True:
            try:
                return self._train(state, batches, checkpoints, writer, bar, interrupt, profile)
            except NonFiniteError as error:
                checkpoints.wait()
                steps = from_first(checkpoints.steps)
                if rewinds and not steps:
                    error.add_note("There was no checkpoint to go back to (run.rewinds)")
                if not rewinds or not steps:
                    raise
                # Where no step after a checkpoint was good, with other data as well, the checkpoint is to blame.
                to_blame = steps[-1] == gone_back_to and self.first_skipped == steps[-1] + 1 and len(steps) > 1
                target, reason = steps[-2] if to_blame else None, str(error)
            rewinds -= 1
            jax.tree.map(lambda leaf: leaf.delete(), self.last_state)  # no room for both may be left
            state, position = self.start(checkpoints, target)
            gone_back_to = int(state.step)
            state = dataclasses.replace(
                state, skipped_in_row=jnp.zeros_like(state.skipped_in_row)
            )  # the data of that streak are left out
            self._log_skipped(int(state.step), position, batches.get_state(), reason, bar)
            writer.rewind(int(state.step))

    def _log_skipped(
        self, step: int, before: dict[str, Any] | None, after: dict[str, Any], reason: str, bar: ProgressBar
    ) -> None:
        """Say which data are left out by going back to `step`, in the run directory too."""
        bar.message(f"{reason}\nGone back to step {step}; the data read since then are skipped ({SKIPPED} says which).")
        if is_first():
            line = {"back_to_step": step, "data_from": before, "data_to": after, "reason": reason}
            with open(Path(self.config.run.directory) / SKIPPED, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _train(
        self,
        state: TrainState,
        batches: Any,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        bar: ProgressBar,
        interrupt: Interrupt,
        profile: Profile,
    ) -> TrainState:
        """Step until the end or an interrupt. What step k - 1 measured is fetched while step k runs."""
        run, any_process = self.config.run, AnyProcess(self.mesh)
        rates = self._rates(time.perf_counter())
        waiting: tuple[int, dict[str, Any]] | None = None
        saved = step = int(state.step)
        due = False
        while step < run.steps:
            checkpoints.check()
            if number := any_process(interrupt.number or 0):
                self.interrupted_by = number
                break
            before = time.perf_counter()
            batch = self._place(next(batches), self.first_row)
            self.input_seconds += time.perf_counter() - before
            step += 1
            row: dict[str, Any] = {}
            if step % run.report_every == 0 or step == run.steps:
                row = self._report(state, batch)
            with profile.around(step, state):
                state, metrics = self.train_step(state, batch)
            self.last_state = state
            if waiting is not None:
                self._write(*waiting, writer, bar, next(rates))
            waiting = step, metrics | row
            if step % run.eval_every == 0 or step == run.steps:
                waiting[1].update(self.validate(state, step))
            due = due or step % run.checkpoint_every == 0 or step == run.steps
            if due:
                # Rows of saved steps reach the file first, so that no checkpoint is ahead of the metrics.
                skipped_in_row = self._write(*waiting, writer, bar, next(rates))
                waiting = None
                # What precedes steps without an update may be at fault: it must not push a good checkpoint out.
                if not skipped_in_row or step == run.steps:
                    writer.sync()
                    self._save(checkpoints, state, step, batches)
                    saved, due = step, False
        profile.stop(state)
        if waiting is not None:
            self._write(*waiting, writer, bar, next(rates))
        if step > saved:
            writer.sync()
            self._save(checkpoints, state, step, batches)
        return state

    def _place(self, batch: dict[str, np.ndarray], first_row: int = 0) -> dict[str, jax.Array]:
        """A batch of which this process has all rows, or those from `first_row` on, on the devices of all."""
        total = self.config.data.batch_size
        return {name: global_array(rows, first_row, total, self.batch_sharding) for name, rows in batch.items()}

    def _save(self, checkpoints: Checkpoints, state: TrainState, step: int, batches: Any) -> None:
        if is_first():
            self.watch.check()  # so that no checkpoint has learned from what the run did not begin with
        checkpoints.save(step, state, data_state=batches.get_state(), config=to_dict(self.config))

    def _report(self, state: TrainState, batch: dict[str, jax.Array]) -> dict[str, Any]:
        """Loss and expert load of a training batch before it is trained on, with inference routing."""
        sums, routing = self.eval_step(state.params, batch)
        return {"loss": sums, **routing}

    def _rates(self, before: float) -> Iterator[dict[str, float]]:
        """Since the last row: tokens a second, the share of the time that went to waiting for a batch and placing it, and model
        FLOP utilisation where the device's peak is known."""
        data = self.config.data
        tokens = data.batch_size * data.sequence_length
        flops = model_flops_per_token(self.config.model, data.sequence_length)
        peak = device_peak_flops(self.mesh.devices.flat[0])
        while True:
            now = time.perf_counter()
            speed, waited = tokens / (now - before), self.input_seconds / (now - before)
            before, self.input_seconds = now, 0.0
            utilisation = {} if peak is None else {"model_flop_utilisation": speed * flops / peak / self.mesh.size}
            yield {"tokens_per_second": speed, "input_wait": waited, **utilisation}

    def _write(
        self, step: int, metrics: dict[str, Any], writer: MetricsWriter, bar: ProgressBar, rates: dict[str, float]
    ) -> int:
        """Fetch what one step measured, log it, and stop the run if it diverged; how many steps in a row were skipped."""
        row = jax.device_get(metrics)
        if "loss" in row:
            row["loss"] = _mean(row["loss"])
        in_row = int(row.pop("skipped_in_row"))
        writer.write(step, row | rates)
        bar.update(step, loss=row.get("loss"), tokens_per_second=rates["tokens_per_second"])
        if "validation_loss" in row:
            bar.message(f"step {step}: validation loss {row['validation_loss']:.4f} nats a token")
        self.first_skipped = step - in_row + 1
        if in_row >= self.config.run.max_nonfinite_steps:
            raise NonFiniteError(
                f"the loss or gradient was not finite, or larger than optimizer.skip_norm_above, for {in_row} steps in a row "
                f"(step {self.first_skipped} to {step}, "
                f"last objective {row['objective']}); those updates were skipped. Lower optimizer.learning_rate, or look "
                "at the data of these steps."
            )
        return in_row

    def validate(self, state: TrainState, step: int) -> dict[str, float]:
        """Mean loss in nats a token over held-out windows, over all sources and for each of several."""
        sources = self.data.validation_batches(self.config.data.batch_size, self.config.run.eval_batches)
        totals = {}
        for name, batches in sources.items():
            sums = jax.device_get([self.eval_step(state.params, self._place(batch))[0] for batch in batches])
            totals[name] = _total(sums)
        if not totals:
            return {}
        losses = {"validation_loss": _mean(_total(totals.values()))}
        self.last_validation = step, losses["validation_loss"]
        if len(totals) > 1:
            losses |= {f"validation_loss/{name}": _mean(sums) for name, sums in totals.items()}
        return losses

    def finish(self, state: TrainState) -> Result:
        """Draw the pictures and generate a sample."""
        config, directory = self.config, Path(self.config.run.directory)
        step = int(state.step)
        finished = step >= config.run.steps
        measured, loss = self.last_validation
        if finished and measured != step:  # nothing was left to train
            loss = self.validate(state, step).get("validation_loss")
        if not is_first():
            return Result(step, finished, loss if finished else None, None, self.interrupted_by)
        if not finished:
            print(f"\nStopped after step {step}; " + ("the checkpoint is saved." if step else "there is nothing to save."))
            return Result(step, False, None, None, self.interrupted_by)
        from bm_jax.plots import plot_expert_load, plot_losses

        metrics = read_metrics(directory)
        plot_losses(metrics, directory / "losses.png")
        pictures = [directory / "losses.png"]
        if "moe" in config.model.kinds:
            plot_expert_load(metrics, directory / "expert_load.png")
            pictures.append(directory / "expert_load.png")
        sample = self._sample(state) if jax.process_count() == 1 else None  # others' parameters are not here
        if sample:
            print(f"\nSample, after the opening of a held-out document:\n{'-' * 72}\n{sample}\n{'-' * 72}")
        if loss is not None:
            print(f"Validation loss {loss:.4f} nats a token after {step} steps.")
        print(f"Pictures: {', '.join(map(str, pictures))}")
        print(f"More run.steps in the same run.directory, {directory}, continue this run.")
        return Result(step, True, loss, sample)

    def _sample(self, state: TrainState) -> str | None:
        """Text generated after the first tokens of the first held-out document."""
        from bm_jax.language_model import LanguageModel

        sources = self.data.validation_batches(1, 1)
        if not self.config.run.sample_tokens or not sources:
            return None
        window = next(iter(next(iter(sources.values()))))
        opening = window["tokens"][0][window["segment_ids"][0] == 1][:64].tolist()
        model = LanguageModel(self.config.model, state.params, self.data.tokenizer)
        (completion,) = model.generate(
            [opening], max_tokens=self.config.run.sample_tokens, temperature=0.8, seed=self.config.run.seed
        )
        return self.data.tokenizer.decode(opening) + completion.text


def _total(sums: Iterable[LossSums]) -> LossSums:
    """Sums of batches, added up in float64."""
    return jax.tree.map(lambda *values: np.float64(math.fsum(values)), *sums)


def _mean(sums: LossSums) -> float:
    """Nats a token."""
    return np.asarray(sums.nll).item() / max(np.asarray(sums.tokens).item(), 1)


class Profile:
    """A profile of some steps, in the files that TensorBoard's profiler and XProf open."""

    def __init__(self, directory: Path, first: int, steps: int) -> None:
        self._directory, self._first, self._end = directory, first, first + steps
        self._running = False

    def around(self, step: int, before: TrainState) -> contextlib.AbstractContextManager[Any]:
        """To be entered for each step, with its number and the state before it."""
        if self._first <= step < self._end and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif step >= self._end:
            self.stop(before)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def stop(self, state: TrainState) -> None:
        """Write what was recorded until this state, if anything was."""
        if self._running:
            self._running = False
            jax.block_until_ready(state)
            jax.profiler.stop_trace()


class Interrupt:
    """Catches SIGINT and SIGTERM; a second SIGINT interrupts at once. A context manager.

    Outside the main thread signals cannot be caught, and `number` stays None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """Of the signal that arrived last."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


def _check_batch(config: Config, mesh: jax.sharding.Mesh) -> None:
    rows, parts = config.data.batch_size // config.run.accumulation, 1
    for axis in BATCH_AXES:
        parts *= mesh.shape[axis]
    if rows % parts:
        raise ConfigError(
            f"data.batch_size / run.accumulation = {rows} rows cannot be split over the {parts} devices of the mesh axes "
            f"{', '.join(BATCH_AXES)}; choose a batch size that is a multiple of {parts * config.run.accumulation}"
        )


def _check_same_run(config: Config, data: Data, directory: Path, checkpoints: Checkpoints) -> None:
    """A run keeps its model, data, tokenizer and seed for life; everything else, the mesh too, may change when it continues."""
    path = directory / "config.json"
    if not checkpoints.directory.is_dir():
        return
    try:
        before = json.loads(path.read_text()) if path.exists() else checkpoints.newest_config()
        if before is None:
            return
        now = json.loads(json.dumps(to_dict(config)))
        before, now = ({**c["model"], **c["data"], "run.seed": c["run"]["seed"]} for c in (before, now))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); move it away or use another run.directory") from None
    changed = [name for name in now if now[name] != before.get(name) and name != "scan_unroll"]
    if changed:
        raise ConfigError(
            f"{directory} holds a run with another configuration: "
            + "; ".join(f"{name} was {before.get(name)!r}, is now {now[name]!r}" for name in changed)
            + ". Use another run.directory, or the configuration it was made with. Nothing was changed."
        )

    if (directory / "tokenizer.json").exists() and load_tokenizer(directory).fingerprint != data.tokenizer.fingerprint:
        raise ConfigError(
            f"{directory} holds a run with another tokenizer than {data.tokenizer.name}. Use another run.directory, or the "
            "tokenizer it was made with. Nothing was changed."
        )


def _write_description(config: Config, data: Data, directory: Path) -> None:
    """config.json and tokenizer.json, each replaced whole or not at all, and what a model to start from was imported with."""
    data.tokenizer.save(directory)
    if config.run.init_from is not None:
        from bm_jax.model_directory import COMPANIONS, SOURCE, bring_companions

        bring_companions(Path(config.run.init_from), directory, (SOURCE, *COMPANIONS))
    write_durably(directory / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def tune_allocator() -> None:
    """Keep freed memory in the process on Linux CPUs: glibc otherwise returns and re-takes it every step.

    Steps of the default preset take a quarter less time. The setting stays for the life of the process.
    """
    if jax.default_backend() != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # not glibc
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)
