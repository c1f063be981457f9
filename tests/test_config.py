"""Configurations check themselves: every bad value is a ConfigError that says what would be right."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from bm_jax.config import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    MambaConfig,
    MeshConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    RunConfig,
    from_dict,
    to_dict,
)


@pytest.mark.parametrize("config", [Config(), *map(configs.load, configs.names())], ids=["plain", *configs.names()])
def test_json_round_trip(config):
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_missing_fields_take_their_defaults():
    assert from_dict(Config, {}) == Config()
    assert from_dict(Config, {"model": {"width": 64}}).model == ModelConfig(width=64)


def test_floats_may_be_written_as_integers():
    config = from_dict(OptimizerConfig, {"learning_rate": 1})
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, r"Config has no field 'modle' \(did you mean model\?\)"),
        ({"model": {"widht": 3}}, r"Config.model has no field 'widht' \(did you mean width\?\)"),
        ({"model": {"moe": {"expert": 3}}}, r"Config.model.moe has no field 'expert' \(did you mean experts"),
        ({"model": {"width": "64"}}, "Config.model.width must be int, got '64'"),
        ({"model": {"width": 64.0}}, r"Config.model.width must be int, got 64\.0"),
        ({"model": {"width": True}}, "Config.model.width must be int, got True"),
        ({"model": {"width": None}}, "Config.model.width must be int, got None"),
        ({"model": {"tie_embeddings": 1}}, "Config.model.tie_embeddings must be bool, got 1"),
        ({"model": {"norm_eps": True}}, "Config.model.norm_eps must be float, got True"),
        ({"model": {"norm_eps": "1e-5"}}, "Config.model.norm_eps must be float, got '1e-5'"),
        ({"model": {"layers": "mamba"}}, "Config.model.layers must be a list, got 'mamba'"),
        ({"model": {"layers": ["mamba", 3]}}, r"Config.model.layers\[1\] must be str, got 3"),
        ({"model": {"final_norm": "rmsnom"}}, r"is 'rmsnom'; choose one of layernorm, rmsnorm \(did you mean rmsnorm"),
        ({"model": []}, "Config.model must be an object, got list"),
        ({"data": {"sources": ["x", 3]}}, r"Config.data.sources\[1\] must be str, got 3"),
        ([], "Config must be an object, got list"),
        (None, "Config must be an object, got NoneType"),
    ],
)
def test_wrong_fields_and_types_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, values)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ModelConfig, {"width": -1}, "ModelConfig.width must be a positive integer, got -1"),
        (ModelConfig, {"repeats": 0}, "ModelConfig.repeats must be a positive integer, got 0"),
        (ModelConfig, {"vocab_size": True}, "ModelConfig.vocab_size must be a positive integer, got True"),
        (ModelConfig, {"layers": ()}, "ModelConfig.layers is empty"),
        (ModelConfig, {"layers": ("mambo",)}, r"contains 'mambo'.*\(did you mean mamba"),
        (ModelConfig, {"layers": ("",)}, "ModelConfig.layers contains ''"),
        (ModelConfig, {"layers": ("mamba+",)}, r"ModelConfig.layers contains 'mamba\+'"),
        (ModelConfig, {"layers": ("mamba+mamba",)}, "a parallel pair joins two different kinds"),
        (ModelConfig, {"layers": ("mamba+moe+mlp",)}, "a parallel pair joins two different kinds"),
        (ModelConfig, {"compute_dtype": "int8"}, "ModelConfig.compute_dtype is 'int8'; choose one of bfloat16"),
        (ModelConfig, {"width": 100, "layers": ("attention",)}, r"width \(100\) must be a multiple of attention.heads"),
        (
            ModelConfig,
            {"layers": ("attention",), "attention": AttentionConfig(head_size=3)},
            "rotary attention needs an even head size, got 3",
        ),
        (AttentionConfig, {"heads": 6, "kv_heads": 4}, r"heads \(6\) must be a multiple of .*kv_heads \(4\)"),
        (AttentionConfig, {"window": 0}, "AttentionConfig.window must be a positive integer, got 0"),
        (MambaConfig, {"dt_rank": 0}, "MambaConfig.dt_rank must be a positive integer, got 0"),
        (MambaConfig, {"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        (MambaConfig, {"dt_min": NAN}, "dt_min must be positive and finite"),
        (MlpConfig, {"activation": "swigglu"}, r"\(did you mean swiglu"),
        (MoeConfig, {"experts": 0}, "MoeConfig.experts must be a positive integer, got 0"),
        (MoeConfig, {"top_k": 9, "router": "topk"}, r"top_k \(9\) must not exceed MoeConfig.experts \(8\)"),
        (MoeConfig, {"top_k": 2}, "router 'sinkhorn' is top-1; use router 'topk'"),
        (MoeConfig, {"router": "sinkhron"}, r"\(did you mean sinkhorn\?\)"),
        (MoeConfig, {"load_balance_loss": NAN}, "load_balance_loss must be a finite number of at least 0"),
        (MoeConfig, {"router_z_loss": -1.0}, "router_z_loss must be a finite number of at least 0"),
        (MoeConfig, {"input_jitter": INF}, "input_jitter must be a finite number of at least 0"),
        (MoeConfig, {"capacity_factor": 0.0}, "capacity_factor must be positive"),
        (MoeConfig, {"capacity_factor": NAN}, "capacity_factor must be positive"),
        (MoeConfig, {"sinkhorn_temperature": 0.0}, "sinkhorn_temperature must be positive"),
        (MeshConfig, {"data": 0}, "MeshConfig.data must be a positive integer, got 0"),
        (MeshConfig, {"fsdp": -1}, "MeshConfig.fsdp must be a positive integer, got -1"),
        (DataConfig, {"weights": (NAN,)}, "DataConfig.weights must be positive and finite"),
        (DataConfig, {"sources": ("",)}, "DataConfig.sources holds an empty name"),
        (DataConfig, {"sources": ()}, "DataConfig.sources is empty"),
        (OptimizerConfig, {"learning_rate": NAN}, "learning_rate must be a finite number of at least 0"),
        (OptimizerConfig, {"beta2": 1.0}, r"beta2 must lie in \[0, 1\), got 1.0"),
        (OptimizerConfig, {"clip_norm": NAN}, "clip_norm must be positive"),
        (RunConfig, {"steps": 0}, "RunConfig.steps must be a positive integer, got 0"),
        (RunConfig, {"remat": "some"}, "RunConfig.remat is 'some'; choose one of none, dots, full"),
        (
            Config,
            {"data": DataConfig(batch_size=3), "run": RunConfig(accumulation=2)},
            r"data.batch_size \(3\) must be a multiple of run.accumulation \(2\)",
        ),
    ],
)
def test_bad_values_are_refused(cls, values, message):
    with pytest.raises(ConfigError, match=message):
        cls(**values)


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (MambaConfig, {"dt_max": INF}),
        (MambaConfig, {"dt_floor": NAN}),
        (MambaConfig, {"dt_floor": -1.0}),
        (AttentionConfig, {"rotary_base": NAN}),
        (AttentionConfig, {"rotary_base": -1.0}),
        (ModelConfig, {"norm_eps": NAN}),
        (ModelConfig, {"norm_eps": -1.0}),
        (ModelConfig, {"initializer_range": NAN}),
        (MoeConfig, {"sinkhorn_temperature": NAN}),
        (MoeConfig, {"capacity_factor": INF}),
    ],
    ids=str,
)
def test_numbers_that_can_only_fail_later_are_refused_now(cls, values):
    with pytest.raises(ConfigError):
        cls(**values)


@pytest.mark.parametrize("values", [{"optimizer": {"beta1": 10**400}}, {"optimizer": {"warmup_steps": 10**400}}])
def test_huge_integers_are_refused(values):
    with pytest.raises(ConfigError):
        from_dict(Config, values)


# Any change of a valid configuration gives a valid one or a ConfigError

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from([0, -1, 1, 2, 7, 0.5, "mamba", "moe", "attention", "topk", "byte", [], {}, [[]], ["mamba", "moe"]]),
    st.lists(st.sampled_from(["mamba", "moe", "mlp", "attention", "mamba+moe", "x", 3]), max_size=3),
)  # fmt: skip


def places(values, path=()):
    """Every object inside a nested dictionary, by path."""
    yield path
    for name, value in values.items():
        if isinstance(value, dict):
            yield from places(value, (*path, name))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_mutation_is_valid_or_a_config_error(data):
    values = json.loads(json.dumps(to_dict(Config())))
    for _ in range(data.draw(st.integers(1, 3))):
        owner = values
        for name in data.draw(st.sampled_from(list(places(values)))):
            owner = owner[name]
        action = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "add" or not owner:
            owner[data.draw(st.text(max_size=5))] = data.draw(JUNK)
        elif action == "remove":
            del owner[data.draw(st.sampled_from(sorted(owner)))]
        else:
            owner[data.draw(st.sampled_from(sorted(owner)))] = copy.deepcopy(data.draw(JUNK))
    try:
        config = from_dict(Config, values)
    except ConfigError:
        return
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    hash(config)
