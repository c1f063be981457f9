"""Sinkhorn's iterations in one kernel against the loop in plain XLA."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.sinkhorn import sinkhorn_potentials
from pallas_kernels.sinkhorn.pallas_gpu import refusal, sinkhorn_potentials_gpu
from pallas_kernels.sinkhorn.xla import sinkhorn_potentials_xla


@pytest.fixture(params=["pallas_gpu", "pallas_gpu, interpreted"])
def kernel(request):
    if request.param == "pallas_gpu":
        if jax.default_backend() != "gpu":
            pytest.skip("needs a GPU of compute capability 9.0")
        return functools.partial(sinkhorn_potentials, implementation="pallas_gpu")
    if not hasattr(plgpu, "InterpretGPUParams") or jax.default_backend() != "cpu":
        pytest.skip("Mosaic GPU's clusters are interpreted on CPUs, by a jax that can")
    return functools.partial(sinkhorn_potentials_gpu, interpret=plgpu.InterpretGPUParams())


def scores_of(tokens, experts, spread, bias=0.0):
    scores = np.random.default_rng(0).standard_normal((experts, tokens)) * spread
    scores[0] += bias
    return jnp.asarray(scores, jnp.float32)


@pytest.mark.parametrize(
    ("tokens", "experts", "spread", "bias", "masked"),
    [
        (512, 8, 2.0, 3.0, False),
        (4500, 3, 2.0, 0.0, True),
        (1024, 4, 300.0, -1e4, False),
        (1000, 4, 1.0, -150.0, False),  # an expert underflows in blocks that also hold tokens which do not count
        (1000, 4, 1.0, -150.0, True),
        (1, 2, 1.0, 0.0, False),
    ],
)
def test_the_kernel_does_what_the_loop_does(kernel, tokens, experts, spread, bias, masked):
    """Also where almost every probability of an expert underflows, and where tokens do not fill the blocks."""
    scores = scores_of(tokens, experts, spread, bias)
    if masked:
        scores = scores.at[:, ::3].set(jnp.nan)  # of tokens that do not count
    valid = jnp.arange(tokens) % 3 != 0 if masked else jnp.ones(tokens, bool)
    start = jnp.zeros(experts)
    got = jax.jit(lambda *arguments: kernel(*arguments, 4))(scores, valid, start)
    wanted = sinkhorn_potentials_xla(scores, valid, start, 4)
    # Four updates, each the logarithm of a sum that is right to 1e-6; scores are rounded to 6e-8 of their size.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 + 1e-6 * float(jnp.nanmax(jnp.abs(scores))))


def test_the_kernel_lowers_for_cuda():
    shapes = [jax.ShapeDtypeStruct(*kind) for kind in (((8, 16384), jnp.float32), ((16384,), jnp.bool_), ((8,), jnp.float32))]
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    function = jax.jit(lambda *arguments: sinkhorn_potentials_gpu(*arguments, 8))
    exported = jax.export.export(function, platforms=["cuda"], disabled_checks=checks)(*shapes)
    assert exported.mlir_module().count("@mosaic_gpu_v2") == 1


def test_the_choice():
    def why(scores, iterations=None, kind="gpu", capability=9.0):
        arguments = {"scores": scores, "valid": None, "start": None, "iterations": iterations}
        return refusal(dispatch.Call(dispatch.Target(kind, "a device", capability), arguments))

    scores = jnp.zeros((8, 64))
    assert why(scores) is None
    assert "compute capability 9.0" in why(scores, capability=8.0)
    assert "compute capability 9.0" in why(scores, kind="tpu")
    assert "up to 16 experts" in why(jnp.zeros((64, 64)))
    assert "float32" in why(scores.astype(jnp.bfloat16))
    assert "known while tracing" in why(scores, iterations=jnp.array(3))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
        assert "several devices" in why(scores)
