"""Continuous batching: every request gets what it gets alone, whatever comes, goes and is cancelled beside it."""

from __future__ import annotations

import queue
import random
import threading
import time

import jax
import numpy as np
import pytest
from tiny_models import FAMILIES, tiny_config, tiny_model

from bm_jax.config import ConfigError
from bm_jax.engine import Closed, Engine, QueueFull
from bm_jax.language_model import LanguageModel
from bm_jax.sampling import SamplingConfig

compilations = 0


def _count(event: str, *_, **__) -> None:
    global compilations
    compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, slots=4, queue=64, chunk=16) as running:
        running.warm()
        yield running


class Listener:
    """Collects the events of a request."""

    def __init__(self, engine: Engine, prompt, *, client: str = "", **options) -> None:
        self.events: queue.Queue = queue.Queue()
        self.request = engine.submit(prompt, SamplingConfig(**options), self.events.put, client=client)
        self.pieces: list = []

    def next(self):
        self.pieces.append(self.events.get(timeout=60))
        return self.pieces[-1]

    def fail(self):
        while not self.pieces or self.pieces[-1].error is None:
            assert self.next().completion is None
        return str(self.pieces[-1].error)

    def finish(self):
        while not self.pieces or self.pieces[-1].completion is None:
            assert self.next().error is None
        return self.pieces[-1].completion


def finished(engine, prompt, **options):
    return Listener(engine, prompt, **options).finish()


def idle(engine):
    end = time.monotonic() + 60
    while (now := engine.statistics).active or now.waiting:
        assert time.monotonic() < end, now
        time.sleep(0.01)
    return now


@pytest.mark.slow
@pytest.mark.parametrize("layers", FAMILIES, ids="-".join)
def test_many_at_once_get_what_each_gets_alone(layers):
    model = tiny_model(tiny_config(layers))
    rng = random.Random(0)
    requests = []
    for i in range(14):
        options = {"seed": i, "max_tokens": rng.choice([1, 2, 9, 30]), "temperature": rng.choice([0, 0.8])}
        options |= rng.choice([{}, {}, {"repetition_penalty": 1.4}, {"logprobs": 2}, {"top_k": 5}, {"stop": ("a", "zz")}])
        requests.append(("".join(rng.choices("abcde ", k=rng.choice([1, 3, 15, 16, 17, 40]))), options))
    with Engine(model, slots=3, chunk=16, room=128) as engine:
        together = [c.finish() for c in [Listener(engine, prompt, **options) for prompt, options in requests]]
        assert idle(engine).active == 0
        alone = [finished(engine, prompt, **options) for prompt, options in requests]
        statistics = idle(engine)
    assert together == alone
    for (prompt, options), completion in zip(requests, together, strict=True):
        wanted = model.generate([prompt], **options)[0]
        assert (completion.text, completion.tokens, completion.finish_reason) == (
            wanted.text, wanted.tokens, wanted.finish_reason,
        )  # fmt: skip
        if "logprobs" in options:
            said, meant = ([one.logprob for one in c.logprobs] for c in (completion, wanted))
            np.testing.assert_allclose(said, meant, rtol=0, atol=1e-4)
    assert statistics.completed == statistics.requests == 28
    assert statistics.generated_tokens == 2 * sum(len(c.tokens) for c in together)
    assert statistics.prompt_tokens == 2 * sum(len(prompt) for prompt, _ in requests)


