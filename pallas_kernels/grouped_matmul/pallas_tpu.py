"""The grouped product on TPUs: JAX's megablox kernels, with what they leave open decided.

megablox leaves rows of no group unwritten, in the product and in the gradient of its rows; here they are zero. The sizes
of its tiles are chosen from the shapes, so that they fit a v5e's memory. No TPU has run this: it is interpreted in the
tests, and compiled ahead of time for v5e, v6e and v5p.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from pallas_kernels.dispatch import Call
from pallas_kernels.grouped_matmul.shapes import refuse

TILE = (512, 512, 1024)
"""Rows, length of a sum and columns of a tile, at most."""
LANES = 128


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if call.target.platform != "tpu":
        return f"it needs a TPU, this is {call.target.kind}"
    return refuse(call, (jnp.bfloat16, jnp.float32), 1, LANES)


def _tiling(rows: int, depth: int, columns: int) -> tuple[int, int, int]:
    """Rows that divide all rows, as megablox asks; the other two as large as they may be."""
    tall = next(tall for tall in range(TILE[0], 0, -LANES) if rows % tall == 0)
    return tall, min(TILE[1], depth), min(TILE[2], columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(lhs: Array, rhs: Array, group_sizes: Array, interpret: bool) -> Array:
    return _product(lhs, rhs, group_sizes, False, interpret)


def _product(lhs: Array, rhs: Array, group_sizes: Array, transposed: bool, interpret: bool) -> Array:
    tiling = _tiling(lhs.shape[0], lhs.shape[1], rhs.shape[1 if transposed else 2])
    out = gmm(lhs, rhs, group_sizes, lhs.dtype, tiling, transpose_rhs=transposed, interpret=interpret)
    return jnp.where((jnp.arange(len(lhs)) < jnp.sum(group_sizes))[:, None], out, 0)


def _forward(lhs: Array, rhs: Array, group_sizes: Array, interpret: bool):
    return _grouped_matmul(lhs, rhs, group_sizes, interpret), (lhs, rhs, group_sizes)


def _backward(interpret: bool, residuals: tuple[Array, Array, Array], d_out: Array):
    lhs, rhs, group_sizes = residuals
    d_lhs = _product(d_out, rhs, group_sizes, True, interpret)
    tiling = _tiling(lhs.shape[0], lhs.shape[1], d_out.shape[1])
    return d_lhs, tgmm(lhs.T, d_out, group_sizes, rhs.dtype, tiling, interpret=interpret), None


_grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul_tpu(lhs: Array, rhs: Array, group_sizes: Array, interpret: bool = False) -> Array:
    """`grouped_matmul` by megablox; `interpret` runs its kernels on a CPU, for tests."""
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), len(lhs))  # megablox does not look where sizes end
    sizes = jnp.diff(ends, prepend=0)
    padded = jnp.pad(lhs, ((0, -len(lhs) % LANES), (0, 0)))
    out: Array = _grouped_matmul(padded, rhs, sizes, interpret)
    return out[: len(lhs)]
