"""What is chosen, what is refused and how it is told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation, Target, explain, resolve
from pallas_kernels.selective_scan import explain_selective_scan, triton_gpu

TABLE = {
    "fast": Implementation(
        lambda: "fast",
        refusal=lambda call: None if call.target.platform == "gpu" else f"needs a GPU, this is {call.target.platform}",
        preferred=lambda call: call.arguments["x"].shape[0] > 4,
    ),
    "plain": Implementation(lambda: "plain"),
}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.delenv(dispatch.OVERRIDE, raising=False)
    monkeypatch.setattr(dispatch, "target", lambda: Target("gpu", "NVIDIA H100", 9.0))


def arguments(size):
    return {"x": jax.ShapeDtypeStruct((size,), jnp.float32)}


def test_the_first_that_can_and_is_preferred_is_taken(gpu):
    assert resolve("op", None, TABLE, arguments(8))() == "fast"
    assert resolve("op", None, TABLE, arguments(2))() == "plain"
    assert resolve("op", "fast", TABLE, arguments(2))() == "fast"  # named, so taken


def test_a_named_one_that_cannot_serve_is_refused_with_the_reason():
    assert resolve("op", None, TABLE, arguments(8))() == "plain"
    with pytest.raises(NotImplementedError, match="op: fast cannot serve this call: needs a GPU, this is cpu"):
        resolve("op", "fast", TABLE, arguments(8))


def test_the_override_names_one_for_all_operators_or_for_one(gpu, monkeypatch):
    monkeypatch.setenv(dispatch.OVERRIDE, "plain")
    assert resolve("op", None, TABLE, arguments(8))() == "plain"
    assert resolve("op", "fast", TABLE, arguments(8))() == "fast"  # the override stands for None only
    monkeypatch.setenv(dispatch.OVERRIDE, "other=reference, op=plain")
    assert resolve("op", None, TABLE, arguments(8))() == "plain"
    monkeypatch.setenv(dispatch.OVERRIDE, "other=reference")
    assert resolve("op", None, TABLE, arguments(8))() == "fast"


@pytest.mark.parametrize("value", ["op", "plain,op=fast", "=plain", "op="])
def test_an_override_that_cannot_be_read_is_refused(gpu, monkeypatch, value):
    monkeypatch.setenv(dispatch.OVERRIDE, value)
    with pytest.raises(NotImplementedError, match=r"op|PALLAS_KERNELS_IMPLEMENTATION"):
        resolve("op", None, TABLE, arguments(8))


def test_the_explanation_agrees_with_the_choice(gpu, monkeypatch):
    assert explain("op", TABLE, arguments(8)).splitlines() == [
        "op on NVIDIA H100",
        "fast: runs: the first that can and is preferred here",
        "plain: can; one before it is preferred",
    ]
    assert "fast: can; not preferred for this shape\nplain: runs" in explain("op", TABLE, arguments(2))
    monkeypatch.setenv(dispatch.OVERRIDE, "plain")
    assert "plain: runs: named by PALLAS_KERNELS_IMPLEMENTATION" in explain("op", TABLE, arguments(8))
    monkeypatch.setattr(dispatch, "target", lambda: Target("cpu", "cpu"))
    assert "fast: cannot: needs a GPU, this is cpu" in explain("op", TABLE, arguments(8))


@pytest.mark.parametrize(
    "wanted",
    [Target("tpu", "TPU v5 lite"), Target("gpu", "NVIDIA H100 80GB HBM3", 9.0), Target("gpu", "NVIDIA something", 0.0)],
)
def test_the_target_is_the_default_device_or_the_mesh_in_force(wanted):
    assert dispatch.target() == Target("cpu", jax.devices()[0].device_kind)
    device = jax.sharding.AbstractDevice(device_kind=wanted.kind, num_cores=1, platform=wanted.platform)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    seen = []

    def traced(x):
        seen.append(dispatch.target())
        return x

    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(traced, 1.0)
    assert seen == [wanted]


@pytest.mark.parametrize(
    ("kind", "capability", "length", "chosen"),
    [("gpu", 9.0, 1, "xla"), ("gpu", 9.0, 2, "pallas_gpu"), ("gpu", 8.0, 31, "xla"), ("gpu", 8.0, 32, "triton_gpu"),
     ("gpu", 7.5, 32, "xla"), ("tpu", 0.0, 31, "xla"), ("tpu", 0.0, 32, "pallas_tpu"), ("cpu", 0.0, 32, "xla")],
)  # fmt: skip
def test_the_scan_chooses_by_platform_and_length(kind, capability, length, chosen, monkeypatch):
    monkeypatch.delenv(dispatch.OVERRIDE, raising=False)
    monkeypatch.setattr(dispatch, "target", lambda: Target(kind, "a device", capability))
    monkeypatch.setattr(triton_gpu, "installed", lambda: None)
    x, s = jax.ShapeDtypeStruct((2, length, 32), jnp.bfloat16), jax.ShapeDtypeStruct((2, length, 16), jnp.bfloat16)
    text = explain_selective_scan(u=x, dt=x, A=jax.ShapeDtypeStruct((32, 16), jnp.float32), B=s, C=s)
    assert f"\n{chosen}: runs" in text
    monkeypatch.setattr(triton_gpu, "installed", lambda: "not installed")
    if chosen == "triton_gpu":
        text = explain_selective_scan(u=x, dt=x, A=jax.ShapeDtypeStruct((32, 16), jnp.float32), B=s, C=s)
        assert "triton_gpu: cannot: not installed" in text
        assert "\nxla: runs" in text


def test_the_scan_explains_itself():
    x, s = jax.ShapeDtypeStruct((2, 64, 32), jnp.bfloat16), jax.ShapeDtypeStruct((2, 64, 16), jnp.bfloat16)
    text = explain_selective_scan(u=x, dt=x, A=jax.ShapeDtypeStruct((32, 16), jnp.float32), B=s, C=s)
    assert text.startswith("selective_scan on cpu")
    assert "xla: runs" in text