def test_events_add_up_to_the_completion(engine):
    listener = Listener(engine, "Once upon", max_tokens=40, logprobs=1, seed=4)
    completion = listener.finish()
    assert len(listener.pieces) > 2
    assert "".join(event.text for event in listener.pieces) == completion.text
    assert tuple(i for event in listener.pieces for i in event.tokens) == completion.tokens
    assert tuple(one for event in listener.pieces for one in event.logprobs) == completion.logprobs
    assert all(event.completion is None for event in listener.pieces[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("layers", [FAMILIES[0], FAMILIES[-1]], ids="-".join)
def test_nothing_is_compiled_while_requests_come_and_go(layers):
    with Engine(tiny_model(tiny_config(layers)), slots=3, chunk=16, room=64) as engine:
        engine.warm()
        for i in (1, 16, 33):  # the small programs around
            finished(engine, "y" * i, max_tokens=3)
            finished(engine, "y" * i, max_tokens=3, logprobs=1)
            finished(engine, "y" * i, max_tokens=3)
        idle(engine)
        before = compilations
        listeners = [
            Listener(engine, "x" * (i * 7 % 40 + 1), max_tokens=i % 12 + 1, temperature=i % 3, seed=i, **options)
            for i in range(20)
            for options in ({}, {"presence_penalty": 0.5})
        ]
        for listener in listeners:
            listener.finish()
        assert compilations == before


def test_prompts_are_read_once(model):
    with Engine(model, slots=2, chunk=16) as engine:
        long = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3  # 14 pieces
        first = finished(engine, long, max_tokens=4, temperature=0)
        assert engine.statistics.reused_tokens == 0
        assert finished(engine, long, max_tokens=4, temperature=0) == first
        assert engine.statistics.reused_tokens == len(long)
        shared = finished(engine, long[:100] + "!", max_tokens=4, temperature=0)
        assert engine.statistics.reused_tokens == len(long) + 96  # every whole piece
    with Engine(model, slots=2, chunk=16, prefix_bytes=0) as engine:
        assert finished(engine, long[:100] + "!", max_tokens=4, temperature=0) == shared
        finished(engine, long[:100] + "!", max_tokens=4, temperature=0)
        assert engine.statistics.reused_tokens == 0


def test_saved_prefixes_are_bounded(model):
    with Engine(model, slots=2, chunk=16) as engine:
        finished(engine, "a" * 16, max_tokens=1)
        size = engine._prefixes._bytes // len(engine._prefixes)
    with Engine(model, slots=2, chunk=16, prefix_bytes=3 * size + size // 2) as engine:
        for i in range(6):
            finished(engine, f"{i}" * 16, max_tokens=1)
            assert len(engine._prefixes) <= 3
            assert engine._prefixes._bytes <= 3 * size + size // 2
        finished(engine, "5" * 16, max_tokens=1)
        assert engine.statistics.reused_tokens == 16  # the newest is still there


# --- cancelling, queueing, failing -----------------------------------------------------------------------------------


def test_a_cancelled_request_leaves_its_slot(engine):
    before = idle(engine)
    endless = [Listener(engine, "abc", max_tokens=10**6, seed=i, logit_bias={256: -float("inf")}) for i in range(6)]
    for listener in endless[:4]:
        listener.next()
    assert engine.statistics.active == 4
    assert engine.statistics.waiting == 2
    endless[5].request.cancel()  # one that waits
    assert endless[5].finish().finish_reason == "cancelled"
    for listener in endless[:4]:
        listener.request.cancel()
        listener.request.cancel()
    for listener in endless[:4]:
        completion = listener.finish()
        assert completion.finish_reason == "cancelled"
        assert "".join(event.text for event in listener.pieces) == completion.text
    endless[4].next()
    endless[4].request.cancel()
    endless[4].finish()
    endless[4].request.cancel()  # too late, and harmless
    after = idle(engine)
    assert after.cancelled - before.cancelled == 6
    assert finished(engine, "abc", max_tokens=5, temperature=0).finish_reason in ("length", "end")


def test_clients_take_turns(model):
    order = []
    engine = Engine(model, slots=1, chunk=16)
    for client, number in [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("b", 1)]:
        tell = lambda event, name=f"{client}{number}": order.append(name) if event.completion else None  # noqa: E731
        engine.submit("x", SamplingConfig(max_tokens=2), tell, client=client)
    with engine:
        idle(engine)
    assert order == ["a0", "b0", "c0", "a1", "b1", "a2"]


def test_a_full_queue(model):
    engine = Engine(model, slots=1, queue=3)
    nothing = SamplingConfig(max_tokens=1)
    for _ in range(3):
        request = engine.submit("x", nothing, lambda event: None)
    with pytest.raises(QueueFull, match="3 requests wait already"):
        engine.submit("x", nothing, lambda event: None)
    assert engine.statistics.waiting == 3
    request.cancel()  # gives its place up at once
    engine.submit("x", nothing, lambda event: None)
    with pytest.raises(QueueFull):
        engine.submit("x", nothing, lambda event: None)
    with engine:
        idle(engine)
        engine.submit("x", nothing, lambda event: None)
        idle(engine)


def test_closing_lets_what_runs_finish_or_not(model):
    engine = Engine(model, slots=1, chunk=16)
    engine.start()
    short = [Listener(engine, "x", max_tokens=20, seed=i) for i in range(3)]
    engine.close(timeout=60)
    assert {listener.finish().finish_reason for listener in short} <= {"length", "end"}
    with pytest.raises(Closed, match="shutting down"):
        engine.submit("x", SamplingConfig(), lambda event: None)

    with pytest.raises(RuntimeError, match="started already"):
        engine.start()

    engine = Engine(model, slots=1)
    waits = Listener(engine, "x")
    engine.close()  # it was never started
    assert waits.finish().finish_reason == "cancelled"

    engine = Engine(model, slots=1, chunk=16)
    engine.start()
    listeners = [Listener(engine, "x", max_tokens=10**6, logit_bias={256: -float("inf")}) for _ in range(2)]
    listeners[0].next()
    thread = engine._thread
    engine.close(timeout=0.1)
    assert [listener.finish().finish_reason for listener in listeners] == ["cancelled", "cancelled"]
    assert not thread.is_alive()


def test_a_listener_that_fails_is_alone(engine):
    def broken(event):
        raise RuntimeError("gone")

    wanted = finished(engine, "abc", max_tokens=5)
    engine.submit("x", SamplingConfig(max_tokens=10**6, logit_bias={256: -float("inf")}), broken)
    assert finished(engine, "abc", max_tokens=5) == wanted
    idle(engine)


def test_a_request_that_fails_is_alone(engine):
    """The tokenizer may refuse what a request draws; the others go on."""
    wanted = finished(engine, "abc", max_tokens=20, seed=3)
    broken = Listener(engine, "x", max_tokens=10**6, logit_bias={256: -float("inf")})
    broken.next()

    def refuse(*_):
        raise ValueError("cannot decode")

    broken.request._writer.push = refuse
    assert finished(engine, "abc", max_tokens=20, seed=3) == wanted
    assert "cannot decode" in broken.fail()
    idle(engine)


def test_a_long_prompt_lets_short_ones_pass(model):
    with Engine(model, slots=2, chunk=16) as engine:
        finished(engine, "x" * 40, max_tokens=2)
        order = []
        for name, prompt in (("long", "abcdefgh" * 2000), ("short", "b")):
            tell = lambda event, name=name: order.append(name) if event.completion else None  # noqa: E731
            engine.submit(prompt, SamplingConfig(max_tokens=1), tell)
        idle(engine)
    assert order == ["short", "long"]


def test_a_failing_device_is_told_and_survived(model, monkeypatch):
    from bm_jax import decoding

    decode, broken = decoding.decode, threading.Event()

    def fails(*arguments):
        if broken.is_set():
            raise RuntimeError("out of memory")
        return decode(*arguments)

    monkeypatch.setattr(decoding, "decode", fails)
    with Engine(model, slots=2, chunk=16) as engine:
        wanted = finished(engine, "abc", max_tokens=6, seed=1)
        broken.set()
        listeners = [Listener(engine, "abc", max_tokens=6) for _ in range(3)]
        for listener in listeners:
            assert "out of memory" in listener.fail()
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.warm()
        broken.clear()
        idle(engine)
        assert finished(engine, "abc", max_tokens=6, seed=1) == wanted


def test_what_was_read_on_a_failing_device_is_forgotten(model, monkeypatch):
    """Errors of a device come late: a saved state may be one, and making new slots may fail as well."""
    from bm_jax import state

    read, empty, broken = state.read_on, state.empty, threading.Event()

    def fails(parameters, held, tokens, lengths, config):
        result = read(parameters, held, tokens, lengths, config)
        if not broken.is_set():
            return result
        late = jax.pure_callback(lambda x: 1 / 0, jax.ShapeDtypeStruct(result.hidden.shape, result.hidden.dtype), result.hidden)
        return result._replace(hidden=late)

    def no_room(*arguments):
        if broken.is_set():
            raise RuntimeError("out of memory")
        return empty(*arguments)

    monkeypatch.setattr(state, "read_on", fails)
    with Engine(model, slots=2, chunk=16) as engine:
        wanted = finished(engine, "a prompt of more than one piece", max_tokens=6, seed=1)
        broken.set()
        assert Listener(engine, "another prompt of more than one piece", max_tokens=6).fail()
        monkeypatch.setattr(state, "empty", no_room)
        for _ in range(2):
            assert "out of memory" in Listener(engine, "a third", max_tokens=6).fail()
        broken.clear()
        assert len(engine._prefixes) == 0
        assert finished(engine, "another prompt of more than one piece", max_tokens=6).text
        assert finished(engine, "a prompt of more than one piece", max_tokens=6, seed=1) == wanted


def test_bad_requests_and_arguments(engine, model):
    for prompt, options, message in (
        ("", {}, "prompt is empty"),
        ([300], {}, "prompt contains token id 300"),
        ("a\udcff", {}, "not valid Unicode"),
        ("a", {"logit_bias": {999: 1.0}}, "logit_bias contains token id 999"),
        ("a", {"temperature": float("nan")}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, SamplingConfig(**options), lambda event: None)
    for options, message in (
        ({"slots": 0}, "slots must be at least 1"),
        ({"queue": 0}, "queue must be at least 1"),
        ({"room": 2}, "room must be at least 3"),
        ({"chunk": 48}, "chunk must be a power of two"),
        ({"chunk": 8}, "chunk must be a power of two of at least 16"),
    ):
        with pytest.raises(ConfigError, match=message):
            Engine(model, **options)
    small = Engine(tiny_model(tiny_config(("attention", "mlp"))), slots=1, chunk=16, room=32)
    with pytest.raises(ValueError, match="30 tokens and max_tokens is 3, together more than the 32"):
        small.submit("x" * 30, SamplingConfig(max_tokens=3), lambda event: None)
