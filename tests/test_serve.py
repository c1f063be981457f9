"""The server, by real clients over real connections: what the engine writes reaches them whole, and nothing they do
leaves the server worse than before."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import jax
import numpy as np
import openai
import pytest
from tiny_models import random_parameters, tiny_config, tiny_model

from bm_jax import serve
from bm_jax.config import MlpConfig, ModelConfig
from bm_jax.data.tokenizer import ByteTokenizer
from bm_jax.engine import Engine
from bm_jax.language_model import LanguageModel
from bm_jax.server.app import Service
from bm_jax.server.chat_template import ChatTemplate
from bm_jax.server.http_server import Server, listen
from bm_jax.server.request_fields import Limits

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
BYTE = ByteTokenizer()
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content | trim }}\n{% endfor %}"
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LONG = {"max_tokens": 10**6, "logit_bias": {"256": -100}}
"""Goes on until it is cancelled."""


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@dataclasses.dataclass(frozen=True)
class Running:
    """A server with its address, and what a client needs to know."""

    url: str
    server: Server
    engine: Engine
    keys: tuple[str, ...] = ()

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    @contextlib.contextmanager
    def client(self, key: str = "none"):
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60) as client:
            yield client

    def post(self, path: str, values, **options) -> httpx.Response:
        options |= {"content": values} if isinstance(values, bytes) else {"json": values}
        return httpx.post(f"{self.url}{path}", timeout=60, **options)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        return float(line.split()[-1])

    def wait_for(self, name: str, value: float, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {found}, not {value}"
            time.sleep(0.02)


@contextlib.contextmanager
def serving(model, *, slots=4, queue=64, name="tiny", keys=(), template: str | None = TEMPLATE, room=8192, **limits):
    """A server on a port of its own, in a thread of this process."""
    engine = Engine(model, slots=slots, queue=queue, room=room)
    engine.start()
    thread = None
    try:
        chat = ChatTemplate(template, model.tokenizer) if template else None
        limits = Limits(**({"max_tokens": 10**6, "shutdown_seconds": 20} | limits))
        server = Server(Service(engine, name, limits=limits, api_keys=keys, chat=chat, local=True))
        bound = listen("127.0.0.1", 0)
        bound.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", server, engine, keys)
    finally:
        if thread is not None:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
        engine.close(0)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(("mamba", "moe")))


@pytest.fixture(scope="module")
def running(model):
    with serving(model) as running:
        yield running


@pytest.fixture
def client(running):
    with running.client() as client:
        yield client


def stream_events(response: httpx.Response) -> list:
    """What a stream says, without its last word."""
    *events, end, rest = response.content.decode().split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response: httpx.Response, status: int) -> dict:
    """The error of a response: always this status, this form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    values = response.json()
    assert set(values) == {"error"}
    assert set(values["error"]) == {"message", "type", "param", "code"}
    return values["error"]


# --- the official client ---------------------------------------------------------------------------------------------


def test_text_is_that_of_generate(client, model):
    asked = {"max_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    (expected,) = model.generate("the hat", **asked)
    answer = client.completions.create(model="tiny", prompt="the hat", **asked)
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.logprobs) == (0, expected.text, None)
    assert choice.finish_reason == {"end": "stop", "length": "length"}[expected.finish_reason]
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.usage.to_dict() == {
        "prompt_tokens": 7,
        "completion_tokens": len(expected.tokens),
        "total_tokens": 7 + len(expected.tokens),
    }


def test_every_option_reaches_the_sampler(client, model):
    options = {"presence_penalty": 1.1, "frequency_penalty": -0.3, "temperature": 0.9, "max_tokens": 24, "seed": 2**32 - 1}
    ours = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3}
    (plain,) = model.generate("one", **options, **ours)
    (expected,) = model.generate("one", **options, **ours, logit_bias={97: 2.5, 256: -100.0}, stop_tokens=(plain.tokens[9],))
    answer = client.completions.create(
        model="tiny",
        prompt="one",
        logit_bias={"97": 2.5, "256": -100},
        extra_body=ours | {"stop_token_ids": [plain.tokens[9]]},
        **options,
    )
    assert answer.choices[0].text == expected.text
    assert answer.usage.completion_tokens == len(expected.tokens)
    stop = plain.text[5:7]
    (expected,) = model.generate("one", **options, **ours, stop=["never", stop])
    answer = client.completions.create(model="tiny", prompt="one", stop=["never", stop], extra_body=ours, **options)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, "stop")
    assert stop not in answer.choices[0].text


