"""Every implementation of the causal convolution against a NumPy float64 loop."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.causal_conv.api import IMPLEMENTATIONS


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def oracle(x, weight, bias, initial_state, segment_ids):
    """y and the state that continues, one product at a time."""
    (batch, length, channels), width = x.shape, weight.shape[0]
    state = np.zeros((batch, width - 1, channels)) if initial_state is None else initial_state
    inputs = np.concatenate([state, x], 1)
    ids = np.zeros((batch, length), int) if segment_ids is None else segment_ids
    runs = np.concatenate([np.zeros((batch, 1), int), np.cumsum(ids[:, 1:] != ids[:, :-1], 1)], 1)
    runs = np.concatenate([np.zeros((batch, width - 1), int), runs], 1)  # the initial state belongs to the first run
    y = np.zeros_like(x) + (0 if bias is None else bias)
    for b in range(batch):
        for t in range(length):
            for k in range(width):
                if runs[b, t + k] == runs[b, t + width - 1]:
                    y[b, t] += weight[k] * inputs[b, t + k]
    alive = runs[:, length:] == runs[:, -1:]
    return y, np.where(alive[..., None], inputs[:, length:], 0)


def make(length, width=4, batch=2, channels=3, dtype=np.float64):
    n = np.random.default_rng(length).standard_normal
    shapes = ((batch, length, channels), (width, channels), (channels,), (batch, width - 1, channels))
    return tuple(jnp.asarray(n(shape), dtype) for shape in shapes)


def documents(length, batch=2):
    """A first row whose ids come back after two tokens, others with a document of three tokens after padding."""
    rows = [np.array([5, 5, 2, 5, 5, 5, 5, 5, 1, 2, 2])]
    rows += [np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])] * (batch - 1)
    return np.stack(rows)[:, :length].astype(np.int32)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 4), (3, 4), (4, 4), (11, 4), (5, 2), (5, 1)])
def test_matches_the_loop(implementation, length, width, packed, dtype):
    with jax.enable_x64(dtype == "float64"):
        arguments = make(length, width, dtype=jnp.dtype(dtype))
        segment_ids = documents(length) if packed else None
        for without in ((), (2,), (3,)):  # with everything, without bias, without initial state
            x, weight, bias, state = (None if i in without else a for i, a in enumerate(arguments))
            y, final = jax.jit(functools.partial(causal_conv, implementation=implementation))(
                x, weight, bias, initial_state=state, segment_ids=segment_ids
            )
            wide = [None if a is None else np.asarray(a, np.float64) for a in (x, weight, bias, state)]
            wanted_y, wanted_final = oracle(*wide, segment_ids)
            assert y.dtype == final.dtype == x.dtype
            # Five roundings of terms of size at most 10; bfloat16 accumulates in bfloat16.
            tolerance = {"float64": 1e-14, "float32": 1e-5, "bfloat16": 0.1}[dtype]
            np.testing.assert_allclose(np.asarray(y, np.float64), wanted_y, rtol=0, atol=tolerance)
            np.testing.assert_array_equal(np.asarray(final, np.float64), wanted_final)  # copied, never computed


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_by_finite_differences(implementation, packed, x64):
    segment_ids = jnp.asarray(documents(6)) if packed else None

    def conv(x, weight, bias, state):
        return causal_conv(x, weight, bias, initial_state=state, segment_ids=segment_ids, implementation=implementation)

    check_grads(jax.jit(conv), make(6), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("split", [1, 2, 7])
def test_two_runs_with_carried_state_equal_one(implementation, split, x64):
    x, weight, bias, state = make(11)
    segment_ids = documents(11)
    conv = functools.partial(causal_conv, weight=weight, bias=bias, implementation=implementation)
    conv = jax.jit(conv)
    y, final = conv(x, initial_state=state)
    first, middle = conv(x[:, :split], initial_state=state)
    second, last = conv(x[:, split:], initial_state=middle)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), y, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(last, final)

    # Packed: the second run is given the carried state where its first token continues the document.
    y, final = conv(x, initial_state=state, segment_ids=segment_ids)
    _, middle = conv(x[:, :split], initial_state=state, segment_ids=segment_ids[:, :split])
    continues = segment_ids[:, split] == segment_ids[:, split - 1]
    second, last = conv(
        x[:, split:], initial_state=jnp.where(continues[:, None, None], middle, 0), segment_ids=segment_ids[:, split:]
    )
    np.testing.assert_allclose(second, y[:, split:], rtol=0, atol=1e-14)
    np.testing.assert_array_equal(last, final)


def test_packed_documents_equal_documents_alone(implementation, x64):
    x, weight, bias, _ = make(11)
    ids = documents(11)
    y, _ = causal_conv(x, weight, bias, segment_ids=ids, implementation=implementation)
    for row in range(2):
        starts = [0, *(np.flatnonzero(np.diff(ids[row])) + 1), 11]
        for start, stop in itertools.pairwise(starts):
            alone, _ = causal_conv(x[row : row + 1, start:stop], weight, bias, implementation=implementation)
            np.testing.assert_allclose(y[row : row + 1, start:stop], alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("position", "name", "shape"),
    [
        (0, "x", (2, 5)), (1, "weight", (3,)), (1, "weight", (4, 2)), (2, "bias", (4,)),
        ("initial_state", "initial_state", (2, 4, 3)), ("segment_ids", "segment_ids", (2, 6)),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_refused_by_name(implementation, position, name, shape):
    arguments, named = list(make(5, dtype=np.float32)[:3]), {}
    if isinstance(position, int):
        arguments[position] = jnp.zeros(shape)
    else:
        named[position] = jnp.zeros(shape, jnp.int32)
    with pytest.raises(ValueError, match=rf"causal_conv: .*\b{name}\b.* must|must be .*\b{name}\b"):
        causal_conv(*arguments, **named, implementation=implementation)


def test_other_refusals(implementation):
    x, weight, bias, _ = make(5, dtype=np.float32)
    with pytest.raises(ValueError, match="at least one token"):
        causal_conv(x[:, :0], weight, bias, implementation=implementation)
    with pytest.raises(TypeError, match="segment_ids must be integers"):
        causal_conv(x, weight, bias, segment_ids=x[..., 0], implementation=implementation)
    with pytest.raises(NotImplementedError, match="causal_conv has no implementation 'magic'"):
        causal_conv(x, weight, bias, implementation="magic")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(implementation, platform):
    def loss(x, weight, bias, state, ids):
        y, _ = causal_conv(x, weight, bias, initial_state=state, segment_ids=ids, implementation=implementation)
        return jnp.sum(y)

    shapes = jax.eval_shape(lambda: (*make(6, dtype=np.float32), jnp.asarray(documents(6))))
    jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(*shapes)
