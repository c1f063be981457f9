"""Grouped matrix product: one function in front of every implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.dispatch import Call, Implementation, resolve
from pallas_kernels.grouped_matmul.pallas_gpu import MINIMUM, grouped_matmul_gpu
from pallas_kernels.grouped_matmul.pallas_gpu import refusal as pallas_gpu_refusal
from pallas_kernels.grouped_matmul.pallas_tpu import grouped_matmul_tpu
from pallas_kernels.grouped_matmul.pallas_tpu import refusal as pallas_tpu_refusal
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.xla import grouped_matmul_xla


def _has_many_rows(call: Call) -> bool:
    """A few rows leave most of a tile empty."""
    lhs = call.arguments["lhs"]
    return lhs is not None and lhs.shape[0] >= MINIMUM


IMPLEMENTATIONS = {
    "pallas_gpu": Implementation(grouped_matmul_gpu, pallas_gpu_refusal, preferred=_has_many_rows),
    "pallas_tpu": Implementation(grouped_matmul_tpu, pallas_tpu_refusal),
    "xla": Implementation(grouped_matmul_xla),
    "reference": Implementation(grouped_matmul_reference),
}
"""In order of preference."""


def grouped_matmul(lhs: Array, rhs: Array, group_sizes: Array, *, implementation: str | None = None) -> Array:
    """Multiply consecutive groups of rows, group x with matrix `rhs[x]`.

    Args:
        lhs: rows sorted by group `[T, K]`.
        rhs: one matrix a group `[X, K, N]`.
        group_sizes: integers `[X]`, rows in each group; zero is fine. Rows past their sum belong to no group; what they
            count past the last row is left out.
        implementation: a key of `IMPLEMENTATIONS`, or None to choose.

    Returns:
        `[T, N]` in the dtype that `lhs` and `rhs` promote to, zero in rows of no group. Differentiable once, in reverse mode,
        in `lhs` and `rhs`.

    Raises:
        ValueError: a rank or size that does not fit, naming the argument.
        TypeError: `group_sizes` not integers.
    """
    if lhs.ndim != 2 or rhs.ndim != 3:
        raise ValueError(f"grouped_matmul: lhs must be [T, K] and rhs [X, K, N], got {lhs.shape} and {rhs.shape}")
    if lhs.shape[1] != rhs.shape[1]:
        raise ValueError(f"grouped_matmul: lhs {lhs.shape} and rhs {rhs.shape} must agree in K")
    if group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"grouped_matmul: group_sizes must have shape {rhs.shape[:1]} to fit rhs {rhs.shape}, got {group_sizes.shape}"
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"grouped_matmul: group_sizes must be integers, got {group_sizes.dtype}")
    dtype = jnp.result_type(lhs, rhs)
    arguments = {"lhs": lhs, "rhs": rhs, "group_sizes": group_sizes}
    function = resolve("grouped_matmul", implementation, IMPLEMENTATIONS, arguments)
    return function(lhs.astype(dtype), rhs.astype(dtype), group_sizes)
