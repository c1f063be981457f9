"""Every implementation of the selective scan against a NumPy float64 loop that shares no code with any of them."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.dispatch import Call, target
from pallas_kernels.selective_scan import pallas_gpu_work, selective_scan, xla
from pallas_kernels.selective_scan.api import IMPLEMENTATIONS
from pallas_kernels.selective_scan.pallas_gpu import scan_gpu
from pallas_kernels.selective_scan.pallas_tpu import scan_tpu
from pallas_kernels.selective_scan.triton_gpu import scan_triton

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def oracle(arguments, segment_ids, dt_softplus, dy, d_final):
    """y, final state and the gradient of sum(y * dy) + sum(final * d_final) for each argument, all float64."""
    a = {name: None if value is None else np.asarray(value, np.float64) for name, value in arguments.items()}
    u, A, B, C = a["u"], a["A"], a["B"], a["C"]
    batch, length, channels = u.shape
    raw = a["dt"] + (0 if a["dt_bias"] is None else a["dt_bias"])
    step = np.logaddexp(0, raw) if dt_softplus else raw
    gate = np.ones_like(u) if a["z"] is None else a["z"] * sigmoid(a["z"])
    skip = np.zeros(channels) if a["D"] is None else a["D"]
    keep = np.ones((batch, length))
    if segment_ids is not None:
        keep[:, 1:] = segment_ids[:, 1:] == segment_ids[:, :-1]

    state = np.zeros((batch, channels, A.shape[1])) if a["initial_state"] is None else a["initial_state"]
    before, after, plain = [], [], np.zeros_like(u)
    for t in range(length):
        before.append(state * keep[:, t, None, None])
        state = np.exp(step[:, t, :, None] * A) * before[t] + (step[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        after.append(state)
        plain[:, t] = (state * C[:, t, None, :]).sum(-1) + skip * u[:, t]
    y = plain * gate

    d_plain = dy * gate
    d = {name: np.zeros_like(value) for name, value in a.items() if value is not None}
    d["u"] += d_plain * skip
    d_step, g = np.zeros_like(step), d_final.copy()
    for t in reversed(range(length)):
        g = g + d_plain[:, t, :, None] * C[:, t, None, :]
        decay = np.exp(step[:, t, :, None] * A)
        d["C"][:, t] = (d_plain[:, t, :, None] * after[t]).sum(1)
        d["B"][:, t] = (g * (step[:, t] * u[:, t])[..., None]).sum(1)
        g_B = (g * B[:, t, None, :]).sum(-1)
        d["u"][:, t] += step[:, t] * g_B
        d_exponent = g * before[t] * decay
        d_step[:, t] = u[:, t] * g_B + (d_exponent * A).sum(-1)
        d["A"] += (d_exponent * step[:, t, :, None]).sum(0)
        g = g * decay * keep[:, t, None, None]
    if "initial_state" in d:
        d["initial_state"] = g
    d["dt"] = d_step * sigmoid(raw) if dt_softplus else d_step
    if "dt_bias" in d:
        d["dt_bias"] = d["dt"].sum((0, 1))
    if "D" in d:
        d["D"] = (d_plain * u).sum((0, 1))
    if "z" in d:
        s = sigmoid(a["z"])
        d["z"] = dy * plain * (s + a["z"] * s * (1 - s))
    return y, state, d


def make(length, *, batch=2, channels=3, states=8, without=(), wide=(), dt_shift=0.0, A_scale=1.0, dtype=np.float64, seed=0):
    """Random arguments; those that a model keeps in float32, and those in `wide`, stay so when `dtype` is a half type."""
    r = np.random.default_rng(seed + length)
    n = r.standard_normal
    arguments = {
        "u": n((batch, length, channels)),
        "dt": n((batch, length, channels)) + dt_shift,
        "A": -A_scale * np.exp(n((channels, states))),
        "B": n((batch, length, states)),
        "C": n((batch, length, states)),
        "D": n(channels),
        "z": n((batch, length, channels)),
        "dt_bias": n(channels),
        "initial_state": n((batch, channels, states)),
    }
    full = jnp.promote_types(dtype, jnp.float32)
    half = {"u", "dt", "B", "C", "z"} - set(wide)
    return {
        name: None if name in without else jnp.asarray(value, dtype if name in half else full)
        for name, value in arguments.items()
    }


def by_triton_interpreter(name, grid, inputs, outputs, options, warps):
    """Run a Triton kernel on this machine, its outputs full of NaN before; Triton's interpreter takes PyTorch's tensors."""
    import torch

    from pallas_kernels.selective_scan import triton_gpu_kernels

    def tensor(array):
        array = np.asarray(array)
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    def array(tensor):
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()

    def run(*arrays):
        results = [tensor(np.full(x.shape, np.nan, x.dtype)) for x in outputs]
        getattr(triton_gpu_kernels, name)[grid](*map(tensor, arrays), *results, num_warps=warps, **options)
        return [array(x) for x in results]

    return jax.pure_callback(run, outputs, *inputs, vmap_method="sequential")


INTERPRETED = {
    "pallas_gpu, interpreted": scan_gpu(interpret=True),
    "pallas_tpu, interpreted": scan_tpu(interpret=True),
    "triton_gpu, interpreted": scan_triton(by_triton_interpreter),
}
"""The kernels, run by interpreters that need none of their hardware."""


def function_of(form):
    """The scan of a form's name: an implementation's, with what is peculiar to the form after a comma."""
    if form == "triton_gpu, interpreted":
        pytest.importorskip("triton", reason="needs triton: pip install 'blackmamba-jax[triton]'")
        pytest.importorskip("torch", reason="needs torch: pip install 'blackmamba-jax[parity]'")
    return INTERPRETED.get(form) or functools.partial(selective_scan, implementation=form.split(",")[0])


@functools.partial(jax.jit, static_argnames=("form", "dt_softplus"))
def run(arguments, segment_ids, cotangents, *, form, dt_softplus):
    """What `oracle` returns, from an implementation."""

    def scan(arguments):
        positional = [arguments[name] for name in ("u", "dt", "A", "B", "C", "D")]
        named = {name: arguments[name] for name in ("z", "dt_bias", "initial_state")}
        return function_of(form)(*positional, **named, dt_softplus=dt_softplus, segment_ids=segment_ids)

    results, pullback = jax.vjp(scan, arguments)
    return *results, pullback(cotangents)[0]


def check(name, got, wanted, argument_dtype):
    assert got.dtype == argument_dtype, name
    assert got.shape == wanted.shape, name
    error = np.abs(np.asarray(got, np.float64) - wanted)
    scale = np.abs(wanted).max() if wanted.size else 0.0
    # float64: 63 dependent steps of rounding 1e-16, sums of some hundred terms and exponents of size up to 100 (whose
    # rounding exp multiplies by their size) stay below 1e-12 of the largest value. float32: the same with 6e-8, so 1e-5
    # leaves a factor of about 2 on the worst case (huge steps). Half types compute in float32 and round once, at last.
    limit = (1e-12 if got.dtype == jnp.float64 else 1e-5) * scale + 1e-30
    if got.dtype == jnp.bfloat16:
        limit = limit + 2.0**-8 * np.abs(wanted)  # half the distance between neighbours is 2**-9 to 2**-8 of the value
    assert (error <= limit).all(), f"{name}: error {error.max():.2e} at scale {scale:.2e}"


RUNS = np.repeat(np.arange(1, 60), 5)  # documents of five tokens

CASES = {
    **{f"length {length}": {"length": length} for length in (1, 2, 3, 15, 16, 17, 32)},
    "length 63, 16 states": {"length": 63, "states": 16},
    "length 64, 32 states": {"length": 64, "states": 32},
    "length 33, 64 states": {"length": 33, "states": 64, "batch": 1},
    "length 257, 70 channels": {"length": 257, "batch": 1, "channels": 70, "states": 16},
    "no options": {"length": 17, "without": ("D", "z", "dt_bias", "initial_state"), "segments": None},
    "no gate, no state": {"length": 5, "without": ("z", "initial_state"), "segments": None},
    "no skip, no bias": {"length": 5, "without": ("D", "dt_bias")},
    "steps as given": {"length": 18, "dt_softplus": False, "dt_shift": 4.0, "segments": None},
    # Row r starts its second document at token r: every offset in a chunk, its first and its last included.
    "every offset": {"length": 18, "batch": 18, "segments": np.arange(18)[None, :] >= np.arange(18)[:, None]},
    "every offset of 32": {"length": 34, "batch": 34, "segments": np.arange(34)[None, :] >= np.arange(34)[:, None]},
    "dt wider than u": {"length": 33, "channels": 40, "wide": ("dt",)},
    "u wider than dt": {"length": 5, "wide": ("u", "B")},
    # A document starts at the last token of a chunk of 128, at the first one of the next, and at the one after.
    "borders of a long chunk": {
        "length": 260,
        "batch": 3,
        "segments": np.arange(260)[None, :] >= np.array([[127], [128], [129]]),
    },
    "ids that come back": {"length": 17, "segments": np.array([[1, 1, 2, 2, 1] * 3 + [1, 1], [3, 1] * 8 + [0]])},
    "tiny steps": {"length": 18, "dt_shift": -30.0},
    "huge steps": {"length": 18, "dt_shift": 300.0},
    "fast decay": {"length": 18, "A_scale": 1e4},
}
EXTREME = ("tiny steps", "huge steps", "fast decay")
MIXED = ("dt wider than u", "u wider than dt")
LONG = (
    "length 64, 32 states", "length 33, 64 states", "length 257, 70 channels", "every offset of 32", "borders of a long chunk",
)  # fmt: skip
RUN = {
    "float64": [case for case in CASES if case not in EXTREME + LONG + MIXED],
    "float32": ["length 63, 16 states", *EXTREME],
    "bfloat16": ["length 17", *MIXED],
}
RUN_KERNELS = {
    "float32": [case for case in CASES if case not in MIXED],
    "bfloat16": ["length 3", "length 63, 16 states", "length 257, 70 channels", "no options", *MIXED],
}


FEW = ("length 17", "no options")
"""Cases that every Python runs; the interpreters take seconds for each."""

SLOW_FOR_TRITON = ("every offset of 32", "borders of a long chunk")


def serves_here(row, dtype):
    """Whether an implementation computes small calls on this machine."""
    with jax.enable_x64(dtype == "float64"):
        return row.refusal(Call(target(), make(17, dtype=np.dtype(dtype)))) is None


FORMS = [*(name for name, row in IMPLEMENTATIONS.items() if serves_here(row, "float64")), "xla, accelerators"]
KERNELS = [*INTERPRETED, *(name for name, row in IMPLEMENTATIONS.items() if serves_here(row, "float32") and name not in FORMS)]
"""Forms that compute in float32 only."""


@pytest.fixture(params=FORMS)
def implementation(request, monkeypatch):
    """Each implementation; the inner form that `xla` takes on accelerators counts as one more."""
    if request.param == "xla, accelerators":
        monkeypatch.setattr(xla.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))
        monkeypatch.setattr(xla, "CHUNK", 4)  # a chunk of 16 unrolled takes CPUs many seconds to compile
    return request.param


@pytest.mark.parametrize(
    ("implementation", "dtype", "case"),
    [(implementation, dtype, case) for implementation in FORMS for dtype in RUN for case in RUN[dtype]
     # Slow to compile on CPUs, and the other lengths have every kind of last chunk.
     if not (implementation == "xla, accelerators" and case in ("length 2", "length 15", "length 16", "length 32"))]
    + [pytest.param(implementation, dtype, case,
                    marks=[] if implementation not in INTERPRETED or case in FEW else [pytest.mark.slow])
       for implementation in KERNELS for dtype in RUN_KERNELS for case in RUN_KERNELS[dtype]
       # Triton's interpreter is slow, and truncates to bfloat16 where the GPU rounds.
       if not (implementation == "triton_gpu, interpreted" and (dtype == "bfloat16" or case in SLOW_FOR_TRITON))],
    indirect=["implementation"],
)  # fmt: skip
def test_matches_the_loop_in_value_and_gradient(implementation, dtype, case):
    options = dict(CASES[case])
    dt_softplus = options.pop("dt_softplus", True)
    with jax.enable_x64(dtype == "float64"):
        segments = options.pop("segments", RUNS[None, : options["length"]].repeat(options.get("batch", 2), 0))
        segments = None if segments is None else segments.astype(np.int32)
        arguments = make(**options, dtype=jnp.dtype(dtype))
        r = np.random.default_rng(1)
        dy = np.asarray(jnp.asarray(r.standard_normal(arguments["u"].shape), arguments["u"].dtype), np.float64)
        d_final = r.standard_normal((arguments["u"].shape[0], *arguments["A"].shape))
        wide = jnp.promote_types(dtype, jnp.float32)
        cotangents = jnp.asarray(dy, arguments["u"].dtype), jnp.asarray(d_final, wide)
        y, final, gradients = run(arguments, segments, cotangents, form=implementation, dt_softplus=dt_softplus)
        wanted_y, wanted_final, wanted = oracle(arguments, segments, dt_softplus, dy, d_final)
        check("y", y, wanted_y, arguments["u"].dtype)
        check("final state", final, wanted_final, wide)
        for name, gradient in wanted.items():
            check(f"gradient of {name}", gradients[name], gradient, arguments[name].dtype)


def test_gradients_by_finite_differences(implementation, x64):
    arguments = make(5, batch=1, channels=2, states=2)
    segments = jnp.array([[1, 1, 2, 2, 2]])

    def scan(u, dt, A, B, C, D, z, dt_bias, initial_state):
        return selective_scan(
            u, dt, A, B, C, D, z=z, dt_bias=dt_bias, initial_state=initial_state, segment_ids=segments,
            implementation=implementation.split(",")[0],
        )  # fmt: skip

    check_grads(jax.jit(scan), tuple(arguments.values()), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@functools.partial(jax.jit, static_argnames="form")
def jitted(arguments, segment_ids, form):
    positional = [arguments[name] for name in ("u", "dt", "A", "B", "C", "D")]
    named = {name: arguments[name] for name in ("z", "dt_bias", "initial_state")}
    implementation = None if form is None else form.split(",")[0]
    return selective_scan(*positional, **named, segment_ids=segment_ids, implementation=implementation)


def call(form, arguments, segment_ids=None):
    return jitted(arguments, segment_ids, form)


def cut(arguments, start, stop, **changes):
    """The tokens from `start` to `stop`."""
    along_time = ("u", "dt", "B", "C", "z")
    return {k: v[:, start:stop] if k in along_time else v for k, v in arguments.items()} | changes


def test_two_runs_with_carried_state_equal_one(implementation, x64):
    arguments = make(36)
    y, final = call(implementation, arguments)
    first, state = call(implementation, cut(arguments, 0, 18))
    second, state = call(implementation, cut(arguments, 18, 36, initial_state=state))
    np.testing.assert_allclose(np.concatenate([first, second], 1), y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state, final, rtol=1e-12, atol=1e-12)


def test_packed_documents_equal_documents_alone(implementation, x64):
    arguments = make(54)
    segments = jnp.asarray(np.repeat([7, 2, 7], 18)[None].repeat(2, 0))
    y, final = call(implementation, arguments, segments)
    zero = jnp.zeros_like(arguments["initial_state"])
    states = [arguments["initial_state"], zero, zero]  # the first document continues the initial state
    for start, state in zip([0, 18, 36], states, strict=True):
        alone, last = call(implementation, cut(arguments, start, start + 18, initial_state=state))
        np.testing.assert_allclose(y[:, start : start + 18], alone, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(final, last, rtol=1e-12, atol=1e-12)


def test_the_backward_pass_stays_in_its_document_and_repeats_bit_for_bit(implementation, x64):
    """Gradients of the second document's outputs are exactly zero in the first document and the initial state."""
    arguments = make(17)
    segments = (np.arange(17) >= 9)[None].repeat(2, 0).astype(np.int32)
    dy = jnp.zeros((2, 17, 3)).at[:, 9:].set(1)
    cotangents = dy, jnp.ones_like(arguments["initial_state"])
    once, again = (run(arguments, segments, cotangents, form=implementation, dt_softplus=True) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    gradients = once[2]
    assert not np.any(gradients["initial_state"])
    for name in ("u", "dt", "B", "C", "z"):
        assert not np.any(gradients[name][:, :9]), name
        assert np.all(gradients[name][:, 9:] != 0), name


@pytest.mark.parametrize("form", [form for form in KERNELS if form != "triton_gpu, interpreted"])  # one program at a time
def test_two_backward_runs_of_a_kernel_agree_bit_for_bit(form):
    """On a GPU, of the kernel itself; elsewhere the interpreters leave no other way."""
    arguments = make(100, channels=70, states=16, dtype=np.float32)
    segments = np.repeat(np.arange(20), 5)[None].repeat(2, 0).astype(np.int32)
    r = np.random.default_rng(2)
    cotangents = tuple(jnp.asarray(r.standard_normal(shape), jnp.float32) for shape in ((2, 100, 70), (2, 70, 16)))
    once, again = (run(arguments, segments, cotangents, form=form, dt_softplus=True) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_the_two_inner_forms_of_xla_agree(x64):
    """Called directly on one chunk, with a reset inside."""
    r = np.random.default_rng(0)
    T, B, N, E = 16, 2, 4, 3
    keep = np.ones((T, B))
    keep[5, 0] = 0
    tokens = xla.Tokens(
        *(jnp.asarray(r.random(shape)) for shape in ((T, B, E), (T, B, E), (T, B, N), (T, B, N))), jnp.asarray(keep)
    )
    A, state, g = -jnp.asarray(r.random((N, E))), jnp.asarray(r.random((B, N, E))), jnp.asarray(r.random((B, N, E)))
    dy = jnp.asarray(r.random((T, B, E)))
    pairs = [
        (jax.jit(f)(*args), jax.jit(g)(*args))
        for f, g, args in (
            (xla._outputs_by_loop, xla._outputs_by_doubling, (tokens, A, state)),
            (xla._gradients_by_loop, xla._gradients_by_doubling, (tokens, state, dy, A, g)),
        )
    ]
    for loop, doubling in pairs:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), loop, doubling)


