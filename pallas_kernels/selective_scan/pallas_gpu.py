"""The selective scan in Pallas Mosaic GPU, for Hopper and later: the forward pass; gradients are those of `xla`.

One warpgroup owns `CHANNELS` channels of one batch row and walks over time in tiles of `TILE` tokens that the copy engine
brings to shared memory. The state is one `[CHANNELS, N]` array in the layout of a WGMMA accumulator: each lane holds two
channels and a quarter of their states, so the sum over states is two shuffles. Softplus, skip and gate work on whole tiles
before and after the recurrence, where no lane repeats another's work. Run on an H200; times in benchmarks/README.md.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import Call
from pallas_kernels.selective_scan.fused import Inputs, differentiable, refuse_float64
from pallas_kernels.selective_scan.xla import selective_scan_xla
from pallas_kernels.versions import mosaic_kernel, mosaic_load

CHANNELS = 64
"""Rows of a WGMMA accumulator."""
TILE = 32
STAGES = 2
UNROLL = 4
"""Tokens whose loads are issued together."""


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if call.target.platform != "gpu" or call.target.capability < 9:
        return f"it needs a GPU of compute capability 9.0 (Hopper) or later, this is {call.target.kind}"
    A = call.arguments["A"]
    states = 0 if A is None else A.shape[1]
    if states % 8 or states > 64:
        return f"N must be a multiple of 8 up to 64, got {states}"
    return refuse_float64(call)


def _softplus(x: Array) -> Array:
    """log(1 + exp(x)), to float32's relative precision also where it is tiny."""
    e = jnp.exp(-jnp.abs(x))
    tail = jnp.where(e < 0.01, e * (1 - e * (0.5 - e * (1 / 3 - e * 0.25))), jnp.log(1 + e))
    return jnp.maximum(x, 0) + tail


def _pad(array: Any, sizes: dict[int, int], value: float = 0) -> Any:
    """`array` with its axes lengthened to `sizes`; None stays None."""
    if array is None:
        return None
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(array.shape)]
    return jnp.pad(array, widths, constant_values=value) if any(after for _, after in widths) else array


def _forward(inputs: Inputs, dt_softplus: bool) -> tuple[Array, Array, None]:
    u, dt, A, B, C, D, z, dt_bias, state, segment_ids = inputs
    (batch, length, channels), states = u.shape, A.shape[1]
    L, E = math.ceil(length / TILE) * TILE, math.ceil(channels / CHANNELS) * CHANNELS
    if not dt_softplus and dt_bias is not None:
        dt, dt_bias = dt + dt_bias, None
    keep = None
    if segment_ids is not None:
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        keep = jnp.pad(same.astype(jnp.float32), ((0, 0), (1, L - length)), constant_values=1)
    f32, wide = jnp.float32, {1: L, 2: E}
    arrays: dict[str, Any] = {
        "u": _pad(u, wide),
        # The tokens added at the end have step 0, so they leave the state as it is.
        "dt": _pad(dt, wide, -1e30 if dt_softplus else 0),
        "z": _pad(z, wide),
        "B": _pad(B.astype(f32), {1: L}),
        "C": _pad(C.astype(f32), {1: L}),
        "keep": keep,
        "A": _pad(A.astype(f32) * math.log2(math.e), {0: E}),
        "D": None if D is None else jnp.broadcast_to(_pad(D.astype(f32), {0: E}), (TILE, E)),
        "dt_bias": None if dt_bias is None else jnp.broadcast_to(_pad(dt_bias.astype(f32), {0: E}), (TILE, E)),
        "state": None if state is None else _pad(state.astype(f32), {1: E}),
    }
    given = {name: array for name, array in arrays.items() if array is not None}
    tiled = [name for name in ("u", "dt", "z", "B", "C", "keep") if name in given]

    accumulator = plgpu.Layout.WGMMA
    row, column = accumulator.reduce(1), accumulator.reduce(0)
    strided = plgpu.Layout.WG_STRIDED((TILE, CHANNELS), vec_size=2)

    def body(*refs):
        named = dict(zip(given, refs, strict=False))
        y_ref, final_ref, step_ref, scaled_ref, sum_ref = refs[len(given) :]
        i, j = lax.axis_index("batch"), lax.axis_index("channels")
        mine = pl.ds(j * CHANNELS, CHANNELS)
        rates = mosaic_load(named["A"].at[mine], accumulator)
        bias = mosaic_load(named["dt_bias"].at[:, mine], strided) if "dt_bias" in given else None
        skip = mosaic_load(named["D"].at[:, mine], strided) if "D" in given else None

        def tile(_, *blocks_and_state):
            *blocks, h = blocks_and_state
            block = dict(zip([*tiled, "y"], blocks, strict=True))
            x, step = mosaic_load(block["u"], strided).astype(f32), mosaic_load(block["dt"], strided).astype(f32)
            step = step if bias is None else step + bias
            step = _softplus(step) if dt_softplus else step
            step_ref[...] = step
            scaled_ref[...] = step * x
            plgpu.commit_smem()

            def by_channel(ref, t):
                return lax.broadcast_in_dim(mosaic_load(ref.at[t], row), (CHANNELS, states), (0,))

            def by_state(ref, t):
                return lax.broadcast_in_dim(mosaic_load(ref.at[t], column), (CHANNELS, states), (1,))

            def tokens(k, h):
                # Several tokens at once, loads first and stores last, so that the latency of both is hidden.
                times = [k * UNROLL + q for q in range(UNROLL)]
                decays = [jnp.exp2(by_channel(step_ref, t) * rates) for t in times]
                increments = [by_channel(scaled_ref, t) * by_state(block["B"], t) for t in times]
                readouts = [by_state(block["C"], t) for t in times]
                outputs = []
                for q, t in enumerate(times):
                    if "keep" in given:
                        kept = lax.broadcast_in_dim(block["keep"][t], (CHANNELS, states), ()) > 0
                        h = jnp.where(kept, h, jnp.zeros((CHANNELS, states), f32))
                    h = decays[q] * h + increments[q]
                    outputs.append(h * readouts[q])
                sums = [jnp.sum(output, axis=1) for output in outputs]
                for t, value in zip(times, sums, strict=True):
                    sum_ref[t] = value
                return h

            h = lax.fori_loop(0, TILE // UNROLL, tokens, h)
            plgpu.commit_smem()
            y = mosaic_load(sum_ref, strided)
            y = y if skip is None else y + skip * x
            if "z" in given:
                gate = mosaic_load(block["z"], strided).astype(f32)
                y = y * gate / (1 + jnp.exp(-gate))
            block["y"][...] = y.astype(u.dtype)
            return h

        if "state" in given:
            h = mosaic_load(named["state"].at[i, mine], accumulator)
        else:
            h = plgpu.layout_cast(jnp.zeros((CHANNELS, states), f32), accumulator)
        rows = plgpu.BlockSpec((TILE, CHANNELS), lambda t: (t, j))
        narrow = plgpu.BlockSpec((TILE, states), lambda t: (t, 0))
        flags = plgpu.BlockSpec((TILE,), lambda t: (t,))
        specs = {"u": rows, "dt": rows, "z": rows, "B": narrow, "C": narrow, "keep": flags}
        pipeline = plgpu.emit_pipeline(
            tile, grid=(L // TILE,), in_specs=[specs[name] for name in tiled], out_specs=[rows],
            max_concurrent_steps=STAGES, init_carry=h,
        )  # fmt: skip
        h = pipeline(*(named[name].at[i] for name in tiled), y_ref.at[i])
        final_ref[i, mine] = h

    kernel = mosaic_kernel(
        body,
        outputs=(jax.ShapeDtypeStruct((batch, L, E), u.dtype), jax.ShapeDtypeStruct((batch, E, states), f32)),
        scratch=[plgpu.SMEM((TILE, CHANNELS), f32)] * 3,
        grid=(batch, E // CHANNELS),
        grid_names=("batch", "channels"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    y, final = kernel(*given.values())
    return y[:, :length, :channels], final[:, :channels], None


def _backward(inputs: Inputs, _: None, dy: Array, d_final: Array, dt_softplus: bool) -> Inputs:
    """Gradients of the plain XLA form, whose forward pass is run again."""

    def scan(inputs: Inputs):
        u, dt, A, B, C, D, z, dt_bias, state, segment_ids = inputs
        return selective_scan_xla(
            u, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=state, segment_ids=segment_ids
        )

    floats = inputs._replace(segment_ids=None)
    pullback = jax.vjp(lambda floats: scan(floats._replace(segment_ids=inputs.segment_ids)), floats)[1]
    return pullback((dy, d_final))[0]


selective_scan_gpu = differentiable(_forward, _backward)
