"""A run that changes its mesh whenever it is started again, against one on a single device; `check_*` run with eight.

The model computes in float64, so that its losses tell a mistake from rounding. Parameters and optimizer stay float32.
Routing is an argmax: two experts within rounding of each other may change places between meshes. With float64 and this
seed none do; in float32 or bfloat16 some would, and the losses would agree to about 1e-4 only (`tests/test_train.py`).
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import in_eight_devices

from bm_jax.checkpoint import Checkpoints
from bm_jax.config import Config, DataConfig, MambaConfig, MeshConfig, ModelConfig, MoeConfig, OptimizerConfig, RunConfig
from bm_jax.data.pipeline import open_data
from bm_jax.language_model import LanguageModel
from bm_jax.metrics import read_metrics
from bm_jax.sharding import make_mesh, parameter_shardings
from bm_jax.train import Run, fit

BLACKMAMBA = Config(
    model=ModelConfig(
        layers=("mamba", "moe"),
        repeats=2,
        vocab_size=264,
        width=32,
        mamba=MambaConfig(state_size=4),
        moe=MoeConfig(experts=8, width=16),
        compute_dtype="float64",
        residual_dtype="float64",
    ),
    data=DataConfig(sequence_length=24, batch_size=8),
    # The same rates for any number of steps, and gradients that are never scaled by their norm, which is rounded to float32.
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, schedule="constant", clip_norm=1e9),
    run=RunConfig(report_every=1, eval_every=100, eval_batches=1, checkpoint_every=100, keep_last=9, sample_tokens=0),
)
ONE, EIGHT, TWO_BY_FOUR = MeshConfig(data=1), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, expert=4)
OTHER = MeshConfig(data=1, fsdp=2, tensor=4)
PROMPT = list(range(65, 85))


def on(mesh, directory, steps=1):
    return dataclasses.replace(
        BLACKMAMBA, mesh=mesh, run=dataclasses.replace(BLACKMAMBA.run, directory=str(directory), steps=steps)
    )


def branch(source, target, step):
    """A run that stopped at `step` of another one."""
    target.mkdir()
    shutil.copytree(source / "checkpoints" / str(step), target / "checkpoints" / str(step))
    return target


def losses(directory, *steps):
    """Training and inference loss of each step, before its update `[steps, 2]`."""
    return np.array([[row["objective"], row["loss"]] for row in read_metrics(directory) if row["step"] in steps])


def restore(directory, step, mesh_config):
    """The state as a run on this mesh starts from it, each array laid out as the mesh wants it, then its bytes."""
    config, mesh = on(mesh_config, directory), make_mesh(mesh_config)
    with jax.set_mesh(mesh), Checkpoints(directory / "checkpoints", keep_last=9) as checkpoints:
        run = Run(config, open_data(config.data, config.model.vocab_size), mesh)
        restored = checkpoints.restore(run.abstract, step)
    assert restored is not None
    leaves = jax.tree.leaves(restored.state)
    for leaf, wanted in zip(leaves, jax.tree.leaves(run.abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    keys = [jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf for leaf in leaves]
    return [np.asarray(leaf).tobytes() for leaf in keys]


def check_journey(directory):
    """Two steps on one device, two on eight, two on two times four, two on one: each a new start of the same run."""
    directory = Path(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory / "cache"))  # a mesh's programs are compiled once
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with jax.enable_x64(True):
        journey, whole = directory / "journey", directory / "whole"
        for steps, mesh in ((2, ONE), (4, EIGHT), (6, TWO_BY_FOUR), (8, ONE)):
            fit(on(mesh, journey, steps))
        fit(on(ONE, whole, 8))

        # What was saved is what is restored, on every mesh.
        for step in (2, 4, 6, 8):
            state = restore(journey, step, ONE)
            assert all(restore(journey, step, mesh) == state for mesh in (EIGHT, TWO_BY_FOUR, OTHER)), step

        # On one mesh, stopping changes nothing.
        stopped = branch(journey, directory / "stopped", 2)
        fit(on(EIGHT, stopped, 3))
        fit(on(EIGHT, stopped, 4))
        np.testing.assert_array_equal(losses(stopped, 3, 4), losses(journey, 3, 4))
        assert restore(stopped, 4, EIGHT) == restore(journey, 4, EIGHT)

        # From the same state, another mesh has the same loss: float64 sums of some thousand terms in another order.
        np.testing.assert_allclose(losses(journey, 3), losses(whole, 3), rtol=1e-12)
        for step, mesh in ((4, ONE), (6, TWO_BY_FOUR)):  # the journey goes on to 2x4, and to one
            other = branch(journey, directory / f"from_{step}", step)
            fit(on(mesh, other, step + 1))
            np.testing.assert_allclose(losses(other, step + 1), losses(journey, step + 1), rtol=1e-12)

        # Over all steps: each mesh's program rounds the update of a float32 parameter in its own way, by its last bit
        # (6e-8 of it), in no common direction. 2e-9 was seen; steps change the loss by 1e-2.
        np.testing.assert_allclose(losses(journey, *range(1, 9)), losses(whole, *range(1, 9)), rtol=1e-8)
        assert len(losses(journey, *range(1, 9))) == 8

        # The finished model, loaded into the shards of a mesh, says what it says on one device.
        alone = LanguageModel.load(journey)
        mesh = make_mesh(OTHER)
        with jax.set_mesh(mesh):
            model = LanguageModel.load(journey)
            for leaf, sharding in zip(
                jax.tree.leaves(model.parameters), jax.tree.leaves(parameter_shardings(model.parameters, mesh)), strict=True
            ):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            # Logits are rounded to float32 at the end, the largest of them 1.
            np.testing.assert_allclose(model.logits(PROMPT), alone.logits(PROMPT), rtol=0, atol=1e-6)
            greedy = model.generate([PROMPT], max_tokens=8, temperature=0)[0]
        assert greedy.tokens == alone.generate([PROMPT], max_tokens=8, temperature=0)[0].tokens


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_to_eight_to_two_by_four_to_one(run_with_devices, tmp_path):
    in_eight_devices(run_with_devices, "test_elastic", f"check_journey({str(tmp_path)!r})")
