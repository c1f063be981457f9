"""A trained model that reads and writes text: load, save, logits, generate, stream.

There is one decode path. Prompts are padded on the left to a shape bucket and read into the cache (`decoding.prefill`),
equal ones once; then the device draws tokens in chunks (`decoding.decode`), and the host turns each chunk into text,
looking for stop strings. `generate` collects what `stream` hands out.

Shapes come in buckets so that few programs are compiled: batches and prompts are padded to powers of two, prompts of
more than `PIECE` tokens are read in pieces of that many, and the room that attention needs for keys is a power of two.

A model directory is self-contained:

    config.json      {"format": "blackmamba-jax model", "version": 2, "model": fields of ModelConfig}
    tokenizer.json   see `bm_jax.data.tokenizer`
    params/          float32 parameters, see `bm_jax.parameter_folder`
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bm_jax import decoding
from bm_jax.config import Config, ConfigError, ModelConfig, from_dict, to_dict
from bm_jax.data.tokenizer import Tokenizer, load_tokenizer
from bm_jax.model import Parameters, forward, init_parameters, unroll, unrolled
from bm_jax.model import logits as unembed
from bm_jax.parameter_folder import load_parameters, save_parameters
from bm_jax.sampling import Logprobs, SamplingConfig
from bm_jax.sharding import parameter_shardings, path_name, with_shardings

FORMAT, VERSION = "blackmamba-jax model", 2
PARAMETERS = "params"
SOURCE = "source.json"
"""What importing a checkpoint keeps for the way back, see `convert`."""
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files that come along as they are where an imported checkpoint has them: PyTorch code reads them."""
PIECE = 2048
"""Longer prompts are read in pieces of this many tokens, with memory for one piece at a time."""
SHORTEST_BUCKET = 16
COMPUTE_KERNELS = frozenset(
    {"in_proj", "conv_weight", "conv_bias", "x_proj", "dt_proj", "out_proj"}
    | {"query", "key", "value", "out", "w_in", "w_out", "unembedding"}
)
"""Parameters used in the compute dtype alone; casting them once changes no result."""

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt."""

    text: str
    """Without the prompt, without the stop string."""
    tokens: tuple[int, ...]
    """Ids drawn, without the end-of-document id; with finish_reason "stop", up to the one that completed the string."""
    finish_reason: Literal["stop", "length", "end"]
    """A stop string or token, `max_tokens`, or the end-of-document id."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of each of `tokens`, where they were asked for."""


class TokenLogprob(NamedTuple):
    """What the model said of one token drawn, before bias, penalties and temperature."""

    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...]
    """The most likely ids with theirs, best first."""


class Piece(NamedTuple):
    """Text of one row as it comes; the last piece of a row brings the whole completion."""

    row: int
    text: str
    completion: Completion | None


