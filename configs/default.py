"""A small BlackMamba on the bundled Shakespeare: a few minutes on two CPU cores."""

from bm_jax.config import (
    Config,
    DataConfig,
    MambaConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    RunConfig,
)

config = Config(
    model=ModelConfig(
        layers=("mamba", "moe"),
        repeats=3,
        vocab_size=264,
        width=128,
        mamba=MambaConfig(state_size=8),
        moe=MoeConfig(experts=8, width=256),
        compute_dtype="float32",
        scan_unroll=3,
    ),
    data=DataConfig(sequence_length=128, batch_size=4),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=100),
    mesh=MeshConfig(data=1),  # too small to be worth splitting
    run=RunConfig(
        directory="runs/default",
        steps=2800,
        eval_every=700,
        eval_batches=128,
        checkpoint_every=700,
    ),
)
