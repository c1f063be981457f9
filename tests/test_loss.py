"""The chunked cross entropy against the plain formula."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import in_eight_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bm_jax import loss
from bm_jax.config import MeshConfig
from bm_jax.loss import cross_entropy
from bm_jax.sharding import make_mesh


def plain(hidden, kernel, targets, counts, z_loss):
    """Over all tokens at once, differentiated by jax."""
    scores = jnp.einsum("blm,mv->blv", hidden, kernel)
    log_z = jax.nn.logsumexp(scores, axis=-1)
    nll = jnp.sum((log_z - jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]) * counts)
    return nll + z_loss * jnp.sum(log_z**2 * counts)


def inputs(B, L, M=8, V=37, dtype=np.float64):
    r = np.random.default_rng(0)
    hidden, kernel = r.normal(size=(B, L, M)).astype(dtype), r.normal(size=(M, V)).astype(dtype)
    return hidden, kernel, r.integers(0, V, (B, L)), r.random((B, L)) < 0.7


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
@pytest.mark.parametrize(("B", "L"), [(2, 16), (3, 7), (1, 1)])
def test_value_and_gradients_are_those_of_the_plain_formula(monkeypatch, B, L, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    with jax.enable_x64(True):
        arrays = inputs(B, L)
        ours = jax.value_and_grad(lambda h, k: 3 * cross_entropy(h, k, *arrays[2:], 0.1)[0], argnums=(0, 1))
        wanted = jax.value_and_grad(lambda h, k: 3 * plain(h, k, *arrays[2:], 0.1), argnums=(0, 1))
        for a, b in zip(jax.tree.leaves(ours(*arrays[:2])), jax.tree.leaves(wanted(*arrays[:2])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        sums = cross_entropy(*arrays, 0.1)[1]
        np.testing.assert_allclose(sums.nll, plain(*arrays, 0), rtol=1e-12)
        np.testing.assert_allclose(sums.nll + 0.1 * sums.z, plain(*arrays, 0.1), rtol=1e-12)
        assert sums.tokens == arrays[3].sum()


def test_bfloat16_products_lose_no_more_than_their_rounding():
    hidden, kernel, *rest = inputs(2, 64, M=64, V=300, dtype=np.float32)
    half = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    wide = [np.asarray(x, np.float32) for x in half]
    value, gradients = jax.value_and_grad(lambda h, k: cross_entropy(h, k, *rest, 0.0)[0], argnums=(0, 1))(half[0], wide[1])
    wanted_value, wanted = jax.value_and_grad(lambda h, k: plain(h, k, *rest, 0), argnums=(0, 1))(*wide)
    assert float(value) == pytest.approx(float(wanted_value), rel=1e-5)
    assert gradients[0].dtype == jnp.bfloat16
    assert gradients[1].dtype == jnp.float32
    for got, want in zip(gradients, wanted, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        assert error < 2**-8


def test_logits_of_a_whole_batch_are_never_there(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 32)
    arrays = inputs(4, 64, V=1000, dtype=np.float32)
    step = jax.jit(jax.value_and_grad(lambda h, k: cross_entropy(h, k, *arrays[2:], 0.0)[0], argnums=(0, 1)))
    text = step.lower(*arrays[:2]).compile().as_text()
    largest = max(np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w+\[([\d,]+)\]", text))
    assert largest == 32 * 1000


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "tensor": 2, "sequence": 2}, {"fsdp": 4, "sequence": 2}])
def test_on_a_mesh_gradients_are_summed_over_devices_once(run_with_devices, sizes):
    in_eight_devices(run_with_devices, "test_loss", f"check_mesh({sizes!r})")


def check_mesh(sizes):
    loss.CHUNK = 4
    arrays = inputs(8, 32, V=64, dtype=np.float32)
    value = lambda h, k: cross_entropy(h, k, *arrays[2:], 0.0)[0]  # noqa: E731
    wanted = jax.value_and_grad(value, argnums=(0, 1))(*arrays[:2])
    mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays, (P(("data", "fsdp")), P("fsdp", "tensor")), strict=False)
        ]
        program = jax.jit(jax.value_and_grad(value, argnums=(0, 1))).lower(*placed).compile()
        for a, b in zip(jax.tree.leaves(program(*placed)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    loop = re.search(r"body=%?([\w.]+)", program.as_text())
    assert loop is not None
    body = re.search(rf"%?{re.escape(loop[1])} .*?\n}}", program.as_text(), re.DOTALL)
    assert body is not None
    logits = {shape for shape in re.findall(r"= f32\[([\d,]+)\]", body[0]) if shape.endswith(f",{64 // mesh.shape['tensor']}")}
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in logits) == max(4, 8) * 64 // mesh.shape["tensor"]
    summed = [line for line in body[0].splitlines() if re.search(r"= f32\[[\d,]*8,(64|32)\]\S* all-reduce", line)]
    assert not summed
