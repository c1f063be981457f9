"""From a format and a model to every tensor: its name, its shape, and the part of our parameters that it is."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import einops
import jax
import numpy as np

import configs
from bm_jax.config import ModelConfig
from bm_jax.model import count_parameters, init_parameters
from bm_jax.sharding import path_name
from convert.tables import EXPERT, Format, Row


class Entry(NamedTuple):
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    """In the checkpoint."""
    leaf: str
    """Path of our leaf, as `periods/layer_0/mamba/in_proj`."""
    at: tuple
    """The tensor's part of the leaf."""
    pattern: str
    sizes: Mapping[str, int]

    def as_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor as a part of our leaf: a view of it, to read from or to write into."""
        return einops.rearrange(tensor, self.pattern, **self.sizes)


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of the model."""
    shapes = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
    return {path_name(path): leaf.shape for path, leaf in flat}


def preset_of(config: ModelConfig) -> str | None:
    """The preset whose parameters have the same paths and shapes, if there is one."""
    total = count_parameters(config).total
    for module in pkgutil.iter_modules(configs.__path__):
        model = importlib.import_module(f"configs.{module.name}").config.model
        if count_parameters(model).total == total and leaf_shapes(model) == leaf_shapes(config):
            return module.name
    return None


def entries(format: Format, layout: str, config: ModelConfig) -> list[Entry]:
    """Every tensor that a checkpoint of `config` holds, each once. A tied unembedding has no entry: it is the embedding.

    Raises:
        KeyError: the format has no layers of a kind that the model has.
    """
    shapes, ends = leaf_shapes(config), format.layouts[layout].get("ends", format.ends)
    found = [_entry(row, row.name, row.leaf, shapes[row.leaf], ()) for row in ends if row.leaf in shapes]
    for number in range(config.depth):
        period, index = divmod(number, len(config.layers))
        for place, kind in enumerate(config.layers[index].split("+")):
            words = {
                "layer": number // format.layers_per_block,
                # BlackMamba's names of the first branch of a layer and of a parallel pair's second.
                "mixer": ("mixer", "moe")[place],
                "norm": ("norm", "norm_moe")[place],
            }
            for row in format.layouts[layout][kind]:
                leaf = f"periods/layer_{index}/{kind}/{row.leaf}"
                if leaf in shapes:
                    found += _of_layer(row, leaf, shapes[leaf], period, words, config)
    return found


def _of_layer(
    row: Row, leaf: str, shape: tuple[int, ...], period: int, words: Mapping[str, Any], config: ModelConfig
) -> Iterator[Entry]:
    for expert in range(config.moe.experts) if EXPERT in row.at else [None]:
        at = (period, *(expert if index == EXPERT else index for index in row.at))
        yield _entry(row, row.name.format(**words, expert=expert), leaf, shape, at)


def _entry(row: Row, name: str, leaf: str, shape: tuple[int, ...], at: tuple) -> Entry:
    pattern = row.pattern
    part = [size for size, index in zip(shape, at, strict=False) if isinstance(index, slice)] + list(shape[len(at) :])
    if "two" in pattern and len(part) < len(pattern.split(" -> ")[1].split()):  # an activation without a gate has one half
        pattern = pattern.replace("(two f)", "f").replace(" two ", " ")
    theirs, ours = pattern.split(" -> ")
    sizes = dict(zip(ours.split(), part, strict=True))
    return Entry(name, _their_shape(theirs, sizes), leaf, at, pattern, sizes)


def _their_shape(theirs: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape, product = [], None
    for word in theirs.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            product = 1
        elif word == ")":
            shape.append(product)
            product = None
        else:
            size = 1 if word == "1" else sizes[word]
            if product is None:
                shape.append(size)
            else:
                product *= size
    return tuple(shape)
