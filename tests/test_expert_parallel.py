"""Models whose experts and parameters a mesh splits, against the same models on one device; `check_*` run with eight."""

from __future__ import annotations

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import assert_close, in_eight_devices, random_parameters

from bm_jax import expert_exchange
from bm_jax.config import AttentionConfig, ConfigError, MambaConfig, MeshConfig, ModelConfig, MoeConfig
from bm_jax.expert_parallel import gather_experts
from bm_jax.loss import next_token_loss
from bm_jax.moe import run_experts
from bm_jax.routing import Routing, route
from bm_jax.sharding import batch_parts, batch_sharding, make_mesh, parameter_shardings
from pallas_kernels.dispatch import Target

BLACKMAMBA = ModelConfig(
    layers=("mamba", "moe"),
    repeats=1,
    vocab_size=32,
    width=16,
    mamba=MambaConfig(state_size=4),
    attention=AttentionConfig(heads=8, kv_heads=8, head_size=4),
    moe=MoeConfig(experts=8, width=8),
    compute_dtype="float64",
    residual_dtype="float64",
)


def like(**changes):
    moe = changes.pop("moe", {})
    return dataclasses.replace(BLACKMAMBA, moe=dataclasses.replace(BLACKMAMBA.moe, **moe), **changes)


MODELS = {
    "blackmamba": BLACKMAMBA,
    "moe_mamba": like(moe={"router": "switch", "capacity_factor": 1.0, "load_balance_loss": 0.01}),
    "transformer_moe": like(layers=("attention", "moe"), moe={"router": "topk", "top_k": 2, "normalize_gates": True}),
    "jamba": like(
        layers=("mamba", "mlp", "attention", "moe"), mamba=MambaConfig(state_size=4, inner_norms=True),
        moe={"router": "topk", "top_k": 2, "router_z_loss": 0.001},
    ),
}  # fmt: skip
AXES = ("data", "fsdp", "expert", "tensor")
OF_EIGHT = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]
MESHES = {
    "each axis alone, and any three": [sizes for sizes in OF_EIGHT if 4 not in sizes],
    "4 x 2": [sizes for sizes in OF_EIGHT if 4 in sizes and sizes.index(4) < sizes.index(2)],
    "2 x 4": [sizes for sizes in OF_EIGHT if 4 in sizes and sizes.index(4) > sizes.index(2)],
}
"""Each mesh takes long to compile."""


def mesh_of(sizes):
    return make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))), jax.devices()[: np.prod(sizes)])


def check_model(name, meshes):
    """Loss, as trained, and every gradient, on the `MESHES` of that name."""
    config = MODELS[name]
    with jax.enable_x64(True):
        r = np.random.default_rng(1)
        parameters = random_parameters(config)
        segments = np.repeat([[1] * 5 + [2] * 8, [0] * 2 + [1] * 11], 4, axis=0)
        batch = {"tokens": jnp.asarray(r.integers(1, 32, (8, 13)), jnp.int32), "segment_ids": jnp.asarray(segments, jnp.int32)}

        def loss(parameters, batch):
            value, _, statistics = next_token_loss(parameters, batch, config, training=True)
            return value + jnp.sum(statistics.loss), statistics

        step = jax.value_and_grad(loss, has_aux=True)
        wanted = jax.jit(step)(parameters, batch)
        for sizes in MESHES[meshes]:
            mesh = mesh_of(sizes)
            with jax.set_mesh(mesh):
                placed = jax.device_put(parameters, parameter_shardings(parameters, mesh))
                got = jax.jit(step)(placed, jax.device_put(batch, batch_sharding(mesh)))
            # Attention takes its scores and the angles of its positions in float32: rounded by 6e-8, amplified some ten times.
            assert_close(got, wanted, tolerance=1e-6 if "attention" in config.layers else 1e-10)


LOADS = ("uneven", "an empty expert", "all on one expert", "masked")


FOUR_MESHES = ((1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2), (1, 1, 2, 4))


def check_loads(dtype, exchange, meshes=FOUR_MESHES):
    """The experts alone, on loads that fit the room for a mean and that do not."""
    r = np.random.default_rng(2)
    config = MoeConfig(experts=8, width=8, router="topk", top_k=2, exchange=exchange)
    with jax.enable_x64(dtype == "float64"):
        parameters = {
            "w_in": jnp.asarray(r.standard_normal((8, 16, 2, 8))), "w_out": jnp.asarray(r.standard_normal((8, 8, 16))),
        }  # fmt: skip
        x, weights = (jnp.asarray(r.standard_normal((8, 32, 16)), dtype) for _ in range(2))

        def loss(parameters, x, gate, routing, mask):
            x, _, gathered = gather_experts(x, parameters)
            y, _ = run_experts(gathered, x, Routing(routing.index, gate, routing.statistics), config, mask=mask)
            return jnp.sum(y * weights), y

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        for load in LOADS:
            logits = r.standard_normal((256, 8))
            logits += {"uneven": np.arange(8), "an empty expert": [-99] + [0] * 7, "all on one expert": [99] + [0] * 7}.get(
                load, 0
            )
            mask = jnp.asarray(r.random(256) < 0.5) if load == "masked" else None
            routing = route(jnp.asarray(logits), config, training=True, mask=mask)
            wanted = step(parameters, x, routing.gate, routing, mask)
            for sizes in meshes:
                with jax.set_mesh(mesh_of(sizes)):
                    got = step(parameters, x, routing.gate, routing, mask)
                # bfloat16: products are rounded to 2**-9 of themselves, a few dozen of them add up.
                (_, y), gradients = got
                assert_close((y, gradients), (wanted[0][1], wanted[1]), tolerance=1e-10 if dtype == "float64" else 2.0**-6)


