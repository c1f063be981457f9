"""The scan and the convolution of a sequence split over devices, against the same operators on one device.

Operators and models run in a process with eight CPU devices, `check_*` here being what runs there; the sequence of a
million tokens is compiled ahead of time for sixteen TPUs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.causal_conv import causal_conv, causal_conv_over
from pallas_kernels.selective_scan import selective_scan, selective_scan_over

P = PartitionSpec
HERE = Path(__file__).resolve().parent
OPTIONAL = ("D", "z", "dt_bias", "initial_state")
TOLERANCE = 1e-12


def in_eight_devices(run_with_devices, call):
    """Evaluate `call` of this module in a process with eight devices and float64."""
    source = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import jax
jax.config.update("jax_enable_x64", True)
import test_sequence
test_sequence.{call}
print("agrees")
"""
    assert "agrees" in run_with_devices(source, devices=8)


def documents(shard, shards=8):
    """Ids `[6, shards * shard]`, one layout of documents a row."""
    length = shard * shards
    index = np.arange(length)
    rows = [
        np.full(length, 7),  # one document
        index // shard,  # one a shard: each begins at a border
        index // (2 * shard) % 2,  # one every two shards, ids that come back
        (index + shard // 2 + 1) // shard,  # one a shard, beginning inside
        (index >= 3 * shard).astype(int) + (index >= 3 * shard + shard // 2),  # a border, then inside, then many shards
        np.where(index < length - 1, 0, 1),  # the last token alone
    ]
    return np.stack(rows).astype(np.int32)


def assert_close(got, wanted):
    """Trees equal to `TOLERANCE` of each array's largest element."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, path
        assert a.shape == b.shape, path
        scale = max(np.abs(b).max(initial=0), 1e-30)
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=TOLERANCE, err_msg=str(path))


def gradients(function, arguments, cotangents):
    """Results, and the gradient of their product with `cotangents` for every argument."""

    def objective(arguments):
        results = function(**arguments)
        return sum(jnp.vdot(a, b) for a, b in zip(results, cotangents, strict=True)), results

    return jax.jit(jax.value_and_grad(objective, has_aux=True))(arguments)


def over(operator, specs, results, names, **options):
    """`operator` over axis `sequence` of the current mesh, as a function of the whole arrays."""
    return jax.shard_map(
        lambda arrays: operator("sequence", **arrays, **options),
        in_specs=({name: specs[name] for name in names},),
        out_specs=results,
        check_vma=False,  # loops start from constants, which the check takes to be replicated
    )


def check_split(one_device, operator, arguments, specs, results, cotangents, *, data=1, segment_ids=None, **options):
    """One device and a mesh of eight give the same results and gradients."""
    fixed = {} if segment_ids is None else {"segment_ids": segment_ids}
    wanted = gradients(functools.partial(one_device, **fixed, **options), arguments, cotangents)
    mesh = jax.make_mesh((data, 8 // data), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        split = over(operator, specs, results, [*arguments, *fixed], **options)
        got = gradients(lambda **arrays: split(arrays | fixed), arguments, cotangents)
    assert_close(got, wanted)


SCAN_SPECS = (
    dict.fromkeys(("u", "dt", "B", "C", "z"), P("data", "sequence", None))
    | dict.fromkeys(("A", "D", "dt_bias"), P())
    | {"initial_state": P("data", None, None), "segment_ids": P("data", "sequence")}
)


def scan_arguments(length, without=(), batch=6, channels=3, states=2, dt_shift=0.0):
    r = np.random.default_rng(length)
    shapes = {"u": "ble", "dt": "ble", "A": "en", "B": "bln", "C": "bln", "D": "e", "z": "ble", "dt_bias": "e"}
    shapes |= {"initial_state": "ben"}
    sizes = {"b": batch, "l": length, "e": channels, "n": states}
    arguments = {name: r.standard_normal([sizes[letter] for letter in shape]) for name, shape in shapes.items()}
    arguments["A"] = -np.exp(arguments["A"])
    arguments["dt"] += dt_shift
    cotangents = r.standard_normal((batch, length, channels)), r.standard_normal((batch, channels, states))
    arguments = {name: jnp.asarray(array) for name, array in arguments.items() if name not in without}
    return arguments, tuple(map(jnp.asarray, cotangents))


def check_scan(shard, *, packed, without=(), data=1, dt_shift=0.0, **options):
    length = shard * 8 // data
    arguments, cotangents = scan_arguments(length, without, dt_shift=dt_shift)
    ids = jnp.asarray(documents(shard, 8 // data)) if packed else None
    results = P("data", "sequence", None), P("data", None, None)
    check_split(
        selective_scan, selective_scan_over, arguments, SCAN_SPECS, results, cotangents, data=data, segment_ids=ids, **options
    )


def check_scans():
    check_scan(4, packed=True)
    check_scan(4, packed=False)
    check_scan(4, packed=True, without=OPTIONAL)
    check_scan(4, packed=False, without=OPTIONAL)
    check_scan(1, packed=True)
    check_scan(19, packed=True, data=2)  # longer than a chunk, and rows split too
    check_scan(4, packed=True, implementation="reference")
    # Steps small enough for a state to cross every shard, and so large that nothing is left of it after one.
    check_scan(3, packed=False, dt_shift=-8.0)
    check_scan(3, packed=False, dt_shift=400.0)


CONV_SPECS = {
    "x": P("data", "sequence", None),
    "weight": P(),
    "bias": P(),
    "initial_state": P("data", None, None),
    "segment_ids": P("data", "sequence"),
}


def check_conv(shard, width, *, packed, without=(), data=1):
    length = shard * 8 // data
    r = np.random.default_rng(length)
    n = lambda *shape: jnp.asarray(r.standard_normal(shape))  # noqa: E731
    arguments = {"x": n(6, length, 3), "weight": n(width, 3), "bias": n(3), "initial_state": n(6, width - 1, 3)}
    cotangents = n(6, length, 3), n(6, width - 1, 3)
    arguments = {name: array for name, array in arguments.items() if name not in without}
    ids = jnp.asarray(documents(shard, 8 // data)) if packed else None
    results = P("data", "sequence", None), P("data", None, None)
    check_split(causal_conv, causal_conv_over, arguments, CONV_SPECS, results, cotangents, data=data, segment_ids=ids)


def check_convs():
    for packed in (False, True):
        check_conv(4, 4, packed=packed)
        check_conv(4, 4, packed=packed, without=("bias", "initial_state"))
        check_conv(2, 4, packed=packed)  # taps reach back over two shards
        check_conv(1, 4, packed=packed)  # and three
    check_conv(3, 4, packed=True, data=2)
    check_conv(1, 12, packed=True)  # longer than the sequence
    check_conv(2, 1, packed=True)


@pytest.mark.slow
def test_scan_over_eight_devices_equals_one(run_with_devices):
    in_eight_devices(run_with_devices, "check_scans()")


@pytest.mark.slow
def test_conv_over_eight_devices_equals_one(run_with_devices):
    in_eight_devices(run_with_devices, "check_convs()")


# A million tokens on a slice of sixteen TPU v5e

MILLION = 2**20
COLLECTIVE = re.compile(r"= \(?(.*?)\)? (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(-start)?\(")


@pytest.fixture
def sixteen_devices():
    """Those of a described v5e slice."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'blackmamba-jax[tpu-aot]'")
    from jax.experimental import topologies

    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            if name not in os.environ:
                environment.setenv(name, value)
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices


def slice_mesh(devices, **axes):
    from bm_jax.config import MeshConfig
    from bm_jax.sharding import make_mesh

    return make_mesh(MeshConfig(**axes), devices)


def collectives(text):
    """Kind and largest operand, in elements, of every collective of a compiled program."""
    for line in text.splitlines():
        found = COLLECTIVE.search(line)
        if found:
            shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", found[1])
            yield found[2], max(int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes)


def compile_stack(mesh, *, training, batch_size=1, length=MILLION):
    """The compiled forward pass, or loss and gradients, of a Mamba."""
    from bm_jax.config import MambaConfig, ModelConfig
    from bm_jax.loss import next_token_loss
    from bm_jax.model import forward, init_parameters
    from bm_jax.sharding import batch_sharding, parameter_shardings

    config = ModelConfig(layers=("mamba",), repeats=4, vocab_size=256, width=1024, mamba=MambaConfig(state_size=16))
    shapes = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
    with jax.set_mesh(mesh):
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        parameters = jax.tree.map(place, shapes, parameter_shardings(shapes, mesh))
        tokens = jax.ShapeDtypeStruct((batch_size, length + training), jnp.int32, sharding=batch_sharding(mesh))
        if training:
            loss = lambda parameters, batch: next_token_loss(parameters, batch, config, training=True, remat="full").objective  # noqa: E731
            batch = {"tokens": tokens, "segment_ids": tokens}
            return config, jax.jit(jax.value_and_grad(loss)).lower(parameters, batch).compile()
        run = jax.jit(lambda parameters, tokens: forward(parameters, tokens, config).hidden)
        return config, run.lower(parameters, tokens).compile()


@pytest.mark.slow
def test_a_million_tokens_forward_on_sixteen_devices(sixteen_devices):
    config, compiled = compile_stack(slice_mesh(sixteen_devices, data=1, sequence=16), training=False)
    assert "tpu_custom_call" in compiled.as_text()  # the kernel serves each shard
    (hidden,) = jax.tree.leaves(compiled.output_shardings)
    assert hidden.shard_shape((1, MILLION, config.width)) == (1, 65_536, config.width)
    check_traffic(config, compiled)
    assert device_bytes(compiled) < 6 * 2**30


@pytest.mark.slow
def test_a_million_tokens_of_training_fit_sixteen_devices(sixteen_devices):
    """Loss and every gradient."""
    config, compiled = compile_stack(slice_mesh(sixteen_devices, data=1, sequence=16), training=True)
    check_traffic(config, compiled)
    assert device_bytes(compiled) < 15.75 * 2**30  # what a v5e leaves to programs


@pytest.mark.slow
def test_batch_and_channels_split_without_gathering_the_batch(sixteen_devices):
    """The kernel in a mesh that leaves the sequence whole: XLA alone refuses to split it."""
    mesh = slice_mesh(sixteen_devices, data=4, fsdp=2, tensor=2)
    config, compiled = compile_stack(mesh, training=True, batch_size=16, length=4096)
    assert "tpu_custom_call" in compiled.as_text()
    own_rows = 2 * 4096 * config.inner_width  # of a device's two sequences, its channels from both sides of `tensor`
    assert max(size for kind, size in collectives(compiled.as_text()) if kind == "all-gather") <= own_rows


def device_bytes(compiled):
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def check_traffic(config, compiled):
    """Between devices travel carries, taps and gradients of parameters, never a sequence of activations."""
    found = list(collectives(compiled.as_text()))
    assert {kind for kind, _ in found} >= {"all-gather", "collective-permute"}
    carries = 16 * config.inner_width * config.mamba.state_size
    assert max(size for kind, size in found if kind == "all-gather") == carries
    assert max(size for kind, size in found if kind == "collective-permute") == 3 * config.inner_width
    assert max(size for _, size in found) <= 2 * config.width * config.inner_width  # the largest parameter, in_proj
    assert not any(kind == "all-to-all" for kind, _ in found)


# What is refused, and dtypes


def one_shard(operator, **options):
    """`operator` over a mesh of this one device."""
    mesh = jax.make_mesh((1,), ("sequence",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        lambda *arrays: operator("sequence", *arrays, **options),
        mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False,  # as above
    )  # fmt: skip


def test_outside_a_shard_map_is_refused():
    x, A, B, weight = (jnp.ones(shape) for shape in ((1, 4, 3), (3, 2), (1, 4, 2), (4, 3)))
    with pytest.raises(ValueError, match="selective_scan_over: axis_name 'time' is not an axis of a surrounding"):
        selective_scan_over("time", x, x, A, B, B)
    with pytest.raises(ValueError, match="causal_conv_over: axis_name 'time' is not an axis of a surrounding"):
        causal_conv_over("time", x, weight)


def test_what_does_not_fit_is_refused_by_name():
    x, A, B, weight = (jnp.ones(shape) for shape in ((1, 4, 3), (3, 2), (1, 4, 2), (4, 3)))
    with pytest.raises(ValueError, match=r"dt must have shape \(1, 4, 3\)"):
        one_shard(selective_scan_over)(x, x[:, 1:], A, B, B)
    with pytest.raises(ValueError, match=r"initial_state must have shape \(1, 3, 2\)"):
        one_shard(selective_scan_over, initial_state=x)(x, x, A, B, B)
    with pytest.raises(NotImplementedError, match="has no implementation 'nonesuch'"):
        one_shard(selective_scan_over, implementation="nonesuch")(x, x, A, B, B)
    with pytest.raises(ValueError, match=r"x must be \[B, L, E\]"):
        one_shard(causal_conv_over)(x[0], weight)
    with pytest.raises(ValueError, match="x needs at least one token"):
        one_shard(causal_conv_over)(x[:, :0], weight)
    with pytest.raises(ValueError, match=r"initial_state must have shape \(1, 3, 3\)"):
        one_shard(causal_conv_over, initial_state=x)(x, weight)
    with pytest.raises(ValueError, match=r"segment_ids must have shape \(1, 4\)"):
        one_shard(causal_conv_over, segment_ids=jnp.ones((1, 3), int))(x, weight)
    with pytest.raises(TypeError, match="segment_ids must be integers"):
        one_shard(causal_conv_over, segment_ids=jnp.ones((1, 4)))(x, weight)


def check_half_types():
    """Results have the types of the one-device operators, and equal them to the rounding of the narrower type."""
    arguments, _ = scan_arguments(32)
    half = {name: array.astype("bfloat16" if name in "u dt B C z".split() else "float32") for name, array in arguments.items()}
    conv = {"x": half["u"], "weight": jnp.ones((4, 3), "bfloat16"), "initial_state": jnp.ones((6, 3, 3), "float32")}
    results = P("data", "sequence", None), P("data", None, None)
    cases = (
        (selective_scan, selective_scan_over, half, SCAN_SPECS, ("bfloat16", "float32")),
        (causal_conv, causal_conv_over, conv, CONV_SPECS, ("bfloat16", "bfloat16")),
    )
    mesh = jax.make_mesh((1, 8), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    for one_device, operator, arrays, specs, dtypes in cases:
        wanted = jax.jit(one_device)(**arrays)
        with jax.set_mesh(mesh):
            got = jax.jit(over(operator, specs, results, arrays))(arrays)
        for a, b, dtype in zip(got, wanted, dtypes, strict=True):
            assert a.dtype == b.dtype == dtype
            tolerance = 1e-5 if dtype == "float32" else 1e-2
            np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_half_types(run_with_devices):
    in_eight_devices(run_with_devices, "check_half_types()")
