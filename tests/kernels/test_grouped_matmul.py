"""Every implementation of the grouped product against a NumPy float64 loop over groups."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.test_util import check_grads

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import grouped_matmul, pallas_gpu, pallas_tpu, xla
from pallas_kernels.grouped_matmul.pallas_gpu import grouped_matmul_gpu
from pallas_kernels.grouped_matmul.pallas_tpu import grouped_matmul_tpu

ROWS, GROUPS, K, N = 40, 4, 5, 6

LOADS = {
    "balanced": [10, 10, 10, 10],
    "near balance": [12, 8, 9, 11],
    "one empty": [14, 0, 13, 13],
    "first empty": [0, 14, 13, 13],
    "last empty": [13, 14, 13, 0],
    "one takes all": [0, 0, 40, 0],
    "skewed": [20, 1, 18, 1],
    "rows of no group": [9, 10, 0, 11],
    "rows of no group, skewed": [0, 30, 1, 2],
    "no rows in any group": [0, 0, 0, 0],
}


@pytest.fixture(params=["xla", "reference", "xla, accelerators"])
def implementation(request, monkeypatch):
    """Each implementation that serves any shape; what `xla` does on accelerators counts as one more."""
    if request.param == "xla, accelerators":
        monkeypatch.setattr(xla.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))
    return request.param


def oracle(lhs, rhs, sizes, d_out):
    """Product and gradients of sum(product * d_out)."""
    out, d_lhs, d_rhs, start = np.zeros_like(d_out), np.zeros_like(lhs), np.zeros_like(rhs), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = lhs[rows] @ rhs[group]
        d_lhs[rows] = d_out[rows] @ rhs[group].T
        d_rhs[group] = lhs[rows].T @ d_out[rows]
        start += size
    return out, d_lhs, d_rhs


def product(lhs, rhs, sizes, implementation):
    return grouped_matmul(lhs, rhs, sizes, implementation=implementation.split(",")[0])


@functools.partial(jax.jit, static_argnames="implementation")
@jax.default_matmul_precision("highest")  # GPUs round float32 to 10 bits without
def product_and_gradients(lhs, rhs, sizes, d_out, implementation):
    out, pullback = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes, implementation), lhs, rhs)
    return out, *pullback(d_out)


def make(dtype=np.float64, rows=ROWS, groups=GROUPS):
    n = np.random.default_rng(0).standard_normal
    return tuple(jnp.asarray(n(shape), dtype) for shape in ((rows, K), (groups, K, N), (rows, N)))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("load", LOADS)
def test_matches_the_loop_in_value_and_gradient(implementation, load, dtype):
    with jax.enable_x64(dtype == "float64"):
        arguments = make(jnp.dtype(dtype))
        got = product_and_gradients(*arguments[:2], jnp.array(LOADS[load]), arguments[2], implementation)
        lhs, rhs, d_out = (np.asarray(a, np.float64) for a in arguments)
        # Sums of at most 40 products of unit size, exact in float64 to 1e-14. bfloat16 rounds sums of size up to 20
        # once (2**-8 of them) when it accumulates in float32, as every backend does.
        rtol, atol = {"float64": (0, 1e-13), "float32": (0, 2e-5), "bfloat16": (2**-8, 2e-2)}[dtype]
        for name, x, wanted in zip(("out", "d_lhs", "d_rhs"), got, oracle(lhs, rhs, LOADS[load], d_out), strict=True):
            assert x.dtype == jnp.dtype(dtype), name
            np.testing.assert_allclose(np.asarray(x, np.float64), wanted, rtol=rtol, atol=atol, err_msg=name)
            assert not np.any(np.asarray(x)[wanted == 0]), f"{name} is not exactly zero in rows of no group"


def test_the_loads_take_every_branch_of_xla():
    taken = {name: max(sizes) <= xla._capacity(ROWS, GROUPS) for name, sizes in LOADS.items()}
    assert taken["balanced"]
    assert taken["rows of no group"]
    assert not taken["one takes all"]
    assert not taken["rows of no group, skewed"]


@pytest.mark.parametrize("load", ["balanced", "rows of no group", "no rows in any group"])
def test_all_forms_of_xla_agree_where_all_apply(load, x64):
    lhs, rhs, _ = make()
    sizes = jnp.array(LOADS[load])
    ragged = jax.jit(xla._ragged)(lhs, rhs, sizes)
    for form in (xla._padded, xla._blocked):
        product = jax.jit(lambda lhs, rhs, sizes, form=form: form(ROWS, sizes).product(lhs, rhs))
        np.testing.assert_allclose(product(lhs, rhs, sizes), ragged, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", [5, 63, 64, 65, 200, 300])
def test_any_load_fits_in_the_blocks(rows):
    """Every assigned row has a slot of its own in a block of its own group, whatever the load."""
    r = np.random.default_rng(rows)
    slots_of = jax.jit(lambda sizes: tuple(vars(xla._blocked(rows, sizes)).values()))
    loads = [r.multinomial(r.integers(rows + 1), r.dirichlet(np.full(GROUPS, 0.3))) for _ in range(30)]
    for sizes in (*loads, [rows, 0, 0, 0], [0, 0, 0, rows], [rows - 1, 0, 0, 1], [0, 0, 0, 0]):
        row, filled, slot, placed, owner = map(np.asarray, slots_of(jnp.asarray(sizes, jnp.int32)))
        group = np.repeat(np.arange(GROUPS), sizes)
        assigned = len(group)
        np.testing.assert_array_equal(placed, np.arange(rows) < assigned)
        np.testing.assert_array_equal(np.sort(row[filled]), np.arange(assigned))
        np.testing.assert_array_equal(row.reshape(-1)[slot[:assigned]], np.arange(assigned))
        assert filled.reshape(-1)[slot[:assigned]].all()
        np.testing.assert_array_equal(owner[slot[:assigned] // row.shape[1]], group)


@pytest.mark.parametrize("load", ["rows of no group", "one takes all"])
def test_gradients_by_finite_differences(implementation, load, x64):
    lhs, rhs, _ = make()
    sizes = jnp.array(LOADS[load])
    function = jax.jit(lambda lhs, rhs: product(lhs, rhs, sizes, implementation))
    check_grads(function, (lhs, rhs), 1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "sizes"), [(1, [0, 1, 0, 0]), (1, [0, 0, 0, 0]), (3, [1, 1, 0, 1]), (2, [0, 2, 0, 0]), (7, [7])]
)
def test_few_rows(implementation, rows, sizes, x64):
    """Fewer rows than groups, as in decoding; one group alone."""
    lhs, rhs, d_out = make(rows=rows, groups=len(sizes))
    got = product_and_gradients(lhs, rhs, jnp.array(sizes), d_out, implementation)
    for x, wanted in zip(got, oracle(*map(np.asarray, (lhs, rhs)), sizes, np.asarray(d_out)), strict=True):
        np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("load", ["one empty", "one takes all"])
def test_vmap(implementation, load, x64):
    """Per-example gradients: rows and cotangents mapped, the matrices shared."""
    lhs, rhs, d_out = make()
    sizes = jnp.array(LOADS[load])
    mapped = jax.vmap(product_and_gradients, (0, None, None, 0, None))
    got = mapped(jnp.stack([lhs, 2 * lhs]), rhs, sizes, jnp.stack([d_out, -d_out]), implementation)
    for i, scaled in enumerate([(lhs, d_out), (2 * lhs, -d_out)]):
        wanted = oracle(*map(np.asarray, (scaled[0], rhs)), LOADS[load], np.asarray(scaled[1]))
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=0, atol=1e-12)


def test_what_lies_in_rows_of_no_group_does_not_matter(implementation):
    """Not even NaN, in value and in gradient."""
    lhs, rhs, d_out = make(np.float32)
    for sizes in ([9, 10, 0, 11], [0, 29, 1, 0]):
        dirty = lhs.at[30:].set(jnp.nan), d_out.at[30:].set(jnp.nan)
        out, d_lhs, d_rhs = product_and_gradients(dirty[0], rhs, jnp.array(sizes), d_out, implementation)
        assert np.isfinite(out).all()
        assert np.isfinite(d_rhs).all()
        assert np.isfinite(d_lhs).all()
        _, d_lhs, d_rhs = product_and_gradients(lhs, rhs, jnp.array(sizes), dirty[1], implementation)
        assert np.isfinite(d_rhs).all()
        assert np.isfinite(d_lhs).all()


def test_mixed_dtypes_promote(implementation):
    lhs, rhs, _ = make(np.float32)
    out = jax.eval_shape(lambda: product(lhs.astype(jnp.bfloat16), rhs, jnp.array([10] * 4), implementation))
    assert out.dtype == jnp.float32


def test_refusals(implementation):
    lhs, rhs, _ = make(np.float32)
    sizes = jnp.array([10] * 4)
    with pytest.raises(ValueError, match=r"lhs must be \[T, K\]"):
        product(lhs[None], rhs, sizes, implementation)
    with pytest.raises(ValueError, match="must agree in K"):
        product(lhs[:, :3], rhs, sizes, implementation)
    with pytest.raises(ValueError, match="group_sizes must have shape"):
        product(lhs, rhs, sizes[:3], implementation)
    with pytest.raises(TypeError, match="group_sizes must be integers"):
        product(lhs, rhs, sizes.astype(jnp.float32), implementation)
    with pytest.raises(NotImplementedError, match="grouped_matmul has no implementation 'magic'"):
        grouped_matmul(lhs, rhs, sizes, implementation="magic")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(implementation, platform):
    shapes = jax.eval_shape(lambda: make(jnp.bfloat16))
    sizes = jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
    exported = jax.export.export(product_and_gradients, platforms=[platform])
    exported(*shapes[:2], sizes, shapes[2], implementation=implementation)


LARGE_ROWS, LARGE_K, LARGE_N = 384, 256, 384
LARGE_LOADS = {
    "even": [96, 96, 96, 96],
    "borders inside tiles": [101, 0, 150, 133],
    "few rows, and rows of no group": [1, 7, 70, 0],
    "one takes all": [0, 384, 0, 0],
    "no rows in any group": [0, 0, 0, 0],
    "sizes past the last row": [100, 200, 300, 400],
}


@pytest.fixture(params=["pallas_gpu", "pallas_gpu, interpreted", "pallas_tpu, interpreted"])
def kernel(request, monkeypatch):
    """The kernels, compiled where the tests run on their hardware, and interpreted."""
    if request.param == "pallas_tpu, interpreted":
        return functools.partial(grouped_matmul_tpu, interpret=True)
    if request.param == "pallas_gpu":
        if jax.default_backend() != "gpu":
            pytest.skip("needs a GPU of compute capability 9.0")
        return functools.partial(grouped_matmul, implementation="pallas_gpu")
    if not hasattr(plgpu, "InterpretGPUParams") or jax.default_backend() != "cpu":
        pytest.skip("Mosaic GPU's copies and barriers are interpreted on CPUs, by a jax that can")
    monkeypatch.setattr(pallas_gpu, "processors", lambda: 2)
    return functools.partial(grouped_matmul_gpu, interpret=plgpu.InterpretGPUParams(uninitialized_memory="nan"))


def together(kernel):
    """The product and its gradients in one program."""

    @jax.jit
    def run(lhs, rhs, sizes, d_out):
        out, pullback = jax.vjp(lambda lhs, rhs: kernel(lhs, rhs, sizes), lhs, rhs)
        return out, *pullback(d_out)

    return run


def one_by_one(interpret):
    """The same, a program each: interpreted kernels that run side by side can wait for each other's threads for ever."""
    forward = jax.jit(functools.partial(pallas_gpu.product, interpret=interpret))
    backward = jax.jit(functools.partial(pallas_gpu.product, transposed=True, interpret=interpret))
    gradient = jax.jit(functools.partial(pallas_gpu.matrix_gradient, interpret=interpret))

    def run(lhs, rhs, sizes, d_out):
        out = jax.block_until_ready(forward(lhs, rhs, sizes))
        d_lhs = jax.block_until_ready(backward(d_out, rhs, sizes))
        return out, d_lhs, jax.block_until_ready(gradient(lhs, d_out, sizes))

    return run


