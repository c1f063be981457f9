"""The Triton kernels of `triton_gpu`, which says how they divide the work and what their arrays hold.

A program of one or two warps works on a tile of states `[STATES, BLOCK]`, channels along the lanes. Arrays are read TILE
tokens at a time, so that the loads of a tile are all under way before the recurrence needs the first. Offsets into an array
of tokens and channels are 32-bit within a chunk and 64-bit beyond.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to float32's relative precision also where it is tiny; the polynomial is log(1 + e) / e."""
    e = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    p = -0.029505229 + 0.0052326908 * e
    p = 0.07822595 + p * e
    p = -0.13663246 + p * e
    p = 0.19106008 + p * e
    p = -0.24842982 + p * e
    p = 0.33319098 + p * e
    p = -0.49999493 + p * e
    return tl.maximum(x, 0.0) + (0.99999994 + p * e) * e


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _inside(channel, t, LENGTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Which channels of token t lie in the array."""
    return channel < tl.where(t < LENGTH, CHANNELS, 0)


@triton.jit
def _wide(array, offset, inside):
    """One token's channels in float32, 0 outside the array."""
    return tl.load(array + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _entering(
    enter, sums, increments, A, chunk, of_row, channel, states, known,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state (in reverse, the adjoint) that enters a chunk of a row: what enters the row, carried through those before."""
    of_states = STATES * CHANNELS
    h = tl.load(enter + of_row * of_states + states, mask=known, other=0.0)
    before, k = CHUNKS - 1 - chunk if REVERSE else chunk, 0
    while k < before:  # Triton's interpreter takes no range whose end it computed
        c = of_row * CHUNKS + (CHUNKS - 1 - k if REVERSE else k)
        total = tl.load(sums + c * CHANNELS + channel, mask=channel < CHANNELS, other=0.0)
        decay = tl.where(total < float("inf"), tl.exp2(total * A), 0.0)
        h = decay * h + tl.load(increments + c * of_states + states, mask=known, other=0.0)
        k += 1
    return h


@triton.jit
def summary_kernel(
    wide, gate, dt, rows, A, dt_bias, keep, sums, increments,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, KEEP: tl.constexpr,
    CHUNKS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state that leaves it, and the sum of its steps, infinite where a segment starts in it.

    Forward, `wide` is u and `rows` B. In reverse, for the adjoint, they are dy and C, and time runs backwards.
    """
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = chunk * CHUNK
    origin = (row * LENGTH + begin) * CHANNELS
    channel, n = tl.multiple_of(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 1), tl.arange(0, STATES)
    inside = channel < CHANNELS
    states, known = n[:, None] * CHANNELS + channel[None, :], inside[None, :] & (n[:, None] < STATES)
    A_tile = tl.load(A + states, mask=known, other=0.0)
    bias = _wide(dt_bias, channel, inside) if BIAS else tl.zeros([BLOCK], tl.float32)
    h, total = tl.zeros([STATES, BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    wide += origin
    gate += origin
    dt += origin
    rows += row * CHUNKS * CHUNK * STATES
    keep += row * CHUNKS * CHUNK
    for k in range(CHUNK // TILE):
        first = begin + (CHUNK - TILE - k * TILE if REVERSE else k * TILE)
        raws, values, gates = (), (), ()
        for i in tl.static_range(TILE):
            t = first + (TILE - 1 - i if REVERSE else i)
            here = _inside(channel, t, LENGTH, CHANNELS)
            raws = raws + (_wide(dt, (t - begin) * CHANNELS + channel, here),)
            values = values + (_wide(wide, (t - begin) * CHANNELS + channel, here),)
            if GATE:
                gates = gates + (_wide(gate, (t - begin) * CHANNELS + channel, here),)
        for i in tl.static_range(TILE):
            t = first + (TILE - 1 - i if REVERSE else i)
            row_n = tl.load(rows + t * STATES + n)
            step = _softplus(raws[i] + bias) if SOFTPLUS else raws[i] + bias
            step = tl.where(t < LENGTH, step, 0.0)
            total += step
            decay = tl.exp2(step[None, :] * A_tile)
            if REVERSE:
                value = values[i] * gates[i] * _sigmoid(gates[i]) if GATE else values[i]
                h = decay * (h + row_n[:, None] * value[None, :])
                if KEEP:
                    kept = tl.load(keep + t) > 0
                    h = tl.where(kept, h, 0.0)
                    total = tl.where(kept, total, float("inf"))
            else:
                if KEEP:
                    kept = tl.load(keep + t) > 0
                    h = tl.where(kept, h, 0.0)
                    total = tl.where(kept, total, float("inf"))
                h = decay * h + row_n[:, None] * (step * values[i])[None, :]
    c = row * CHUNKS + chunk
    tl.store(sums + c * CHANNELS + channel, total, mask=inside)
    tl.store(increments + c * STATES * CHANNELS + states, h, mask=known)


@triton.jit
def forward_kernel(
    u, dt, z, B, C, A, D, dt_bias, keep, enter, sums, increments, y, final, starts,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, START: tl.constexpr, TILE: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr,
    GATE: tl.constexpr, SKIP: tl.constexpr, KEEP: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """y, the final state and, where STARTS, the state before every START-th token."""
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = chunk * CHUNK
    origin = (row * LENGTH + begin) * CHANNELS
    channel, n = tl.multiple_of(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 1), tl.arange(0, STATES)
    inside = channel < CHANNELS
    states, known = n[:, None] * CHANNELS + channel[None, :], inside[None, :] & (n[:, None] < STATES)
    A_tile = tl.load(A + states, mask=known, other=0.0)
    bias = _wide(dt_bias, channel, inside) if BIAS else tl.zeros([BLOCK], tl.float32)
    skip = _wide(D, channel, inside) if SKIP else tl.zeros([BLOCK], tl.float32)
    h = _entering(enter, sums, increments, A_tile, chunk, row, channel, states, known, CHANNELS, STATES, CHUNKS, False)
    u += origin
    dt += origin
    z += origin
    y += origin
    B += row * CHUNKS * CHUNK * STATES
    C += row * CHUNKS * CHUNK * STATES
    keep += row * CHUNKS * CHUNK
    starts += row * tl.cdiv(LENGTH, START) * STATES * CHANNELS
    for k in range(CHUNK // TILE):
        first = begin + k * TILE
        if STARTS:
            if first % START == 0 and first < LENGTH:
                tl.store(starts + (first // START).to(tl.int64) * (STATES * CHANNELS) + states, h, mask=known)
        us, raws, gates, outs = (), (), (), ()
        for i in tl.static_range(TILE):
            here = _inside(channel, first + i, LENGTH, CHANNELS)
            place = (first + i - begin) * CHANNELS + channel
            us, raws = us + (_wide(u, place, here),), raws + (_wide(dt, place, here),)
            if GATE:
                gates = gates + (_wide(z, place, here),)
        for i in tl.static_range(TILE):
            t = first + i
            B_row = tl.load(B + t * STATES + n)
            C_row = tl.load(C + t * STATES + n)
            step = _softplus(raws[i] + bias) if SOFTPLUS else raws[i] + bias
            step = tl.where(t < LENGTH, step, 0.0)
            if KEEP:
                h = tl.where(tl.load(keep + t) > 0, h, 0.0)
            h = tl.exp2(step[None, :] * A_tile) * h + B_row[:, None] * (step * us[i])[None, :]
            out = tl.sum(h * C_row[:, None], axis=0)
            if SKIP:
                out += skip * us[i]
            if GATE:
                out *= gates[i] * _sigmoid(gates[i])
            outs = outs + (out.to(y.dtype.element_ty),)
        # Last, so that no load waits behind a store that it might have to see.
        for i in tl.static_range(TILE):
            place = (first + i - begin) * CHANNELS + channel
            tl.store(y + place, outs[i], mask=_inside(channel, first + i, LENGTH, CHANNELS))
    if chunk == CHUNKS - 1:
        tl.store(final + row * STATES * CHANNELS + states, h, mask=known)


@triton.jit
def backward_kernel(
    u, dt, z, dy, B, C, A, D, dt_bias, keep, enter, sums, increments, starts,
    du, ddt, dz, d_rows, dA, dD, d_bias, d_state, saved, products,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, START: tl.constexpr, TILE: tl.constexpr, STRIPS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, SKIP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """All gradients. The sums over channels, of dB and dC, add up over STRIPS strips in `d_rows`, one after the other."""
    group, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = chunk * CHUNK
    origin = (row * LENGTH + begin) * CHANNELS
    n = tl.arange(0, STATES)
    c = row * CHUNKS + chunk
    u += origin
    dt += origin
    z += origin
    dy += origin
    du += origin
    ddt += origin
    dz += origin
    B += row * CHUNKS * CHUNK * STATES
    C += row * CHUNKS * CHUNK * STATES
    keep += row * CHUNKS * CHUNK
    starts += row * tl.cdiv(LENGTH, START) * STATES * CHANNELS
    d_rows += (row * tl.num_programs(0) + group) * CHUNKS * CHUNK * 2 * STATES
    saved += (c * tl.num_programs(0) + group) * (START // TILE) * STATES * BLOCK
    products += (c * tl.num_programs(0) + group) * TILE * 2 * STATES * BLOCK
    own = n[:, None] * BLOCK + tl.multiple_of(tl.arange(0, BLOCK), 1)[None, :]
    row_of_products = tl.arange(0, TILE * 2 * STATES)
    all_products = row_of_products[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    for strip in range(STRIPS):
        channel = tl.multiple_of((group * STRIPS + strip) * BLOCK + tl.arange(0, BLOCK), 1)
        inside = channel < CHANNELS
        states, known = n[:, None] * CHANNELS + channel[None, :], inside[None, :] & (n[:, None] < STATES)
        A_tile = tl.load(A + states, mask=known, other=0.0)
        bias = _wide(dt_bias, channel, inside) if BIAS else tl.zeros([BLOCK], tl.float32)
        skip = _wide(D, channel, inside) if SKIP else tl.zeros([BLOCK], tl.float32)
        g = _entering(enter, sums, increments, A_tile, chunk, row, channel, states, known, CHANNELS, STATES, CHUNKS, True)
        A_sum = tl.zeros([STATES, BLOCK], tl.float32)
        D_sum, bias_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for k in range(CHUNK // START):
            kept = (begin + CHUNK - START) // START - k
            if kept * START < LENGTH:
                # The states before each tile of these START tokens, each lane's own to write and read.
                h = tl.load(starts + kept.to(tl.int64) * (STATES * CHANNELS) + states, mask=known, other=0.0)
                for part in range(START // TILE - 1):
                    tl.store(saved + part * (STATES * BLOCK) + own, h)
                    first = kept * START + part * TILE
                    us, raws = (), ()
                    for i in tl.static_range(TILE):
                        here, place = _inside(channel, first + i, LENGTH, CHANNELS), (first + i - begin) * CHANNELS + channel
                        us, raws = us + (_wide(u, place, here),), raws + (_wide(dt, place, here) + bias,)
                    for i in tl.static_range(TILE):
                        B_row = tl.load(B + (first + i) * STATES + n)
                        step = _softplus(raws[i]) if SOFTPLUS else raws[i]
                        step = tl.where(first + i < LENGTH, step, 0.0)
                        if KEEP:
                            h = tl.where(tl.load(keep + first + i) > 0, h, 0.0)
                        h = tl.exp2(step[None, :] * A_tile) * h + B_row[:, None] * (step * us[i])[None, :]
                tl.store(saved + (START // TILE - 1) * (STATES * BLOCK) + own, h)
                for back in range(START // TILE):
                    part = START // TILE - 1 - back
                    first = kept * START + part * TILE
                    h = tl.load(saved + part * (STATES * BLOCK) + own)
                    us, raws, steps, gates, slopes, befores, B_rows, C_rows = (), (), (), (), (), (), (), ()
                    for i in tl.static_range(TILE):
                        here, place = _inside(channel, first + i, LENGTH, CHANNELS), (first + i - begin) * CHANNELS + channel
                        us, raws = us + (_wide(u, place, here),), raws + (_wide(dt, place, here) + bias,)
                        slopes = slopes + (_wide(dy, place, here),)
                        B_rows = B_rows + (tl.load(B + (first + i) * STATES + n),)
                        C_rows = C_rows + (tl.load(C + (first + i) * STATES + n),)
                        if GATE:
                            gates = gates + (_wide(z, place, here),)
                    for i in tl.static_range(TILE):
                        step = _softplus(raws[i]) if SOFTPLUS else raws[i]
                        steps = steps + (tl.where(first + i < LENGTH, step, 0.0),)
                        if KEEP:
                            h = tl.where(tl.load(keep + first + i) > 0, h, 0.0)
                        befores = befores + (h,)
                        h = tl.exp2(steps[i][None, :] * A_tile) * h + B_rows[i][:, None] * (steps[i] * us[i])[None, :]
                    for i in tl.static_range(TILE - 1, -1, -1):
                        t = first + i
                        B_row, C_row = B_rows[i], C_rows[i]
                        decay = tl.exp2(steps[i][None, :] * A_tile)
                        x = steps[i] * us[i]
                        if i < TILE - 1:
                            h = decay * befores[i] + B_row[:, None] * x[None, :]
                        slope = slopes[i]
                        here, place = _inside(channel, t, LENGTH, CHANNELS), (t - begin) * CHANNELS + channel
                        if GATE:
                            sigmoid = _sigmoid(gates[i])
                            plain = tl.sum(h * C_row[:, None], axis=0) + skip * us[i]
                            d_gate = slope * plain * sigmoid * (1 + gates[i] * (1 - sigmoid))
                            tl.store(dz + place, d_gate.to(dz.dtype.element_ty), mask=here)
                            slope = slope * gates[i] * sigmoid
                        g += C_row[:, None] * slope[None, :]
                        tl.store(products + (2 * i) * (STATES * BLOCK) + own, g * x[None, :])
                        tl.store(products + (2 * i + 1) * (STATES * BLOCK) + own, h * slope[None, :])
                        through = g * decay
                        exponent = through * befores[i]
                        A_sum += exponent * steps[i][None, :]
                        g_B = tl.sum(g * B_row[:, None], axis=0)
                        d_step = us[i] * g_B + tl.sum(exponent * A_tile, axis=0) * 0.6931471805599453
                        d_raw = d_step * _sigmoid(raws[i]) if SOFTPLUS else d_step
                        d_raw = tl.where(t < LENGTH, d_raw, 0.0)
                        bias_sum += d_raw
                        D_sum += slope * us[i]
                        tl.store(du + place, (steps[i] * g_B + skip * slope).to(du.dtype.element_ty), mask=here)
                        tl.store(ddt + place, d_raw.to(ddt.dtype.element_ty), mask=here)
                        g = through
                        if KEEP:
                            g = tl.where(tl.load(keep + t) > 0, g, 0.0)
                    # The sums over channels cross lanes: through memory, a tile at a time, which is cheaper than by shuffles.
                    tl.debug_barrier()
                    sum_place = d_rows + first * (2 * STATES) + row_of_products
                    total = tl.load(sum_place, mask=row_of_products < strip * (TILE * 2 * STATES), other=0.0)
                    tl.store(sum_place, total + tl.sum(tl.load(products + all_products), axis=1))
                    tl.debug_barrier()
        tl.store(dA + c * STATES * CHANNELS + states, A_sum, mask=known)
        tl.store(dD + c * CHANNELS + channel, D_sum, mask=inside)
        tl.store(d_bias + c * CHANNELS + channel, bias_sum, mask=inside)
        if chunk == 0:
            tl.store(d_state + row * STATES * CHANNELS + states, g, mask=known)
