"""What each expert takes: the tokens of a text that are sent to it more often than to others, by layer.

    python -m experiments.expert_tokens runs/default --text held_out.txt --json experiments/metrics/expert_tokens.json

The text is read by inference routing, which chooses for each token alone. Tokens are ranked by how much they tell of their
expert: `share * log(share / share of the text)`, with shares of the expert's tokens, so that neither the commonest words nor
words seen once come first.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax import Array

from bm_jax import LanguageModel, forward, init_cache
from bm_jax.config import ModelConfig
from bm_jax.data.bundled import shakespeare_texts
from bm_jax.data.shards import write_durably
from bm_jax.model import Parameters

TOP = 6
"""Tokens kept of each expert."""


@dataclasses.dataclass(frozen=True)
class Options:
    directory: tyro.conf.Positional[str]
    """A model directory, or the directory of a training run."""
    text: Path | None = None
    """Text to read; the bundled held-out plays if not given."""
    tokens: int = 65536
    """Read from the start of the text, at most."""
    rows: int = 64
    """Pieces that are read side by side, each from nothing."""
    json: Path | None = None
    """File to write."""


@partial(jax.jit, static_argnames=("config",))
def choices(parameters: Parameters, tokens: Array, config: ModelConfig) -> Array:
    """The first expert of each token in each MoE layer: ids `[B, L]` to int `[B, L, MoE layers]`."""

    def read(cache: Any, token: Array) -> tuple[Any, Array]:
        # The load of a single token is all at its expert, or shared among its `top_k`.
        output = forward(parameters, token[None, None], config, cache=cache)
        assert output.statistics is not None
        return output.cache, output.statistics.load.argmax(axis=-1)

    return jax.vmap(lambda row: jax.lax.scan(read, init_cache(config, 1), row)[1])(tokens)


def measure(model: LanguageModel, text: str, *, tokens: int, rows: int) -> dict[str, Any]:
    """For each MoE layer, each expert's share of the tokens and its top tokens with their shares there and in the text.

    Raises:
        ValueError: the model has no MoE layers, or the text fewer tokens than rows.
    """
    if "moe" not in model.config.kinds:
        raise ValueError("the model has no experts")
    ids = np.array(model.tokenizer.encode(text)[:tokens])
    if len(ids) < rows:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than {rows} rows")
    ids = ids[: len(ids) // rows * rows].reshape(rows, -1)
    chosen = np.asarray(choices(model.parameters, ids, model.config)).reshape(ids.size, -1)
    ids, experts = ids.reshape(-1), model.config.moe.experts
    overall = np.bincount(ids, minlength=model.tokenizer.vocab_size) / len(ids)
    layers = []
    for layer in range(chosen.shape[1]):
        layers.append([_expert(model, ids[chosen[:, layer] == expert], overall, len(ids)) for expert in range(experts)])
    return {"tokens": len(ids), "layers": layers}


def _expert(model: LanguageModel, own: np.ndarray, overall: np.ndarray, total: int) -> dict[str, Any]:
    """One expert, by the tokens sent to it."""
    share = np.bincount(own, minlength=len(overall)) / max(len(own), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        telling = np.where(share > 0, share * np.log(share / overall), 0.0)
    best = [int(token) for token in np.argsort(-telling, kind="stable")[:TOP] if telling[token] > 0]
    top = [{"text": model.tokenizer.decode([token]), "share": share[token], "of_text": overall[token]} for token in best]
    return {"share": len(own) / total, "top": top}


def main(options: Options) -> None:
    """Print the table; write the file."""
    model = LanguageModel.load(options.directory)
    text = "\n\n".join(shakespeare_texts()["validation"].values()) if options.text is None else options.text.read_text()
    found = measure(model, text, tokens=options.tokens, rows=options.rows)
    for layer, experts in enumerate(found["layers"]):
        for number, expert in enumerate(experts):
            top = "  ".join(repr(token["text"]) for token in expert["top"])
            print(f"layer {layer} expert {number}: {100 * expert['share']:4.1f}%  {top}")
    if options.json is not None:
        source = {
            "model": Path(options.directory).name,
            "text": "held-out plays" if options.text is None else options.text.name,
        }
        write_durably(options.json, json.dumps(source | found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
