"""The systems that `experiments.learning` compares: about 27 M parameters of each are active for a token, embeddings apart.

Beside the five systems there are variants of BlackMamba: other numbers of experts, and other routers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import configs
from bm_jax.config import ModelConfig
from bm_jax.model import count_parameters

WIDTH = 512
EXPERT = 1408
"""Hidden width of an expert beside Mamba."""
MLP = 1536
"""Hidden width of an MLP, or of two experts, beside attention, whose layers are smaller than Mamba's."""


def _smaller(preset: str, *, repeats: int, **moe: Any) -> ModelConfig:
    """A preset's model of width `WIDTH` and another depth, with other values of its `moe`."""
    model = configs.load(preset).model
    return dataclasses.replace(
        model,
        repeats=repeats,
        width=WIDTH,
        attention=dataclasses.replace(model.attention, heads=8, kv_heads=8),
        mlp=dataclasses.replace(model.mlp, width=MLP),
        moe=dataclasses.replace(model.moe, **moe),
    )


def _blackmamba(**moe: Any) -> ModelConfig:
    # Sharper than the preset's 0.5, with which choices on text are not as even (`experiments.router_balance`).
    defaults = {"width": EXPERT, "sinkhorn_temperature": 0.0625, "sinkhorn_iterations": 64}
    return _smaller("blackmamba_340m_1p5b", repeats=7, **defaults | moe)


SYSTEMS: dict[str, ModelConfig] = {
    "blackmamba": _blackmamba(),
    "mamba": _smaller("mamba", repeats=16),
    "transformer": _smaller("transformer", repeats=8),
    "transformer_moe": _smaller("transformer_moe", repeats=8, width=MLP // 2),
    "moe_mamba": _smaller("moe_mamba", repeats=7, experts=8, width=EXPERT * 3 // 2),
}
"""Their presets, smaller: routers, activations and capacity are those of the papers, but for the temperature of Sinkhorn."""

VARIANTS: dict[str, ModelConfig] = {
    "blackmamba_4_experts": _blackmamba(experts=4),
    "blackmamba_16_experts": _blackmamba(experts=16),
    "blackmamba_32_experts": _blackmamba(experts=32),
    "blackmamba_switch": _blackmamba(router="switch", load_balance_loss=0.01),
    "blackmamba_unbalanced": _blackmamba(router="switch"),
    "blackmamba_1_expert": _blackmamba(experts=1),
    "blackmamba_temperature_half": _blackmamba(sinkhorn_temperature=0.5, sinkhorn_iterations=8),
    "blackmamba_gelu": _blackmamba(activation="gelu", width=EXPERT * 3 // 2),
}
"""BlackMamba with other numbers of experts, one for a dense MLP among them, with the switch router and its loss, with that
router and no loss, with the preset's temperature, and with MoE-Mamba's experts."""


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