@pytest.mark.slow
def test_kernels_match_the_loop_in_value_and_gradient(kernel):
    """Rows of no group hold NaN, which must reach nothing."""
    n = np.random.default_rng(0).standard_normal
    shapes = (LARGE_ROWS, LARGE_K), (GROUPS, LARGE_K, LARGE_N), (LARGE_ROWS, LARGE_N)
    lhs, rhs, d_out = (jnp.asarray(n(shape), jnp.bfloat16) for shape in shapes)

    run = one_by_one(kernel.keywords["interpret"]) if kernel.func is grouped_matmul_gpu else together(kernel)
    for load, sizes in LARGE_LOADS.items():
        nowhere = (np.arange(LARGE_ROWS) >= sum(sizes))[:, None]
        got = run(jnp.where(nowhere, jnp.nan, lhs), rhs, jnp.array(sizes), jnp.where(nowhere, jnp.nan, d_out))
        sizes = np.diff(np.minimum(np.cumsum(sizes), LARGE_ROWS), prepend=0)
        wanted = oracle(*(np.asarray(a, np.float64) for a in (lhs, rhs)), sizes, np.asarray(d_out, np.float64))
        for name, x, y in zip(("out", "d_lhs", "d_rhs"), got, wanted, strict=True):
            # Sums of up to 384 products of unit size in float32, rounded once to bfloat16: 2**-8 of the value.
            np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=2**-8, atol=1e-3, err_msg=f"{load}: {name}")
            assert not np.any(np.asarray(x)[y == 0]), f"{load}: {name} is not exactly zero where nothing is summed"


