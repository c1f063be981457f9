"""What is learned from the same text: BlackMamba, Mamba, Transformer, Transformer-MoE and MoE-Mamba, at one active size.

    python -m experiments.learning data/corpus --output runs/learning --devices 4          # GPUs of one host
    python -m experiments.learning data/bytes --output runs/small_cpu --size small --sequence-length 256 --batch-size 16
    python -m experiments.learning data/bytes --output runs/tiny --size tiny --steps 20    # to see that all works

`data/corpus` is a folder made by `python -m bm_jax.data prepare` with GPT-NeoX's tokenizer, `data/bytes` one without a
tokenizer. All runs read the same number of tokens. First each system tries three learning rates, and half or twice the best
while that is the lowest or highest of them: in whole runs, since short ones may favour other rates. At its best rate each is
compared: BlackMamba and Mamba with a second seed, and BlackMamba also with other numbers of experts and other routers. Each
run is a process on one device, of those in `CUDA_VISIBLE_DEVICES` where that is set; what is done is kept in `--output`, so
the same command goes on where it stopped; with other data or settings it wants another `--output`. A learning rate with which
a system diverges counts as the worst. At the end everything measured is written to `--metrics`, which figures are drawn from,
and the table is printed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro

from bm_jax.config import ConfigError
from bm_jax.data.shards import read_manifest, write_durably
from experiments.one_run import Plan, config_of, digest, fingerprint
from experiments.systems import SHAPES, SYSTEMS, VARIANTS, Size, model_of


@dataclasses.dataclass(frozen=True)
class Options:
    data: tyro.conf.Positional[str]
    """A prepared folder."""
    output: str = "runs/learning"
    """Where runs and results are kept."""
    metrics: Path | None = None
    """JSON file of all results; `learning.json` in `output` if None."""
    steps: int = 2000
    """Of each run: at 32 windows of 1,024 tokens, 65.5 M tokens."""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Learning rates that each system tries first; one alone is not tried, but taken."""
    widen: int = 3
    """How often a system whose best rate is the lowest or highest of those it tried also tries half or twice that."""
    seeds: tuple[int, ...] = (0, 1)
    """The second one and later are for BlackMamba and Mamba alone."""
    systems: tuple[str, ...] = (*SYSTEMS, *VARIANTS)
    """Those trained; variants take the rate of BlackMamba."""
    devices: int = 1
    """Runs that train at once, each on a GPU of its own where there are GPUs; as many more compile meanwhile."""
    keep: bool = False
    """Keep the checkpoints of the runs with the first seed at the rates chosen."""
    sequence_length: int = 1024
    batch_size: int = 32
    size: Size = "full"
    """Of the models: full, 27 M active parameters; small, 0.13 M, and bytes; tiny, to see that all works."""

    def as_meant(self) -> Options:
        """With a place for the metrics, and tiny models' windows and batches as small as they."""
        least = {"sequence_length": min(self.sequence_length, 64), "batch_size": min(self.batch_size, 4)}
        changes = least if self.size == "tiny" else {}
        return dataclasses.replace(self, metrics=self.metrics or Path(self.output) / "learning.json", **changes)


def main(options: Options) -> None:
    """Train what is not trained yet, write the metrics, print the table.

    Raises:
        SystemExit: options, data or kept results that cannot be used, or a run that failed or diverged: what to do about it.
    """
    options = options.as_meant()
    assert options.metrics is not None
    try:
        check(options)
        for folder in (Path(options.output), options.metrics.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if options.metrics.is_dir():
            raise SystemExit(f"--metrics {options.metrics}: a folder; name a file")
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}; give another folder") from None
    tried, chosen = choose_rates(options, [name for name in options.systems if name in SYSTEMS])
    for one in tried:
        if one["plan"]["learning_rate"] != chosen[one["plan"]["system"]]:
            forget(str(Path(options.output) / one["plan"]["directory"]))
    runs = run_all([plan for name in options.systems for plan in compared_runs(options, name, chosen)], options)
    diverged = [one["plan"]["directory"] for one in runs if "diverged" in one]
    if diverged:
        remedy = "give lower --rates, or leave the system out of --systems"
        raise SystemExit("\n".join(f"{name} diverged (see {options.output}/{name}.log): {remedy}" for name in diverged))
    write_durably(options.metrics, json.dumps({"rates": [brief(one) for one in tried], "runs": runs}) + "\n")
    print(f"\n{table(runs)}\n")
    for line in findings(runs):
        print(line)


