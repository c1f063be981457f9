"""The arithmetic of the benchmark harness, and that the comparison with transformers runs; nothing here judges a time."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
