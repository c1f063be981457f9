"""The web application: one model, its paths, and the answers to requests, whole or in streams.

Needs starlette and prometheus_client (the `serve` extra).
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import importlib.resources
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bm_jax.engine import Closed, Engine, Event, QueueFull
from bm_jax.server.chat_template import ChatTemplate
from bm_jax.server.gate import Gate, answer_error, answer_failure, answer_http_error, json_response, receive_body
from bm_jax.server.jobs import Gone, Job, stopping
from bm_jax.server.metrics import Metrics
from bm_jax.server.openai_answers import Answer, server_sent
from bm_jax.server.openai_api import Generation, Served, read_chat, read_completion
from bm_jax.server.request_fields import ApiError, Limits


class Service:
    """One model, served.

    Args:
        engine: running.
        name: of the model, as clients ask for it.
        api_keys: clients must show one of them; none for a server that is open to all who reach it.
        chat: the model's chat template, if it has one.
        local: it listens on this machine alone; without keys it then answers to no other name than the machine's own, which a
            page of another site could give to this address (DNS rebinding).
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        limits: Limits | None = None,
        api_keys: Sequence[str] = (),
        chat: ChatTemplate | None = None,
        local: bool = False,
    ) -> None:
        model = engine.model
        self.engine, self.limits = engine, limits or Limits()
        self.served = Served(name, model.tokenizer.vocab_size, engine.room or None, self.limits, chat)
        self.metrics = Metrics(lambda: engine.statistics)
        self.closing = False
        self._jobs: set[Job] = set()
        self._created = int(time.time())
        self._keys = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        self._local = local
        self._page, self._policy = _load_page()

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/", self._show_page),
            Route("/healthz", self._health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/completions", Endpoint(self, read_completion), methods=["POST"]),
            Route("/v1/chat/completions", Endpoint(self, read_chat), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {ApiError: answer_error, HTTPException: answer_http_error, Exception: answer_failure}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Gate(app, self.allows, self.metrics, only_local=self._local and not self._keys)

    def allows(self, authorization: str) -> bool:
        """Whether an Authorization header shows one of the keys, in a time that does not tell how much of it is right."""
        scheme, _, key = authorization.partition(" ")
        shown = hashlib.sha256(key.strip().encode("latin-1")).digest()
        right = [hmac.compare_digest(shown, known) for known in self._keys]
        return not self._keys or (any(right) and scheme.lower() == "bearer")

    def begin(self, read: Callable[[bytes, Served], Generation], body: bytes, address: str, loop: Any) -> Job:
        """Check a request and start it; for a thread, because long prompts take a while to encode."""
        generation = read(body, self.served)
        asked = len(generation.prompts) * generation.n
        if asked > self.engine.queue_bound:
            message = f"{asked} completions are more than the {self.engine.queue_bound} that may wait here"
            raise ApiError(400, message, param="n")
        ids = []
        for row, prompt in enumerate(generation.prompts):
            where = "messages" if generation.chat else "prompt" if len(generation.prompts) == 1 else f"prompt[{row}]"
            try:
                ids.append(tuple(self.engine.model.encode(prompt, where, generation.options.max_tokens)))
            except ValueError as error:
                raise ApiError(400, str(error)[:500], param=where) from None
            if len(ids[-1]) > self.limits.prompt_tokens:
                message = f"{where} has {len(ids[-1])} tokens, more than the {self.limits.prompt_tokens} allowed"
                raise ApiError(400, message, param=where)
        job = Job(dataclasses.replace(generation, prompts=tuple(ids)), loop)
        try:
            job.submit(self.engine, generation.user or address)
        except QueueFull:
            message = "too many requests are waiting; try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"}) from None
        except Closed:
            raise stopping() from None
        except ValueError as error:
            raise ApiError(400, str(error)[:500]) from None
        return job

    @contextmanager
    def running(self, job: Job) -> Iterator[None]:
        """Keep the time of a job, and leave nothing of it in the engine."""
        loop, seconds = asyncio.get_running_loop(), self.limits.request_seconds
        late = ApiError(504, f"the answer took longer than {seconds:g} seconds", code="request_time")
        timer = loop.call_later(seconds, job.stop, late)
        self._jobs.add(job)
        try:
            yield
        finally:
            self._jobs.discard(job)
            timer.cancel()
            job.cancel()

    async def close(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuse what comes from now on, let what runs finish within the time for it, then end it with an error.

        `hurry` is asked now and then, and cuts the time short.
        """
        self.closing = True
        end = time.monotonic() + self.limits.shutdown_seconds
        while self._jobs and time.monotonic() < end and not hurry():
            await asyncio.sleep(0.02)
        for job in list(self._jobs):
            job.stop(stopping())
        await asyncio.to_thread(self.engine.close, 0)

    async def _show_page(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html", headers={"Content-Security-Policy": self._policy})

    async def _health(self, request: Request) -> Response:
        if self.closing:
            raise stopping()
        return json_response({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _describe(self) -> dict[str, Any]:
        return {"id": self.served.name, "object": "model", "created": self._created, "owned_by": "bm_jax"}

    async def _list_models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._describe()]})

    async def _show_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.served.name:
            raise ApiError(404, f"there is no such model here, only {self.served.name}", param="model", code="model_not_found")
        return json_response(self._describe())


class Endpoint:
    """A path that completes text: reads the body, runs the job, answers as a whole or in a stream."""

    def __init__(self, service: Service, read: Callable[[bytes, Served], Generation]) -> None:
        self._service, self._read = service, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        if self._service.closing:
            raise stopping()
        try:
            body = await receive_body(Headers(scope=scope), receive, self._service.limits)
            address = (scope.get("client") or ("",))[0]
            job = await asyncio.to_thread(self._service.begin, self._read, body, address, asyncio.get_running_loop())
            with self._service.running(job):
                watch = asyncio.create_task(job.watch(receive))
                try:
                    await self._write(job, self._timed(job, began), scope, receive, send)
                finally:
                    watch.cancel()
        except Gone:
            pass

    async def _write(
        self, job: Job, events: AsyncIterator[list[tuple[int, Event]]], scope: Scope, receive: Receive, send: Send
    ) -> None:
        answer = self._answer(job)
        if job.generation.stream:
            return await _send_stream(answer, events, send)
        completions = {i: event.completion async for news in events for i, event in news if event.completion is not None}
        # In a thread: with many tokens and alternatives it takes a while, and others are waiting.
        write = lambda: json_response(answer.whole([completions[index] for index in range(len(completions))]))  # noqa: E731
        await (await asyncio.to_thread(write))(scope, receive, send)

    def _answer(self, job: Job) -> Answer:
        return Answer(job.generation, self._service.served.name, self._service.engine.model.tokenizer)

    async def _timed(self, job: Job, began: float) -> AsyncIterator[list[tuple[int, Event]]]:
        first = True
        async for news in job.events():
            if first and any(event.tokens for _, event in news):
                self._service.metrics.first_token.observe(time.perf_counter() - began)
                first = False
            yield news


async def _send_stream(answer: Answer, events: AsyncIterator[list[tuple[int, Event]]], send: Send) -> None:
    """Send server-sent events; an error that comes too late for a status is the last of them."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
    headers.append((b"x-accel-buffering", b"no"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    tokens = 0

    async def write(data: bytes, more: bool = True) -> None:
        if data or not more:
            await send({"type": "http.response.body", "body": data, "more_body": more})

    try:
        await write(b"".join(answer.opening()))
        async for news in events:
            tokens += sum(len(event.tokens) for _, event in news)
            pieces = [answer.piece(i, event.text, event.tokens, event.logprobs, event.completion) for i, event in news]
            await write(b"".join(pieces))
        last = answer.closing(tokens)
    except ApiError as error:
        last = server_sent(error.body)
    await write(last, more=False)


def _load_page() -> tuple[bytes, str]:
    """The page, and the policy that lets nothing but its own style and script run or load."""
    page = importlib.resources.files("bm_jax.server").joinpath("page.html").read_text(encoding="utf-8")
    digests = {}
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy
