"""The training run: exact continuation after every kind of stop, skipped updates, accumulation, and errors."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

from bm_jax.checkpoint import CheckpointError, Checkpoints, RunDirectoryError, lock_run_directory
from bm_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    MambaConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    RunConfig,
)
from bm_jax.data import bundled, open_data, prepare
from bm_jax.data.watch import DataWatch
from bm_jax.loss import next_token_loss
from bm_jax.metrics import read_metrics
from bm_jax.optimizer import decay_mask, learning_rate, make_optimizer
from bm_jax.train import NonFiniteError, fit
from bm_jax.train_step import init_state, make_train_step

ROOT = Path(__file__).resolve().parent.parent

TINY = Config(
    model=ModelConfig(
        layers=("mamba", "moe"),
        repeats=2,
        vocab_size=264,
        width=32,
        mamba=MambaConfig(state_size=4),
        moe=MoeConfig(experts=4, width=32),
        compute_dtype="float32",
    ),
    data=DataConfig(sequence_length=32, batch_size=8),
    optimizer=OptimizerConfig(warmup_steps=5),
    run=RunConfig(steps=40, report_every=3, eval_every=10, eval_batches=2, checkpoint_every=10, sample_tokens=0),
)
FLAGS = (
    "--model.repeats 2 --model.width 32 --model.mamba.state-size 4 --model.moe.experts 4 --model.moe.width 32 "
    "--model.scan-unroll 1 --data.sequence-length 32 --data.batch-size 8 --optimizer.warmup-steps 5 "
    "--optimizer.learning-rate 5e-3 --run.steps 40 --run.report-every 3 --run.eval-every 10 --run.eval-batches 2 "
    "--run.checkpoint-every 10 --run.sample-tokens 0"
).split()


def at(directory: Path, **run) -> Config:
    return dataclasses.replace(TINY, run=dataclasses.replace(TINY.run, directory=str(directory), **run))


def history(directory: Path) -> list[dict]:
    """The rows of a run without what depends on the clock."""
    clocks = ("tokens_per_second", "input_wait", "model_flop_utilisation")
    return [{k: v for k, v in row.items() if k not in clocks} for row in read_metrics(directory)]


def start(directory: Path, *extra: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--run.directory", str(directory), *FLAGS, *extra]
    # Processes of one test compile the same programs: the first one's are kept for the others.
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{directory}-cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | cache
    )


def wait_for_rows(process: subprocess.Popen, directory: Path, rows: int) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        path = directory / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended or hung before row {rows}: {process.stdout.read() if process.poll() else ''}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run, in this process, in a thread as notebooks and servers may have it (no signals there)."""
    directory = tmp_path_factory.mktemp("whole")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        result = pool.submit(fit, at(directory, sample_tokens=20)).result()
    assert result.finished
    assert result.step == 40
    assert len(result.sample) > 20
    return directory


def test_a_run_reports_what_it_should(whole):
    rows = history(whole)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert all({"objective", "grad_norm", "learning_rate", "skipped"} <= row.keys() for row in rows)
    assert rows[-1]["objective"] < rows[0]["objective"] - 1
    assert [row["step"] for row in rows if "loss" in row] == [*range(3, 40, 3), 40]
    assert [row["step"] for row in rows if "validation_loss" in row] == [10, 20, 30, 40]
    load = np.array(rows[-1]["expert_load"])
    assert load.shape == (2, 4)
    np.testing.assert_allclose(load.sum(-1), 1, atol=1e-6)
    assert (whole / "losses.png").stat().st_size > 1000
    assert (whole / "expert_load.png").stat().st_size > 1000
    assert list((whole / "tensorboard").iterdir())


