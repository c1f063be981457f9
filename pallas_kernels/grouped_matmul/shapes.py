"""What the grouped product's kernels ask of its arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Call, divided


def refuse(call: Call, dtypes: tuple[Any, ...], rows: int, multiple: int) -> str | None:
    """Why a kernel of these dtypes cannot take them, T in multiples of `rows` and K and N of `multiple`; None if it can."""
    lhs, rhs = call.arguments["lhs"], call.arguments["rhs"]
    assert lhs is not None
    assert rhs is not None
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        return "its indices have 32 bits, and jax_enable_x64 is on"
    if divided():
        return "a mesh of several devices divides the arrays; use it inside shard_map"
    dtype = jnp.result_type(lhs, rhs)
    if dtype not in dtypes:
        return f"it multiplies {' and '.join(jnp.dtype(kind).name for kind in dtypes)}, not {dtype}"
    if 0 in (*lhs.shape, *rhs.shape) or any(size % multiple for size in rhs.shape[1:]) or lhs.shape[0] % rows:
        return (
            f"it needs K and N in multiples of {multiple} and T in multiples of {rows}, none zero, "
            f"got lhs {lhs.shape} and rhs {rhs.shape}"
        )
    return None
