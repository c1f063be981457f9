"""One training run of `experiments.learning`, in a process of its own.

    python -m experiments.one_run '{"system": "mamba", "seed": 0, ...}' RESULT.json TURN.lock

The first argument has the fields of `Plan`; what was measured is written to the first file, when the run is at its end. The
steps are compiled at once, but trained only while the run holds the lock of the second file: of several runs on one device,
which name the same file, one trains and the others do not slow it down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bm_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, RunConfig, from_dict
from bm_jax.data.shards import open_prepared, read_manifest, write_durably
from bm_jax.data.tokenizer import load_tokenizer
from experiments.systems import Size, active_without_embeddings, model_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run trains."""

    system: str
    """Of `experiments.systems`."""
    seed: int
    learning_rate: float
    steps: int
    data: str
    """A prepared folder."""
    directory: str
    """Of the run."""
    sequence_length: int = 1024
    batch_size: int = 32
    held_out_tokens: int = 500_000
    """Of held-out text, about, that each validation reads; at least one batch."""
    snapshots: int = 20
    """How often a run looks at held-out text and at the load of its experts."""
    size: Size = "full"
    """Of the model."""
    fingerprint: str = ""
    """Of what the prepared folder holds."""
    model: str = ""
    """A fingerprint of the system's configuration, which may change under its name."""

    def kept(self) -> dict[str, Any]:
        """The fields as they are kept with what was measured: names of folders without where they are."""
        return dataclasses.asdict(self) | {"data": Path(self.data).name, "directory": Path(self.directory).name}


def fingerprint(folder: str) -> str:
    """Of the tokens and the tokenizer of a prepared folder, by the checksums in its manifest.

    Raises:
        DataError: there is no manifest, or it is damaged.
    """
    manifest = read_manifest(folder)
    return digest((manifest.tokenizer_fingerprint, manifest.splits))


def digest(value: object) -> str:
    """A short hash of what Python writes for a value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def config_of(plan: Plan) -> Config:
    """The whole configuration of a run."""
    every = max(1, plan.steps // plan.snapshots)
    return Config(
        model=model_of(plan.system, plan.size),
        data=DataConfig(
            sources=(plan.data,),
            tokenizer=plan.data,
            sequence_length=plan.sequence_length,
            batch_size=plan.batch_size,
            seed=plan.seed,
        ),
        optimizer=OptimizerConfig(learning_rate=plan.learning_rate, warmup_steps=max(1, plan.steps // 20)),
        mesh=MeshConfig(data=1),
        run=RunConfig(
            directory=plan.directory,
            steps=plan.steps,
            report_every=every,
            eval_every=every,
            eval_batches=max(1, plan.held_out_tokens // (plan.sequence_length * plan.batch_size)),
            checkpoint_every=max(1, plan.steps // 2),
            keep_last=1,
            sample_tokens=0,
            seed=plan.seed,
        ),
    )


def train(plan: Plan, turn: Path) -> dict[str, Any]:
    """Train, or go on, or find that all is trained; what was measured, or why the run diverged."""
    import jax

    from bm_jax import fit
    from bm_jax.metrics import read_metrics
    from bm_jax.train import NonFiniteError

    config = config_of(plan)
    jax.config.update("jax_compilation_cache_dir", str(turn.with_name("compiled").resolve()))
    compile_steps(config)
    try:
        with holding(turn):
            result = fit(config)
    except NonFiniteError as error:
        return {"plan": plan.kept(), "diverged": str(error)}
    if not result.finished:
        raise SystemExit(f"{plan.directory}: stopped after step {result.step}")
    return measured(plan, read_metrics(plan.directory))


def measured(plan: Plan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a run that is at its end, by the rows of its metrics."""
    import jax

    from bm_jax.metrics import model_flops_per_token
    from bm_jax.model import count_parameters

    config = config_of(plan)
    for row in rows:
        if not math.isfinite(row.get("validation_loss", 0.0)):
            return {"plan": plan.kept(), "diverged": f"the held-out loss of step {row['step']} is {row['validation_loss']}"}
    tokens = plan.sequence_length * plan.batch_size
    flops = model_flops_per_token(config.model, plan.sequence_length)
    bytes_a_token = held_out_bytes_a_token(plan.data)
    # The first steps compile, and a step with a report or a validation waits for it: the median is what training takes.
    step_seconds = tokens / float(np.median([row["tokens_per_second"] for row in rows]))
    count = count_parameters(config.model)
    return {
        "plan": plan.kept(),
        "device": jax.devices()[0].device_kind,
        "parameters": count.total,
        "active": count.active,
        "active_without_embeddings": active_without_embeddings(config.model),
        "flops_per_token": flops,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / step_seconds,
        "bytes_per_token": bytes_a_token,
        "validation": [
            {
                "step": row["step"],
                "tokens": row["step"] * tokens,
                "flops": row["step"] * tokens * flops,
                "seconds": row["step"] * step_seconds,
                "nats_per_token": row["validation_loss"],
                "bits_per_byte": row["validation_loss"] / math.log(2) / bytes_a_token,
            }
            for row in rows
            if "validation_loss" in row
        ],
        # Of the same batches: what was trained, with balanced routing and router losses, and the loss with inference routing.
        "training": [
            {"step": row["step"], "objective": _finite(row["objective"]), "nats_per_token": _finite(row["loss"])}
            for row in rows
            if "loss" in row
        ],
        "expert_load": [
            {
                "step": row["step"],
                "training": _rounded(row["expert_load_training"]),
                "inference": _rounded(row["expert_load"]),
                "dropped": _rounded(row["dropped"]),
            }
            for row in rows
            if "expert_load" in row
        ],
    }


def compile_steps(config: Config) -> None:
    """Compile what `fit` will, into JAX's cache of compiled programs, where `fit` finds it."""
    import jax

    from bm_jax.data import open_data
    from bm_jax.sharding import make_mesh
    from bm_jax.train import Run

    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = Run(config, open_data(config.data, config.model.vocab_size), mesh)
        shape = (config.data.batch_size, config.data.sequence_length + 1)
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=run.batch_sharding)
        batch = {"tokens": tokens, "segment_ids": tokens}
        run.initialize.lower().compile()
        run.train_step.lower(run.abstract, batch).compile()
        run.eval_step.lower(run.abstract.params, batch).compile()


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """While no other process does."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def held_out_bytes_a_token(folder: str) -> float:
    """Bytes of the held-out documents' text over their tokens, the end of each among them, as the loss counts them."""
    tokenizer = load_tokenizer(folder)
    stream = open_prepared(folder, tokenizer)["validation"]
    tokens, _ = stream.read(0, stream.tokens)
    return len(tokenizer.decode(tokens[tokens != tokenizer.end_of_document]).encode()) / stream.tokens


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def _rounded(values: Any) -> Any:
    return np.round(np.asarray(values, np.float64), 4).tolist()


def main() -> None:
    """The command."""
    plan, result, turn = from_dict(Plan, json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    write_durably(result, json.dumps(train(plan, turn), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
