"""Answers that take their time: bytes as they come, and server-sent events with a sign of life."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from typing import Any

import msgspec
import trio
from starlette.types import Receive, Scope, Send

from meshd.api.http1 import Aborted
from meshd.errors import MeshError

HEARTBEAT_S = 15.0
"""Between two signs of life: well under the minute after which middleboxes forget a connection."""

GONE = (Aborted, trio.BrokenResourceError, trio.ClosedResourceError)
"""How a write or a read tells that the client is not there any more."""


class ByteStream:
    """The bytes of an iterator. An error before the first of them is an ordinary error answer, a later one cuts off."""

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        media_type: str = "application/octet-stream",
        *,
        size: int | None = None,
    ) -> None:
        self._source = source
        self._headers = [(b"content-type", media_type.encode())]
        if size is not None:
            self._headers.append((b"content-length", str(size).encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure: Exception | None = None
        has_begun = False
        async with aclosing(self._source) as source, trio.open_nursery() as nursery:
            # From the first moment: who waits for a task to say something may leave before it does.
            nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)
            try:
                # Before this chunk nothing is sent, so a NotFound still becomes a 404.
                chunk = await anext(source, None)
                has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self._headers})
                while chunk is not None:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    chunk = await anext(source, None)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except (MeshError, *GONE) as error:
                # Carried out by hand: a nursery would wrap it in a group.
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            if not has_begun:
                raise failure
            raise Aborted(str(failure)) from failure


class EventStream:
    """Server-sent events of one or more sources. An error ends it with an event `error` that carries it as JSON."""

    def __init__(self, *sources: AsyncGenerator[bytes, None], farewell: bytes = b"") -> None:
        """Sources yield whole events, as `format_event` makes them; `farewell` is sent when all have ended."""
        self._sources = sources
        self._farewell = farewell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        one_at_a_time = trio.Lock()

        async def write(data: bytes) -> None:
            async with one_at_a_time:
                await send({"type": "http.response.body", "body": data, "more_body": True})

        async def show_life() -> None:
            while True:
                await trio.sleep(HEARTBEAT_S)
                await write(b": still here\n\n")

        async def forward(source: AsyncGenerator[bytes, None]) -> None:
            async with aclosing(source):
                async for event in source:
                    await write(event)

        async def forward_all() -> None:
            try:
                with collapse():
                    async with trio.open_nursery() as forwarding:
                        for source in self._sources:
                            forwarding.start_soon(forward, source)
                last = self._farewell
            except MeshError as error:
                last = format_event("error", error_body(error)["error"])
            await send({"type": "http.response.body", "body": last, "more_body": False})

        async def until_gone(work: Callable[[], Awaitable[None]]) -> None:
            with suppress(*GONE):
                await work()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)
            nursery.start_soon(until_gone, show_life)
            nursery.start_soon(until_gone, forward_all)


@contextmanager
def collapse() -> Iterator[None]:
    """What several tasks raised together as the first of it: here they all say that the one answer cannot go on."""
    try:
        yield
    except BaseExceptionGroup as group:
        expected, others = group.split((MeshError, *GONE))
        if others is not None or expected is None:
            raise
        first: BaseException = expected
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


def format_event(kind: str, data: object, position: int | None = None) -> bytes:
    """One server-sent event; `data` becomes one line of JSON."""
    head = f"id: {position}\n" if position is not None else ""
    return f"{head}event: {kind}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


def error_body(error: MeshError) -> Mapping[str, Mapping[str, Any]]:
    return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}


async def _cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    with suppress(*GONE):
        while (await receive())["type"] != "http.disconnect":
            pass
    scope.cancel()
