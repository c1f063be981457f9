"""What a model keeps of text that it has read, as a value: read a prompt once, go on from it many times, keep it in a file.

A `State` is arrays that nothing changes: one that was forked, saved or generated from is still what it was. (`read_on` alone
takes its state's memory; `LanguageModel` hands it copies.) For a model without attention its size does not depend on how much
was read.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bm_jax.cache import Cache, init_cache
from bm_jax.config import ConfigError, ModelConfig, to_dict
from bm_jax.model import Parameters, forward
from bm_jax.sealed_folder import publish
from bm_jax.sharding import path_name
from bm_jax.tensor_file import Kind, TensorFile, TensorFileError, write_tensor_file

RECENT = 8
"""Ids kept for the tokenizer: some decode an id differently after others."""
FORMAT, VERSION = "blackmamba-jax state", 2


class State(NamedTuple):
    """What was read, of B rows."""

    cache: Cache
    hidden: Array
    """Hidden values of the last token `[B, 1, M]`, after the final norm: what the next one is drawn from."""
    seen: Array
    """Which ids were read, bool `[B, V]`."""
    recent: Array
    """The last ids, int32 `[B, RECENT]`, -1 before the first."""

    @property
    def read(self) -> Array:
        """Tokens read so far, int32 `[B]`."""
        return self.cache.length

    def fork(self, rows: Sequence[int]) -> State:
        """The state of these rows, each as often as it is named.

        Raises:
            ValueError: not a list of this state's rows.
        """
        count, chosen = len(self.recent), np.asarray(rows)
        if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer) or not ((chosen >= 0) & (chosen < count)).all():
            raise ValueError(f"fork: rows must be a list of integers from 0 to {count - 1}, got {rows!r}")
        return fork(self, chosen.astype(np.int32))


@partial(jax.jit, static_argnames=("config", "batch", "room"))
def empty(config: ModelConfig, batch: int, room: int = 0) -> State:
    """Nothing read yet; `room` is how many tokens attention layers can hold."""
    hidden = jnp.zeros((batch, 1, config.width), config.compute_dtype)
    seen, recent = jnp.zeros((batch, config.vocab_size), bool), jnp.full((batch, RECENT), -1, jnp.int32)
    return State(init_cache(config, batch, room), hidden, seen, recent)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def read_on(parameters: Parameters, state: State, tokens: Array, lengths: Array | None, config: ModelConfig) -> State:
    """Read a piece `[B, L]`, or of each row its first `lengths` `[B]` tokens, in the memory of `state`, which is gone then."""
    output = forward(parameters, tokens, config, cache=state.cache, lengths=lengths)
    assert output.cache is not None
    B, L = tokens.shape
    if lengths is None:
        lengths = jnp.full(B, L)
    rows, fed = jnp.arange(B)[:, None], jnp.arange(L) < lengths[:, None]
    last = output.hidden[rows, jnp.maximum(lengths - 1, 0)[:, None]]
    seen = state.seen.at[rows, jnp.where(fed, tokens, config.vocab_size)].set(True, mode="drop")
    line = jnp.concatenate([state.recent, tokens], axis=1)
    recent = jnp.take_along_axis(line, lengths[:, None] + jnp.arange(RECENT), axis=1)
    return State(output.cache, jnp.where(lengths[:, None, None] > 0, last, state.hidden), seen, recent)


@jax.jit
def fork(state: State, rows: Array) -> State:
    """The state of these rows, int `[B]`: each may be taken several times, or not at all."""
    return _rows_first(jax.tree.map(lambda leaf: leaf[rows], _rows_first(state)))


def _rows_first(state: State) -> State:
    """Rows as the first axis of every array, where a cache's layers have them second; and back again."""
    layers = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), state.cache.layers)
    return state._replace(cache=state.cache._replace(layers=layers))


def room(state: State) -> int:
    """Tokens that attention layers can hold; 0 for a model without them."""
    return max((leaf.shape[2] for path, leaf in _leaves(state) if path.endswith(("key", "value"))), default=0)


def with_room(state: State, size: int) -> State:
    """The same with room for `size` tokens, which must be at least what was read."""
    return state if size == room(state) else _resized(state, size)


