"""From an HTTP request to the engine and back.

A request becomes a `Job`: its completions run in the engine, whose thread posts their events to the job's queue. The
engine is told to cancel in one way whatever the reason, `Job.stop`: the client is gone, the time is over, the server
stops.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from bm_jax.engine import Engine, Event, Request
from bm_jax.server.openai_api import Generation
from bm_jax.server.request_fields import ApiError

logger = logging.getLogger("bm_jax.serve")
INTERNAL = "something went wrong in the server; its log says more"


class Gone(Exception):
    """The client has closed its connection."""


class Job:
    """The completions of one HTTP request, running in the engine.

    Args:
        loop: the loop that reads `events`.
    """

    def __init__(self, generation: Generation, loop: asyncio.AbstractEventLoop) -> None:
        self.generation = generation
        self.requests: list[Request] = []
        self._loop = loop
        self._queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._stopped: Exception | None = None

    def submit(self, engine: Engine, client: str) -> None:
        """Hand every completion to the engine, or none. Encodes text, so it belongs in a thread."""
        try:
            for index, (prompt, config) in enumerate(self.generation.requests()):
                self.requests.append(engine.submit(prompt, config, partial(self._deliver, index), client=client))
        except BaseException:
            self.cancel()
            raise

    def _deliver(self, index: int, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    def cancel(self) -> None:
        """Have the engine forget what still runs."""
        for request in self.requests:
            request.cancel()

    def stop(self, reason: Exception) -> None:
        """End `events` with this, at once, and cancel."""
        if self._stopped is None:
            self._stopped = reason
            self._queue.put_nowait(None)
            self.cancel()

    async def watch(self, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
        """Stop when the client is gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.stop(Gone())

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Every choice's events, all that have come since the last time, until all choices are complete.

        Raises:
            Gone: nobody waits for them any more.
            ApiError: the time is over, the server stops, or the engine failed.
        """
        left = len(self.requests)
        while left:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            if self._stopped is not None:
                raise self._stopped
            news = [item for item in items if item is not None]
            for _, event in news:
                if event.error is not None:
                    logger.error("a completion failed", exc_info=event.error)
                    raise ApiError(500, INTERNAL)
                if event.completion is not None:
                    left -= 1
                    if event.completion.finish_reason == "cancelled":
                        raise stopping()
            yield news


def stopping() -> ApiError:
    """The error while the server shuts down."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})
