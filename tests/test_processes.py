"""Several processes that train one model on CPUs: the losses of one process, and what happens when one of them is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bm_jax import processes as processes_module
from bm_jax.config import ConfigError
from bm_jax.launch import free_port
from bm_jax.metrics import read_metrics
from bm_jax.processes import VARIABLES, connect, in_a_cluster

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--model.repeats 2 --model.width 32 --model.mamba.state-size 4 --model.moe.experts 4 --model.moe.width 32 "
    "--model.scan-unroll 1 --data.sequence-length 32 --data.batch-size 8 --optimizer.warmup-steps 5 "
    "--optimizer.learning-rate 5e-3 --optimizer.schedule constant --run.report-every 3 --run.eval-every 10 "
    "--run.eval-batches 2 --run.checkpoint-every 5 --run.sample-tokens 0 --mesh.data -1"
).split()
STEPS = 30


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"} | more


def command(directory: Path, steps: int) -> list[str]:
    return ["train.py", *FLAGS, "--run.steps", str(steps), "--run.directory", str(directory)]


def start(directory: Path, total: int, steps: int = STEPS, more: str = "") -> list[subprocess.Popen[str]]:
    """The processes of a run; `more` arguments override those of all."""
    address = f"127.0.0.1:{free_port()}"
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *command(directory, steps), *more.split()],
            env=environment(**dict(zip(VARIABLES, (address, str(total), str(number)), strict=True))),
            **options,
        )
        for number in range(total)
    ]


def end(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[str]:
    """What they said, once all have ended."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def objectives(directory: Path) -> dict[int, float]:
    return {row["step"]: row["objective"] for row in read_metrics(directory)}


