"""Importing, exporting and comparing checkpoints.

An imported model directory is one that `bm_jax.LanguageModel.load` reads, with float32 parameters, which hold float16 and
bfloat16 exactly. Beside it `source.json` keeps what the way back needs: the format, its layout, config.json as it was, and
every tensor's type.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from bm_jax.array_files import leaves_of, nest
from bm_jax.config import ConfigError, ModelConfig
from bm_jax.data.tokenizer import Tokenizer, load_tokenizer
from bm_jax.language_model import LanguageModel
from convert.archives import DTYPES, Archive, ArchiveError, open_archive, read_json, write_archive
from convert.configs import recognize, to_ours, to_theirs
from convert.plan import Entry, entries, leaf_shapes
from convert.tables import FORMATS, Format

SOURCE = "source.json"
TIED = "lm_head.weight"
"""Of tied models some checkpoints hold the unembedding too, a copy of the embedding."""
NEOX = "EleutherAI/gpt-neox-20b"


class Summary(NamedTuple):
    """What was converted."""

    format: str
    layout: str
    tensors: int
    parameters: int
    """Numbers in all tensors, a tied unembedding not counted."""
    config: ModelConfig


def import_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    expert_activation: str = "released",
    compute_dtype: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Summary:
    """Make a model directory of a checkpoint.

    Args:
        source: a folder with config.json, or a file beside one.
        destination: a folder that does not exist yet; it is made whole or not at all.
        expert_activation: of BlackMamba's gated experts, a key of `convert.configs.EXPERT_ACTIVATIONS`.
        compute_dtype: of the model; None for bfloat16.
        tokenizer: tokenizer.json, its folder, or `byte`; None for the one beside the checkpoint.
        progress: show a bar.

    Raises:
        ArchiveError: the files are damaged, unsafe, or hold other tensors than the configuration says.
        ConfigError: the configuration cannot be converted.
    """
    source, destination = Path(source), Path(destination).absolute()
    folder = source if source.is_dir() else source.parent
    fields = read_json(folder / "config.json")
    format = FORMATS[recognize(fields)]
    config = to_ours(format.name, fields, expert_activation)
    if compute_dtype is not None:
        config = dataclasses.replace(config, compute_dtype=compute_dtype)
    archive = open_archive(source, format.wrapper)
    layout, wanted = _match(archive, format, config)
    own = _tokenizer_of(folder if tokenizer is None else tokenizer, format, config)
    with _whole(destination) as partial:
        leaves = {path: np.empty(shape, np.float32) for path, shape in leaf_shapes(config).items()}
        for entry in tqdm(wanted, desc="tensors", disable=not progress):
            leaves[entry.leaf][entry.at] = entry.to_ours(archive.read(entry.name))
        if TIED in archive.tensors and config.tie_embeddings:
            _check_tied(archive, leaves["embedding"])
        LanguageModel(config, nest(leaves), own).save(partial)
        kept = {
            "format": format.name,
            "layout": layout,
            "config": fields,
            "tensors": {name: str(dtype) for name, (dtype, _) in archive.tensors.items()},
        }
        _write_json(partial / SOURCE, kept)
    return _summary(format, layout, wanted, config)


def export_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    format: str,
    *,
    dtype: str | None = None,
    layout: str | None = None,
    progress: bool = False,
) -> Summary:
    """Make a checkpoint of a model directory, or of the newest checkpoint of a run.

    A model that came from the same format gets its config.json, tensor names, types and shapes back as they were.

    Args:
        source: what `LanguageModel.load` reads.
        destination: a folder that does not exist yet; it is made whole or not at all.
        format: a key of `convert.tables.FORMATS`.
        dtype: float32, float16 or bfloat16; None for what it was imported in, or float32.
        layout: of the format's layouts; None for that it was imported in, or the format's first.
        progress: show a bar.

    Raises:
        ConfigError: the format cannot express the model, or an argument is unknown.
    """
    source, destination = Path(source), Path(destination).absolute()
    if format not in FORMATS:
        raise ConfigError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    kind = FORMATS[format]
    kept = read_json(source / SOURCE) if (source / SOURCE).exists() else {}
    same = kept.get("format") == format
    model = LanguageModel.load(source)
    config = model.config
    if layout is None:
        layout = str(kept["layout"]) if same else next(iter(kind.layouts))
    if layout not in kind.layouts:
        raise ConfigError(f"{format} has no layout {layout!r}; it has {', '.join(kind.layouts)}")
    fields = kept["config"] if same else to_theirs(format, config)
    wanted = entries(kind, layout, config)
    types = kept["tensors"] if same and layout == kept["layout"] else {}
    known = {str(numpy_dtype): numpy_dtype for numpy_dtype in DTYPES.values()}
    if dtype is not None and dtype not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, got {dtype!r}")

    def type_of(name: str) -> np.dtype:
        return known[dtype or types.get(name, "float32")]

    leaves = leaves_of(model.parameters)
    with _whole(destination) as partial:
        tensors = {
            entry.name: entry.to_theirs(np.asarray(leaves[entry.leaf])[entry.at]).astype(type_of(entry.name))
            for entry in tqdm(wanted, desc="tensors", disable=not progress)
        }
        if config.tie_embeddings and (TIED in types or (not same and format == "mamba")):
            tensors[TIED] = np.asarray(leaves["embedding"]).astype(type_of(TIED))
        if types:  # in the order they came in
            tensors = {name: tensors[name] for name in types}
        write_archive(partial, tensors, kind.pickled, kind.wrapper)
        _write_json(partial / "config.json", fields)
        model.tokenizer.save(partial)
    return _summary(kind, layout, wanted, config)


class Difference(NamedTuple):
    """How a tensor differs between two checkpoints."""

    name: str
    largest: float
    """Largest absolute difference; infinite where one holds NaN and the other does not."""
    at: tuple[int, ...]
    """Where it is."""
    identical: bool
    """Every bit, and the type."""


def compare(
    first: str | os.PathLike[str], second: str | os.PathLike[str], *, on_each: Callable[[Difference], None] | None = None
) -> list[Difference]:
    """Every tensor of two checkpoints of the same format, compared.

    Raises:
        ArchiveError: they hold other tensors, or of other shapes; the message names the first.
    """
    archives = [open_archive(Path(path), "model") for path in (first, second)]
    a, b = (archive.tensors for archive in archives)
    for name in sorted(a.keys() ^ b.keys()):
        raise ArchiveError(f"tensor {name} is only in {first if name in a else second}")
    differences = []
    for name in a:
        if a[name][1] != b[name][1]:
            raise ArchiveError(f"tensor {name} is {a[name][1]} in {first} and {b[name][1]} in {second}")
        x, y = (archive.read(name) for archive in archives)
        same = x.dtype == y.dtype and x.tobytes() == y.tobytes()
        wide = [array.astype(np.float64) for array in (x, y)]
        with np.errstate(invalid="ignore"):  # of infinity less infinity
            gap = np.nan_to_num(np.abs(wide[0] - wide[1]), nan=np.inf)
        gap = np.where((wide[0] == wide[1]) | (np.isnan(wide[0]) & np.isnan(wide[1])), 0, gap)
        where = np.unravel_index(int(np.argmax(gap)), gap.shape) if gap.size else ()
        difference = Difference(name, float(gap.max(initial=0)), tuple(int(i) for i in where), same)
        differences.append(difference)
        if on_each:
            on_each(difference)
    return differences


def _match(archive: Archive, format: Format, config: ModelConfig) -> tuple[str, list[Entry]]:
    """The layout that the archive is in, and its tensors, having compared every name and shape."""
    plans = {layout: entries(format, layout, config) for layout in format.layouts}
    # The layout that shares the most names; what then is missing or unknown is named.
    layout = max(plans, key=lambda layout: sum(entry.name in archive.tensors for entry in plans[layout]))
    wanted = {entry.name: entry for entry in plans[layout]}
    allowed = wanted.keys() | ({TIED} if config.tie_embeddings else set())
    where = archive.files[0].path.parent
    unknown = [name for name in archive if name not in allowed]
    missing = [name for name in wanted if name not in archive.tensors]
    if missing:
        raise ArchiveError(
            f"{where} lacks {len(missing)} of {len(wanted)} tensors that config.json asks for, first {missing[0]}"
        )
    if unknown:
        raise ArchiveError(
            f"{archive.path(unknown[0])} holds {len(unknown)} tensors that its config.json has no place for, "
            f"first {unknown[0]} {archive.tensors[unknown[0]][1]}"
        )
    for name, entry in wanted.items():
        shape = archive.tensors[name][1]
        if shape != entry.shape:
            raise ArchiveError(f"{archive.path(name)}: tensor {name} is {shape}, config.json asks for {entry.shape}")
    return layout, list(wanted.values())


def _check_tied(archive: Archive, embedding: np.ndarray) -> None:
    if not np.array_equal(archive.read(TIED).astype(np.float32), embedding, equal_nan=True):
        raise ArchiveError(f"{archive.path(TIED)}: {TIED} is not the embedding, though config.json says that they are tied")


def _tokenizer_of(source: str | os.PathLike[str], format: Format, config: ModelConfig) -> Tokenizer:
    path = Path(source) / "tokenizer.json" if Path(source).is_dir() else Path(source)
    if source != "byte" and not path.exists():
        hint = (
            f"BlackMamba was trained with that of {NEOX}: download its tokenizer.json and give --tokenizer PATH"
            if format.name == "blackmamba"
            else "put the model's tokenizer.json beside config.json, or give --tokenizer PATH"
        )
        raise ConfigError(f"there is no tokenizer at {path}; {hint}")
    tokenizer = load_tokenizer(source if source == "byte" else path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{path} has {tokenizer.vocab_size} ids but the model's vocab_size is {config.vocab_size}: it is another model's"
        )
    return tokenizer


@contextmanager
def _whole(destination: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `destination` when all went well and is removed otherwise."""
    if destination.exists():
        raise ConfigError(f"{destination} exists already; nothing is overwritten: give another path or remove it")
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, destination)
    except OSError as error:
        raise ArchiveError(f"cannot write {destination}: {error}; nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _summary(format: Format, layout: str, wanted: list[Entry], config: ModelConfig) -> Summary:
    return Summary(format.name, layout, len(wanted), sum(int(np.prod(entry.shape)) for entry in wanted), config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