class Detokenizer:
    """Ids to text bit by bit, never handing out a part of a character.

    `push` returns the text that no later id can change; what it returned, followed by `flush`, is the text of all ids.
    """

    CONTEXT = 8
    """Ids kept for what is decoded next: some tokenizers decode a first id differently."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-self.CONTEXT :])
        text = tokenizer.decode(self._ids)
        self._done = text[: _settled(text)]

    def push(self, ids: Sequence[int]) -> str:
        """Text that `ids` settle."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        settled = _settled(text)
        if settled < len(text) and not text[:settled].startswith(self._done):
            return ""  # a tokenizer that shows a whole run of bytes as broken until its last character is complete
        piece, self._done = text[len(self._done) : settled], text[:settled]
        if settled == len(text) and len(self._ids) > 4 * self.CONTEXT:
            kept = self._tokenizer.decode(self._ids[-self.CONTEXT :])
            if text.endswith(kept):
                self._ids, self._done = self._ids[-self.CONTEXT :], kept
        return piece

    def flush(self) -> str:
        """Text held back: at most a character that was never completed, as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        piece, self._done = text[len(self._done) :], text
        return piece


def _settled(text: str) -> int:
    """Length of `text` without what may be the start of a character: up to three bytes, each shown as U+FFFD."""
    end = len(text)
    while end > max(0, len(text) - 3) and text[end - 1] == "\ufffd":
        end -= 1
    return end


class Writer:
    """Assembles one completion from the ids drawn: text, stop strings, end."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], config: SamplingConfig) -> None:
        self._config, self._end = config, tokenizer.end_of_document
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._held = ""
        self._written: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self.completion: Completion | None = None

    def push(self, ids: Sequence[int], logprobs: Logprobs | None = None) -> str:
        """Take ids drawn (at most what is left of `max_tokens`) and the model's word on each, if asked for.

        Returns the text that is certain now.
        """
        ids = list(ids)
        if logprobs is not None and self._config.logprobs is not None:
            for i in range(len(ids)):
                top = zip(logprobs.top_ids[i].tolist(), logprobs.top[i].tolist(), strict=True)
                likely = tuple(pair for pair in top if pair[1] > -math.inf)[: self._config.logprobs]
                self._logprobs.append(TokenLogprob(float(logprobs.chosen[i]), likely))
        ended = ids[-1] in (self._end, *self._config.stop_tokens) if ids else False
        reason: Literal["end", "stop"] = "end" if ended and ids[-1] == self._end else "stop"
        if ended:
            ids.pop()
        # With stop strings one at a time, to know which id completed one.
        for part in [[i] for i in ids] if self._config.stop else [ids]:
            self._tokens += part
            if self._take(self._detokenizer.push(part)):
                return self._release("stop")
        if not ended and len(self._tokens) < self._config.max_tokens:
            return self._release(None)
        stopped = self._take(self._detokenizer.flush())
        return self._release("stop" if stopped else reason if ended else "length")

    def _take(self, text: str) -> bool:
        """Append text to what is held; when that completes a stop string, cut there and say so."""
        self._held += text
        found = [(self._held.find(s) + len(s), self._held.find(s)) for s in self._config.stop if s in self._held]
        if found:
            self._held = self._held[: min(found)[1]]
        return bool(found)

    def _release(self, reason: Literal["stop", "length", "end"] | None) -> str:
        """Hand out what is held, but for the start of a possible stop string while the completion goes on."""
        keep = 0
        if reason is None:
            for s in self._config.stop:
                keep = max([keep, *(n for n in range(1, len(s)) if self._held.endswith(s[:n]))])
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        self._written.append(text)
        if reason is not None:
            said = None if self._config.logprobs is None else tuple(self._logprobs[: len(self._tokens)])
            self.completion = Completion("".join(self._written), tuple(self._tokens), reason, said)
        return text