def wait_for_step(directory: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 200
    path = directory / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert all(process.poll() is None for process in processes), end(processes)
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every step's objective of a run of one process that nothing disturbs."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    done = subprocess.run(
        [sys.executable, *command(directory, STEPS)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return objectives(directory)


def test_two_and_four_processes_train_as_one(alone, tmp_path):
    """Two begin, the launcher goes on with four; float32 sums of the same terms in another order."""
    directory = tmp_path / "run"
    processes = start(directory, 2, steps=15)
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    launched = [sys.executable, "-m", "bm_jax.launch", "--processes", "4", *command(directory, STEPS)]
    done = subprocess.run(launched, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 x cpu" in done.stdout + done.stderr
    assert objectives(directory) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_stop_and_a_restart_goes_on(alone, tmp_path, victim):
    directory = tmp_path / "run"
    processes = start(directory, 2, steps=100_000)
    wait_for_step(directory, 12, processes)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    other = processes[1 - victim]
    other.wait(timeout=60)
    assert time.monotonic() - killed < 15
    said = end(processes)[1 - victim]
    assert other.returncode != 0
    assert re.search(r"lost another one|another task died", said), said
    reached = max(int(folder.name) for folder in (directory / "checkpoints").iterdir() if folder.name.isdecimal())
    assert reached >= 5
    (again,) = start(directory, 1, steps=reached + 6)
    said = end([again])
    assert again.returncode == 0, said
    assert f"continuing after step {reached}" in said[0]
    found = objectives(directory)
    assert max(found) == reached + 6
    assert {step: found[step] for step in range(1, 1 + min(STEPS, reached + 6))} == pytest.approx(
        {step: alone[step] for step in range(1, 1 + min(STEPS, reached + 6))}, rel=1e-5
    )


def test_killed_again_and_again_it_trains_as_if_never(alone, tmp_path):
    """Processes killed at any moment, saves among them, and restarted in other numbers."""
    directory = tmp_path / "run"
    for total, step, victim in ((2, 6, 1), (4, 13, 2), (1, 19, 0)):
        processes = start(directory, total)
        wait_for_step(directory, step, processes)
        processes[victim].send_signal(signal.SIGKILL)
        end(processes, timeout=60)
    processes = start(directory, 2)
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert objectives(directory) == pytest.approx(alone, rel=1e-5)


def test_a_kill_during_a_save_leaves_the_checkpoint_before(alone, tmp_path):
    """Killed as soon as a part of a checkpoint is there, which only both together can complete."""
    directory = tmp_path / "run"
    processes = start(directory, 2, steps=100_000, more="--run.checkpoint-every 2")
    wait_for_step(directory, 8, processes)
    until = time.monotonic() + 60
    while not (parts := list((directory / "checkpoints").glob("*.partial*/state"))):
        assert time.monotonic() < until
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    processes[0].wait(timeout=60)
    assert time.monotonic() - killed < 15
    end(processes)
    begun = int(parts[0].parent.name.partition(".")[0])
    reached = max(int(folder.name) for folder in (directory / "checkpoints").iterdir() if folder.name.isdecimal())
    assert reached in (begun - 2, begun)  # it may just have been completed
    processes = start(directory, 2, steps=reached + 4)
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert f"continuing after step {reached}" in said[0]
    found = objectives(directory)
    steps = range(1, 1 + min(STEPS, reached + 4))
    assert {step: found[step] for step in steps} == pytest.approx({step: alone[step] for step in steps}, rel=1e-5)
    assert not list((directory / "checkpoints").glob("*.partial*"))


def test_processes_share_parameters_experts_and_widths_and_go_back(alone, tmp_path):
    """Other axes of the mesh over two processes, each going on where the one before ended; then back to an earlier step."""
    directory = tmp_path / "run"
    for steps, mesh in ((8, "fsdp"), (16, "expert"), (24, "tensor")):
        processes = start(directory, 2, steps, f"--mesh.data 1 --mesh.{mesh} 2 --run.keep-every 1")
        said = end(processes)
        assert [process.returncode for process in processes] == [0, 0], said
    assert objectives(directory) == pytest.approx({step: alone[step] for step in range(1, 25)}, rel=2e-5)
    processes = start(directory, 2, STEPS, "--mesh.data 2 --resume-from 10")
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert "continuing after step 10" in said[0]
    assert objectives(directory) == pytest.approx(alone, rel=2e-5)


def test_processes_rewind_together(tmp_path):
    """Every update is too large: both go back once, leave the same data out, and end with the same error."""
    directory = tmp_path / "run"
    processes = start(directory, 2, 5)
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    processes = start(directory, 2, STEPS, "--optimizer.skip-norm-above 1e-9 --run.rewinds 1 --run.max-nonfinite-steps 3")
    said = end(processes)
    assert [process.returncode for process in processes] == [1, 1], said
    assert "Gone back to step 5" in said[0]
    for text in said:
        assert "for 3 steps in a row" in text
        assert "The last good step is 5" in text
    (line,) = (directory / "skipped_data.jsonl").read_text().splitlines()
    assert '"back_to_step": 5' in line


def test_sigterm_to_the_launcher_saves_and_ends_with_status_zero(alone, tmp_path):
    directory = tmp_path / "run"
    launched = [sys.executable, "-m", "bm_jax.launch", "--processes", "2", *command(directory, 100_000)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    launcher = subprocess.Popen(launched, cwd=ROOT, env=environment(), **options)
    wait_for_step(directory, 7, [launcher])
    launcher.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    (said,) = end([launcher], timeout=60)
    assert launcher.returncode == 0, said
    assert time.monotonic() - asked < 10
    stopped = re.search(r"Stopped after step (\d+)", said)
    assert stopped is not None, said
    assert (directory / "checkpoints" / stopped[1]).is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_launcher_that_is_killed_leaves_no_process_behind(alone, tmp_path):
    directory = tmp_path / "run"
    launched = [sys.executable, "-m", "bm_jax.launch", "--processes", "2", *command(directory, 100_000)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    launcher = subprocess.Popen(launched, cwd=ROOT, env=environment(), **options)
    wait_for_step(directory, 7, [launcher])
    launcher.kill()
    said = launcher.communicate(timeout=20)[0]  # to the end of what its processes say
    stopped = re.search(r"Stopped after step (\d+)", said)
    assert stopped is not None, said
    assert (directory / "checkpoints" / stopped[1]).is_dir()


def test_directories_that_are_not_shared_are_refused(tmp_path):
    """Two processes whose run directories have one name for each of them, as on two hosts without a shared file system."""
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        own = environment(**dict(zip(VARIABLES, (address, "2", str(number)), strict=True)), PYTHONPATH=str(ROOT))
        words = [sys.executable, str(ROOT / "train.py"), *command(Path("run"), STEPS)[1:]]
        options = {"cwd": tmp_path / str(number), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(words, env=own, **options))
    said = end(processes)
    assert [process.returncode for process in processes] == [1, 1], said
    assert all("processes 1 do not see the folder" in text for text in said), said


def test_processes_with_other_settings_are_refused(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for number, rate in enumerate(("1e-3", "1e-2")):
        own = environment(**dict(zip(VARIABLES, (address, "2", str(number)), strict=True)))
        words = [sys.executable, *command(tmp_path / "run", STEPS), "--optimizer.learning-rate", rate]
        options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(words, env=own, **options))
    said = end(processes)
    assert [process.returncode for process in processes] == [1, 1], said
    assert "processes 1 were started with other settings" in said[0]
    assert "optimizer.learning_rate is 0.01 here, 0.001 in process 0" in said[1]
    assert not (tmp_path / "run").exists()


def test_nobody_at_the_address_of_process_0_is_an_error(monkeypatch):
    monkeypatch.setattr(processes_module, "CONNECT_SECONDS", 1)
    with pytest.raises(ConfigError, match="process 0 cannot be reached"):
        connect(f"127.0.0.1:{free_port()}", 2, 1)


def test_sigterm_to_one_process_stops_all_of_them_with_status_zero(alone, tmp_path):
    directory = tmp_path / "run"
    processes = start(directory, 2, steps=100_000)
    wait_for_step(directory, 7, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = end(processes, timeout=60)
    assert [process.returncode for process in processes] == [0, 0], said
    assert "the checkpoint is saved" in said[0]


def test_what_is_missing_or_wrong_is_named(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for arguments, message in (
        (("host:1", None, 0), "there is no JAX_NUM_PROCESSES"),
        (("host", 2, 0), "HOST:PORT"),
        (("host:1", 2, 2), "must be below"),
        (("host:99999", 2, 0), "a port below 65536"),
        (("host:0", 2, 1), "a port below 65536"),
        (("no-such-host.invalid:9", 2, 1), r"process 0 cannot be reached at no-such-host.invalid:9"),
    ):
        with pytest.raises(ConfigError, match=message):
            connect(*arguments)
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "a")
    with pytest.raises(ConfigError, match="JAX_LOCAL_DEVICE_IDS"):
        connect("host:1", 2, 0)


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_a_cluster_is_told_by_its_environment(variables, several):
    assert in_a_cluster(variables) == several
