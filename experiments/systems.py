"""The systems that `experiments.learning` compares: about 27 M parameters of each are active for a token, embeddings apart.

Beside the five systems there are variants of BlackMamba: other numbers of experts, and other routers.
"""

from __future__ import annotations

import dataclasses

from bm_jax.config import AttentionConfig, MlpConfig, ModelConfig, MoeConfig
from bm_jax.model import count_parameters

WIDTH = 512
VOCABULARY = 50304
"""Of GPT-NeoX's tokenizer, padded as BlackMamba's models have it."""
EXPERT = 1408
"""Hidden width of an expert beside Mamba."""
MLP = 1536
"""Hidden width of an MLP, or of two experts, beside attention, whose layers are smaller than Mamba's."""


def _blackmamba(**moe: object) -> ModelConfig:
    values = MoeConfig(experts=8, width=EXPERT)
    return ModelConfig(
        layers=("mamba", "moe"),
        repeats=7,
        vocab_size=VOCABULARY,
        width=WIDTH,
        moe=dataclasses.replace(values, **moe),  # type: ignore[arg-type]
    )


SYSTEMS: dict[str, ModelConfig] = {
    "blackmamba": _blackmamba(),
    "mamba": ModelConfig(layers=("mamba",), repeats=16, vocab_size=VOCABULARY, width=WIDTH, final_norm="rmsnorm"),
    "transformer": ModelConfig(
        layers=("attention", "mlp"),
        repeats=8,
        vocab_size=VOCABULARY,
        width=WIDTH,
        attention=AttentionConfig(heads=8, kv_heads=8),
        mlp=MlpConfig(width=MLP),
        final_norm="rmsnorm",
    ),
    "transformer_moe": ModelConfig(
        layers=("attention", "moe"),
        repeats=8,
        vocab_size=VOCABULARY,
        width=WIDTH,
        attention=AttentionConfig(heads=8, kv_heads=8),
        moe=MoeConfig(
            experts=8,
            width=MLP // 2,
            router="topk",
            top_k=2,
            router_bias=False,
            normalize_gates=True,
            load_balance_loss=0.02,
        ),
        final_norm="rmsnorm",
    ),
    "moe_mamba": ModelConfig(
        layers=("mamba", "moe"),
        repeats=7,
        vocab_size=VOCABULARY,
        width=WIDTH,
        moe=MoeConfig(
            experts=8,
            width=EXPERT * 3 // 2,
            activation="gelu",
            router="switch",
            router_bias=False,
            capacity_factor=1.0,
            load_balance_loss=0.01,
        ),
        final_norm="rmsnorm",
    ),
}
"""As in their presets, smaller: routers, activations and capacity are those of the papers."""

VARIANTS: dict[str, ModelConfig] = {
    "blackmamba_4_experts": _blackmamba(experts=4),
    "blackmamba_16_experts": _blackmamba(experts=16),
    "blackmamba_32_experts": _blackmamba(experts=32),
    "blackmamba_switch": _blackmamba(router="switch", load_balance_loss=0.01),
    "blackmamba_unbalanced": _blackmamba(router="switch"),
}
"""BlackMamba with other numbers of experts, with the switch router and its loss, and with that router and no loss."""


def active_without_embeddings(model: ModelConfig) -> int:
    """Parameters that a token passes through between embedding and unembedding."""
    return count_parameters(model).active - model.vocab_size * model.width * (1 if model.tie_embeddings else 2)


def tiny(model: ModelConfig) -> ModelConfig:
    """A model alike in everything but size, for a CPU and tests."""
    return dataclasses.replace(
        model,
        repeats=2,
        vocab_size=264,
        width=32,
        compute_dtype="float32",
        attention=dataclasses.replace(model.attention, heads=2, kv_heads=2),
        mlp=dataclasses.replace(model.mlp, width=64),
        mamba=dataclasses.replace(model.mamba, state_size=4),
        moe=dataclasses.replace(model.moe, width=model.moe.width // 32),
    )