class LanguageModel:
    """A model with its parameters and tokenizer.

    Args:
        config: the model.
        parameters: as `init_parameters` makes them, kept as given; what runs is a copy cast for inference.
        tokenizer: its ids must fit `config.vocab_size`.
        max_prompt_tokens: a longer prompt is an error. A model with attention layers must hold prompt and completion
            together within it.
        max_batch: prompts decoded at once; more are taken in turns.

    Raises:
        ConfigError: the tokenizer has more ids than the embedding has rows, or the parameters are another model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        tokenizer: Tokenizer,
        *,
        max_prompt_tokens: int = 65536,
        max_batch: int = 64,
    ) -> None:
        if tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids but ModelConfig.vocab_size is {config.vocab_size}: "
                "this is not the tokenizer that the model was trained with"
            )
        for name, value in (("max_prompt_tokens", max_prompt_tokens), ("max_batch", max_batch)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        check_shapes(config, _shapes(parameters))
        self.config, self.parameters, self.tokenizer = config, parameters, tokenizer
        self.max_prompt_tokens, self.max_batch = max_prompt_tokens, max_batch

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, max_prompt_tokens: int = 65536, max_batch: int = 64) -> LanguageModel:
        """Read a model directory (made by `save`) or the newest checkpoint of a training run's directory.

        Inside `jax.set_mesh(mesh)` with several devices, each reads and keeps its own shards of the parameters; use the
        model in the same mesh. Otherwise the host keeps them.

        Raises:
            ConfigError: something is missing, damaged or of another shape; the message says what and where.
        """
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
        return cls(config, parameters, tokenizer, max_prompt_tokens=max_prompt_tokens, max_batch=max_batch)

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
    def _inference(self) -> tuple[Parameters, Parameters]:
        """`inference_parameters`, on the device."""
        return inference_parameters(self.parameters, self.config)

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
        self._check_length(L, "logits")
        padded = np.zeros((_bucket(B), _bucket(L, SHORTEST_BUCKET)), np.int32)
        padded[:B, :L] = rows
        segment_ids = np.zeros_like(padded)
        segment_ids[:B, :L] = 1
        values = np.asarray(_logits(*self._inference, padded, segment_ids, unrolled(self.config)))[:B, :L]
        return values[0] if ids.ndim == 1 else values

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        **options: Any,
    ) -> list[Completion]:
        """Complete prompts, several at once; always a list, `n` completions a prompt in the prompts' order.

        Args:
            prompts: a text, or a list of prompts of any lengths, each a text or a list of ids.
            n: completions of each prompt, which is read once; the later ones draw with the seeds that follow `seed`.
            seed: of the draws; a prompt gets the same text for the same seed, alone or among others. Give one a prompt
                for different texts after equal prompts.
            stop: a completion ends before the first of these strings to appear.
            options: other fields of `bm_jax.sampling.SamplingConfig`, such as max_tokens, temperature, top_k, top_p.

        Raises:
            ValueError: a prompt that is empty, too long, not text or with ids out of range.
            ConfigError: (a ValueError) a sampling parameter out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seed] * len(prompts) if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != len(prompts):
            raise ConfigError(f"seed must be one integer or one a prompt: got {len(seeds)} for {len(prompts)} prompts")
        if not isinstance(n, int) or n < 1:
            raise ConfigError(f"n must be a positive integer, got {n!r}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        configs = [SamplingConfig(seed=s, stop=stop, **options) for s in seeds]
        configs = [dataclasses.replace(c, seed=(int(c.seed) + i) % 2**32) for c in configs for i in range(n)]
        completions: dict[int, Completion] = {}
        for piece in self._stream([prompt for prompt in prompts for _ in range(n)], configs):
            if piece.completion is not None:
                completions[piece.row] = piece.completion
        return [completions[row] for row in range(len(configs))]

    def stream(self, prompt: Prompt, *, stop: str | Sequence[str] = (), **options: Any) -> Iterator[str]:
        """Complete one prompt, yielding text as it comes; joined, it is the text that `generate` gives.

        A piece never ends within a character or a stop string. Arguments and errors are those of `generate`; errors
        are raised here, before the first piece is asked for.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        pieces = self._stream([prompt], [SamplingConfig(stop=stop, **options)])
        return (piece.text for piece in pieces if piece.text)

    def _stream(self, prompts: Sequence[Prompt], configs: Sequence[SamplingConfig]) -> Iterator[Piece]:
        """Check and encode every prompt, then decode them in turns of `max_batch`, those of similar length together."""
        ids = [self._encode(prompt, row, config) for row, (prompt, config) in enumerate(zip(prompts, configs, strict=True))]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        turns = [order[i : i + self.max_batch] for i in range(0, len(order), self.max_batch)]
        return (
            piece._replace(row=turn[piece.row])
            for turn in turns
            for piece in self._decode([ids[row] for row in turn], [configs[row] for row in turn])
        )

    def _encode(self, prompt: Prompt, row: int, config: SamplingConfig) -> list[int]:
        where = f"prompt {row}"
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
        _check_ids(np.asarray(list(config.logit_bias), int), self.tokenizer.vocab_size, "logit_bias")
        self._check_length(len(ids), where)
        if "attention" in self.config.kinds and len(ids) + config.max_tokens > self.max_prompt_tokens:
            raise ValueError(
                f"{where} has {len(ids)} tokens and max_tokens is {config.max_tokens}, together more than the "
                f"{self.max_prompt_tokens} that this model's attention holds; ask for fewer, or load the model with a "
                "larger max_prompt_tokens"
            )
        return ids

    def _check_length(self, length: int, where: str) -> None:
        if length > self.max_prompt_tokens:
            raise ValueError(
                f"{where} has {length} tokens, more than the longest shape bucket of {self.max_prompt_tokens}; shorten "
                "it, or load the model with a larger max_prompt_tokens"
            )

    def _decode(self, prompts: list[list[int]], configs: list[SamplingConfig]) -> Iterator[Piece]:
        """The decode path: read one batch of prompts, draw tokens chunk by chunk, hand out text as it is certain."""
        config, (parameters, head) = unrolled(self.config), self._inference
        tokenizer, B = self.tokenizer, _bucket(len(prompts))
        rows = decoding.make_rows(configs, B, end=tokenizer.end_of_document, vocab_size=tokenizer.vocab_size)
        seen = decoding.seen_before(configs, prompts, B, config.vocab_size)
        hidden, cache = self._read(parameters, prompts, max(c.max_tokens for c in configs))
        index = np.zeros(B, np.int32)
        token, seen, logprobs = decoding.choose(head, hidden, rows, index, seen, config)
        drawn, logprobs = np.asarray(token)[:, None], jax.tree.map(lambda leaf: leaf[:, None], logprobs)
        writers = [Writer(tokenizer, prompt, c) for prompt, c in zip(prompts, configs, strict=True)]
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
            last, index = np.where(alive, drawn[:, -1], 0), index + np.int32(drawn.shape[1])
            drawn, logprobs, cache, seen = decoding.decode(parameters, head, cache, seen, rows, last, index, alive, config)
            drawn = np.asarray(drawn)

    def _read(self, parameters: Parameters, prompts: list[list[int]], max_tokens: int) -> tuple[jax.Array, Any]:
        """Prompts, padded on the left, into a new cache; the hidden values of their last tokens `[B, 1, M]`."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        longest = max(map(len, distinct))
        length = _bucket(longest, SHORTEST_BUCKET) if longest <= PIECE else -(-longest // PIECE) * PIECE
        tokens = np.zeros((_bucket(len(distinct)), length), np.int32)
        segment_ids = np.zeros_like(tokens)
        for row, prompt in enumerate(distinct):
            tokens[row, length - len(prompt) :] = prompt
            segment_ids[row, length - len(prompt) :] = 1
        room = _bucket(length + max_tokens) if "attention" in self.config.kinds else 0
        config = unrolled(self.config)
        cache = decoding.empty_cache(config, len(tokens), room)
        hidden = None
        for start in range(0, length, PIECE):
            piece = slice(start, start + PIECE)
            hidden, cache = decoding.prefill(parameters, tokens[:, piece], segment_ids[:, piece], cache, config)
        assert hidden is not None
        if len(distinct) == len(prompts):
            return hidden, cache
        places = {prompt: row for row, prompt in enumerate(distinct)}
        rows = np.zeros(_bucket(len(prompts)), np.int32)
        rows[: len(prompts)] = [places[tuple(prompt)] for prompt in prompts]
        return hidden[rows], decoding.fork(cache, rows)


def inference_parameters(parameters: Parameters, config: ModelConfig) -> tuple[Parameters, Parameters]:
    """Parameters of `unrolled(config)` and of the unembedding, cast to the compute dtype where that changes nothing."""
    dtype = jnp.dtype(config.compute_dtype)

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if path[-1].key in COMPUTE_KERNELS else leaf

    parameters = unroll(parameters, config)
    parameters = jax.tree_util.tree_map_with_path(place, parameters)
    # The residual stream starts from the embedding as it is; as an unembedding it is used in the compute dtype.
    name = "embedding" if config.tie_embeddings else "unembedding"
    return parameters, {name: parameters[name].astype(dtype)}


@partial(jax.jit, static_argnames=("config",))
def _logits(
    parameters: Parameters, head: Parameters, tokens: jax.Array, segment_ids: jax.Array, config: ModelConfig
) -> jax.Array:
    hidden = forward(parameters, tokens, config, segment_ids=segment_ids).hidden
    return unembed(head, hidden, config).astype(jnp.float32)


def _bucket(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return 1 << (max(size, least) - 1).bit_length()


def _check_ids(ids: np.ndarray, size: int, where: str) -> None:
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.size:
        raise ValueError(f"{where} contains token id {wrong.flat[0]}, outside the range 0 to {size - 1}")


def _shapes(parameters: Parameters) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return {path_name(path): np.shape(leaf) for path, leaf in leaves}


@lru_cache
def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return _shapes(jax.eval_shape(lambda: init_parameters(config, jax.random.key(0))))


def check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConfigError unless parameters of these shapes by path are those of `config`."""
    expected = _expected_shapes(config)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ConfigError(
                f"the parameters are not those of the configuration: {name} should be {expected.get(name, 'absent')}, "
                f"is {found.get(name, 'absent')}"
            )


def read_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The model that a model directory or a training run's directory holds.

    Raises:
        ConfigError: neither, or its config.json is damaged or of another version.
    """
    return _read_config(Path(directory))[0]


def read_parameters(directory: str | os.PathLike[str], abstract: Any = None) -> Parameters:
    """The parameters of a model directory, or of a training run's newest checkpoint.

    With `abstract` (a pytree of `jax.ShapeDtypeStruct`) they get its structure and shardings, each device reading its own
    shards; without, they are on the first device.

    Raises:
        ConfigError: something is missing, damaged or of another shape; the message says what and where.
    """
    path = Path(directory)
    folder = parameters_of(path)
    if folder is not None:
        return load_parameters(folder, abstract)
    from bm_jax.checkpoint import restore_parameters  # slow to import

    return restore_parameters(path, abstract)


def parameters_of(directory: Path) -> Path | None:
    """The folder of a model directory's parameters; None for a training run's directory, which has checkpoints.

    Raises:
        ConfigError: neither, or something is missing or damaged.
    """
    if _read_config(directory)[1]:
        return None
    if not (directory / PARAMETERS).is_dir():
        raise ConfigError(f"{directory} has no {PARAMETERS} folder: the model directory is incomplete")
    return directory / PARAMETERS


def bring_companions(source: Path, destination: Path, names: Sequence[str] = COMPANIONS) -> None:
    """Copy those of these files that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def write_description(directory: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """What a model directory holds beside the parameters."""
    tokenizer.save(directory)
    wrapped = {"format": FORMAT, "version": VERSION, "model": to_dict(config)}
    (directory / "config.json").write_text(json.dumps(wrapped, indent=2) + "\n", encoding="utf-8")


def _read_config(path: Path) -> tuple[ModelConfig, bool]:
    """The model that a directory holds, and whether it is a training run's."""
    file = path / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "no config.json in it" if path.is_dir() else "no such directory"
        raise ConfigError(f"{path} is neither a model nor a run directory: {what}") from None
    except NotADirectoryError:
        raise ConfigError(f"{path} is a file; give the directory of a model or of a training run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is damaged: it is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a JSON object, found {type(values).__name__}")
    if "format" not in values:
        return from_dict(Config, values, where=f"{file}: Config").model, True
    if values["format"] != FORMAT or values.get("version") != VERSION:
        raise ConfigError(
            f"{file} has format {values['format']!r} version {values.get('version')!r}; this program reads "
            f"{FORMAT!r} version {VERSION}"
        )
    return from_dict(ModelConfig, values.get("model"), where=f"{file}: model"), False
