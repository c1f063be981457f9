"""Every figure is built from kept and from tiny metrics, can be read in black and white, and names what is wrong in a file."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Annotation, Text

from experiments import sinkhorn_convergence
from experiments.figures import (
    context_length,
    expert_balance,
    expert_counts,
    expert_specialisation,
    generation_time,
    lead_over_mamba,
    loss_against_flops,
    metrics,
    scan_floors,
    scan_log,
    style,
)
from experiments.figures import sinkhorn_convergence as sinkhorn_figure

ROOT = Path(__file__).resolve().parent.parent

GENERATION = {
    "curves": {
        "blackmamba_340m_1p5b": {"active": 9, "seconds": {"16": 0.5, "32": 1.0}, "per_token": {"16": 0.03, "32": 0.04}},
        "mamba": {"active": 8, "seconds": {"16": 0.75}, "per_token": {"16": 0.05}},
        "transformer": {"active": 8, "seconds": {}, "per_token": {}},
    },
    "settings": {"batch": 2, "shrink": 32},
    "device": "a small machine",
}
POINTS = {
    "seconds": {"64": 0.5, "128": 2.0},
    "state": {"64": 2048, "128": 2048},
    "program": {"64": 1 << 20, "128": 1 << 20},
    "peak": {"64": None, "128": None},
}
CONTEXT = {
    "curves": {
        "mamba": {"active": 9, "points": POINTS | {"state": {"64": 2048, "128": 2048, "256": 2048}}, "stopped": None},
        "blackmamba_340m_1p5b": {"active": 9, "points": POINTS | {"peak": {"64": 3 << 20}}, "stopped": None},
        "jamba": {"active": 8, "points": POINTS | {"state": {"64": 4096, "128": 8192}}, "stopped": "256 tokens do not fit"},
    },
    "settings": {"piece": 64, "attention_piece": 32, "shrink": 32},
    "device": "cpu",
}
BALANCE = {"deviation": [0.5, 0.1, 0.00001], "load": [2.0, 1.5, 1.0]}
SINKHORN = {
    "experts": 4, "temperature": 0.5, "default_iterations": 1, "batches": {"64": 3}, "iterations": [0, 1, 2],
    "curves": {"plain": {"64": BALANCE}, "centred": {"64": BALANCE}},
}  # fmt: skip
COST = {"device": "some card", "goal": 0.02, "share": {"forward + backward": [0.01], "forward alone": [0.03]}}
SCAN_LOG = """Some card: 3e+12 exponentials and 2e+12 bytes a second
2,64,32 x 16 states, bfloat16
  pallas_tpu: cannot serve this call
  forward            pallas_gpu           0.400 ms (0.319 to 0.353)  50.0% of floor  memory 1.01
  forward + backward pallas_gpu           1.000 ms (1.470 to 1.514)  25.0% of floor   40.83x xla  memory 1.26
2,64,32, 4 taps, bfloat16; a copy takes 0.083 ms
  forward               0.098 ms (0.095 to 0.108)  84.6% of floor
2,64,32 x 16 states, bfloat16
  forward            pallas_gpu           0.900 ms (0.319 to 0.353)  20.0% of floor  memory 1.01
  forward            triton_gpu           0.700 ms (0.319 to 0.353)  28.0% of floor  memory 1.01