def test_prompts_and_samples_come_in_order(client, model):
    prompts = ["the hat", "a", "to be or not"]
    expected = [c.text for c in model.generate(prompts, n=3, seed=7, max_tokens=10)]
    answer = client.completions.create(model="tiny", prompt=prompts, n=3, seed=7, max_tokens=10)
    assert [choice.index for choice in answer.choices] == list(range(9))
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    ids = [BYTE.encode(prompt) for prompt in prompts]
    assert client.completions.create(model="tiny", prompt=ids, n=3, seed=7, max_tokens=10).choices == answer.choices
    alone = client.completions.create(model="tiny", prompt=ids[1], n=3, seed=7, max_tokens=10)
    assert [choice.text for choice in alone.choices] == expected[3:6]


def test_without_a_seed_each_answer_is_another(client):
    answer = client.completions.create(model="tiny", prompt=["a", "a"], n=2, max_tokens=30)
    again = client.completions.create(model="tiny", prompt=["a", "a"], n=2, max_tokens=30)
    assert len({choice.text for choice in [*answer.choices, *again.choices]}) == 8


def test_pieces_of_a_stream_make_the_text(client, model):
    asked = {"max_tokens": 40, "seed": 3, "n": 2}
    expected = model.generate(["the hat", "a"], **asked)
    stream = client.completions.create(
        model="tiny", prompt=["the hat", "a"], stream=True, stream_options={"include_usage": True}, **asked
    )
    texts, finished, usage = dict.fromkeys(range(4), ""), {}, None
    for chunk in stream:
        assert usage is None
        usage = chunk.usage
        for choice in chunk.choices:
            assert choice.index not in finished
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                finished[choice.index] = choice.finish_reason
    assert list(texts.values()) == [c.text for c in expected]
    assert [finished[i] for i in range(4)] == ["length" if c.finish_reason == "length" else "stop" for c in expected]
    assert (usage.prompt_tokens, usage.completion_tokens) == (8, sum(len(c.tokens) for c in expected))


def test_log_probabilities_of_a_completion(client, model):
    (expected,) = model.generate("the hat", max_tokens=20, logprobs=3, seed=1)
    for stream in (False, True):
        answer = client.completions.create(model="tiny", prompt="the hat", max_tokens=20, logprobs=3, seed=1, stream=stream)
        parts = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        said = [part.logprobs for part in parts if part.logprobs]
        joined = {name: [x for one in said for x in getattr(one, name)] for name in said[0].to_dict()}
        assert joined["token_logprobs"] == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-4)
        for top, one, token in zip(joined["top_logprobs"], expected.logprobs, expected.tokens, strict=True):
            wanted = dict(one.top) | {token: one.logprob}  # the one drawn is always among them
            assert list(top.values()) == pytest.approx(list(wanted.values()), abs=1e-4)
        for i, (token, name) in enumerate(zip(expected.tokens, joined["tokens"], strict=True)):
            assert name == (chr(token) if token < 128 else f"token_id:{token}")
            if token < 128:
                assert expected.text[joined["text_offset"][i]] == name
        assert joined["text_offset"] == sorted(joined["text_offset"])


