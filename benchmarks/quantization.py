"""What int8 weights (`bm_jax.quantize`) do to a model's speed, memory and loss, against its weights in the compute dtype.

    python train.py && python benchmarks/quantization.py runs/default            # its held-out text; two cores, a minute
    python benchmarks/quantization.py MODEL_DIR --text book.txt                  # a model directory
    python benchmarks/quantization.py --preset blackmamba_340m_1p5b              # random weights: speed and memory alone
    python benchmarks/quantization.py runs/default --compute-dtype bfloat16      # as if configured so

Speed: the library's loop draws from one-token prompts, nothing ends early, both forms take turns (see `drawing`); where a step
can be one kernel, which int8 cannot yet, the faster of the compute dtype's two ways competes. Loss: both
forms read the same windows of held-out text, with inference routing; the mean in nats a token (with the byte tokenizer, a
byte), its exponential, and how often both find the same token most likely. Memory: bytes of the parameters on the device.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from drawing import Drawing, decoding_parameters, kernel_of
from harness import Comparison, compare, machine

import configs
from bm_jax.config import Config, ConfigError, ModelConfig, from_dict
from bm_jax.data.pipeline import open_data
from bm_jax.data.tokenizer import load_tokenizer
from bm_jax.decode_step import Kernel
from bm_jax.language_model import inference_parameters, read_config, read_parameters
from bm_jax.loss import predicted
from bm_jax.model import Parameters, forward, init_parameters, logits, unrolled

FORMS: tuple[Literal["int8"] | None, ...] = (None, "int8")
Form = tuple[Parameters, Parameters]
"""Parameters of the layers and of the unembedding."""


@dataclasses.dataclass(frozen=True)
class Options:
    directory: Annotated[Path | None, tyro.conf.Positional] = None
    """A run's directory or a model directory."""
    preset: str | None = None
    """A preset with random weights, in the place of a directory."""
    text: Path | None = None
    """Text to take the loss of; a run's directory has held-out text of its own."""
    compute_dtype: str | None = None
    """Instead of the model's own."""
    window: int = 512
    """Tokens of `text` read at once."""
    windows: int = 8
    """Windows of `text` in a batch."""
    batches: int | None = None
    """Most batches of held-out text."""
    prompts: tuple[int, ...] = (1, 8, 64)
    """Sequences drawn at once: one comparison each."""
    new_tokens: int = 256
    rounds: int = 5
    json: Path | None = None


class Quality(NamedTuple):
    """Over the same tokens."""

    tokens: int
    loss: float
    """Nats a token, weights in the compute dtype."""
    loss_int8: float
    agreement: float
    """Share of tokens where both find the same token most likely."""


def main(options: Options) -> None:
    directory = options.directory
    if (directory is None) == (options.preset is None):
        raise SystemExit("give either a directory or --preset")
    model = read_config(directory) if directory is not None else configs.load(options.preset or "").model
    if options.compute_dtype:
        model = dataclasses.replace(model, compute_dtype=options.compute_dtype)
    if directory is None:
        parameters = jax.jit(init_parameters, static_argnums=0)(model, jax.random.key(0))
    else:
        parameters = jax.device_get(read_parameters(directory))
    plain, int8 = (inference_parameters(parameters, model, weights) for weights in FORMS)
    sizes = {model.compute_dtype: size(plain), "int8": size(int8)}
    (name, whole), (_, small) = sizes.items()
    device = jax.devices()[0].device_kind
    print(f"{device}; parameters: {whole:,} bytes in {name}, {small:,} in int8, {small / whole:.3f} times")

    quality = None
    if directory is not None:
        quality = measure_quality((plain, int8), held_out(directory, options), model)
        difference = quality.loss_int8 - quality.loss
        print(
            f"held-out loss, {quality.tokens:,} tokens: {quality.loss:.5f} nats a token in {name}, {quality.loss_int8:.5f} in "
            f"int8 ({difference:+.5f}); perplexity {math.exp(quality.loss):.4f} and {math.exp(quality.loss_int8):.4f} "
            f"({math.expm1(difference):+.3%}); the same token most likely in {quality.agreement:.2%}"
        )
    comparisons = [speed(parameters, plain, int8, model, batch, options) for batch in options.prompts]
    if options.json is not None:
        values = {
            "comparisons": [comparison.to_dict() for comparison in comparisons],
            "bytes": sizes,
            "quality": quality and quality._asdict(),
            "settings": dataclasses.asdict(options),
            "device": device,
            "machine": machine(),
        }
        options.json.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