@pytest.mark.slow
def test_kernels_take_many_rows_and_other_shapes(kernel):
    """More tiles in rows than share a band, one group, rows that are no multiple of anything but 8."""
    if kernel.func is grouped_matmul_tpu:
        pytest.skip("its shapes are megablox's own")
    n = np.random.default_rng(2).standard_normal
    cases = ((2312, 3, jnp.float16, [1, 2200, 50]), (8, 1, jnp.bfloat16, [5]), (16, 9, jnp.bfloat16, [2] * 8 + [0]))
    for rows, groups, dtype, sizes in cases:
        lhs, rhs = jnp.asarray(n((rows, 64)), dtype), jnp.asarray(n((groups, 64, 256 if rows == 8 else 64)), dtype)
        out = jax.jit(kernel)(lhs, rhs, jnp.array(sizes))
        wanted, *_ = oracle(np.asarray(lhs, np.float64), np.asarray(rhs, np.float64), sizes, np.zeros(out.shape))
        np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=2**-8, atol=1e-3)


@pytest.mark.slow
def test_kernels_repeat_bit_for_bit(kernel):
    n = np.random.default_rng(1).standard_normal
    lhs, rhs = (jnp.asarray(n(shape), jnp.bfloat16) for shape in ((LARGE_ROWS, 64), (2, 64, 128)))
    gradient = jax.jit(jax.grad(lambda rhs: jnp.sum(kernel(lhs, rhs, jnp.array([100, 200])).astype(jnp.float32) ** 2)))
    if kernel.func is grouped_matmul_tpu:
        rhs, lhs = jnp.tile(rhs, (1, 2, 1)), jnp.tile(lhs, (1, 2))
    np.testing.assert_array_equal(np.asarray(gradient(rhs)), np.asarray(gradient(rhs)))


