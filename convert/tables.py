"""What the tensors of each checkpoint format are here: one two-way table a format, data and no code.

A row names a tensor, the leaf of our parameters that it is, and an einops pattern from theirs to ours. The right side of a
pattern is the shape of our leaf, one name an axis, so that the sizes of every axis, and with them the shape that the tensor
must have, follow from the model's configuration; read from right to left it is the way back. A tensor that is one expert of
a leaf, or one half of it, says which by `at`. Adding a format is adding a table here and its configuration in
`convert.configs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

EXPERT = "expert"
"""In `at`: the expert that the tensor's name holds."""
ALL = slice(None)


class Row(NamedTuple):
    """One tensor, or one for each layer or expert."""

    name: str
    """With `{layer}`, and `{expert}` where there is one for each; `{mixer}` and `{norm}` in formats with parallel pairs."""
    leaf: str
    """Name in our branch, or at the ends of the model."""
    pattern: str
    """einops, theirs -> ours."""
    at: tuple = ()
    """Where in the leaf: an index a leading axis; nothing for all of it."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A checkpoint format."""

    name: str
    title: str
    ends: tuple[Row, ...]
    """Embedding, final norm, unembedding."""
    layouts: Mapping[str, Mapping[str, tuple[Row, ...]]]
    """Rows of each kind of layer, in each of the layouts that the format is stored in; the first is written by default. A
    layout with other ends of the model has them as "ends"."""
    layers_per_block: int = 1
    """How many of our layers are one of theirs."""
    pickled: bool = False
    """Whether it is written as pytorch_model.bin and not as model.safetensors."""
    wrapper: str | None = None
    """Key of the pickled file under which the tensors are."""


def _mamba(prefix: str) -> tuple[Row, ...]:
    return (
        Row(f"{prefix}.in_proj.weight", "in_proj", "(two e) m -> m two e"),
        Row(f"{prefix}.conv1d.weight", "conv_weight", "e 1 k -> k e"),
        Row(f"{prefix}.conv1d.bias", "conv_bias", "e -> e"),
        Row(f"{prefix}.x_proj.weight", "x_proj", "r e -> e r"),
        Row(f"{prefix}.dt_proj.weight", "dt_proj", "e r -> r e"),
        Row(f"{prefix}.dt_proj.bias", "dt_bias", "e -> e"),
        Row(f"{prefix}.A_log", "A_log", "e n -> e n"),
        Row(f"{prefix}.D", "D", "e -> e"),
        Row(f"{prefix}.out_proj.weight", "out_proj", "m e -> e m"),
    )


def _attention(prefix: str) -> tuple[Row, ...]:
    return (
        Row(f"{prefix}.q_proj.weight", "query", "(h d) m -> m h d"),
        Row(f"{prefix}.k_proj.weight", "key", "(h d) m -> m h d"),
        Row(f"{prefix}.v_proj.weight", "value", "(h d) m -> m h d"),
        Row(f"{prefix}.o_proj.weight", "out", "m (h d) -> h d m"),
    )


def _norm(name: str) -> tuple[Row, ...]:
    return (Row(f"{name}.weight", "norm", "m -> m"),)