def test_a_chat(client, model):
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]},
        {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "user", "content": "Go on", "name": "Ann"},
    ]
    prompt = "system: Be brief.\nuser: Hello\nyou\nassistant: Yes?\nuser: Go on\nassistant:"
    (expected,) = model.generate(prompt, max_tokens=15, seed=9, logprobs=2)
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=15, seed=9, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert (answer.object, choice.message.role, choice.message.content) == ("chat.completion", "assistant", expected.text)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(expected.tokens))
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(
        [one.logprob for one in expected.logprobs], abs=1e-4
    )
    assert [one.bytes for one in choice.logprobs.content] == [[i] for i in expected.tokens]
    assert [len(one.top_logprobs) for one in choice.logprobs.content] == [2] * len(expected.tokens)

    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=15, seed=9, n=2, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [[c.choices[0] for c in chunks if c.choices[0].index == i] for i in range(2)]
    assert [d[0].delta.role for d in deltas] == ["assistant"] * 2
    assert all(choice.delta.role is None for d in deltas for choice in d[1:])
    texts = ["".join(choice.delta.content or "" for choice in d) for d in deltas]
    assert texts == [c.text for c in model.generate(prompt, n=2, max_tokens=15, seed=9)]
    assert all(choice.finish_reason is None for d in deltas for choice in d[:-1])
    assert all(d[-1].finish_reason for d in deltas)
    assert last.usage.prompt_tokens == len(prompt)