def check(options: Options) -> None:
    """Refuse at once what could not be trained.

    Raises:
        SystemExit: an option is wrong.
        ConfigError: the data or a size is.
    """
    for name, values in (("systems", options.systems), ("rates", options.rates), ("seeds", options.seeds)):
        if not values or len(set(values)) < len(values):
            raise SystemExit(f"--{name}: {'a value stands there twice' if values else 'give at least one'}")
    for name, value, least in (("steps", options.steps, 2), ("devices", options.devices, 1)):
        if value < least:
            raise SystemExit(f"--{name} {value}: should be at least {least}")
    unknown = sorted(set(options.systems) - set(SYSTEMS) - set(VARIANTS))
    if unknown:
        raise SystemExit(f"--systems: there is no {', '.join(unknown)}; there are {', '.join(SYSTEMS | VARIANTS)}")
    ids = read_manifest(options.data).tokenizer_ids
    for name, rate in itertools.product(options.systems, options.rates):
        most = config_of(compared_runs(options, name, dict.fromkeys(options.systems, rate))[0]).model.vocab_size
        if ids > most:
            small = f"{options.size} models read bytes, prepared without --tokenizer"
            remedy = "take a smaller tokenizer" if options.size == "full" else small
            raise SystemExit(f"{options.data} has {ids:,} token ids, {name} only {most:,}: {remedy}")


