"""The Mamba-1 mixer (Gu and Dao 2023, figure 3): projection, causal convolution, selective scan, gate, projection."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from bm_jax.config import ModelConfig
from bm_jax.initialization import Parameter, inverse_softplus_step, linear, log_state_index, ones
from bm_jax.layers import Context, keep, project, rms_norm
from bm_jax.sequence_parallel import causal_conv, selective_scan
from bm_jax.shapes import Hidden

NO_STEP = -100.0
"""A dt, before softplus, of nothing: e^(softplus(-100) A) is 1 to the last bit, in float64 too."""


def mamba_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of the mixer; `in_proj[:, 0]` makes the scan's input and `in_proj[:, 1]` the gate."""
    M, E, R, N, K = config.width, config.inner_width, config.dt_rank, config.mamba.state_size, config.mamba.conv_width
    parameters = {
        "in_proj": linear((M, 2, E), fan_in=M),
        "conv_weight": linear((K, E), fan_in=K),
        "conv_bias": linear((E,), fan_in=K),
        "x_proj": linear((E, R + 2 * N), fan_in=E),
        "dt_proj": linear((R, E), fan_in=R),
        "dt_bias": inverse_softplus_step((E,), config.mamba),
        "A_log": log_state_index((E, N)),
        "D": ones((E,)),
        "out_proj": linear((E, M), fan_in=E, scale=1 / math.sqrt(config.depth)),
    }
    if config.mamba.inner_norms:
        parameters |= {"dt_norm": ones((R,)), "B_norm": ones((N,)), "C_norm": ones((N,))}
    return parameters


def mamba(
    parameters: dict[str, Array],
    x: Hidden,
    cache: dict[str, Array] | None,
    context: Context,
    config: ModelConfig,
) -> tuple[Hidden, dict[str, Array] | None]:
    """Mix tokens along time; one token or many, from an empty state or a cached one.

    Args:
        parameters: as declared by `mamba_parameters`.
        x: normed hidden values `[B, L, M]`.
        cache: `conv` taps `[B, K - 1, E]` and scan `state` `[B, E, N]`, or None to start from zero and keep nothing.
        context: documents and padding.
        config: the model.

    Returns:
        `[B, L, M]` in the compute dtype, and the cache after the last token (None when none was given).
    """
    dtype = jnp.dtype(config.compute_dtype)
    R, N = config.dt_rank, config.mamba.state_size
    taps = state = None
    if cache is not None:
        taps = jnp.where(context.continues[:, None, None], cache["conv"], 0)
        state = jnp.where(context.continues[:, None, None], cache["state"], 0)

    xz = keep(project(x, parameters["in_proj"], dtype))
    u, z = xz[:, :, 0], xz[:, :, 1]
    with jax.named_scope("conv"):
        weight, bias = parameters["conv_weight"].astype(dtype), parameters["conv_bias"].astype(dtype)
        before, first_taps = u, taps
        u, taps = causal_conv(u, weight, bias, initial_state=taps, segment_ids=context.segment_ids)
        if context.lengths is not None:
            assert first_taps is not None
            taps = _taps_after(first_taps, before, context.lengths)
        u = jax.nn.silu(u)
    low_rank, B, C = jnp.split(keep(project(u, parameters["x_proj"], dtype)), [R, R + N], axis=-1)
    if config.mamba.inner_norms:
        low_rank = rms_norm(low_rank, parameters["dt_norm"], config.norm_eps)
        B = rms_norm(B, parameters["B_norm"], config.norm_eps)
        C = rms_norm(C, parameters["C_norm"], config.norm_eps)
    dt = project(low_rank, parameters["dt_proj"], dtype, result=jnp.promote_types(dtype, jnp.float32))
    if context.lengths is not None:  # a step of length zero leaves the state as it is
        fed = (jnp.arange(x.shape[1]) < context.lengths[:, None])[..., None]
        u, dt = jnp.where(fed, u, 0), jnp.where(fed, dt, NO_STEP - parameters["dt_bias"])
    with jax.named_scope("scan"):
        y, state = selective_scan(
            u,
            dt,
            -jnp.exp(parameters["A_log"]),
            B,
            C,
            parameters["D"],
            z=z,
            dt_bias=parameters["dt_bias"],
            initial_state=state,
            segment_ids=context.segment_ids,
        )
    y = project(keep(y), parameters["out_proj"], dtype)
    return y, None if cache is None else {"conv": taps, "state": state}


def _taps_after(taps: Array, x: Array, lengths: Array) -> Array:
    """The last K - 1 of `taps` `[B, K - 1, E]` and the first `lengths` `[B]` of `x` `[B, L, E]`."""
    line = jnp.concatenate([taps, x.astype(taps.dtype)], axis=1)
    cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, taps.shape[1], axis=0))
    return cut(line, lengths)
