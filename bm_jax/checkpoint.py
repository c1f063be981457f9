"""Checkpoints of a training run, model directories, and the lock of a run directory.

Orbax writes and reads the arrays; this module adds what a run that may be killed at any moment needs.

A checkpoint is one folder named by its step, holding `state` (the arrays, by Orbax), `leaves.json` (path -> dtype and
shape of every array), `data_state.json`, `config.json` and `checksums.json` (size and SHA-256 of every other file). It
is written as `STEP.partial-N`; when Orbax has finished, the checksums are written, every file and folder is flushed to
the disk (fsync), and only then is it renamed to `STEP`, the parent flushed, and older checkpoints deleted. So:

- a folder named by a number is complete, whatever killed the process; everything else is left-overs, removed at the
  next save;
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
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
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

CHECKSUMS = "checksums.json"
PARTIAL = ".partial"
CHUNK_BYTES = 2**23
"""Most bytes of a chunk of an array: what is compressed, and unpacked again, as one."""
MOST_EXPERTS = 64
"""Arrays `[periods, X, ...]` of at most this many experts are stored expert by expert."""
READ_BYTES = 2**28
"""Bytes of chunks that are being read at one time."""
DISK_MARGIN = 1.05
"""Free space asked for before a save, as a multiple of the bytes of the state (compression usually needs less)."""

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why, what is intact and what to do."""


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
            f"cannot use the run directory {path}: {error.strerror}. Set run.directory to a folder you can write to."
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
        if jax.process_count() > 1:
            raise NotImplementedError("saving from several processes is not supported yet")
        self.wait()
        if step in self.steps():
            raise CheckpointError(f"{self.directory} already has a checkpoint of step {step}; it was not overwritten.")
        leaves = _leaves(state)
        # No name is used twice: after an error Orbax may leave writes running, and they must not meet the next attempt.
        partial = self.directory / f"{step}{PARTIAL}-{next(self._attempts)}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._require_space(step, sum(_bytes(leaf) for leaf in leaves.values()))
            _write_json(partial, leaves=_describe(leaves), data_state=data_state, config=config)
            # One for each save: after an error it would raise that again at the next one.
            checkpointer = ocp.AsyncCheckpointer(
                ocp.StandardCheckpointHandler(),
                async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            )
            checkpointer.save(partial / "state", args=_save_arguments(leaves))
        except CheckpointError:
            raise
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = self._finisher.submit(self._finish, step, partial, checkpointer)

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
        if step is None:
            step, damaged = _newest_good(self.directory)
            if step is None:
                return None
            for bad in damaged:
                _set_aside(self.directory / str(bad))
        else:
            problem = _problem(self.directory / str(step))
            if problem:
                raise CheckpointError(f"checkpoint {self.directory / str(step)} cannot be read: {problem}.")
        folder = self.directory / str(step)
        wanted = _leaves(abstract_state)
        _require_same(folder, _read_json(folder, "leaves"), _describe(wanted))
        values = _read_arrays(folder, {path: _placed(leaf) for path, leaf in wanted.items()})
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [values[path] for path in wanted])
        return Restored(step, state, _read_json(folder, "data_state"), _read_json(folder, "config"))

    def _finish(self, step: int, partial: Path, checkpointer: ocp.AsyncCheckpointer) -> None:
        """In the background: wait for Orbax, seal and publish the checkpoint, delete those no longer kept."""
        try:
            checkpointer.close()
            _seal(partial)
            _publish(partial, self.directory / str(step))
        except Exception as error:
            raise self._failed(step, error) from error
        for old in self.steps()[: -self._keep_last]:
            if not self._keep_every or old % self._keep_every:
                doomed = self.directory / f"{old}{PARTIAL}-deleted"
                try:
                    os.rename(self.directory / str(old), doomed)  # so that it is never half deleted under its name
                except OSError as error:
                    logger.warning("could not delete the old checkpoint %s: %s", self.directory / str(old), error)
                _remove(doomed)

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        """The error of a failed save of `step`, after removing its partial folder."""
        self._remove_leftovers()
        reason = f"{error}".strip() or type(error).__name__
        if _is_disk_full(error):
            reason = f"disk full on {self.directory} ({_free(self.directory)} free): {reason}"
        return CheckpointError(f"saving step {step} failed: {reason}. {self._intact()}")

    def _require_space(self, step: int, size: int) -> None:
        need, free = int(size * DISK_MARGIN), shutil.disk_usage(self.directory).free
        if need > free:
            raise CheckpointError(
                f"disk full: a checkpoint of step {step} needs {_human(need)}, have {_human(free)} free on "
                f"{self.directory}. {self._intact()}"
            )

    def _intact(self) -> str:
        latest = self.latest_step()
        good = "No checkpoint has been saved yet" if latest is None else f"The last good step is {latest}"
        return f"{good}; run again with the same command once this is fixed."

    def _remove_leftovers(self) -> None:
        for entry in sorted(self.directory.glob(f"*{PARTIAL}*")):
            logger.info("removing the unfinished checkpoint %s", entry)
            _remove(entry)


