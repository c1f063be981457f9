"""BlackMamba in JAX: state-space models with mixture-of-experts, to train, load, and generate with.

    import bm_jax
    model = bm_jax.LanguageModel.load("runs/default")
    print(model.generate("JULIET.\n", max_tokens=100)[0].text)

Names are imported when they are first used, so that the data tools start without jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bm_jax.cache import Cache, init_cache
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
    )
    from bm_jax.language_model import LanguageModel
    from bm_jax.model import count_parameters, forward, init_parameters, logits
    from bm_jax.train import fit

_HOME = {
    "Cache": "cache",
    "init_cache": "cache",
    "AttentionConfig": "config",
    "Config": "config",
    "ConfigError": "config",
    "DataConfig": "config",
    "MambaConfig": "config",
    "MeshConfig": "config",
    "MlpConfig": "config",
    "ModelConfig": "config",
    "MoeConfig": "config",
    "OptimizerConfig": "config",
    "RunConfig": "config",
    "LanguageModel": "language_model",
    "count_parameters": "model",
    "forward": "model",
    "init_parameters": "model",
    "logits": "model",
    "fit": "train",
}

__all__ = [
    "AttentionConfig",
    "Cache",
    "Config",
    "ConfigError",
    "DataConfig",
    "LanguageModel",
    "MambaConfig",
    "MeshConfig",
    "MlpConfig",
    "ModelConfig",
    "MoeConfig",
    "OptimizerConfig",
    "RunConfig",
    "count_parameters",
    "fit",
    "forward",
    "init_cache",
    "init_parameters",
    "logits",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"bm_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
