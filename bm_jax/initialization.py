"""How every parameter starts, in one place.

The rules are those of the released BlackMamba and Mamba code: linear maps as in `torch.nn.Linear` (uniform within
1 / sqrt(fan in)), the Mamba output projection divided by sqrt(number of layers), embeddings normal with the configured
deviation, A_log = log(1..N), D = 1, and dt biases such that the initial step is log-uniform in [dt_min, dt_max].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bm_jax.config import MambaConfig

Initializer = Callable[[Array, tuple[int, ...], jnp.dtype], Array]


class Parameter(NamedTuple):
    """Declaration of one parameter: its shape and how it starts."""

    shape: tuple[int, ...]
    initializer: Initializer


def zeros(shape: tuple[int, ...]) -> Parameter:
    """All zero: biases of norms and routers."""
    return Parameter(shape, lambda key, shape, dtype: jnp.zeros(shape, dtype))


def ones(shape: tuple[int, ...]) -> Parameter:
    """All one: norm scales and the Mamba skip D."""
    return Parameter(shape, lambda key, shape, dtype: jnp.ones(shape, dtype))


def normal(shape: tuple[int, ...], deviation: float) -> Parameter:
    """Normal with the given deviation: embeddings."""
    return Parameter(shape, lambda key, shape, dtype: deviation * jax.random.normal(key, shape, dtype))


def linear(shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> Parameter:
    """Uniform within `scale / sqrt(fan_in)`."""
    bound = scale / math.sqrt(fan_in)
    return Parameter(shape, lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound))


def log_state_index(shape: tuple[int, int]) -> Parameter:
    """A_log[e, n] = log(n + 1), so that A = -exp(A_log) is the real part of S4D-Real (Gu and Dao 2023, section 3.6)."""

    def initializer(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)

    return Parameter(shape, initializer)


def inverse_softplus_step(shape: tuple[int, ...], config: MambaConfig) -> Parameter:
    """softplus(bias) of dt is log-uniform in [dt_min, dt_max], at least dt_floor (Gu and Dao 2023, section 3.6)."""

    def initializer(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), config.dt_floor)
        return step + jnp.log(-jnp.expm1(-step))

    return Parameter(shape, initializer)
