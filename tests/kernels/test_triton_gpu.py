"""The Triton kernels without their hardware: they compile for every generation they are meant for, and refuse what they must.

Their values are compared with the loop in test_selective_scan.py: interpreted where Triton and PyTorch are installed,
themselves on a GPU with jax-triton.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Call, Target
from pallas_kernels.selective_scan import selective_scan, triton_gpu
from pallas_kernels.selective_scan.fused import Inputs
from pallas_kernels.selective_scan.triton_gpu import plan_backward, plan_forward, refusal


def shapes(batch, length, channels, states, dtype=jnp.float32):
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    wide, narrow = array(batch, length, channels, dtype=dtype), array(batch, length, states, dtype=dtype)
    return Inputs(
        u=wide, dt=wide, A=array(channels, states), B=narrow, C=narrow, D=array(channels), z=wide, dt_bias=array(channels),
        initial_state=array(batch, channels, states), segment_ids=array(batch, length, dtype=jnp.int32),
    )  # fmt: skip


COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from pallas_kernels.selective_scan import triton_gpu_kernels
from pallas_kernels.selective_scan.triton_gpu import scan_triton

KINDS = {"bfloat16": "*bf16", "float32": "*fp32"}
capability, dtype = int(sys.argv[1]), jnp.dtype(sys.argv[2])
options_given = json.loads(sys.argv[3])
seen = []

def call(name, grid, inputs, outputs, options, warps):
    kernel = getattr(triton_gpu_kernels, name)
    arrays = [*inputs, *outputs]
    signature = {key: KINDS[str(array.dtype)] for key, array in zip(kernel.arg_names, arrays)}
    constants = {(k,): options[key] for k, key in enumerate(kernel.arg_names) if k >= len(arrays)}
    signature |= {key: "constexpr" for key in kernel.arg_names[len(arrays):]}
    aligned = {(k,): [["tt.divisibility", 16]] for k in range(len(arrays))}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 1})
    seen.append((name, len(compiled.asm["cubin"])))
    return [jnp.zeros(x.shape, x.dtype) for x in outputs]

def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

batch, length, channels, states = 4, 300, 200, 16
wide, narrow = array(batch, length, channels, dtype=dtype), array(batch, length, states, dtype=dtype)
arguments = dict(u=wide, dt=wide, A=array(channels, states), B=narrow, C=narrow)
if options_given:
    arguments |= dict(D=array(channels), z=wide, dt_bias=array(channels), initial_state=array(batch, channels, states))
segments = array(batch, length, dtype=jnp.int32) if options_given else None

def both(arguments, segments):
    results, pullback = jax.vjp(lambda a: scan_triton(call)(**a, dt_softplus=options_given, segment_ids=segments), arguments)
    return pullback(results)

jax.eval_shape(both, arguments, segments)
print(json.dumps(seen))
"""
"""Its own process: this one's Triton interprets."""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install 'blackmamba-jax[triton]'")
@pytest.mark.parametrize(
    ("capability", "dtype", "options"),
    [(80, "bfloat16", True), (86, "float32", False), (89, "bfloat16", True), (90, "float32", True), (90, "bfloat16", False)],
)
def test_compiles_ahead_of_time(capability, dtype, options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability), dtype, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert {name for name, _ in seen} == {"summary_kernel", "forward_kernel", "backward_kernel"}
    assert all(size > 0 for _, size in seen)


def test_several_strips_and_warps_give_what_one_gives(monkeypatch):
    """The divisions of large calls, whose sums over channels a program adds up strip by strip, at a small size."""
    pytest.importorskip("triton", reason="needs triton: pip install 'blackmamba-jax[triton]'")
    pytest.importorskip("torch", reason="needs torch: pip install 'blackmamba-jax[parity]'")
    from test_selective_scan import make, run

    arguments = make(70, batch=1, channels=130, states=16, dtype=np.float32)
    segments = np.arange(70)[None] // 30
    cotangents = jnp.ones((1, 70, 130)), jnp.ones((1, 130, 16))
    results = [run(arguments, segments, cotangents, form="triton_gpu, interpreted", dt_softplus=True)]
    monkeypatch.setattr(triton_gpu, "RESIDENT", 1)
    monkeypatch.setattr(triton_gpu, "PAIRED", 1)
    assert plan_backward(shapes(1, 70, 130, 16), True).strips == 4
    assert plan_forward(shapes(1, 70, 130, 16), True).warps == 2
    jax.clear_caches()
    results.append(run(arguments, segments, cotangents, form="triton_gpu, interpreted", dt_softplus=True))
    # Some hundred terms in another order, each float32's rounding of the largest value.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(y)))), *results)


def test_offsets_within_a_chunk_fit_32_bits():
    for size in ((1, 1 << 20, 2304), (600, 1 << 20, 4096), (65535, 1 << 22, 2048)):
        for plan in (plan_forward(shapes(*size, 16), True), plan_backward(shapes(*size, 16), True)):
            assert plan.chunk * plan.channels < 2**31


@pytest.mark.parametrize("states", [8, 16, 64])
@pytest.mark.parametrize("size", [(1, 1, 8), (2, 63, 130), (8, 2048, 2304), (1, 65536, 2304), (64, 2048, 2304)])
def test_a_plan_covers_every_token_and_channel(size, states):
    _, length, channels = size
    for plan in (plan_forward(shapes(*size, states), True), plan_backward(shapes(*size, states), True)):
        assert plan.chunk % triton_gpu.START == 0
        assert (plan.chunks - 1) * plan.chunk < length <= plan.chunks * plan.chunk
        assert plan.groups * plan.strips * plan.block >= channels
        assert plan.block * plan.states <= triton_gpu.STATES_OF_WARP * plan.warps


@pytest.mark.parametrize(
    ("platform", "capability", "installed", "reason"),
    [
        ("cpu", 0.0, "0.3.1", "needs a GPU of compute capability 8.0"),
        ("gpu", 7.5, "0.3.1", "needs a GPU of compute capability 8.0"),
        ("gpu", 8.0, None, "jax-triton is not installed: pip install"),
        ("gpu", 8.0, "0.4.1", "jax-triton 0.3.1 or later, before 0.4, this is 0.4.1"),
        ("gpu", 8.0, "0.3.0", "jax-triton 0.3.1 or later, before 0.4, this is 0.3.0"),
        ("gpu", 8.9, "0.3.1", None),
    ],
)
def test_refuses_what_it_cannot_serve(platform, capability, installed, reason, monkeypatch):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(triton_gpu.importlib.metadata, "version", version)
    given = refusal(Call(Target(platform, "a device", capability), shapes(2, 64, 64, 16)._asdict()))
    assert given == reason if reason is None else reason in given


def test_refuses_more_rows_than_a_grid_has(monkeypatch):
    monkeypatch.setattr(triton_gpu.importlib.metadata, "version", lambda name: "0.3.1")
    assert "at most 65535" in refusal(Call(Target("gpu", "a device", 8.0), shapes(65536, 1, 8, 16)._asdict()))


def test_named_on_another_machine_it_is_refused_with_the_reason():
    arguments = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes(1, 4, 8, 8)._asdict().items()}
    call = functools.partial(selective_scan, **arguments, implementation="triton_gpu")
    with pytest.raises(NotImplementedError, match="triton_gpu cannot serve this call: it needs a GPU"):
        call()
