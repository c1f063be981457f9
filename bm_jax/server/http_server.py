"""Uvicorn, made ready for strangers: time limits for what arrives, JSON for its own errors, an orderly end.

Needs uvicorn (the `serve` extra).
"""

from __future__ import annotations

import asyncio
import socket
import time

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bm_jax.server.app import Service
from bm_jax.server.openai_answers import dump
from bm_jax.server.request_fields import ApiError, Limits

KEEP_ALIVE = 30
"""Seconds that a connection stays open for a next request."""


class Protocol(H11Protocol):
    """One connection. A request's head must arrive in time, as must its body (`gate.receive_body`)."""

    limits = Limits()
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiError(503, "too many connections; try again later", code="connections"))
        else:
            self._keep_time()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._keep_time()

    def pause_writing(self) -> None:
        """More waits to be read than the buffers hold: the client gets the time of a request to read some of it."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.request_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not an HTTP/1.1 request"))

    def _waits(self) -> bool:
        """Whether a request's head is what should arrive next."""
        return self.cycle is None or self.cycle.response_complete

    def _keep_time(self) -> None:
        if not self._waits():
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.limits.body_seconds, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._waits() and not self.transport.is_closing():
            message = f"the request did not arrive within {self.limits.body_seconds:g} seconds"
            self._refuse(ApiError(408, message, code="head_time"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, where HTTP still allows it, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = dump(error.body)
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            reason = h11.Response(status_code=error.status, headers=headers)
            for event in (reason, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """Serves until it is told to stop: by SIGINT, SIGTERM or `should_exit`."""

    def __init__(self, service: Service) -> None:
        limits = service.limits
        protocol = type("LimitedProtocol", (Protocol,), {"limits": limits})
        backstop = int(limits.shutdown_seconds) + 10  # the service ends what runs before
        config = uvicorn.Config(
            service.app(),
            http=protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=backstop,
        )
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening; let running requests finish within the limit, a second SIGINT cutting it short."""
        closing = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        await closing

    async def _end(self) -> None:
        """End what runs, and then the connections that are still open: half a body, an answer that nobody reads."""
        await self._service.close(lambda: self.force_exit)
        end = time.monotonic() + 1
        while self.server_state.connections and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening, so that a port that is taken is known at once.

    Raises:
        OSError: the address cannot be had; the message names it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"cannot listen on {host}: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return bound
