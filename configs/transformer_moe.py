"""Transformer with 8 experts, top-2 as in Mixtral (arXiv 2401.04088), of BlackMamba 340M/1.5B's active size."""

from bm_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoeConfig, OptimizerConfig, RunConfig

config = Config(
    model=ModelConfig(
        layers=("attention", "moe"),
        repeats=23,
        vocab_size=50304,
        width=1024,
        attention=AttentionConfig(heads=16, kv_heads=4),
        moe=MoeConfig(
            experts=8,
            width=1632,
            router="topk",
            top_k=2,
            router_bias=False,
            normalize_gates=True,
            load_balance_loss=0.02,
        ),
        final_norm="rmsnorm",
    ),
    data=DataConfig(sequence_length=2048, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=500),
    run=RunConfig(directory="runs/transformer_moe", steps=20_000, checkpoint_every=1000, eval_every=1000),
)
