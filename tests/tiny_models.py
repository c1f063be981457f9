"""Small models with random parameters, of every family, that read and write bytes; and a small tokenizer of words."""

from __future__ import annotations

import jax
import numpy as np
import tokenizers

from bm_jax.config import AttentionConfig, MambaConfig, MlpConfig, ModelConfig, MoeConfig
from bm_jax.data.bundled import shakespeare_texts
from bm_jax.data.tokenizer import ByteTokenizer
from bm_jax.language_model import LanguageModel
from bm_jax.model import init_parameters

BYTE = ByteTokenizer()
FAMILIES = [("mamba", "moe"), ("mamba",), ("attention", "mlp"), ("mamba+moe", "attention")]


def tiny_config(layers=("mamba", "moe"), **values) -> ModelConfig:
    defaults = {
        "width": 32,
        "repeats": 2,
        "vocab_size": 260,
        "mamba": MambaConfig(state_size=4),
        "attention": AttentionConfig(heads=4, kv_heads=2),
        "mlp": MlpConfig(width=48),
        "moe": MoeConfig(experts=4, width=24),
        "tie_embeddings": False,
        "compute_dtype": "float32",
    }
    return ModelConfig(layers=layers, **(defaults | values))


def random_parameters(config: ModelConfig):
    """Random float32 parameters, drawn by NumPy: compiling `init_parameters` would take most of the time."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        name = path[-1].key
        if name == "A_log":
            value = np.broadcast_to(np.log(np.arange(1, shape.shape[-1] + 1)), shape.shape)
        elif name == "dt_bias":
            value = rng.uniform(-5, -1, shape.shape)
        else:
            value = rng.normal(size=shape.shape) * (0.3 if path[0].key == "periods" else 0.5)
            value += name == "D" or name.endswith("norm")
        return np.asarray(value, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(lambda: init_parameters(config, jax.random.key(0))))


def tiny_model(config: ModelConfig, **values) -> LanguageModel:
    return LanguageModel(config, random_parameters(config), BYTE, **values)


def small_bpe(end: str = "<|endoftext|>", pre_tokenizer=None) -> tokenizers.Tokenizer:
    """A GPT-NeoX-like byte-level BPE of 400 ids, trained on a play; also with added tokens for runs of spaces."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[end, "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([shakespeare_texts()["train"]["macbeth.txt"][:6000]], trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("    ", normalized=True)])
    return tokenizer
