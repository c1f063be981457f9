"""A small Jamba with the published ratios: one block of 8 layers, width 1024, 16 experts top-2."""

import dataclasses

from bm_jax.config import AttentionConfig, MlpConfig
from configs.jamba_52b import config as large

config = dataclasses.replace(
    large,
    model=dataclasses.replace(
        large.model,
        repeats=1,
        width=1024,
        attention=AttentionConfig(heads=8, kv_heads=2, rotary=False),
        mlp=MlpConfig(width=3584),
        moe=dataclasses.replace(large.model.moe, width=3584),
    ),
    data=dataclasses.replace(large.data, sequence_length=2048, batch_size=8),
    optimizer=dataclasses.replace(large.optimizer, learning_rate=6e-4, warmup_steps=500),
    run=dataclasses.replace(large.run, directory="runs/jamba", remat="none"),
)
