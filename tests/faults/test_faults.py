"""A run that suffers every fault of `disturb.py`, killed three times."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from bm_jax.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).resolve().parent))
from disturb import Run, prepare, suffer

pytestmark = pytest.mark.alone


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
    said: list[str] = []
    suffer(tmp_path, 3, 1, said.append)
    assert said[-1].endswith("undisturbed")


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(tmp_path, small_disk):
    """The last good checkpoint is named, nothing half-written stays, and the same command goes on once there is room."""
    data = prepare(tmp_path)
    undisturbed = Run(tmp_path / "undisturbed", data, 40)
    undisturbed.finish()
    run = Run(small_disk / "run", data, 40)
    run.finish(steps=20)
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    said = run.finish(expect=1)
    assert "disk full" in said or "No space left" in said, said
    assert run.checkpoints() == [10, 20]
    filler.unlink()
    run.finish()
    objectives = lambda run: [(row["step"], row["objective"]) for row in run.history()]  # noqa: E731
    assert objectives(run) == objectives(undisturbed)


@pytest.mark.slow
def test_a_read_only_run_directory_is_named_and_left_alone(tmp_path, small_disk):
    data = prepare(tmp_path)
    run = Run(small_disk / "run", data, 30)
    run.finish(steps=20)
    history = run.history()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = run.finish(expect=1)
    assert f"cannot use the run directory {run.directory}: Read-only file system" in said
    assert "The last good step is 20." in said
    assert "Traceback" not in said
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert run.history() == history
    run.finish()
    assert run.history()[:20] == history
    assert run.checkpoints()[-1] == 30


@pytest.mark.slow
def test_a_long_run_grows_in_nothing(tmp_path):
    """Two thousand steps: memory, open files and the time of a step in the last quarter are those of the second."""
    run = Run(tmp_path / "run", prepare(tmp_path), 2000)
    process = run.start("--run.checkpoint-every", "100")
    seen: list[tuple[int, int, int]] = []
    proc = Path(f"/proc/{process.pid}")
    if not proc.exists():
        pytest.skip("needs /proc")
    while process.poll() is None:
        step = run.reached()
        try:
            pages, files = int((proc / "statm").read_text().split()[1]), len(list((proc / "fd").iterdir()))
        except (FileNotFoundError, ProcessLookupError, IndexError):
            break
        if 500 <= step < 1990 and (not seen or step > seen[-1][0]):
            seen.append((step, pages, files))
    said = process.communicate()[0]
    assert process.returncode == 0, said
    early, late = ([row for row in seen if low <= row[0] < low + 490] for low in (500, 1500))
    median = lambda rows, k: sorted(row[k] for row in rows)[len(rows) // 2]  # noqa: E731
    assert len(early) > 5
    assert len(late) > 5
    assert median(late, 1) < 1.05 * median(early, 1)
    assert median(late, 2) <= median(early, 2) + 2
    speed = [row["tokens_per_second"] for row in read_metrics(run.directory)]
    assert sorted(speed[1500:])[250] > 0.7 * sorted(speed[500:1000])[250]