@pytest.mark.slow
def test_reported_losses_use_inference_routing(whole, tmp_path):
    """The first reported loss is that of the parameters before step 3 on batch 3, routed as in inference."""
    from bm_jax.data.pipeline import open_data

    config = TINY
    optimizer = make_optimizer(config.optimizer, 40)
    state, step = jax.jit(lambda: init_state(config, optimizer))(), jax.jit(make_train_step(config, optimizer))
    batches = open_data(config.data, 264).train_batches()
    for _ in range(2):
        state, _ = step(state, next(batches))
    _, sums, _ = jax.jit(lambda p, b: next_token_loss(p, b, config.model))(state.params, next(batches))
    row = next(row for row in history(whole) if row["step"] == 3)
    assert row["loss"] == pytest.approx(float(sums.nll / sums.tokens), rel=1e-6)
    assert row["loss"] != row["objective"]


@pytest.mark.slow
def test_killed_at_several_moments_it_continues_bit_for_bit(whole, tmp_path):
    """SIGKILL in the first interval, while checkpoints are being saved, and between them; then to the end."""
    for rows in (4, 10, 21, 33):
        process = start(tmp_path)
        wait_for_rows(process, tmp_path, rows)
        process.kill()
        process.communicate()
    # A power cut in the middle of a save leaves a part of a checkpoint.
    newest = max((p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    shutil.copytree(newest, tmp_path / "checkpoints" / "39.partial")
    process = start(tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert history(tmp_path) == history(whole)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_continues(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "40"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    with pytest.warns(RuntimeWarning, match=r"40"):
        fit(at(tmp_path))
    assert history(tmp_path) == history(whole)
    assert (tmp_path / "checkpoints" / "40.corrupt").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)])
def test_asked_to_stop_it_saves_and_continues_bit_for_bit(whole, tmp_path, number, status):
    process = start(tmp_path, "--run.checkpoint-every", "1000")
    wait_for_rows(process, tmp_path, 5)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    assert "Continue: python train.py --run.directory" in output
    stopped = history(tmp_path)[-1]["step"]
    assert stopped < 40
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()
    fit(at(tmp_path))
    assert history(tmp_path) == history(whole)


def test_a_longer_run_continues_from_a_finished_one(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    result = fit(at(tmp_path, steps=45))
    assert result.step == 45
    assert [row["step"] for row in history(tmp_path)] == list(range(1, 46))


def test_another_model_data_or_seed_is_refused_and_nothing_is_written(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    wider = dataclasses.replace(at(tmp_path), model=dataclasses.replace(TINY.model, width=64))
    with pytest.raises(ConfigError, match="width was 32, is now 64"):
        fit(wider)
    longer = dataclasses.replace(at(tmp_path), data=dataclasses.replace(TINY.data, sequence_length=16))
    with pytest.raises(ConfigError, match="sequence_length was 32, is now 16"):
        fit(longer)
    (tmp_path / "config.json").unlink()  # the newest checkpoint has one, too
    with pytest.raises(ConfigError, match="width was 32, is now 64"):
        fit(wider)
    with pytest.raises(ConfigError, match=r"seed was 0, is now 5"):
        fit(dataclasses.replace(at(tmp_path), data=dataclasses.replace(TINY.data, seed=5)))
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    before.pop(tmp_path / "config.json")
    assert after == before


def test_another_tokenizer_under_the_same_name_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="another tokenizer"):
        fit(at(tmp_path, steps=50))


def test_several_sources_are_mixed_and_validated_apart(tmp_path):
    for name in ("first", "second"):
        texts = [json.dumps({"text": f"{name} document {i}. " * 20}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
        prepare([tmp_path / f"{name}.jsonl"], tmp_path / name, validation_fraction=0.2, progress=False)
    sources = (str(tmp_path / "first"), str(tmp_path / "second"))
    data = dataclasses.replace(TINY.data, sources=sources, weights=(3.0, 1.0))
    config = dataclasses.replace(at(tmp_path / "run", steps=4), data=data)
    fit(config)
    row = history(tmp_path / "run")[-1]
    parts = [row["validation_loss/first"], row["validation_loss/second"]]
    assert min(parts) < row["validation_loss"] < max(parts)


def test_a_run_directory_in_use_is_refused(tmp_path):
    with lock_run_directory(tmp_path), pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()}"):
        fit(at(tmp_path))
    assert not (tmp_path / "config.json").exists()


def test_bad_inputs_are_named(tmp_path):
    def run(**parts) -> None:
        fit(dataclasses.replace(at(tmp_path), **parts))

    with pytest.raises(ConfigError, match=r"no/tokenizer\.json"):
        run(data=dataclasses.replace(TINY.data, tokenizer="no/tokenizer.json"))
    with pytest.raises(ConfigError, match="no/data"):
        run(data=dataclasses.replace(TINY.data, sources=("no/data",)))
    with pytest.raises(ConfigError, match="vocab_size"):
        run(model=dataclasses.replace(TINY.model, vocab_size=256))
    with pytest.raises(ConfigError, match="needs 2 devices, there are 1"):
        run(mesh=MeshConfig(data=2))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_the_command_line_names_near_misses(tmp_path):
    def run(*arguments: str) -> str:
        command = [sys.executable, "train.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode not in (0, 130)
        assert "Traceback" not in done.stderr
        return " ".join((done.stdout + done.stderr).replace("│", " ").split())

    assert "--run.steps" in run("default", "--run.stepz", "5")
    assert "invalid" in run("default", "--run.steps", "many").lower()
    assert "did you mean blackmamba_340m_1p5b" in run("blackmamba_340m")
    assert "width must be a positive integer, got -1" in run("--model.width", "-1", "--run.directory", str(tmp_path))
    assert "must be a multiple of mesh.expert" in run("--mesh.expert", "3", "--run.directory", str(tmp_path))


def batch_of(seed: int, rows: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, 32, (rows, 1)))
    return {
        "tokens": rng.integers(0, 257, (rows, 33)).astype(np.int32),
        "segment_ids": (1 + (np.arange(33) >= lengths)).astype(np.int32),
    }


# Plain gradient descent: Adam turns the rounding of a tiny gradient into a full step.
SGD = optax.sgd(1.0)


@functools.cache
def first_state():
    return jax.jit(lambda: init_state(TINY, SGD))()


@functools.cache
def one_step(config: Config, seed: int) -> tuple:
    return jax.jit(make_train_step(config, SGD))(first_state(), batch_of(seed))


def assert_close(tree, other, rtol: float) -> None:
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("router", [pytest.param("topk", marks=pytest.mark.long), "switch"])
def test_accumulation_equals_one_batch(router):
    """Routers that look at one token at a time: Sinkhorn and the balance loss depend on what is in a microbatch."""
    model = dataclasses.replace(TINY.model, moe=dataclasses.replace(TINY.model.moe, router=router))
    base = dataclasses.replace(TINY, model=model, run=dataclasses.replace(TINY.run, z_loss=1e-3))
    split = dataclasses.replace(base, run=dataclasses.replace(base.run, accumulation=4))
    (state, metrics), (other, other_metrics) = one_step(base, 0), one_step(split, 0)
    # float32 sums of the same terms in another order
    assert metrics["objective"] == pytest.approx(float(other_metrics["objective"]), rel=1e-6)
    assert_close(state.params, other.params, 1e-5)


def test_muon_takes_the_matrices_of_every_kind_of_layer():
    from bm_jax.config import AttentionConfig, MlpConfig
    from bm_jax.model import init_parameters
    from bm_jax.optimizer import matrix_axes

    model = dataclasses.replace(
        TINY.model, layers=("mamba", "attention", "mlp", "moe"), attention=AttentionConfig(heads=4, kv_heads=2),
        mlp=MlpConfig(width=48, activation="gelu"),
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
    found = matrix_axes(shapes)
    sizes = {}
    for path, axes in jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda x: x is None or hasattr(x, "reduction_axis")):
        leaf = shapes
        for entry in path:
            leaf = leaf[entry.key]
        if axes is not None:
            name = f"{path[-2].key}/{path[-1].key}"
            sizes[name] = tuple(int(np.prod([leaf.shape[a] for a in part])) for part in (axes.reduction_axis, axes.output_axis))
    M, E, D = 32, 64, 8
    R = model.dt_rank
    assert sizes == {
        "mamba/in_proj": (M, E), "mamba/x_proj": (E, R + 8), "mamba/out_proj": (E, M), "attention/query": (M, 4 * D),
        "attention/key": (M, 2 * D), "attention/value": (M, 2 * D), "attention/out": (4 * D, M), "mlp/w_in": (M, 48),
        "mlp/w_out": (48, M), "moe/w_in": (M, 32), "moe/w_out": (32, M),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [{"name": "muon"}, {"first_moment_dtype": "bfloat16"}])
def test_other_optimizers_train_and_continue(tmp_path, optimizer):
    """Both lower the loss, and a run of them goes on from a checkpoint bit for bit."""
    config = dataclasses.replace(TINY, optimizer=dataclasses.replace(TINY.optimizer, schedule="constant", **optimizer))
    place = lambda name, steps: dataclasses.replace(  # noqa: E731
        config, run=dataclasses.replace(config.run, directory=str(tmp_path / name), steps=steps)
    )
    fit(place("whole", 20))
    for steps in (10, 20):
        fit(place("parts", steps))
    assert [row["objective"] for row in history(tmp_path / "whole")] == [
        row["objective"] for row in history(tmp_path / "parts")
    ]
    rows = history(tmp_path / "whole")
    assert rows[-1]["objective"] < rows[0]["objective"] - 1


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(remat):
    other = dataclasses.replace(TINY, run=dataclasses.replace(TINY.run, remat=remat))
    (state, metrics), (again, other_metrics) = one_step(TINY, 1), one_step(other, 1)
    assert metrics["objective"] == pytest.approx(float(other_metrics["objective"]), rel=1e-6)
    assert_close(state.params, again.params, 1e-5)


def test_a_non_finite_step_is_skipped_and_counted():
    optimizer = optax.sgd(1.0, momentum=0.9)
    state = first_state().replace(opt_state=optimizer.init(first_state().params))
    bad = state.replace(params={**state.params, "final_norm": state.params["final_norm"] * jnp.inf})
    step = jax.jit(make_train_step(TINY, optimizer))
    after, metrics = step(bad, batch_of(2))
    assert not np.isfinite(metrics["objective"])
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 1, 1)
    kept = zip(jax.tree.leaves((after.params, after.opt_state)), jax.tree.leaves((bad.params, bad.opt_state)), strict=True)
    for a, b in kept:
        np.testing.assert_array_equal(a, b)
    good, _ = step(after.replace(params=state.params), batch_of(2))
    assert (int(good.step), int(good.skipped), int(good.skipped_in_row)) == (2, 1, 0)
    assert not np.array_equal(good.params["embedding"], state.params["embedding"])


def limited(directory: Path, **run) -> Config:
    """No gradient is small enough."""
    config = at(directory, **run)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, skip_norm_above=1e-9))


