"""AdamW from optax with clipping, a schedule, and no decay where decay does harm."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax

from bm_jax.config import OptimizerConfig
from bm_jax.sharding import path_name

NO_DECAY = r"(.*/)?(A_log|D|\w*bias|\w*norm)"
"""Whole paths of parameters without weight decay: state matrices, skips, biases and norm scales."""


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
    """Clip by global norm, then AdamW (Loshchilov and Hutter 2019) with decoupled decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
