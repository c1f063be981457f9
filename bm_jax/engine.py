"""Continuous batching: many requests over a fixed number of slots, with nothing compiled anew as they come and go.

One thread turns. A turn takes waiting requests into free slots, reads a piece of the prompts that are being read, lets the
device draw a few tokens for all slots, and hands out what it drew in the turn before: the device works on one turn while the
host turns the last one into text. A request that ends, or is cancelled, leaves its slot to the next.

What a request gets does not depend on the others: each row of the device's batch is computed by itself, and every prompt is
read alone, in pieces that depend on its length only. Whole pieces that were read before, of this or another prompt that starts
with the same ids, are taken from saved states (`Prefixes`) instead of being read again, which changes no bit.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bm_jax import decoding, state
from bm_jax.completion import Completion, TokenLogprob, Writer
from bm_jax.config import ConfigError
from bm_jax.language_model import LanguageModel, Prompt, pieces
from bm_jax.model import unrolled
from bm_jax.prefixes import Prefixes
from bm_jax.sampling import SamplingConfig, Seen
from bm_jax.state import State

STEPS = 8
"""Tokens that a turn draws for each slot."""
SHORTEST_PIECE = 16

logger = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """Too many requests wait already."""


class Closed(RuntimeError):
    """The engine takes no more requests."""


class Event(NamedTuple):
    """News of a request; the last one has `completion` or `error`."""

    text: str
    """What is certain now: never a part of a character or of a stop string."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    """Of `tokens`, where they are asked for."""
    completion: Completion | None
    error: Exception | None = None


class Statistics(NamedTuple):
    """Counts since the start, and how things stand."""

    requests: int
    completed: int
    cancelled: int
    failed: int
    prompt_tokens: int
    reused_tokens: int
    """Of those, taken from saved states."""
    generated_tokens: int
    active: int
    waiting: int
    slots: int


class Request:
    """What `Engine.submit` gives: a handle to cancel by."""

    def __init__(
        self, ids: list[int], config: SamplingConfig, deliver: Callable[[Event], None], client: str, engine: Engine
    ) -> None:
        self.prompt_tokens = len(ids)
        self.client = client
        self._ids, self._config, self._deliver, self._engine = ids, config, deliver, engine
        self._writer = Writer(engine.model.tokenizer, ids, config)
        self._cancelled = False
        self._told = 0
        self.ended = False

    def cancel(self) -> None:
        """End it where it is, at the next turn; nothing happens to one that has ended. For any thread."""
        self._cancelled = True
        self._engine._wake()


@dataclasses.dataclass
class _Reading:
    """A request whose prompt is being read."""

    request: Request
    slot: int
    keys: Mapping[int, bytes]
    """Of the prompt's first pieces, for `Prefixes`."""
    state: State | None = None
    read: int = 0


class _Flight(NamedTuple):
    """What the device was asked for and the host has not looked at yet."""

    firsts: list[tuple[Request, decoding.Choice]]
    """First tokens of requests."""
    owners: list[Request | None]
    """Of each slot when `drawn` was asked for."""
    drawn: decoding.Drawn | None