@pytest.mark.parametrize(("width", "wanted"), [(64, 128), (256, 256), (384, 192), (1152, 192), (3072, 256), (6144, 256)])
def test_tiles_leave_few_columns_unused(width, wanted):
    assert pallas_gpu.width(width) == wanted


@pytest.mark.parametrize("rows", [8, 384, 1000])
def test_every_row_is_in_a_tile_of_its_group(rows):
    r = np.random.default_rng(rows)
    tiles_of = jax.jit(lambda sizes: pallas_gpu.row_tiles(sizes, rows))
    loads = [r.multinomial(r.integers(rows + 1), r.dirichlet(np.full(GROUPS, 0.3))) for _ in range(30)]
    for sizes in (*loads, [rows, 0, 0, 0], [0, 0, 0, rows], [0, 0, 0, 0], [rows, 5, rows, 7]):
        tiles, before = jax.device_get(tiles_of(jnp.asarray(sizes, jnp.int32)))
        count = before[-1]
        assert count <= len(tiles.group)
        sizes = np.diff(np.minimum(np.cumsum(sizes), rows), prepend=0)
        wanted = np.repeat(np.arange(GROUPS + 1), [*sizes, rows - sum(sizes)])
        seen = np.full(rows, -1)
        for group, row, low, high in zip(*(x[:count] for x in tiles), strict=True):
            assert row % pallas_gpu.ALIGNED == 0
            inside = slice(max(row, low), min(row + pallas_gpu.ROWS, high))
            assert (seen[inside] == -1).all(), "a row in two tiles"
            seen[inside] = group
        np.testing.assert_array_equal(seen, wanted)


