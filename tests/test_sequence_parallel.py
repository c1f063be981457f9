"""Models whose sequences the mesh splits, against the same models on one device; `check_*` run in a process with eight."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import assert_close, in_eight_devices, random_parameters

from bm_jax.cache import init_cache
from bm_jax.config import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    MambaConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    RunConfig,
)
from bm_jax.loss import next_token_loss
from bm_jax.metrics import read_metrics
from bm_jax.model import forward, init_parameters, logits
from bm_jax.sequence_parallel import splits
from bm_jax.sharding import batch_sharding, make_mesh, parameter_shardings
from bm_jax.train import fit

SMALL = ModelConfig(
    layers=("mamba", "moe"),
    repeats=2,
    vocab_size=32,
    width=16,
    mamba=MambaConfig(state_size=4),
    attention=AttentionConfig(heads=4, kv_heads=2, head_size=4),
    moe=MoeConfig(experts=4, width=8),
    compute_dtype="float64",
    residual_dtype="float64",
)
MAMBA = dataclasses.replace(SMALL, layers=("mamba",), mamba=MambaConfig(state_size=4, inner_norms=True))
MAMBA32 = dataclasses.replace(MAMBA, compute_dtype="float32", residual_dtype="float32")
MODELS = {
    "mamba": (MAMBA, ({"sequence": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2})),
    "blackmamba": (SMALL, ({"sequence": 8}, {"data": 2, "sequence": 4})),
}


def batch_of(rows, length):
    """Tokens and documents: two documents, the border inside a shard or at one, or padding before a document."""
    r = np.random.default_rng(1)
    ids = [[1] * (length // 3) + [2] * (length - length // 3), [0] * 3 + [1] * (length // 2 - 3) + [2] * (length - length // 2)]
    ids = jnp.asarray(np.resize(ids, (rows, length)), jnp.int32)
    return {"tokens": jnp.asarray(r.integers(1, 32, size=(rows, length)), jnp.int32), "segment_ids": ids}


def on_mesh(sizes, config, parameters):
    mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)))
    return mesh, jax.device_put(parameters, parameter_shardings(parameters, mesh))


def check_loss(name):
    """Loss, as trained, and every gradient."""
    config, meshes = MODELS[name]
    with jax.enable_x64(True):
        parameters, batch = random_parameters(config), batch_of(2, 33)

        def loss(parameters, batch):
            value, _, statistics = next_token_loss(parameters, batch, config, training=True, remat="full")
            return value, statistics

        step = jax.value_and_grad(loss, has_aux=True)
        wanted = jax.jit(step)(parameters, batch)
        for sizes in meshes:
            mesh, placed = on_mesh(sizes, config, parameters)
            with jax.set_mesh(mesh):
                assert splits(32)
                got = jax.jit(step)(placed, jax.device_put(batch, batch_sharding(mesh)))
            assert_close(got, wanted)


def check_prefill():
    """A prompt is read in shards, then decoded token by token, which cannot be split."""
    config = dataclasses.replace(SMALL, layers=("mamba", "attention"))
    with jax.enable_x64(True):
        parameters, tokens = random_parameters(config), batch_of(2, 18)["tokens"]

        def run(parameters, tokens):
            output = forward(parameters, tokens[:, :16], config, cache=init_cache(config, 2, 18))
            values = [logits(parameters, output.hidden, config)]
            for i in (16, 17):
                output = forward(parameters, tokens[:, i : i + 1], config, cache=output.cache)
                values.append(logits(parameters, output.hidden, config))
            return jnp.concatenate(values, axis=1), output.cache

        wanted = jax.jit(run)(parameters, tokens)
        mesh, placed = on_mesh({"data": 2, "sequence": 4}, config, parameters)
        with jax.set_mesh(mesh):
            assert_close(jax.jit(run)(placed, tokens), wanted)


@pytest.mark.slow
@pytest.mark.long
def test_mamba(run_with_devices):
    in_eight_devices(run_with_devices, "test_sequence_parallel", "check_loss('mamba')")


@pytest.mark.slow
def test_blackmamba(run_with_devices):
    in_eight_devices(run_with_devices, "test_sequence_parallel", "check_loss('blackmamba')")


@pytest.mark.slow
def test_prefill_and_decoding(run_with_devices):
    in_eight_devices(run_with_devices, "test_sequence_parallel", "check_prefill()")


def tiny_run(directory, mesh):
    """Three steps of a small Mamba on the bundled text, and a sample."""
    return Config(
        model=dataclasses.replace(MAMBA32, vocab_size=264),
        data=DataConfig(sequence_length=32, batch_size=4),
        optimizer=OptimizerConfig(warmup_steps=5),
        mesh=mesh,
        run=RunConfig(directory=str(directory), steps=3, report_every=1, eval_every=3, eval_batches=2, sample_tokens=4),
    )


def train(directory):
    fit(tiny_run(directory, MeshConfig(data=2, sequence=4)))


@pytest.mark.slow
def test_training_gives_the_losses_of_one_device(run_with_devices, tmp_path):
    """`fit` whole: data, optimizer, checkpoint, validation and sample."""
    many, one = tmp_path / "many", tmp_path / "one"
    in_eight_devices(run_with_devices, "test_sequence_parallel", f"train({str(many)!r})")
    fit(tiny_run(one, MeshConfig()))
    losses = [[row[name] for name in ("objective", "grad_norm", "loss")] for row in read_metrics(many)]
    wanted = [[row[name] for name in ("objective", "grad_norm", "loss")] for row in read_metrics(one)]
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    assert len(losses) == 3


def test_a_sequence_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"data.sequence_length \(36\) must be a multiple of mesh.sequence \(8\)"):
        Config(data=DataConfig(sequence_length=36), mesh=MeshConfig(sequence=8))


def test_one_device_runs_the_operators_themselves():
    assert not splits(32)
    mesh = make_mesh(MeshConfig(data=1))
    with jax.set_mesh(mesh):
        assert not splits(32)
        program = jax.make_jaxpr(lambda p, t: forward(p, t, MAMBA32).hidden)(
            init_parameters(MAMBA32, jax.random.key(0)), jnp.ones((1, 8), jnp.int32)
        )
    assert "shard_map" not in str(program)