def stated_ragged_all_to_all(operand, output, starts, sizes, targets, received, *, axis_name):
    """What `lax.ragged_all_to_all` is documented to do, which CPUs lack, from everything of every device."""
    everything = jax.lax.all_gather((operand, starts, sizes, targets), axis_name)
    me = jax.lax.axis_index(axis_name)
    for source in range(jax.lax.axis_size(axis_name)):
        rows, start, size, target = (x[source] if i == 0 else x[source, me] for i, x in enumerate(everything))
        place = jnp.arange(len(output)) - target
        comes = (place >= 0) & (place < jnp.minimum(size, received[source]))
        taken = rows[jnp.clip(start + place, 0, len(rows) - 1)]
        output = jnp.where(comes.reshape(-1, *[1] * (output.ndim - 1)), taken, output)
    return output


def check_ragged_loads(dtype):
    with pytest.raises(ConfigError, match="CPUs have no ragged all_to_all; use 'padded'"):
        check_loads(dtype, "ragged")
    jax.lax.ragged_all_to_all = stated_ragged_all_to_all
    expert_exchange.target = lambda: Target("gpu", "one that has it")
    check_loads(dtype, "ragged")


def check_sinkhorn():
    """Global balancing exchanges sums and gives what one device gives; local balancing exchanges nothing."""
    r = np.random.default_rng(3)
    logits = jnp.asarray(r.standard_normal((64, 8)) + 2 * np.repeat(r.standard_normal((8, 8)), 8, axis=0), jnp.float32)
    mesh = mesh_of((4, 1, 2, 1))
    for scope, exchanges in (("global", True), ("local", False)):
        config = MoeConfig(experts=8, sinkhorn_scope=scope)

        def choose(logits, config=config):
            return route(logits, config, training=True, parts=batch_parts(8)).index

        with jax.set_mesh(mesh):
            compiled = jax.jit(choose).lower(jax.device_put(logits, batch_sharding(mesh))).compile()
            got = compiled(jax.device_put(logits, batch_sharding(mesh)))
        # What the loop of the iterations exchanges: their sums, once.
        inside = [line for line in compiled.as_text().splitlines() if "/while/body" in line]
        assert sum(" all-gather(" in line for line in inside) == exchanges, scope
        assert not any(" all-reduce(" in line for line in inside), scope
        assert exchanges or not re.search(r" all-(reduce|gather|to-all)\(", compiled.as_text()), scope
        wanted = route(logits, config, training=True, parts=1 if exchanges else 8).index
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
def test_sinkhorn_balances_all_tokens_or_those_of_each_part(run_with_devices):
    in_eight_devices(run_with_devices, "test_expert_parallel", "check_sinkhorn()")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("blackmamba", "each axis alone, and any three"),
        ("transformer_moe", "each axis alone, and any three"),
        pytest.param("blackmamba", "4 x 2", marks=pytest.mark.long),
        pytest.param("blackmamba", "2 x 4", marks=pytest.mark.long),
        pytest.param("moe_mamba", "each axis alone, and any three", marks=pytest.mark.long),
        pytest.param("jamba", "each axis alone, and any three", marks=pytest.mark.long),
    ],
)
def test_meshes_of_eight_give_the_loss_and_gradients_of_one_device(name, meshes, run_with_devices):
    in_eight_devices(run_with_devices, "test_expert_parallel", f"check_model({name!r}, {meshes!r})")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_any_load_gives_what_one_device_gives(dtype, run_with_devices):
    in_eight_devices(run_with_devices, "test_expert_parallel", f"check_loads({dtype!r}, 'padded')")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_any_load_gives_what_one_device_gives_by_the_ragged_exchange(dtype, run_with_devices):
    in_eight_devices(run_with_devices, "test_expert_parallel", f"check_ragged_loads({dtype!r})")


@pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("exchange", ["padded", "ragged"])
def test_any_load_gives_what_one_gpu_gives(dtype, exchange):
    check_loads(dtype, exchange, meshes=[(1, 1, 2, 1)])
