"""The training objective and the reported loss: next-token cross entropy within documents.

The logits of a batch are as large as the rest of a small model's activations, so they are never there all at once: hidden
values are unembedded in chunks, and training takes each chunk's gradient while its logits are there.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bm_jax.config import ModelConfig
from bm_jax.layers import project
from bm_jax.model import Parameters, cast_kernels, forward, unembedding
from bm_jax.routing import Statistics
from bm_jax.sharding import batch_parts, constrain, sequence_parts

Batch = dict[str, Array]
"""`tokens` and `segment_ids`, both integers `[B, L + 1]`: inputs are the first L columns, targets the last L."""

CHUNK = 4096
"""Tokens that a device unembeds at once, about."""


class LossSums(NamedTuple):
    """Sums over the predicted tokens of a batch, so that batches and microbatches add up exactly."""

    nll: Array
    """Negative log likelihood in nats."""
    z: Array
    """Squared logsumexp of the logits."""
    tokens: Array
    """Predicted tokens."""


class Loss(NamedTuple):
    """What `next_token_loss` returns."""

    objective: Array
    """`sums.nll + z_loss * sums.z`: what is differentiated; gradients do not pass through `sums`."""
    sums: LossSums
    statistics: Statistics | None
    """Of the routing, see `bm_jax.model.Output`."""


def predicted(segment_ids: Array) -> Array:
    """Which targets count: `[B, L + 1]` segment ids to bool `[B, L]`. A document never predicts the next one's start."""
    return (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)


def next_token_loss(
    parameters: Parameters,
    batch: Batch,
    config: ModelConfig,
    *,
    z_loss: float = 0.0,
    training: bool = False,
    remat: str = "none",
    key: Array | None = None,
) -> Loss:
    """Objective and loss sums of a batch and the routing statistics of its MoE layers.

    With `training` false (the default, and what every reported loss uses) routing is that of inference: Sinkhorn's choice
    looks at the whole batch, the tokens to be predicted included. Log probabilities are taken in float32 or wider.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    options: Any = {"segment_ids": segment_ids[:, :-1], "training": training, "remat": remat, "key": key}
    output = forward(cast_kernels(parameters, config), tokens[:, :-1], config, **options)
    with jax.named_scope("loss"):
        kernel = unembedding(parameters, config)
        result: Any = cross_entropy(output.hidden, kernel, tokens[:, 1:], predicted(segment_ids), z_loss)
    objective, sums = result
    return Loss(objective, sums, output.statistics)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(hidden: Array, kernel: Array, targets: Array, counts: Array, z_loss: float) -> tuple[Array, LossSums]:
    """Objective and sums, see `Loss`, over the tokens that count.

    Args:
        hidden: `[B, L, M]`, in the compute dtype.
        kernel: `[M, V]`, in any dtype; products are of the compute dtype, logits and sums in float32 or wider.
        targets: integers `[B, L]`, each in [0, V).
        counts: bool `[B, L]`.
        z_loss: weight of the squared logsumexp of the logits (Chowdhery et al. 2022, section 5).
    """
    return _in_chunks(hidden, kernel, targets, counts, z_loss, gradients=False)[0]


def _forward(hidden: Array, kernel: Array, targets: Array, counts: Array, z_loss: float):
    return _in_chunks(hidden, kernel, targets, counts, z_loss, gradients=True)


def _backward(z_loss: float, gradients: tuple[Array, Array], cotangents: tuple[Array, LossSums]):
    scale = cotangents[0]
    return *((gradient * scale).astype(gradient.dtype) for gradient in gradients), None, None


cross_entropy.defvjp(_forward, _backward)


def _in_chunks(
    hidden: Array, kernel: Array, targets: Array, counts: Array, z_loss: float, *, gradients: bool
) -> tuple[tuple[Array, LossSums], tuple[Array, Array] | None]:
    """`cross_entropy`, and with `gradients` those of the objective by `hidden` and `kernel`."""
    (B, L, _), dtype = hidden.shape, hidden.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    D, S = batch_parts(B), sequence_parts(L)
    n = min(max(1, round(B * L / (D * S) / CHUNK)), L // S)
    length = -(-L // (S * n))

    def split(x: Array) -> Array:
        """`[B, L, ...]` to n chunks `[D, B / D, S, length, ...]`: of D x S devices each has a part of every chunk."""
        x = x.reshape(D, B // D, S, L // S, *x.shape[2:])
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, n * length - L // S)] + [(0, 0)] * (x.ndim - 4))
        x = x.reshape(D, B // D, S, n, length, *x.shape[4:])
        return constrain(jnp.moveaxis(x, 3, 0), None, "batch", None, "sequence", *[None] * (x.ndim - 4))

    def whole(x: Array) -> Array:
        """The chunks of `split` as `[B, L, ...]` again."""
        x = jnp.moveaxis(x, 0, 3).reshape(D, B // D, S, n * length, *x.shape[5:])
        return x[:, :, :, : L // S].reshape(B, L, *x.shape[4:])

    kernel_dtype, kernel = kernel.dtype, constrain(kernel.astype(dtype), None, "tensor")

    def chunk(carry, inputs):
        (nll, z, d_kernel), (h, target, weight) = carry, inputs
        scores = project(h, kernel, dtype, result=wide)
        log_z = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
        nll, z = nll + jnp.sum((log_z - chosen) * weight), z + jnp.sum(log_z**2 * weight)
        if not gradients:
            return (nll, z, None), None
        of_log_z = weight * (1 + 2 * z_loss * log_z)
        is_target = jnp.arange(scores.shape[-1]) == target[..., None]
        d = jnp.exp(scores - log_z[..., None]) * of_log_z[..., None] - jnp.where(is_target, weight[..., None], 0)
        d = d.astype(dtype)
        d_h = jnp.einsum("dbslv,mv->dbslm", d, kernel)
        # Each device sums its own tokens; all devices' sums are added once, at the end.
        own = jnp.einsum("dbslm,dbslv->dsmv", h, d, preferred_element_type=wide)
        return (nll, z, constrain(d_kernel + own, "batch", "sequence", None, "tensor")), d_h

    zero, weights = jnp.zeros((), wide), counts.astype(wide)
    d_kernel = jnp.zeros((D, S, *kernel.shape), wide) if gradients else None
    (nll, z, d_kernel), d_hidden = jax.lax.scan(chunk, (zero, zero, d_kernel), (split(hidden), split(targets), split(weights)))
    result = nll + z_loss * z, LossSums(nll, z, jnp.sum(weights))
    if d_kernel is None or d_hidden is None:
        return result, None
    return result, (whole(d_hidden), jnp.sum(d_kernel, axis=(0, 1)).astype(kernel_dtype))
