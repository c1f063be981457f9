"""Training and generation on the CPU against Hugging Face transformers' `MambaForCausalLM` of equal shape.

    pip install -e '.[parity]'
    python benchmarks/vs_transformers.py                          # both claims, about two minutes on two cores
    python benchmarks/vs_transformers.py --claims generation --width 768 --layers 24 --vocab-size 50280
    python benchmarks/vs_transformers.py --json result.json

Both sides hold the same float32 weights, see the same tokens, and use all cores. Before anything is timed their losses on
one batch must agree to 1e-4, and again after equally many updates; greedy continuations must be equal token for token.

Training: batches of `batch_size` windows, forward, backward, clipping by global norm, AdamW with decay on the same
parameters; we run `make_train_step`, jitted and donated as `fit` does. transformers runs in training mode with torch's
fused AdamW. Of the forms of its scan that run on a CPU without a compiler it gets the parallel scan of the `mambapy` package
where that is installed (`use_mambapy`, `pip install mambapy`), otherwise the sequential loop, which is its default and takes
time quadratic in the length; `--scan` chooses one. torch.compile is not used.

Generation: greedy, prompts of `prompt_tokens` tokens; we run `LanguageModel.generate`, text and all, transformers runs
`generate` in inference mode with its cache. The embedding row of the end-of-document id is zero on both sides, so that
no row ends early.

transformers is timed on one thread and on as many as there are cores, and the faster counts: its operations are small, and
when others use the machine too, one thread can be ten times faster.

`fit` sets the memory allocator of its process (`tune_allocator`), so this does too. Both sides live in one process and
the setting serves both.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
import tyro
from harness import Comparison, compare, measure, usable_cores, write_json

from bm_jax.config import Config, DataConfig, MambaConfig, ModelConfig, OptimizerConfig
from bm_jax.data.tokenizer import ByteTokenizer
from bm_jax.language_model import LanguageModel
from bm_jax.loss import next_token_loss
from bm_jax.model import Parameters, init_parameters
from bm_jax.optimizer import make_optimizer
from bm_jax.train import tune_allocator
from bm_jax.train_step import TrainState, init_state, make_train_step

TOLERANCE = 1e-4
"""Largest relative difference of the losses."""
OUTPUT_SCALE = 20


@dataclasses.dataclass(frozen=True)
class Options:
    claims: tuple[str, ...] = ("training", "generation")
    width: int = 256
    layers: int = 8
    state_size: int = 16
    vocab_size: int = 257
    batch_size: int = 8
    """Windows in a training step."""
    sequence_length: int = 128
    """Tokens predicted in a window."""
    steps: int = 1
    """Training steps in a timed call."""
    prompt_tokens: int = 64
    new_tokens: int = 128
    prompts: tuple[int, ...] = (1, 8)
    """Prompts generated from at once: one comparison each."""
    scan: Literal["auto", "mambapy", "sequential"] = "auto"
    """Form of transformers' scan; auto is mambapy where it is installed."""
    rounds: int = 5
    json: Path | None = None
    """Where the result is written."""


