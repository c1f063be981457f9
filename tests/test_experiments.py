"""The experiments: systems of one size, runs that go on, findings that follow from the numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import BYTE, tiny_config, tiny_model

from bm_jax.data import prepare
from bm_jax.data.bundled import shakespeare_texts
from bm_jax.metrics import model_flops_per_token
from bm_jax.model import forward
from experiments import expert_tokens, learning, one_run, router_balance
from experiments.figures import loss_against_flops
from experiments.systems import SHAPES, SYSTEMS, VARIANTS, active_without_embeddings, model_of

ROOT = Path(__file__).resolve().parent.parent
TEXT = "\n\n".join(shakespeare_texts()["validation"].values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    lines = [json.dumps({"text": TEXT[start : start + 300]}) for start in range(0, 30_000, 300)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare([folder / "text.jsonl"], folder / "data", tokenizer="byte", validation_fraction=0.2, progress=False)
    return folder / "data"


@pytest.mark.parametrize(
    ("size", "length", "active", "dearer"),
    [("full", 1024, 27.1e6, 1.08), ("small", 256, 131.5e3, 1.17)],  # attention costs small models more
)
def test_systems_of_a_size_have_one_active_size_and_one_cost(size, length, active, dearer):
    models = {name: model_of(name, size) for name in SYSTEMS | VARIANTS}
    sizes = {name: active_without_embeddings(model) for name, model in models.items()}
    assert all(count == pytest.approx(active, rel=0.025) for count in sizes.values()), sizes
    costs = {name: model_flops_per_token(model, length) for name, model in models.items()}
    assert max(costs.values()) < dearer * min(costs.values()), costs
    assert {model.moe.experts for name, model in models.items() if "_expert" in name} == {1, 4, 16, 32}


@pytest.mark.parametrize("name", [*SYSTEMS, *VARIANTS])
def test_other_sizes_keep_what_a_system_is_made_of(name):
    model, *others = (model_of(name, size) for size in SHAPES)
    sized = ("repeats", "width", "vocab_size", "compute_dtype", "attention", "mlp", "mamba")
    for other in others:
        moe = dataclasses.replace(other.moe, width=model.moe.width)
        assert dataclasses.replace(other, moe=moe, **{field: getattr(model, field) for field in sized}) == model


@pytest.mark.slow
def test_learning_goes_on_where_it_stopped(data, tmp_path, capsys, monkeypatch):
    """Two systems, each with its best of two rates; called again it trains nothing and says the same."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    options = learning.Options(
        str(data), output=str(tmp_path / "runs"), metrics=tmp_path / "learning.json", steps=8, rates=(1e-3, 1e-2), widen=0,
        seeds=(0,), systems=("blackmamba", "mamba"), sequence_length=32, batch_size=4, size="tiny", devices=2,
    )  # fmt: skip
    learning.main(options)
    first = capsys.readouterr().out
    assert "blackmamba: learning rate 0.01, at the edge of those tried" in first
    assert "| mamba | 1 | 0.01 |" in first
    kept = json.loads(options.metrics.read_text())
    assert len(kept["rates"]) == 4
    assert [run["plan"]["system"] for run in kept["runs"]] == ["blackmamba", "mamba"]
    last = kept["runs"][0]["validation"][-1]
    assert last["step"] == 8
    assert last["flops"] == pytest.approx(8 * 128 * kept["runs"][0]["flops_per_token"])
    # Bytes as tokens, an end of a document each 301: nats a token are bits a byte but for that.
    assert last["bits_per_byte"] == pytest.approx(last["nats_per_token"] / np.log(2) * 301 / 300, rel=5e-3)
    assert len(kept["runs"][0]["expert_load"][-1]["training"]) == 2
    assert kept["runs"][0]["training"][-1]["objective"] == pytest.approx(last["nats_per_token"], rel=0.2)
    assert not list((tmp_path / "runs").glob("*/checkpoints"))
    monkeypatch.setattr(learning.subprocess, "run", None)
    learning.main(options)
    again = capsys.readouterr().out
    assert "bits per byte\n" not in again
    assert first.partition("| system")[2] == again.partition("| system")[2]
    loss_against_flops.main(["--metrics", str(options.metrics), "--output", str(tmp_path)])


