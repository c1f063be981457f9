"""Programs written lane by lane: what numpy makes of them, the mistakes it reports, and that they lower for CUDA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lanes import WARPGROUP, launch, launch_together, scatter_sum


def kind(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def reverse(lanes, refs):
    """Each block writes its row backwards, twice over, through shared memory."""
    lanes.store(refs.rows, (lanes.thread,), lanes.load(refs.x, (lanes.block, lanes.thread), 1))
    lanes.barrier()
    (value,) = lanes.load(refs.rows, (WARPGROUP - 1 - lanes.thread,), 1)
    (value,) = lanes.loop(2, lambda i, carry: [carry[0] + value], [0.0])
    lanes.store(refs.y, (lanes.block, lanes.thread), [value])


def halve(lanes, refs):
    """Each lane halves its value until no lane's is above 1, and counts."""

    def body(i, carry):
        value, count = carry
        half = value * 0.5
        return half > 1, [half, count + 1]

    (x,) = lanes.load(refs.x, (lanes.block, lanes.thread), 1)
    lanes.store(refs.y, (lanes.block, lanes.thread), lanes.loop_while_any(100, body, [x, 0.0])[1:])


def sum_in_fours(lanes, refs):
    """Every lane of four keeps one of four sums over the four."""
    values = [lanes.load(refs.x, (lanes.block, lanes.thread), 1)[0] * (k + 1) for k in range(4)]
    lanes.store(refs.y, (lanes.block, lanes.thread), scatter_sum(lanes, values, (2, 1)))


def forget_the_barrier(lanes, refs):
    lanes.store(refs.rows, (lanes.thread,), [1.0])
    lanes.store(refs.y, (lanes.block, lanes.thread), lanes.load(refs.rows, (WARPGROUP - 1 - lanes.thread,), 1))


def write_over_what_is_read(lanes, refs):
    lanes.store(refs.rows, (lanes.thread,), [1.0])
    lanes.barrier()
    lanes.load(refs.rows, (WARPGROUP - 1 - lanes.thread,), 1)
    lanes.store(refs.rows, (lanes.thread,), [2.0])


def leave_the_array(lanes, refs):
    lanes.load(refs.x, (lanes.block, lanes.thread + 1), 1)


def read_what_nobody_wrote(lanes, refs):
    lanes.store(refs.y, (lanes.block, lanes.thread), lanes.load(refs.rows, (lanes.thread,), 1), where=lanes.thread < 64)


def run(program, x, **options):
    return launch(program, len(x), {"x": x}, {"y": kind(*x.shape)}, {"rows": kind(WARPGROUP)}, **options)["y"]


X = np.arange(3 * WARPGROUP, dtype=np.float32).reshape(3, WARPGROUP)


def test_a_program_computes_what_its_lanes_say():
    np.testing.assert_array_equal(run(reverse, X, interpret=True), 2 * X[:, ::-1])
    wanted = X.reshape(3, -1, 4).sum(-1, keepdims=True) * np.arange(1, 5)
    np.testing.assert_array_equal(run(sum_in_fours, X, interpret=True), wanted.reshape(X.shape))


def test_a_loop_ends_for_the_whole_block_when_no_lane_wants_more():
    counts = np.asarray(run(halve, X, interpret=True))
    wanted = np.ceil(np.log2(X.max(axis=1)))
    np.testing.assert_array_equal(counts, np.broadcast_to(wanted[:, None], X.shape))


@pytest.mark.parametrize(
    ("program", "message"),
    [(forget_the_barrier, "race"), (write_over_what_is_read, "race"), (leave_the_array, "left an array of shape")],
)
def test_mistakes_are_reported(program, message):
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(run(program, X, interpret=True))


def test_what_is_not_written_is_nan():
    assert np.isnan(run(read_what_nobody_wrote, X, interpret=True)).all()


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("program", [reverse, halve, sum_in_fours])
def test_a_program_lowers_for_cuda(program, together):
    text = jax.export.export(jax.jit(functools.partial(run, program, together=together)), platforms=["cuda"])(
        kind(5, WARPGROUP)
    )
    assert "mosaic_gpu" in text.mlir_module()


def exchange(lanes, refs, *, yields=True, stamp=1):
    """Each block posts its number, and writes the sum of all blocks'."""
    lanes.post(refs.numbers, (lanes.block,), lanes.load(refs.x, (lanes.block, 0), 1)[0], 1, where=lanes.thread < 1)
    if yields:
        yield
    collected = lanes.collect(refs.numbers, [(lanes.thread * 0 + block,) for block in range(3)], 1, stamp)
    lanes.store(refs.y, (lanes.block, lanes.thread), [sum(values[0] for values in collected)])
    yield


def copy_ahead(lanes, refs):
    """Each block's row by way of shared memory, where the copying unit puts it."""
    lanes.copy(refs.row, refs.x, (lanes.block, lanes.block * 0), lanes.block * 0 + WARPGROUP)
    yield
    lanes.copied(lanes.block * 0)
    lanes.store(refs.y, (lanes.block, lanes.thread), lanes.load(refs.row, (lanes.thread,), 1))
    yield


def read_before_it_is_copied(lanes, refs):
    lanes.copy(refs.row, refs.x, (lanes.block, lanes.block * 0), lanes.block * 0 + WARPGROUP)
    lanes.store(refs.y, (lanes.block, lanes.thread), lanes.load(refs.row, (lanes.thread,), 1))
    yield


def together(program, dtype=jnp.float32, **options):
    letters, shared = {"numbers": kind(3, dtype=dtype)}, {"row": kind(WARPGROUP)}
    return launch_together(program, 3, WARPGROUP, {"x": X}, {"y": kind(*X.shape)}, letters, shared, **options)["y"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_send_each_other_letters(dtype):
    np.testing.assert_array_equal(together(exchange, dtype, interpret=True), np.full(X.shape, X[:, 0].sum()))


@pytest.mark.parametrize("mistake", [{"yields": False}, {"stamp": 2}])
def test_a_letter_that_nobody_has_posted_is_reported(mistake):
    with pytest.raises(Exception, match="letters that nobody has posted"):
        jax.block_until_ready(together(functools.partial(exchange, **mistake), interpret=True))


def test_what_is_copied_is_there_once_it_was_waited_for():
    np.testing.assert_array_equal(together(copy_ahead, interpret=True), X)
    assert np.isnan(together(read_before_it_is_copied, interpret=True)).all()


@pytest.mark.parametrize("program", [exchange, copy_ahead])
def test_a_program_of_blocks_together_lowers_for_cuda(program):
    text = jax.export.export(jax.jit(lambda: together(program)), platforms=["cuda"])()
    assert "mosaic_gpu" in text.mlir_module()