class Ids(ByteTokenizer):
    """Any number of ids, the last of them the end of a document; only those of bytes have a text."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_document = vocab_size, vocab_size - 1


def main(options: Options) -> None:
    jax.config.update("jax_platforms", "cpu")
    tune_allocator()
    config = ModelConfig(
        layers=("mamba",),
        repeats=options.layers,
        vocab_size=options.vocab_size,
        width=options.width,
        mamba=MambaConfig(state_size=options.state_size),
        final_norm="rmsnorm",
        compute_dtype="float32",
        scan_unroll=options.layers,
    )
    parameters = jax.device_get(jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(0)))
    parameters["embedding"] = np.append(parameters["embedding"][:-1], np.zeros((1, config.width), np.float32), axis=0)
    # Untrained, a model with tied embeddings repeats its last token: let the layers say more than the embedding does.
    mixer = parameters["periods"]["layer_0"]["mamba"]
    mixer["out_proj"] = OUTPUT_SCALE * mixer["out_proj"]
    model = to_transformers(parameters, config)
    use_mambapy = options.scan == "mambapy" or (options.scan == "auto" and bool(importlib.util.find_spec("mambapy")))
    for layer in model.backbone.layers:
        layer.mixer.use_mambapy = use_mambapy
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Mamba of {count:,} parameters: width {config.width}, {config.depth} layers, state {config.mamba.state_size}, "
        f"vocabulary {config.vocab_size}; float32, {usable_cores()} cores; "
        f"transformers' scan: {'mambapy' if use_mambapy else 'sequential'}\n"
    )
    comparisons: list[Comparison] = []
    for claim in options.claims:
        for comparison in {"training": compare_training, "generation": compare_generation}[claim](
            options, config, parameters, model
        ):
            print(f"{comparison}\n", flush=True)
            comparisons.append(comparison)
    if options.json is not None:
        write_json(options.json, comparisons, dataclasses.asdict(options))


def to_transformers(parameters: Parameters, config: ModelConfig) -> Any:
    """The same model as a `MambaForCausalLM`, in evaluation mode."""
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            state_size=config.mamba.state_size,
            num_hidden_layers=config.depth,
            expand=config.mamba.expansion,
            conv_kernel=config.mamba.conv_width,
            time_step_rank=config.dt_rank,
            layer_norm_epsilon=config.norm_eps,
            use_bias=False,
            use_conv_bias=True,
            residual_in_fp32=True,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    weights = {
        "backbone.embeddings.weight": parameters["embedding"],
        "lm_head.weight": parameters["embedding"],
        "backbone.norm_f.weight": parameters["final_norm"],
    }
    layers = parameters["periods"]["layer_0"]["mamba"]
    for i in range(config.depth):
        p = {name: leaf[i] for name, leaf in layers.items()}
        mixer = {
            "in_proj.weight": p["in_proj"].reshape(config.width, -1).T,
            "conv1d.weight": p["conv_weight"].T[:, None],
            "conv1d.bias": p["conv_bias"],
            "x_proj.weight": p["x_proj"].T,
            "dt_proj.weight": p["dt_proj"].T,
            "dt_proj.bias": p["dt_bias"],
            "A_log": p["A_log"],
            "D": p["D"],
            "out_proj.weight": p["out_proj"].T,
        }
        weights |= {f"backbone.layers.{i}.mixer.{name}": value for name, value in mixer.items()}
        weights[f"backbone.layers.{i}.norm.weight"] = p["norm"]
    model.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in weights.items()})
    return model.eval()


def thread_counts() -> tuple[int, ...]:
    """Settings that transformers is tried with."""
    return (1, usable_cores()) if usable_cores() > 1 else (1,)


def with_threads(threads: int, function: Callable[[], None]) -> Callable[[], None]:
    """`function` on that many threads of torch."""

    def call() -> None:
        torch.set_num_threads(threads)
        function()

    return call


def compare_training(options: Options, config: ModelConfig, parameters: Parameters, model: Any) -> list[Comparison]:
    """Steps on fresh batches; checks the losses of a batch that no step sees, before and after."""
    recipe = Config(
        model=config,
        data=DataConfig(batch_size=options.batch_size, sequence_length=options.sequence_length),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0),
    )
    random = np.random.default_rng(0)
    shape = (1 + options.steps, options.batch_size, options.sequence_length + 1)
    check, *batches = random.integers(0, config.vocab_size, shape, dtype=np.int32)

    optimizer = make_optimizer(recipe.optimizer, recipe.run.steps)

    def start(params: Parameters) -> TrainState:
        return dataclasses.replace(init_state(recipe, optimizer), params=params, opt_state=optimizer.init(params))

    state = jax.jit(start)(parameters)
    step = jax.jit(make_train_step(recipe, optimizer), donate_argnums=0)
    loss = jax.jit(lambda params, batch: next_token_loss(params, batch, config).sums)

    def ours() -> None:
        nonlocal state
        for tokens in batches:
            state, _ = step(state, as_batch(tokens))
        jax.block_until_ready(state)

    def our_loss() -> float:
        sums = loss(state.params, as_batch(check))
        return float(sums.nll / sums.tokens)

    peer = TorchTraining(copy.deepcopy(model), recipe.optimizer, batches)
    agree("loss before training", our_loss(), peer.loss(check))
    print(f"first step: {measure(ours).wall:.3g} s with compilation, transformers {measure(peer).wall:.3g} s")
    agree(f"loss after {options.steps} update{'s' * (options.steps > 1)}", our_loss(), peer.loss(check))
    return [
        compare(
            f"training, batch {options.batch_size} x {options.sequence_length} tokens, {options.steps} steps a call",
            ("BlackMamba-JAX", ours),
            {f"transformers, {n} thread{'s' * (n > 1)}": with_threads(n, peer) for n in thread_counts()},
            rounds=options.rounds,
            work=options.steps * options.batch_size * options.sequence_length,
            unit="tokens",
        )
    ]


def as_batch(tokens: np.ndarray) -> dict[str, Any]:
    """A training batch of whole documents."""
    return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}


class TorchTraining:
    """Training of a transformers model, step for step what `make_train_step` does."""

    def __init__(self, model: Any, config: OptimizerConfig, batches: list[np.ndarray]) -> None:
        self.model, self.batches, self.clip_norm = model, [torch.tensor(b, dtype=torch.long) for b in batches], config.clip_norm
        undecayed = ("A_log", ".D", "bias", "norm.weight", "norm_f.weight")
        decayed = [p for name, p in model.named_parameters() if not name.endswith(undecayed)]
        rest = [p for name, p in model.named_parameters() if name.endswith(undecayed)]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def __call__(self) -> None:
        """One timed call: a step on each batch."""
        self.model.train()
        for tokens in self.batches:
            self.optimizer.zero_grad(set_to_none=True)
            self._forward(tokens).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()

    def loss(self, tokens: np.ndarray) -> float:
        """Mean nats a token."""
        self.model.eval()
        with torch.inference_mode():
            return self._forward(torch.tensor(tokens, dtype=torch.long)).item()

    def _forward(self, tokens: Any) -> Any:
        logits = self.model(tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def compare_generation(options: Options, config: ModelConfig, parameters: Parameters, model: Any) -> list[Comparison]:
    """Greedy continuations of random prompts, equal on both sides."""
    language_model = LanguageModel(config, parameters, Ids(config.vocab_size))
    random = np.random.default_rng(1)
    comparisons = []
    for count in options.prompts:
        prompts = random.integers(0, config.vocab_size - 1, (count, options.prompt_tokens))
        contest = Generation(language_model, model, prompts, options.new_tokens)
        comparisons.append(
            compare(
                f"generation, {count} x {options.new_tokens} new tokens after {options.prompt_tokens}, greedy",
                ("BlackMamba-JAX", contest.ours),
                {f"transformers, {n} thread{'s' * (n > 1)}": with_threads(n, contest.peer) for n in thread_counts()},
                rounds=options.rounds,
                work=count * options.new_tokens,
                unit="tokens",
            )
        )
        contest.check()
    return comparisons


class Generation:
    """The same prompts continued by both sides."""

    def __init__(self, language_model: LanguageModel, model: Any, prompts: np.ndarray, new_tokens: int) -> None:
        self.language_model, self.model, self.prompts, self.new_tokens = language_model, model, prompts, new_tokens
        self.ids = torch.tensor(prompts)
        self.our_tokens: list[list[int]] = []
        self.peer_tokens: list[list[int]] = []

    def ours(self) -> None:
        completions = self.language_model.generate(self.prompts.tolist(), max_tokens=self.new_tokens, temperature=0)
        self.our_tokens = [list(completion.tokens) for completion in completions]

    def peer(self) -> None:
        with torch.inference_mode():
            output = self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                max_new_tokens=self.new_tokens,
                do_sample=False,
                use_cache=True,
            )
        self.peer_tokens = output[:, self.ids.shape[1] :].tolist()

    def check(self) -> None:
        """End the program unless both wrote the same."""
        if self.our_tokens != self.peer_tokens:
            raise SystemExit("the continuations differ: the comparison is void")
        different = len({token for row in self.our_tokens for token in row})
        print(f"continuations are equal: {len(self.our_tokens)} x {self.new_tokens} tokens, {different} different ones")


def agree(what: str, ours: float, theirs: float) -> None:
    """Print both losses; end the program when they differ."""
    print(f"{what}: {ours:.6f} and {theirs:.6f}")
    if not math.isclose(ours, theirs, rel_tol=TOLERANCE):
        raise SystemExit(f"{what}: BlackMamba-JAX has {ours}, transformers {theirs}: the comparison is void")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