def size(form: Form) -> int:
    """Bytes of the parameters, those that are both in the layers and the unembedding once."""
    return sum(leaf.nbytes for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(form)}.values())


def speed(parameters: Parameters, plain: Form, int8: Form, model: ModelConfig, batch: int, options: Options) -> Comparison:
    """Tokens a second of both forms, in turns."""

    def contestant(form: Form, kernel: Kernel | None = None) -> Callable[[], None]:
        room = 1 << (options.new_tokens - 1).bit_length()
        drawing = Drawing(*form, model, batch=batch, kernel=kernel, room=room)

        def call() -> None:
            drawing.restart()
            drawing.draw(options.new_tokens)

        return call

    name = model.compute_dtype
    peers = {name: contestant(plain)}
    if kernel := kernel_of(model, batch):
        peers[f"{name}, a step one kernel"] = contestant(decoding_parameters(parameters, model, kernel), kernel)
    comparison = compare(
        f"generation, {batch} at once",
        ("int8", contestant(int8)),
        peers,
        rounds=options.rounds,
        work=batch * options.new_tokens,
        unit="tokens",
    )
    print(comparison, flush=True)
    return comparison


def held_out(directory: Path, options: Options) -> Iterable[dict[str, np.ndarray]]:
    """Batches of `tokens` and `segment_ids`: of the text given, or of what the run held out."""
    if options.text is not None:
        tokenizer = load_tokenizer(directory)
        ids = np.asarray(tokenizer.encode(options.text.read_text(encoding="utf-8")), np.int32)
        return text_batches(ids, options)
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "format" in values:
        raise ConfigError(f"{directory} is a model directory, which holds no text out: give --text FILE")
    config = from_dict(Config, values)
    sources = open_data(config.data, config.model.vocab_size).validation_batches(config.data.batch_size, options.batches)
    return [batch for batches in sources.values() for batch in batches]


def text_batches(ids: np.ndarray, options: Options) -> Sequence[dict[str, np.ndarray]]:
    """Windows that overlap by one token, the last one filled up with padding."""
    L, rows = options.window, options.windows
    if len(ids) < 2:
        raise ConfigError(f"{options.text} has {len(ids)} tokens: there is nothing to predict")
    starts = range(0, len(ids) - 1, L)
    tokens = np.zeros((-(-len(starts) // rows) * rows, L + 1), np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, start in enumerate(starts):
        part = ids[start : start + L + 1]
        tokens[row, : len(part)], segment_ids[row, : len(part)] = part, 1
    count = len(tokens) // rows if options.batches is None else min(len(tokens) // rows, options.batches)
    batches = [slice(i * rows, (i + 1) * rows) for i in range(count)]
    return [{"tokens": tokens[rows], "segment_ids": segment_ids[rows]} for rows in batches]


def measure_quality(forms: Sequence[Form], batches: Iterable[dict[str, np.ndarray]], model: ModelConfig) -> Quality:
    """Loss of both forms, and how often they agree."""
    config = unrolled(model)

    @jax.jit
    def sums(forms: Sequence[Form], tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        weight = predicted(segment_ids)
        losses, best = [], []
        for parameters, head in forms:
            hidden = forward(parameters, tokens[:, :-1], config, segment_ids=segment_ids[:, :-1]).hidden
            scores = logits(head, hidden, config)
            target = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
            losses.append(jnp.sum((jax.nn.logsumexp(scores, axis=-1) - target) * weight))
            best.append(jnp.argmax(scores, axis=-1))
        return jnp.stack([jnp.sum(weight), *losses, jnp.sum((best[0] == best[1]) & weight)]).astype(jnp.float32)

    totals = np.sum([np.asarray(sums(forms, b["tokens"], b["segment_ids"]), np.float64) for b in batches], axis=0)
    tokens, plain, int8, equal = totals.tolist()
    return Quality(int(tokens), plain / tokens, int8 / tokens, equal / tokens)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