class Engine:
    """See the module.

    Args:
        model: what completes the prompts.
        slots: requests that are decoded together.
        queue: most requests that wait for a slot.
        chunk: tokens of a piece of a prompt, a power of two; between two pieces the slots draw tokens.
        room: most tokens of prompt and completion together, for a model with attention: each slot holds as many.
        prefix_bytes: memory for saved states of prompts.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int = 8,
        queue: int = 256,
        chunk: int = 512,
        room: int = 8192,
        prefix_bytes: int = 2**28,
    ) -> None:
        for name, value, least in (("slots", slots, 1), ("queue", queue, 1), ("room", room, 3)):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if chunk < SHORTEST_PIECE or chunk & (chunk - 1):
            raise ConfigError(f"chunk must be a power of two of at least {SHORTEST_PIECE}, got {chunk}")
        self.model = model
        self._config = unrolled(model.config)
        attention = "attention" in self._config.kinds
        self.room = min(room, model.max_prompt_tokens or room) if attention else 0
        """Most tokens of prompt and completion together; 0 for no limit."""
        self.queue_bound, self._waiting = queue, _FairQueue()
        self._owners: list[Request | None] = [None] * slots
        self._readings: collections.deque[_Reading] = collections.deque()
        self._chunk, self._prefix_bytes = chunk, prefix_bytes
        self._news = threading.Condition()
        self._closing, self._abort, self._thread = False, False, None
        self._counts: collections.Counter[str] = collections.Counter()
        self._forget()

    # --- for any thread --------------------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, config: SamplingConfig, deliver: Callable[[Event], None], *, client: str = "") -> Request:
        """Queue a request.

        Args:
            prompt: text or ids.
            config: what is asked.
            deliver: called with each `Event`, by the engine's thread: it should return at once.
            client: waiting requests are taken from the clients in turn.

        Raises:
            ValueError: the prompt or an id is not what the model can read.
            QueueFull: too many requests wait.
            Closed: the engine is shutting down.
        """
        ids = self.model.encode(prompt, "prompt", config.max_tokens)
        self.model.check_ids(config)
        if self.room and len(ids) + config.max_tokens > self.room:
            raise ValueError(
                f"prompt has {len(ids)} tokens and max_tokens is {config.max_tokens}, together more than the {self.room} "
                "that a slot of this server holds; ask for fewer"
            )
        request = Request(ids, config, deliver, client, self)
        with self._news:
            if self._closing:
                raise Closed("the engine is shutting down and takes no more requests")
            if sum(not waiting._cancelled for waiting in self._waiting) >= self.queue_bound:
                raise QueueFull(f"{self.queue_bound} requests wait already; try again later")
            self._waiting.push(request)
            self._counts.update(requests=1, prompt_tokens=len(ids))
            self._news.notify()
        return request

    @property
    def statistics(self) -> Statistics:
        """Counts, and how things stand now."""
        with self._news:
            counted = {name: self._counts[name] for name in Statistics._fields[:7]}
            active = sum(owner is not None for owner in self._owners)
            return Statistics(**counted, active=active, waiting=len(self._waiting), slots=len(self._owners))

    def start(self) -> None:
        """Turn in a thread of its own, until `close`."""
        if self._thread is not None or self._closing:
            raise RuntimeError("the engine was started already")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 0) -> None:
        """Take no more requests, give those there are `timeout` seconds, cancel the rest, and end the thread."""
        with self._news:
            self._closing = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join(timeout)
            self._abort = True
            self._wake()
            self._thread.join()
            self._thread = None
        for request in self._all():  # there was no thread to end them
            self._end(request, request._writer.cancel())

    def warm(self) -> None:
        """Compile every program that requests need, short of lists of more than `decoding.LIST` stop tokens.

        Raises:
            Exception: what the device or the compiler says against it.
        """
        size = SHORTEST_PIECE
        while size <= self._chunk:
            # A whole piece, and then one of this size that is not full.
            for tokens, lengths in pieces([[0] * (self._chunk + size - 1)], 1, self._chunk, SHORTEST_PIECE):
                read = state.empty(self._config, 1, self.room)
                state.read_on(self.model.inference[0], read, tokens, lengths, self._config)
            size *= 2
        for size in {min(1 << k, self.room) for k in range(self.room.bit_length() + 1)} if self.room else ():
            state.with_room(Prefixes.copy(state.empty(self._config, 1, self.room), size), self.room)
        plain = SamplingConfig(max_tokens=2)
        many = {"logit_bias": dict.fromkeys(range(min(decoding.LIST + 1, self.model.tokenizer.vocab_size)), 0.0)}
        for change in ({}, {"logprobs": 0}, many, {"top_k": 2}, {"top_k": 2, "logprobs": 0}, {"top_k": 2, **many}):
            config = dataclasses.replace(plain, **change)
            last: queue.Queue[Event] = queue.Queue()
            self.submit([0], config, last.put)
            event = None
            while event is None or not (event.completion or event.error):
                if self._thread is None:
                    self._turn()
                event = last.get() if self._thread is not None or not last.empty() else None
            if event.error is not None:
                raise event.error
        self._counts.clear()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        with self._news:
            self._news.notify()

    # --- the engine's thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._news:
                while self._idle() and not self._closing:
                    self._news.wait()
                if self._idle():
                    return
            if self._abort:
                for request in self._all():
                    request._cancelled = True
            try:
                self._turn()
            except Exception as error:  # of the device, say: those concerned are told, the engine goes on
                logger.exception("a turn of the engine failed")
                self._fail(error)

    def _idle(self) -> bool:
        return not (len(self._waiting) or any(self._owners) or self._flight)

    def _all(self) -> list[Request]:
        with self._news:
            return [*self._waiting, *(owner for owner in self._owners if owner is not None)]

    def _forget(self) -> None:
        """Nothing is left of the device's arrays, which may be the results of what failed."""
        self._going: decoding.Going | None = None
        self._prefixes = Prefixes(self._chunk, self._prefix_bytes)
        self._rows: decoding.Rows | None = None
        self._flight: _Flight | None = None
        self._firsts: list[tuple[Request, decoding.Choice]] = []

    def _slots(self) -> decoding.Going:
        """Where each slot is; empty ones, when there are none yet."""
        if self._going is None:
            B = len(self._owners)
            cache = self.model.decoding_cache(state.empty(self._config, B, self.room).cache, B)
            zero = jnp.zeros(B, jnp.int32)
            self._going = decoding.Going(cache, None, zero, zero + 0, zero > 0)
        return self._going

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._read_some()
        ready = [
            owner is not None and not any(r.slot == slot for r in self._readings) for slot, owner in enumerate(self._owners)
        ]
        drawn, owners = None, [owner if ready[slot] else None for slot, owner in enumerate(self._owners)]
        if any(owners):
            going = self._slots()
            going = going._replace(alive=_both(going.alive, np.array(ready)), seen=self._seen())
            limited = any(owner._config.limited for owner in owners if owner is not None)
            self._going, drawn = self.model.decode(going, self._device_rows(), STEPS, limited)
        before, self._flight = self._flight, None
        if self._firsts or drawn is not None:
            self._flight, self._firsts = _Flight(self._firsts, owners, drawn), []
        if before is not None:
            self._hand_out(before)

    def _drop_cancelled(self) -> None:
        for request in self._all():
            if request._cancelled:
                self._end(request, request._writer.cancel())

    def _admit(self) -> None:
        with self._news:
            for slot, owner in enumerate(self._owners):
                if owner is None and len(self._waiting):
                    self._owners[slot] = request = self._waiting.pop()
                    self._readings.append(_Reading(request, slot, self._prefixes.keys(request._ids)))
                    self._rows = None

    def _read_some(self) -> None:
        """Read one chunk of a prompt, or several short prompts, in turn."""
        budget = self._chunk
        while self._readings and budget > 0:
            reading = self._readings[0]
            budget -= self._read_piece(reading)
            self._readings.rotate(-1)  # the other prompts' turn
            if reading.read == len(reading.request._ids):
                self._readings.remove(reading)
                self._begin(reading)

    def _read_piece(self, reading: _Reading) -> int:
        """Read the next piece of a prompt; how many tokens the device read."""
        ids, read = reading.request._ids, reading.state
        if read is None:
            reading.read, found = self._prefixes.find(reading.keys)
            self._counts["reused_tokens"] += reading.read
            # A copy of what was found, since reading on writes over it.
            read = state.with_room(found.fork([0]), self.room) if found else state.empty(self._config, 1, self.room)
            if reading.read == len(ids):
                reading.state = read
                return 0
        part = ids[reading.read : reading.read + self._chunk]
        ((tokens, lengths),) = pieces([part], 1, self._chunk, SHORTEST_PIECE)
        reading.state = read = state.read_on(self.model.inference[0], read, tokens, lengths, self._config)
        reading.read += len(part)
        self._prefixes.keep(reading.keys, reading.read, read)
        return tokens.shape[1]

    def _begin(self, reading: _Reading) -> None:
        """Draw the first token of a prompt that was read, and put it into its slot."""
        request, read = reading.request, reading.state
        assert read is not None
        config, tokenizer = request._config, self.model.tokenizer
        rows = decoding.make_rows([config], 1, end=tokenizer.end_of_document, vocab_size=tokenizer.vocab_size)
        held = self._seen()
        seen = None if held is None else Seen(read.seen, jnp.zeros(read.seen.shape, jnp.int32))
        choice = decoding.choose(self.model.inference[1], read.hidden, rows, np.zeros(1, np.int32), seen, self._config)
        cache = self.model.decoding_cache(read.cache, len(self._owners))
        self._going = _take_slot(self._slots()._replace(seen=held), np.int32(reading.slot), cache, choice, rows)
        self._firsts.append((request, choice))

    def _seen(self) -> Seen | None:
        """What penalties and log-probabilities need, where a request in a slot asks for them."""
        if not any(owner is not None and decoding.needs_seen(owner._config) for owner in self._owners):
            return None
        if (held := self._slots().seen) is not None:
            return held
        shape = (len(self._owners), self._config.vocab_size)
        return Seen(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))

    def _device_rows(self) -> decoding.Rows:
        rows = self._rows
        if rows is None:
            configs = [SamplingConfig() if owner is None else owner._config for owner in self._owners]
            tokenizer = self.model.tokenizer
            rows = decoding.make_rows(configs, len(configs), end=tokenizer.end_of_document, vocab_size=tokenizer.vocab_size)
            self._rows = rows = jax.device_put(rows)
        return rows

    def _hand_out(self, flight: _Flight) -> None:
        """Turn what was drawn into text and tell the requests' owners."""
        for request, choice in flight.firsts:
            token, logprobs = jax.device_get((choice.token, choice.logprobs))
            self._push(request, token.tolist(), logprobs)
        if flight.drawn is not None:
            ids, logprobs = jax.device_get(flight.drawn)
            for slot, request in enumerate(flight.owners):
                if request is not None:
                    certain = ids[slot] >= 0
                    said = jax.tree.map(lambda leaf, slot=slot, certain=certain: leaf[slot][certain], logprobs)
                    self._push(request, ids[slot][certain].tolist(), said)

    def _push(self, request: Request, ids: list[int], said: Any) -> None:
        if request.ended or not ids:
            return
        try:
            text = request._writer.push(ids, said)
        except Exception as error:  # of the tokenizer, say: it is this request's alone
            logger.exception("a request failed")
            self._give_up(request, error)
            return
        if request._writer.completion is None:
            self._tell(request, self._news_of(request, text))
        else:
            self._end(request, text)

    def _end(self, request: Request, text: str) -> None:
        completion = request._writer.completion
        assert completion is not None
        self._counts["cancelled" if completion.finish_reason == "cancelled" else "completed"] += 1
        self._release(request)
        self._tell(request, self._news_of(request, text))

    def _news_of(self, request: Request, text: str) -> Event:
        writer, first = request._writer, request._told
        request._told = last = len(writer.tokens)
        self._counts["generated_tokens"] += last - first
        said = None if request._config.logprobs is None else tuple(writer.logprobs[first:last])
        return Event(text, tuple(writer.tokens[first:last]), said, writer.completion)

    def _fail(self, error: Exception) -> None:
        for request in self._all():
            self._give_up(request, error)
        self._forget()

    def _give_up(self, request: Request, error: Exception) -> None:
        self._counts["failed"] += 1
        self._release(request)
        self._tell(request, Event("", (), None, None, error))

    def _release(self, request: Request) -> None:
        """It has ended: its slot, or its place in the queue, is free."""
        request.ended = True
        with self._news:
            self._waiting.remove(request)
            if request in self._owners:
                slot = self._owners.index(request)
                self._owners[slot] = None
                self._readings = collections.deque(r for r in self._readings if r.slot != slot)

    def _tell(self, request: Request, event: Event) -> None:
        try:
            request._deliver(event)
        except Exception:  # a listener that is gone must not stop the others
            logger.exception("a listener failed; its request is cancelled")
            request._cancelled = True