@partial(jax.jit, static_argnames=("size",))
def _resized(state: State, size: int) -> State:
    def resize(path: tuple[Any, ...], leaf: Array) -> Array:
        if path[-1].key not in ("key", "value"):
            return leaf
        return jnp.pad(leaf[:, :, :size], ((0, 0), (0, 0), (0, max(0, size - leaf.shape[2])), (0, 0), (0, 0)))

    layers = jax.tree_util.tree_map_with_path(resize, state.cache.layers)
    return state._replace(cache=state.cache._replace(layers=layers))


def _leaves(state: State) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def size_in_bytes(state: State) -> int:
    """Bytes of its arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def model_digest(parameters: Parameters, config: ModelConfig) -> str:
    """What tells models apart whose states and answers must not be mixed: a digest of the configuration and every parameter."""
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
    for leaf in jax.tree.leaves(parameters):
        digest.update(np.ascontiguousarray(np.asarray(leaf, np.float32)).data)
    return digest.hexdigest()


def check(state: State, config: ModelConfig, where: str) -> None:
    """Raise ConfigError unless this is a state of a model with this (unrolled) configuration."""
    rows, size = len(state.recent), room(state)
    expected = jax.eval_shape(lambda: empty(config, rows, size))
    found = {name: (leaf.shape, leaf.dtype) for name, leaf in _leaves(state)}
    for name, leaf in _leaves(expected):
        if found.pop(name, None) != (leaf.shape, leaf.dtype):
            raise ConfigError(f"{where} is not a state of this model: {name} should be {leaf.dtype} {leaf.shape}")
    if found:
        raise ConfigError(f"{where} is not a state of this model, which has no {min(found)}")


def save(state: State, file: str | os.PathLike[str], digest: str) -> None:
    """Write a state as a safetensors file with a checksum, all or nothing; a file of that name is replaced.

    `digest` is the model's, see `model_digest`.

    Raises:
        ConfigError: there is no such folder.
        OSError: the disk is full, or the file cannot be written; the old one is still there.
    """
    path = Path(file).absolute()
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a folder that a state could be saved in; make it first")
    arrays = {name: np.asarray(jax.device_get(leaf)) for name, leaf in _leaves(state)}
    metadata = {"format": FORMAT, "version": str(VERSION), "model": digest, "checksum": _checksum(arrays)}
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        kinds = {name: Kind(array.dtype, array.shape) for name, array in arrays.items()}
        write_tensor_file(partial_path, kinds, arrays.values(), metadata)
        publish(partial_path, path)
    finally:
        partial_path.unlink(missing_ok=True)


def load(file: str | os.PathLike[str], config: ModelConfig, digest: str) -> State:
    """Read a state of the model with this configuration and digest.

    Raises:
        ConfigError: there is no such file, it is damaged, no state, or another model's; the message says which.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; save a state there first")
    try:
        stored = TensorFile(path)
        found = stored.metadata
        if (found.get("format"), found.get("version")) != (FORMAT, str(VERSION)):
            what = f"format {found.get('format')!r} version {found.get('version')!r}"
            raise ConfigError(f"{path} has {what}, not {FORMAT!r} version {VERSION}")
        if found.get("model") != digest:
            raise ConfigError(f"{path} is a state of another model, or of this one otherwise trained; read the text again")
        arrays = {name: stored.read(name) for name in stored.tensors}
    except (TensorFileError, OSError) as error:
        raise ConfigError(f"{path} is not a readable state: {error}") from None
    if _checksum(arrays) != found.get("checksum"):
        raise ConfigError(f"{path} is damaged: its checksum is not that of what it holds")
    rows = len(arrays.get("seen", ()))
    size = max((array.shape[2] for name, array in arrays.items() if name.endswith("/key") and array.ndim > 2), default=0)
    shape = jax.eval_shape(lambda: empty(config, rows, size))
    missing = [name for name, leaf in _leaves(shape) if name not in arrays or arrays[name].shape != leaf.shape]
    if missing or len(arrays) != len(_leaves(shape)):
        raise ConfigError(f"{path} is not a state of this model: {', '.join(missing[:1] or ['it'])} is not as it should be")
    kept = jax.tree.unflatten(jax.tree.structure(shape), [jnp.asarray(arrays[name]) for name, _ in _leaves(shape)])
    check(kept, config, str(path))
    return kept


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