def _expert(prefix: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    return (
        Row(f"{prefix}.{gate}.weight", "w_in", "f m -> m f", (EXPERT, ALL, 0)),
        Row(f"{prefix}.{up}.weight", "w_in", "f m -> m f", (EXPERT, ALL, 1)),
        Row(f"{prefix}.{down}.weight", "w_out", "m f -> f m", (EXPERT,)),
    )


def _fused_experts(prefix: str) -> tuple[Row, ...]:
    return (
        Row(f"{prefix}.gate_up_proj", "w_in", "x (two f) m -> x m two f"),
        Row(f"{prefix}.down_proj", "w_out", "x m f -> x f m"),
    )


def _router(prefix: str) -> tuple[Row, ...]:
    return (Row(f"{prefix}.weight", "router", "x m -> m x"),)


def _ends(embedding: str, final_norm: str) -> tuple[Row, ...]:
    return (
        Row(f"{embedding}.weight", "embedding", "v m -> v m"),
        Row(f"{final_norm}.weight", "final_norm", "m -> m"),
        Row("lm_head.weight", "unembedding", "v m -> m v"),
    )


_LAYER = "decoder.layers.{layer}."
BLACKMAMBA = Format(
    "blackmamba",
    "released BlackMamba",
    ends=(
        Row("embedding.word_embeddings.weight", "embedding", "v m -> v m"),
        Row("decoder.final_layernorm.weight", "final_norm", "m -> m"),
        Row("decoder.final_layernorm.bias", "final_norm_bias", "m -> m"),
    ),
    layouts={
        "experts apart": {
            "mamba": _norm(_LAYER + "{norm}") + _mamba(_LAYER + "{mixer}"),
            "mlp": (
                *_norm(_LAYER + "{norm}"),
                Row(_LAYER + "{mixer}.linear_fc1.weight", "w_in", "(two f) m -> m two f"),
                Row(_LAYER + "{mixer}.linear_fc2.weight", "w_out", "m f -> f m"),
            ),
            "moe": (
                *_norm(_LAYER + "{norm}"),
                *_router(_LAYER + "{mixer}.router"),
                Row(_LAYER + "{mixer}.router.bias", "router_bias", "x -> x"),
                Row(_LAYER + "{mixer}.local_experts.{expert}.linear_fc1.weight", "w_in", "(two f) m -> m two f", (EXPERT,)),
                Row(_LAYER + "{mixer}.local_experts.{expert}.linear_fc2.weight", "w_out", "m f -> f m", (EXPERT,)),
            ),
        }
    },
    pickled=True,
    wrapper="model",
)

_MAMBA_LAYERS = {"mamba": _norm("backbone.layers.{layer}.norm") + _mamba("backbone.layers.{layer}.mixer")}
MAMBA = Format(
    "mamba",
    "state-spaces Mamba",
    ends=_ends("backbone.embedding", "backbone.norm_f"),
    layouts={"plain": _MAMBA_LAYERS},
    pickled=True,
)
HF_MAMBA = Format(
    "hf-mamba",
    "Hugging Face Mamba",
    ends=_ends("backbone.embeddings", "backbone.norm_f"),
    layouts={
        "plain": _MAMBA_LAYERS,
        "older name of the embedding": _MAMBA_LAYERS | {"ends": _ends("backbone.embedding", "backbone.norm_f")},
    },
)

_LAYER = "model.layers.{layer}."
_JAMBA_LAYERS = {
    "mamba": (
        *_norm(_LAYER + "input_layernorm"),
        *_mamba(_LAYER + "mamba"),
        Row(_LAYER + "mamba.dt_layernorm.weight", "dt_norm", "r -> r"),
        Row(_LAYER + "mamba.b_layernorm.weight", "B_norm", "n -> n"),
        Row(_LAYER + "mamba.c_layernorm.weight", "C_norm", "n -> n"),
    ),
    "attention": _norm(_LAYER + "input_layernorm") + _attention(_LAYER + "self_attn"),
    "mlp": (
        *_norm(_LAYER + "pre_ff_layernorm"),
        Row(_LAYER + "feed_forward.gate_proj.weight", "w_in", "f m -> m f", (ALL, 0)),
        Row(_LAYER + "feed_forward.up_proj.weight", "w_in", "f m -> m f", (ALL, 1)),
        Row(_LAYER + "feed_forward.down_proj.weight", "w_out", "m f -> f m"),
    ),
}
_JAMBA_ROUTER = _norm(_LAYER + "pre_ff_layernorm") + _router(_LAYER + "feed_forward.router")
HF_JAMBA = Format(
    "hf-jamba",
    "Hugging Face Jamba",
    ends=_ends("model.embed_tokens", "model.final_layernorm"),
    layouts={
        "experts apart": _JAMBA_LAYERS
        | {"moe": _JAMBA_ROUTER + _expert(_LAYER + "feed_forward.experts.{expert}", "gate_proj", "up_proj", "down_proj")},
        "experts fused": _JAMBA_LAYERS | {"moe": _JAMBA_ROUTER + _fused_experts(_LAYER + "feed_forward.experts")},
    },
    layers_per_block=2,
)

_MIXTRAL_ATTENTION = _norm(_LAYER + "input_layernorm") + _attention(_LAYER + "self_attn")
_MIXTRAL_NORM = _norm(_LAYER + "post_attention_layernorm")
HF_MIXTRAL = Format(
    "hf-mixtral",
    "Hugging Face Mixtral",
    ends=_ends("model.embed_tokens", "model.norm"),
    layouts={
        "experts apart": {
            "attention": _MIXTRAL_ATTENTION,
            "moe": _MIXTRAL_NORM
            + _router(_LAYER + "block_sparse_moe.gate")
            + _expert(_LAYER + "block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
        },
        "experts fused": {
            "attention": _MIXTRAL_ATTENTION,
            "moe": _MIXTRAL_NORM + _router(_LAYER + "mlp.gate") + _fused_experts(_LAYER + "mlp.experts"),
        },
    },
    layers_per_block=2,
)

FORMATS = {format.name: format for format in (BLACKMAMBA, MAMBA, HF_MAMBA, HF_JAMBA, HF_MIXTRAL)}
