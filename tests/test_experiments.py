"""The experiments: systems of one size, runs that go on, findings that follow from the numbers."""

from __future__ import annotations

import dataclasses
import json
import os
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
from experiments.systems import SYSTEMS, VARIANTS, active_without_embeddings, tiny

ROOT = Path(__file__).resolve().parent.parent
TEXT = "\n\n".join(shakespeare_texts()["validation"].values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    lines = [json.dumps({"text": TEXT[start : start + 300]}) for start in range(0, 30_000, 300)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare([folder / "text.jsonl"], folder / "data", tokenizer="byte", validation_fraction=0.2, progress=False)
    return folder / "data"


def test_systems_have_one_active_size_and_one_cost():
    sizes = {name: active_without_embeddings(model) for name, model in (SYSTEMS | VARIANTS).items()}
    assert all(26e6 < size < 28e6 for size in sizes.values()), sizes
    costs = {name: model_flops_per_token(model, 1024) for name, model in (SYSTEMS | VARIANTS).items()}
    assert max(costs.values()) < 1.08 * min(costs.values()), costs
    assert {model.moe.experts for name, model in VARIANTS.items() if "_expert" in name} == {1, 4, 16, 32}


@pytest.mark.parametrize("name", [*SYSTEMS, *VARIANTS])
def test_tiny_systems_keep_what_they_are_made_of(name):
    model = (SYSTEMS | VARIANTS)[name]
    small = tiny(model)
    assert small.layers == model.layers
    assert (small.moe.experts, small.moe.router, small.moe.top_k) == (model.moe.experts, model.moe.router, model.moe.top_k)
    assert small.moe.capacity_factor == model.moe.capacity_factor


@pytest.mark.slow
def test_learning_goes_on_where_it_stopped(data, tmp_path, capsys, monkeypatch):
    """Two systems, each with its best of two rates; called again it trains nothing and says the same."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    options = learning.Options(
        str(data), output=str(tmp_path / "runs"), metrics=tmp_path / "learning.json", steps=8, rates=(1e-3, 1e-2), widen=0,
        seeds=(0,), systems=("blackmamba", "mamba"), sequence_length=32, batch_size=4, tiny=True, devices=2,
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
    options = learning.Options(str(data), output=str(tmp_path), sequence_length=32, batch_size=4, tiny=True)
    plan = dataclasses.replace(learning.plan_of(options, "mamba", 0, 1e-3, 4), data=str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"mamba with rate 0.001 and seed 0 failed: see .*\.log"):
        learning.run_all([plan], options)
    assert "nowhere" in Path(f"{plan.directory}.log").read_text()


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
    assert {one["plan"]["steps"] for one in tried} == {learning.Options.steps // 6}
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
        learning.whole_runs(learning.Options(str(data)), "blackmamba_switch", {"mamba": 1e-3})


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
