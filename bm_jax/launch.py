"""Start one process for each GPU of this host, or several on its CPU: `python -m bm_jax.launch train.py PRESET ...`.

    python -m bm_jax.launch train.py blackmamba_340m_1p5b --mesh.data 2          # as many processes as there are GPUs
    python -m bm_jax.launch --processes 2 train.py                               # two

One process can use all GPUs of a host as well; several are what a cluster runs. Where one ends with an error, the others
are ended too. Only process 0 writes to standard output; what the others say on standard error is marked with their number.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO, Any, cast

from bm_jax.processes import LOCAL_DEVICES, VARIABLES

GRACE_SECONDS = 15
"""What the others have to end by themselves once one has failed."""
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bm_jax.launch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, help="how many; the number of GPUs where not given")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    gpus = count_gpus()
    total = options.processes or gpus
    if total < 1:
        parser.error("there are no GPUs on this host: say how many --processes there are to be")
    if gpus and total > gpus:
        parser.error(f"--processes is {total}, but this host has {gpus} GPUs")
    return run([sys.executable, options.script, *options.arguments], total, one_gpu_each=bool(gpus))


def run(command: list[str], total: int, *, one_gpu_each: bool) -> int:
    """Run `command` as `total` processes that know of each other; the status of the first that failed, or 0."""
    address = f"127.0.0.1:{free_port()}"
    started: list[subprocess.Popen[bytes]] = []
    asked: list[tuple[int, int]] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append((number, len(started)))
        for process in started:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return start_and_wait(command, total, address, one_gpu_each, started, asked)
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def start_and_wait(
    command: list[str],
    total: int,
    address: str,
    one_gpu_each: bool,
    started: list[subprocess.Popen[bytes]],
    asked: list[tuple[int, int]],
) -> int:
    """Start them into `started`, and wait. Signals in `asked`, each with how many there were to get it, reach the others."""
    for number in range(total):
        own = dict(zip(VARIABLES, (address, str(total), str(number)), strict=True))
        own |= {LOCAL_DEVICES: str(number)} if one_gpu_each else {}
        # In a session of their own, so that a Ctrl-C in the terminal reaches them once, from here.
        options: dict[str, Any] = {"env": os.environ | own, "start_new_session": True, "preexec_fn": end_with_launcher}
        options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} if number else {}
        started.append(cast("subprocess.Popen[bytes]", subprocess.Popen(command, **options)))
    marked = [threading.Thread(target=mark, args=(number, process.stderr)) for number, process in enumerate(started) if number]
    for thread in marked:
        thread.start()
    for number, reached in list(asked):  # a second SIGINT would end a process that is saving
        for process in started[reached:]:
            process.send_signal(number)
    status = wait(started)
    for thread in marked:
        thread.join(timeout=5)
    return status


def end_with_launcher() -> None:
    """In a process that begins, on Linux: get SIGTERM when the launcher is gone, however it went, and so save and end."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def wait(started: list[subprocess.Popen[bytes]]) -> int:
    """Until all have ended, or one has failed and the others had their time to notice."""
    end, status = None, 0
    while any(process.poll() is None for process in started):
        for number, process in enumerate(started):
            if process.returncode and not status:
                status = shell_status(process.returncode)
                end = time.monotonic() + GRACE_SECONDS
                print(f"launch: process {number} ended with status {status}; ending the others", file=sys.stderr, flush=True)
        if end is not None and time.monotonic() > end:
            break
        time.sleep(0.1)
    return status or next((shell_status(process.returncode) for process in started if process.returncode), 0)


def shell_status(returncode: int) -> int:
    """As a shell says it: 128 and the signal's number where a signal ended the process."""
    return returncode if returncode >= 0 else 128 - returncode


def mark(number: int, stream: IO[bytes] | None) -> None:
    """Copy a process's standard error to ours, each line with its number."""
    assert stream is not None
    with stream:
        for line in stream:
            sys.stderr.buffer.write(b"[%d] " % number + line)
            sys.stderr.buffer.flush()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def count_gpus() -> int:
    """NVIDIA GPUs that processes started here may use; 0 without their driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return len(listed.stdout.splitlines())


if __name__ == "__main__":
    sys.exit(main())
