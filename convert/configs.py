"""Configurations of the checkpoint formats, to ours and back.

What our models do not have (biases of the projections, other gates), or a format does not, is refused by name rather than
dropped: what is written is read again and must be the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bm_jax.config import ConfigError, ModelConfig
from convert.config_reader import Fields, Reader, short
from convert.configs_attention import hf_jamba_to_ours, hf_jamba_to_theirs, hf_mixtral_to_ours, hf_mixtral_to_theirs
from convert.configs_mamba import (
    EXPERT_ACTIVATIONS,
    blackmamba_to_ours,
    blackmamba_to_theirs,
    hf_mamba_to_ours,
    hf_mamba_to_theirs,
    mamba_to_ours,
    mamba_to_theirs,
)

COMPUTED = {
    "mamba": "state_size conv_width expansion inner_norms",
    "attention": "heads kv_heads rotary window",
    "mlp": "width activation",
    "moe": "experts width activation router top_k router_bias normalize_gates",
}
"""Fields of a layer's configuration that change what it computes."""
_TO_OURS: dict[str, Callable[[Reader, str], ModelConfig]] = {
    "blackmamba": blackmamba_to_ours,
    "mamba": mamba_to_ours,
    "hf-mamba": hf_mamba_to_ours,
    "hf-jamba": hf_jamba_to_ours,
    "hf-mixtral": hf_mixtral_to_ours,
}
_TO_THEIRS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "blackmamba": blackmamba_to_theirs,
    "mamba": mamba_to_theirs,
    "hf-mamba": hf_mamba_to_theirs,
    "hf-jamba": hf_jamba_to_theirs,
    "hf-mixtral": hf_mixtral_to_theirs,
}


def recognize(fields: Fields) -> str:
    """Name of the format that a config.json is of.

    Raises:
        ConfigError: of none.
    """
    kind = fields.get("model_type")
    if kind in ("mamba", "jamba", "mixtral"):
        return f"hf-{kind}"
    if kind is None and "mamba_moe_layers" in fields:
        return "blackmamba"
    if kind is None and {"d_model", "n_layer"} <= set(fields):
        return "mamba"
    raise ConfigError(
        f"config.json is of no known format: model_type is {short(kind)}, and there is neither mamba_moe_layers (BlackMamba) "
        "nor d_model and n_layer (state-spaces Mamba). Known: blackmamba, mamba, hf-mamba, hf-jamba, hf-mixtral"
    )


def to_ours(format: str, fields: Fields, expert_activation: str = "released") -> ModelConfig:
    """The model of a config.json.

    Raises:
        ConfigError: something is missing, contradictory or beyond what our models express; the message names the field.
    """
    if expert_activation not in EXPERT_ACTIVATIONS:
        raise ConfigError(f"expert_activation must be one of {', '.join(EXPERT_ACTIVATIONS)}, got {expert_activation!r}")
    try:
        return _TO_OURS[format](Reader(fields), expert_activation)
    except ConfigError as error:
        raise ConfigError(str(error) if "config.json" in str(error) else f"config.json: {error}") from None


def to_theirs(format: str, config: ModelConfig) -> dict[str, Any]:
    """A config.json for a model that was not imported from this format.

    Raises:
        ConfigError: the format cannot express the model.
    """
    fields = _TO_THEIRS[format](config)
    other = differences(config, to_ours(format, fields))
    if other:
        raise ConfigError(f"{format} cannot express this model: {'; '.join(other)} there")
    return fields


def differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """In what two models compute differently, as 'name is this, that'; what only training or speed depend on is left out."""
    a, b = _computed(config), _computed(other)
    return [f"{name} is {a.get(name)}, {b.get(name)}" for name in a | b if a.get(name) != b.get(name)]


def _computed(config: ModelConfig) -> dict[str, Any]:
    parts: dict[str, Any] = {
        kind: {name: getattr(getattr(config, kind), name) for name in names.split()} for kind, names in COMPUTED.items()
    }
    parts["mamba"]["dt_rank"], parts["attention"]["head_size"] = config.dt_rank, config.head_size
    if config.attention.rotary:
        parts["attention"]["rotary_base"] = config.attention.rotary_base
    ends = ("vocab_size", "width", "norm_eps", "final_norm", "tie_embeddings")
    computed = {name: getattr(config, name) for name in ends} | {"layers": config.layers * config.repeats}
    for kind in set(config.kinds):
        computed |= {f"{kind}.{name}": value for name, value in parts[kind].items()}
    return computed
