"""The Mosaic GPU kernels without their hardware: they lower for CUDA in every form, split time, and refuse what they must.

Their values are compared with the loop in test_selective_scan.py: interpreted on every machine, themselves on a GPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Call, Target
from pallas_kernels.selective_scan import pallas_gpu_lanes, pallas_gpu_work, selective_scan
from pallas_kernels.selective_scan.pallas_gpu import refusal, scan_gpu, selective_scan_gpu

OPTIONS = ("D", "z", "dt_bias", "initial_state", "segment_ids")


def shapes(batch, length, channels, states, dtype, without=()):
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    wide, narrow = array(batch, length, channels, dtype=dtype), array(batch, length, states, dtype=dtype)
    arguments = {
        "u": wide, "dt": wide, "A": array(channels, states), "B": narrow, "C": narrow, "D": array(channels), "z": wide,
        "dt_bias": array(channels), "initial_state": array(batch, channels, states),
        "segment_ids": array(batch, length, dtype=jnp.int32),
    }  # fmt: skip
    return {name: None if name in without else value for name, value in arguments.items()}


def scan(arguments, **options):
    return selective_scan_gpu(**arguments, **options)


def lower(function, *arguments):
    return jax.export.export(jax.jit(function), platforms=["cuda"])(*arguments).mlir_module()


@pytest.mark.parametrize("dt_softplus", [True, False])
@pytest.mark.parametrize("without", [(), OPTIONS])
@pytest.mark.parametrize(
    ("size", "dtype"), [((8, 2048, 2304, 16), jnp.bfloat16), ((2, 63, 130, 8), jnp.float32), ((1, 1, 64, 64), jnp.float32)]
)
def test_lowers_for_cuda(size, dtype, without, dt_softplus):
    arguments = shapes(*size, dtype, without)
    text = lower(functools.partial(scan, dt_softplus=dt_softplus), arguments)
    assert "mosaic_gpu" in text
    results = jax.eval_shape(scan, arguments)
    assert [(x.shape, x.dtype) for x in results] == [(size[:3], dtype), ((size[0], *size[2:]), jnp.float32)]


@pytest.mark.parametrize("size", [(8, 256, 2304, 16), (16, 256, 2304, 16), (1, 2048, 2304, 16)])
@pytest.mark.parametrize("wide", [("dt",), ("u",), ("z",), ("B",)])
def test_mixed_dtypes_lower_for_cuda(size, wide):
    """Narrow strips, wide ones, and chunks of time; the models pass dt in float32 and u in bfloat16."""
    arguments = shapes(*size, jnp.bfloat16)
    arguments |= {name: jax.ShapeDtypeStruct(arguments[name].shape, jnp.float32) for name in wide}
    segment_ids = arguments.pop("segment_ids")

    def loss(arguments):
        return jnp.sum(scan(arguments | {"segment_ids": None})[0].astype(jnp.float32))

    assert segment_ids is not None
    lower(jax.grad(loss), arguments)


def test_gradients_lower_for_cuda_and_keep_dtypes():
    arguments = shapes(2, 63, 130, 8, jnp.bfloat16)
    segment_ids = arguments.pop("segment_ids")

    def loss(arguments, segment_ids):
        y, final = scan(arguments | {"segment_ids": segment_ids})
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(final)

    lower(jax.grad(loss), arguments, segment_ids)
    gradients = jax.eval_shape(jax.grad(loss), arguments, segment_ids)
    assert {name: x.dtype for name, x in gradients.items()} == {name: x.dtype for name, x in arguments.items()}


def everything(segments, shift=0.0):
    """Outputs and gradients of an interpreted call that is neither a whole number of strips nor of tiles."""
    r = np.random.default_rng(0)
    empty = shapes(2, 200, 72, 16, jnp.float32)
    arguments = {name: jnp.asarray(r.standard_normal(x.shape), jnp.float32) for name, x in empty.items()}
    arguments |= {"A": -jnp.exp(arguments["A"]), "dt": arguments["dt"] + shift}
    segment_ids = jnp.asarray(np.arange(200)[None] >= np.array([[70], [128]]), jnp.int32) if segments else None
    floats = {name: x for name, x in arguments.items() if name != "segment_ids"}
    scan = functools.partial(scan_gpu(interpret=True), segment_ids=segment_ids)
    results, pullback = jax.vjp(lambda floats: scan(**floats), floats)
    return results, pullback((arguments["u"][:, ::-1], arguments["initial_state"][::-1]))


def close(got, wanted):
    # Sums of some hundred float32 terms in another order: 6e-8 each, 1e-5 of the largest value in all.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(wanted))))


@pytest.mark.slow
@pytest.mark.parametrize("shift", [-7.0, 2.0])
@pytest.mark.parametrize("segments", [False, True])
def test_time_in_chunks_gives_what_one_chunk_gives(shift, segments, monkeypatch):
    """With small steps states pass through all chunks; with large ones the walk for what a chunk hands on ends early."""
    whole = everything(segments, shift)
    assert pallas_gpu_work.plan_forward(2, 200, 72, True).chunks == 1
    monkeypatch.setattr(pallas_gpu_work, "SPAN", 32)
    assert pallas_gpu_work.plan_forward(2, 200, 72, True).chunks > 3
    jax.tree.map(close, everything(segments, shift), whole)


@pytest.mark.parametrize("size", [(1, 512, 64, 16), (1, 512, 72, 16), (1, 512, 64, 8), (1, 512, 60, 24)])
def test_the_walk_back_through_a_chunk_ends_early(size, monkeypatch):
    """With large steps after a tile or two, also where lanes have channels or states that are not there."""
    monkeypatch.setattr(pallas_gpu_work, "SPAN", 128)
    tiles = []
    real = pallas_gpu_lanes.Work.steps
    monkeypatch.setattr(pallas_gpu_lanes.Work, "steps", lambda work, dt, time: tiles.append(1) or real(work, dt, time))
    r = np.random.default_rng(0)
    empty = shapes(*size, jnp.float32, without=("segment_ids", "initial_state"))
    arguments = {name: jnp.asarray(r.standard_normal(x.shape), jnp.float32) for name, x in empty.items() if x is not None}
    arguments["A"] = -1 - jnp.abs(arguments["A"])
    counts = {}
    for shift in (-7.0, 12.0):
        tiles.clear()
        jax.block_until_ready(scan_gpu(interpret=True)(**arguments | {"dt": arguments["dt"] + shift}))
        counts[shift] = len(tiles)
    chunks = pallas_gpu_work.plan_forward(*size[:3], True).chunks
    blocks = counts[-7.0] // (512 // 16 + (chunks - 1) * (128 // 16))
    assert chunks == 4
    assert counts[12.0] <= blocks * (512 // 16 + (chunks - 1) * 2)


@pytest.mark.slow
def test_narrow_strips_give_what_wide_ones_give(monkeypatch):
    wide = everything(segments=True)
    assert pallas_gpu_work.plan_forward(2, 200, 72, True).strip == 64
    monkeypatch.setattr(pallas_gpu_work, "NARROW", 0)
    assert pallas_gpu_work.plan_forward(2, 200, 72, True).strip == 32
    jax.tree.map(close, everything(segments=True), wide)


@pytest.mark.parametrize(
    ("size", "own", "chunks"),
    [((64, 2048, 2304), 4, 1), ((8, 2048, 2944), 4, 1), ((8, 2048, 2304), 2, 1), ((4, 8192, 2048), 2, 1),
     ((1, 2048, 2304), 4, 11), ((1, 65536, 2304), 4, 33), ((1, 64, 2304), 4, 1)],
)  # fmt: skip
def test_small_batches_are_divided_until_they_fill_a_gpu(size, own, chunks):
    plan = pallas_gpu_work.plan_forward(*size, True)
    assert (plan.own, plan.chunks) == (own, chunks)


@pytest.mark.parametrize(
    ("platform", "capability", "states", "dtype", "reason"),
    [
        ("cpu", 0.0, 16, jnp.float32, "needs a GPU of compute capability 9.0"),
        ("gpu", 8.0, 16, jnp.float32, "needs a GPU of compute capability 9.0"),
        ("gpu", 9.0, 16, jnp.bfloat16, None),
        ("gpu", 10.0, 12, jnp.float32, None),
    ],
)
def test_refuses_what_it_cannot_serve(platform, capability, states, dtype, reason):
    given = refusal(Call(Target(platform, "a device", capability), shapes(2, 64, 64, states, dtype)))
    assert given == reason if reason is None else reason in given


def test_refuses_float64(x64):
    arguments = shapes(2, 64, 64, 16, jnp.float32) | {"dt": jax.ShapeDtypeStruct((2, 64, 64), jnp.float64)}
    assert "dt is float64" in refusal(Call(Target("gpu", "a device", 9.0), arguments))


def test_named_on_another_machine_it_is_refused_with_the_reason():
    arguments = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes(1, 4, 8, 8, jnp.float32).items()}
    with pytest.raises(NotImplementedError, match="pallas_gpu cannot serve this call: it needs a GPU"):
        selective_scan(**arguments, implementation="pallas_gpu")
