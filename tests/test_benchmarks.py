"""The arithmetic of the benchmark harness, and that comparisons run; nothing here judges a time."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import configs
from bm_jax.config import ConfigError
from bm_jax.data.tokenizer import ByteTokenizer
from bm_jax.language_model import LanguageModel
from bm_jax.model import init_parameters

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("harness")


def comparison(harness, ours, peer):
    timings = {
        "ours": tuple(harness.Timing(wall, 2 * wall) for wall in ours),
        "peer": tuple(harness.Timing(wall, wall) for wall in peer),
    }
    first = {name: harness.Timing(9.0, 9.0) for name in timings}
    return harness.Comparison("a claim", 100, "tokens", "ours", "peer", timings, first)


def test_ratio_is_the_median_of_the_rounds_and_outliers_do_not_move_it(harness):
    result = comparison(harness, ours=(1.0, 10.0, 1.0), peer=(3.0, 30.0, 400.0))
    assert result.ratios == (3.0, 3.0, 400.0)
    assert result.ratio == 3.0
    assert result.processor_ratio == 1.5
    assert result.rate("ours") == 100
    assert "ratio 3.00 (3.00 to 400.00 over 3 rounds), in processor time 1.50" in str(result)


@pytest.mark.parametrize(("ours", "peer"), [((), ()), ((1.0,), (1.0, 2.0))])
def test_a_comparison_needs_as_many_rounds_of_each(harness, ours, peer):
    with pytest.raises(ValueError, match="at least one round"):
        comparison(harness, ours, peer)


def test_contestants_take_turns_after_a_first_call_each_and_the_fastest_peer_competes(harness, monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(harness.time, "process_time", lambda: 2 * clock[0])

    def contestant(name, first, later):
        def call():
            clock[0] += later if name in calls else first
            calls.append(name)

        return call

    # The slow peer is the faster one in its first call.
    peers = {"slow": contestant("slow", 1, 8), "fast": contestant("fast", 20, 4)}
    result = harness.compare("a claim", ("ours", contestant("ours", 50, 2)), peers, rounds=3, work=10, unit="tokens")
    assert calls == ["ours", "slow", "fast", "slow", "fast", *["ours", "fast"] * 3]
    assert result.peer == "fast"
    assert result.ratios == (2, 2, 2)
    assert result.first["ours"] == harness.Timing(50, 100)
    assert result.screened == {"slow": harness.Timing(8, 16), "fast": harness.Timing(4, 8)}
    assert result.rate("ours") == 5


def test_a_single_peer_is_not_screened(harness):
    calls = []
    result = harness.compare("a claim", ("ours", lambda: calls.append(0)), {"peer": lambda: calls.append(1)}, rounds=2)
    assert calls == [0, 1] * 3
    assert result.screened == {}


def test_json_holds_ratios_times_settings_and_machine(harness, tmp_path):
    result = comparison(harness, ours=(1.0,), peer=(2.5,))
    harness.write_json(tmp_path / "result.json", [result], {"width": 8, "path": Path("a")})
    values = json.loads((tmp_path / "result.json").read_text())
    (written,) = values["comparisons"]
    assert written["ratio"] == 2.5
    assert written["timings"]["ours"] == [{"wall": 1.0, "processor": 2.0}]
    assert written["first"]["peer"] == {"wall": 9.0, "processor": 9.0}
    assert values["settings"] == {"width": 8, "path": "a"}
    assert values["machine"]["cores"] >= 1
    assert values["machine"]["packages"]["jax"]


@pytest.fixture
def script(harness):
    """Import a script of that folder; what it runs is compiled quickly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield importlib.import_module
    jax.config.update("jax_disable_most_optimizations", False)


def test_drawing_is_the_same_whether_room_grows_or_is_there_from_the_start(script):
    drawing, latency_curve = script("drawing"), script("latency_curve")
    model = latency_curve.shrunk(configs.load("transformer").model, 32)
    parameters, head = jax.jit(latency_curve.make, static_argnums=(0, 1))(model, None)
    steps, programs = drawing.rooms(model, 40, 16, 2), {}
    assert steps == [16, 32, 64]
    for before, room in zip([None, *steps], steps, strict=False):
        programs |= drawing.compile_drawing((parameters, head), model, batch=2, kernel=None, room=room, before=before)
    small = drawing.Drawing(parameters, head, model, batch=2, room=16, programs=programs)
    large = drawing.Drawing(parameters, head, model, batch=2, room=64)
    ids = [np.concatenate(each.draw(11) + each.draw(40), axis=1) for each in (small, large)]
    assert ids[0].shape == (2, 40)
    assert (ids[0] >= 0).all()
    assert (small.room, large.room) == (64, 64)
    np.testing.assert_array_equal(*ids)
    small.restart()
    assert small.room == 16
    np.testing.assert_array_equal(np.concatenate(small.draw(40), axis=1), ids[0])


