"""Configurations of the formats with attention layers: Hugging Face Jamba and Mixtral."""

from __future__ import annotations

from typing import Any

from bm_jax.config import AttentionConfig, ConfigError, MambaConfig, MlpConfig, ModelConfig, MoeConfig
from convert.config_reader import MOST_LAYERS, Reader, period, refuse


def _attention_to_ours(reader: Reader, **options: Any) -> AttentionConfig:
    heads = reader.whole("num_attention_heads")
    head_size = reader.fields.get("head_dim")
    return AttentionConfig(
        heads=heads,
        kv_heads=reader.whole("num_key_value_heads", heads if "num_key_value_heads" in reader.fields else 8),
        head_size=None if head_size is None else reader.whole("head_dim"),
        **options,
    )


def _attention_to_theirs(config: ModelConfig) -> dict[str, Any]:
    return {"num_attention_heads": config.attention.heads, "num_key_value_heads": config.attention.kv_heads}


def hf_jamba_to_ours(reader: Reader, _: str) -> ModelConfig:
    """The model of a Hugging Face Jamba config.json."""
    reader.must_be("mamba_proj_bias", False)
    reader.must_be("mamba_conv_bias", True)
    reader.must_be("hidden_act", "silu")
    reader.must_be("mamba_inner_layernorms", True)
    reader.must_be("sliding_window", None)
    depth, experts = reader.whole("num_hidden_layers", most=MOST_LAYERS), reader.whole("num_experts", 16)
    every = {name: reader.whole(f"{name}_layer_period", default) for name, default in (("attn", 8), ("expert", 2))}
    first = {
        name: reader.whole(f"{name}_layer_offset", default, least=0, most=every[name] - 1)
        for name, default in (("attn", 4), ("expert", 1))
    }
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
            top_k=reader.whole("num_experts_per_tok", 2) if "moe" in kinds else 1,
            router_bias=False,
            load_balance_loss=reader.number("router_aux_loss_coef", 0.001),
        ),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        final_norm="rmsnorm",
        tie_embeddings=reader.flag("tie_word_embeddings", False),
    )


def _places(kinds: tuple[str, ...], kind: str, blocks: int) -> tuple[int, int]:
    """Period and offset of the blocks of a kind; a period past the end where there are none."""
    at = [number for number, found in enumerate(kinds) if found == kind]
    if not at:
        return blocks + 1, blocks
    every = at[1] - at[0] if len(at) > 1 else blocks
    if at != [number for number in range(blocks) if number % every == at[0]]:
        raise ConfigError(f"hf-jamba cannot express this model: its {kind} layers are not evenly spaced")
    return every, at[0]


def hf_jamba_to_theirs(config: ModelConfig) -> dict[str, Any]:
    """A config.json of Hugging Face Jamba."""
    kinds = config.layers * config.repeats
    mixers, seconds = kinds[::2], kinds[1::2]
    refuse(
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


def hf_mixtral_to_ours(reader: Reader, _: str) -> ModelConfig:
    """The model of a Hugging Face Mixtral config.json."""
    reader.must_be("hidden_act", "silu")
    parameters = reader.object("rope_parameters")
    if parameters.get("rope_type", "default") != "default" or reader.fields.get("rope_scaling"):
        raise ConfigError("config.json: scaled rotary positions (rope_scaling, rope_type) cannot be converted")
    for place in (reader, parameters):
        place.must_be("partial_rotary_factor", 1.0)
    top_k = reader.whole("num_experts_per_tok", 2)
    if top_k == 1:
        raise ConfigError("config.json: num_experts_per_tok is 1: such a model's gates are all 1, which cannot be converted")
    base = parameters.number("rope_theta", reader.number("rope_theta", 1e6))
    window = reader.fields.get("sliding_window")
    return ModelConfig(
        layers=("attention", "moe"),
        repeats=reader.whole("num_hidden_layers", most=MOST_LAYERS),
        vocab_size=reader.whole("vocab_size"),
        width=reader.whole("hidden_size"),
        attention=_attention_to_ours(
            reader, rotary_base=base, window=None if window is None else reader.whole("sliding_window")
        ),
        moe=MoeConfig(
            experts=reader.whole("num_local_experts", 8),
            width=reader.whole("intermediate_size"),
            router="topk",
            top_k=top_k,
            router_bias=False,
            normalize_gates=True,
            load_balance_loss=reader.number("router_aux_loss_coef", 0.001),
        ),
        norm_eps=reader.number("rms_norm_eps", 1e-5),
        final_norm="rmsnorm",
        tie_embeddings=reader.flag("tie_word_embeddings", False),
    )


def hf_mixtral_to_theirs(config: ModelConfig) -> dict[str, Any]:
    """A config.json of Hugging Face Mixtral."""
    refuse(
        "hf-mixtral",
        {
            "layers other than attention and moe in turns": config.layers * config.repeats
            != ("attention", "moe") * (config.depth // 2),
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
