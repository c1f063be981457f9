"""AdamW and Muon from optax with clipping, a schedule, and no decay where decay does harm."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax
import optax.contrib

from bm_jax.config import OptimizerConfig
from bm_jax.sharding import path_name

NO_DECAY = r"(.*/)?(A_log|D|\w*bias|\w*norm)"
"""Whole paths of parameters without weight decay: state matrices, skips, biases and norm scales."""


MATRICES = (
    (r"periods/.*/mamba/in_proj", (1,), (3,)),
    (r"periods/.*/mamba/(x_proj|out_proj)", (1,), (2,)),
    (r"periods/.*/attention/(query|key|value)", (1,), (2, 3)),
    (r"periods/.*/attention/out", (1, 2), (3,)),
    (r"periods/.*/mlp/w_in", (1,), (-1,)),
    (r"periods/.*/mlp/w_out", (1,), (2,)),
    (r"periods/.*/moe/w_in", (2,), (-1,)),
    (r"periods/.*/moe/w_out", (2,), (3,)),
)
"""Pattern of the whole path of parameters that Muon trains, and the axes of their inputs and outputs. Any other axis, as
that of the loop over depth, of experts and of a gated activation's halves, counts matrices."""
UPDATE_SIZE = 0.2
"""Root mean square of Muon's updates over the learning rate, about that of AdamW (Liu et al. 2025, section 2.2)."""


def matrix_axes(parameters: Any) -> Any:
    """For each leaf what Muon takes as a matrix, None where it is left to AdamW."""

    def axes(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        for pattern, inputs, outputs in MATRICES:
            if re.fullmatch(pattern, path_name(path)):
                return optax.contrib.MuonDimensionNumbers(inputs, tuple(axis % leaf.ndim for axis in outputs))
        return None

    return jax.tree_util.tree_map_with_path(axes, parameters)


def decay_mask(parameters: Any) -> Any:
    """True where weight decay applies; a tree of the same structure."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not re.fullmatch(NO_DECAY, path_name(path)), parameters)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The schedule over a run of `steps` updates: linear warm-up, then cosine, stable-then-decay, or constant."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "wsd":
        decay = min(max(round(config.decay_fraction * steps), 1), rest)
        stable = optax.constant_schedule(peak)
        fall = optax.linear_schedule(peak, peak * config.final_fraction, decay)
        after = optax.join_schedules([stable, fall], [rest - decay])
    else:
        after = optax.constant_schedule(peak)
    # Update 1 already moves: warm-up counts from 1 / warmup, not from 0.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov and Hutter 2019) or Muon (Jordan et al. 2024), with decoupled decay.

    With Muon its own matrices alone decay: optax's does not say which of the others are not to.
    """
    moment = None if config.first_moment_dtype == "float32" else config.first_moment_dtype  # None: as the parameters
    rate, decay = learning_rate(config, steps), config.weight_decay
    if config.name == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=decay,
            weight_decay_mask=decay_mask,
            mu_dtype=moment,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=matrix_axes,
            consistent_rms=UPDATE_SIZE,
        )
    else:
        update = optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=decay,
            mask=decay_mask,
            mu_dtype=moment,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