@pytest.mark.slow
def test_a_run_goes_back_and_leaves_out_data_as_often_as_it_may(tmp_path):
    fit(at(tmp_path, steps=10))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    abstract = jax.eval_shape(lambda: init_state(TINY, make_optimizer(TINY.optimizer, 10)))
    before = checkpoints.restore(abstract)
    with pytest.raises(NonFiniteError, match="skip_norm_above"):
        fit(limited(tmp_path, steps=40, rewinds=2, max_nonfinite_steps=3))
    skipped = [json.loads(line) for line in (tmp_path / "skipped_data.jsonl").read_text().splitlines()]
    assert [line["back_to_step"] for line in skipped] == [10, 10]
    # What was learned one step late was read one batch too far, which is left out too.
    positions = [[line[key]["next_index"] for key in ("data_from", "data_to")] for line in skipped]
    assert positions == [[10, 14], [10, 18]]
    after = checkpoints.restore(abstract)
    assert after.step == 10
    jax.tree.map(np.testing.assert_array_equal, after.state.params, before.state.params)
    assert fit(at(tmp_path, steps=15)).finished
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert rows[-1]["skipped"] == 0


@pytest.mark.slow
def test_a_run_resumed_from_an_earlier_step_trains_as_before(whole, tmp_path):
    fit(at(tmp_path, keep_last=5))
    fit(at(tmp_path, keep_last=5), resume_from=20)
    assert history(tmp_path) == history(whole)
    folders = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert folders == {"10", "20", "30", "40", "30.superseded", "40.superseded"}
    with pytest.raises(CheckpointError, match=r"checkpoints/15.*There are: 10, 20, 30, 40"):
        fit(at(tmp_path), resume_from=15)


