"""Calls to peers: many requests and answers share one long-lived stream per direction and peer.

    caller                                   answerer
      ── greeting ─────────────────────────────▶  admit(peer, greeting)?
      ◀───────────────────────── greeting, or error ──
      ── [id, method, timeout_ms, body] ───────▶  a task each, at most CALLS_MAX
      ◀────────────────────── [id, is_ok, body] ──

Frames are a 4-byte length and msgpack. A frame costs the transport about 0.3 ms of CPU whatever its size, so
one task per stream writes all that is pending at once. Id 0 is the greeting first and a ping after that: a
peer that is stopped, or behind a dead wire, keeps its connections open for ever, and only its silence tells.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import structlog
import trio
from msgspec import Meta, Struct

from meshd import codec
from meshd.errors import (
    Busy,
    InvalidRequest,
    MeshError,
    NotFound,
    PeerFault,
    TooLarge,
    Unavailable,
    UnknownOutcome,
    from_code,
)
from meshd.model import NodeId
from meshd.ports import Stream, Transport

PROTOCOL = "/meshd/rpc/1"

CALLS_MAX = 1024
"""Calls in flight per peer and direction. Far above what 2 cores can answer in a second of patience."""

BODY_BYTES_MAX = codec.FRAME_BYTES_MAX - 1024
"""The frame adds id, method and lengths."""

OUTBOX_BYTES_MAX = 64 << 20
"""Bytes waiting for one peer: sixteen of the largest frames. A peer that lets more pile up does not read."""

WRITE_BYTES_MAX = 1 << 20
"""One write to the stream; it must go through in the transport's 30 s, also over 300 kbit/s."""

READ_BYTES_MAX = 256 << 10
"""One read from the stream: few reads for many small frames."""

GREETING_S = 10.0
"""For greeting and admission, which may ask the replicated state."""

PING_INTERVAL_S = 2.5
PING_MISSES_MAX = 3
"""Three silent intervals after the one in which the peer stopped: noticed after 7.5 to 10 s. Ticks are counted,
not time, so that a pause of this process is never taken for one of the peer."""

GREETING_ID = 0
PING_ID = 0


class Request(Struct, frozen=True, array_like=True, gc=False):
    id: Annotated[int, Meta(ge=0, le=2**53)]
    method: Annotated[str, Meta(max_length=128)]
    timeout_ms: Annotated[int, Meta(ge=0, le=2**40)]
    """How long the caller waits, so that the answerer does not work for nobody."""
    body: bytes


class Answer(Struct, frozen=True, array_like=True, gc=False):
    """Also the form of both greetings."""

    id: Annotated[int, Meta(ge=0, le=2**53)]
    is_ok: bool
    body: bytes
    """Of the method; or an encoded `Fault`."""


class Fault(Struct, frozen=True, array_like=True, gc=False):
    """A MeshError on its way."""

    code: str
    message: str
    hint: str


class _Malformed(PeerFault):
    """The peer's bytes are no frame or no message: its stream is over."""


T = TypeVar("T")
Handler = Callable[[NodeId, bytes], Awaitable[bytes]]
Greeting = Callable[[], bytes]
Admit = Callable[[NodeId, bytes], Awaitable[None]]


async def admit_anyone(_peer: NodeId, _greeting: bytes) -> None:
    """For tests, and where the transport's gate is enough."""