def save_parameters(directory: str | os.PathLike, params: Any) -> None:
    """Write `params` (a pytree of arrays, dtypes kept) as folder `directory`; all or nothing.

    Raises:
        CheckpointError: `directory` exists (nothing is overwritten), or cannot be written.
    """
    folder = Path(directory).absolute()
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; choose another folder or remove it first.")
    partial, leaves = folder.with_name(f"{folder.name}{PARTIAL}"), _leaves(params)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        _write_json(partial, leaves=_describe(leaves))
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(partial / "state", args=_save_arguments(leaves))
        _seal(partial)
        _publish(partial, folder)
    except Exception as error:
        _remove(partial)
        full = "disk full: " if _is_disk_full(error) else ""
        raise CheckpointError(f"cannot write the parameters to {folder}: {full}{error}") from error


def load_parameters(directory: str | os.PathLike, abstract: Any = None) -> Any:
    """The parameters that `save_parameters` wrote as folder `directory`.

    With `abstract` (a pytree of `jax.ShapeDtypeStruct`) they get its structure and shardings; without, they are a
    nested dict on the first device.

    Raises:
        CheckpointError: there are none, they are damaged, or they differ from `abstract` in path, shape or dtype.
    """
    folder = Path(directory).absolute()
    problem = _problem(folder) if folder.is_dir() else "there is no such folder"
    if problem:
        raise CheckpointError(f"cannot read the parameters in {folder}: {problem}.")
    return _read_subtree(folder, "", abstract)


def restore_parameters(run_directory: str | os.PathLike, abstract: Any = None) -> Any:
    """Only the parameters (`params` of the state) of the newest undamaged checkpoint of a run.

    All of its files are verified, but no other array is loaded, and nothing is changed on disk. `run_directory` is the
    folder given to `Checkpoints`, or its parent when that folder is named `checkpoints`. `abstract` is as in
    `load_parameters`.

    Raises:
        CheckpointError: there is no undamaged checkpoint, or it differs from `abstract`.
    """
    directory = Path(run_directory).absolute()
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    step, _ = _newest_good(directory)
    if step is None:
        raise CheckpointError(f"there is no checkpoint in {directory}; give the directory of a training run.")
    return _read_subtree(directory / str(step), "params/", abstract)


def _steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal() and entry.is_dir())


def _newest_good(directory: Path) -> tuple[int | None, list[int]]:
    """The newest undamaged step and the damaged steps after it; (None, []) when there is no checkpoint."""
    damaged: dict[int, str] = {}
    # Listed anew each time: a run may complete a checkpoint and delete an older one while we look.
    while steps := [step for step in _steps(directory) if step not in damaged]:
        problem = _problem(directory / str(steps[-1]))
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


def _set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint so that its step can be saved again."""
    target, count = folder.with_name(f"{folder.name}.corrupt"), 1
    while target.exists():
        count += 1
        target = folder.with_name(f"{folder.name}.corrupt-{count}")
    _publish(folder, target)


# --- files: flushing, checksums, rename -------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    """Every file below `folder` but the checksums."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)


