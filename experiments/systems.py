"""The systems that `experiments.learning` compares, in several sizes: in each, all have about as many active parameters.

Beside the five systems there are variants of BlackMamba: other numbers of experts, and other routers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import configs
from bm_jax.config import ModelConfig
from bm_jax.model import count_parameters

Size = Literal["full", "small", "tiny"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What makes the systems of one size alike."""

    width: int
    pairs: int
    """Of Mamba and MoE."""
    mambas: int
    """Layers of dense Mamba."""
    blocks: int
    """Pairs of attention and MLP or MoE."""
    expert: int
    """Hidden width of an expert beside Mamba."""
    mlp: int
    """Hidden width of an MLP, or of two experts, beside attention, whose layers are smaller than Mamba's."""
    heads: int
    state: int = 16
    vocabulary: int = 264
    """Room for bytes if not given."""
    compute: str = "float32"
    held_out: int = 1
    """Tokens of held-out text that a validation reads, about."""


SHAPES: dict[Size, Shape] = {
    "full": Shape(512, 7, 16, 8, expert=1408, mlp=1536, heads=8, vocabulary=50_304, compute="bfloat16", held_out=500_000),
    "small": Shape(64, 2, 4, 2, expert=168, mlp=256, heads=2, held_out=130_000),
    "tiny": Shape(32, 2, 2, 2, expert=44, mlp=64, heads=2, state=4),
}
"""27 M active parameters without embeddings, 0.13 M, which read bytes, and those for tests, of no use."""


def _like(preset: str, shape: Shape, *, repeats: int, **moe: Any) -> ModelConfig:
    """A preset's model in another size, with other values of its `moe`."""
    model = configs.load(preset).model
    return dataclasses.replace(
        model,
        repeats=repeats,
        vocab_size=shape.vocabulary,
        width=shape.width,
        compute_dtype=shape.compute,
        attention=dataclasses.replace(model.attention, heads=shape.heads, kv_heads=shape.heads),
        mlp=dataclasses.replace(model.mlp, width=shape.mlp),
        mamba=dataclasses.replace(model.mamba, state_size=shape.state),
        moe=dataclasses.replace(model.moe, **moe),
    )


def _blackmamba(**moe: Any) -> Callable[[Shape], ModelConfig]:
    # Sharper than the preset's 0.5, with which small models' choices on text are less even (`experiments.router_balance`).
    sharp = {"sinkhorn_temperature": 0.0625, "sinkhorn_iterations": 64}

    def of(shape: Shape) -> ModelConfig:
        return _like("blackmamba_340m_1p5b", shape, repeats=shape.pairs, **{"width": shape.expert} | sharp | moe)

    return of


def _gelu_width(shape: Shape) -> int:
    """GELU has two matrices where GEGLU has three."""
    return shape.expert * 3 // 2


SYSTEMS: dict[str, Callable[[Shape], ModelConfig]] = {
    "blackmamba": _blackmamba(),
    "mamba": lambda shape: _like("mamba", shape, repeats=shape.mambas),
    "transformer": lambda shape: _like("transformer", shape, repeats=shape.blocks),
    "transformer_moe": lambda shape: _like("transformer_moe", shape, repeats=shape.blocks, width=shape.mlp // 2),
    "moe_mamba": lambda shape: _like("moe_mamba", shape, repeats=shape.pairs, experts=8, width=_gelu_width(shape)),
}
"""Their presets in a size: routers, activations and capacity are those of the papers, but for the temperature of Sinkhorn."""

VARIANTS: dict[str, Callable[[Shape], ModelConfig]] = {
    "blackmamba_4_experts": _blackmamba(experts=4),
    "blackmamba_16_experts": _blackmamba(experts=16),
    "blackmamba_32_experts": _blackmamba(experts=32),
    "blackmamba_switch": _blackmamba(router="switch", load_balance_loss=0.01),
    "blackmamba_unbalanced": _blackmamba(router="switch"),
    "blackmamba_1_expert": _blackmamba(experts=1),
    "blackmamba_temperature_half": _blackmamba(sinkhorn_temperature=0.5, sinkhorn_iterations=8),
    "blackmamba_gelu": lambda shape: _blackmamba(activation="gelu", width=_gelu_width(shape))(shape),
}
"""BlackMamba with other numbers of experts, one for a dense MLP among them, with the switch router and its loss, with that
router and no loss, with the preset's temperature, and with MoE-Mamba's experts."""


def model_of(system: str, size: Size) -> ModelConfig:
    """A system or variant in one size.

    Raises:
        KeyError: there is none of that name.
    """
    return (SYSTEMS | VARIANTS)[system](SHAPES[size])


def active_without_embeddings(model: ModelConfig) -> int:
    """Parameters that a token passes through between embedding and unembedding."""
    return count_parameters(model).active - model.vocab_size * model.width * (1 if model.tie_embeddings else 2)