def test_latencies_are_taken_at_each_length_until_the_budget_is_spent(script, monkeypatch):
    latency_curve = script("latency_curve")
    clock = [100.0]
    monkeypatch.setattr(latency_curve.time, "perf_counter", lambda: clock[0])
    drawn = [0]

    def draw(tokens):
        clock[0] += 0.5 * (tokens - drawn[0])
        drawn[0] = tokens

    assert latency_curve.one_pass(draw, (4, 6, 600), math.inf) == {4: 2, 6: 3, 600: 300}
    clock[0], drawn[0] = 100.0, 0
    assert latency_curve.one_pass(draw, (4, 250, 600), 200.0) == {4: 2, 250: 125}, "a length reached when time was up counts"
    clock[0], drawn[0] = 100.0, 0
    assert latency_curve.one_pass(draw, (4, 6, 600), 110.0) == {4: 2, 6: 3}
    assert drawn[0] == 6 + latency_curve.STRIDE, "the budget is looked at between lengths, too"


def test_the_table_says_which_is_fastest_where(script):
    latency_curve = script("latency_curve")
    curves = {
        "ours": latency_curve.Curve(8, 4, True, {10: 1.0, 20: 2.0}, 1, None),
        "peer": latency_curve.Curve(6, 6, False, {10: 0.5}, 1, "stopped"),
    }
    assert curves["ours"].per_token() == {10: 0.1, 20: 0.1}
    assert [latency_curve.fastest(curves, length) for length in (10, 20, 30)] == ["peer", "ours", None]
    table = latency_curve.table(curves).splitlines()
    assert table[1].split() == ["10", "1.000", "s", "100.000", "ms", "0.500", "s", "50.000", "ms", "peer"]
    assert table[2].split() == ["20", "2.000", "s", "100.000", "ms", "-", "ours"]
    assert table[-1] == "peer takes times ours's: 0.50 at 10"


def test_the_latency_curve_runs(script, tmp_path, capsys):
    latency_curve = script("latency_curve")
    path, presets = tmp_path / "latency.json", ("blackmamba_340m_1p5b", "transformer_moe")
    latency_curve.main(latency_curve.Options(presets=presets, lengths=(16, 48), shrink=32, repeats=2, json=path))
    values = json.loads(path.read_text())
    assert list(values["curves"]) == list(presets)
    for curve in values["curves"].values():
        assert list(curve["seconds"]) == ["16", "48"]
        assert curve["passes"] == 2
        assert curve["active"] < curve["total"]
    assert set(values["fastest"].values()) <= set(presets)
    assert "fastest" in capsys.readouterr().out
    picture(tmp_path, "generation_time", path)
    with pytest.raises(SystemExit, match="increasing multiples"):
        latency_curve.main(latency_curve.Options(lengths=(16, 20)))


def test_a_context_is_read_as_the_library_reads_it(script):
    context_length = script("context_length")
    model = script("latency_curve").shrunk(configs.load("jamba").model, 32)
    model = dataclasses.replace(model, layers=("mamba", "moe", "attention", "mlp"), vocab_size=257, compute_dtype="float32")
    whole = jax.jit(init_parameters, static_argnums=0)(model, jax.random.key(0))
    parameters = jax.jit(context_length.make, static_argnums=0)(model)
    programs = context_length.compile_reading(model, {8: 16, 16: 16}, 8)
    assert programs[8] is programs[16]
    ids, unrolled = np.arange(16, dtype=np.int32)[None], context_length.unrolled(model)
    fresh = functools.partial(context_length.state.empty, unrolled, 1, 16)
    times, read = context_length.read_often(programs[16], parameters, fresh, ids, 8, 3, math.inf)
    assert len(times) == 3
    assert min(times) > 0
    wanted = LanguageModel(model, jax.device_get(whole), ByteTokenizer()).prefill([ids[0].tolist()])
    assert int(read.read[0]) == 16
    np.testing.assert_allclose(read.hidden, wanted.hidden, atol=1e-5)
    held = context_length.state.size_in_bytes(read) + sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    assert context_length.size_of(programs[16]) > 0.8 * held
    times, read = context_length.read_often(programs[16], parameters, fresh, ids.repeat(32, axis=1), 8, 3, 0.0)
    assert len(times) == 1
    assert read is None, "the budget is looked at within a reading, too"