def _digests(folder: Path) -> dict[str, list[Any]]:
    """File name -> [bytes, SHA-256] of every file below `folder`."""

    def digest(path: Path) -> list[Any]:
        with open(path, "rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]

    files = _files(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(digest, files)
        return {str(path.relative_to(folder)): value for path, value in zip(files, digests, strict=True)}


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a folder, though writes that a failed save left running may add to it meanwhile."""
    end = time.monotonic() + 2
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > end:
            logger.warning("could not delete %s", folder)
            return


def _seal(folder: Path) -> None:
    """Write the checksums of a finished folder; afterwards everything in it is on the disk."""
    (folder / CHECKSUMS).write_text(json.dumps(_digests(folder), indent=1))
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _publish(source: Path, target: Path) -> None:
    """Rename atomically, and make the rename last."""
    os.rename(source, target)
    _sync(target.parent)


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is as it was written."""
    try:
        expected, found = json.loads((folder / CHECKSUMS).read_text()), _digests(folder)
        for name, (size, digest) in expected.items():
            if name not in found:
                return f"{folder / name} is missing"
            if found[name][0] != size:
                return f"{folder / name} has {found[name][0]} bytes instead of {size}"
            if found[name][1] != digest:
                return f"the contents of {folder / name} have changed"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{folder / CHECKSUMS} or a file it lists cannot be read ({error})"
    return None


# --- trees of arrays --------------------------------------------------------------------------------------------------


def _leaves(tree: Any) -> dict[str, Any]:
    """Path such as `params/embedding` -> leaf. An attribute and a dict key of one name give the same path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_leaves`, as nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _describe(leaves: dict[str, Any]) -> dict[str, list[Any]]:
    """Path -> [dtype, shape], as JSON values."""
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves.items()}


def _require_same(folder: Path, saved: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    """Raise CheckpointError naming the first leaves that differ."""

    def show(leaf: list[Any] | None) -> str:
        return "absent" if leaf is None else f"{leaf[0]}{leaf[1]}"

    paths = [path for path in {**wanted, **saved} if saved.get(path) != wanted.get(path)]
    if paths:
        first = {path: (show(saved.get(path)), show(wanted.get(path))) for path in paths[:5]}
        listed = "".join(f"\n  {path}: {there} in the checkpoint, {here} here" for path, (there, here) in first.items())
        raise CheckpointError(
            f"checkpoint {folder} was made with another configuration: {len(paths)} of {len({**wanted, **saved})} "
            f"arrays differ, among them{listed}\nSet run.directory to another folder, or use the configuration it was "
            "made with; nothing was changed."
        )


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """`leaf` as a ShapeDtypeStruct with a sharding."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _write_json(folder: Path, **items: dict[str, Any]) -> None:
    """Make `folder` with one file for each item."""
    folder.mkdir()
    for name, item in items.items():
        (folder / f"{name}.json").write_text(json.dumps(item, indent=1), encoding="utf-8")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def _save_arguments(leaves: dict[str, Any]) -> ocp.args.StandardSave:
    """What Orbax saves, and in which chunks: small ones, so that a device of any mesh reads little besides its shard."""

    def chunks(leaf: Any) -> ocp.SaveArgs:
        # Orbax halves the longest axes first and would never divide the experts, [periods, X, ...].
        experts = leaf.ndim > 3 and leaf.shape[1] <= MOST_EXPERTS
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(1,) if experts else ())

    return ocp.args.StandardSave(_nest(leaves), _nest({path: chunks(leaf) for path, leaf in leaves.items()}))


def _read_arrays(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Path -> array for the leaves in `wanted` (ShapeDtypeStructs with shardings); the other arrays are not read.

    Each distinct shard is read once and put on its devices. Host memory holds the shards on their way there,
    `READ_BYTES` together (or one that is larger), and never a whole array that is split.
    """
    item = _nest(wanted)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            chunks = _leaves(checkpointer.metadata(folder / "state").item_metadata.tree)
        largest = max((_largest_read(leaf, chunks[path]) for path, leaf in wanted.items()), default=0)
        reader = ocp.BasePyTreeCheckpointHandler(restore_concurrent_bytes=max(READ_BYTES, largest + 1))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=reader)) as checkpointer:
            tree = checkpointer.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(
                    item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
                ),
            )
    except Exception as error:
        raise CheckpointError(f"cannot read the arrays in {folder}: {error}") from error
    return _leaves(tree)


def _largest_read(leaf: jax.ShapeDtypeStruct, metadata: Any) -> int:
    """Bytes of the largest shard of `leaf`, counted in whole chunks, which are read and unpacked as one."""
    storage = getattr(metadata, "storage", None)
    if storage is None or len(storage.chunk_shape) != leaf.ndim:  # PRNG keys: a few bytes
        return _bytes(leaf)

    def size(shard: tuple[slice, ...]) -> int:
        total = leaf.dtype.itemsize
        for part, length, chunk in zip(shard, leaf.shape, storage.chunk_shape, strict=True):
            start, stop, _ = part.indices(length)
            total *= -(-stop // chunk) * chunk - start // chunk * chunk
        return total

    return max(map(size, leaf.sharding.addressable_devices_indices_map(leaf.shape).values()))


def _read_subtree(folder: Path, prefix: str, abstract: Any) -> Any:
    """The arrays whose path begins with `prefix`, in the structure of `abstract` (nested dicts if None)."""
    leaves = _read_json(folder, "leaves")
    saved = {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}
    if not saved:
        raise CheckpointError(f"checkpoint {folder} holds no parameters.")
    if abstract is None:
        wanted = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, (dtype, shape) in saved.items()}
    else:
        wanted = _leaves(abstract)
        _require_same(folder, saved, _describe(wanted))
    values = _read_arrays(folder, {prefix + path: _placed(leaf) for path, leaf in wanted.items()})
    found = {path: values[prefix + path] for path in wanted}
    return _nest(found) if abstract is None else jax.tree.unflatten(jax.tree.structure(abstract), list(found.values()))


# --- sizes ------------------------------------------------------------------------------------------------------------


def _bytes(leaf: Any) -> int:
    """Bytes of an array; 16 an element for PRNG keys, whose dtype has no size of its own."""
    return math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 16)


def _human(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _free(directory: Path) -> str:
    return _human(shutil.disk_usage(directory).free)


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one it came from, says that there is no room (Orbax hides the number in its text)."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
