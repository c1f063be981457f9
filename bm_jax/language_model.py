"""A trained model that reads and writes text: load, save, logits, prefill, generate, stream.

There is one decode path. Prompts are read into a `bm_jax.state.State`, equal ones once; then the device draws tokens in chunks
(`decoding.decode`), and the host turns each chunk into text, looking for stop strings. `generate` collects what `stream`
hands out.

Shapes come in buckets so that few programs are compiled: batches are padded to powers of two, prompts are read in pieces of
`PIECE` tokens, the last one padded on the right to a power of two, and the room that attention needs for keys is one, too.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bm_jax import decode_step, decoding, state
from bm_jax.cache import Cache
from bm_jax.completion import Completion, Writer
from bm_jax.config import ConfigError, ModelConfig
from bm_jax.data.tokenizer import Tokenizer, load_tokenizer
from bm_jax.model import COMPUTE_KERNELS, Parameters, cast_kernels, forward, init_parameters, unroll, unrolled
from bm_jax.model import logits as unembed
from bm_jax.model_directory import PARAMETERS, check_shapes, read_config, read_parameters, shapes_of, write_description
from bm_jax.parameter_folder import save_parameters
from bm_jax.quantize import Quantized, check_weights, quantize, quantize_parameter
from bm_jax.sampling import SamplingConfig
from bm_jax.sharding import parameter_shardings, with_shardings
from bm_jax.state import State

PIECE = 2048
"""Longer prompts are read in pieces of this many tokens, with memory for one piece at a time."""
SHORTEST_BUCKET = 16
LONGEST = 65536
"""Most tokens, by default, of a model with attention, and of `LanguageModel.logits`."""

Prompt = str | Sequence[int]


class Piece(NamedTuple):
    """Text of one row as it comes; the last piece of a row brings the whole completion."""

    row: int
    text: str
    completion: Completion | None


class LanguageModel:
    """A model with its parameters and tokenizer.

    Args:
        config: the model.
        parameters: as `init_parameters` makes them, kept as given; what runs is a copy cast for inference.
        tokenizer: its ids must fit `config.vocab_size`.
        max_prompt_tokens: a longer prompt is an error. A model with attention layers must hold prompt and completion
            together within it; None is `LONGEST` for these, and no limit for others.
        max_batch: prompts decoded at once; more are taken in turns.
        weights: "int8" runs with the kernels of products in int8 (`bm_jax.quantize`), None with them in the compute dtype.

    Raises:
        ConfigError: the tokenizer has more ids than the embedding has rows, or the parameters are another model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        tokenizer: Tokenizer,
        *,
        max_prompt_tokens: int | None = None,
        max_batch: int = 64,
        weights: Literal["int8"] | None = None,
    ) -> None:
        if tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids but ModelConfig.vocab_size is {config.vocab_size}: "
                "this is not the tokenizer that the model was trained with"
            )
        for name, value in (("max_prompt_tokens", max_prompt_tokens), ("max_batch", max_batch)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        check_weights(weights)
        check_shapes(config, shapes_of(parameters))
        self.weights: Literal["int8"] | None = weights
        self.config, self.parameters, self.tokenizer = config, parameters, tokenizer
        if max_prompt_tokens is None and "attention" in config.kinds:
            max_prompt_tokens = LONGEST
        self.max_prompt_tokens, self.max_batch = max_prompt_tokens, max_batch

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        max_prompt_tokens: int | None = None,
        max_batch: int = 64,
        weights: Literal["int8"] | None = None,
    ) -> LanguageModel:
        """Read a model directory (made by `save`) or the newest checkpoint of a training run's directory.

        Inside `jax.set_mesh(mesh)` with several devices, each reads and keeps its own shards of the parameters; use the
        model in the same mesh. Otherwise the host keeps them.

        Raises:
            ConfigError: something is missing, damaged or of another shape; the message says what and where.
        """
        check_weights(weights)
        path = Path(directory)
        config = read_config(path)
        tokenizer = load_tokenizer(path)
        mesh, shards = jax.sharding.get_mesh(), None
        if mesh.size > 1:
            shapes = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
            shards = with_shardings(shapes, parameter_shardings(shapes, mesh))
        parameters = read_parameters(path, shards)
        if shards is None:  # the float32 originals wait on the host; the device holds only what inference reads
            parameters = jax.device_get(parameters)
        return cls(config, parameters, tokenizer, max_prompt_tokens=max_prompt_tokens, max_batch=max_batch, weights=weights)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a self-contained model directory, all or nothing.

        Raises:
            ConfigError: `directory` exists and is not empty; nothing is overwritten.
        """
        path = Path(directory).absolute()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{directory} exists already; a model is only written to a new directory")
        partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial_path.mkdir(parents=True)
            save_parameters(partial_path / PARAMETERS, self.parameters)
            write_description(partial_path, self.config, self.tokenizer)
            os.replace(partial_path, path)
        finally:
            shutil.rmtree(partial_path, ignore_errors=True)

    @cached_property
    def inference(self) -> tuple[Parameters, Parameters]:
        """`inference_parameters`, on the device."""
        return inference_parameters(self.parameters, self.config, self.weights)

    def decode(
        self, going: decoding.Going, rows: decoding.Rows, steps: int, limited: bool
    ) -> tuple[decoding.Going, decoding.Drawn]:
        """`decoding.decode` with this model, as is fastest here.

        The cache is from `decoding_cache`; `limited` says whether a row has a limit (`SamplingConfig.limited`).
        """
        kernel = self._kernel(len(going.token))
        parameters, head = self.inference
        if kernel is not None:
            kernel = kernel._replace(limited=limited)
            return decoding.decode(self._step_parameters, head, going, rows, steps, self.config, kernel)
        return decoding.decode(parameters, head, going, rows, steps, unrolled(self.config))

    def decoding_cache(self, cache: Cache, batch: int) -> Cache:
        """The cache of a `State` as `decode` of a batch of so many rows wants it."""
        return cache if self._kernel(batch) is None else decode_step.stacked(cache, self.config)

    def _kernel(self, batch: int) -> decode_step.Kernel | None:
        return None if self.weights is not None else decode_step.kernel_for(self.config, batch)

    @cached_property
    def _step_parameters(self) -> Parameters:
        """A second copy of the layers' parameters, made when it is first needed."""
        return decode_step.step_parameters(self.parameters, self.config)

    def logits(self, tokens: Any) -> np.ndarray:
        """Logits of the token after each token: float32 `[L, V]` for ids `[L]`, `[B, L, V]` for ids `[B, L]`.

        Raises:
            ValueError: no ids, rows of different lengths, ids that are not integers or not in the vocabulary.
        """
        try:
            ids = np.asarray(tokens)
        except ValueError:
            raise ValueError("logits: the rows of tokens have different lengths; give one at a time") from None
        if ids.size == 0 or ids.ndim not in (1, 2):
            raise ValueError(f"logits: expected ids [L] or [B, L] with at least one id, got shape {ids.shape}")
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"logits: ids must be integers, got {ids.dtype}")
        _check_ids(ids, self.config.vocab_size, "logits")
        rows = np.atleast_2d(ids)
        B, L = rows.shape
        self._check_length(L, "logits", self.max_prompt_tokens or LONGEST)
        padded = np.zeros((bucket(B), bucket(L, SHORTEST_BUCKET)), np.int32)
        padded[:B, :L] = rows
        segment_ids = np.zeros_like(padded)
        segment_ids[:B, :L] = 1
        values = np.asarray(_logits(*self.inference, padded, segment_ids, unrolled(self.config)))[:B, :L]
        return values[0] if ids.ndim == 1 else values

    def prefill(self, prompts: str | Sequence[Prompt], after: State | None = None) -> State:
        """Read prompts and keep what the model knows of them, a row each, to `generate` from as often as wanted.

        Args:
            prompts: as for `generate`, of any lengths; memory does not grow with them but for attention.
            after: what was read before, a row each or one for all; it stays as it is.

        Raises:
            ValueError: as from `generate`; or `after` has another number of rows.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.encode(prompt, f"prompt {row}") for row, prompt in enumerate(prompts)]
        if after is not None:
            state.check(after, unrolled(self.config), "prefill: the state")
        if not ids:
            raise ValueError("prefill: there is no prompt")
        if after is not None and len(after.recent) not in (1, len(ids)):
            raise ValueError(f"prefill: got {len(ids)} prompts after a state of {len(after.recent)} rows")
        if after is not None and "attention" in self.config.kinds:
            self._check_room(int(np.max(after.read)) + max(map(len, ids)), 0, "the state and the prompts")
        read = self._read(ids, after)
        return read if len(read.recent) == len(ids) else read.fork(range(len(ids)))

    def step(self, after: State, tokens: Sequence[int]) -> State:
        """Read one more id of each row."""
        return self.prefill([[token] for token in tokens], after)

    def next_logits(self, after: State) -> np.ndarray:
        """Logits of the next token of each row, float32 `[B, V]`."""
        return np.asarray(_unembed(self.inference[1], after.hidden, self.config))

    def save_state(self, kept: State, file: str | os.PathLike[str]) -> None:
        """Write a state to a file, all or nothing; a file of that name is replaced."""
        state.save(kept, file, self.digest)

    def load_state(self, file: str | os.PathLike[str]) -> State:
        """Read a state that `save_state` of this model wrote.

        Raises:
            ConfigError: it is damaged, or of another model, or not there.
        """
        return state.load(file, unrolled(self.config), self.digest)

    @cached_property
    def digest(self) -> str:
        """Tells this model from others, see `bm_jax.state.model_digest`."""
        return state.model_digest(self.parameters, self.config)

    def generate(
        self,
        prompts: str | Sequence[Prompt] | State,
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        **options: Any,
    ) -> list[Completion]:
        """Complete prompts, several at once; always a list, `n` completions a prompt in the prompts' order.

        Args:
            prompts: a text, or a list of prompts of any lengths, each a text or a list of ids; or what `prefill` read of them.
            n: completions of each prompt, which is read once; the later ones draw with the seeds that follow `seed`.
            seed: of the draws; a prompt gets the same text for the same seed, alone or among others. Give one a prompt
                for different texts after equal prompts.
            stop: a completion ends before the first of these strings to appear.
            options: other fields of `bm_jax.sampling.SamplingConfig`, such as max_tokens, temperature, top_k, top_p.

        Raises:
            ValueError: a prompt that is empty, too long, not text or with ids out of range.
            ConfigError: (a ValueError) a sampling parameter out of range.
        """
        source = [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, State) else list(prompts)
        count = len(source.recent if isinstance(source, State) else source)
        seeds = [seed] * count if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != count:
            raise ConfigError(f"seed must be one integer or one a prompt: got {len(seeds)} for {count} prompts")
        if not isinstance(n, int) or n < 1:
            raise ConfigError(f"n must be a positive integer, got {n!r}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        configs = [SamplingConfig(seed=s, stop=stop, **options) for s in seeds]
        configs = [dataclasses.replace(c, seed=(int(c.seed) + i) % 2**32) for c in configs for i in range(n)]
        rows = [row for row in range(count) for _ in range(n)]
        completions: dict[int, Completion] = {}
        for piece in self._stream(source.fork(rows) if isinstance(source, State) else [source[row] for row in rows], configs):
            if piece.completion is not None:
                completions[piece.row] = piece.completion
        return [completions[row] for row in range(len(configs))]

    def stream(self, prompt: Prompt | State, *, stop: str | Sequence[str] = (), **options: Any) -> Iterator[str]:
        """Complete one prompt, yielding text as it comes; joined, it is the text that `generate` gives.

        A piece never ends within a character or a stop string. Arguments and errors are those of `generate`; errors
        are raised here, before the first piece is asked for.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        pieces = self._stream(prompt if isinstance(prompt, State) else [prompt], [SamplingConfig(stop=stop, **options)])
        return (piece.text for piece in pieces if piece.text)

    def _stream(self, prompts: Sequence[Prompt] | State, configs: Sequence[SamplingConfig]) -> Iterator[Piece]:
        """Check and encode every prompt, then decode them in turns of `max_batch`, those of similar length together."""
        for config in configs:
            self.check_ids(config)
        if isinstance(prompts, State):
            state.check(prompts, unrolled(self.config), "the state")
            if len(prompts.recent) != len(configs):
                raise ValueError(f"stream: a state of {len(prompts.recent)} rows; take one of them by fork([row])")
            ids, order = [], list(range(len(configs)))
            for row in order if "attention" in self.config.kinds else ():
                self._check_room(int(prompts.read[row]), configs[row].max_tokens, f"state row {row}")
        else:
            ids = [self.encode(prompt, f"prompt {row}", configs[row].max_tokens) for row, prompt in enumerate(prompts)]
            order = sorted(range(len(ids)), key=lambda row: len(ids[row]))

        def begin(turn: list[int]) -> State:
            if isinstance(prompts, State):
                return prompts.fork(turn)
            return self._read([ids[row] for row in turn], more=max(configs[row].max_tokens for row in turn))

        turns = [order[i : i + self.max_batch] for i in range(0, len(order), self.max_batch)]
        return (
            piece._replace(row=turn[piece.row])
            for turn in turns
            for piece in self._decode(begin(turn), [configs[row] for row in turn])
        )

    def encode(self, prompt: Prompt, where: str, max_tokens: int = 0) -> list[int]:
        """The ids of a prompt that is to be completed by up to `max_tokens`; `where` is its name in messages.

        Raises:
            ValueError: it is empty, too long, not text, or has ids out of range.
        """
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where} is not valid Unicode text: {error.reason} at character {error.start}") from None
            ids = self.tokenizer.encode(prompt)
        else:
            array = np.asarray(prompt)
            if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
                raise ValueError(f"{where} must be text or a list of token ids, got {type(prompt).__name__}: {prompt!r}")
            ids = [int(i) for i in array]
        if not ids:
            raise ValueError(f"{where} is empty: a prompt needs at least one token, for example a line break")
        _check_ids(np.asarray(ids), self.tokenizer.vocab_size, where)
        self._check_length(len(ids), where, self.max_prompt_tokens)
        if "attention" in self.config.kinds:
            self._check_room(len(ids), max_tokens, where)
        return ids

    def check_ids(self, config: SamplingConfig) -> None:
        """Raise ValueError unless the ids of `logit_bias` and `stop_tokens` are the tokenizer's, and some id may be drawn."""
        for name in ("logit_bias", "stop_tokens"):
            _check_ids(np.asarray(list(getattr(config, name)), int), self.tokenizer.vocab_size, name)
        if sum(value == -np.inf for value in config.logit_bias.values()) == self.tokenizer.vocab_size:
            raise ValueError("logit_bias forbids every token: leave at least one id without -inf")

    def _check_length(self, length: int, where: str, most: int | None) -> None:
        if most is not None and length > most:
            raise ValueError(
                f"{where} has {length} tokens, more than the longest shape bucket of {most}; shorten "
                "it, or load the model with a larger max_prompt_tokens"
            )

    def _check_room(self, length: int, max_tokens: int, where: str) -> None:
        if length + max_tokens > (self.max_prompt_tokens or LONGEST):
            raise ValueError(
                f"{where} has {length} tokens and max_tokens is {max_tokens}, together more than the "
                f"{self.max_prompt_tokens} that this model's attention holds; ask for fewer, or load the model with a "
                "larger max_prompt_tokens"
            )

    def _decode(self, read: State, configs: list[SamplingConfig]) -> Iterator[Piece]:
        """The decode path: from what was read, draw tokens chunk by chunk, hand out text as it is certain."""
        tokenizer, B = self.tokenizer, bucket(len(configs))
        recent = np.asarray(read.recent)
        writers = [Writer(tokenizer, before[before >= 0].tolist(), c) for before, c in zip(recent, configs, strict=False)]
        if len(read.recent) != B:
            read = read.fork([*range(len(configs)), *[0] * (B - len(configs))])
        if "attention" in self.config.kinds:
            most = int(np.max(read.read)) + max(c.max_tokens for c in configs)
            read = state.with_room(read, max(bucket(most), state.room(read)))
        rows = decoding.make_rows(configs, B, end=tokenizer.end_of_document, vocab_size=tokenizer.vocab_size)
        number, limited = jnp.zeros(B, jnp.int32), any(c.limited for c in configs)
        seen = decoding.seen_before(configs, read.seen)
        token, seen, logprobs = decoding.choose(self.inference[1], read.hidden, rows, number, seen, self.config)
        going = decoding.Going(self.decoding_cache(read.cache, B), seen, token, number + 1, number > 0)
        del read  # `decode` writes over the cache
        drawn, logprobs = np.asarray(token)[:, None], jax.tree.map(lambda leaf: leaf[:, None], logprobs)
        while True:
            logprobs = jax.device_get(logprobs)
            for row, writer in enumerate(writers):
                if writer.completion is None:
                    certain = drawn[row] >= 0
                    said = None if logprobs is None else jax.tree.map(lambda leaf, row=row: leaf[row], logprobs)
                    text = writer.push(drawn[row, certain].tolist(), said)
                    yield Piece(row, text, writer.completion)
            alive = np.zeros(B, bool)
            alive[: len(writers)] = [writer.completion is None for writer in writers]
            if not alive.any():
                return
            going = going._replace(alive=alive)
            going, (drawn, logprobs) = self.decode(going, rows, decoding.CHUNK, limited)
            drawn = np.asarray(drawn)

    def _read(self, ids: list[list[int]], after: State | None = None, more: int = 0) -> State:
        """Read ids, those of a row each, after a state of as many rows or of one; equal rows after one are read once.

        Attention gets room for `more` tokens.

        The state has a row for each, and rows of the bucket that mean nothing.
        """
        distinct = list(dict.fromkeys(map(tuple, ids))) if after is None or len(after.recent) == 1 else list(map(tuple, ids))
        B, longest = bucket(len(distinct)), max(map(len, distinct))
        config, room = unrolled(self.config), 0
        if "attention" in self.config.kinds:
            padded = bucket(longest, SHORTEST_BUCKET) if longest <= PIECE else -(-longest // PIECE) * PIECE
            room = bucket(padded + more + (0 if after is None else int(np.max(after.read))))
        if after is None:
            read = state.empty(config, B, room)
        else:
            given = [0] * B if len(after.recent) == 1 else [*range(len(ids)), *[0] * (B - len(ids))]
            read = state.with_room(after.fork(given), max(room, state.room(after)))
        least = 1 if longest == 1 and after is not None else SHORTEST_BUCKET
        for tokens, lengths in pieces(distinct, B, PIECE, least):
            read = state.read_on(self.inference[0], read, tokens, lengths, config)
        if len(distinct) == len(ids):
            return read
        places = {row: place for place, row in enumerate(distinct)}
        return read.fork([places[tuple(row)] for row in ids])


def pieces(rows: Sequence[Sequence[int]], batch: int, piece: int, least: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Rows of ids in pieces of `least` to `piece` tokens, powers of two, that `state.read_on` takes.

    Each is tokens `[batch, L]` and how many of each row are meant `[batch]`, None for all.
    """
    longest, start = max(map(len, rows)), 0
    while start < longest:
        size = min(piece, bucket(longest - start, least))
        tokens, lengths = np.zeros((batch, size), np.int32), np.zeros(batch, np.int32)
        for row, ids in enumerate(rows):
            part = ids[start : start + size]
            tokens[row, : len(part)], lengths[row] = part, len(part)
        whole = size in (1, piece) and (lengths == size).all()
        yield tokens, None if whole else lengths
        start += size


def compute_parameters(parameters: Parameters, config: ModelConfig, weights: Literal["int8"] | None = None) -> Parameters:
    """Parameters cast to the compute dtype where that changes nothing, on the device.

    With weights "int8" the kernels of products are `bm_jax.quantize.Quantized`; they must be those of single layers (`unroll`).
    """
    if weights is None:
        return cast_kernels(jax.tree.map(jnp.asarray, parameters), config)
    dtype = jnp.dtype(config.compute_dtype)

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        kernel = quantize_parameter(path, jnp.asarray(leaf))
        return kernel.astype(dtype) if path[-1].key in COMPUTE_KERNELS and not isinstance(kernel, Quantized) else kernel

    return jax.tree_util.tree_map_with_path(place, parameters)


def inference_parameters(
    parameters: Parameters, config: ModelConfig, weights: Literal["int8"] | None = None
) -> tuple[Parameters, Parameters]:
    """`compute_parameters` of `unrolled(config)`, and of the unembedding alone, all in the compute dtype."""
    parameters = compute_parameters(unroll(parameters, config), config, weights)
    # The residual stream starts from the embedding as it is; as an unembedding it is used in the compute dtype.
    name = "embedding" if config.tie_embeddings else "unembedding"
    if weights == "int8":
        return parameters, {name: quantize(parameters[name], axes=(1,)) if config.tie_embeddings else parameters[name]}
    return parameters, {name: parameters[name].astype(config.compute_dtype)}


@partial(jax.jit, static_argnames=("config",))
def _unembed(head: Parameters, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    return unembed(head, hidden, config)[:, -1].astype(jnp.float32)


@partial(jax.jit, static_argnames=("config",))
def _logits(
    parameters: Parameters, head: Parameters, tokens: jax.Array, segment_ids: jax.Array, config: ModelConfig
) -> jax.Array:
    hidden = forward(parameters, tokens, config, segment_ids=segment_ids).hidden
    return unembed(head, hidden, config).astype(jnp.float32)


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return 1 << (max(size, least) - 1).bit_length()


def _check_ids(ids: np.ndarray, size: int, where: str) -> None:
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.size:
        raise ValueError(f"{where} contains token id {wrong.flat[0]}, outside the range 0 to {size - 1}")