def test_a_run_that_fails_is_named_with_its_log(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    options = learning.Options(str(data), output=str(tmp_path), sequence_length=32, batch_size=4, size="tiny")
    plan = dataclasses.replace(learning.plan_of(options, "mamba", 0, 1e-3), data=str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"mamba with rate 0.001 and seed 0 failed: see .*\.log"):
        learning.run_all([plan], options)
    assert "nowhere" in Path(f"{plan.directory}.log").read_text()


def tiny_options(data, output, **changes):
    """Runs of four steps."""
    sizes = {"steps": 4, "sequence_length": 32, "batch_size": 4, "size": "tiny", "rates": (1e-3,), "seeds": (0,)}
    return learning.Options(str(data), output=str(output), **{"systems": ("mamba",)} | sizes | changes)


def keep_result(plan, *ends):
    """Write what a run of that plan would have written."""
    kept = run(plan.system, list(ends)) | {"plan": plan.kept()}
    Path(f"{plan.directory}.json").write_text(json.dumps(kept))


def test_kept_results_are_those_of_the_same_data_and_settings(data, tmp_path, monkeypatch):
    options = tiny_options(data, tmp_path)
    plan = learning.plan_of(options, "mamba", 0, 1e-3)
    keep_result(plan, 3.0, 2.0)
    moved = tmp_path / "elsewhere" / data.name
    shutil.copytree(data, moved)
    for again in (options, dataclasses.replace(options, data=str(moved))):
        learning.main(again)
    assert json.loads((tmp_path / "learning.json").read_text())["runs"][0]["plan"] == plan.kept()
    for name, value in (("batch_size", 2), ("sequence_length", 16), ("size", "small")):
        other = f"mamba-0.001-seed0-4.json is of other data or settings: .*{name} .*Give another --output"
        with pytest.raises(SystemExit, match=other):
            learning.main(dataclasses.replace(options, **{name: value}))
    with monkeypatch.context() as patch:
        patch.setitem(SYSTEMS, "mamba", SYSTEMS["transformer"])
        with pytest.raises(SystemExit, match=r"settings: model \w+, not \w+\. Give"):
            learning.main(options)
    manifest = moved / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens_sha256": "', '"tokens_sha256": "0'))
    with pytest.raises(SystemExit, match=r"settings: fingerprint \w+, not \w+\. Give"):
        learning.main(dataclasses.replace(options, data=str(moved)))
    result = Path(f"{plan.directory}.json")
    for text in (result.read_text()[:100], "[]", "{}"):
        result.write_text(text)
        with pytest.raises(SystemExit, match=r"mamba-0.001-seed0-4.json is damaged: delete it"):
            learning.main(options)


def test_results_of_a_part_do_not_replace_those_that_are_kept(data, tmp_path):
    assert learning.Options(str(data), output="x").as_meant().metrics == Path("x/learning.json")
    options = tiny_options(data, tmp_path, metrics=tmp_path / "new" / "all.json")
    keep_result(learning.plan_of(options, "mamba", 0, 1e-3), 2.0)
    learning.main(options)
    assert json.loads(options.metrics.read_text())["runs"][0]["plan"]["system"] == "mamba"
    assert not (tmp_path / "learning.json").exists()


def test_checkpoints_of_rates_not_chosen_are_not_kept(data, tmp_path):
    for keep in (True, False):
        options = tiny_options(data, tmp_path / f"{keep}", rates=(1e-3, 2e-3), widen=0, keep=keep)
        for rate, end in ((1e-3, 3.0), (2e-3, 2.0)):
            plan = learning.plan_of(options, "mamba", 0, rate)
            (Path(plan.directory) / "checkpoints").mkdir(parents=True)
            keep_result(plan, end)
        learning.main(options)
        left = [path.parent.name for path in Path(options.output).glob("*/checkpoints")]
        assert left == (["mamba-0.002-seed0-4"] if keep else [])


def test_a_rate_that_diverges_is_the_worst(data, tmp_path, capsys, monkeypatch):
    """The run of the rate 1e30 is real."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    options = tiny_options(data, tmp_path, steps=10, rates=(1e-3, 1e30), widen=0)
    keep_result(learning.plan_of(options, "mamba", 0, 1e-3), 2.0)
    learning.main(options)
    said = capsys.readouterr().out
    assert "mamba-1e+30-seed0-10: diverged" in said
    assert "mamba: learning rate 0.001" in said
    tried = json.loads(options.as_meant().metrics.read_text(), parse_constant=pytest.fail)["rates"]
    assert [(one["learning_rate"], one["bits_per_byte"]) for one in tried] == [(1e-3, 2.0), (1e30, None)]
    result = json.loads((tmp_path / "mamba-1e+30-seed0-10.json").read_text(), parse_constant=pytest.fail)
    assert "not finite" in result["diverged"]


def test_runs_that_diverge_are_errors(data, tmp_path):
    options = tiny_options(data, tmp_path)
    rows = [{"step": 2, "validation_loss": 3.0}, {"step": 4, "validation_loss": float("nan")}]
    for rates, wanted in (
        ((1e-3,), "mamba-0.001-seed0-4 diverged"),
        ((2e-3, 4e-3), "mamba diverged with each learning rate it tried, the lowest"),
    ):
        for rate in rates:
            plan = learning.plan_of(options, "mamba", 0, rate)
            result = one_run.measured(plan, rows)
            assert result["diverged"] == "the held-out loss of step 4 is nan"
            Path(f"{plan.directory}.json").write_text(json.dumps(result, allow_nan=False))
        with pytest.raises(SystemExit, match=f"{wanted}.*give lower --rates"):
            learning.main(dataclasses.replace(options, rates=rates, widen=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ()}, "--systems: give at least one"),
        ({"rates": ()}, "--rates: give at least one"),
        ({"seeds": ()}, "--seeds: give at least one"),
        ({"seeds": (1, 1)}, "--seeds: a value stands there twice"),
        ({"devices": 0}, "--devices 0: should be at least 1"),
        ({"steps": 1}, "--steps 1: should be at least 2"),
        ({"rates": (-1.0,)}, "learning_rate must be"),
        ({"data": "nowhere"}, "nowhere is not prepared data"),
        ({"systems": ("blackmamba_switch", "mamba")}, "takes the learning rate of blackmamba, which is not among them"),
        ({"output": "FILE"}, "FILE: File exists; give another folder"),
        ({"metrics": Path()}, "--metrics .: a folder; name a file"),
    ],
)
def test_what_cannot_be_trained_is_said_at_once(changes, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    with pytest.raises(SystemExit) as error:
        learning.main(tiny_options(**{"data": data, "output": "runs"} | changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tiny_models_have_no_room_for_many_token_ids(data, tmp_path):
    large = tmp_path / "large"
    shutil.copytree(data, large)
    manifest = json.loads((large / "manifest.json").read_text())
    (large / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_ids": 50_277}))
    with pytest.raises(SystemExit, match="has 50,277 token ids, mamba only 264: tiny models read bytes"):
        learning.main(tiny_options(large, tmp_path))


def test_the_best_rate_is_between_two_that_are_worse(data, monkeypatch, capsys):
    """Mamba learns best at 0.5e-3, BlackMamba at 2e-3: half of Mamba's lowest rate is tried, and half of that."""
    best = {"mamba": 0.5e-3, "blackmamba": 2e-3}

    def trained(plans, options):
        away = [abs(np.log(plan.learning_rate / best[plan.system])) for plan in plans]
        return [
            {"plan": dataclasses.asdict(plan), "validation": [{"bits_per_byte": 1 + x}]}
            for plan, x in zip(plans, away, strict=True)
        ]

    monkeypatch.setattr(learning, "run_all", trained)
    tried, chosen = learning.choose_rates(learning.Options(str(data)), list(best))
    assert chosen == best
    rates = {name: [one["plan"]["learning_rate"] for one in tried if one["plan"]["system"] == name] for name in best}
    assert rates == {"mamba": [0.25e-3, 0.5e-3, 1e-3, 2e-3, 4e-3], "blackmamba": [1e-3, 2e-3, 4e-3]}
    assert {one["plan"]["steps"] for one in tried} == {learning.Options.steps}
    assert "edge" not in capsys.readouterr().out
    _, chosen = learning.choose_rates(learning.Options(str(data), widen=0), list(best))
    assert chosen == {"mamba": 1e-3, "blackmamba": 2e-3}
    assert "mamba: learning rate 0.001, at the edge of those tried" in capsys.readouterr().out
    assert learning.choose_rates(learning.Options(str(data), rates=(3e-3,)), ["mamba"]) == ([], {"mamba": 3e-3})


def test_more_devices_than_there_may_be(data, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with pytest.raises(SystemExit, match="--devices 3: CUDA_VISIBLE_DEVICES=2,5 names 2"):
        learning.run_all([], learning.Options(str(data), devices=3))


def test_systems_that_there_are_not(data):
    with pytest.raises(SystemExit, match="there is no rwkv; there are blackmamba, mamba"):
        learning.main(learning.Options(str(data), systems=("rwkv",)))
    with pytest.raises(SystemExit, match="blackmamba_switch takes the learning rate of blackmamba"):
        learning.compared_runs(learning.Options(str(data)), "blackmamba_switch", {"mamba": 1e-3})


def test_plans_become_the_configurations_that_they_say(data):
    plan = one_run.Plan("blackmamba_16_experts", 3, 2e-3, 2400, str(data), "runs/x")
    config = one_run.config_of(plan)
    assert (config.model.moe.experts, config.run.seed, config.data.seed) == (16, 3, 3)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (2e-3, 120)
    assert config.run.eval_every * plan.snapshots == config.run.steps


def run(system: str, curve: list[float], seed: int = 0, loads: list[list[float]] | None = None) -> dict:
    points = enumerate(curve, 1)
    return {
        "plan": {"system": system, "seed": seed, "learning_rate": 1e-3}, "parameters": 1e6, "active_without_embeddings": 5e5,
        "tokens_per_second": 1000.0,
        "validation": [{"step": 10 * n, "bits_per_byte": y, "flops": 1e15 * n, "seconds": 60 * n} for n, y in points],
        "expert_load": [{"step": 10, "training": loads, "inference": [[1.0, 0.0]]}] if loads else [],
    }  # fmt: skip


def test_findings_follow_from_the_curves():
    runs = [
        run("blackmamba", [3, 2.5, 2.0, 1.5], 0, [[0.5, 0.5], [0.4, 0.6]]), run("blackmamba", [3, 1.5, 1.0, 0.5], 1),
        run("mamba", [4, 3, 2.5, 1.75]),
    ]  # fmt: skip
    assert learning.mean_curve(runs[:2]) == [(10, 3), (20, 2.0), (30, 1.5), (40, 1.0)]
    reached, balance = learning.findings(runs)
    assert "after 25 of 40 steps, 1/1.60." in reached
    assert "1.20 in training, 2.00 in inference" in balance
    assert "| blackmamba | 2 | 0.001 | 1 M | 0.5 M | 1.0000 (1.5000, 0.5000) | 1,000 | 4 | 4 |" in learning.table(runs)
    (never,) = learning.findings([run("blackmamba", [3, 2]), run("mamba", [2, 1])])
    assert "does not reach" in never
    assert learning.steps_to([(10, 1.0), (20, 0.5)], 2.0) == 10


def test_tokens_of_experts_are_those_that_the_model_sends_there():
    model = tiny_model(tiny_config(("mamba", "moe")))
    ids = np.array(BYTE.encode(TEXT[:240])).reshape(4, 60)
    chosen = np.asarray(expert_tokens.choices(model.parameters, ids, model.config))
    load = jax.jit(forward, static_argnames="config")(model.parameters, ids, model.config).statistics.load
    counted = [np.bincount(chosen[..., layer].ravel(), minlength=4) / 240 for layer in range(2)]
    np.testing.assert_allclose(counted, load, atol=0.01)  # rounding may move a token that is nearly tied
    found = expert_tokens.measure(model, TEXT, tokens=240, rows=4)
    assert found["tokens"] == 240
    for layer in range(2):
        np.testing.assert_allclose([expert["share"] for expert in found["layers"][layer]], counted[layer], atol=0.01)
        for number, expert in enumerate(found["layers"][layer]):
            sent = ids[chosen[..., layer] == number]
            for token in expert["top"]:
                assert token["share"] == pytest.approx(np.mean([BYTE.decode([one]) == token["text"] for one in sent]))
                assert token["share"] > token["of_text"]
    with pytest.raises(ValueError, match="has no experts"):
        expert_tokens.measure(tiny_model(tiny_config(("mamba",))), TEXT, tokens=10, rows=1)
    with pytest.raises(ValueError, match="has 5 tokens, fewer than 8 rows"):
        expert_tokens.measure(model, "a b c", tokens=10, rows=8)


@pytest.mark.slow
def test_router_balance_routes_as_training_and_inference_do():
    model = tiny_model(tiny_config(("mamba", "moe")))
    options = router_balance.Options("", tokens=512, rows=4, temperatures=(1.0, 0.1), iterations=(16,))
    *balanced, inference = router_balance.measure(model, TEXT, options)
    assert [row["sinkhorn_temperature"] for row in balanced] == [1.0, 0.1]
    ids = jax.numpy.array(model.tokenizer.encode(TEXT)[:512]).reshape(4, -1)
    for row, training in ((balanced[1], True), (inference, False)):
        moe = {name: value for name, value in row.items() if name.startswith("sinkhorn")}
        config = dataclasses.replace(model.config, moe=dataclasses.replace(model.config.moe, **moe))
        load = forward(model.parameters, ids[:, :-1], config, training=training).statistics.load
        np.testing.assert_allclose(row["load"], load.max(axis=-1) * config.moe.experts, rtol=1e-6)
    assert max(balanced[1]["load"]) < max(inference["load"])


def test_router_balance_says_what_it_cannot_read():
    with pytest.raises(ValueError, match="the model has no Sinkhorn router"):
        router_balance.measure(tiny_model(tiny_config(("mamba",))), TEXT, router_balance.Options(""))
    with pytest.raises(ValueError, match="the text has 3 tokens, fewer than two for each of 32 rows"):
        router_balance.measure(tiny_model(tiny_config(("mamba", "moe"))), "abc", router_balance.Options(""))
