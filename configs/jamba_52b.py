"""Jamba 52B (arXiv 2403.19887): 4 blocks of 8 layers, attention 1 in 8, 16 experts top-2 in every second MLP."""

from bm_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    MambaConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    RunConfig,
)

config = Config(
    model=ModelConfig(
        # Attention at layer 4 of each block of 8, experts in layers 1, 3, 5, 7.
        layers=(
            "mamba", "mlp", "mamba", "moe", "mamba", "mlp", "mamba", "moe",
            "attention", "mlp", "mamba", "moe", "mamba", "mlp", "mamba", "moe",
        ),
        repeats=4,
        vocab_size=65536,
        width=4096,
        mamba=MambaConfig(state_size=16, inner_norms=True),
        attention=AttentionConfig(heads=32, kv_heads=8, rotary=False),
        mlp=MlpConfig(width=14336),
        moe=MoeConfig(
            experts=16, width=14336, router="topk", top_k=2, router_bias=False, load_balance_loss=0.001
        ),
        norm_eps=1e-6,
        final_norm="rmsnorm",
        tie_embeddings=False,
    ),
    data=DataConfig(sequence_length=4096, batch_size=256),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1000),
    run=RunConfig(
        directory="runs/jamba_52b", steps=20_000, remat="full", checkpoint_every=1000, eval_every=1000
    ),
)  # fmt: skip
