"""Sinkhorn's iterations in plain XLA: the specification."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array


def sinkhorn_potentials_xla(scores: Array, valid: Array, start: Array, iterations: int | Array) -> Array:
    """`sinkhorn_potentials`, a loop over the iterations."""
    scores = jnp.where(valid, scores, 0)
    log_share = jnp.log(valid.sum().astype(scores.dtype)) - math.log(len(scores))  # tokens an expert should get

    def iterate(_: int | Array, potential: Array) -> Array:
        log_p = jax.nn.log_softmax(scores + potential[:, None], axis=0)
        log_load = jax.nn.logsumexp(jnp.where(valid, log_p, -jnp.inf), axis=1)
        return potential + (log_share - log_load)

    return jax.lax.fori_loop(0, iterations, iterate, start)
