"""Routers: which experts a token goes to, and with which weight.

Three routers, all plain functions of the logits `[T, X]` (T tokens, X experts), all in float32 or wider:

- sinkhorn (BlackMamba, arXiv 2402.01771; the semantics are those of Megatron-LM's SwitchMLP). Training:
  `index = argmax(sinkhorn(stop_gradient(logits)))`, `gate = sigmoid(logits)[index]`; the gradient reaches the router
  only through the gate, which need not be the largest. Inference: `gate, index = max(sigmoid(logits))`.
- switch (Fedus et al., arXiv 2101.03961): softmax, the best expert, gate = its probability.
- topk (Mixtral, Jamba): softmax over all experts, the best K, gates optionally divided by their sum.

Sinkhorn's choice depends on every token of the batch, later ones included: it is for training only.

Sinkhorn finds the plan `P[t, e] = exp(logits[t, e] / temperature + row[t] + column[e])` whose rows sum to 1/T and
columns to 1/X. A row potential does not move an argmax inside its row, so only the X column potentials are carried:
one iteration (a row update, then a column update) is `p = softmax(logits / temperature + column)`,
`column -= log(X * mean_t(p))`, in the log domain.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bm_jax.config import MoeConfig
from bm_jax.layers import keep
from bm_jax.shapes import Array, Bool, Float, Int
from pallas_kernels.sinkhorn import sinkhorn_potentials

Scores = Float[Array, "T X"]
Index = Int[Array, "T K"]
Gate = Float[Array, "T K"]
Mask = Bool[Array, "T"]
PerExpert = Float[Array, "X"]
Scalar = Float[Array, ""]


class Statistics(NamedTuple):
    """What a router did; float32 (float64 for float64 logits), over unmasked tokens, all zero when there are none."""

    load: PerExpert
    """[X] fraction of the assignments given to each expert; sums to 1."""
    entropy: Scalar
    """Scalar, nats: mean entropy of softmax(logits), the router's own preference before any balancing."""
    dropped: Scalar
    """Scalar: fraction of assignments dropped for capacity. Routers drop nothing; a dispatcher may replace it."""
    loss: Scalar
    """Scalar: auxiliary losses, already weighted, to add to the training loss; the only differentiable field."""


class Routing(NamedTuple):
    """The experts of each token: `index` int32 `[T, K]` and `gate` `[T, K]`; masked tokens have gate 0."""

    index: Index  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.index, which nobody calls)
    gate: Gate
    statistics: Statistics


def route(logits: Scores, config: MoeConfig, *, training: bool, mask: Mask | None = None, parts: int = 1) -> Routing:
    """Choose `config.top_k` experts for each token with `config.router`.

    Args:
      logits: `[T, X]`, any float type; computed in float32, or float64 when they are float64.
      config: router, top_k, Sinkhorn settings and loss weights.
      training: only the sinkhorn router differs: balanced in training, causal and batch-independent otherwise.
      mask: `[T]` bool, True for real tokens. The others take no part in the plan, the statistics or the losses.
      parts: equal parts of the tokens that Sinkhorn balances each by itself where `config.sinkhorn_scope` is local.
    """
    logits = logits.astype(_compute_type(logits))
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, 0)  # padding may hold anything, NaN included
    choose = {"sinkhorn": _sinkhorn_router, "switch": _switch_router, "topk": _topk_router}[config.router]
    with jax.named_scope("route"):
        index, gate = choose(logits, config, training, mask, parts)
        if mask is not None:
            gate = jnp.where(mask[:, None], gate, 0)
        return Routing(index.astype(jnp.int32), gate, _statistics(logits, index, config, mask))


def _sinkhorn_router(logits: Scores, config: MoeConfig, training: bool, mask: Mask | None, parts: int) -> tuple[Index, Gate]:
    # Differs from Zyphra/BlackMamba: the released code has only the inference branch.
    scores = logits
    if training:
        parts = parts if config.sinkhorn_scope == "local" else 1

        def balance(logits: Scores, mask: Mask | None) -> Scores:
            return sinkhorn(logits, config.sinkhorn_iterations, temperature=config.sinkhorn_temperature, mask=mask)

        scores = jax.lax.stop_gradient(logits)
        if parts == 1:
            scores = balance(scores, mask)
        else:
            split = scores.reshape(parts, -1, logits.shape[1])
            scores = jax.vmap(balance)(split, None if mask is None else mask.reshape(parts, -1)).reshape(logits.shape)
    # Differs from Zyphra/BlackMamba: argmax of the logits, not of their sigmoid. It is the same expert, except where
    # sigmoids round to the same number (float32: all logits above 17; bfloat16: above 6) and the first would win.
    index = keep(jnp.argmax(scores, axis=-1)[:, None])
    return index, jax.nn.sigmoid(_take(logits, index))


def _switch_router(logits: Scores, config: MoeConfig, training: bool, mask: Mask | None, parts: int) -> tuple[Index, Gate]:
    index = keep(jnp.argmax(logits, axis=-1)[:, None])
    return index, _take(jax.nn.softmax(logits), index)


def _topk_router(logits: Scores, config: MoeConfig, training: bool, mask: Mask | None, parts: int) -> tuple[Index, Gate]:
    _, index = jax.lax.top_k(jax.lax.stop_gradient(logits), config.top_k)
    index = keep(index)
    gate = _take(jax.nn.softmax(logits), index)
    return index, gate / gate.sum(axis=-1, keepdims=True) if config.normalize_gates else gate


