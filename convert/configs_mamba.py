"""Configurations of the formats of Mamba layers: released BlackMamba, state-spaces Mamba, Hugging Face Mamba."""

from __future__ import annotations

from typing import Any

from bm_jax.config import Activation, ConfigError, MambaConfig, MlpConfig, ModelConfig, MoeConfig
from convert.config_reader import MOST_LAYERS, Reader, period, refuse, short

ACTIVATION = "expert_activation"
"""Field of a BlackMamba config.json that is ours: gated experts that the released code would compute otherwise."""
EXPERT_ACTIVATIONS: dict[str, Activation] = {
    "released": "geglu",
    "swiglu": "swiglu",
    "geglu": "geglu",
    "geglu_tanh": "geglu_tanh",
}
"""What `--expert-activation` may say of BlackMamba's experts: the released inference code gates with GELU in its erf form,
the paper says SwiGLU."""


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


def blackmamba_to_ours(reader: Reader, expert_activation: str) -> ModelConfig:
    """The model of a released BlackMamba config.json."""
    fields = reader.fields
    depth = reader.whole("num_layers", most=MOST_LAYERS)
    listed = fields.get("mamba_moe_layers") or ["r"] * depth
    if not isinstance(listed, list | str) or len(listed) != depth:
        raise ConfigError(
            f"config.json: mamba_moe_layers must have {depth} entries, one for each of num_layers, got {short(listed)}"
        )
    parsed = [_layer_string(text) for text in listed]
    experts = {count for _, count in parsed if count}
    if len(experts) > 1:
        raise ConfigError(f"config.json: mamba_moe_layers asks for layers of {sorted(experts)} experts; all must have as many")
    reader.must_be("add_bias_linear", False)
    reader.must_be("rms_norm", True)
    reader.must_be("layernorm_epsilon", 1e-5)  # the released code takes no other
    layers, repeats = period(tuple(kind for kind, _ in parsed))
    hidden = reader.whole("ffn_hidden_size", 1) if any(kind != "mamba" for kind, _ in parsed) else 1
    if expert_activation == "released":
        expert_activation = reader.get(ACTIVATION, "released")
    if expert_activation not in EXPERT_ACTIVATIONS:
        raise ConfigError(
            f"config.json: {ACTIVATION} must be one of {', '.join(EXPERT_ACTIVATIONS)}, got {short(expert_activation)}"
        )
    activation: Activation = EXPERT_ACTIVATIONS[expert_activation] if reader.flag("swiglu", False) else "gelu"
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
    )


def blackmamba_to_theirs(config: ModelConfig) -> dict[str, Any]:
    """A config.json as BlackMamba was released with."""
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
    refuse("blackmamba", problems)
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
    } | activation_field(config)


def activation_field(config: ModelConfig) -> dict[str, Any]:
    """What a BlackMamba config.json says of gated experts that are not as the released code computes them."""
    inner = config.moe if "moe" in config.kinds else config.mlp
    gated = inner.activation in ("swiglu", "geglu_tanh") and {"moe", "mlp"} & set(config.kinds)
    return {ACTIVATION: inner.activation} if gated else {}


def _dense_mamba(**options: Any) -> ModelConfig:
    return ModelConfig(layers=("mamba",), final_norm="rmsnorm", **options)


def mamba_to_ours(reader: Reader, _: str) -> ModelConfig:
    """The model of a state-spaces Mamba config.json."""
    fields = reader.fields
    details = reader.object("ssm_cfg")
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
        repeats=reader.whole("n_layer", most=MOST_LAYERS),
        vocab_size=-(-reader.whole("vocab_size") // multiple) * multiple,
        width=reader.whole("d_model"),
        mamba=MambaConfig(
            state_size=details.whole("d_state", 16),
            conv_width=details.whole("d_conv", 4),
            expansion=details.whole("expand", 2),
            dt_rank=None if rank == "auto" else details.whole("dt_rank"),
        ),
        tie_embeddings=reader.flag("tie_embeddings", True),
    )


def _only_mamba(format: str, config: ModelConfig) -> None:
    refuse(
        format,
        {
            "layers other than mamba": set(config.layers) != {"mamba"},
            "a final LayerNorm": config.final_norm != "rmsnorm",
            "norms inside the Mamba layers": config.mamba.inner_norms,
        },
    )


def mamba_to_theirs(config: ModelConfig) -> dict[str, Any]:
    """A config.json of state-spaces Mamba."""
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


def hf_mamba_to_ours(reader: Reader, _: str) -> ModelConfig:
    """The model of a Hugging Face Mamba config.json."""
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
        repeats=reader.whole("num_hidden_layers", most=MOST_LAYERS),
        vocab_size=reader.whole("vocab_size"),
        width=width,
        mamba=MambaConfig(
            state_size=reader.whole("state_size", 16),
            conv_width=reader.whole("conv_kernel", 4),
            expansion=expansion,
            dt_rank=None if rank == "auto" else reader.whole("time_step_rank"),
        ),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
    )


def hf_mamba_to_theirs(config: ModelConfig) -> dict[str, Any]:
    """A config.json of Hugging Face Mamba."""
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
