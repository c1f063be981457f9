"""Weight-only int8: kernels as int8 values with one float32 scale an output channel, and products that take them.

    scale[n] = max_k |w[k, n]| / 127        values[k, n] = round(w[k, n] / scale[n])        x @ w ~ (x @ values) * scale

so no weight is off by more than half a step, `scale / 2`. Values up to 127 are exact in bfloat16, and the scale comes after
the product, so what a product reads from memory is int8. Experts have scales of their own. Convolutions, norms, routers, A_log
and the embedding's rows, where tokens look them up, stay as they are.

Not by qwix: it quantises a parameter that goes into a product as it is, inside a module. Here kernels are cast before products
(qwix 0.1.8 stops at the first one), experts' kernels are gathered and reshaped, the unembedding has no module; and it imports
the part of Flax that some of the supported versions of jax cannot.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bm_jax.config import ConfigError

FEW_ROWS = 1024
"""Up to so many rows times experts, accelerators take all experts in one product: it is reading weights that costs."""
CONTRACTED = {
    **dict.fromkeys(("in_proj", "x_proj", "dt_proj", "out_proj", "w_in", "w_out", "query", "key", "value", "unembedding"), 1),
    "out": 2,
}
"""Kernels that are quantised, by the parameter's name, and over how many of its axes a product sums."""


class Quantized(NamedTuple):
    """A kernel in the place of its array: `values * scale`, the scale spread over the axes that a product sums over."""

    values: Array
    """int8, in the kernel's shape."""
    scale: Array
    """float32, in the kernel's shape without the axes that a product sums over."""

    @property
    def T(self) -> Quantized:
        """A matrix whose product sums over the last axis, as one whose product sums over the first."""
        return Quantized(self.values.T, self.scale)


@partial(jax.jit, static_argnames=("axes",))
def quantize(kernel: Array, axes: tuple[int, ...]) -> Quantized:
    """`kernel` in int8, with one scale for all that a product sums over: the axes `axes`."""
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    scale = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True) / 127
    values = jnp.clip(jnp.round(kernel / jnp.where(scale == 0, 1, scale)), -127, 127).astype(jnp.int8)
    return Quantized(values, jnp.squeeze(scale, axes).astype(jnp.float32))


def dequantize(kernel: Quantized, axes: tuple[int, ...]) -> Array:
    """The float32 kernel that a quantised one stands for; `axes` as they were given to `quantize`."""
    return kernel.values.astype(jnp.float32) * jnp.expand_dims(kernel.scale, axes)


def quantize_parameter(path: tuple[Any, ...], leaf: Array) -> Array | Quantized:
    """A parameter of a model, at its path of keys, quantised if it is a kernel of `CONTRACTED`."""
    names = [entry.key for entry in path]
    if names[-1] not in CONTRACTED:
        return leaf
    first = ("periods" in names) + ("moe" in names)  # the loop over depth; one kernel an expert
    return quantize(leaf, tuple(range(first, first + CONTRACTED[names[-1]])))


def product(x: Array, kernel: Quantized, axes: int) -> Array:
    """Contract the last `axes` axes of x with the first of the kernel, in the dtype of x; summed and returned in float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Tied to x, or a loop over tokens would convert the values before it begins and read the wide ones.
    x, values = lax.optimization_barrier((x, kernel.values))
    return jnp.tensordot(x, values.astype(x.dtype), axes=axes, preferred_element_type=wide) * kernel.scale


def product_of_chosen(rows: Array, kernel: Quantized, expert: Array) -> Array:
    """Each row `[R, K]` times the kernel `[X, K, ...]` of its expert `[R]`, reading no other; X is no expert, which gives zero.

    Returns:
        `[R, ...]`, in the dtype of `rows`.
    """
    own = jnp.minimum(expert, len(kernel.scale) - 1)
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    chosen = kernel.values.reshape(*kernel.values.shape[:2], -1)[own].astype(rows.dtype)
    out = jnp.einsum("rk,rkn->rn", rows, chosen, preferred_element_type=wide)
    out = jnp.where(expert[:, None] < len(kernel.scale), out, 0)
    return _scaled(out, kernel, own).astype(rows.dtype)


def product_of_all(rows: Array, kernel: Array | Quantized, expert: Array) -> Array:
    """`product_of_chosen` as one product that reads every kernel once; in int8, or as they are.

    Each row stands in the place of its expert in a row of `X * K` that is zero elsewhere.
    """
    values = kernel.values if isinstance(kernel, Quantized) else kernel
    X, K, *shape = values.shape
    member = expert[:, None] == jnp.arange(X)
    placed = jnp.where(member[..., None], rows[:, None], 0).reshape(len(rows), X * K)
    values = values.reshape(X * K, -1)
    if not isinstance(kernel, Quantized):
        return jnp.dot(placed, values).reshape(len(rows), *shape)
    placed, values = lax.optimization_barrier((placed, values))  # as in `product`
    out = jnp.dot(placed, values.astype(rows.dtype), preferred_element_type=jnp.promote_types(rows.dtype, jnp.float32))
    return _scaled(out, kernel, jnp.minimum(expert, X - 1)).astype(rows.dtype)


def _scaled(out: Array, kernel: Quantized, own: Array) -> Array:
    """The sums `[R, N]` of rows of these experts times their scales: `[R, ...]`."""
    return out.reshape(len(out), *kernel.values.shape[2:]) * kernel.scale[own]


def check_weights(weights: str | None) -> None:
    """Raise ConfigError unless a model can run with these weights here."""
    if weights not in (None, "int8"):
        raise ConfigError(f"weights must be None, for the compute dtype, or 'int8', got {weights!r}")
    if weights is not None and jax.sharding.get_mesh().size > 1:
        raise ConfigError("weights='int8' runs on one device: load the model outside jax.set_mesh, or leave weights out")
