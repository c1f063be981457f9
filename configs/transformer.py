"""Dense Transformer (RMSNorm, rotary, SwiGLU) of BlackMamba 340M/1.5B's active size: 23 layers, width 1024."""

from bm_jax.config import AttentionConfig, Config, DataConfig, MlpConfig, ModelConfig, OptimizerConfig, RunConfig

config = Config(
    model=ModelConfig(
        layers=("attention", "mlp"),
        repeats=23,
        vocab_size=50304,
        width=1024,
        attention=AttentionConfig(heads=16, kv_heads=16),
        mlp=MlpConfig(width=2752),
        final_norm="rmsnorm",
    ),
    data=DataConfig(sequence_length=2048, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=500),
    run=RunConfig(directory="runs/transformer", steps=20_000, checkpoint_every=1000, eval_every=1000),
)
