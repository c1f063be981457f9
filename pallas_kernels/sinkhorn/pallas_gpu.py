"""Sinkhorn's iterations in one Pallas Mosaic GPU kernel, for Hopper.

A cluster of eight blocks divides the tokens. After each iteration the blocks exchange the logarithms of their shares of
the loads through device memory. An iteration in XLA is seven kernels, each shorter than its launch.

A block sums probabilities. An expert whose probabilities almost all underflow is summed again, in the log domain.
Run on an H100; its time is in benchmarks/README.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import Call, divided
from pallas_kernels.versions import mosaic_kernel, mosaic_load

BLOCKS = 8
TOKENS = 512
"""Tokens that a block takes at a time, four a lane."""
LANES = plgpu.Layout.WG_STRIDED((TOKENS,), vec_size=4)
"""Where the lanes hold them."""
MOST = 16
"""Experts, each of which takes registers."""
TINY = 2.0**-60
"""Of a block's share of a load: below it, probabilities may have underflowed."""


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if call.target.platform != "gpu" or call.target.capability != 9:
        return f"it needs a GPU of compute capability 9.0 (Hopper), this is {call.target.kind}"
    if divided():
        return "a mesh of several devices divides the tokens"
    scores = call.arguments["scores"]
    assert scores is not None
    if call.arguments["iterations"] is not None:
        return "it takes a number of iterations that is known while tracing"
    if scores.dtype != jnp.float32 or len(scores) > MOST:
        return f"it takes float32 and up to {MOST} experts, got {scores.dtype} and {len(scores)}"
    return None


def _largest(values: list[Any]) -> Any:
    return functools.reduce(jnp.maximum, values)


def _log_probabilities(logits: list[Any]) -> list[Any]:
    """Of each expert, to base 2, from logits to base 2."""
    top = _largest(logits)
    return [logit - top - jnp.log2(sum(jnp.exp2(other - top) for other in logits)) for logit in logits]


def _filled(value: float) -> Any:
    """A value for each of TOKENS tokens."""
    return plgpu.layout_cast(jnp.full((TOKENS,), value, jnp.float32), LANES)


def _fence() -> None:
    """What this block wrote is seen by the others before what comes next."""

    def emit(_: Any) -> None:
        # Imported here, so that machines without a GPU need not have what only compiles for one.
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "fence.acq_rel.cluster;", "", has_side_effects=True)

    emitted: Any = plgpu.inline_mgpu()(emit)
    emitted()


def sinkhorn_potentials_gpu(scores: Array, valid: Array, start: Array, iterations: int, interpret: Any = None) -> Array:
    """`sinkhorn_potentials` by this kernel; `interpret` is Pallas's `InterpretGPUParams`, for tests."""
    if iterations == 0:
        return start
    experts, tokens = scores.shape
    log_share = jnp.log2(valid.sum().astype(jnp.float32)) - math.log2(experts)
    padding = -tokens % (BLOCKS * TOKENS)
    scores = jnp.pad(jnp.where(valid, scores, 0), ((0, 0), (0, padding)))
    weight = jnp.pad(valid.astype(jnp.float32), (0, padding))
    turns = scores.shape[1] // (BLOCKS * TOKENS)
    log2e = math.log2(math.e)

    def body(scores: Any, weight: Any, start: Any, log_share: Any, out: Any, shares: Any, barrier: Any) -> None:
        block = lax.axis_index("block")

        def tile(turn: Any, potential: tuple[Any, ...]) -> tuple[list[Any], Any]:
            """Logits with their potentials, of TOKENS tokens, and the tokens' weights."""
            here = pl.ds((block * turns + turn) * TOKENS, TOKENS)
            logits = [mosaic_load(scores.at[x, here], LANES) * log2e + potential[x] for x in range(experts)]
            return logits, mosaic_load(weight.at[here], LANES)

        def iterate(i: Any, potential: tuple[Any, ...]) -> tuple[Any, ...]:
            def add(turn: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
                logits, weight = tile(turn, potential)
                top = _largest(logits)
                powers = [jnp.exp2(logit - top) for logit in logits]
                scale = weight / sum(powers)
                return tuple(x + power * scale for x, power in zip(sums, powers, strict=True))

            sums = [jnp.sum(x) for x in lax.fori_loop(0, turns, add, (_filled(0.0),) * experts)]

            def in_logarithms(x: int) -> Any:
                def top(turn: Any, most: Any) -> Any:
                    logits, weight = tile(turn, potential)
                    return jnp.maximum(most, jnp.where(weight > 0, _log_probabilities(logits)[x], -jnp.inf))

                most = jnp.max(lax.fori_loop(0, turns, top, _filled(-jnp.inf)))
                shift = jnp.where(most == -jnp.inf, 0.0, most)

                def add(turn: Any, total: Any) -> Any:
                    logits, weight = tile(turn, potential)
                    # Tokens that do not count may exceed `shift` by so much that their power is infinite.
                    return total + jnp.where(weight > 0, jnp.exp2(_log_probabilities(logits)[x] - shift), 0.0)

                return shift + jnp.log2(jnp.sum(lax.fori_loop(0, turns, add, _filled(0.0))))

            # Every iteration has memory of its own: none is read before it is written, so none is in a cache.
            for x in range(experts):
                total = sums[x]
                share = lax.cond(total < TINY, lambda x=x: in_logarithms(x), lambda total=total: jnp.log2(total))
                shares[i, block, x] = share
            if not interpret:
                _fence()  # the barrier alone orders what threads of one block see
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)
            if not interpret:
                _fence()

            def updated(x: int) -> Any:
                of_blocks = [shares[i, k, x] for k in range(BLOCKS)]
                top = _largest(of_blocks)
                load = top + jnp.log2(sum(jnp.exp2(share - top) for share in of_blocks))
                return potential[x] + (log_share[0] - load)

            return tuple(updated(x) for x in range(experts))

        first = tuple(start[x] * log2e for x in range(experts))
        potential = lax.fori_loop(0, iterations, iterate, first)

        @pl.when(block == 0)
        def _() -> None:
            for x in range(experts):
                out[x] = potential[x] / log2e

    kernel = mosaic_kernel(
        body,
        outputs=(jax.ShapeDtypeStruct((experts,), jnp.float32), jax.ShapeDtypeStruct((iterations, BLOCKS, MOST), jnp.float32)),
        scratch=(plgpu.ClusterBarrier(collective_axes=("block",)),),
        cluster=(BLOCKS,),
        cluster_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"interpret": interpret} if interpret else {}),
    )
    return kernel(scores, weight, start, log_share[None])[0]