"""
PEER = {
    "milliseconds": {"2,64,32": {"forward": 0.8, "forward + backward": 3.25}, "9,9,9": {"forward": 1, "forward + backward": 2}}
}


def learning_run(system: str, seed: int, end: float, layers: int, experts: int) -> dict:
    points = range(1, 11)
    busy = {"training": 1.1, "inference": 1.5} if system == "blackmamba" else {"training": 2.0, "inference": 2.0}
    loads = {how: [[factor / experts] + [(1 - factor / experts) / (experts - 1)] * (experts - 1)] * layers
             for how, factor in busy.items()} if layers else {}  # fmt: skip
    return {
        "plan": {"system": system, "size": "full", "seed": seed}, "device": "a small machine", "tokens_per_step": 512,
        "bytes_per_token": 4, "active_without_embeddings": 2_000_000,
        "validation": [
            {"step": 10 * n, "flops": n * 1e14, "seconds": 6 * n, "bits_per_byte": end + 1 - n / 10} for n in points
        ],
        "expert_load": [{"step": 10 * n} | loads for n in points] if layers else [],
    }  # fmt: skip


ENDS = {
    "mamba": (2.0, 0, 0), "transformer": (2.25, 0, 0), "transformer_moe": (1.875, 2, 8), "moe_mamba": (1.625, 2, 8),
    "blackmamba_4_experts": (1.75, 2, 4), "blackmamba_16_experts": (1.375, 2, 16), "blackmamba_32_experts": (1.125, 2, 32),
    "blackmamba_switch": (1.5, 2, 8), "blackmamba_unbalanced": (1.625, 2, 8),
    "blackmamba_1_expert": (1.875, 0, 0),
}  # fmt: skip
TWICE = [learning_run("blackmamba", seed, end, 2, 8) for seed, end in ((0, 1.25), (1, 1.75))]
LEARNING = {"runs": [*TWICE, *(learning_run(system, 0, *end) for system, end in ENDS.items())]}
LATE = TWICE[0] | {"validation": TWICE[0]["validation"][1:]}
DENSE_ALONE = {"runs": [*TWICE, LEARNING["runs"][2]]}
TOKENS = {
    "model": "a model", "text": "some text", "tokens": 1000,
    "layers": [
        [{"share": 0.75, "top": [{"text": " the"}, {"text": "\n"}, {"text": "$x^2$ and so on"}]}, {"share": 0.25, "top": []}],
        [{"share": 0.5, "top": [{"text": "a"}]}, {"share": 0.5, "top": [{"text": "b"}]}],
    ],
}  # fmt: skip
FIGURES = {
    "loss_against_flops": (loss_against_flops, {"metrics": LEARNING}),
    "lead_over_mamba": (lead_over_mamba, {"metrics": LEARNING, "small": LEARNING, "cpu": DENSE_ALONE}),
    "expert_counts": (expert_counts, {"metrics": LEARNING}),
    "expert_balance": (expert_balance, {"metrics": LEARNING}),
    "expert_specialisation": (expert_specialisation, {"metrics": TOKENS}),
    "generation_time": (generation_time, {"metrics": GENERATION}),
    "context_length": (context_length, {"metrics": CONTEXT}),
    "sinkhorn_convergence": (sinkhorn_figure, {"metrics": SINKHORN, "cost": COST}),
    "scan_floors": (scan_floors, {"metrics": SCAN_LOG, "peer": PEER}),
}
STORED_TEXTS = {
    "expert_specialisation": ["BlackMamba with 8 experts", "65,536 tokens of its held-out text", "MoE layer", "\u2423"],
    "generation_time": [
        "BlackMamba 8.94 s",
        "Transformer-MoE 40.5 s",
        "Mamba 0.61 ms",
        "milliseconds a token",
        "16k",
        "NVIDIA H100",
    ],
    "context_length": [
        "BlackMamba 2.36 MiB",
        "Transformer 96.8 s at 256k",
        "Jamba 113 s",
        "1,000 s",
        "tokens read",
        "NVIDIA H200",
        "1048576 tokens were not read: the budget of 300 s was spent",
    ],
    "loss_against_flops": ["BlackMamba 1.153", "Mamba 1.107", "MoE-Mamba 1.119", "65.5 M tokens", "NVIDIA H200"],
    "lead_over_mamba": [
        "27 M, 233 MB -0.046",
        "0.13 M, 65.5 MB +0.143",
        "0.13 M, 65.5 MB +0.111",
        "0.13 M, 8.19 MB +0.030",
        "cpu",
    ],
    "expert_counts": ["BlackMamba 1.204", "Mamba, dense 1.107", "Sinkhorn 1.153", "switch with loss 1.135"],
    "expert_balance": ["layer 0: 1.16", "layer 1: 2.57", "layer 4: 1.36", "layer 6: 7.78", "worst of 2 seeds"],
    "sinkhorn_convergence": ["centred, 512 tokens", "plain, 16,384 tokens", "iterations", "0.8%", "4.3%", "goal: at most 2%"],
    "scan_floors": ["pallas_gpu", "triton_gpu", "mamba_ssm", "0.346", "0.738", "28.7", "1 x 65,536 x 2,304", "floor"],
}
TINY_TEXTS = {
    "loss_against_flops": [
        "BlackMamba 1.500",
        "Transformer-MoE 1.875",
        "training PFLOP",
        "minutes",
        "blackmamba: mean of 2 seeds, others one",
    ],
    "lead_over_mamba": [
        "2 M, 0.205 MB +0.500",
        "2 M, 0.205 MB +0.375",
        "small machine, 100 steps, seeds: Mamba 1, BlackMamba 2",
    ],
    "expert_counts": ["BlackMamba 1.125", "Mamba, dense 2.000", "Sinkhorn 1.500", "switch without loss 1.625"],
    "expert_balance": ["layer 0: 1.10", "layer 1: 1.50", "layer 0: 2.00", "Sinkhorn, in training", "worst of 2 seeds"],
    "expert_specialisation": ["75%", "\u2423the", "\u21b5", "$x^2$\u2423and\u2423so", "a model; 1,000 tokens of some text"],
    "generation_time": ["BlackMamba 1 s", "Mamba 50.00 ms", "a small machine, batch 2", "divided by 32"],
    "context_length": [
        "BlackMamba 2 KiB at 128",
        "Jamba 8 KiB at 128",
        "Jamba: 256 tokens do not fit.",
        "shrunk 32 times",
        "compiling included: BlackMamba 3 MiB.",
    ],
    "sinkhorn_convergence": ["centred, 64 tokens", "plain, 64 tokens", "below 0.01% are not drawn", "1.0%"],
    "scan_floors": ["0.400", "0.700", "0.800", "1.00", "3.25", "2 x 64 x 32", "Some card"],
}


def write(folder: Path, files: dict[str, dict | str]) -> list[str]:
    """The inputs of a figure as files, and the options that name them."""
    arguments = []
    for option, value in files.items():
        path = folder / f"{option}.txt"
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        arguments += [f"--{option}", str(path)]
    return arguments


def build(name: str, folder: Path, arguments: list[str]) -> tuple[Path, Path]:
    FIGURES[name][0].main([*arguments, "--output", str(folder)])
    return folder / f"{name}.png", folder / f"{name}.svg"


@pytest.mark.parametrize(("name", "stored"), [*((name, True) for name in STORED_TEXTS), *((name, False) for name in FIGURES)])
def test_a_figure_is_drawn_with_its_labels_and_without_colour(name, stored, tmp_path, capsys):
    arguments = [] if stored else write(tmp_path, FIGURES[name][1])
    picture, drawing = build(name, tmp_path / "pictures", arguments)
    assert capsys.readouterr().out.split() == [str(picture), str(drawing)]
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert 0.005 < (pixels < 0.5).mean() < 0.3, "neither blank nor black"
    np.testing.assert_array_equal(pixels, pixels[..., :1].repeat(3, axis=2))
    text = drawing.read_text(encoding="utf-8")
    for label in (STORED_TEXTS if stored else TINY_TEXTS)[name]:
        assert f"{label}" in text, label
    assert "<dc:date>" not in text
    if not stored:
        again = build(name, tmp_path / "again", arguments)[1]
        assert again.read_bytes() == drawing.read_bytes()


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "expert_specialisation"])
def test_lines_of_a_panel_differ_in_dashes_and_markers(name, tmp_path):
    module = FIGURES[name][0]
    stored = {"metrics": metrics.STORED / f"{name}.json"}
    if FIGURES[name][1]["metrics"] is LEARNING:
        stored = {option: tmp_path / f"{option}.txt" for option in FIGURES[name][1]}
        write(tmp_path, FIGURES[name][1])
    elif name == "sinkhorn_convergence":
        stored["cost"] = metrics.STORED / "sinkhorn_cost.json"
    elif name == "scan_floors":
        stored = {"metrics": scan_floors.LOG, "peer": metrics.STORED / "mamba_ssm.json"}
    figure = module.draw(**stored)
    drawn = 0
    for axes in figure.axes:
        lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        drawn += len(lines)
        for one, other in itertools.combinations(lines, 2):
            assert one.get_marker() != other.get_marker(), (one.get_label(), other.get_label())
            if one.get_linestyle() != "None":
                assert one._dash_pattern != other._dash_pattern, (one.get_label(), other.get_label())
    assert drawn >= 4


def test_models_and_other_lines_are_told_apart_without_colour():
    for lines in (style.MODELS.values(), style.OTHERS):
        for one, other in itertools.combinations(lines, 2):
            assert one.dashes != other.dashes
            assert one.marker != other.marker
        assert all(float(line.grey) <= 0.5 for line in lines)
    assert style.line("blackmamba_630m_2p8b") == style.line("blackmamba_340m_1p5b")
    assert style.line("transformer_moe").label == "Transformer-MoE"
    assert style.line("moe_mamba").label == "MoE-Mamba"
    with pytest.raises(ValueError, match="no line is set for a model named 'transformers'"):
        style.line("transformers")
    with pytest.raises(ValueError, match="one more: 'seventh'"):
        style.other_line(6, "seventh")


def test_labels_are_moved_apart_and_no_further_than_needed():
    assert style.spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    np.testing.assert_allclose(style.spread([0.5, 0.5], 0.1), [0.45, 0.55])
    np.testing.assert_allclose(
        style.spread([0.2, 0.5, 0.51, 0.53], 0.1), [0.2, 0.51333 - 0.1, 0.51333, 0.51333 + 0.1], atol=1e-4
    )
    np.testing.assert_allclose(style.spread([0.5, 0.52, 0.65], 0.1), [0.45667, 0.55667, 0.65667], atol=1e-4)
    np.testing.assert_allclose(style.spread([0.0, 0.01, 0.5, 1.0], 0.1), [0.05, 0.15, 0.5, 0.95])
    np.testing.assert_allclose(style.spread([0.1, 0.2], 1.0), [0.0, 1.0])
    assert style.spread([], 0.1) == []
    assert [style.short(n) for n in (256, 1000, 1024, 131072, 1 << 20)] == ["256", "1,000", "1k", "128k", "1M"]


@pytest.mark.parametrize(("panels", "width"), [(1, 4.0), (2, 5.6)])
def test_a_long_note_is_wrapped_within_the_figure(panels, width):
    figure, _ = style.figure("title", panels, width=width, note="some words of a long note; " * 20 + "\nanother line")
    figure.draw_without_rendering()
    note = figure.texts[-1]
    assert note.get_text().endswith("note;\nanother line")
    assert 0.8 * figure.bbox.x1 < note.get_window_extent().x1 < figure.bbox.x1


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in ("expert_specialisation", "scan_floors")])
def test_labels_stay_beside_their_panel_and_lines_lead_to_those_that_moved(name, tmp_path):
    write(tmp_path, FIGURES[name][1])
    figure = FIGURES[name][0].draw(*(tmp_path / f"{option}.txt" for option in FIGURES[name][1]))
    figure.draw_without_rendering()
    labels = [(axes, text) for axes in figure.axes for text in axes.texts if isinstance(text, Annotation)]
    assert labels
    for axes, label in labels:
        panel, box = axes.get_window_extent(), Text.get_window_extent(label)
        assert panel.y0 <= box.y0 < box.y1 <= panel.y1, label.get_text()
        moved = abs(label.xyann[1] - label.xy[1]) * panel.height
        assert label.arrow_patch is not None or moved < box.height / 4, label.get_text()


def test_the_worst_seed_of_each_layer_is_drawn(tmp_path):
    loads = [[[3, 1], [1, 1], [1, 1]], [[1, 1], [4, 1], [1, 1]]]
    runs = [
        run | {"expert_load": [{"step": 10, "training": [[x / 8 for x in layer] for layer in load], "inference": load}]}
        for run, load in zip(TWICE, loads, strict=True)
    ]
    write(tmp_path, {"metrics": {"runs": [*runs, *LEARNING["runs"][2:]]}})
    lines = expert_balance.draw(tmp_path / "metrics.txt").axes[0].get_lines()
    assert all(float(line.get_color()) <= 0.5 for line in lines)
    labels = [line.get_label() for line in lines]
    assert labels[:3] == ["layer 0: 0.75", "layer 1: 1.00", "layer 2: 0.25"]
    write(tmp_path, {"metrics": {"runs": [runs[0], TWICE[1], *LEARNING["runs"][2:]]}})
    with pytest.raises(metrics.MetricsError, match="blackmamba have expert_load of other steps or layers"):
        expert_balance.draw(tmp_path / "metrics.txt")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "FILE").touch()
    with pytest.raises(SystemExit, match=r"^expert_counts: .*FILE: File exists; give another --output$"):
        build("expert_counts", tmp_path / "FILE", write(tmp_path, FIGURES["expert_counts"][1]))


def without(value: dict, *keys: str) -> dict:
    """A copy of nested objects without one key."""
    first, *others = keys
    if others:
        return value | {first: without(value[first], *others)}
    return {key: kept for key, kept in value.items() if key != first}


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("generation_time", "metrics", without(GENERATION, "settings", "batch"), "settings/batch is missing; there are shrink"),
        ("generation_time", "metrics", GENERATION | {"curves": {}}, "curves is empty"),
        ("generation_time", "metrics", GENERATION | {"curves": [1]}, "curves should be an object, is list"),
        ("generation_time", "metrics", without(GENERATION, "curves", "mamba", "seconds"), "curves/mamba/seconds is missing"),
        ("generation_time", "metrics", "{", "not JSON"),
        ("generation_time", "metrics", "[1]", "should be a JSON object, is list"),
        ("context_length", "metrics", without(CONTEXT, "curves", "jamba", "points", "state"), "jamba/points/state is missing"),
        ("context_length", "metrics", CONTEXT | {"settings": {"shrink": "x"}}, "settings/shrink should be a number, is str"),
        ("loss_against_flops", "metrics", {"runs": []}, "runs is empty"),
        ("loss_against_flops", "metrics", {"runs": [without(LEARNING["runs"][2], "device")]}, "runs[0]/device is missing"),
        ("lead_over_mamba", "cpu", {"runs": [LATE, LEARNING["runs"][2]]}, "blackmamba was measured at other steps than mamba"),
        ("lead_over_mamba", "small", {"runs": TWICE}, "runs: there is none of mamba"),
        ("expert_counts", "metrics", {"runs": LEARNING["runs"][:3]}, "runs: there is none of blackmamba_1_expert"),
        ("expert_balance", "metrics", {"runs": [LEARNING["runs"][0] | {"expert_load": []}]}, "blackmamba has no expert_load"),
        ("expert_specialisation", "metrics", TOKENS | {"layers": [[{"share": 2, "top": []}]]}, "should lie in 0 to 1, is 2"),
        ("expert_specialisation", "metrics", TOKENS | {"layers": [1]}, "layers[0] should be a list of objects, is int"),
        ("sinkhorn_convergence", "metrics", SINKHORN | {"iterations": [1]}, "curves/centred/64/deviation has 3 values, not 1"),
        ("sinkhorn_convergence", "cost", without(COST, "goal"), "goal is missing; there are device, share"),
        ("sinkhorn_convergence", "cost", COST | {"goal": -1}, "goal should be of numbers above 0 and up to 1, is -1"),
        ("sinkhorn_convergence", "cost", COST | {"share": {"forward": []}}, "share/forward should be of numbers above 0"),
        ("scan_floors", "metrics", "nothing", "no device line as benchmarks/selective_scan.py prints it"),
        ("scan_floors", "peer", {"milliseconds": {"9,9,9": {}}}, "pallas_gpu has no row of both passes at a shape of"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_with_its_name_and_key(name, option, value, message, tmp_path):
    files = FIGURES[name][1] | {option: value}
    with pytest.raises(SystemExit) as error:
        build(name, tmp_path, write(tmp_path, files))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{name}: ")
    assert f"{option}.txt" in str(error.value)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("name", FIGURES)
def test_a_file_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(SystemExit, match=r"missing\.json: no metrics can be read: No such file"):
        build(name, tmp_path, ["--metrics", str(tmp_path / "missing.json")])


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": NaN, "b": [1, Infinity], "c": true, "d": {"x": 1}}')
    read = metrics.read(path)
    for key, call in (("a", read.number), ("b", read.numbers), ("c", read.number), ("d", read.series)):
        with pytest.raises(metrics.MetricsError, match=rf"a\.json: {key} should"):
            call(key)


def test_the_log_of_the_scan_is_read_row_by_row(tmp_path):
    path = tmp_path / "scan.log"
    path.write_text(SCAN_LOG)
    log = scan_log.read_scan_log(path)
    assert log.devices == ("Some card",)
    assert [(row.of, row.implementation, row.milliseconds) for row in log.rows] == [
        ("forward", "pallas_gpu", 0.4),
        ("forward + backward", "pallas_gpu", 1.0),
        ("forward", "pallas_gpu", 0.9),
        ("forward", "triton_gpu", 0.7),
    ]
    assert log.rows[0].floor == pytest.approx(0.2)
    first = scan_floors.first_rows(log.rows)["2,64,32", "forward", "pallas_gpu"]
    assert (first.milliseconds, first.states, first.dtype) == (0.4, 16, "bfloat16")


def test_the_centred_start_is_ahead_and_the_figure_takes_what_is_measured(tmp_path):
    measured = sinkhorn_convergence.measure({32: 3}, experts=4, iterations=(0, 2, 40))
    plain, centred = (measured["curves"][start]["32"]["deviation"] for start in sinkhorn_convergence.STARTS)
    assert centred[0] < plain[0]
    assert centred[1] < plain[1]
    assert max(plain[2], centred[2]) < 1e-3
    arguments = write(tmp_path, {"metrics": measured, "cost": COST})
    assert "centred, 32 tokens" in build("sinkhorn_convergence", tmp_path, arguments)[1].read_text(encoding="utf-8")


def test_stored_metrics_say_where_copied_numbers_are_from():
    for name in ("generation_time", "sinkhorn_cost", "mamba_ssm"):
        assert "benchmarks/" in metrics.read(metrics.STORED / f"{name}.json").text("source")


def test_every_module_of_a_figure_has_a_command():
    for name in FIGURES:
        module = importlib.import_module(f"experiments.figures.{name}")
        assert f"python -m experiments.figures.{name}" in module.__doc__
