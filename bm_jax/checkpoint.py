"""Checkpoints of a training run, and the lock of a run directory.

Orbax writes and reads the arrays; this module adds what a run that may be killed at any moment needs.

A checkpoint is one folder named by its step, holding `state` (the arrays, by Orbax), `leaves.json` (path -> dtype and
shape of every array), `data_state.json`, `config.json` and `checksums.json` (size and SHA-256 of every other file). It
is written as `STEP.partial-N`; when Orbax has finished, the checksums are written, every file and folder is flushed to
the disk (fsync), and only then is it renamed to `STEP`, the parent flushed, and older checkpoints deleted. So:

- a folder named by a number is complete, whatever killed the process; `STEP.partial-N` is a left-over, removed at the next
  save; `STEP.corrupt` and `STEP.superseded` were set aside, and are kept;
- a power cut loses at most the save in progress, if the file system and the drive honour fsync and rename is atomic
  (ext4, xfs, btrfs, apfs do; some network and FUSE mounts do not);
- damage after the rename (truncated, missing or altered file) is found by the checksums before anything is loaded, and
  the newest undamaged step is used instead, with a warning. Damage to the arrays before they are hashed (bad memory) is
  not found.

Orbax's `CheckpointManager` is not used because it deletes old checkpoints before we could have sealed the new one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import itertools
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from bm_jax.array_files import read_arrays, save_arguments
from bm_jax.leaves import CheckpointError, bytes_of, describe, is_disk_full, leaves_of, nest, placed, require_same
from bm_jax.processes import from_first, is_first
from bm_jax.sealed_folder import problem_with, publish, remove_folder, seal

PARTIAL = ".partial"
DISK_MARGIN = 1.05
"""Free space asked for before a save, as a multiple of the bytes of the state (compression usually needs less)."""

logger = logging.getLogger(__name__)


class RunDirectoryError(RuntimeError):
    """A run directory cannot be used: it is in use by another process, or cannot be written."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` returns."""

    step: int
    state: Any
    data_state: dict[str, Any]
    config: dict[str, Any]


@contextlib.contextmanager
def lock_run_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Create folder `path` and hold its lock (`path/.lock`) for the `with` block, so that one process writes there.

    The kernel releases the lock when the process ends, however it ends. Over several hosts, call it in process 0 only.

    Raises:
        RunDirectoryError: another process (or another run in this process) holds the lock, or the folder cannot be
            created or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / ".lock", "a+")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot use the run directory {path}: {error.strerror}. Set run.directory to a folder you can write to. "
            f"{_last_good(path / 'checkpoints')}."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RunDirectoryError(
                f"the run directory {path} is in use by process {holder}. Wait for it or stop it, or set run.directory "
                "to another folder; nothing was changed."
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s); make sure that only one process uses it", path, error.strerror)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield path


