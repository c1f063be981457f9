"""The TPU kernels without a TPU: no races and nothing left unwritten, and they compile ahead of time for every generation.

Their values are compared with the loop in test_selective_scan.py, interpreted.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Call, Target
from pallas_kernels.selective_scan import pallas_tpu, selective_scan
from pallas_kernels.selective_scan.pallas_tpu import refusal, scan_tpu

SHAPES = ("8,2048,2304,16", "8,2048,2944,16", "64,2048,2304,16", "1,65536,2304,16", "4,8192,2048,16", "1,2048,2304,16")
SMALL = ("2,63,130,8", "1,1,64,16", "2,257,520,64")
TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:4x4x4")


def make(batch, length, channels, states):
    r = np.random.default_rng(0)
    n = functools.partial(r.standard_normal, dtype=np.float32)
    wide, narrow = (batch, length, channels), (batch, length, states)
    arguments = {
        "u": n(wide), "dt": n(wide), "A": -np.exp(n((channels, states))), "B": n(narrow), "C": n(narrow), "D": n(channels),
        "z": n(wide), "dt_bias": n(channels), "initial_state": n((batch, channels, states)),
    }  # fmt: skip
    segments = np.arange(length)[None] // np.array([[5], [7]])[:batch]
    return {name: jnp.asarray(x) for name, x in arguments.items()}, jnp.asarray(segments, jnp.int32)


def gradients(scan, arguments, segments):
    results, pullback = jax.vjp(lambda a: scan(**a, segment_ids=segments), arguments)
    return results, pullback(jax.tree.map(jnp.ones_like, results))


@pytest.mark.slow
@pytest.mark.parametrize("segmented", [False, True])
def test_no_races_and_nothing_unwritten_is_read(segmented, monkeypatch):
    """Two chunks of time and two blocks of channels, the last of each partly outside the arrays."""
    monkeypatch.setattr(pallas_tpu, "CHUNK", 16)
    monkeypatch.setattr(pallas_tpu, "BUNDLES", {128: 1})
    arguments, segments = make(1, 19, 130, 8)
    segments = segments if segmented else None
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    got = gradients(scan_tpu(interpret=strict), arguments, segments)
    wanted = gradients(functools.partial(selective_scan, implementation="reference"), arguments, segments)

    def close(x, y):
        # Some dozen dependent float32 roundings of 6e-8, on terms as large as the largest value.
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(y))))

    jax.tree.map(close, got, wanted)


COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from pallas_kernels.selective_scan import explain_selective_scan, selective_scan

device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
sharding = jax.sharding.SingleDeviceSharding(device)
def kind(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
for text in sys.argv[2:]:
    batch, length, channels, states = map(int, text.split(","))
    half = jnp.float32 if channels % 128 else jnp.bfloat16
    wide, narrow = kind(batch, length, channels, dtype=half), kind(batch, length, states, dtype=half)
    arguments = dict(u=wide, dt=wide, A=kind(channels, states), B=narrow, C=narrow, D=kind(channels), z=wide,
                     dt_bias=kind(channels), initial_state=kind(batch, channels, states))
    segments = kind(batch, length, dtype=jnp.int32)
    forward = lambda a, s: selective_scan(**a, segment_ids=s, implementation="pallas_tpu")
    backward = lambda a, s: jax.vjp(lambda a: forward(a, s), a)[1]((a["u"], a["initial_state"]))
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):
        lines = explain_selective_scan(**arguments, segment_ids=segments).splitlines()
        chosen = next(line for line in lines if line.startswith("pallas_tpu"))
        for function in (forward, backward):
            compiled = jax.jit(function).lower(arguments, segments).compile()
            memory = compiled.memory_analysis()
            kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
            is_kernel = "tpu_custom_call" in compiled.as_text()
            print(json.dumps([text, chosen, (kept + memory.temp_size_in_bytes) / kept, is_kernel]))
"""
"""Its own process: libtpu reads its settings once, before jax starts."""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'blackmamba-jax[tpu-aot]'")
@pytest.mark.parametrize(
    "topology", [TOPOLOGIES[0], *(pytest.param(name, marks=pytest.mark.long) for name in TOPOLOGIES[1:-1]), TOPOLOGIES[-1]]
)
def test_compiles_ahead_of_time(topology):
    settings = {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", COMPILE, topology, *SHAPES, *SMALL]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(rows) == 2 * len(SHAPES + SMALL)
    for text, chosen, memory, is_kernel in rows:
        assert is_kernel
        assert "pallas_tpu: runs" in chosen or int(text.split(",")[1]) < 32
        # Inputs, outputs and gradients take all but the states that are kept and the sums over blocks of channels.
        assert memory < 1.3 or text in SMALL, (text, memory)


@pytest.mark.parametrize(
    ("platform", "states", "reason"),
    [("cpu", 16, "needs a TPU"), ("gpu", 16, "needs a TPU"), ("tpu", 65, "at most 64"), ("tpu", 64, None), ("tpu", 5, None)],
)
def test_refuses_what_it_cannot_serve(platform, states, reason):
    given = refusal(Call(Target(platform, "a device"), make(1, 4, 8, states)[0]))
    assert given == reason if reason is None else reason in given


def test_refuses_float64(x64):
    arguments = make(1, 4, 8, 8)[0]
    assert "dt is float64" in refusal(Call(Target("tpu", "a device"), arguments | {"dt": arguments["dt"].astype(jnp.float64)}))


def test_named_on_another_machine_it_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="pallas_tpu cannot serve this call: it needs a TPU"):
        selective_scan(**make(1, 4, 8, 8)[0], implementation="pallas_tpu")
