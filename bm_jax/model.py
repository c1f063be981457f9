"""The language model: embedding, a scanned stack of periods of layers, final norm, unembedding.

Every layer adds to the residual stream what its mixers or MLPs make of its norm: `x + branch(norm(x))`, and for a
parallel pair `x + first(norm_1(x)) + second(norm_2(x))` (BlackMamba, section 3, and its parallel variant).

The functions `init_parameters`, `forward` and `logits` are the interface; the Linen modules only own parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bm_jax.attention import attention, attention_parameters
from bm_jax.cache import Cache
from bm_jax.config import ModelConfig
from bm_jax.initialization import Parameter, normal, ones, zeros
from bm_jax.layers import KEPT, Context, keep, layer_norm, mlp, mlp_parameters, project, rms_norm
from bm_jax.mamba import mamba, mamba_parameters
from bm_jax.moe import moe, moe_parameters
from bm_jax.routing import Statistics
from bm_jax.shapes import Hidden, Logits, SegmentIds, Tokens
from bm_jax.sharding import constrain
from pallas_kernels.selective_scan.fused import STARTS

PARAMETERS = {
    "mamba": mamba_parameters,
    "attention": attention_parameters,
    "mlp": mlp_parameters,
    "moe": moe_parameters,
}

COMPUTE_KERNELS = frozenset(
    {"in_proj", "conv_weight", "conv_bias", "x_proj", "dt_proj", "out_proj"}
    | {"query", "key", "value", "out", "w_in", "w_out", "unembedding"}
)
"""Parameters used in the compute dtype alone; casting them once changes no result."""

Parameters = dict[str, Any]


class Output(NamedTuple):
    """What `forward` returns."""

    hidden: Hidden
    """After the final norm, in the compute dtype."""
    cache: Cache | None
    """The cache after the last token; None when none was given."""
    statistics: Statistics | None
    """Routing statistics, arrays `[MoE layers, ...]` in order of depth; None for a model without MoE layers."""


class Branch(nn.Module):
    """One mixer or MLP with its norm."""

    config: ModelConfig
    kind: str
    training: bool

    @nn.compact
    def __call__(self, residual: Array, cache: dict[str, Array] | None, context: Context):
        parameters = _declare(self, {"norm": ones((self.config.width,)), **PARAMETERS[self.kind](self.config)})
        with jax.named_scope(self.kind):
            x = rms_norm(residual, parameters["norm"], self.config.norm_eps).astype(self.config.compute_dtype)
            statistics = None
            if self.kind == "mamba":
                x, cache = mamba(parameters, x, cache, context, self.config)
            elif self.kind == "attention":
                x, cache = attention(parameters, x, cache, context, self.config)
            elif self.kind == "mlp":
                x = mlp(parameters, x, self.config)
            else:
                jittered = self.training and self.config.moe.input_jitter
                key = self.make_rng("jitter") if jittered else None
                x, statistics = moe(parameters, x, context, self.config, training=self.training, key=key)
        return keep(x), cache, statistics


class Layer(nn.Module):
    """One residual block: one branch, or two in parallel."""

    config: ModelConfig
    kinds: str
    training: bool

    @nn.compact
    def __call__(self, residual: Array, cache: dict[str, dict[str, Array]] | None, context: Context):
        added, caches, statistics = 0.0, {}, []
        for kind in self.kinds.split("+"):
            branch_cache = None if cache is None else cache.get(kind)
            x, branch_cache, branch_statistics = Branch(self.config, kind, self.training, name=kind)(
                residual, branch_cache, context
            )
            added = added + x.astype(residual.dtype)
            if branch_cache is not None:
                caches[kind] = branch_cache
            if branch_statistics is not None:
                statistics.append(branch_statistics)
        return constrain(residual + added, "batch", "sequence", None), caches, statistics


class Period(nn.Module):
    """One period of layers: the body of the loop over depth."""

    config: ModelConfig
    training: bool

    @nn.compact
    def __call__(self, residual: Array, cache: dict | None, context: Context):
        caches, statistics = {}, []
        for i, kinds in enumerate(self.config.layers):
            name = f"layer_{i}"
            layer = Layer(self.config, kinds, self.training, name=name)
            residual, caches[name], layer_statistics = layer(residual, None if cache is None else cache[name], context)
            statistics += layer_statistics
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *statistics) if statistics else None
        return residual, (caches, stacked)


class Model(nn.Module):
    """Owner of every parameter. `remat` is what the backward pass recomputes, see `RunConfig`."""

    config: ModelConfig
    training: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds | None = None,
        cache: Cache | None = None,
        lengths: Array | None = None,
    ) -> Output:
        config = self.config
        ends = {"embedding": normal((config.vocab_size, config.width), config.initializer_range)}
        ends["final_norm"] = ones((config.width,))
        if config.final_norm == "layernorm":
            ends["final_norm_bias"] = zeros((config.width,))
        if not config.tie_embeddings:
            ends["unembedding"] = normal((config.width, config.vocab_size), config.initializer_range)
        parameters = _declare(self, ends)

        context = _context(tokens, segment_ids, cache, lengths)
        residual = parameters["embedding"][tokens].astype(config.residual_dtype)
        residual = constrain(residual, "batch", "sequence", None)
        period = Period
        if self.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(KEPT, STARTS) if self.remat == "dots" else None
            # Inside a loop nothing can undo the recomputation; where periods are unrolled, XLA could.
            period = nn.remat(Period, policy=policy, prevent_cse=config.scan_unroll > 1)
        periods = nn.scan(
            period,
            variable_axes={"params": 0},
            split_rngs={"params": True, "jitter": True},
            in_axes=cast(Any, (0, nn.broadcast)),
            length=config.repeats,
            unroll=config.scan_unroll,
        )(config, self.training, name="periods")
        residual, (layers, statistics) = periods(residual, None if cache is None else cache.layers, context)
        if config.final_norm == "layernorm":
            hidden = layer_norm(residual, parameters["final_norm"], parameters["final_norm_bias"], config.norm_eps)
        else:
            hidden = rms_norm(residual, parameters["final_norm"], config.norm_eps)
        if statistics is not None:
            statistics = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), statistics)
        if cache is not None:
            segment = cache.segment if segment_ids is None else segment_ids[:, -1]
            fed = tokens.shape[1] if lengths is None else lengths
            positions = context.positions[:, -1] + 1 + (fed - tokens.shape[1])
            cache = Cache(layers, segment, positions, cache.length + fed)
        return Output(hidden.astype(config.compute_dtype), cache, statistics)


def _declare(module: nn.Module, declarations: dict[str, Parameter]) -> dict[str, Array]:
    return {
        name: module.param(name, declaration.initializer, declaration.shape, jnp.float32)
        for name, declaration in declarations.items()
    }


def _context(tokens: Array, segment_ids: Array | None, cache: Cache | None, lengths: Array | None) -> Context:
    """Positions within documents, and how these tokens continue the cache."""
    B, L = tokens.shape
    index = jnp.broadcast_to(jnp.arange(L), (B, L))
    starts = jnp.zeros((B, L), bool)
    if segment_ids is not None:
        starts = starts.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    positions = index - first
    continues, cached = jnp.ones(B, bool), jnp.zeros(B, jnp.int32)
    if cache is not None:
        cached = cache.length
        if segment_ids is not None:
            continues = segment_ids[:, 0] == cache.segment
        before = jnp.where(continues, cache.positions, 0)
        positions = jnp.where(first == 0, positions + before[:, None], positions)
    mask = None if segment_ids is None else segment_ids != 0
    if lengths is not None:
        mask = index < lengths[:, None]
    return Context(segment_ids, mask, positions, continues, cached, lengths)


def init_parameters(config: ModelConfig, key: Array) -> Parameters:
    """Fresh float32 parameters as a nested dict; `jax.eval_shape` of this allocates nothing."""
    return dict(Model(config).init({"params": key}, jnp.zeros((1, 1), jnp.int32))["params"])


def cast_kernels(parameters: Parameters, config: ModelConfig) -> Parameters:
    """`COMPUTE_KERNELS` in the compute dtype, all else as it is. Their gradients, summed over devices too, are rounded to it.

    Before a training step's loop over depth it saves casting each layer's kernels twice: kernels read theirs where they lie in
    the stack, and write their gradients there.
    """
    dtype = jnp.dtype(config.compute_dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype) if path[-1].key in COMPUTE_KERNELS else leaf, parameters
    )


def forward(
    parameters: Parameters,
    tokens: Tokens,
    config: ModelConfig,
    *,
    segment_ids: SegmentIds | None = None,
    cache: Cache | None = None,
    lengths: Array | None = None,
    training: bool = False,
    remat: str = "none",
    key: Array | None = None,
) -> Output:
    """Run the model over tokens: a training batch, a prefill, or one decoding step (L = 1 with a cache).

    Args:
        parameters: as `init_parameters` makes them.
        tokens: ids `[B, L]`, each in [0, vocab_size).
        config: the model.
        segment_ids: `[B, L]`, see `bm_jax.shapes`; None for one document a row (continuing the cache's).
        cache: what earlier tokens left; the first token continues its document if it has its segment id.
        lengths: how many tokens of each row are fed `[B]`, the first ones; those after them are padding and change no cache.
            None for all. Needs a cache, without segment_ids.
        training: route as in training (Sinkhorn sees the whole batch, future included) instead of inference.
        remat: what the backward pass recomputes in each period: none, dots or full.
        key: for router input jitter; needed only when that is on in training.
    """
    if training and "moe" in config.kinds and config.moe.input_jitter and key is None:
        raise ValueError("forward: training with moe.input_jitter draws noise; give a key")
    if config.compute_dtype == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("forward: compute_dtype float64 needs jax.config.update('jax_enable_x64', True) first")
    if lengths is not None and (cache is None or segment_ids is not None):
        raise ValueError("forward: lengths are of tokens fed to a cache; give a cache, and no segment_ids")
    rngs = None if key is None else {"jitter": key}
    model = Model(config, training, remat)
    return cast(Output, model.apply({"params": parameters}, tokens, segment_ids, cache, lengths, rngs=rngs))


def logits(parameters: Parameters, hidden: Hidden, config: ModelConfig) -> Logits:
    """Unembed: float32 `[B, L, V]` from `Output.hidden` (float64 when that is the compute dtype)."""
    dtype = jnp.dtype(config.compute_dtype)
    with jax.named_scope("unembedding"):
        return project(hidden, unembedding(parameters, config), dtype, result=jnp.promote_types(dtype, jnp.float32))


def unembedding(parameters: Parameters, config: ModelConfig) -> Array:
    """What hidden values are multiplied with for logits `[M, V]`."""
    return parameters["embedding"].T if config.tie_embeddings else parameters["unembedding"]


def unrolled(config: ModelConfig) -> ModelConfig:
    """The same model as one long period; `unroll` makes its parameters.

    Decoding wants this: in a loop over depth every token copies every layer's weights out of their stack.
    """
    return dataclasses.replace(config, layers=config.layers * config.repeats, repeats=1, scan_unroll=1)


def unroll(parameters: Parameters, config: ModelConfig) -> Parameters:
    """The parameters of `config` as those of `unrolled(config)`; leaves are slices."""
    count = len(config.layers)
    periods = {
        f"layer_{r * count + i}": jax.tree.map(lambda leaf, r=r: leaf[r : r + 1], parameters["periods"][f"layer_{i}"])
        for r in range(config.repeats)
        for i in range(count)
    }
    return parameters | {"periods": periods}


class ParameterCount(NamedTuple):
    """Numbers of parameters."""

    total: int
    active: int
    """Those one token passes through: all but the experts it is not sent to."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count without allocating."""
    shapes = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
    total = idle = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        total += leaf.size
        names = [entry.key for entry in path]
        if "moe" in names and names[-1] in ("w_in", "w_out"):
            idle += leaf.size * (config.moe.experts - config.moe.top_k) // config.moe.experts
    return ParameterCount(total, total - idle)