def test_a_model_without_a_chat_template_cannot_chat(model):
    with serving(model, template=None) as running, running.client() as client:
        with pytest.raises(openai.NotFoundError, match="the model 'tiny' has no chat template, so it cannot chat"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
        client.completions.create(model="tiny", prompt="a", max_tokens=2)


def test_attention_holds_prompt_and_completion_in_its_room():
    model = tiny_model(tiny_config(("attention", "mlp"), repeats=1))
    with serving(model, room=64) as running:
        asked = {"messages": [{"role": "user", "content": "Hello"}], "logit_bias": {"256": -100}}
        usage = running.post("/v1/chat/completions", asked).json()["usage"]
        assert usage == {"prompt_tokens": 22, "completion_tokens": 42, "total_tokens": 64}
        error = error_of(running.post("/v1/completions", {"prompt": "a" * 60, "max_tokens": 5}), 400)
        assert "prompt has 60 tokens and max_tokens is 5, together more than the 64" in error["message"]
        error = error_of(running.post("/v1/chat/completions", asked | {"max_tokens": 43}), 400)
        assert "together more than the 64" in error["message"]


def test_models(client):
    assert [entry.id for entry in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no such model here"):
        client.models.retrieve("other/one")
    with pytest.raises(openai.NotFoundError, match=r'there is no model .*"other".* here'):
        client.completions.create(model="other", prompt="a")


def saying(text: str) -> LanguageModel:
    """A model that after `^` says `text` (bytes all different) and then ends the document."""
    config = ModelConfig(
        layers=("mlp",), repeats=1, vocab_size=257, width=257, mlp=MlpConfig(width=2), tie_embeddings=False,
        compute_dtype="float32",
    )  # fmt: skip
    chain = [*b"^", *text.encode(), BYTE.end_of_document]
    assert len(set(chain)) == len(chain)
    parameters = jax.tree.map(np.zeros_like, random_parameters(config))
    parameters["final_norm"] += 1
    parameters["embedding"] += np.eye(257, dtype=np.float32)
    parameters["unembedding"][chain[:-1], chain[1:]] = 10.0
    return LanguageModel(config, parameters, BYTE)


def test_characters_are_never_split():
    text = "é€😀 dan\n"
    with serving(saying(text)) as running:
        asked = {"prompt": "^", "temperature": 0, "max_tokens": 100}
        assert running.post("/v1/completions", asked).json()["choices"][0]["text"] == text
        response = running.post("/v1/completions", asked | {"stream": True})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        pieces = [event["choices"][0]["text"] for event in stream_events(response)]
        assert "".join(pieces) == text
        half = running.post("/v1/completions", asked | {"max_tokens": 3, "stream": True})
        assert "".join(event["choices"][0]["text"] for event in stream_events(half)) == "é\ufffd"


# --- requests that are wrong -----------------------------------------------------------------------------------------


def but(**values) -> bytes:
    return json.dumps({"prompt": "a"} | values).encode()


WRONG: dict[str, tuple[bytes, str, str | None]] = {
    "nothing": (b"", "the body is not JSON", None),
    "half": (b'{"prompt": ', "the body is not JSON", None),
    "binary": (b'{"prompt": "\xff"}', "the body is not UTF-8: invalid start byte at byte 12", None),
    "a list": (b"[1]", "the body must be a JSON object, got a list of 1", None),
    "a string": (b'"\\ud800"', "the body must be a JSON object", None),
    "deep": (b"[" * 100_000, "the body is nested too deeply", None),
    "deep objects": (b'{"prompt":' * 100_000, "the body is nested too deeply", None),
    "long integer": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "an integer of too many digits", None),
    "big integer": (but(max_tokens=10**4000), "max_tokens must be an integer from 1 to 1000000", "max_tokens"),
    "big float": (b'{"prompt": "a", "temperature": 1e999}', "1e999, which is not finite", None),
    "nan": (b'{"prompt": "a", "temperature": NaN}', "the number NaN", None),
    "infinity": (b'{"prompt": "a", "logit_bias": {"1": -Infinity}}', "the number -Infinity", None),
    "twice": (b'{"prompt": "a", "n": 1, "prompt": "b"}', 'the field "prompt" twice', None),
    "no prompt": (b"{}", "prompt is required", "prompt"),
    "null prompt": (b'{"prompt": null}', "prompt is required", "prompt"),
    "empty prompt": (but(prompt=""), "prompt is empty", "prompt"),
    "empty list": (but(prompt=[]), "prompt must be", "prompt"),
    "empty ids": (but(prompt=["a", ""]), "prompt[1] is empty", "prompt[1]"),
    "mixed": (but(prompt=["a", 1]), "prompt[1] must be a string, got 1", "prompt[1]"),
    "mixed ids": (but(prompt=[1, "a"]), "prompt[1] must be a token id from 0 to 256", "prompt[1]"),
    "id": (but(prompt=[1, 257]), "prompt[1] must be a token id from 0 to 256, got 257", "prompt[1]"),
    "big id": (but(prompt=[[2], [10**30]]), "prompt[1][0] must be a token id", "prompt[1][0]"),
    "true id": (but(prompt=[True]), "prompt[0] must be a token id", "prompt[0]"),
    "surrogate": (b'{"prompt": "a\\ud800"}', "prompt is not valid text: half of a character at 1", "prompt"),
    "long": (but(prompt="a" * 65537), "prompt has 65537 tokens, more than", "prompt"),
    "many": (but(prompt=["a"] * 65, n=2), "65 prompts times n = 2 are more than the 128", "n"),
    "model": (but(model=7), "model must be a string, got 7", "model"),
    "word for number": (but(temperature="hot"), 'temperature must be a number from 0 to 2, got "hot"', "temperature"),
    "cold": (but(temperature=-0.1), "temperature must be a number from 0 to 2, got -0.1", "temperature"),
    "true": (but(max_tokens=True), "max_tokens must be an integer from 1 to 1000000, got true", "max_tokens"),
    "fraction": (but(max_tokens=1.5), "max_tokens must be an integer", "max_tokens"),
    "none": (but(max_tokens=0), "max_tokens must be an integer from 1", "max_tokens"),
    "n": (but(n=0), "n must be an integer from 1 to 128, got 0", "n"),
    "top_p": (but(top_p=-0.1), "top_p must be a number from 0 to 1", "top_p"),
    "logprobs": (but(logprobs=21), "logprobs must be an integer from 0 to 20", "logprobs"),
    "seed": (but(seed=2**63), "seed must be an integer from -9223372036854775808 to", "seed"),
    "stop": (but(stop=["a", ""]), "stop must be made of strings of 1 to 256 characters", "stop"),
    "long stop": (but(stop="a" * 257), "stop must be made of strings of 1 to 256 characters", "stop"),
    "stops": (but(stop=["a"] * 17), "stop must be a string or a list of at most 16", "stop"),
    "stop tokens": (but(stop_token_ids=[-1]), "stop_token_ids[0] must be a token id", "stop_token_ids[0]"),
    "bias": (but(logit_bias={"x": 1}), "logit_bias must be an object whose keys are token ids", "logit_bias"),
    "bias id": (but(logit_bias={"257": 1}), 'token ids from 0 to 256, got "257"', "logit_bias"),
    "bias value": (but(logit_bias={"7": 101}), "numbers from -100 to 100, got 101", "logit_bias"),
    "stream": (but(stream="yes"), 'stream must be true or false, got "yes"', "stream"),
    "options": (but(stream_options={}), "stream_options needs stream to be true", "stream_options"),
    "inner": (but(stream=True, stream_options={"usage": True}), 'no field "stream_options.usage"', "usage"),
    "echo": (but(echo=True), "echo must be absent or false: it is not supported, got true", "echo"),
    "suffix": (but(suffix="b"), "suffix must be absent", "suffix"),
    "best of": (but(best_of=2), "best_of must be equal to n, got 2", "best_of"),
    "unknown": (but(temprature=1), 'there is no field "temprature"; did you mean temperature?', "temprature"),
    "odd name": (b'{"prompt": "a", "\\ud800": 1}', "there is no field", "\\ud800"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_completions(running, case):
    body, message, param = WRONG[case]
    error = error_of(running.post("/v1/completions", body), 400)
    assert message in error["message"]
    assert len(error["message"]) < 600
    assert error["param"] == (json.loads(f'"{param}"') if param else None)
    assert error["type"] == "invalid_request_error"


CHAT_WRONG = {
    "nothing": ({}, "messages must be a list of messages"),
    "empty": ({"messages": []}, "messages must be a list of messages, not empty"),
    "a text": ({"messages": ["a"]}, 'messages[0] must be an object, got "a"'),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, 'messages[0].role must be "system"'),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content must be a string or a list of text parts"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type must be"),
    "call": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls must be absent"),
    "field": ({"messages": [{"role": "user", "content": "a", "contnt": "b"}]}, "did you mean content?"),
    "refused": ({"messages": [{"role": "assistant", "content": "a"}]}, "the chat template refuses the messages: the user"),
    "both": ({"max_tokens": 1, "max_completion_tokens": 1}, "not both"),
    "top": ({"top_logprobs": 2}, "top_logprobs needs logprobs to be true"),
    "tools": ({"tools": [{}]}, "tools must be absent or []"),
    "format": ({"response_format": {"type": "json_object"}}, 'response_format must be absent or {"type": "text"}'),
}


@pytest.mark.parametrize("case", CHAT_WRONG)
def test_wrong_chats(running, case):
    values, message = CHAT_WRONG[case]
    messages = {"messages": [{"role": "user", "content": "a"}]} if "messages" not in values and case != "nothing" else {}
    assert message in error_of(running.post("/v1/chat/completions", messages | values), 400)["message"]


def test_what_asks_for_nothing_is_accepted(running):
    nothing = {
        "model": None, "suffix": None, "echo": False, "best_of": 1, "n": 1, "stop": [], "logit_bias": {}, "seed": None,
        "stream": False, "stream_options": None, "user": "someone", "metadata": {"a": "b"}, "store": False, "top_k": 0,
    }  # fmt: skip
    assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 2} | nothing).status_code == 200


