"""The training objective and the reported loss: next-token cross entropy within documents."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bm_jax.config import ModelConfig
from bm_jax.model import Parameters, forward, logits
from bm_jax.routing import Statistics

Batch = dict[str, Array]
"""`tokens` and `segment_ids`, both integers `[B, L + 1]`: inputs are the first L columns, targets the last L."""


class LossSums(NamedTuple):
    """Sums over the predicted tokens of a batch, so that batches and microbatches add up exactly."""

    nll: Array
    """Negative log likelihood in nats."""
    z: Array
    """Squared logsumexp of the logits."""
    tokens: Array
    """Predicted tokens."""


def predicted(segment_ids: Array) -> Array:
    """Which targets count: `[B, L + 1]` segment ids to bool `[B, L]`. A document never predicts the next one's start."""
    return (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)


def next_token_loss(
    parameters: Parameters,
    batch: Batch,
    config: ModelConfig,
    *,
    training: bool = False,
    remat: str = "none",
    key: Array | None = None,
) -> tuple[LossSums, Statistics | None]:
    """Loss sums of a batch and the routing statistics of its MoE layers.

    With `training` false (the default, and what every reported loss uses) routing is that of inference: Sinkhorn's choice
    looks at the whole batch, the tokens to be predicted included. Log probabilities are taken in float32 or wider.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    output = forward(
        parameters, tokens[:, :-1], config, segment_ids=segment_ids[:, :-1], training=training, remat=remat, key=key
    )
    with jax.named_scope("loss"):
        scores = logits(parameters, output.hidden, config)
        log_z = jax.nn.logsumexp(scores, axis=-1)
        target = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
        weight = predicted(segment_ids).astype(scores.dtype)
        sums = LossSums(jnp.sum((log_z - target) * weight), jnp.sum(log_z**2 * weight), jnp.sum(weight))
    return sums, output.statistics
