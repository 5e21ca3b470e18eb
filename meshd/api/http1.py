"""HTTP/1.1 for an ASGI application on trio, over h11. Small, because each way to wait in it has a bound.

    accept → (TLS) → request head ≤ 10 s → app reads the body, pulling → response, each piece taken within 30 s → next

Hypercorn was tried first: it shields its writes, so that one client who stops reading
outlives every deadline including the agent's own stop, and it answers
`Expect: 100-continue` before anybody has looked at the size. Here the application pulls
the body, a refused upload is never read on, and whoever is stuck is dropped alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import h11
import structlog
import trio

log = structlog.get_logger()

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

HEAD_BYTES_MAX = 32 << 10
"""Request line and headers."""
HEAD_S = 10.0
"""From the first byte of a request, or from the accept, to the end of its head: a person on a bad line needs less."""
KEEP_ALIVE_S = 60.0
"""Between two requests of one connection."""
STALL_S = 30.0
"""In which a client sends the next bytes of a body, or takes the next piece of an answer."""
LINGER_S = 2.0
"""After an answer that came before the whole body: read on, so that the client gets to see the answer, not a reset."""
PIECE_BYTES = 64 << 10
EARLY_BYTES_MAX = 64 << 10
"""Of next requests while an answer is under way. Who sends more is taken for gone: unread, nobody would see them leave."""


class Aborted(Exception):
    """An answer that has begun cannot be completed: the connection is cut, so that the client sees that it lacks the end."""


class Stalled(Aborted):
    """The client is gone, or too slow to be waited for."""


class Connection:
    """One client's requests, one after the other. `scope` is what every request of it carries besides its own."""

    def __init__(self, app: App, stream: trio.abc.HalfCloseableStream | trio.SSLStream[Any], scope: Message) -> None:
        self._app = app
        self._stream = stream
        self._scope = scope
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        self._stopping = False
        self._waiting: trio.CancelScope | None = None

    def stop(self) -> None:
        """After the request that is being answered, if any, no other."""
        self._stopping = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def serve(self) -> None:
        """Returns when the connection is over; the stream is closed. Raises nothing but cancellation."""
        try:
            patience_s = HEAD_S
            while not self._stopping:
                request = await self._next_request(patience_s)
                if request is None or not await self._answer(request):
                    break
                self._http.start_next_cycle()
                patience_s = KEEP_ALIVE_S
        except (Aborted, trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
            pass  # nobody is there to be told
        finally:
            await self._close()

    async def _next_request(self, patience_s: float) -> h11.Request | None:
        head_ends = trio.current_time() + HEAD_S
        with trio.move_on_after(patience_s) as self._waiting:
            while True:
                try:
                    event = self._http.next_event()
                except h11.RemoteProtocolError as error:
                    await self._refuse(error.error_status_hint)
                    return None
                if isinstance(event, h11.Request):
                    self._waiting = None
                    return event
                if event is not h11.NEED_DATA:
                    return None
                data = await self._stream.receive_some(PIECE_BYTES)
                if patience_s != HEAD_S and not self._http.trailing_data[0]:
                    # a later request has begun: from here it has as long as a first one
                    head_ends = trio.current_time() + HEAD_S
                self._waiting.deadline = min(self._waiting.deadline, head_ends) if data else self._waiting.deadline
                self._http.receive_data(bytes(data))
        return None

    async def _answer(self, request: h11.Request) -> bool:
        """Run the application once. True when another request may follow on this connection."""
        exchange = _Exchange(self._http, self._stream, is_head=request.method == b"HEAD")
        try:
            await self._app(self._request_scope(request), exchange.receive, exchange.send)
        except (Aborted, trio.BrokenResourceError, trio.ClosedResourceError, h11.LocalProtocolError):
            raise
        except Exception:
            # One request must not sink the node. Starlette has answered 500 where nothing had been sent.
            log.exception("api.request_failed", method=request.method.decode(), path=request.target.decode()[:200])
        if not exchange.has_ended:
            return False
        while self._http.their_state is h11.SEND_BODY and self._http.next_event() is not h11.NEED_DATA:
            pass  # an application that wants no body leaves its end unread
        if self._http.their_state is h11.SEND_BODY:
            await self._linger()
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    def _request_scope(self, request: h11.Request) -> Message:
        raw_path, _, query = request.target.partition(b"?")
        return {
            **self._scope,
            "type": "http",
            # 2.3: an application that streams listens for the disconnect by itself
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.http_version.decode(),
            "method": request.method.decode(),
            "path": unquote(raw_path.decode("ascii")),
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": [(bytes(name), bytes(value)) for name, value in request.headers],
        }

    async def _refuse(self, status: int) -> None:
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = h11.Response(status_code=status, headers=[("content-length", "0"), ("connection", "close")])
            data = (self._http.send(head) or b"") + (self._http.send(h11.EndOfMessage()) or b"")
            with trio.move_on_after(LINGER_S):
                await self._stream.send_all(data)

    async def _linger(self) -> None:
        with trio.move_on_after(LINGER_S):
            if not isinstance(self._stream, trio.SSLStream):
                await self._stream.send_eof()
            while await self._stream.receive_some(PIECE_BYTES):
                pass

    async def _close(self) -> None:
        with trio.move_on_after(LINGER_S, shield=True) as patience:
            if self._http.our_state is h11.ERROR:
                patience.cancel()  # no farewell for a client that is not there
            await self._stream.aclose()


class _Exchange:
    """The application's two callables for one request."""

    def __init__(self, http: h11.Connection, stream: Any, *, is_head: bool) -> None:
        self._http = http
        self._is_head = is_head
        self._stream = stream
        self._is_body_over = False
        self._head = b""
        self.has_ended = False

    async def receive(self) -> Message:
        """Never raises: a client that is gone, stalls or breaks the protocol is one that disconnected."""
        if self._is_body_over:
            await self._wait_for_disconnect()
            return {"type": "http.disconnect"}
        try:
            with trio.fail_after(STALL_S):
                return await self._next_piece()
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            return {"type": "http.disconnect"}

    async def _next_piece(self) -> Message:
        while True:
            if self._http.they_are_waiting_for_100_continue:
                # Only now: an application that refuses by the headers is never sent the body.
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await self._stream.send_all(self._http.send(go_on) or b"")
            event = self._http.next_event()
            if isinstance(event, h11.Data):
                return {"type": "http.request", "body": bytes(event.data), "more_body": True}
            if isinstance(event, h11.EndOfMessage):
                self._is_body_over = True
                return {"type": "http.request", "body": b"", "more_body": False}
            if event is not h11.NEED_DATA:
                return {"type": "http.disconnect"}
            self._http.receive_data(bytes(await self._stream.receive_some(PIECE_BYTES)))

    async def _wait_for_disconnect(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            early_bytes = 0
            while early_bytes <= EARLY_BYTES_MAX and (data := await self._stream.receive_some(PIECE_BYTES)):
                # The next requests. They wait here until this answer is over.
                self._http.receive_data(bytes(data))
                early_bytes += len(data)

    async def send(self, message: Message) -> None:
        match message["type"]:
            case "http.response.start":
                headers = list(message.get("headers", ()))
                self._head = self._http.send(h11.Response(status_code=message["status"], headers=headers)) or b""
                if not any(name == b"content-length" for name, _ in headers):
                    # A stream's first bytes may be long in coming; an answer of known length goes out in one piece.
                    await self._write(b"")
            case "http.response.body":
                body: bytes = message.get("body", b"")
                if body and not self._is_head:
                    await self._write(self._http.send(h11.Data(data=body)) or b"")
                if not message.get("more_body", False):
                    await self._write(self._http.send(h11.EndOfMessage()) or b"")
                    self.has_ended = True

    async def _write(self, data: bytes) -> None:
        view = memoryview(self._head + data)
        self._head = b""
        for start in range(0, len(view), PIECE_BYTES):
            with trio.move_on_after(STALL_S) as patience:
                await self._stream.send_all(view[start : start + PIECE_BYTES])
            if patience.cancelled_caught:
                raise Stalled
