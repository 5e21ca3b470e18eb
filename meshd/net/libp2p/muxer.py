"""One connection and its streams: yamux over Noise messages, and ports.Stream on that.

    socket ──▶ pump ──▶ opened, cut into frames ──▶ the buffer of a stream ──▶ its reader wakes
    a stream's writer ──▶ a frame, sealed ──▶ the socket, at once; what it does not take ──▶ write_out

A frame is sealed and handed over whole, in one step: a writer that is cancelled can leave no half of it
behind, which would turn all that follows on the connection into garbage. The reader never waits for a write:
two nodes whose directions are both full would wait for each other. A stream's writer gives the peer's reader
30 s, and then only this stream ends. A closed stream leaves, whether the peer closes its side or not. All that
is kept has a bound, whatever the peer does.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.yamux.yamux import (
    FLAG_ACK,
    FLAG_FIN,
    FLAG_RST,
    FLAG_SYN,
    HEADER_SIZE,
    MAX_WINDOW_SIZE,
    TYPE_DATA,
    TYPE_GO_AWAY,
    TYPE_PING,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
)

from meshd.errors import Busy
from meshd.model import NodeId
from meshd.net.libp2p.stream import WRITE_DEADLINE_S, MuxedStream
from meshd.net.libp2p.wire import Cipher, Wire

STREAMS_MAX = 256
"""Per connection and direction; yamux peers count on no more."""

BUFFERED_BYTES_MAX = 64 << 20
"""Received on one connection and not yet read: four windows of yamux's largest. Nothing else holds a peer to them."""

BUFFERED_BYTES_OF_STRANGER_MAX = 1 << 20
"""The same of a peer that nobody knows yet. Who is one is asked only beyond it."""

LEAVING_BYTES_ROOM = 256 << 10
"""Sealed and not yet taken by the socket: beyond it the writers of streams wait …"""

LEAVING_BYTES_MAX = 1 << 20
"""… and beyond this the connection ends: a peer that causes so many acknowledgements and pongs does not read them."""

LINGER_S = 10.0
"""A closed stream waits so long for the peer to close its side, then is reset."""

_HEADER = struct.Struct(YAMUX_HEADER_FORMAT)