def sinkhorn(
    logits: Scores,
    iterations: int | Array,
    *,
    temperature: float | Array = 1.0,
    mask: Mask | None = None,
) -> Scores:
    """The logarithm of the balanced plan: rows sum to 1/T', columns to 1/X, T' being the number of unmasked tokens.

    Ends on a row update, so rows are exact to rounding and what is left of the imbalance is in the columns. Masked
    rows are -inf. Safe for logits as large as 1e30. Returns `[T, X]`, float32, or float64 for float64 logits.

    How far a row or column sum is from uniform / argmax load, max over mean; the worst of 200 batches of 512 and 20 of
    16,384 tokens, 8 experts. Mild logits have sd 1 and an expert bias of sd 0.5, hard ones sd 2 and sd 2.

    ```
    temperature  iterations       mild 512    mild 16,384       hard 512    hard 16,384
            1.0           1   0.99% / 1.27   0.15% / 1.03   6.50% / 1.23   1.03% / 1.03
            1.0           2   0.13% / 1.27   0.02% / 1.03   2.39% / 1.20   0.35% / 1.03
            1.0           4   0.00% / 1.27   0.00% / 1.03   0.33% / 1.19   0.04% / 1.03
            1.0           8   0.00% / 1.27   0.00% / 1.03   0.01% / 1.19   0.00% / 1.03
            1.0          16   0.00% / 1.27   0.00% / 1.03   0.00% / 1.19   0.00% / 1.03
            0.5           1   6.50% / 1.23   1.03% / 1.03  17.70% / 1.27   2.71% / 1.03
            0.5           2   2.39% / 1.20   0.35% / 1.03  11.38% / 1.20   1.66% / 1.02
            0.5           4   0.33% / 1.19   0.04% / 1.03   4.70% / 1.17   0.62% / 1.02
            0.5           8   0.01% / 1.19   0.00% / 1.03   0.81% / 1.16   0.09% / 1.02
            0.5          16   0.00% / 1.19   0.00% / 1.03   0.04% / 1.16   0.00% / 1.02
    ```

    The loads are those of the converged plan from 4 iterations on: an argmax rounds each token, so few tokens at a high
    temperature stay uneven. On 2000 hard batches of 512 it exceeds 1.2 in 0.6% at temperature 1, in none at 0.5.
    `python benchmarks/sinkhorn.py` prints these numbers.
    """
    # Differs from Zyphra/BlackMamba: a fixed number of iterations in the log domain. There, an absolute tolerance ends
    # the loop after one pass for T >= 2048 whatever the balance, and an absolute epsilon makes the scale drift. Its
    # exp(2 * logits) is temperature 0.5 here.
    scores = logits.astype(_compute_type(logits)).T / temperature  # [X, T]: tokens minor, long vectors on any device
    tokens = scores.shape[1]
    valid = jnp.ones(tokens, bool) if mask is None else mask | ~mask.any()  # with nothing to plan, plan everything
    scores = jnp.where(valid, scores, 0)
    count = valid.sum().astype(scores.dtype)
    # Differs from Zyphra/BlackMamba: starts by centring each expert, not from 1 / sum_t(exp(logits)). The sum follows
    # its largest term, so with heavy-tailed logits it starts far away; the mean undoes a bias exactly and is cheaper.
    column = sinkhorn_potentials(scores, valid, -scores.sum(axis=1) / count, iterations)
    plan = jax.nn.log_softmax(scores + column[:, None], axis=0) - jnp.log(count)
    return (plan if mask is None else jnp.where(mask, plan, -jnp.inf)).T


def jitter(x: Array, key: Array, amount: float | Array) -> Array:
    """`x` times independent uniform noise in [1 - amount, 1 + amount] (Fedus et al., section 2.2)."""
    noise = jax.random.uniform(key, x.shape, _compute_type(x), 1 - amount, 1 + amount)
    return (x * noise).astype(x.dtype)


def _statistics(logits: Scores, index: Index, config: MoeConfig, mask: Mask | None) -> Statistics:
    """Statistics and losses; a load-balance loss equals its coefficient when probabilities and load are uniform."""
    tokens, experts = logits.shape
    weight = jnp.ones(tokens, logits.dtype) if mask is None else mask.astype(logits.dtype)
    count = jnp.maximum(weight.sum(), 1)

    def mean(values: Array) -> Array:
        return jnp.tensordot(weight, values, 1, precision="highest") / count  # default precision is lower on TPU

    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    load = mean((index[:, :, None] == jnp.arange(experts)).astype(logits.dtype).sum(axis=1)) / index.shape[1]
    entropy = jax.lax.stop_gradient(-mean((p * log_p).sum(axis=-1)))
    loss = jnp.zeros((), logits.dtype)
    if config.load_balance_loss:  # Fedus et al., equations 4 to 6; with sinkhorn in training the load is flat already
        loss += config.load_balance_loss * experts * jnp.sum(mean(p) * load)
    if config.router_z_loss:  # Zoph et al., arXiv 2202.08906, equation 5
        loss += config.router_z_loss * mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
    return Statistics(load, entropy, jnp.zeros((), logits.dtype), loss)


def _take(values: Scores, index: Index) -> Gate:
    """`values[t, index[t, k]]` as a masked sum, whose gradient needs no scatter. `[T, X]`, `[T, K]` -> `[T, K]`."""
    chosen = index[:, :, None] == jnp.arange(values.shape[1])
    return jnp.where(chosen, values[:, None, :], 0).sum(axis=-1)


def _compute_type(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
