"""Metrics, progress, operations per token and pictures."""

import io
import itertools
import json
import math
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from bm_jax.config import AttentionConfig, MambaConfig, MlpConfig, ModelConfig, MoeConfig
from bm_jax.metrics import MetricsWriter, ProgressBar, device_peak_flops, model_flops_per_token, read_metrics
from bm_jax.plots import plot_expert_load, plot_losses


def write(directory, steps, resume_step=0):
    with MetricsWriter(directory, resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": jnp.float32(1 / step), "expert_load": np.full((2, 3), step / 3, np.float32)})


def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path):
    write(tmp_path / "whole", range(1, 9))
    write(tmp_path / "cut", range(1, 7))
    with open(tmp_path / "cut/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 0.1')  # killed while writing
    assert [row["step"] for row in read_metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    write(tmp_path / "cut", range(5, 9), resume_step=4)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "grad_norm": jnp.inf, "entropy": [1.0, -math.inf], "skipped": 3})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row.pop("loss"))
    assert row == {"step": 1, "grad_norm": math.inf, "entropy": [1.0, -math.inf], "skipped": 3}


def test_float32_values_survive_exactly(tmp_path):
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    with MetricsWriter(tmp_path) as writer:
        for step, value in enumerate(values):
            writer.write(step, {"loss": value})
    assert np.array_equal(np.float32([row["loss"] for row in read_metrics(tmp_path)]), values)


def test_tensorboard_gets_every_element(tmp_path):
    write(tmp_path, [1, 2])
    (file,) = (tmp_path / "tensorboard").iterdir()
    contents = file.read_bytes()
    for tag in (b"loss", b"expert_load/0/0", b"expert_load/1/2"):
        assert contents.count(tag) == 2


def test_a_clock_that_jumps_stops_no_writing(tmp_path, monkeypatch):
    """By ten years back and one forward at every look: with a thread between, the tenth row was never written."""
    real, looks = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + (-3.2e8 if next(looks) % 2 else 3.2e7))
    write(tmp_path, range(1, 50))
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 50))
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.read_bytes().count(b"loss") == 49


def test_two_starts_in_one_second_write_two_files(tmp_path):
    write(tmp_path, [1, 2])
    with MetricsWriter(tmp_path, 2) as writer:
        writer.write(3, {"loss": 1.0})
    first, second = sorted((tmp_path / "tensorboard").iterdir(), key=lambda file: file.stat().st_size)
    assert first.read_bytes().count(b"loss") == 1
    assert second.read_bytes().count(b"loss") == 2


def test_damaged_lines_are_left_out_and_a_step_counts_once(tmp_path):
    lines = [
        '{"step": 1, "loss": 2}',
        '{"step": Infinity}',
        "[" * 100_000,
        "[1]",
        '{"step": 2, "loss": 3}',
        '{"step": 1, "loss": 4}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 4}, {"step": 2, "loss": 3}]


def test_a_full_disk_is_named(tmp_path):
    def write():
        with MetricsWriter(tmp_path) as writer:
            writer._file.close()
            writer._file = open("/dev/full", "w")  # noqa: SIM115 (closed by `close`)
            writer.write(1, {"loss": 2.0})

    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        write()


def test_reading_metrics_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 2307e12 / 2),
        ("cpu", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_flops(kind, peak):
    assert device_peak_flops(SimpleNamespace(device_kind=kind)) == peak


BLACKMAMBA = ModelConfig(
    layers=("mamba", "moe"),
    repeats=3,
    vocab_size=100,
    width=32,
    mamba=MambaConfig(state_size=4, conv_width=4, expansion=2, dt_rank=2),
    moe=MoeConfig(experts=8, width=48, activation="swiglu"),
)


def test_flops_of_blackmamba_by_hand():
    mamba = 2 * 32 * 128 + 2 * 64 * 32 + 2 * 64 * 4 + 64 * (11 * 4 + 4 * 2 + 1)
    moe = 2 * 32 * 8 + 2 * 32 * 96 + 2 * 48 * 32
    assert model_flops_per_token(BLACKMAMBA, 128, training=False) == 3 * (mamba + moe) + 2 * 32 * 100
    assert model_flops_per_token(BLACKMAMBA, 128) == 3 * (3 * (mamba + moe) + 2 * 32 * 100)
    assert model_flops_per_token(BLACKMAMBA, 256) == model_flops_per_token(BLACKMAMBA, 128)  # linear in the length


def test_flops_of_attention_by_hand():
    config = ModelConfig(
        layers=("attention+mlp",),
        repeats=2,
        vocab_size=100,
        width=32,
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=6),
        mlp=MlpConfig(width=64, activation="gelu"),
    )
    projections = 2 * 32 * (24 + 12 + 12) + 2 * 24 * 32
    scores_and_values = 2 * 2 * 24 * 50  # a token of a window of 100 sees 50 on average
    mlp = 2 * 2 * 32 * 64
    expected = 2 * (projections + scores_and_values + mlp) + 2 * 32 * 100
    assert model_flops_per_token(config, 100, training=False) == expected


