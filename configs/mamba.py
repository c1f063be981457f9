"""Dense Mamba with as many parameters as BlackMamba 340M/1.5B has active: 44 layers, width 1024."""

from bm_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

config = Config(
    model=ModelConfig(layers=("mamba",), repeats=44, vocab_size=50304, width=1024, final_norm="rmsnorm"),
    data=DataConfig(sequence_length=2048, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
    run=RunConfig(directory="runs/mamba", steps=20_000, checkpoint_every=1000, eval_every=1000),
)
