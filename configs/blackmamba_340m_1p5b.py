"""BlackMamba 340M/1.5B (arXiv 2402.01771): 15 pairs of Mamba and 8-expert Sinkhorn MoE, width 1152."""

from bm_jax.config import Config, DataConfig, ModelConfig, MoeConfig, OptimizerConfig, RunConfig

# Architecture as released. Learning rate, schedule and batch size were not published: these are starting points.
config = Config(
    model=ModelConfig(layers=("mamba", "moe"), repeats=15, vocab_size=50304, width=1152, moe=MoeConfig(experts=8, width=3072)),
    data=DataConfig(sequence_length=2048, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
    run=RunConfig(directory="runs/blackmamba_340m_1p5b", steps=20_000, remat="dots", checkpoint_every=1000, eval_every=1000),
)