@pytest.mark.slow
def test_a_profile_of_some_steps_is_written(tmp_path):
    fit(at(tmp_path, steps=8, profile_steps=2))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_too_many_non_finite_steps_stop_the_run(tmp_path):
    config = dataclasses.replace(
        at(tmp_path, max_nonfinite_steps=3, rewinds=2),
        optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=0, clip_norm=1e30),
    )
    with pytest.raises(NonFiniteError, match="3 steps in a row") as error:
        fit(config)
    assert any("no checkpoint to go back to" in note for note in error.value.__notes__)
    assert [row["skipped"] for row in read_metrics(tmp_path)][-3:] == [1, 2, 3]
    assert isinstance(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["objective"], str)


def diverging(directory: Path, **run) -> Config:
    """The first update ruins the parameters: no later loss is finite."""
    optimizer = OptimizerConfig(learning_rate=1e30, warmup_steps=0, clip_norm=1e30, schedule="constant")
    return dataclasses.replace(at(directory, **run), optimizer=optimizer)


@pytest.mark.slow
def test_a_divergence_pushes_no_good_checkpoint_out(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with pytest.raises(NonFiniteError) as error:
        fit(diverging(tmp_path, steps=60, checkpoint_every=2, keep_last=2, max_nonfinite_steps=5))
    assert Checkpoints(tmp_path / "checkpoints", keep_last=2).steps() == [30, 40]
    assert error.value.__notes__[0].startswith("The last good step is 40")
    assert "--resume-from 30" in error.value.__notes__[1]


@pytest.mark.slow
def test_after_steps_without_an_update_the_save_that_was_due_is_made_up_for(whole, tmp_path):
    """Half of the gradients are too large: what is saved has learned from its own step."""
    limit = float(np.median([row["grad_norm"] for row in read_metrics(whole)[:5]]))
    plain = at(tmp_path, steps=20, checkpoint_every=1, keep_last=50, max_nonfinite_steps=40)
    fit(dataclasses.replace(plain, optimizer=dataclasses.replace(plain.optimizer, skip_norm_above=limit)))
    skipped = [0, *(row["skipped"] for row in read_metrics(tmp_path))]
    learned = [step for step in range(1, 21) if skipped[step] == skipped[step - 1]]
    assert 0 < len(learned) < 20
    assert Checkpoints(tmp_path / "checkpoints", keep_last=50).steps() == sorted({*learned, 20})


@pytest.mark.slow
def test_a_checkpoint_after_which_nothing_is_finite_is_gone_back_behind(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with pytest.raises(NonFiniteError):
        fit(diverging(tmp_path, steps=60, checkpoint_every=1, keep_last=5, max_nonfinite_steps=3, rewinds=2))
    skipped = [json.loads(line) for line in (tmp_path / "skipped_data.jsonl").read_text().splitlines()]
    assert [line["back_to_step"] for line in skipped] == [41, 40]  # step 41 is the one whose update ruins all


def test_bits_that_rot_under_an_old_time_of_change_are_noticed(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}. " * 20}) for i in range(200)))
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", validation_fraction=0.1, progress=False)
    files = open_data(dataclasses.replace(TINY.data, sources=(str(tmp_path / "data"),)), 264).files()
    shard = tmp_path / "data/train-00000.tokens"
    assert shard in files
    DataWatch(files, tmp_path).begin()
    times, contents = shard.stat(), bytearray(shard.read_bytes())
    contents[::64] = bytes(byte ^ 1 for byte in contents[::64])
    shard.write_bytes(contents)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    watch = DataWatch(files, tmp_path)
    watch.begin()

    def look():
        for _ in range(600):
            watch.check()
            time.sleep(0.1)

    with pytest.raises(ConfigError, match=r"train-00000\.tokens: SHA-256 should be"):
        look()


def test_changed_plays_are_noticed_and_a_new_time_of_change_is_not(tmp_path, monkeypatch):
    plays = shutil.copytree(bundled.FOLDER, tmp_path / "plays")
    monkeypatch.setattr(bundled, "FOLDER", plays)
    files = open_data(TINY.data, 264).files()
    first = min(plays.glob("*.txt"))
    assert first in files
    watch = DataWatch(files, tmp_path)
    watch.begin()
    os.utime(first)
    watch.check()
    DataWatch(files, tmp_path).begin()
    first.write_text("Another line.\n" + first.read_text())
    for look in (watch.check, DataWatch(files, tmp_path).begin):
        with pytest.raises(ConfigError, match=f"{first.name} is not the file that this run began with"):
            look()


@pytest.mark.parametrize("record", ["", "{garbage", "[]", '{"a": 1}'])
def test_a_damaged_record_of_the_data_is_named(whole, tmp_path, record):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data_files.json").write_text(record)
    with pytest.raises(ConfigError, match=r"data_files\.json, which says what data this run began with, is damaged") as error:
        fit(at(tmp_path, steps=50))
    assert error.value.__notes__[0].startswith("The last good step is 40")


@pytest.mark.slow
def test_a_failed_save_ends_the_run_before_the_next_one(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/100").write_text("in the way")
    with pytest.raises(CheckpointError, match="saving step 100 failed"):
        fit(at(tmp_path, steps=10_000, checkpoint_every=100, eval_every=10_000, report_every=10_000))
    assert len(read_metrics(tmp_path)) < 200


def test_decay_spares_states_skips_biases_and_norms():
    model = dataclasses.replace(
        TINY.model, layers=("mamba", "attention", "mlp", "moe"), mamba=MambaConfig(inner_norms=True), width=32
    )
    params = jax.eval_shape(lambda: init_state(dataclasses.replace(TINY, model=model), optax.identity()).params)
    mask = {
        "/".join(str(entry.key) for entry in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(params))
    }
    spared = {path.rsplit("/", 1)[-1] for path, decays in mask.items() if not decays}
    decayed = {path.rsplit("/", 1)[-1] for path, decays in mask.items() if decays}
    assert spared == {
        "A_log", "D", "dt_bias", "conv_bias", "router_bias", "norm", "dt_norm", "B_norm", "C_norm", "final_norm",
        "final_norm_bias",
    }  # fmt: skip
    assert decayed == {
        "embedding", "in_proj", "conv_weight", "x_proj", "dt_proj", "out_proj", "query", "key", "value", "out", "w_in",
        "w_out", "router",
    }  # fmt: skip


def test_schedules():
    cosine = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1), 110)
    rates = np.array([cosine(i) for i in range(111)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(101) / 100)) / 2
    np.testing.assert_allclose(rates[10:], expected, rtol=1e-5)
    stable = learning_rate(
        OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_fraction=0.0), 100
    )
    rates = np.array([stable(i) for i in range(101)])
    np.testing.assert_allclose(rates[10:81], 1)
    np.testing.assert_allclose(rates[80:], np.linspace(1, 0, 21), atol=1e-6)
    constant = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="constant"), 100)
    assert [float(constant(i)) for i in (0, 1, 99)] == [1, 1, 1]


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(run_with_devices, tmp_path):
    """Batch and parameter axes at once; routing of training may flip on rounding, so only the first steps."""
    source = f"""
import dataclasses, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_train
from bm_jax.config import MeshConfig
config = test_train.at({str(tmp_path / "eight")!r}, steps=4)
test_train.fit(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, expert=2)))
"""
    run_with_devices(source, devices=8)
    fit(at(tmp_path / "one", steps=4))
    for row, other in zip(history(tmp_path / "eight"), history(tmp_path / "one"), strict=True):
        assert row["objective"] == pytest.approx(other["objective"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