@pytest.mark.slow
def test_the_context_length_benchmark_runs(script, tmp_path, monkeypatch, capsys):
    context_length, path = script("context_length"), tmp_path / "context.json"
    small = {"shrink": 32, "piece": 16, "attention_piece": 8, "lengths": (16, 48), "attention_lengths": (16, 32), "repeats": 1}
    presets = ("blackmamba_340m_1p5b", "transformer")
    for preset in presets:
        context_length.main(context_length.Options(presets=(preset,), json=path, **small))
    with pytest.raises(SystemExit, match="measured with other settings"):
        context_length.main(context_length.Options(presets=presets, json=path, **small | {"repeats": 2}))
    values = json.loads(path.read_text())
    assert list(values["curves"]) == list(presets)
    ours, peer = values["curves"].values()
    assert list(ours["points"]["seconds"]) == ["16", "48"]
    assert len(set(ours["points"]["state"].values())) == 1, "what is kept does not grow"
    assert peer["points"]["state"]["32"] > 1.5 * peer["points"]["state"]["16"]
    for curve in (ours, peer):
        assert curve["stopped"] is None
        assert min(curve["points"]["program"].values()) > curve["size"]
    assert "tokens/s" in capsys.readouterr().out
    picture(tmp_path, "context_length", path)
    monkeypatch.setattr(context_length, "memory", lambda: 1000)
    stopped = context_length.measure("transformer", context_length.Options(**small))
    assert stopped.points == {}
    assert stopped.stopped.startswith("16 tokens do not fit: ")
    with pytest.raises(SystemExit, match="increasing multiples of the piece, 1024"):
        context_length.main(context_length.Options(lengths=(1000,)))


def picture(folder, name, path):
    """A benchmark's metrics are what the figure of that name takes."""
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        f"experiments.figures.{name}",
        "--metrics",
        str(path),
        "--output",
        str(folder),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_operations_of_a_train_step_belong_to_parts_that_have_floors(script):
    step = script("train_step")
    config = configs.load("default")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=2, sequence_length=32))
    mesh = step.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state, train_step, batch = step.prepare(config, mesh)
        names = step.operation_names(train_step.lower(state, batch).compile().as_text()).values()
    floors = step.floor_seconds(config, 64, 1e12, 1e14)
    assert {step.part_of(name) for name in names} >= set(floors)
    assert all(seconds > 0 for seconds in floors.values())
    products = sum(floors[name] for name in ("projections", "experts", "unembedding and loss")) * 1e14 / 64
    assert products == pytest.approx(step.model_flops_per_token(config.model, 32), rel=0.1)  # the rest: scan, conv, router


def test_the_comparison_of_int8_weights_runs(script, tmp_path, capsys):
    quantization = script("quantization")
    config = script("latency_curve").shrunk(configs.load("default").model, 4)
    config = dataclasses.replace(config, repeats=1, vocab_size=257)
    parameters = jax.device_get(jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(0)))
    LanguageModel(config, parameters, ByteTokenizer()).save(tmp_path / "model")
    text, path = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("It was a bright cold day in April. " * 5, encoding="utf-8")
    common = {"prompts": (2,), "new_tokens": 5, "rounds": 1, "json": path}
    quantization.main(
        quantization.Options(tmp_path / "model", text=text, compute_dtype="bfloat16", window=16, windows=2, **common)
    )
    values = json.loads(path.read_text())
    assert values["quality"]["tokens"] == 174
    assert abs(values["quality"]["loss"] - math.log(257)) < 1
    assert abs(values["quality"]["loss_int8"] - values["quality"]["loss"]) < 0.01
    assert values["bytes"]["int8"] < values["bytes"]["bfloat16"]
    (comparison,) = values["comparisons"]
    assert (comparison["ours"], comparison["peer"]) == ("int8", "bfloat16")
    assert "perplexity" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="give --text FILE"):
        quantization.held_out(tmp_path / "model", quantization.Options(tmp_path / "model"))
    with pytest.raises(SystemExit, match="either a directory or --preset"):
        quantization.main(quantization.Options())


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")),
    reason="needs torch and transformers: pip install 'blackmamba-jax[parity]'",
)
def test_comparison_with_transformers_agrees_and_runs(tmp_path):
    path = tmp_path / "result.json"
    sizes = "--width 32 --layers 2 --state-size 4 --batch-size 2 --sequence-length 8 --prompt-tokens 5 --new-tokens 6"
    command = [sys.executable, str(BENCHMARKS / "vs_transformers.py"), *sizes.split()]
    command += ["--prompts", "1", "2", "--rounds", "1", "--json", str(path)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [written["name"].split(",")[0] for written in json.loads(path.read_text())["comparisons"]]
    assert names == ["training", "generation", "generation"]
