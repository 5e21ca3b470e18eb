"""Calls to peers: many requests and answers share one long-lived stream per direction and peer.

    caller                                   answerer
      ── greeting ─────────────────────────────▶  admit(peer, greeting)?
      ◀───────────────────────── greeting, or error ──
      ── [id, method, timeout_ms, body] ───────▶  a task each, at most CALLS_MAX and REQUESTS_BYTES_MAX
      ◀────────────────────── [id, is_ok, body] ──

Frames are a 4-byte length and msgpack. A frame costs the transport about 0.3 ms of CPU whatever its size, so
one task per stream writes all that is pending at once. Id 0 is the greeting first and a ping after that: a
peer that is stopped, or behind a dead wire, keeps its connections open for ever, and only its silence tells.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable

import structlog
import trio

from meshd.errors import (
    Busy,
    MeshError,
    PeerFault,
    TooLarge,
    Unavailable,
    UnknownOutcome,
)
from meshd.model import NodeId
from meshd.net.frames import (
    BODY_BYTES_MAX,
    GREETING_FRAME_BYTES_MAX,
    GREETING_ID,
    PING_ID,
    Answer,
    Call,
    FrameReader,
    Malformed,
    Outbox,
    Request,
    Room,
    copy_of,
    error_of,
    fault_of,
    framed,
    parse,
)
from meshd.ports import Stream, Transport

PROTOCOL = "/meshd/rpc/1"

CALLS_MAX = 1024
"""Calls in flight per peer and direction. Far above what 2 cores can answer in a second of patience."""

SMALL_BYTES_MAX = 16 << 10
"""Calls and answers up to here are counted only: they do not wait for large ones, and CALLS_MAX of them take 16 MiB."""

REQUESTS_BYTES_MAX = 32 << 20
"""Of calls that one peer has in flight here. Answered Busy beyond it, not left unread: its pings and small calls share the stream."""

OURS_BYTES_MAX = 24 << 20
"""Of our large calls in flight to one peer; the next wait here. Less than the peer takes, since it may still be at some that we gave up."""

ANSWERS_BYTES_ROOM = 32 << 20
"""Answers that wait for one peer: beyond it none of its calls is begun …"""

ANSWERS_BYTES_MAX = 48 << 20
"""… and beyond this large answers of those that were are dropped. Small ones still find room in the outbox."""

OUTBOX_BYTES_MAX = 64 << 20
"""Bytes waiting for one peer: sixteen of the largest frames. A peer that lets more pile up does not read."""

FRAMES_PER_TURN = 64
"""Taken up before everybody else gets a turn: one read may bring 10,000 small ones, and 100 ms of work."""

GREETING_S = 10.0
"""For greeting and admission, which may ask the replicated state."""

PING_INTERVAL_S = 2.5
PING_MISSES_MAX = 3
"""Three silent intervals after the one in which the peer stopped: noticed after 7.5 to 10 s. Ticks are counted,
not time, so that a pause of this process is never taken for one of the peer."""


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
        if caller is not None and caller.is_open and peer not in self._transport.connected():
            caller = None  # its stream broke this instant; nothing sent there would arrive
        if caller is None:
            if self._work is None:
                raise Unavailable("this node is not running")
            caller = self._calling[peer] = _Caller(peer)
            self._work.start_soon(self._run_caller, caller)
        if len(caller.waiting) >= CALLS_MAX or caller.outbox.bytes_pending > OUTBOX_BYTES_MAX:
            self._counters["calls_busy"] += 1
            raise Busy(f"{len(caller.waiting)} calls to {peer} are in flight already")
        if len(body) <= SMALL_BYTES_MAX:
            return await caller.call(method, body, timeout_s)
        return await self._call_large(caller, method, body, timeout_s)

    async def _call_large(self, caller: _Caller, method: str, body: bytes, timeout_s: float) -> bytes:
        if caller.room.waiting >= CALLS_MAX:
            self._counters["calls_busy"] += 1
            raise Busy(f"{caller.room.waiting} large calls to {caller.peer} wait already")
        until = trio.current_time() + timeout_s
        with trio.move_on_at(until) as patience:
            await caller.room.take(len(body))
        if patience.cancelled_caught:
            raise Unavailable(
                f"{method} could not be sent to {caller.peer} within {timeout_s:g} s, behind other large calls"
            )
        try:
            return await caller.call(method, body, max(0.0, until - trio.current_time()))
        finally:
            caller.room.give_back(len(body))

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
        except* Malformed as group:
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
        frames = FrameReader(stream)
        greeted_at = trio.current_time()
        with trio.move_on_after(GREETING_S) as patience:
            await stream.write(framed(Answer(GREETING_ID, True, self._greeting())))
            theirs = await frames.next(GREETING_FRAME_BYTES_MAX)
            if theirs is None:
                raise Unavailable(f"{caller.peer} closed the stream without a greeting")
            greeting = parse(theirs, Answer)
            if not greeting.is_ok:
                raise error_of(greeting.body)
            await self._admit(caller.peer, greeting.body)
        if patience.cancelled_caught:
            self._counters["peers_silent"] += 1
            self._log.warning("peer.silent", peer=caller.peer, seconds=GREETING_S)
            await self._transport.drop(caller.peer, age_s=trio.current_time() - greeted_at)
            raise Unavailable(f"{caller.peer} did not greet within {GREETING_S:g} s")
        caller.is_open = True
        self._rtt_ms[caller.peer] = (trio.current_time() - greeted_at) * 1000
        async with trio.open_nursery() as tasks:
            tasks.start_soon(caller.outbox.write_to, stream)
            tasks.start_soon(self._keep_alive, caller.peer, frames, caller.outbox)
            while (frame := await frames.next()) is not None:
                answer = parse(frame, Answer)
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

    async def _keep_alive(self, peer: NodeId, frames: FrameReader, pings: Outbox | None) -> None:
        misses = 0
        while misses < PING_MISSES_MAX:
            ticked_at = trio.current_time()
            if pings is not None:
                pings.ping()
            await trio.sleep(PING_INTERVAL_S)
            misses = 0 if frames.heard_at >= ticked_at else misses + 1
        silent_s = trio.current_time() - frames.heard_at
        self._counters["peers_silent"] += 1
        self._log.warning("peer.silent", peer=peer, seconds=round(silent_s, 1))
        # The peer may be back already, on a new connection that has nothing to do with this silence.
        await self._transport.drop(peer, age_s=silent_s)
        raise Unavailable(f"{peer} has been silent for {silent_s:.1f} s")

    # --- their calls -------------------------------------------------------------------------------------------------

    async def _answer_stream(self, stream: Stream) -> None:
        peer = stream.peer
        frames = FrameReader(stream)
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
        except* Malformed as group:
            self._counters["frames_malformed"] += 1
            self._log.warning("rpc.malformed", peer=peer, error=str(_first(group)))
            raise
        except* Unavailable:
            pass  # lost or silent: its caller knows

    async def _is_admitted(self, stream: Stream, frames: FrameReader) -> bool:
        with trio.move_on_after(GREETING_S) as patience:
            theirs = await frames.next(GREETING_FRAME_BYTES_MAX)
            if theirs is None:
                return False
            greeting = parse(theirs, Answer).body
            try:
                await self._admit(stream.peer, greeting)
            except MeshError as error:
                self._counters["peers_refused"] += 1
                self._log.info("peer.refused", peer=stream.peer, error=error.code, message=error.message)
                await stream.write(framed(Answer(GREETING_ID, False, fault_of(error))))
                return False
            await stream.write(framed(Answer(GREETING_ID, True, self._greeting())))
        return not patience.cancelled_caught

    async def _answer_calls(self, stream: Stream, frames: FrameReader) -> None:
        outbox = Outbox()
        in_flight = bytes_in_flight = 0

        async def answer(request: Request, size: int) -> None:
            nonlocal in_flight, bytes_in_flight
            try:
                outbox.put(framed(await self._answer(stream.peer, request, outbox)))
            finally:
                in_flight -= 1
                bytes_in_flight -= size

        async with trio.open_nursery() as tasks:
            tasks.start_soon(outbox.write_to, stream)
            tasks.start_soon(self._keep_alive, stream.peer, frames, None)
            taken = 0
            while (frame := await frames.next()) is not None:
                taken += 1
                if taken % FRAMES_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
                request, size = parse(frame, Request), len(frame)
                if outbox.bytes_pending > OUTBOX_BYTES_MAX:
                    raise Malformed(f"{stream.peer} asks on, but leaves {outbox.bytes_pending} bytes of answers unread")
                if request.id == PING_ID:
                    outbox.put(framed(Answer(PING_ID, True, b"")))
                elif in_flight >= CALLS_MAX or (size > SMALL_BYTES_MAX and bytes_in_flight + size > REQUESTS_BYTES_MAX):
                    self._counters["calls_refused"] += 1
                    busy = Busy(
                        f"{in_flight} calls from {stream.peer} are in flight already, with {bytes_in_flight} bytes"
                    )
                    outbox.put(framed(Answer(request.id, False, fault_of(busy))))
                else:
                    in_flight += 1
                    bytes_in_flight += size
                    tasks.start_soon(answer, request, size)
            tasks.cancel_scope.cancel()

    async def _answer(self, peer: NodeId, request: Request, outbox: Outbox) -> Answer:
        method = request.method
        try:
            handler = self._handlers.get(method)
            if handler is None:
                # Not NotFound: a node that is just starting would say of what it was asked about that there is no such thing.
                raise Unavailable(
                    f"this node has no method {method!r}", hint="it is just starting, or of another version"
                )
            with trio.move_on_after(request.timeout_ms / 1000) as patience:
                if outbox.bytes_pending > ANSWERS_BYTES_ROOM:
                    await outbox.wait_room(ANSWERS_BYTES_ROOM)
                body = await handler(peer, request.body)
            if patience.cancelled_caught:
                raise UnknownOutcome(f"{method} took longer than the {request.timeout_ms} ms it was given")
            if len(body) > BODY_BYTES_MAX:
                raise TooLarge(f"the answer to {method} has {len(body)} bytes, over the limit of {BODY_BYTES_MAX}")
            if len(body) > SMALL_BYTES_MAX and outbox.bytes_pending + len(body) > ANSWERS_BYTES_MAX:
                self._counters["answers_dropped"] += 1
                raise UnknownOutcome(
                    f"the answer to {method} found no room: {peer} has not read {outbox.bytes_pending} bytes of others",
                    hint="ask for less at a time",
                )
            return Answer(request.id, True, body)
        except MeshError as error:
            return Answer(request.id, False, fault_of(error))
        except Exception as error:
            # A method that trips over one request must not take the peer's other calls with it.
            self._counters["methods_failed"] += 1
            self._log.exception("rpc.method_failed", peer=peer, method=method)
            fault = PeerFault(f"{method} failed at {self._transport.me}: {type(error).__name__}")
            return Answer(request.id, False, fault_of(fault))


class _Caller:
    """Our calls to one peer and the stream they share; lives as long as the stream."""

    def __init__(self, peer: NodeId) -> None:
        self.peer = peer
        self.scope = trio.CancelScope()
        self.outbox = Outbox()
        self.room = Room(OURS_BYTES_MAX)
        self.waiting: dict[int, Call] = {}
        self.is_open = False
        self._ids = itertools.count(1)
        self._failure: MeshError | None = None

    async def call(self, method: str, body: bytes, timeout_s: float) -> bytes:
        if self._failure is not None:
            raise copy_of(self._failure)
        call, call_id = Call(), next(self._ids)
        self.waiting[call_id] = call
        self.outbox.put(framed(Request(call_id, method, int(timeout_s * 1000), body)), call)
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
            call.failure = error_of(answer.body)
        call.done.set()

    def fail(self, failure: MeshError) -> None:
        """Every waiting call raises it, or UnknownOutcome if the peer may have done it. The first failure counts."""
        if self._failure is not None:
            return
        self._failure = failure
        self.scope.cancel()
        for call in self.waiting.values():
            if call.answer is None and call.failure is None:
                call.failure = UnknownOutcome(f"sent, but {failure.message}") if call.is_sent else copy_of(failure)
                call.done.set()


def _first(group: BaseExceptionGroup[MeshError]) -> MeshError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, MeshError)
    return error