def test_flops_of_a_sliding_window_and_top_k():
    def flops(**values):
        config = ModelConfig(layers=("attention", "moe"), repeats=1, width=32, **values)
        return model_flops_per_token(config, 100, training=False)

    def attention(window):
        return AttentionConfig(heads=4, kv_heads=4, window=window)

    assert flops(attention=attention(100)) == flops(attention=attention(None)) == flops(attention=attention(500))
    # Window 20 of 100: the first 20 tokens see 10 on average, the others 20.
    assert flops(attention=attention(None)) - flops(attention=attention(20)) == 4 * 32 * (50 - 18)
    one, two = (flops(moe=MoeConfig(experts=4, width=16, router="topk", top_k=k)) for k in (1, 2))
    assert two - one == 6 * 32 * 16


def test_progress_without_a_terminal_is_a_few_lines():
    out = io.StringIO()
    with ProgressBar(1000, initial=10, file=out, interval=3600) as bar:
        for step in range(11, 500):
            bar.update(step, loss=2.5 if step == 20 else None, tokens_per_second=12345.6)
        bar.message("validation loss 1.5")
    lines = out.getvalue().splitlines()
    assert lines[0] == "validation loss 1.5"
    assert len(lines) == 2
    assert lines[1].startswith("step 499/1000  ")
    assert "loss 2.5000" in lines[1]
    assert "tokens/s 12,346" in lines[1]
    assert lines[1].endswith(" left")


def test_progress_lines_follow_the_interval():
    out = io.StringIO()
    with ProgressBar(10, file=out, interval=0) as bar:
        for step in range(1, 4):
            bar.update(step)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/10", "2/10", "3/10", "3/10"]


def test_progress_on_a_terminal_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with ProgressBar(4, initial=1, file=out) as bar:
        for step in range(2, 5):
            bar.update(step, loss=1.25, tokens_per_second=1000.0)
        bar.message("done")
    assert "4/4" in out.getvalue()
    assert "loss=1.2500" in out.getvalue()
    assert "done\n" in out.getvalue()


def rows(layers=3, experts=8):
    loads = np.random.default_rng(0).dirichlet(np.ones(experts) * 9, (20, layers))
    for step in range(1, 21):
        row = {"step": step, "objective": 5 / step}
        if step % 5 == 0:
            row |= {"loss": 5 / step, "expert_load": loads[step - 1].tolist()}
        if step == 20:
            row["validation_loss"] = math.nan
        if step in (10, 15):
            row["validation_loss"] = 6 / step
        yield row


def png_size(path):
    contents = path.read_bytes()
    assert contents.startswith(b"\x89PNG")
    return int.from_bytes(contents[16:20]), int.from_bytes(contents[20:24])


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (3, 8), (18, 64)])
def test_pictures(tmp_path, layers, experts):
    plot_losses(list(rows()), tmp_path / "loss.png")
    plot_expert_load(list(rows(layers, experts)), tmp_path / "load.png")
    for name in ("loss.png", "load.png"):
        width, height = png_size(tmp_path / name)
        assert width > 600
        assert height > 400


def test_pictures_leave_out_what_is_no_number(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "hello", "validation_loss": [1]}, {"step": 3, "loss": [[1], 2]}]
    plot_losses(rows, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size


def test_pictures_need_something_to_draw(tmp_path):
    for plot in (plot_losses, plot_expert_load):
        with pytest.raises(ValueError, match="the metrics hold no"):
            plot([{"step": 1, "loss": math.nan}], tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_of_a_run_of_one_report(tmp_path):
    plot_losses([{"step": 1, "objective": 2.0}], tmp_path / "loss.png")
    plot_expert_load([{"step": 1, "expert_load": [[0.5, 0.5]]}], tmp_path / "load.png")
    assert png_size(tmp_path / "loss.png")
    assert png_size(tmp_path / "load.png")
