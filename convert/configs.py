"""Configurations of the checkpoint formats, to ours and back.

`read` also says which format a config.json is of. What our models do not have (biases of the projections, other gates) is
refused by name rather than dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bm_jax.config import Activation, AttentionConfig, ConfigError, MambaConfig, MlpConfig, ModelConfig, MoeConfig

Fields = Mapping[str, Any]
EXPERT_ACTIVATIONS: dict[str, Activation] = {
    "released": "geglu",
    "swiglu": "swiglu",
    "geglu": "geglu",
    "geglu_tanh": "geglu_tanh",
}
"""What `--expert-activation` may say of BlackMamba's experts: the released inference code gates with GELU in its erf form,
the paper says SwiGLU."""


def recognize(fields: Fields) -> str:
    """Name of the format that a config.json is of.

    Raises:
        ConfigError: of none.
    """
    kind = fields.get("model_type")
    if kind in ("mamba", "jamba", "mixtral"):
        return f"hf-{kind}"
    if "mamba_moe_layers" in fields:
        return "blackmamba"
    if {"d_model", "n_layer"} <= set(fields):
        return "mamba"
    raise ConfigError(
        f"config.json is of no known format: model_type is {kind!r}, and there is neither mamba_moe_layers (BlackMamba) nor "
        "d_model and n_layer (state-spaces Mamba). Known: blackmamba, mamba, hf-mamba, hf-jamba, hf-mixtral"
    )


class Reader:
    """Fields of a config.json, taken one by one with their types checked."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"config.json: {name} must be a whole number from 1, got {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.fields.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ConfigError(f"config.json: {name} must be a number, got {value!r}")
        return float(value)

    def must_be(self, name: str, wanted: Any) -> None:
        value = self.fields.get(name, wanted)
        if value != wanted:
            raise ConfigError(f"config.json: {name} is {value!r}; only {wanted!r} can be converted")


def to_ours(format: str, fields: Fields, expert_activation: str = "released") -> ModelConfig:
    """The model of a config.json.

    Raises:
        ConfigError: something is missing, contradictory or beyond what our models express; the message names the field.
    """
    return _TO_OURS[format](Reader(fields), expert_activation)


def to_theirs(format: str, config: ModelConfig) -> dict[str, Any]:
    """A config.json for a model that was not imported from this format.

    Raises:
        ConfigError: the format cannot express the model.
    """
    return _TO_THEIRS[format](config)


def period(kinds: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The shortest run of layers that repeats to give all of them, and how often."""
    for length in range(1, len(kinds) + 1):
        if len(kinds) % length == 0 and kinds == kinds[:length] * (len(kinds) // length):
            return kinds[:length], len(kinds) // length
    raise ConfigError("a model has at least one layer")


def _layer_string(text: Any) -> tuple[str, int]:
    """Our kind of a BlackMamba layer string and its number of experts, 0 for none."""
    text = str(text)
    kinds = {"r": ("mamba", 0), "1": ("mlp", 0), "r1": ("mamba+mlp", 0)}
    if text in kinds:
        return kinds[text]
    experts = text.removeprefix("r")
    if len(experts) == 1 and experts in "23456789":
        return ("mamba+moe" if text.startswith("r") else "moe"), int(experts)
    raise ConfigError(
        f"config.json: mamba_moe_layers has {text!r}, which the released code reads by its first and last characters alone; "
        "known are r, 1, 2 to 9, r1, and r2 to r9"
    )


def _blackmamba_to_ours(reader: Reader, expert_activation: str) -> ModelConfig:
    fields = reader.fields
    depth = reader.whole("num_layers")
    listed = fields.get("mamba_moe_layers") or ["r"] * depth
    if not isinstance(listed, list | str) or len(listed) != depth:
        raise ConfigError(
            f"config.json: mamba_moe_layers must have {depth} entries, one for each of num_layers, got {listed!r}"
        )
    parsed = [_layer_string(text) for text in listed]
    experts = {count for _, count in parsed if count}
    if len(experts) > 1:
        raise ConfigError(f"config.json: mamba_moe_layers asks for layers of {sorted(experts)} experts; all must have as many")
    reader.must_be("add_bias_linear", False)
    layers, repeats = period(tuple(kind for kind, _ in parsed))
    hidden = reader.whole("ffn_hidden_size", 1) if any(kind != "mamba" for kind, _ in parsed) else 1
    gated = fields.get("swiglu", False)
    activation: Activation = EXPERT_ACTIVATIONS[expert_activation] if gated else "gelu"
    vocabulary = "vocab_size" if "vocab_size" in fields else "padded_vocab_size"
    return ModelConfig(
        layers=layers,
        repeats=repeats,
        vocab_size=reader.whole(vocabulary),
        width=reader.whole("hidden_size"),
        mamba=MambaConfig(
            state_size=reader.whole("state_size", 16),
            conv_width=reader.whole("conv_dimension", 4),
            expansion=reader.whole("expansion_factor", 2),
        ),
        mlp=MlpConfig(width=hidden, activation=activation),
        moe=MoeConfig(experts=max(experts, default=8), width=hidden, activation=activation),
        norm_eps=reader.number("layernorm_epsilon", 1e-5),
    )


def _blackmamba_to_theirs(config: ModelConfig) -> dict[str, Any]:
    strings = {
        "mamba": "r",
        "mlp": "1",
        "mamba+mlp": "r1",
        "moe": f"{config.moe.experts}",
        "mamba+moe": f"r{config.moe.experts}",
    }
    kinds = set(config.kinds)
    problems = {
        "attention layers": "attention" in kinds,
        f"{config.moe.experts} experts (2 to 9 can be written)": "moe" in kinds and not 2 <= config.moe.experts <= 9,
        "an untied unembedding": not config.tie_embeddings,
        "a final RMSNorm": config.final_norm != "layernorm",
        "norms inside the Mamba layers": config.mamba.inner_norms,
        "a router without bias": "moe" in kinds and not config.moe.router_bias,
        f"router {config.moe.router}": "moe" in kinds and config.moe.router != "sinkhorn",
        "parallel pairs in another order": any(layer not in strings for layer in config.layers),
    }
    if {"moe", "mlp"} <= kinds and (config.moe.width, config.moe.activation) != (config.mlp.width, config.mlp.activation):
        problems["experts of another width than the dense layers"] = True
    _refuse("blackmamba", problems)
    inner = config.moe if "moe" in kinds else config.mlp
    return {
        "num_layers": config.depth,
        "hidden_size": config.width,
        "state_size": config.mamba.state_size,
        "conv_dimension": config.mamba.conv_width,
        "vocab_size": config.vocab_size,
        "expansion_factor": config.mamba.expansion,
        "mamba_moe_layers": [strings[layer] for layer in config.layers * config.repeats],
        "ffn_hidden_size": inner.width,
        "bias": False,
        "add_bias_linear": False,
        "swiglu": inner.activation in ("swiglu", "geglu", "geglu_tanh"),
        "max_sequence_length": 2048,
    }


def _refuse(format: str, problems: Mapping[str, bool]) -> None:
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ConfigError(f"{format} cannot express this model: it has {', '.join(found)}")


def _dense_mamba(**options: Any) -> ModelConfig:
    return ModelConfig(layers=("mamba",), final_norm="rmsnorm", **options)


def _mamba_to_ours(reader: Reader, _: str) -> ModelConfig:
    fields = reader.fields
    details = Reader(fields.get("ssm_cfg") or {})
    if details.fields.get("layer", "Mamba1") != "Mamba1":
        raise ConfigError(f"config.json: ssm_cfg.layer is {details.fields['layer']!r}; only Mamba1 can be converted")
    for name in ("attn_layer_idx", "d_intermediate"):
        if fields.get(name):
            raise ConfigError(f"config.json: {name} is {fields[name]!r}; hybrid models of this format cannot be converted")
    reader.must_be("rms_norm", True)
    details.must_be("bias", False)
    details.must_be("conv_bias", True)
    multiple = reader.whole("pad_vocab_size_multiple", 8)
    rank = details.fields.get("dt_rank", "auto")
    return _dense_mamba(
        repeats=reader.whole("n_layer"),
        vocab_size=-(-reader.whole("vocab_size") // multiple) * multiple,
        width=reader.whole("d_model"),
        mamba=MambaConfig(
            state_size=details.whole("d_state", 16),
            conv_width=details.whole("d_conv", 4),
            expansion=details.whole("expand", 2),
            dt_rank=None if rank == "auto" else details.whole("dt_rank"),
        ),
        tie_embeddings=bool(fields.get("tie_embeddings", True)),
    )


def _only_mamba(format: str, config: ModelConfig) -> None:
    _refuse(
        format,
        {
            "layers other than mamba": set(config.layers) != {"mamba"},
            "a final LayerNorm": config.final_norm != "rmsnorm",
            "norms inside the Mamba layers": config.mamba.inner_norms,
        },
    )


def _mamba_to_theirs(config: ModelConfig) -> dict[str, Any]:
    _only_mamba("mamba", config)
    details: dict[str, Any] = {"d_state": config.mamba.state_size, "d_conv": config.mamba.conv_width}
    details |= {"expand": config.mamba.expansion, "dt_rank": config.dt_rank}
    return {
        "d_model": config.width,
        "n_layer": config.depth,
        "vocab_size": config.vocab_size,
        "ssm_cfg": details,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_embeddings,
    }


def _hf_mamba_to_ours(reader: Reader, _: str) -> ModelConfig:
    fields = reader.fields
    width = reader.whole("hidden_size")
    expansion = reader.whole("expand", 2)
    if fields.get("intermediate_size", expansion * width) != expansion * width:
        raise ConfigError(
            f"config.json: intermediate_size is {fields['intermediate_size']}, not expand * hidden_size ({expansion * width})"
        )
    reader.must_be("use_bias", False)
    reader.must_be("use_conv_bias", True)
    reader.must_be("hidden_act", "silu")
    rank = fields.get("time_step_rank", "auto")
    return _dense_mamba(
        repeats=reader.whole("num_hidden_layers"),
        vocab_size=reader.whole("vocab_size"),
        width=width,
        mamba=MambaConfig(
            state_size=reader.whole("state_size", 16),
            conv_width=reader.whole("conv_kernel", 4),
            expansion=expansion,
            dt_rank=None if rank == "auto" else reader.whole("time_step_rank"),
        ),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=bool(fields.get("tie_word_embeddings", True)),
    )


def _hf_mamba_to_theirs(config: ModelConfig) -> dict[str, Any]:
    _only_mamba("hf-mamba", config)
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": config.width,
        "intermediate_size": config.inner_width,
        "num_hidden_layers": config.depth,
        "state_size": config.mamba.state_size,
        "conv_kernel": config.mamba.conv_width,
        "expand": config.mamba.expansion,
        "time_step_rank": config.dt_rank,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": True,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _attention_to_ours(reader: Reader, **options: Any) -> AttentionConfig:
    heads = reader.whole("num_attention_heads")
    head_size = reader.fields.get("head_dim")
    return AttentionConfig(
        heads=heads,
        kv_heads=reader.whole("num_key_value_heads", heads),
        head_size=None if head_size is None else reader.whole("head_dim"),
        **options,
    )


def _attention_to_theirs(config: ModelConfig) -> dict[str, Any]:
    return {"num_attention_heads": config.attention.heads, "num_key_value_heads": config.attention.kv_heads}


def _hf_jamba_to_ours(reader: Reader, _: str) -> ModelConfig:
    reader.must_be("mamba_proj_bias", False)
    reader.must_be("mamba_conv_bias", True)
    reader.must_be("hidden_act", "silu")
    depth, experts = reader.whole("num_hidden_layers"), reader.whole("num_experts", 16)
    every = {name: reader.whole(f"{name}_layer_period", default) for name, default in (("attn", 8), ("expert", 2))}
    first = {name: reader.fields.get(f"{name}_layer_offset", default) for name, default in (("attn", 4), ("expert", 1))}
    kinds: list[str] = []
    for layer in range(depth):
        kinds.append("attention" if layer % every["attn"] == first["attn"] else "mamba")
        kinds.append("moe" if experts > 1 and layer % every["expert"] == first["expert"] else "mlp")
    layers, repeats = period(tuple(kinds))
    width, inner, rank = (
        reader.whole("hidden_size"),
        reader.whole("intermediate_size"),
        reader.fields.get("mamba_dt_rank", "auto"),
    )
    return ModelConfig(
        layers=layers,
        repeats=repeats,
        vocab_size=reader.whole("vocab_size"),
        width=width,
        mamba=MambaConfig(
            state_size=reader.whole("mamba_d_state", 16),
            conv_width=reader.whole("mamba_d_conv", 4),
            expansion=reader.whole("mamba_expand", 2),
            dt_rank=None if rank == "auto" else reader.whole("mamba_dt_rank"),
            inner_norms=True,
        ),
        attention=_attention_to_ours(reader, rotary=False),
        mlp=MlpConfig(width=inner),
        moe=MoeConfig(
            experts=experts,
            width=inner,
            router="topk",
            top_k=reader.whole("num_experts_per_tok", 2),
            router_bias=False,
            load_balance_loss=reader.number("router_aux_loss_coef", 0.001),
        ),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        final_norm="rmsnorm",
        tie_embeddings=bool(reader.fields.get("tie_word_embeddings", False)),
    )


def _places(kinds: tuple[str, ...], kind: str, blocks: int) -> tuple[int, int]:
    """Period and offset of the blocks of a kind; a period past the end where there are none."""
    at = [number for number, found in enumerate(kinds) if found == kind]
    if not at:
        return blocks + 1, blocks
    every = at[1] - at[0] if len(at) > 1 else max(blocks, 1)
    if at != list(range(at[0], blocks, every)):
        raise ConfigError(f"hf-jamba cannot express this model: its {kind} layers are not evenly spaced")
    return every, at[0]


def _hf_jamba_to_theirs(config: ModelConfig) -> dict[str, Any]:
    kinds = config.layers * config.repeats
    mixers, seconds = kinds[::2], kinds[1::2]
    _refuse(
        "hf-jamba",
        {
            "layers that are not pairs of mamba or attention and mlp or moe": len(kinds) % 2 == 1
            or not set(mixers) <= {"mamba", "attention"}
            or not set(seconds) <= {"mlp", "moe"},
            "Mamba layers without inner norms": "mamba" in kinds and not config.mamba.inner_norms,
            "rotary attention": "attention" in kinds and config.attention.rotary,
            "a sliding window": "attention" in kinds and config.attention.window is not None,
            "heads of another size than width / heads": "attention" in kinds
            and config.head_size * config.attention.heads != config.width,
            "a final LayerNorm": config.final_norm != "rmsnorm",
            f"router {config.moe.router}": "moe" in kinds and config.moe.router != "topk",
            "a router bias": "moe" in kinds and config.moe.router_bias,
            "gates that are normalized": "moe" in kinds and config.moe.normalize_gates,
            "experts of another width than the dense layers": {"mlp", "moe"} <= set(kinds)
            and config.moe.width != config.mlp.width,
        },
    )
    attention = _places(mixers, "attention", len(mixers))
    experts = _places(seconds, "moe", len(seconds))
    has_experts = "moe" in kinds
    return {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.moe.width if has_experts else config.mlp.width,
        "num_hidden_layers": len(mixers),
        **_attention_to_theirs(config),
        "rms_norm_eps": config.norm_eps,
        "attn_layer_period": attention[0],
        "attn_layer_offset": attention[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "num_experts": config.moe.experts if has_experts else 1,
        "num_experts_per_tok": config.moe.top_k if has_experts else 1,
        "mamba_d_state": config.mamba.state_size,
        "mamba_d_conv": config.mamba.conv_width,
        "mamba_expand": config.mamba.expansion,
        "mamba_dt_rank": config.dt_rank,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "hidden_act": "silu",
        "use_mamba_kernels": False,
        "router_aux_loss_coef": config.moe.load_balance_loss,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _hf_mixtral_to_ours(reader: Reader, _: str) -> ModelConfig:
    reader.must_be("hidden_act", "silu")
    parameters = reader.fields.get("rope_parameters") or {}
    if parameters.get("rope_type", "default") != "default" or reader.fields.get("rope_scaling"):
        raise ConfigError("config.json: scaled rotary positions (rope_scaling, rope_type) cannot be converted")
    base = Reader(parameters).number("rope_theta", reader.number("rope_theta", 1e6))
    window = reader.fields.get("sliding_window")
    return ModelConfig(
        layers=("attention", "moe"),
        repeats=reader.whole("num_hidden_layers"),
        vocab_size=reader.whole("vocab_size"),
        width=reader.whole("hidden_size"),
        attention=_attention_to_ours(
            reader, rotary_base=base, window=None if window is None else reader.whole("sliding_window")
        ),
        moe=MoeConfig(
            experts=reader.whole("num_local_experts", 8),
            width=reader.whole("intermediate_size"),
            router="topk",
            top_k=(top_k := reader.whole("num_experts_per_tok", 2)),
            router_bias=False,
            normalize_gates=top_k > 1,
            load_balance_loss=reader.number("router_aux_loss_coef", 0.001),
        ),
        norm_eps=reader.number("rms_norm_eps", 1e-5),
        final_norm="rmsnorm",
        tie_embeddings=bool(reader.fields.get("tie_word_embeddings", False)),
    )


def _hf_mixtral_to_theirs(config: ModelConfig) -> dict[str, Any]:
    _refuse(
        "hf-mixtral",
        {
            "layers other than attention and moe in turns": set(config.layers[::2]) != {"attention"}
            or set(config.layers[1::2]) != {"moe"},
            "attention without rotary positions": not config.attention.rotary,
            "a final LayerNorm": config.final_norm != "rmsnorm",
            f"router {config.moe.router}": config.moe.router != "topk",
            "a router bias": config.moe.router_bias,
            "gates that are not normalized": not config.moe.normalize_gates,
        },
    )
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.moe.width,
        "num_hidden_layers": config.depth // 2,
        **_attention_to_theirs(config),
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "num_local_experts": config.moe.experts,
        "num_experts_per_tok": config.moe.top_k,
        "hidden_act": "silu",
        "rope_theta": config.attention.rotary_base,
        "sliding_window": config.attention.window,
        "router_aux_loss_coef": config.moe.load_balance_loss,
        "tie_word_embeddings": config.tie_embeddings,
    }


_TO_OURS: dict[str, Callable[[Reader, str], ModelConfig]] = {
    "blackmamba": _blackmamba_to_ours,
    "mamba": _mamba_to_ours,
    "hf-mamba": _hf_mamba_to_ours,
    "hf-jamba": _hf_jamba_to_ours,
    "hf-mixtral": _hf_mixtral_to_ours,
}
_TO_THEIRS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "blackmamba": _blackmamba_to_theirs,
    "mamba": _mamba_to_theirs,
    "hf-mamba": _hf_mamba_to_theirs,
    "hf-jamba": _hf_jamba_to_theirs,
    "hf-mixtral": _hf_mixtral_to_theirs,
}
