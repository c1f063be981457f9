"""Importing, exporting and comparing checkpoints.

An imported model directory is one that `bm_jax.LanguageModel.load` reads, with float32 parameters, which hold float16 and
bfloat16 exactly. Beside it `source.json` keeps what the way back needs: the format, its layout, config.json as it was, and
every tensor's type.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from bm_jax.config import ConfigError, ModelConfig
from bm_jax.data.tokenizer import Tokenizer, load_tokenizer
from bm_jax.leaves import CheckpointError, leaves_of
from bm_jax.model import count_parameters
from bm_jax.model_directory import (
    PARAMETERS,
    SOURCE,
    bring_companions,
    check_shapes,
    parameters_of,
    read_config,
    read_parameters,
    write_description,
)
from bm_jax.parameter_folder import open_parameters, write_parameters
from bm_jax.tensor_file import Kind, Memory
from convert.archives import DTYPES, NAMES, Archive, ArchiveError, import_torch, open_archive, read_json, write_archive
from convert.configs import differences, recognize, to_ours, to_theirs
from convert.configs_mamba import activation_field
from convert.hub import download, is_hub_name
from convert.plan import Entry, entries, leaf_shapes
from convert.tables import FORMATS, Format

TIED = "lm_head.weight"
"""Of tied models some checkpoints hold the unembedding too, a copy of the embedding."""
COMPARED = 2**24
"""Numbers compared at a time."""
Reader = Callable[[str, tuple, Memory], np.ndarray]
"""Gives the part of a leaf that an index takes, perhaps in the memory given."""
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
    revision: str | None = None,
    expert_activation: str = "released",
    compute_dtype: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Summary:
    """Make a model directory of a checkpoint.

    Args:
        source: a folder with config.json, a file beside one, or `owner/name` on the Hugging Face hub.
        revision: branch, tag or commit on the hub; None for its main branch.
        destination: a folder that does not exist yet; it is made whole or not at all.
        expert_activation: of BlackMamba's gated experts, a key of `convert.configs.EXPERT_ACTIVATIONS`.
        compute_dtype: of the model; None for bfloat16.
        tokenizer: tokenizer.json, its folder, or `byte`; None for the one beside the checkpoint.
        progress: show a bar.

    Raises:
        ArchiveError: the files are damaged, unsafe, or hold other tensors than the configuration says.
        ConfigError: the configuration cannot be converted.
    """
    origin, destination = {"source": str(source)}, Path(destination).absolute()
    require_new(destination)
    if is_hub_name(source):
        source, origin["revision"] = download(str(source), revision)
    elif revision is not None:
        raise ConfigError(f"revision {revision!r} is of the hub, but {source} is on this machine")
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    fields = read_json(folder / "config.json")
    format = FORMATS[recognize(fields)]
    config = to_ours(format.name, fields, expert_activation)
    if compute_dtype is not None:
        config = dataclasses.replace(config, compute_dtype=compute_dtype)
    archive = open_archive(source, format.wrapper)
    layout, wanted = _match(archive, format, config)
    own = _tokenizer_of(folder if tokenizer is None else tokenizer, format, config)
    if TIED in archive.tensors and config.tie_embeddings:
        _check_tied(archive, next(entry.name for entry in wanted if entry.leaf == "embedding"))
    leaves = {path: Kind(np.dtype(np.float32), shape) for path, shape in leaf_shapes(config).items()}
    with _whole(destination) as partial, tqdm(total=len(wanted), desc="tensors", disable=not progress) as bar:
        write_parameters(partial / PARAMETERS, leaves, _our_blocks(archive, leaves, wanted, bar))
        write_description(partial, config, own)
        bring_companions(folder, partial)
        kept = origin | {
            "format": format.name,
            "layout": layout,
            "config": fields,
            "tensors": {name: str(kind.dtype) for name, kind in archive.tensors.items()},
        }
        _write_json(partial / SOURCE, kept)
    return _summary(format, layout, wanted, config)


def _our_blocks(archive: Archive, leaves: Mapping[str, Kind], wanted: list[Entry], bar: tqdm) -> Iterator[np.ndarray]:
    """Each leaf as float32, period by period: its elements in order."""
    there, blocks = Memory(), itertools.cycle((Memory(), Memory()))  # one block is written while the next is made
    for path, (dtype, shape) in leaves.items():
        parts = [entry for entry in wanted if entry.leaf == path]
        whole = not parts[0].at
        for period in range(1 if whole else shape[0]):
            block = next(blocks).take(dtype, shape if whole else shape[1:])
            for entry in parts:
                if whole or entry.at[0] == period:
                    block[entry.at[1:]] = entry.as_ours(archive.read(entry.name, there))
                    bar.update()
            yield block


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
    kind, known = FORMATS[format], {str(numpy_dtype): numpy_dtype for numpy_dtype in DTYPES}
    if dtype is not None and dtype not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, got {dtype!r}")
    if layout is not None and layout not in kind.layouts:
        raise ConfigError(f"{format} has no layout {layout!r}; it has {', '.join(kind.layouts)}")
    config, tokenizer = read_config(source), load_tokenizer(source)
    with _whole(destination) as partial, _opened(source, config) as read:
        kept = _kept(source, config)
        same = kept.get("format") == format
        layout = layout or str(kept["layout"] if same else next(iter(kind.layouts)))
        types: dict[str, str] = kept.get("tensors", {})
        usual = next(iter(types.values())) if len(set(types.values())) == 1 else "float32"
        fields = kept["config"] if same else to_theirs(format, config)
        if format == "blackmamba":
            fields = fields | activation_field(config)
        wanted = entries(kind, layout, config)
        by_name = {entry.name: entry for entry in wanted}
        as_it_came = same and layout == kept["layout"]
        if config.tie_embeddings and (TIED in types if same else format == "mamba"):
            by_name[TIED] = next(entry for entry in wanted if entry.leaf == "embedding")
        if as_it_came and types.keys() != by_name.keys():
            raise _damaged(source, "its tensors are not those of the model")
        if as_it_came:  # in the order they came in
            by_name = {name: by_name[name] for name in types}
        tensors = {
            name: Kind(known[dtype or (types[name] if as_it_came else usual)], entry.shape) for name, entry in by_name.items()
        }

        def arrays() -> Iterator[np.ndarray]:
            there, blocks = Memory(), itertools.cycle((Memory(), Memory()))  # one is written while the next is made
            for name, entry in tqdm(by_name.items(), desc="tensors", disable=not progress):
                array, part = next(blocks).take(*tensors[name]), read(entry.leaf, entry.at, there)
                with np.errstate(over="ignore"):
                    entry.as_ours(array)[...] = part
                if array.itemsize < part.itemsize and np.isfinite(array).sum() < np.isfinite(part).sum():
                    raise ArchiveError(f"tensor {name} has numbers too large for {array.dtype}; export it as float32")
                yield array

        if kind.pickled:
            import_torch(destination / NAMES[1])  # its error names the file asked for
        write_archive(partial, tensors, arrays(), kind.pickled, kind.wrapper)
        _write_json(partial / "config.json", fields)
        tokenizer.save(partial)
        bring_companions(source, partial)
    return _summary(kind, layout, wanted, config)


def _kept(source: Path, config: ModelConfig) -> dict[str, Any]:
    """What importing wrote beside a model, having checked that it is of this model; nothing for another model."""
    if not (source / SOURCE).exists():
        return {}
    kept = read_json(source / SOURCE)
    format, tensors, known = kept.get("format"), kept.get("tensors"), {str(dtype) for dtype in DTYPES}
    if not isinstance(format, str) or format not in FORMATS or kept.get("layout") not in FORMATS[format].layouts:
        raise _damaged(source, "its format or layout is not a known one")
    if not isinstance(tensors, dict) or not all(dtype in known for dtype in tensors.values()):
        raise _damaged(source, "tensors is not a table of names and types")
    if not isinstance(kept.get("config"), dict):
        raise _damaged(source, "config is not an object")
    try:
        other = differences(config, to_ours(format, kept["config"]))
    except ConfigError as error:
        raise _damaged(source, str(error)) from None
    other = [text for text in other if not (format == "blackmamba" and ".activation is " in text)]
    if other:
        raise _damaged(source, f"the model's {other[0]} there")
    return kept


def _damaged(source: Path, problem: str) -> ArchiveError:
    return ArchiveError(
        f"{source / SOURCE} is not what importing this model wrote: {problem}; without that file, names, types and config.json "
        "are made from the model alone"
    )


@contextmanager
def _opened(source: Path, config: ModelConfig) -> Iterator[Reader]:
    """A model directory, verified meanwhile, or the newest checkpoint of a run, which is loaded whole."""
    folder = parameters_of(source)
    if folder is None:
        leaves = {path: np.asarray(leaf) for path, leaf in leaves_of(read_parameters(source)).items()}
        check_shapes(config, {path: leaf.shape for path, leaf in leaves.items()})
        yield lambda path, index, memory: leaves[path][index]
    else:
        with open_parameters(folder) as file:
            check_shapes(config, {path: kind.shape for path, kind in file.tensors.items()})
            yield file.read


class Difference(NamedTuple):
    """How a tensor differs between two checkpoints."""

    name: str
    largest: float
    """Largest absolute difference; infinite where one holds NaN and the other does not."""
    at: tuple[int, ...]
    """Where it is."""
    identical: bool
    """Every bit, and the type."""
    types: tuple[str, str]


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
    for name in a:
        if a[name].shape != b[name].shape:
            raise ArchiveError(f"tensor {name} is {a[name].shape} in {first} and {b[name].shape} in {second}")
    differences = []
    for name in a:
        differences.append(_difference(archives[0], archives[1], name))
        if on_each:
            on_each(differences[-1])
    return differences


def _difference(first: Archive, second: Archive, name: str) -> Difference:
    (a, shape), (b, _) = first.tensors[name], second.tensors[name]
    size, largest, at, same = math.prod(shape), 0.0, 0, True
    for start in range(0, size, COMPARED):
        x, y = (archive.flat(name, start, min(start + COMPARED, size)) for archive in (first, second))
        if a == b and np.array_equal(x.view(np.uint8), y.view(np.uint8)):
            continue
        if same and a == b:  # the first bits that differ, though it be a zero's sign
            unequal = (x.view(np.uint8) != y.view(np.uint8)).reshape(len(x), -1).any(axis=1)
            at = start + int(np.argmax(unequal))
        x, y, same = x.astype(np.float64), y.astype(np.float64), False
        with np.errstate(invalid="ignore"):  # of infinity less infinity
            gap = np.nan_to_num(np.abs(x - y), nan=np.inf)
        gap = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, gap)
        if gap.max() > largest:
            largest, at = float(gap.max()), start + int(np.argmax(gap))
    where = np.unravel_index(at, shape) if size else ()
    return Difference(name, largest, tuple(int(i) for i in where), same and a == b, (str(a), str(b)))


def _match(archive: Archive, format: Format, config: ModelConfig) -> tuple[str, list[Entry]]:
    """The layout that the archive is in, and its tensors, having compared every name and shape."""
    where = archive.files[0].path.parent
    if config.depth > len(archive.tensors):
        raise ArchiveError(f"{where} holds {len(archive.tensors)} tensors, but config.json asks for {config.depth} layers")
    plans = {layout: entries(format, layout, config) for layout in format.layouts}
    # The layout that shares the most names; what then is missing or unknown is named.
    layout = max(plans, key=lambda layout: sum(entry.name in archive.tensors for entry in plans[layout]))
    wanted = {entry.name: entry for entry in plans[layout]}
    allowed = wanted.keys() | ({TIED} if config.tie_embeddings else set())
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


def _check_tied(archive: Archive, embedding: str) -> None:
    tied, embedding_ = (archive.read(name).astype(np.float32) for name in (TIED, embedding))
    if not np.array_equal(tied, embedding_, equal_nan=True):
        raise ArchiveError(f"{archive.path(TIED)}: {TIED} is not the embedding, though config.json says that they are tied")


def _tokenizer_of(source: str | os.PathLike[str], format: Format, config: ModelConfig) -> Tokenizer:
    path = Path(source) / "tokenizer.json" if Path(source).is_dir() else Path(source)
    if source != "byte" and not path.exists():
        hint = (
            f"{format.title} was trained with that of {NEOX}: download its tokenizer.json and give --tokenizer PATH"
            if format.name in ("blackmamba", "mamba")
            else "put the model's tokenizer.json beside config.json, or give --tokenizer PATH"
        )
        raise ConfigError(f"there is no tokenizer at {path}; {hint}")
    tokenizer = load_tokenizer(source if source == "byte" else path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{path} has {tokenizer.vocab_size} ids but the model's vocab_size is {config.vocab_size}: it is another model's"
        )
    return tokenizer


def require_new(destination: Path) -> None:
    """Raise ConfigError if there is something already."""
    if destination.exists():
        raise ConfigError(f"{destination} exists already; nothing is overwritten: give another path or remove it")


@contextmanager
def _whole(destination: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `destination` when all went well and is removed otherwise."""
    require_new(destination)
    partial = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
        partial.chmod(0o777 & ~_umask())
        yield partial
        require_new(destination)
        os.replace(partial, destination)
    except (OSError, CheckpointError) as error:
        if isinstance(error, CheckpointError) and partial is not None and str(partial) not in str(error):
            raise  # of the source
        reason = str(error).replace(str(partial), str(destination))
        raise ArchiveError(f"cannot write {destination}: {reason}; nothing is left of it") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def _summary(format: Format, layout: str, wanted: list[Entry], config: ModelConfig) -> Summary:
    parameters, expected = sum(math.prod(entry.shape) for entry in wanted), count_parameters(config).total
    if parameters != expected:
        raise ArchiveError(f"the tensors of {format.title} have {parameters:,} parameters, but the model has {expected:,}")
    return Summary(format.name, layout, len(wanted), parameters, config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
