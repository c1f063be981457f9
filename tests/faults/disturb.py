"""Faults done to a training run: kills, a full disk, damaged checkpoints and data, a clock that jumps.

    python tests/faults/disturb.py --kills 100 --log faults.log       # by hand: 40 minutes on two cores

A small run is trained once with nothing disturbing it. Then the same run suffers; each time the same command goes on, or says
in one line which file is wrong and which step is the last good one. In the end every step must have measured what it measured
undisturbed, to the last bit. `test_faults.py` does the same with a few kills.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = (
    "--model.repeats 1 --model.width 32 --model.mamba.state-size 4 --model.moe.experts 4 --model.moe.width 32 "
    "--model.scan-unroll 1 --data.sequence-length 32 --data.batch-size 8 --optimizer.warmup-steps 5 "
    "--optimizer.schedule constant --run.report-every 50 --run.eval-every 1000000 --run.sample-tokens 0 "
    "--run.checkpoint-every 10 --run.keep-last 4"
).split()
CLOCKS = ("tokens_per_second", "input_wait", "model_flop_utilisation")


class Run:
    """One run directory and the command that trains in it."""

    def __init__(self, directory: Path, data: Path, steps: int) -> None:
        self.directory, self.data, self.steps = directory, data, steps

    def start(self, *extra: str, steps: int | None = None, **environment: str) -> subprocess.Popen[str]:
        """The process."""
        command = [sys.executable, "train.py", *FLAGS, "--data.sources", str(self.data), "--run.directory", str(self.directory)]
        return subprocess.Popen(
            [*command, "--run.steps", str(steps or self.steps), *extra],
            cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONFAULTHANDLER": "1"} | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish(self, *extra: str, expect: int = 0, steps: int | None = None, **environment: str) -> str:
        """Start and wait; what it said."""
        process = self.start(*extra, steps=steps, **environment)
        said = process.communicate(timeout=600)[0]
        assert process.returncode == expect, (process.returncode, said[-3000:])
        return said

    def reached(self) -> int:
        """The last step whose row is whole."""
        path = self.directory / "metrics.jsonl"
        rows = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
        return json.loads(rows[-1])["step"] if rows else 0

    def checkpoints(self) -> list[int]:
        """Their steps, oldest first."""
        folder = self.directory / "checkpoints"
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()) if folder.exists() else []

    def history(self) -> list[dict]:
        """What each step measured, without what depends on the clock."""
        rows = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]

    def kill_after(self, seconds: float, number: int = signal.SIGKILL, **environment: str) -> tuple[int, str, float]:
        """Start, wait for the first new step and so long after it, send a signal; status, output, seconds to the end."""
        before, process = self.reached(), self.start(**environment)
        until = time.monotonic() + 120
        while self.reached() <= before and process.poll() is None:
            if time.monotonic() > until:
                process.send_signal(signal.SIGABRT)
                raise AssertionError(f"no step in two minutes: {process.communicate()[0][-3000:]}")
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(number)
        sent = time.monotonic()
        said = process.communicate(timeout=60)[0]
        return process.returncode, said, time.monotonic() - sent


@contextlib.contextmanager
def changed(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """The file with other contents, and as it was afterwards, its time of change too."""
    times, contents = os.stat(path), path.read_bytes()
    path.write_bytes(change(contents))
    try:
        yield
    finally:
        path.write_bytes(contents)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip(contents: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(contents) // 2
    return contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :]


def halve(contents: bytes) -> bytes:
    return contents[: len(contents) // 2]


def prepare(folder: Path) -> Path:
    """Data of the run."""
    text = folder / "text.txt"
    text.write_text("".join(f"{i} sheep jump over {i * i % 97} lazy dogs.\n" for i in range(20_000)))
    command = [sys.executable, "-m", "bm_jax.data", "prepare", str(text), str(folder / "data"), "--tokenizer", "byte"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "data"


def damage(run: Run, r: random.Random) -> str:
    """Truncate, flip a bit of, or delete a file of the newest checkpoint; what was done, which names the file."""
    files = [path for path in (run.directory / "checkpoints" / str(run.checkpoints()[-1])).rglob("*") if path.is_file()]
    path, how = r.choice([path for path in sorted(files) if path.stat().st_size]), r.choice(["truncated", "flipped", "deleted"])
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes((halve if how == "truncated" else flip)(path.read_bytes()))
    return f"{how} {path}"


def suffer(folder: Path, kills: int, seed: int, say: Callable[[str], None]) -> None:
    """All of it; raises AssertionError where something was lost."""
    r, data = random.Random(seed), prepare(folder)
    steps = 150 + 60 * kills
    undisturbed = Run(folder / "undisturbed", data, steps)
    undisturbed.finish()
    say(f"undisturbed: {steps} steps")
    run = Run(folder / "run", data, steps)
    for number in range(kills):
        start = run.reached()
        run.kill_after(r.uniform(0, 0.35))
        partial = [entry.name for entry in (run.directory / "checkpoints").glob("*.partial*")]
        say(f"kill {number + 1}: steps {start} to {run.reached()}, checkpoints {run.checkpoints()}, unfinished {partial}")
        if run.reached() >= steps - 60:
            break
    status, said, seconds = run.kill_after(0.1, signal.SIGTERM)
    assert status == 0, said
    assert seconds < 10
    assert f"Stopped after step {run.checkpoints()[-1]};" in said, said
    say(f"SIGTERM: saved step {run.checkpoints()[-1]} and ended with status 0 in {seconds:.1f} s")

    for _ in range(max(3, kills // 10)):
        what = damage(run, r)
        name = what.split("/")[-1]
        status, said, _ = run.kill_after(0.05, signal.SIGTERM)
        assert status == 0, said
        assert "is damaged and not used" in said, said
        assert name in said or "checksums.json" in said, said
        say(f"{what}: said so and went on from the checkpoint before")

    shard = next(data.glob("train-*.tokens"))
    for how, change in (("truncated", halve), ("flipped", flip)):
        with changed(shard, change):
            said = run.finish(expect=1)
        assert str(shard) in said, said
        say(f"data {how} before a start: {said.strip().splitlines()[-1][:100]}")
    process, before = run.start(), run.reached()
    while run.reached() <= before and process.poll() is None:
        time.sleep(0.01)
    with changed(shard, halve):
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 1, said
    assert str(shard) in said, said
    assert f"The last good step is {run.checkpoints()[-1]}" in said, said
    say(f"data truncated under the run: {[line for line in said.splitlines() if 'error:' in line][-1][:100]}")

    patch = folder / "clock"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(
        "import time\nreal, start = time.time, time.monotonic()\n"
        "def jumping():\n"
        "    return real() + (0, -86400 * 3650, 86400 * 365)[int((time.monotonic() - start) * 2) % 3]\n"
        "time.time = jumping\n"
    )
    status, said, _ = run.kill_after(0.1, signal.SIGTERM, PYTHONPATH=str(patch))
    assert status == 0, said
    say("a clock that jumps by years: went on")

    step = run.checkpoints()[0]
    run.kill_after(0.05, signal.SIGTERM)
    while run.checkpoints()[0] <= step:
        run.kill_after(0.05, signal.SIGTERM)
    step = run.checkpoints()[1]
    said = run.finish("--resume-from", str(step))
    assert f"continuing after step {step}" in said, said
    say(f"--resume-from {step}: went back and on to the end")
    assert run.history() == undisturbed.history()
    say(f"every one of {steps} steps measured what it measured undisturbed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    start, folder = time.monotonic(), Path(tempfile.mkdtemp())
    with open(options.log or os.devnull, "w", encoding="utf-8") as log:

        def say(text: str) -> None:
            text = text.replace(f"{folder}/", "")
            for file in (sys.stdout, log):
                print(f"{time.monotonic() - start:7.1f} s  {text}", file=file, flush=True)

        suffer(folder, options.kills, options.seed, say)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
