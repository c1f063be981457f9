"""What surrounds the paths of the server: the key, the reading of bodies, errors as JSON, what is counted."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bm_jax.server.jobs import INTERNAL, Gone
from bm_jax.server.metrics import Metrics
from bm_jax.server.openai_answers import dump
from bm_jax.server.request_fields import ApiError, Limits

OPEN_PATHS = ("/", "/healthz")
"""What needs no key."""


async def receive_body(headers: Headers, receive: Receive, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is too long, as announced or as it comes, or takes too long to arrive. The connection then ends.
    """
    end = {"Connection": "close"}
    too_long = ApiError(413, f"the body is longer than {limits.body_bytes} bytes", code="body_too_long", headers=end)
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.body_bytes:
        raise too_long
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(limits.body_seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > limits.body_bytes:
                    raise too_long
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} seconds"
        raise ApiError(408, message, code="body_time", headers=end) from None
    return bytes(body)


class Gate:
    """Around the application: asks for the key, adds headers to every response, counts responses and their time."""

    def __init__(self, app: ASGIApp, allows: Callable[[str], bool], metrics: Metrics, *, only_local: bool = False) -> None:
        self._app, self._allows, self._metrics, self._only_local = app, allows, metrics, only_local

    @staticmethod
    def _from_elsewhere(headers: Headers) -> bool:
        """Whether a browser says that a page of another site asks."""
        origin = headers.get("origin")
        return origin is not None and origin.partition("://")[2] != headers.get("host")

    @staticmethod
    def _is_local(headers: Headers) -> bool:
        """Whether the name that the server was asked by is one of this machine's own."""
        name = headers.get("host", "localhost").lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        try:
            return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        """Why a request gets no answer. Its body is not read, so the connection ends."""
        end = {"Connection": "close"}
        if self._from_elsewhere(headers):
            return ApiError(403, "a page of another site may not use this server", code="origin", headers=end)
        if self._only_local and not self._is_local(headers):
            message = "this server answers to localhost and 127.0.0.1 alone; give it an API key to reach it by another name"
            return ApiError(403, message, code="host", headers=end)
        if path in OPEN_PATHS or self._allows(headers.get("authorization", "")):
            return None
        message = "this server needs an API key: send the header 'Authorization: Bearer KEY'"
        return ApiError(401, message, code="invalid_api_key", headers=end | {"WWW-Authenticate": "Bearer"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        refused = self._refusal(Headers(scope=scope), scope["path"])
        try:
            await (error_response(refused) if refused else self._app)(scope, receive, counted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.responses.labels(path, status or "gone").inc()
            self._metrics.latency.labels(path).observe(time.perf_counter() - began)


def json_response(values: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(dump(values), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """What a client gets instead of an answer."""
    return json_response(error.body, error.status, error.headers)


async def answer_error(request: Request, error: ApiError) -> Response:
    """What the paths refuse."""
    return error_response(error)


async def answer_http_error(request: Request, error: HTTPException) -> Response:
    """What Starlette itself refuses: unknown paths and methods."""
    what = {404: "there is nothing at this path", 405: f"this path does not take {request.method[:20]}"}
    message = what.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def answer_failure(request: Request, error: Exception) -> Response:
    """A mistake of the server: Starlette raises it again for the log."""
    return error_response(ApiError(500, INTERNAL))