class StreamRpc:
    """ports.Rpc on any Transport.

    `greeting` makes the first bytes that this node says on each stream; `admit` judges the peer's and raises
    NotAllowed or Conflict, which is what every call that waits for that stream then raises, at both ends.
    """

    def __init__(self, transport: Transport, *, greeting: Greeting = lambda: b"", admit: Admit = admit_anyone) -> None:
        self._transport = transport
        self._greeting = greeting
        self._admit = admit
        self._handlers: dict[str, Handler] = {}
        self._calling: dict[NodeId, _Caller] = {}
        self._answering: dict[NodeId, trio.CancelScope] = {}
        self._rtt_ms: dict[NodeId, float] = {}
        self._counters: Counter[str] = Counter()
        self._work: trio.Nursery | None = None
        self._log = structlog.get_logger()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own every stream and call until cancelled; calls made outside of that raise Unavailable."""
        self._transport.handle(PROTOCOL, self._answer_stream)
        async with trio.open_nursery() as self._work:
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._work = None
                for caller in list(self._calling.values()):
                    caller.fail(Unavailable("this node is stopping"))

    def register(self, method: str, handler: Handler) -> None:
        assert method not in self._handlers, f"{method} has two handlers"
        self._handlers[method] = handler

    async def call(self, peer: NodeId, method: str, body: bytes, *, timeout_s: float) -> bytes:
        """See ports.Rpc. Cancelling leaves nothing behind here; the peer may still do it."""
        if len(body) > BODY_BYTES_MAX:
            raise TooLarge(f"{method} with {len(body)} bytes is over the limit of {BODY_BYTES_MAX}")
        caller = self._calling.get(peer)
        if caller is None:
            if self._work is None:
                raise Unavailable("this node is not running")
            caller = self._calling[peer] = _Caller(peer)
            self._work.start_soon(self._run_caller, caller)
        if len(caller.waiting) >= CALLS_MAX or caller.outbox.bytes_pending > OUTBOX_BYTES_MAX:
            self._counters["calls_busy"] += 1
            raise Busy(f"{len(caller.waiting)} calls to {peer} are in flight already")
        return await caller.call(method, body, timeout_s)

    def connected_rtt_ms(self, peer: NodeId) -> float | None:
        """The smoothed time of a ping, in milliseconds; None while no stream to the peer is open."""
        return self._rtt_ms.get(peer)

    def hears(self, peer: NodeId) -> bool:
        """Is a stream of calls from this peer open, and admitted?"""
        return peer in self._answering

    def close(self, peer: NodeId) -> None:
        """End the streams with the peer, both ways; the next call opens a new one and is greeted again."""
        if peer in self._calling:
            self._calling.pop(peer).fail(Unavailable(f"the stream to {peer} was closed"))
        if peer in self._answering:
            self._answering[peer].cancel()

    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    # --- our calls ---------------------------------------------------------------------------------------------------

    async def _run_caller(self, caller: _Caller) -> None:
        peer = caller.peer
        failure: MeshError = Unavailable(f"the stream to {peer} ended")
        try:
            with caller.scope:
                stream = await self._transport.open_stream(peer, PROTOCOL, timeout_s=GREETING_S)
                try:
                    await self._converse(caller, stream)
                finally:
                    await stream.aclose()
        except* _Malformed as group:
            self._counters["frames_malformed"] += 1
            failure = _first(group)
        except* MeshError as group:
            failure = _first(group)
        except* Exception as group:
            # `admit` tripped over a greeting: one odd peer must not sink the node.
            self._counters["streams_failed"] += 1
            self._log.exception("rpc.stream_failed", peer=peer)
            failure = PeerFault(f"the greeting of {peer} could not be judged: {group!r}")
        finally:
            self._rtt_ms.pop(peer, None)
            if self._calling.get(peer) is caller:
                del self._calling[peer]
            caller.fail(failure)

    async def _converse(self, caller: _Caller, stream: Stream) -> None:
        frames = _FrameReader(stream)
        greeted_at = trio.current_time()
        with trio.move_on_after(GREETING_S) as patience:
            await stream.write(_frame(Answer(GREETING_ID, True, self._greeting())))
            theirs = await frames.next()
            if theirs is None:
                raise Unavailable(f"{caller.peer} closed the stream without a greeting")
            greeting = _parse(theirs, Answer)
            if not greeting.is_ok:
                raise _fault(greeting.body)
            await self._admit(caller.peer, greeting.body)
        if patience.cancelled_caught:
            raise Unavailable(f"{caller.peer} did not greet within {GREETING_S:g} s")
        self._rtt_ms[caller.peer] = (trio.current_time() - greeted_at) * 1000
        async with trio.open_nursery() as tasks:
            tasks.start_soon(caller.outbox.write_to, stream)
            tasks.start_soon(self._keep_alive, caller.peer, frames, caller.outbox)
            while (frame := await frames.next()) is not None:
                answer = _parse(frame, Answer)
                if answer.id == PING_ID:
                    self._note_rtt(caller)
                else:
                    caller.answered(answer)
            tasks.cancel_scope.cancel()

    def _note_rtt(self, caller: _Caller) -> None:
        if caller.outbox.pinged_at is not None:
            rtt_ms = (trio.current_time() - caller.outbox.pinged_at) * 1000
            caller.outbox.pinged_at = None
            old_ms = self._rtt_ms.get(caller.peer, rtt_ms)
            self._rtt_ms[caller.peer] = old_ms + (rtt_ms - old_ms) / 4

    async def _keep_alive(self, peer: NodeId, frames: _FrameReader, pings: _Outbox | None) -> None:
        misses = 0
        while misses < PING_MISSES_MAX:
            frames.has_heard = False
            if pings is not None:
                pings.ping()
            await trio.sleep(PING_INTERVAL_S)
            misses = 0 if frames.has_heard else misses + 1
        self._counters["peers_silent"] += 1
        self._log.warning("peer.silent", peer=peer, seconds=PING_INTERVAL_S * PING_MISSES_MAX)
        await self._transport.drop(peer)
        raise Unavailable(f"{peer} has been silent for over {PING_INTERVAL_S * PING_MISSES_MAX:g} s")

    # --- their calls -------------------------------------------------------------------------------------------------

    async def _answer_stream(self, stream: Stream) -> None:
        peer = stream.peer
        frames = _FrameReader(stream)
        try:
            if not await self._is_admitted(stream, frames):
                return
            # The peer has one stream to us; if it opens another it has given up the older.
            if peer in self._answering:
                self._answering[peer].cancel()
            with trio.CancelScope() as scope:
                self._answering[peer] = scope
                try:
                    await self._answer_calls(stream, frames)
                finally:
                    if self._answering.get(peer) is scope:
                        del self._answering[peer]
        except* _Malformed as group:
            self._counters["frames_malformed"] += 1
            self._log.warning("rpc.malformed", peer=peer, error=str(_first(group)))
            raise
        except* Unavailable:
            pass  # lost or silent: its caller knows

    async def _is_admitted(self, stream: Stream, frames: _FrameReader) -> bool:
        with trio.move_on_after(GREETING_S) as patience:
            theirs = await frames.next()
            if theirs is None:
                return False
            greeting = _parse(theirs, Answer).body
            try:
                await self._admit(stream.peer, greeting)
            except MeshError as error:
                self._counters["peers_refused"] += 1
                self._log.info("peer.refused", peer=stream.peer, error=error.code, message=error.message)
                await stream.write(_frame(Answer(GREETING_ID, False, _faulted(error))))
                return False
            await stream.write(_frame(Answer(GREETING_ID, True, self._greeting())))
        return not patience.cancelled_caught

    async def _answer_calls(self, stream: Stream, frames: _FrameReader) -> None:
        outbox = _Outbox()
        in_flight = 0

        async def answer(request: Request) -> None:
            nonlocal in_flight
            try:
                outbox.put(_frame(await self._answer(stream.peer, request)))
            finally:
                in_flight -= 1

        async with trio.open_nursery() as tasks:
            tasks.start_soon(outbox.write_to, stream)
            tasks.start_soon(self._keep_alive, stream.peer, frames, None)
            while (frame := await frames.next()) is not None:
                request = _parse(frame, Request)
                if outbox.bytes_pending > OUTBOX_BYTES_MAX:
                    raise _Malformed(
                        f"{stream.peer} asks on, but leaves {outbox.bytes_pending} bytes of answers unread"
                    )
                if request.id == PING_ID:
                    outbox.put(_frame(Answer(PING_ID, True, b"")))
                elif in_flight >= CALLS_MAX:
                    self._counters["calls_refused"] += 1
                    busy = Busy(f"{in_flight} calls from {stream.peer} are in flight already")
                    outbox.put(_frame(Answer(request.id, False, _faulted(busy))))
                else:
                    in_flight += 1
                    tasks.start_soon(answer, request)
            tasks.cancel_scope.cancel()

    async def _answer(self, peer: NodeId, request: Request) -> Answer:
        method = request.method
        try:
            handler = self._handlers.get(method)
            if handler is None:
                raise NotFound(f"this node has no method {method!r}", hint="is it of another version?")
            with trio.move_on_after(request.timeout_ms / 1000) as patience:
                body = await handler(peer, request.body)
            if patience.cancelled_caught:
                raise UnknownOutcome(f"{method} took longer than the {request.timeout_ms} ms it was given")
            if len(body) > BODY_BYTES_MAX:
                raise TooLarge(f"the answer to {method} has {len(body)} bytes, over the limit of {BODY_BYTES_MAX}")
            return Answer(request.id, True, body)
        except MeshError as error:
            return Answer(request.id, False, _faulted(error))
        except Exception as error:
            # A method that trips over one request must not take the peer's other calls with it.
            self._counters["methods_failed"] += 1
            self._log.exception("rpc.method_failed", peer=peer, method=method)
            fault = PeerFault(f"{method} failed at {self._transport.me}: {type(error).__name__}")
            return Answer(request.id, False, _faulted(fault))


@dataclass(slots=True, eq=False)
class _Call:
    """One of ours, until it is answered."""

    done: trio.Event = field(default_factory=trio.Event)
    is_sent: bool = False
    is_given_up: bool = False
    answer: bytes | None = None
    failure: MeshError | None = None


class _Caller:
    """Our calls to one peer and the stream they share; lives as long as the stream."""

    def __init__(self, peer: NodeId) -> None:
        self.peer = peer
        self.scope = trio.CancelScope()
        self.outbox = _Outbox()
        self.waiting: dict[int, _Call] = {}
        self._ids = itertools.count(1)
        self._failure: MeshError | None = None

    async def call(self, method: str, body: bytes, timeout_s: float) -> bytes:
        if self._failure is not None:
            raise _copy(self._failure)
        call, call_id = _Call(), next(self._ids)
        self.waiting[call_id] = call
        self.outbox.put(_frame(Request(call_id, method, int(timeout_s * 1000), body)), call)
        try:
            with trio.move_on_after(timeout_s):
                await call.done.wait()
        finally:
            call.is_given_up = True
            self.waiting.pop(call_id, None)
        if call.failure is not None:
            raise call.failure
        if call.answer is not None:
            return call.answer
        if call.is_sent:
            raise UnknownOutcome(f"{self.peer} did not answer {method} within {timeout_s:g} s")
        raise Unavailable(f"{method} could not be sent to {self.peer} within {timeout_s:g} s")

    def answered(self, answer: Answer) -> None:
        call = self.waiting.get(answer.id)
        if call is None:
            return  # it came too late
        if answer.is_ok:
            call.answer = answer.body
        else:
            call.failure = _fault(answer.body)
        call.done.set()

    def fail(self, failure: MeshError) -> None:
        """Every waiting call raises it, or UnknownOutcome if the peer may have done it. The first failure counts."""
        if self._failure is not None:
            return
        self._failure = failure
        self.scope.cancel()
        for call in self.waiting.values():
            if call.answer is None and call.failure is None:
                call.failure = UnknownOutcome(f"sent, but {failure.message}") if call.is_sent else _copy(failure)
                call.done.set()


class _Outbox:
    """Frames that wait for the one task that writes the stream."""

    def __init__(self) -> None:
        self.bytes_pending = 0
        self.pinged_at: float | None = None
        self._frames: deque[tuple[bytes, _Call | None]] = deque()
        self._filled = trio.Event()

    def put(self, frame: bytes, call: _Call | None = None) -> None:
        self._frames.append((frame, call))
        self.bytes_pending += len(frame)
        self._filled.set()

    def ping(self) -> None:
        # Not another one behind a ping that is still on its way: its answer would be taken for this one's.
        if self.pinged_at is None:
            self.pinged_at = trio.current_time()
            self.put(_frame(Request(PING_ID, "", 0, b"")))

    async def write_to(self, stream: Stream) -> None:
        while True:
            await self._filled.wait()
            await stream.write(self._take())
            if not self._frames:
                self._filled = trio.Event()

    def _take(self) -> bytes:
        taken: list[bytes] = []
        size = 0
        while self._frames and size < WRITE_BYTES_MAX:
            frame, call = self._frames.popleft()
            self.bytes_pending -= len(frame)
            if call is not None:
                if call.is_given_up:
                    continue
                call.is_sent = True
            taken.append(frame)
            size += len(frame)
        return b"".join(taken)


class _FrameReader:
    """Frames out of a stream, read in large pieces; a frame's length is judged before its bytes are kept."""

    def __init__(self, stream: Stream) -> None:
        self.has_heard = False
        """Set with any bytes that arrive: a large frame on a slow wire is not silence."""
        self._stream = stream
        self._bytes = bytearray()
        self._at = 0

    async def next(self) -> bytes | None:
        """None at the end. Raises _Malformed (too large, or ends within a frame), Unavailable."""
        while (frame := self._pop()) is None:
            del self._bytes[: self._at]
            self._at = 0
            data = await self._stream.read(READ_BYTES_MAX)
            if not data:
                if self._bytes:
                    raise _Malformed(f"the stream ended within a frame, after {len(self._bytes)} bytes of it")
                return None
            self.has_heard = True
            self._bytes += data
        return frame

    def _pop(self) -> bytes | None:
        start = self._at + 4
        if len(self._bytes) < start:
            return None
        size = int.from_bytes(self._bytes[self._at : start], "big")
        if size > codec.FRAME_BYTES_MAX:
            raise _Malformed(f"frame of {size} bytes is over the limit of {codec.FRAME_BYTES_MAX}")
        if len(self._bytes) < start + size:
            return None
        self._at = start + size
        return bytes(memoryview(self._bytes)[start : self._at])


def _frame(message: Request | Answer) -> bytes:
    payload = codec.encode(message)
    return len(payload).to_bytes(4, "big") + payload


def _parse(frame: bytes, kind: type[T]) -> T:
    try:
        return codec.decode(frame, kind)
    except InvalidRequest as error:
        raise _Malformed(error.message) from error


def _faulted(error: MeshError) -> bytes:
    return codec.encode(Fault(error.code, error.message[:4096], error.hint[:1024]))


def _fault(body: bytes) -> MeshError:
    fault = _parse(body, Fault)
    return from_code(fault.code, fault.message, fault.hint)


def _copy(error: MeshError) -> MeshError:
    # Many calls fail by one loss; an exception raised twice would gather the tracebacks of both.
    return from_code(error.code, error.message, error.hint)


def _first(group: BaseExceptionGroup[MeshError]) -> MeshError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, MeshError)
    return error
