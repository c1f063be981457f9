"""Sinkhorn's iterations in plain XLA: the specification."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec


def sinkhorn_potentials_xla(scores: Array, valid: Array, start: Array, iterations: int | Array) -> Array:
    """`sinkhorn_potentials`, a loop over the iterations.

    On a mesh each device sums what it has and then all share these sums: one exchange of a few numbers an iteration, where a
    logsumexp over split tokens takes two.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty or scores.shape[1] % mesh.size else mesh.size
    scores = jnp.where(valid, scores, 0)
    log_share = jnp.log(valid.sum().astype(scores.dtype)) - math.log(len(scores))  # tokens an expert should get

    def iterate(_: int | Array, potential: Array) -> Array:
        log_p = jax.nn.log_softmax(scores + potential[:, None], axis=0)
        log_load = jax.nn.logsumexp(jnp.where(valid, log_p, -jnp.inf).reshape(len(scores), parts, -1), axis=2)
        if parts > 1:
            log_load = jax.lax.with_sharding_constraint(log_load, PartitionSpec())
        log_load = jax.nn.logsumexp(log_load, axis=1)
        return potential + (log_share - log_load)

    return jax.lax.fori_loop(0, iterations, iterate, start)
