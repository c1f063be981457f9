"""Configuration: frozen dataclasses for the model, data, optimizer, mesh and run, checked when they are made.

A model is a *period* of layer kinds repeated `repeats` times. Every system compared here is a value of `ModelConfig`:
BlackMamba is `("mamba", "moe")`, Mamba is `("mamba",)`, a Transformer is `("attention", "mlp")`.

Every class here validates in `__post_init__` and raises `ConfigError` naming the field, the value and what was expected.
`to_dict` and `from_dict` are the one way to and from JSON.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from typing import Any, Literal

Activation = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "silu"]
GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh")
LAYER_KINDS = ("mamba", "moe", "mlp", "attention")


class ConfigError(ValueError):
    """A configuration value is wrong; the message names the field and what would be right."""


LARGEST = 2**62
"""Integers beyond this fit no array size, step count or seed."""


def _positive(owner: object, *names: str) -> None:
    """Sizes and counts: integers of at least 1."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            raise ConfigError(f"{type(owner).__name__}.{name} must be a positive integer, got {value!r}")


def _finite(owner: object, *names: str, above: bool = False) -> None:
    """Finite numbers of at least 0, or above 0."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= (LARGEST if isinstance(value, int) else sys.float_info.max) or (above and value == 0):
            wanted = "positive and finite" if above else "a finite number of at least 0"
            raise ConfigError(f"{type(owner).__name__}.{name} must be {wanted}, got {value!r}")


def _seed(owner: object) -> None:
    """Seeds: integers of 32 bits, which is what random keys are made from."""
    value = getattr(owner, "seed")  # noqa: B009 (any of the classes that have one)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ConfigError(f"{type(owner).__name__}.seed must be an integer from 0 to 2**32 - 1, got {value!r}")


def _one_of(owner: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in choices:
        raise ConfigError(
            f"{type(owner).__name__}.{name} is {value!r}; choose one of {', '.join(choices)}{near_miss(value, choices)}"
        )


def near_miss(word: object, choices: typing.Iterable[str]) -> str:
    """` (did you mean ...?)` when `word` resembles one of `choices`, otherwise an empty string."""
    close = difflib.get_close_matches(str(word), list(choices), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Mamba-1 mixer (Gu and Dao 2023, section 3). Inner width is `expansion * width`."""

    state_size: int = 16
    conv_width: int = 4
    expansion: int = 2
    dt_rank: int | None = None
    """Rank of the dt projection; None means ceil(width / 16)."""
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    inner_norms: bool = False
    """RMSNorm on dt, B and C after their projection (Jamba, section 6.4)."""

    def __post_init__(self) -> None:
        _positive(self, "state_size", "conv_width", "expansion")
        if self.dt_rank is not None:
            _positive(self, "dt_rank")
        _finite(self, "dt_min", "dt_max", "dt_floor", above=True)
        if self.dt_min > self.dt_max:
            raise ConfigError(f"MambaConfig needs 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal grouped-query attention; used only by models with an `attention` layer."""

    heads: int = 8
    kv_heads: int = 8
    head_size: int | None = None
    """Width of one head; None means width / heads."""
    rotary: bool = True
    rotary_base: float = 10000.0
    window: int | None = None
    """Sliding window: a token sees itself and the `window - 1` tokens before it; None sees everything before."""

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_heads")
        for name in ("head_size", "window"):
            if getattr(self, name) is not None:
                _positive(self, name)
        _finite(self, "rotary_base", above=True)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"AttentionConfig.heads ({self.heads}) must be a multiple of AttentionConfig.kv_heads ({self.kv_heads})"
            )


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """Dense MLP layer; `width` is the hidden width (of one half, when the activation is gated)."""

    width: int = 512
    activation: Activation = "swiglu"

    def __post_init__(self) -> None:
        _positive(self, "width")
        _one_of(self, "activation", typing.get_args(Activation))


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Mixture-of-experts layer: router and expert MLPs."""

    experts: int = 8
    width: int = 512
    """Hidden width of one expert (of one half, when the activation is gated)."""
    activation: Activation = "swiglu"
    router: Literal["sinkhorn", "switch", "topk"] = "sinkhorn"
    """sinkhorn: BlackMamba, top-1, sigmoid gate. switch: softmax top-1. topk: softmax over all experts, best `top_k`."""
    top_k: int = 1
    router_bias: bool = True
    normalize_gates: bool = False
    """Divide the `top_k` gates by their sum (Mixtral does, Jamba does not)."""
    capacity_factor: float | None = None
    """None routes without dropping; c gives each expert room for ceil(c * tokens * top_k / experts) tokens in training."""
    sinkhorn_iterations: int = 8
    sinkhorn_temperature: float = 0.5
    """Logits are divided by this before Sinkhorn: 0.5 is Zyphra's factor of 2, 1 is Megatron's. Sharper plans round to
    better balanced choices: see the table in `bm_jax.routing`."""
    sinkhorn_scope: Literal["global", "local"] = "global"
    """Over which tokens Sinkhorn balances on a mesh: all of the batch, exchanging a sum per expert and iteration, or those of
    each part of the batch by itself, exchanging nothing (as Megatron's data-parallel ranks do)."""
    exchange: Literal["padded", "ragged"] = "padded"
    """How tokens travel between the devices of `mesh.expert`: in equal parts with room to spare, everywhere, or by ragged
    all_to_all, on GPUs and TPUs that have it. On H200s padded is the faster by far; see benchmarks/README.md."""
    load_balance_loss: float = 0.0
    router_z_loss: float = 0.0
    input_jitter: float = 0.0
    """In training the router's input is multiplied by uniform noise in [1 - jitter, 1 + jitter]."""

    def __post_init__(self) -> None:
        _positive(self, "experts", "width", "top_k", "sinkhorn_iterations")
        _one_of(self, "activation", typing.get_args(Activation))
        _one_of(self, "router", ("sinkhorn", "switch", "topk"))
        _one_of(self, "sinkhorn_scope", ("global", "local"))
        _one_of(self, "exchange", ("padded", "ragged"))
        _finite(self, "load_balance_loss", "router_z_loss", "input_jitter")
        if self.top_k > self.experts:
            raise ConfigError(f"MoeConfig.top_k ({self.top_k}) must not exceed MoeConfig.experts ({self.experts})")
        if self.top_k > 1 and self.router != "topk":
            raise ConfigError(f"MoeConfig.top_k is {self.top_k} but router {self.router!r} is top-1; use router 'topk'")
        _finite(self, "sinkhorn_temperature", above=True)
        if self.normalize_gates and self.top_k == 1:
            raise ConfigError("MoeConfig.normalize_gates with top_k 1 makes every gate 1, so the router would never learn")
        if self.capacity_factor is not None:
            _finite(self, "capacity_factor", above=True)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model: `layers` (one period) repeated `repeats` times.

    A layer is one of mamba, moe, mlp, attention, or a parallel pair such as "mamba+moe" (both branches read the same
    residual through norms of their own and are added to it together).
    """

    layers: tuple[str, ...] = ("mamba", "moe")
    repeats: int = 3
    vocab_size: int = 264
    """Rows of the embedding; a tokenizer may use fewer ids, the rest are padding and are never sampled."""
    width: int = 128
    mamba: MambaConfig = MambaConfig()
    attention: AttentionConfig = AttentionConfig()
    mlp: MlpConfig = MlpConfig()
    moe: MoeConfig = MoeConfig()
    norm_eps: float = 1e-5
    final_norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """BlackMamba ends in a LayerNorm with bias; the others end in RMSNorm."""
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    compute_dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    residual_dtype: Literal["bfloat16", "float16", "float32", "float64"] = "float32"
    scan_unroll: int = 1
    """Periods unrolled in the loop over depth: 1 compiles fastest; `repeats` runs fastest for small models."""

    def __post_init__(self) -> None:
        _positive(self, "repeats", "vocab_size", "width", "scan_unroll")
        _finite(self, "norm_eps", "initializer_range")
        dtypes = ("bfloat16", "float16", "float32", "float64")
        _one_of(self, "compute_dtype", dtypes)
        _one_of(self, "residual_dtype", dtypes)
        _one_of(self, "final_norm", ("layernorm", "rmsnorm"))
        if not self.layers:
            raise ConfigError("ModelConfig.layers is empty; give one period, for example ('mamba', 'moe')")
        for layer in self.layers:
            for kind in layer.split("+"):
                if kind not in LAYER_KINDS:
                    raise ConfigError(
                        f"ModelConfig.layers contains {layer!r}; a layer is one of {', '.join(LAYER_KINDS)} "
                        f"or a parallel pair of them such as 'mamba+moe'{near_miss(kind, LAYER_KINDS)}"
                    )
            if layer.count("+") > 1 or len(set(layer.split("+"))) != len(layer.split("+")):
                raise ConfigError(f"ModelConfig.layers contains {layer!r}; a parallel pair joins two different kinds")
        if "attention" in self.kinds:
            if self.attention.head_size is None and self.width % self.attention.heads:
                raise ConfigError(
                    f"ModelConfig.width ({self.width}) must be a multiple of attention.heads ({self.attention.heads}), "
                    "or attention.head_size must be given"
                )
            if self.attention.rotary and self.head_size % 2:
                raise ConfigError(f"rotary attention needs an even head size, got {self.head_size}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every mixer or MLP of one period in order, parallel pairs taken apart."""
        return tuple(kind for layer in self.layers for kind in layer.split("+"))

    @property
    def depth(self) -> int:
        """Number of layers (residual blocks), `len(layers) * repeats`."""
        return len(self.layers) * self.repeats

    @property
    def inner_width(self) -> int:
        """Width E of the Mamba mixer."""
        return self.mamba.expansion * self.width

    @property
    def dt_rank(self) -> int:
        """Rank R of the dt projection."""
        return self.mamba.dt_rank or math.ceil(self.width / 16)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.attention.head_size or self.width // self.attention.heads


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it is packed."""

    sources: tuple[str, ...] = ("shakespeare",)
    """Each a folder made by `python -m bm_jax.data prepare`, a Megatron prefix (PREFIX.bin, PREFIX.idx), or
    `shakespeare`, the bundled corpus."""
    weights: tuple[float, ...] = ()
    """Share of the windows drawn from each source, relative to the others'; empty for equal shares."""
    tokenizer: str = "byte"
    """`byte` or the path of a tokenizer.json; must be the one the sources were prepared with."""
    sequence_length: int = 128
    """Tokens in one packed window."""
    batch_size: int = 8
    """Windows in one optimizer step, over all devices and accumulation steps."""
    held_out_tokens: int = 100_000
    """For sources without a validation split (Megatron files): tokens of whole documents held out from the end."""
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "sequence_length", "batch_size", "held_out_tokens")
        _seed(self)
        if not self.sources:
            raise ConfigError("DataConfig.sources is empty; give at least one source")
        if not all(self.sources):
            raise ConfigError(f"DataConfig.sources holds an empty name: {self.sources}")
        if self.weights and len(self.weights) != len(self.sources):
            raise ConfigError(
                f"DataConfig.weights has {len(self.weights)} entries for {len(self.sources)} sources; give one a source"
            )
        if not all(weight > 0 and math.isfinite(weight) for weight in self.weights):
            raise ConfigError(f"DataConfig.weights must be positive and finite, got {self.weights}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the matrices, with a learning-rate schedule; decay skips A_log, D, biases and norms."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of mixers, MLPs and experts by Muon, scaled to updates of AdamW's size, and the rest by AdamW."""
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the mean gradients (of Muon: its momentum) that the optimizer keeps; bfloat16 saves 2 bytes a parameter."""
    learning_rate: float = 5e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: warm-up, then cosine to `final_fraction`. wsd: warm-up, stable, linear decay over the last `decay_fraction`."""
    warmup_steps: int = 100
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    skip_norm_above: float | None = None
    """Updates whose gradients' global norm, before clipping, is above this are skipped and counted; None for no limit."""

    def __post_init__(self) -> None:
        _one_of(self, "name", ("adamw", "muon"))
        _one_of(self, "first_moment_dtype", ("float32", "bfloat16"))
        _one_of(self, "schedule", ("cosine", "wsd", "constant"))
        _finite(self, "learning_rate", "warmup_steps", "weight_decay", "eps")
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"OptimizerConfig.{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"OptimizerConfig.{name} must lie in [0, 1), got {getattr(self, name)}")
        _finite(self, "clip_norm", above=True)
        if self.skip_norm_above is not None:
            _finite(self, "skip_norm_above", above=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each role; the product is the number of devices used. `data = -1` takes all that remain."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        _positive(self, "fsdp", "expert", "tensor", "sequence")
        if self.data != -1:
            _positive(self, "data")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run: where it writes, how long it goes, what it reports."""

    directory: str = "runs/default"
    init_from: str | None = None
    """A model directory, or a run's, whose parameters a run without checkpoints of its own starts from."""
    steps: int = 2000
    """Optimizer steps in the whole run, those done before a restart included."""
    accumulation: int = 1
    """Microbatches a step; `data.batch_size` must be a multiple of it."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes in each period: nothing, all but products, scans and routes, or everything."""
    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)^2)."""
    max_nonfinite_steps: int = 5
    """Consecutive updates skipped for a non-finite or too large loss or gradient before the run stops, or goes back."""
    rewinds: int = 0
    """How often, instead of stopping so, it goes back to its last checkpoint and leaves out the data read since."""
    profile_steps: int = 0
    """Steps to profile, from the third one after the start on, into the folder `profile` of the run directory."""
    report_every: int = 20
    """Steps between reported losses (computed with inference routing)."""
    eval_every: int = 250
    eval_batches: int = 16
    """Held-out batches a validation loss is measured on."""
    checkpoint_every: int = 250
    keep_last: int = 2
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    sample_tokens: int = 300
    """Tokens of text generated when training ends; 0 for none."""
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(
            self, "steps", "accumulation", "max_nonfinite_steps", "report_every", "eval_every", "eval_batches",
            "checkpoint_every", "keep_last",
        )  # fmt: skip
        _one_of(self, "remat", ("none", "dots", "full"))
        _finite(self, "z_loss", "sample_tokens", "rewinds", "profile_steps")
        _seed(self)
        if self.keep_every is not None:
            _positive(self, "keep_every")
        if not self.directory:
            raise ConfigError("RunConfig.directory is empty; name the folder to write to")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a training run is made of."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        if self.data.batch_size % self.run.accumulation:
            raise ConfigError(
                f"data.batch_size ({self.data.batch_size}) must be a multiple of run.accumulation ({self.run.accumulation})"
            )
        if "moe" in self.model.kinds and self.model.moe.experts % self.mesh.expert:
            raise ConfigError(
                f"model.moe.experts ({self.model.moe.experts}) must be a multiple of mesh.expert ({self.mesh.expert})"
            )
        if self.data.sequence_length % self.mesh.sequence:
            raise ConfigError(
                f"data.sequence_length ({self.data.sequence_length}) must be a multiple of mesh.sequence ({self.mesh.sequence})"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: object, *, where: str = "") -> Any:
    """Build dataclass `cls` from JSON values.

    Missing fields take their defaults; an unknown field or a value of the wrong type raises `ConfigError` naming the
    dotted field and near misses.
    """
    where = where or cls.__name__
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where} has no field {name!r}{near_miss(name, fields)}")
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` says, or ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"{where} is {value!r}; choose one of {', '.join(map(str, arguments))}{near_miss(value, arguments)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value
