"""Sinkhorn's iterations: one function in front of every implementation."""

from __future__ import annotations

from jax import Array

from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.sinkhorn.pallas_gpu import refusal as pallas_gpu_refusal
from pallas_kernels.sinkhorn.pallas_gpu import sinkhorn_potentials_gpu
from pallas_kernels.sinkhorn.xla import sinkhorn_potentials_xla

IMPLEMENTATIONS = {
    "pallas_gpu": Implementation(sinkhorn_potentials_gpu, pallas_gpu_refusal),
    "xla": Implementation(sinkhorn_potentials_xla),
}
"""In order of preference."""


def sinkhorn_potentials(
    scores: Array, valid: Array, start: Array, iterations: int | Array, *, implementation: str | None = None
) -> Array:
    """Column potentials that make the plan `softmax over X of (scores + potential)` give each expert as many tokens.

    One iteration is `p = softmax(scores + potential)` over X, `potential -= log(X * mean of p over the valid tokens)`, in
    the log domain: safe for scores as large as 1e30.

    Args:
        scores: float32 or float64 `[X, T]`.
        valid: booleans `[T]`: tokens that are counted; at least one. What the scores of the others are does not matter.
        start: potentials to begin with `[X]`.
        iterations: how many.
        implementation: a key of `IMPLEMENTATIONS`, or None to choose.

    Returns:
        `[X]` in the dtype of `scores`. Not differentiated: routers take the choice, not its gradient.
    """
    arguments = {
        "scores": scores,
        "valid": valid,
        "start": start,
        "iterations": None if isinstance(iterations, int) else iterations,
    }
    function = resolve("sinkhorn", implementation, IMPLEMENTATIONS, arguments)
    return function(scores, valid, start, iterations)
