"""Whatever is sent to the server, it answers in the documented form and stays alive."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_serve import quick_compilation, serving  # noqa: F401
from tiny_models import tiny_config, tiny_model

STATUSES = {200, 400, 404, 413}
PATHS = ("/v1/completions", "/v1/chat/completions")
GOOD = {
    "model": st.just("tiny"),
    "prompt": st.one_of(st.text(min_size=1, max_size=20), st.lists(st.integers(0, 256), min_size=1, max_size=20)),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=20)}),
        min_size=1,
        max_size=3,
    ),
    "max_tokens": st.integers(1, 6),
    "max_completion_tokens": st.integers(1, 6),
    "n": st.integers(1, 2),
    "best_of": st.integers(1, 2),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 300),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "logit_bias": st.dictionaries(st.integers(0, 260).map(str), st.floats(-100, 100), max_size=4),
    "logprobs": st.one_of(st.integers(0, 20), st.booleans()),
    "top_logprobs": st.integers(0, 20),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.one_of(st.text(min_size=1, max_size=5), st.lists(st.text(min_size=1, max_size=5), max_size=3)),
    "stop_token_ids": st.lists(st.integers(0, 260), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "user": st.text(max_size=5),
    "echo": st.booleans(),
    "suffix": st.text(max_size=2),
    "tools": st.lists(st.none(), max_size=1),
    "response_format": st.just({"type": "text"}),
}
"""What each field may hold, or nearly."""
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**31, 2**63, -(10**400), 1e308, float("nan"), float("-inf"), 1e-320, "", "\ud800", "\0", [], {}]),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
        max_leaves=6,
    ),
)
SOUND = {"prompt": st.just("ab"), "messages": st.just([{"role": "user", "content": "ab"}]), "max_tokens": st.just(4)}


@st.composite
def requests(draw) -> dict:
    """A sound request with fields that are right, nearly right, and odd."""
    path = draw(st.sampled_from(PATHS))
    needed = "prompt" if path == PATHS[0] else "messages"
    values = {name: draw(SOUND[name]) for name in (needed, "max_tokens")}
    for name in draw(st.lists(st.sampled_from(sorted(GOOD)), max_size=6, unique=True)):
        values[name] = draw(GOOD[name])
    for name in draw(st.lists(st.one_of(st.sampled_from(sorted(GOOD)), st.text(max_size=5)), max_size=1)):
        values[name] = draw(ODD)
    if draw(st.booleans()):
        for other in {"prompt", "messages"} - {needed}:
            values.pop(other, None)
    return {"path": path, "body": json.dumps(values).encode()}


@pytest.fixture(scope="module")
def running():
    model = tiny_model(tiny_config(("mamba", "moe")))
    with serving(model, max_tokens=8, body_bytes=20_000) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def check(client: httpx.Client, path: str, body: bytes) -> int:
    """Send a body; the answer has a documented status and form, and the server lives."""
    response = client.post(path, content=body)
    assert response.status_code in STATUSES, response.text
    kind = response.headers["content-type"]
    if response.status_code != 200:
        assert kind == "application/json"
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif kind == "application/json":
        assert response.json()["choices"]
    else:
        *events, end, rest = response.content.decode().split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events)
    assert client.get("/healthz").json() == {"status": "ok"}
    return response.status_code


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests())
def test_fields(running, request):
    check(running, **request)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(PATHS), body=st.one_of(st.binary(max_size=60), ODD.map(lambda value: json.dumps(value).encode())))
def test_bodies(running, path, body):
    assert check(running, path, body) != 200


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from(PATHS),
    at=st.floats(0, 1),
    cut=st.integers(0, 3),
    new=st.one_of(st.binary(max_size=3), st.sampled_from([b"[" * 3000, b"9" * 5000, b"\xff", b"NaN", b'"\\ud800"', b"1e999"])),
)
def test_damaged_bodies(running, path, at, cut, new):
    body = b'{"prompt": "ab", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 4, "logit_bias": {"7": 1.5}}'
    body = body.replace(b'"prompt": "ab", ' if "chat" in path else b'"messages": [{"role": "user", "content": "ab"}], ', b"")
    place = int(at * len(body))
    check(running, path, body[:place] + new + body[place + cut :])


def test_sound_requests_are_answered(running):
    """The strategies above say something: what is right gets an answer."""
    for path, needed in zip(PATHS, ("prompt", "messages"), strict=True):
        values = {"prompt": "ab", "messages": [{"role": "user", "content": "ab"}]}
        assert check(running, path, json.dumps({needed: values[needed], "max_tokens": 4}).encode()) == 200