def choose_rates(options: Options, names: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The results of all rates tried, and each system's best: between two that are worse, where `widen` allows it."""
    if len(options.rates) == 1:
        return [], dict.fromkeys(names, options.rates[0])
    rates = {name: sorted(options.rates) for name in names}
    tried: list[dict[str, Any]] = []
    chosen: dict[str, float] = {}
    edges: dict[str, float] = {}
    best: dict[str, dict[str, Any]] = {}
    for left in range(options.widen if names else -1, -1, -1):
        tried = run_all([plan_of(options, name, options.seeds[0], rate) for name in names for rate in rates[name]], options)
        best = {name: min((one for one in tried if one["plan"]["system"] == name), key=final) for name in names}
        chosen = {name: one["plan"]["learning_rate"] for name, one in best.items()}
        edges = {name: rate for name in names if (rate := beyond_edge(rates[name], chosen[name]))}
        if not left or not edges:
            break
        rates |= {name: sorted([*rates[name], rate]) for name, rate in edges.items()}
    for name, rate in chosen.items():
        if math.isinf(final(best[name])):
            raise SystemExit(f"{name} diverged with each learning rate it tried, the lowest {rate:g}: give lower --rates")
        print(f"{name}: learning rate {rate:g}" + (", at the edge of those tried" if name in edges else ""), flush=True)
    return tried, chosen


def beyond_edge(rates: Sequence[float], best: float) -> float | None:
    """The rate to try next where the best is the lowest or the highest; else None."""
    return {min(rates): best / 2, max(rates): best * 2}.get(best)


def compared_runs(options: Options, name: str, chosen: dict[str, float]) -> list[Plan]:
    """A system's runs at its rate."""
    if name in VARIANTS and "blackmamba" not in chosen:
        raise SystemExit(f"--systems: {name} takes the learning rate of blackmamba, which is not among them")
    seeds = options.seeds if name in ("blackmamba", "mamba") else options.seeds[:1]
    return [plan_of(options, name, seed, chosen.get(name, chosen.get("blackmamba", 0.0))) for seed in seeds]


def plan_of(options: Options, name: str, seed: int, rate: float) -> Plan:
    """One run."""
    directory = f"{name}-{rate:g}-seed{seed}-{options.steps}"
    return Plan(
        name, seed, rate, options.steps, str(Path(options.data).resolve()), str(Path(options.output).resolve() / directory),
        sequence_length=options.sequence_length, batch_size=options.batch_size,
        held_out_tokens=SHAPES[options.size].held_out, size=options.size,
        fingerprint=fingerprint(options.data), model=digest(model_of(name, options.size)),
    )  # fmt: skip


def read_result(plan: Plan) -> dict[str, Any] | None:
    """What is kept of a run; None if it is not at its end.

    Raises:
        SystemExit: the file is damaged, or of a run with other data or settings.
    """
    path = Path(f"{plan.directory}.json")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        stored = dict(result["plan"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{path} is damaged: delete it, and the run is trained again") from None
    wanted = plan.kept()
    other = [f"{name} {stored.get(name)}, not {value}" for name, value in wanted.items() if stored.get(name) != value]
    if other:
        raise SystemExit(f"{path} is of other data or settings: {'; '.join(other)}. Give another --output")
    return result


def run_all(plans: Sequence[Plan], options: Options) -> list[dict[str, Any]]:
    """The results of all plans, those of earlier calls read from their files; errors are raised when all have ended.

    Two processes share a device: one trains while the other compiles and waits for its turn.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(number) for number in range(options.devices)]
    if len(visible) < options.devices:
        raise SystemExit(f"--devices {options.devices}: CUDA_VISIBLE_DEVICES={named} names {len(visible)}; ask for no more")
    devices: queue.Queue[str] = queue.Queue()
    for name in 2 * visible[: options.devices]:
        devices.put(name)

    def run(plan: Plan) -> dict[str, Any] | str:
        result = read_result(plan)
        if result is None:
            device = devices.get()
            try:
                environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if options.devices > 1 else {})
                turn = Path(options.output) / f"device{device}.lock"
                arguments = [json.dumps(dataclasses.asdict(plan)), f"{plan.directory}.json", str(turn)]
                command = [sys.executable, "-m", "experiments.one_run", *arguments]
                with open(f"{plan.directory}.log", "w", encoding="utf-8") as log:
                    status = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
            finally:
                devices.put(device)
            if status:
                return f"{plan.system} with rate {plan.learning_rate:g} and seed {plan.seed} failed: see {plan.directory}.log"
            result = read_result(plan)
            assert result is not None, "a process that ends well has written its result"
            said = "diverged" if "diverged" in result else f"{final(result):.4f} bits per byte"
            print(f"{Path(plan.directory).name}: {said}", flush=True)
        if not (options.keep and plan.seed == options.seeds[0]):
            forget(plan.directory)
        return result

    for plan in plans:
        read_result(plan)  # what is wrong is said before anything is trained
    print(f"{len(plans)} runs of {plans[0].steps} steps", flush=True)
    with ThreadPoolExecutor(devices.qsize()) as pool:
        results = list(pool.map(run, plans))
    failed = [one for one in results if isinstance(one, str)]
    if failed:
        raise SystemExit("\n".join(failed))
    return [one for one in results if not isinstance(one, str)]


def forget(directory: str) -> None:
    """Delete the checkpoints of a run that is at its end."""
    shutil.rmtree(Path(directory) / "checkpoints", ignore_errors=True)


def final(result: dict[str, Any]) -> float:
    """Bits per byte at the end; infinite if the run diverged."""
    return math.inf if "diverged" in result else result["validation"][-1]["bits_per_byte"]


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a trial; null for what JSON has no number for."""
    return {
        "system": result["plan"]["system"],
        "learning_rate": result["plan"]["learning_rate"],
        "bits_per_byte": None if "diverged" in result else final(result),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row a system, in Markdown: means over seeds."""
    lines = [
        "| system | seeds | rate | parameters | active, no embeddings | bits per byte | tokens/s | PFLOP | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(one["plan"]["system"] for one in runs):
        of = [one for one in runs if one["plan"]["system"] == name]
        first, ends = of[0], [final(one) for one in of]
        speed = sum(one["tokens_per_second"] for one in of) / len(of)
        minutes = sum(one["validation"][-1]["seconds"] for one in of) / len(of) / 60
        each = "" if len(of) == 1 else f" ({', '.join(f'{end:.4f}' for end in ends)})"
        lines.append(
            f"| {name} | {len(of)} | {first['plan']['learning_rate']:g} | {first['parameters'] / 1e6:.3g} M | "
            f"{first['active_without_embeddings'] / 1e6:.3g} M | {sum(ends) / len(ends):.4f}{each} | "
            f"{speed:,.0f} | {first['validation'][-1]['flops'] / 1e15:.3g} | {minutes:.3g} |"
        )
    return "\n".join(lines)


def findings(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The sentences that the runs allow: steps to Mamba's final loss, and the balance of the experts at the end."""
    found = []
    names = dict.fromkeys(one["plan"]["system"] for one in runs)
    curves = {name: mean_curve([one for one in runs if one["plan"]["system"] == name]) for name in names}
    for name, curve in curves.items() if "mamba" in curves else ():
        steps, loss = curves["mamba"][-1]
        share = steps_to(curve, loss)
        if name != "mamba":
            found.append(
                f"{name} does not reach dense Mamba's final loss in as many steps."
                if share is None
                else f"{name} reaches dense Mamba's final loss after {share:,.0f} of {steps:,} steps, 1/{steps / share:.2f}."
            )
    for one in runs:
        if one["expert_load"]:
            end = one["expert_load"][-1]
            busiest = {how: max(max(layer) * len(layer) for layer in end[how]) for how in ("training", "inference")}
            found.append(
                f"{one['plan']['system']}, seed {one['plan']['seed']}: busiest expert of any layer at the end, "
                f"of an equal share: {busiest['training']:.2f} in training, {busiest['inference']:.2f} in inference routing."
            )
    return found


def mean_curve(runs: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Step and bits per byte, the mean over seeds."""
    curves = [{point["step"]: point["bits_per_byte"] for point in one["validation"]} for one in runs]
    return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in (curves[0] if curves else ())]


def steps_to(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """The step at which a curve reaches a loss, between its points by a straight line; None if it does not."""
    if curve[0][1] <= loss:
        return float(curve[0][0])
    for (start, before), (end, after) in itertools.pairwise(curve):
        if after <= loss:
            return start + (end - start) * (before - loss) / (before - after)
    return None


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on.", file=sys.stderr)
        sys.exit(130)