def test_paths_and_methods(running):
    for path in ("/nothing", "/v1", "/v1/completions/more", "/healthz/", "/%ff", "/..%2f..%2fetc"):
        error_of(httpx.get(running.url + path), 404)
    response = httpx.get(f"{running.url}/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(httpx.delete(f"{running.url}/healthz"), 405)
    assert httpx.head(f"{running.url}/healthz").status_code == 200
    assert httpx.get(f"{running.url}/healthz").json() == {"status": "ok"}


def exchange(address, data: bytes, seconds: float = 20) -> bytes:
    """Send bytes, and return all that comes back until the other side closes."""
    with socket.create_connection(address, timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError):  # it may close before it has read all
            while part := connection.recv(65536):
                received += part
    return received


def test_what_is_not_http_gets_an_answer(running):
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        received = exchange(running.address, data)
        assert received.startswith(b"HTTP/1.1 400")
        assert b'"message":"this is not an HTTP/1.1 request"' in received


def test_keys(model):
    with serving(model, keys=("first-key", "second-key")) as running:
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic first-key"},
            {"Authorization": "Bearer"},
        ):
            response = httpx.get(f"{running.url}/v1/models", headers=header)
            assert error_of(response, 401)["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
        error_of(running.post("/v1/completions", {"prompt": "a"}, headers={"Authorization": b"Bearer \xe9"}), 401)
        error_of(httpx.get(f"{running.url}/metrics"), 401)
        error_of(httpx.get(f"{running.url}/nothing"), 401)
        assert httpx.get(f"{running.url}/healthz").status_code == 200
        assert httpx.get(f"{running.url}/").status_code == 200
        for key in ("first-key", "second-key"):
            with running.client(key) as client:
                assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.prompt_tokens == 1


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(model):
    """A server with one slot, one place to wait, and little patience."""
    limits = {"body_bytes": 10_000, "body_seconds": 2, "request_seconds": 4}
    with serving(model, slots=1, queue=1, **limits) as running:
        for also in ({}, {"logit_bias": LONG["logit_bias"]}):  # compiling takes longer than the server's patience
            while running.post("/v1/completions", {"prompt": "a", "max_tokens": 2} | also).status_code != 200:
                time.sleep(0.1)
        yield running


def test_bodies_that_are_too_long(strict):
    long = but(user="x" * 20_000)
    for content in (long, iter([long[:9000], long[9000:]])):  # announced, and in chunks of unknown number
        error = error_of(httpx.post(f"{strict.url}/v1/completions", content=content), 413)
        assert error["message"] == "the body is longer than 10000 bytes"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
    assert exchange(strict.address, head).startswith(b"HTTP/1.1 413")


def test_bodies_and_heads_that_do_not_arrive(strict):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    for data in (b"", b"POST /v1/comp", head, head + b'{"prompt": '):
        began = time.monotonic()
        received = exchange(strict.address, data)
        assert 0.3 < time.monotonic() - began < 10
        assert received.startswith(b"HTTP/1.1 408")
        assert b"did not arrive within 2 seconds" in received


def test_a_full_queue_and_an_answer_that_takes_too_long(strict):
    with contextlib.ExitStack() as stack:
        streams = []
        for state in ("active", "waiting"):
            asked = {"prompt": "a", "stream": True} | LONG
            streams.append(stack.enter_context(httpx.stream("POST", f"{strict.url}/v1/completions", json=asked)))
            strict.wait_for(f"bm_jax_engine_{state}", 1)
        response = strict.post("/v1/completions", {"prompt": "a"})
        assert error_of(response, 429)["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"
        for stream in streams:
            *_, last = [line for line in stream.iter_lines() if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_time"
    strict.wait_for("bm_jax_engine_waiting", 0)
    error = error_of(strict.post("/v1/completions", {"prompt": "a"} | LONG), 504)
    assert error["message"] == "the answer took longer than 4 seconds"
    strict.wait_for("bm_jax_engine_active", 0)
    with strict.client() as client, pytest.raises(openai.APIError, match=r"took longer than 4 seconds"):
        list(client.completions.create(model="tiny", prompt="a", stream=True, **LONG))
    assert strict.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(running, stream):
    cancelled = running.metric("bm_jax_engine_cancelled_total")
    body = json.dumps({"prompt": "a", "n": 6, "stream": stream} | LONG).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(running.address) as connection:
        connection.sendall(head + body)
        running.wait_for("bm_jax_engine_active", 4)
        running.wait_for("bm_jax_engine_waiting", 2)
    running.wait_for("bm_jax_engine_active", 0)
    running.wait_for("bm_jax_engine_waiting", 0)
    assert running.metric("bm_jax_engine_cancelled_total") == cancelled + 6


def test_connections_have_a_limit(model):
    with serving(model, connections=2) as running, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(socket.create_connection(running.address))
        time.sleep(0.2)
        assert exchange(running.address, b"").startswith(b"HTTP/1.1 503")


def test_a_failure_inside_tells_nothing_of_the_inside(running, monkeypatch, caplog):
    def fail(*_, **__):
        raise KeyError("the secret path")

    monkeypatch.setattr(running.engine, "submit", fail)
    response = running.post("/v1/completions", {"prompt": "a"})
    assert error_of(response, 500)["message"] == "something went wrong in the server; its log says more"
    monkeypatch.undo()
    assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200


def test_metrics(running):
    running.post("/v1/completions", {"prompt": "abc", "max_tokens": 2})
    running.post("/v1/completions", {"prompt": ""})
    httpx.get(f"{running.url}/v1/models/tiny", timeout=60)
    response = httpx.get(f"{running.url}/metrics", timeout=60)
    assert 'bm_jax_http_responses_total{code="200",path="/v1/models/{name:path}"}' in response.text
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'bm_jax_http_responses_total{code="200",path="/v1/completions"}' in response.text
    assert 'bm_jax_http_responses_total{code="400",path="/v1/completions"}' in response.text
    assert 'bm_jax_request_seconds_bucket{le="+Inf",path="/v1/completions"}' in response.text
    assert running.metric("bm_jax_first_token_seconds_count") > 0
    assert running.metric("bm_jax_engine_slots") == 4
    assert running.metric("bm_jax_engine_generated_tokens_total") > 0


@pytest.mark.slow
def test_many_clients_get_what_they_get_alone(running):
    """The load test, short; it ends in an error when an answer differs."""
    command = [sys.executable, str(ROOT / "benchmarks" / "serve_load.py"), "--url", running.url]
    command += ["--clients", "20", "--seconds", "3", "--pool", "16"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "0 errors" in done.stdout
    assert "mismatches: 0 of" in done.stdout


def test_many_keys_are_read_at_once(running):
    """Finding a key that is there twice does not take longer than reading the body."""
    body = b"{" + b",".join(b'"k%d":1' % i for i in range(200_000)) + b',"k1":2}'
    began = time.monotonic()
    assert '"k1" twice' in error_of(running.post("/v1/completions", body), 400)["message"]
    assert time.monotonic() - began < 30


def test_more_than_may_wait_is_no_matter_of_trying_again(strict):
    error = error_of(strict.post("/v1/completions", {"prompt": "a", "n": 2, "max_tokens": 1}), 400)
    assert error["message"] == "2 completions are more than the 1 that may wait here"


def test_a_page_of_another_site_is_refused(running):
    for origin, status in (("http://evil.example", 403), ("null", 403), (running.url, 200)):
        response = httpx.get(f"{running.url}/v1/models", headers={"Origin": origin}, timeout=60)
        assert response.status_code == status
        if status == 403:
            assert error_of(response, 403)["code"] == "origin"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("", 403),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("127.0.0.2", 200),
    ],
)
def test_a_name_that_is_not_this_machine_s_is_refused(running, host, status):
    response = httpx.get(f"{running.url}/v1/models", headers={"Host": host}, timeout=60)
    if status == 403:
        assert error_of(response, 403)["code"] == "host"
    else:
        assert response.status_code == status


def test_a_refused_request_is_not_waited_for(running):
    began = time.monotonic()
    received = exchange(running.address, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
    assert received.startswith(b"HTTP/1.1 403")
    assert time.monotonic() - began < 10


def test_a_client_that_does_not_read_is_cut_off(strict):
    """Answers that are asked for again and again and never read: the connection ends with the time for a request."""
    with socket.create_connection(strict.address, timeout=60) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(ConnectionError, TimeoutError):
            for _ in range(2000):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
        end = time.monotonic() + 60
        while strict.server.server_state.connections and time.monotonic() < end:
            time.sleep(0.1)
        assert not strict.server.server_state.connections


def test_half_a_body_does_not_hold_up_the_end(model):
    with serving(model, shutdown_seconds=0) as running, socket.create_connection(running.address, timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        running.wait_for("bm_jax_engine_active", 0)
        began = time.monotonic()
        running.server.should_exit = True
        while connection.recv(1000):
            pass
        assert time.monotonic() - began < 8


# --- the end, and the command ----------------------------------------------------------------------------------------


def test_what_runs_may_finish_and_then_ends_with_an_error(model):
    with serving(model, shutdown_seconds=5) as running, httpx.Client(timeout=60) as client:
        for also in ({}, {"logit_bias": LONG["logit_bias"]}):  # compiled
            assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 2} | also).status_code == 200
        results = {}

        def ask(name, values):
            results[name] = running.post("/v1/completions", values)

        asked = {"short": {"prompt": "a", "max_tokens": 60, "seed": 1}, "long": {"prompt": "a"} | LONG}
        threads = [threading.Thread(target=ask, args=item) for item in asked.items()]
        with client.stream("POST", f"{running.url}/v1/completions", json={"prompt": "a", "stream": True} | LONG) as stream:
            for thread in threads:
                thread.start()
            running.wait_for("bm_jax_engine_requests_total", 5)
            running.server.should_exit = True
            *_, last = [line for line in stream.iter_lines() if line]
        for thread in threads:
            thread.join()
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert error_of(results["long"], 503)["code"] == "shutting_down"
        (expected,) = model.generate("a", max_tokens=60, seed=1)
        assert results["short"].json()["choices"][0]["text"] == expected.text
        with pytest.raises(httpx.ConnectError):
            httpx.get(running.url)


@pytest.fixture(scope="module")
def simple() -> LanguageModel:
    """A model that is quickly compiled."""
    return tiny_model(tiny_config(("mlp",), repeats=1))


@pytest.fixture(scope="module")
def saved(simple, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    simple.save(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def test_the_command_serves_until_it_is_told_to_stop(saved, simple, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "bm_jax.serve", str(saved), "--port", "0", "--host", "0.0.0.0"]
    with (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        with process:
            try:
                line = process.stdout.readline()
                assert line.startswith("serving tiny at http://0.0.0.0:"), (tmp_path / "errors").read_text()
                url = f"http://127.0.0.1:{line.rsplit(':')[-1].strip()}"
                with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                    asked = {"max_tokens": 600, "seed": 4, "logit_bias": {"256": -100}}
                    messages = [{"role": "user", "content": "Hello"}]
                    pieces = client.chat.completions.create(model="tiny", messages=messages, stream=True, **asked)
                    next(pieces)
                    process.send_signal(signal.SIGTERM)
                    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
                (expected,) = simple.generate("user: Hello\nassistant:", max_tokens=600, seed=4, logit_bias={256: -100.0})
                assert text == expected.text
                assert process.wait(30) == 0
            finally:
                process.kill()
        errors.seek(0)
        assert errors.read() == (
            "WARNING: this server is open to everyone who can reach this machine, without an API key. "
            "Set BM_JAX_API_KEY, or listen on 127.0.0.1.\n"
        )


def test_the_command_says_what_is_wrong(saved, tmp_path, capsys, monkeypatch):
    def refused(*arguments) -> str:
        assert serve.main(list(arguments)) == 1
        out, error = capsys.readouterr()
        assert out == ""
        assert error.count("\n") == 1
        return error

    assert "neither a model nor a run directory" in refused(str(tmp_path / "none"), "--port", "0")
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in refused(str(saved), "--port", str(port))
    assert "cannot listen on nowhere.invalid" in refused(str(saved), "--host", "nowhere.invalid")
    assert "--port must be from 0 to 65535" in refused(str(saved), "--port", "65536")
    assert "an API key must be printable ASCII" in refused(str(saved), "--port", "0", "--api-key", "a b")
    assert "Limits.body_bytes must be greater than 0, got 0" in refused(str(saved), "--body-bytes", "0")
    for name in ("starlette", "starlette.applications", "bm_jax.server.http_server", "bm_jax.server.app"):
        monkeypatch.setitem(sys.modules, name, None) if name == "starlette" else monkeypatch.delitem(sys.modules, name, False)
    assert "pip install 'blackmamba-jax[serve]'" in refused(str(saved), "--port", "0")


def test_the_package_needs_no_web_framework():
    source = (
        "import sys, bm_jax; from bm_jax import serve, engine, language_model\n"
        "assert not {'starlette', 'uvicorn', 'prometheus_client', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], env=ENVIRONMENT, cwd=ROOT, check=True, timeout=300)
