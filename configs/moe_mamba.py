"""MoE-Mamba 100M (arXiv 2401.04081): 16 pairs of Mamba and 42-expert switch MoE, 117M active of 2.4B without embeddings."""

from bm_jax.config import Config, DataConfig, ModelConfig, MoeConfig, OptimizerConfig, RunConfig

config = Config(
    model=ModelConfig(
        layers=("mamba", "moe"),
        repeats=16,
        vocab_size=50304,
        width=768,
        moe=MoeConfig(
            experts=42,
            width=2304,
            activation="gelu",
            router="switch",
            router_bias=False,
            capacity_factor=1.0,
            load_balance_loss=0.01,
        ),
        final_norm="rmsnorm",
    ),
    data=DataConfig(sequence_length=1024, batch_size=1024),
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=300, clip_norm=0.5),
    run=RunConfig(directory="runs/moe_mamba", steps=30_000, accumulation=64, checkpoint_every=1000, eval_every=1000),
)
