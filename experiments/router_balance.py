"""How evenly a trained Sinkhorn router loads its experts on text, by temperature and iterations.

    python -m experiments.router_balance runs/default --text held_out.txt

Random logits tell little of this: text repeats itself, equal tokens have similar logits, and an argmax sends all of them to one
expert, however even the plan is. A lower temperature makes plans that are closer to a choice. For each, the text is read with
training routing; the table has the loss, and of each layer the load of its busiest expert in equal shares (1 is even). The last
row routes as in inference.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array

from bm_jax import LanguageModel
from bm_jax.config import ModelConfig
from bm_jax.data.bundled import shakespeare_texts
from bm_jax.loss import next_token_loss
from bm_jax.model import Parameters


@dataclasses.dataclass(frozen=True)
class Options:
    directory: tyro.conf.Positional[str]
    """A model directory, or the directory of a training run."""
    text: Path | None = None
    """Text to read; the bundled held-out plays if not given."""
    tokens: int = 16384
    """Read from the start of the text, at most, and balanced together."""
    rows: int = 32
    """Pieces that are read side by side, each from nothing."""
    temperatures: tuple[float, ...] = (1, 0.5, 0.25, 0.125)
    iterations: tuple[int, ...] = (8, 16)


@partial(jax.jit, static_argnames=("config", "training"))
def read(parameters: Parameters, tokens: Array, config: ModelConfig, *, training: bool) -> tuple[Array, Array]:
    """Load of each layer's busiest expert in equal shares `[MoE layers]`, and nats a token, of ids `[B, L]`."""
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    _, sums, statistics = next_token_loss(parameters, batch, config, training=training)
    assert statistics is not None
    return statistics.load.max(axis=-1) * config.moe.experts, sums.nll / sums.tokens


def measure(model: LanguageModel, text: str, options: Options) -> list[dict[str, Any]]:
    """A row of the table for each temperature and number of iterations, and the row of inference.

    Raises:
        ValueError: the model has no Sinkhorn router, or the text fewer tokens than twice the rows.
    """
    config = model.config
    if "moe" not in config.kinds or config.moe.router != "sinkhorn":
        raise ValueError("the model has no Sinkhorn router")
    ids = np.array(model.tokenizer.encode(text)[: options.tokens], np.int32)
    if len(ids) < 2 * options.rows:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than two for each of {options.rows} rows")
    ids = ids[: len(ids) // options.rows * options.rows].reshape(options.rows, -1)

    def row(training: bool, **moe: Any) -> dict[str, Any]:
        changed = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe))
        load, loss = read(model.parameters, ids, changed, training=training)
        return moe | {"load": np.asarray(load).tolist(), "nats_per_token": float(loss)}

    balanced = [
        row(True, sinkhorn_temperature=temperature, sinkhorn_iterations=iterations)
        for temperature in options.temperatures
        for iterations in options.iterations
    ]
    return [*balanced, row(False)]


def main(options: Options) -> None:
    """Print the table."""
    text = "\n\n".join(shakespeare_texts()["validation"].values()) if options.text is None else options.text.read_text()
    print("temperature  iterations  nats/token  busiest expert of each layer")
    for row in measure(LanguageModel.load(options.directory), text, options):
        way = f"{row['sinkhorn_temperature']:11g}  {row['sinkhorn_iterations']:10}" if len(row) > 2 else f"{'inference':23}"
        print(f"{way}  {row['nats_per_token']:10.4f}  " + "  ".join(f"{load:.2f}" for load in row["load"]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