class _FairQueue:
    """Requests in the order of arrival, taken from the clients in turn."""

    def __init__(self) -> None:
        self._of: collections.OrderedDict[str, collections.deque[Request]] = collections.OrderedDict()

    def push(self, request: Request) -> None:
        self._of.setdefault(request.client, collections.deque()).append(request)

    def pop(self) -> Request:
        client, waiting = next(iter(self._of.items()))
        request = waiting.popleft()
        del self._of[client]
        if waiting:
            self._of[client] = waiting  # behind the other clients
        return request

    def remove(self, request: Request) -> None:
        waiting = self._of.get(request.client, collections.deque())
        if request in waiting:
            waiting.remove(request)
            if not waiting:
                del self._of[request.client]

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[Request]:
        return (request for waiting in self._of.values() for request in waiting)


_both = jax.jit(jnp.logical_and)


@partial(jax.jit, donate_argnames=("going",))
def _take_slot(going: decoding.Going, slot: Array, cache: Any, choice: decoding.Choice, rows: decoding.Rows) -> decoding.Going:
    """A request whose prompt was read, and its first token drawn, in a slot."""
    layers = jax.tree.map(lambda leaf, new: leaf.at[:, slot].set(new[:, 0]), going.cache.layers, cache.layers)
    others = (leaf.at[slot].set(new[0]) for leaf, new in zip(going.cache[1:], cache[1:], strict=True))
    seen = going.seen
    if seen is not None:
        seen = jax.tree.map(lambda leaf, new: leaf.at[slot].set(new[0]), seen, choice.seen)
    token = choice.token[0]
    ended = (token == rows.end) | jnp.any(token == rows.stop_tokens[0]) | (rows.max_tokens[0] <= 1)
    return decoding.Going(
        type(going.cache)(layers, *others),
        seen,
        going.token.at[slot].set(token),
        going.number.at[slot].set(1),
        going.alive.at[slot].set(~ended),
    )
