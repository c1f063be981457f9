"""Several processes that train one model together: finding each other, agreeing, and ending when one of them is gone."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bm_jax.config import ConfigError

CONNECT_SECONDS = 300
"""How long a process looks for process 0, which may start later."""
HEARTBEAT_SECONDS = 10
"""A process that is silent for so long counts as gone, which ends all others."""
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LOCAL_DEVICES = "JAX_LOCAL_DEVICE_IDS"

T = TypeVar("T")


def connect(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, cluster: bool = False
) -> None:
    """Join the other processes, if there are any; call it before anything uses a device.

    Where the arguments are None they are read from the environment: `JAX_COORDINATOR_ADDRESS` (HOST:PORT, a port of process
    0's host), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, with `JAX_LOCAL_DEVICE_IDS` (as 0,1) for a process that is not to
    have all devices of its host. Without those, and with `cluster` or in a step of several SLURM tasks, jax asks the cluster
    (SLURM, Cloud TPU, Open MPI, Kubernetes). Otherwise there is one process and nothing to do.

    Raises:
        ConfigError: some of the three are missing or wrong, or process 0 could not be reached in `CONNECT_SECONDS`. Where
            it can be, but others do not come, jax ends the process after five minutes, with a message of its own.
    """
    given = [coordinator, processes, process]
    values = [os.environ.get(name) if value is None else str(value) for name, value in zip(VARIABLES, given, strict=True)]
    options: dict[str, Any] = {}
    if any(value is not None for value in values):
        missing = [name for name, value in zip(VARIABLES, values, strict=True) if not value]
        if missing:
            raise ConfigError(f"several processes need {', '.join(VARIABLES)} or their flags; there is no {', '.join(missing)}")
        address, total, own = map(str, values)
        if not (total.isdecimal() and own.isdecimal() and int(own) < int(total)):
            raise ConfigError(f"JAX_NUM_PROCESSES is {total!r}, JAX_PROCESS_ID {own!r}: the second must be below the first")
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(f"JAX_COORDINATOR_ADDRESS must be HOST:PORT with a port below 65536, got {address!r}")
        local = os.environ.get(LOCAL_DEVICES)
        if local is not None and not all(part.isdecimal() for part in local.split(",")):
            raise ConfigError(f"{LOCAL_DEVICES} must be numbers with commas between them, got {local!r}")
        options = {"coordinator_address": address, "num_processes": int(total), "process_id": int(own)}
        options |= {"local_device_ids": [int(part) for part in local.split(",")]} if local is not None else {}
    elif not (cluster or in_a_cluster(os.environ)):
        return
    # It would catch SIGTERM, which `bm_jax.train.Interrupt` does.
    jax.config.update("jax_enable_preemption_service", False)
    if options.get("process_id"):
        _await_coordinator(options["coordinator_address"])
    try:
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes of this run could not find each other: {error}") from error


def _await_coordinator(address: str) -> None:
    """Wait until process 0 listens: jax would end this process with a stack of C++ if it never does."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > end or isinstance(error, socket.gaierror):
                raise ConfigError(
                    f"process 0 cannot be reached at {address} ({error}). Is that its host, is it running, and is the "
                    "port open?"
                ) from None
            time.sleep(1)


def in_a_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several SLURM tasks or TPU hosts, by what starts them put in the environment."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return (tasks.isdecimal() and int(tasks) > 1) or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def is_first() -> bool:
    """Whether this process is the one that writes what there is one of: it has number 0."""
    return jax.process_index() == 0


def require_equal(settings: Mapping[str, Any]) -> None:
    """ConfigError where a process was started with other settings than process 0: each would train something else."""
    if jax.process_count() == 1:
        return
    own = _flat(json.loads(json.dumps(settings)))
    wanted = from_first(lambda: own)
    different = [name for name in {**wanted, **own} if wanted.get(name) != own.get(name)]
    equal = multihost_utils.process_allgather(np.array(not different))
    if different:
        listed = "; ".join(f"{name} is {own.get(name)!r} here, {wanted.get(name)!r} in process 0" for name in different)
        raise ConfigError(f"process {jax.process_index()} was started with other settings: {listed}. Start all with the same")
    if not equal.all():
        others = ", ".join(str(number) for number in np.flatnonzero(~equal))
        raise ConfigError(f"processes {others} were started with other settings than this one, and say which")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def require_shared(directory: Path) -> None:
    """ConfigError where processes see different folders of this name: parts of a checkpoint would lie in each."""
    if jax.process_count() == 1:
        return
    path, own = directory / ".shared", secrets.token_hex(8)

    def write() -> str:
        path.write_text(own)
        return own

    wanted = from_first(write)
    found = path.read_text() if path.exists() else None
    others = multihost_utils.process_allgather(np.array(found == wanted))
    if not others.all():
        missing = ", ".join(str(number) for number in np.flatnonzero(~others))
        raise ConfigError(
            f"processes {missing} do not see the folder {directory} of process 0. Set run.directory to one that all hosts share"
        )


def from_first(make: Callable[[], T], errors: tuple[type[Exception], ...] = ()) -> T:
    """What `make` returns in process 0, a JSON value, in every process; one of these `errors` is raised in every process."""
    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"value": make()}
        except errors as error:
            said = {"error": errors.index(type(error)) if type(error) in errors else 0, "message": str(error)}
    text = json.dumps(said).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text.ljust(length)[:length], np.uint8)
    heard = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)))
    if "error" in heard:
        raise errors[heard["error"]](heard["message"])
    return heard["value"]


class AnyProcess:
    """The largest number that any process gave, known to all of them at the same call: the next one.

    All processes call it as often. What is sent at one call is read at the next, so that nobody waits.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(Mesh(mesh.devices.reshape(-1), ("device",)), PartitionSpec("device"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(self._sharding.mesh, PartitionSpec()))
        self._sent: Array | None = None

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        before, shape = self._sent, (self._sharding.mesh.size,)
        self._sent = self._largest(jax.make_array_from_callback(shape, self._sharding, lambda _: np.full(1, number)))
        return 0 if before is None else int(before)


def global_array(rows: np.ndarray, first: int, total: int, sharding: NamedSharding) -> Array:
    """The array `[total, ...]` of which this process has `rows`, from row `first` on: all that its devices need."""
    shape = (total, *rows.shape[1:])

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(total)
        return rows[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, part)


def own_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[int, int]:
    """First row, and the number of rows, that the devices of this process have of an array of this shape.

    Raises:
        ConfigError: they are not an equal share of consecutive rows.
    """
    parts = [index[0].indices(shape[0])[:2] for index in sharding.addressable_devices_indices_map(shape).values() if index]
    if not parts:
        raise ConfigError(
            f"no device of process {jax.process_index()} is in the mesh, which has {sharding.mesh.size} of the "
            f"{jax.device_count()} devices; give it all of them, as with --mesh.data -1"
        )
    first, last = min(start for start, _ in parts), max(stop for _, stop in parts)
    rows = last - first
    if shape[0] % rows or first % rows or len({row for start, stop in parts for row in range(start, stop)}) != rows:
        raise ConfigError(
            f"process {jax.process_index()} would have the rows {first} to {last} of {shape[0]}, which is no equal share: let "
            "the mesh axes data, fsdp and expert split the batch over whole processes"
        )
    return first, rows


def leave() -> NoReturn:
    """End this process now, with status 1, so that the others learn of it: the usual end would wait for them."""
    sys.stdout.flush()
    os._exit(1)