class Checkpoints:
    """The checkpoints in folder `directory`: saved in the background, verified when read. A context manager.

    The newest `keep_last` are kept, and every one whose step is a multiple of `keep_every`. One process at a time may
    save into a folder (`lock_run_directory`); any number may restore from it.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int, keep_every: int | None = None):
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_every = keep_last, keep_every
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None
        self._attempts = itertools.count(1)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Wait for the save in progress. Its error is raised, or only logged when another one is on its way."""
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            logger.error("%s", failure)
        finally:
            self._finisher.shutdown()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first. Their files are not verified here."""
        return _steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest of `steps()`."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, *, data_state: dict[str, Any], config: dict[str, Any]) -> None:
        """Copy `state` (a pytree of arrays) to host memory and write it in the background; returns after the copy.

        `data_state` and `config` are JSON values. Waits for the previous save first.

        Raises:
            CheckpointError: the previous save failed; the disk has too little room; the step exists already; the folder
                cannot be written. Earlier checkpoints are intact in each case.
        """
        self.wait()
        if is_first() and step in self.steps():
            raise CheckpointError(f"{self.directory} already has a checkpoint of step {step}; it was not overwritten.")
        leaves = leaves_of(state)
        # No name is used twice: after an error Orbax may leave writes running, and they must not meet the next attempt.
        partial = self.directory / f"{step}{PARTIAL}-{next(self._attempts)}"
        try:
            if is_first():  # the others wait for it in Orbax
                self.directory.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
                self._require_space(step, sum(bytes_of(leaf) for leaf in leaves.values()))
                _write_json(partial, leaves=describe(leaves), data_state=data_state, config=config)
            # One for each save: after an error it would raise that again at the next one.
            # Orbax measures its patience by the wall clock, which may jump by years; other processes may be waited for in vain.
            patience = 100 * 365 * 86400 if jax.process_count() == 1 else 600
            checkpointer = ocp.AsyncCheckpointer(
                ocp.StandardCheckpointHandler(),
                async_options=ocp.options.AsyncOptions(timeout_secs=patience, create_directories_asynchronously=False),
            )
            checkpointer.save(partial / "state", args=save_arguments(leaves))
        except CheckpointError:
            raise
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = self._finisher.submit(self._finish, step, partial, checkpointer)

    def check(self) -> None:
        """Raise the error of the save in progress if it has failed by now; otherwise return at once.

        Raises:
            CheckpointError: it failed; its partial folder is gone and earlier checkpoints are intact.
        """
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save in progress is complete on disk.

        Raises:
            CheckpointError: it failed; its partial folder is gone and earlier checkpoints are intact.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """Read `step`, or the newest undamaged checkpoint; None when there is none at all.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct`; each leaf's sharding says where the array is put (the
        first device where it has none). A damaged checkpoint newer than the one read is renamed to `STEP.corrupt`, with
        a RuntimeWarning naming what is wrong.

        Raises:
            CheckpointError: checkpoints exist but all are damaged; `step` does not exist or is damaged; paths, shapes
                or dtypes differ from `abstract_state`. Nothing is changed on disk then.
        """
        self.wait()
        step = from_first(lambda: self._choose(step), (CheckpointError,))
        if step is None:
            return None
        folder = self.directory / str(step)
        wanted = leaves_of(abstract_state)
        require_same(folder, _read_json(folder, "leaves"), describe(wanted))
        values = read_arrays(folder, {path: placed(leaf) for path, leaf in wanted.items()})
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [values[path] for path in wanted])
        return Restored(step, state, _read_json(folder, "data_state"), _read_json(folder, "config"))

    def supersede(self, step: int) -> None:
        """Rename the checkpoints after `step`, so that the run can save those steps again."""
        for later in reversed(self.steps()):  # so that the newest of those left is always one that is to go
            if later > step:
                _set_aside(self.directory / str(later), "superseded")

    def _choose(self, step: int | None) -> int | None:
        """The step that `restore` reads, None for none; damaged ones after it are set aside."""
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a folder; move it away or use another run.directory.")
        if step is None:
            step, damaged = _newest_good(self.directory)
            for bad in damaged if step is not None else ():
                _set_aside(self.directory / str(bad))
            return step
        problem = problem_with(self.directory / str(step))
        if problem:
            good = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"checkpoint {self.directory / str(step)} cannot be read: {problem}. There are: {good}.")
        return step

    def _finish(self, step: int, partial: Path, checkpointer: ocp.AsyncCheckpointer) -> None:
        """In the background: wait for Orbax, seal and publish the checkpoint, delete those no longer kept."""
        try:
            checkpointer.close()  # every process has written its part when it returns in the first
            if not is_first():
                return
            seal(partial)
            publish(partial, self.directory / str(step))
        except Exception as error:
            raise self._failed(step, error) from error
        for old in self.steps()[: -self._keep_last]:
            if not self._keep_every or old % self._keep_every:
                doomed = self.directory / f"{old}{PARTIAL}-deleted"
                try:
                    os.rename(self.directory / str(old), doomed)  # so that it is never half deleted under its name
                except OSError as error:
                    logger.warning("could not delete the old checkpoint %s: %s", self.directory / str(old), error)
                remove_folder(doomed)

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        """The error of a failed save of `step`, after removing its partial folder."""
        if not is_first():
            return CheckpointError(f"saving step {step} failed: {error}")
        self._remove_leftovers()
        time.sleep(0.2)  # a write that Orbax left running may have made the folder anew
        self._remove_leftovers()
        reason = f"{error}".strip() or type(error).__name__
        if is_disk_full(error):
            reason = f"disk full on {self.directory} ({_free(self.directory)} free): {reason}"
        return CheckpointError(f"saving step {step} failed: {reason}. {self.intact()}")

    def _require_space(self, step: int, size: int) -> None:
        need, free = int(size * DISK_MARGIN), shutil.disk_usage(self.directory).free
        if need > free:
            raise CheckpointError(
                f"disk full: a checkpoint of step {step} needs {_human(need)}, have {_human(free)} free on "
                f"{self.directory}. {self.intact()}"
            )

    def intact(self) -> str:
        """What an error is to say about the steps that are safe."""
        return f"{_last_good(self.directory)}; run again with the same command once this is fixed."

    def newest_config(self) -> dict[str, Any] | None:
        """The configuration that the newest checkpoint was saved with; None where there is none, or it cannot be read."""
        try:
            return _read_json(self.directory / str(self.latest_step()), "config")
        except (OSError, ValueError):
            return None

    def _remove_leftovers(self) -> None:
        for entry in sorted(self.directory.glob(f"*{PARTIAL}*")):
            logger.info("removing the unfinished checkpoint %s", entry)
            remove_folder(entry)


def restore_parameters(run_directory: str | os.PathLike, abstract: Any = None) -> Any:
    """Only the parameters (`params` of the state) of the newest undamaged checkpoint of a run.

    All of its files are verified, but no other array is loaded, and nothing is changed on disk. `run_directory` is the
    folder given to `Checkpoints`, or its parent when that folder is named `checkpoints`. With `abstract` (a pytree of
    `jax.ShapeDtypeStruct`) they get its structure and shardings; without, they are a nested dict on the first device.

    Raises:
        CheckpointError: there is no undamaged checkpoint, or it differs from `abstract`.
    """
    directory = Path(run_directory).absolute()
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    step, _ = _newest_good(directory)
    if step is None:
        raise CheckpointError(f"there is no checkpoint in {directory}; give the directory of a training run.")
    folder, prefix = directory / str(step), "params/"
    leaves = _read_json(folder, "leaves")
    saved = {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}
    if not saved:
        raise CheckpointError(f"checkpoint {folder} holds no parameters.")
    if abstract is None:
        wanted = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, (dtype, shape) in saved.items()}
    else:
        wanted = leaves_of(abstract)
        require_same(folder, saved, describe(wanted))
    values = read_arrays(folder, {prefix + path: placed(leaf) for path, leaf in wanted.items()})
    found = {path: values[prefix + path] for path in wanted}
    return nest(found) if abstract is None else jax.tree.unflatten(jax.tree.structure(abstract), list(found.values()))


def _steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal() and entry.is_dir())


def _last_good(directory: Path) -> str:
    latest = max(_steps(directory), default=None)
    return "No checkpoint has been saved yet" if latest is None else f"The last good step is {latest}"


def _newest_good(directory: Path) -> tuple[int | None, list[int]]:
    """The newest undamaged step and the damaged steps after it; (None, []) when there is no checkpoint."""
    damaged: dict[int, str] = {}
    # Listed anew each time: a run may complete a checkpoint and delete an older one while we look.
    while steps := [step for step in _steps(directory) if step not in damaged]:
        problem = problem_with(directory / str(steps[-1]))
        if problem is None:
            return steps[-1], [step for step in damaged if (directory / str(step)).exists()]
        damaged[steps[-1]] = problem
        warnings.warn(
            f"checkpoint {directory / str(steps[-1])} is damaged and not used: {problem}", RuntimeWarning, stacklevel=3
        )
    if damaged:
        listed = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
        raise CheckpointError(
            f"no checkpoint in {directory} can be read ({listed}). Nothing was changed. Restore the files from a copy, "
            "or set run.directory to another folder to start anew."
        )
    return None, []


def _set_aside(folder: Path, why: str = "corrupt") -> None:
    """Rename a checkpoint so that its step can be saved again."""
    target, count = folder.with_name(f"{folder.name}.{why}"), 1
    while target.exists():
        count += 1
        target = folder.with_name(f"{folder.name}.{why}-{count}")
    publish(folder, target)


def _write_json(folder: Path, **items: dict[str, Any]) -> None:
    """Make `folder` with one file for each item."""
    folder.mkdir()
    for name, item in items.items():
        (folder / f"{name}.json").write_text(json.dumps(item, indent=1), encoding="utf-8")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


# --- room on the disk ---------------------------------------------------------------------------------------------------


def _human(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _free(directory: Path) -> str:
    return _human(shutil.disk_usage(directory).free)