class Muxer:
    """Own `pump`, `write_out` and `see_off` as tasks; `end` ends them all."""

    def __init__(self, peer: NodeId, wire: Wire, cipher: Cipher, *, received: bytes = b"") -> None:
        """`received` came behind the handshake."""
        self.peer = peer
        self.is_strangers: Callable[[], bool] = lambda: False
        """Asked each time: who was a stranger may be known by now."""
        self.on_opened: Callable[[MuxedStream], None]
        """The peer has opened a stream; must not wait."""
        self.streams: dict[int, MuxedStream] = {}
        self.is_ended = False
        self.bytes_unread = 0
        self._wire = wire
        self._cipher = cipher
        self._next_id = 1 if wire.is_initiator else 2
        self._opened = 0
        self._rest = received
        """The beginning of a header."""
        self._body_left = 0
        self._body_of: MuxedStream | None = None
        self._body_flags = 0
        self._leaving: deque[bytes] = deque()
        self._bytes_leaving = 0
        self._filled = trio.Event()
        self._has_room = trio.Event()
        self._closed: deque[tuple[float, MuxedStream]] = deque()
        self._has_closed = trio.Event()

    def end(self) -> None:
        """Close the connection at once; every stream's reader and writer gets an error."""
        if self.is_ended:
            return
        self.is_ended = True
        self._wire.abort()
        for stream in self.streams.values():
            stream.broke()
        self.streams.clear()
        self._leaving.clear()
        self._bytes_leaving = 0
        self._filled.set()
        self._has_room.set()

    def open_stream(self) -> MuxedStream:
        """Raises Busy; ConnectionClosedError when the connection is lost."""
        if self._opened >= STREAMS_MAX:
            raise Busy(f"{STREAMS_MAX} streams to {self.peer} are open already")
        stream = MuxedStream(self, self._next_id, is_ours=True)
        self.put(TYPE_WINDOW_UPDATE, FLAG_SYN, stream.id)
        self._next_id += 2
        self._opened += 1
        self.streams[stream.id] = stream
        return stream

    def forget(self, stream: MuxedStream) -> None:
        if self._has(stream):
            self.streams.pop(stream.id, None)
            if stream.is_ours:
                self._opened -= 1

    def _has(self, stream: MuxedStream) -> bool:
        return self.streams.get(stream.id) is stream

    # --- outward ------------------------------------------------------------------------------------------------------

    def put(self, kind: int, flags: int, stream_id: int, length: int = 0, payload: bytes | memoryview = b"") -> None:
        """A whole frame leaves; with a payload `length` is its. Raises ConnectionClosedError when the connection is lost, by this or before."""
        self.put_bytes(_HEADER.pack(0, kind, flags, stream_id, length) + payload)

    def put_bytes(self, frame: bytes) -> None:
        if self.is_ended:
            raise ConnectionClosedError("the connection is lost")
        sealed = self._cipher.seal(frame)
        if not self._leaving:
            try:
                taken = self._wire.send_now(sealed)
            except ConnectionClosedError:
                self.end()
                raise
            if taken == len(sealed):
                return
            sealed = sealed[taken:]
        self._leaving.append(sealed)
        self._bytes_leaving += len(sealed)
        self._filled.set()
        if self._bytes_leaving > LEAVING_BYTES_MAX:
            self.end()
            raise ConnectionClosedError("the peer does not read what it asks for")

    def say(self, kind: int, flags: int, stream_id: int, length: int = 0) -> None:
        """If the connection is lost, so is what was to be said."""
        with suppress(ConnectionClosedError):
            self.put(kind, flags, stream_id, length)

    @property
    def has_room(self) -> bool:
        return self._bytes_leaving <= LEAVING_BYTES_ROOM

    async def wait_room(self) -> None:
        """Until the socket has taken most of what was put. Raises ConnectionClosedError."""
        while not (self.has_room or self.is_ended):
            await self._has_room.wait()
        if self.is_ended:
            raise ConnectionClosedError("the connection is lost")

    async def write_out(self) -> None:
        """Hand over what the socket did not take at once. Raises ConnectionClosedError at the end of the connection."""
        while not self.is_ended:
            await self._filled.wait()
            while self._leaving:
                with trio.move_on_after(WRITE_DEADLINE_S) as patience:
                    await self._wire.wait_sendable()
                if patience.cancelled_caught:
                    self.end()
                    raise ConnectionClosedError(f"the peer took no bytes for {WRITE_DEADLINE_S:g} s")
                self._send_leaving()
            self._filled = trio.Event()
        raise ConnectionClosedError("the connection is lost")

    def _send_leaving(self) -> None:
        if not self._leaving:
            return  # it has ended meanwhile
        data = b"".join(self._leaving)
        taken = self._wire.send_now(data)
        self._leaving.clear()
        if taken < len(data):
            self._leaving.append(data[taken:])
        self._bytes_leaving = len(data) - taken
        if self.has_room:
            self._has_room.set()
            self._has_room = trio.Event()

    # --- streams that are closed here ---------------------------------------------------------------------------------

    def let_go(self, stream: MuxedStream, *, is_read: bool) -> None:
        """Nobody reads or writes it any more. `is_read`: nothing of what has come is thrown away."""
        if not self._has(stream):
            return
        if not is_read:
            self.reset(stream)
            return
        stream.finish()
        if self._has(stream):
            self._closed.append((trio.current_time() + LINGER_S, stream))
            self._has_closed.set()

    def reset(self, stream: MuxedStream) -> None:
        if self._has(stream):
            self.forget(stream)
            self.say(TYPE_WINDOW_UPDATE, FLAG_RST, stream.id)

    async def see_off(self) -> None:
        """Closed streams whose peers do not close their side."""
        while True:
            await self._has_closed.wait()
            while self._closed:
                until, stream = self._closed[0]
                await trio.sleep_until(until)
                self._closed.popleft()
                self.reset(stream)
            self._has_closed = trio.Event()

    # --- inward -------------------------------------------------------------------------------------------------------

    async def pump(self) -> None:
        """Take in what comes until the connection ends, and raise ConnectionClosedError then."""
        self._take(b"")
        while not self.is_ended:
            self._take(self._cipher.open(await self._wire.receive()))
        raise ConnectionClosedError("the connection is lost")

    def _take(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        at, size = 0, len(data)
        while True:
            if self._body_left:
                part = data[at : at + self._body_left]
                at += len(part)
                self._body_left -= len(part)
                if self._body_of is not None:
                    self._body_of.came(part)
                if self._body_left:
                    break
                self._flagged(self._body_of, self._body_flags)
            elif size - at < HEADER_SIZE:
                break
            else:
                self._begin(*_HEADER.unpack_from(data, at))
                at += HEADER_SIZE
        self._rest = data[at:]

    def _begin(self, version: int, kind: int, flags: int, stream_id: int, length: int) -> None:
        if kind in (TYPE_DATA, TYPE_WINDOW_UPDATE):
            if version:
                raise self._over("it speaks another version of yamux")
            self._begin_of(kind, flags, stream_id, length)
        elif kind == TYPE_PING:
            if flags & FLAG_SYN:
                self.put(TYPE_PING, FLAG_ACK, 0, length)
        elif kind == TYPE_GO_AWAY:
            raise self._over("the peer leaves")
        else:
            raise self._over(f"a frame of type {kind}")

    def _begin_of(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        stream = self.streams.get(stream_id)
        if flags & FLAG_SYN:
            stream = self._opened_by_peer(stream_id, flags)
        if kind == TYPE_WINDOW_UPDATE:
            if stream is not None:
                stream.may_send(length)
            self._flagged(stream, flags)
            return
        if length > MAX_WINDOW_SIZE or self._is_over(length + self.bytes_unread):
            raise self._over("the peer sends far more than its windows allow")
        self._body_left, self._body_of, self._body_flags = length, stream, flags
        if not length:
            self._flagged(stream, flags)

    def _is_over(self, bytes_unread: int) -> bool:
        return bytes_unread > BUFFERED_BYTES_OF_STRANGER_MAX and (
            bytes_unread > BUFFERED_BYTES_MAX or self.is_strangers()
        )

    def _opened_by_peer(self, stream_id: int, flags: int) -> MuxedStream | None:
        if flags & FLAG_RST:
            return None  # before it was there
        is_theirs = stream_id and stream_id % 2 != self._next_id % 2
        if not is_theirs or stream_id in self.streams:
            self.put(TYPE_WINDOW_UPDATE, FLAG_RST, stream_id)
            return None
        stream = self.streams[stream_id] = MuxedStream(self, stream_id, is_ours=False)
        self.put(TYPE_WINDOW_UPDATE, FLAG_ACK, stream_id)
        self.on_opened(stream)
        return stream

    def _flagged(self, stream: MuxedStream | None, flags: int) -> None:
        if stream is None or not flags & (FLAG_FIN | FLAG_RST):
            return
        if flags & FLAG_RST:
            self.forget(stream)
            stream.broke()
        else:
            stream.finished_by_peer()

    def _over(self, why: str) -> ConnectionClosedError:
        self.end()
        return ConnectionClosedError(why)