def test_kernels_lower_for_cuda():
    def both(lhs, rhs, sizes, d_out):
        out, pullback = jax.vjp(lambda lhs, rhs: grouped_matmul_gpu(lhs, rhs, sizes), lhs, rhs)
        return out, *pullback(d_out)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, 1152), (8, 1152, 6144), (1024, 6144))]
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(both), platforms=["cuda"], disabled_checks=checks)(*shapes[:2], sizes, shapes[2])
    assert exported.mlir_module().count("@mosaic_gpu_v2") == 3  # the product and two gradients


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels.grouped_matmul.pallas_tpu import grouped_matmul_tpu

device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
sharding = jax.sharding.SingleDeviceSharding(device)
def both(lhs, rhs, sizes, d_out):
    out, pullback = jax.vjp(lambda lhs, rhs: grouped_matmul_tpu(lhs, rhs, sizes), lhs, rhs)
    return out, *pullback(d_out)
def kind(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
for T, K, N in ((16384, 1152, 6144), (16384, 3072, 1152)):
    jax.jit(both).lower(kind(T, K), kind(8, K, N), kind(8, dtype=jnp.int32), kind(T, N)).compile()
print("compiled")
"""


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_megablox_compiles_ahead_of_time(topology):
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'blackmamba-jax[tpu-aot]'")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, "-c", COMPILE, topology]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "compiled" in result.stdout


def test_kernels_say_what_they_cannot_serve(x64):
    arguments = {"lhs": jnp.zeros((128, 128), jnp.bfloat16), "rhs": jnp.zeros((2, 128, 128), jnp.bfloat16), "group_sizes": None}
    targets = {pallas_gpu: dispatch.Target("gpu", "a GPU", 9.0), pallas_tpu: dispatch.Target("tpu", "a TPU")}
    for module, target in targets.items():

        def why(module=module, target=target, **changed):
            return module.refusal(dispatch.Call(target, arguments | changed))

        assert "jax_enable_x64" in why()
        with jax.enable_x64(False):
            assert why() is None
            assert "K and N in multiples" in why(rhs=jnp.zeros((2, 128, 100), jnp.bfloat16))
            assert "not int8" in why(lhs=jnp.zeros((128, 128), jnp.int8), rhs=jnp.zeros((2, 128, 128), jnp.int8))
            assert "needs a" in why(target=dispatch.Target("cpu", "a CPU"))
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
                assert "inside shard_map" in why()