@pytest.mark.parametrize("form", ["xla", *INTERPRETED])
def test_residuals_are_one_state_a_chunk(form):
    B, L, E, N = 2, 160, 128, 16
    shapes = jax.eval_shape(lambda: make(L, batch=B, channels=E, states=N, dtype=np.float32))

    def largest_residual(form):
        def pullback(arguments):
            return jax.vjp(lambda a: function_of(form)(**a), arguments)[1]

        return max(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback, shapes)))

    assert largest_residual("reference") >= B * L * E * N  # so the measurement sees what is stored
    assert largest_residual(form) <= max(B * L * E, B * (L // xla.CHUNK) * E * N)


@pytest.mark.skipif(target().platform != "gpu", reason="needs a GPU: too large for an interpreter")
@pytest.mark.parametrize("size", [(8, 256, 1024, 16), (16, 256, 1536, 16), (1, 2048, 520, 16), (8, 1024, 2304, 8)])
@pytest.mark.parametrize("form", [form for form in KERNELS if form not in INTERPRETED])
def test_large_calls_are_divided_without_a_change(form, size):
    """Sizes at which the GPU kernels split time, walk over several strips, or take wider or narrower ones."""
    batch, length, channels, states = size
    arguments = make(length, batch=batch, channels=channels, states=states, dt_shift=-4.0, dtype=np.float32)
    segments = np.arange(length)[None] // np.resize([300, 77, length], batch)[:, None]
    r = np.random.default_rng(2)
    shapes = arguments["u"].shape, (batch, channels, states)
    cotangents = tuple(jnp.asarray(r.standard_normal(shape), jnp.float32) for shape in shapes)
    got = run(arguments, segments, cotangents, form=form, dt_softplus=True)
    again = run(arguments, segments, cotangents, form=form, dt_softplus=True)
    jax.tree.map(np.testing.assert_array_equal, got, again)
    wanted = run(arguments, segments, cotangents, form="xla", dt_softplus=True)
    # Sums over thousands of tokens and channels in another order, each float32's rounding of the largest value.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=3e-5 * float(jnp.max(jnp.abs(y)))), got, wanted)


def test_memory_of_the_compiled_gradient_does_not_grow_with_the_state_of_every_token():
    B, L, E, N = 1, 1024, 64, 16
    shapes = jax.eval_shape(lambda: make(L, batch=B, channels=E, states=N, dtype=np.float32))

    def temporary_bytes(implementation):
        gradient = jax.grad(lambda arguments: jnp.sum(call(implementation, arguments)[0]))
        return jax.jit(gradient).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("reference") > B * L * E * N * 4
    assert temporary_bytes("xla") < B * L * E * N * 4


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (2, 5)), ("dt", (2, 5, 4)), ("A", (3,)), ("A", (4, 8)), ("B", (2, 5, 7)), ("C", (2, 4, 8)), ("D", (4,)),
        ("z", (1, 5, 3)), ("dt_bias", (1,)), ("initial_state", (2, 8, 3)), ("segment_ids", (2, 4)),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_refused_by_name(implementation, name, shape):
    arguments = make(5, dtype=np.float32)
    changed = jnp.zeros(shape, jnp.int32 if name == "segment_ids" else jnp.float32)
    segment_ids = changed if name == "segment_ids" else None
    with pytest.raises(ValueError, match=rf"selective_scan: {name} must .*{re.escape(str(shape))}"):
        call(implementation, arguments if segment_ids is not None else arguments | {name: changed}, segment_ids)


@pytest.mark.parametrize("name", [*NAMES, "segment_ids"])
def test_a_wrong_dtype_is_refused_by_name(implementation, name):
    arguments = make(5, dtype=np.float32)
    segment_ids = jnp.zeros((2, 5)) if name == "segment_ids" else None
    if name in arguments:
        arguments[name] = arguments[name].astype(jnp.int32)
    with pytest.raises(TypeError, match=rf"selective_scan: {name} must have"):
        call(implementation, arguments, segment_ids)


@pytest.mark.parametrize("empty", ["length", "batch", "channels", "states"])
def test_nothing_is_refused(implementation, empty):
    with pytest.raises(ValueError, match="needs at least one"):
        call(implementation, make(**({"length": 2} | {empty: 0}), dtype=np.float32))


@pytest.mark.parametrize("form", ["pallas_gpu, interpreted", "pallas_tpu, interpreted"])
def test_what_is_not_a_number_stays_in_its_document(form, monkeypatch):
    """Also where time is split, between the chunks."""
    monkeypatch.setattr(pallas_gpu_work, "SPAN", 32)
    arguments = make(100, batch=1, states=16, dtype=np.float32)
    arguments["u"] = arguments["u"].at[:, 37].set(jnp.nan)
    arguments["dt"] = arguments["dt"].at[:, 36].set(jnp.nan)
    segments = jnp.asarray(np.arange(100)[None] >= 40, jnp.int32)
    zero = jnp.zeros_like(arguments["u"]), jnp.zeros_like(arguments["initial_state"])
    y, final, _ = run(arguments, segments, zero, form=form, dt_softplus=True)
    assert np.isnan(y[:, 37:40]).any()
    assert np.isfinite(y[:, 40:]).all()
    assert np.isfinite(final).all()


def test_decay_may_come_back_where_steps_may_be_negative(monkeypatch):
    """A state that a chunk's last steps shrink to nothing, and its first ones grow again, is handed on."""
    monkeypatch.setattr(pallas_gpu_work, "SPAN", 32)
    one = jnp.ones((1, 128, 64))
    steps = np.zeros((128, 1), np.float32)
    steps[40:50], steps[60:76], steps[90:98] = -np.log(2) * 10, np.log(2) * 10, -np.log(2) * 8.5
    dt = one * jnp.asarray(steps)
    A, B = -jnp.ones((64, 16)), jnp.ones((1, 128, 16))
    start = jnp.ones((1, 64, 16))
    given = functools.partial(dict, u=0 * one, dt=dt, A=A, B=B, C=B, dt_softplus=False, initial_state=start)
    _, wanted = selective_scan(**given(), implementation="reference")
    _, got = jax.jit(lambda: scan_gpu(interpret=True)(**given()))()
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


@pytest.mark.parametrize("name", ["cuda_magic", ""])
def test_an_unknown_implementation_is_refused_not_replaced(name):
    with pytest.raises(NotImplementedError, match=f"selective_scan has no implementation '{name}'; it has .*xla, reference"):
        call(name, make(3, dtype=np.float32))


def test_the_override_stands_for_none_only(monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_IMPLEMENTATION", "nothing")
    call("xla", make(3, dtype=np.float32))
    with pytest.raises(NotImplementedError, match="nothing"):
        call(None, make(3, dtype=np.float32))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    shapes = jax.eval_shape(lambda: make(40, channels=8, dtype=jnp.bfloat16))
    gradient = jax.jit(jax.grad(lambda arguments: jnp.sum(call("xla", arguments)[0].astype(jnp.float32))))
    assert jax.export.export(gradient, platforms=[platform])(shapes).platforms == (platform,)
