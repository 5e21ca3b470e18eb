"""One connection and its streams: a socket read in large pieces, yamux over it, and ports.Stream on that.

Four cures, each for something that was seen (its tests say where):

* A frame once begun is written to its end. A write cancelled in the middle turns all that follows on the
  connection into garbage, while it still counts as connected.
* The reader never waits for a write. Two nodes whose directions are both full would wait for each other.
* A stream's writer gives the peer's reader 30 s, and then only this stream ends; the library resets after 5 s.
* A closed stream leaves, whether the peer closes its side or not, and the bytes it buffers are bounded.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux.yamux import (
    FLAG_FIN,
    FLAG_RST,
    FLAG_SYN,
    TYPE_DATA,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
    Yamux,
    YamuxStream,
)

from meshd.errors import Busy, Unavailable
from meshd.model import NodeId

STREAMS_MAX = 256
"""Per connection and direction; yamux peers count on no more."""

BUFFERED_BYTES_MAX = 64 << 20
"""Received on one connection and not yet read: four windows of yamux's largest. Nothing else holds a peer to them."""

WRITE_DEADLINE_S = 30.0
"""For one frame into the socket, and for a stream's reader to make room. Frames are 64 KiB: 2 kB/s is too slow."""

LINGER_S = 10.0
"""A closed stream waits so long for the peer to close its side, then is reset."""

CONTROL_FRAMES_MAX = 1024
"""Acknowledgements and pongs that wait to be written. A peer that causes more does not read what it asks for."""

FRAME_PAYLOAD_MAX = 65535 - 16 - 12
"""One yamux frame in exactly one Noise message: less the tag and the header."""

SOCKET_READ_BYTES = 256 << 10


class Wire(IRawConnection):
    """A TCP connection, read in large pieces: Noise asks for 2 bytes and then for 60,000."""

    def __init__(self, socket: trio.SocketStream, *, is_initiator: bool) -> None:
        self.is_initiator = is_initiator
        self._socket = socket
        self._bytes = b""
        self._at = 0

    async def read(self, n: int | None = None) -> bytes:
        if self._at == len(self._bytes):
            try:
                self._bytes = await self._socket.receive_some(SOCKET_READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ConnectionClosedError(str(error)) from error
            self._at = 0
            if not self._bytes:
                # Not b"": py-libp2p would ask again, a hundred times.
                raise ConnectionClosedError("the peer closed the connection")
        end = len(self._bytes) if n is None else min(self._at + n, len(self._bytes))
        data = self._bytes[self._at : end]
        self._at = end
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._socket.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(str(error)) from error

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """At once: whoever reads or writes it gets an error."""
        self._socket.socket.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    def get_transport_addresses(self) -> list[Any]:
        return []

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class Muxer(Yamux):
    """Yamux, with its writes made safe to cancel and its memory bounded."""

    def __init__(self, secured: ISecureConn, peer_id: ID, wire: Wire) -> None:
        super().__init__(secured, peer_id, is_initiator=wire.is_initiator)
        self.buffered_bytes_max = BUFFERED_BYTES_MAX
        self._wire = wire
        self._reader: trio.lowlevel.Task | None = None
        self._control: deque[bytes] = deque()
        self._control_filled = trio.Event()
        self._opened = 0

    def end(self) -> None:
        """Close the connection at once; every stream's reader and writer gets an error."""
        self.event_shutting_down.set()
        self._wire.abort()
        self.new_stream_send_channel.close()
        for stream in self.streams.values():
            stream.closed = stream.send_closed = stream.recv_closed = stream.reset_received = True
        for event in self.stream_events.values():
            event.set()
        self.streams.clear()
        self.stream_buffers.clear()
        self.stream_events.clear()
        self.event_closed.set()

    async def open_stream(self) -> YamuxStream:
        """Raises Busy; IOException when the connection is lost."""
        if self._opened >= STREAMS_MAX:
            raise Busy(f"{STREAMS_MAX} streams to {self.peer_id} are open already")
        if self.event_shutting_down.is_set():
            raise ConnectionClosedError("the connection is lost")
        stream = YamuxStream(self.next_stream_id, self, True)
        self.next_stream_id += 2
        self.streams[stream.stream_id] = stream
        self.stream_buffers[stream.stream_id] = bytearray()
        self.stream_events[stream.stream_id] = trio.Event()
        self._opened += 1
        try:
            await self.send(stream, TYPE_WINDOW_UPDATE, FLAG_SYN)
        except BaseException:
            await self.forget(stream)
            raise
        return stream

    async def send(self, stream: YamuxStream, kind: int, flags: int = 0, payload: bytes = b"") -> None:
        header = struct.pack(YAMUX_HEADER_FORMAT, 0, kind, flags, stream.stream_id, len(payload))
        await self._write_frame(header + payload)

    async def forget(self, stream: YamuxStream) -> None:
        with trio.CancelScope(shield=True):  # the lock is never held for long
            async with self.streams_lock:
                self.streams.pop(stream.stream_id, None)
                self.stream_buffers.pop(stream.stream_id, None)
                self.stream_events.pop(stream.stream_id, None)
        if stream.is_initiator:
            self._opened -= 1

    async def let_go(self, stream: YamuxStream) -> None:
        """Close our side, give the peer a while to close its own, then forget the stream."""
        try:
            if not stream.send_closed:
                stream.send_closed = True
                await self.send(stream, TYPE_WINDOW_UPDATE, FLAG_FIN)
            with trio.move_on_after(LINGER_S):
                while not stream.recv_closed and not stream.reset_received:
                    if self.stream_buffers.get(stream.stream_id):
                        break  # it goes on writing: nobody will read that
                    await self.wait_moved(stream)
            if not stream.recv_closed and not stream.reset_received:
                await self.send(stream, TYPE_WINDOW_UPDATE, FLAG_RST)
        finally:
            await self.forget(stream)

    async def reset(self, stream: YamuxStream) -> None:
        try:
            stream.closed = stream.send_closed = True
            await self.send(stream, TYPE_WINDOW_UPDATE, FLAG_RST)
        finally:
            await self.forget(stream)

    async def wait_moved(self, stream: YamuxStream) -> None:
        """Until bytes, an end or a reset have arrived for the stream since the last wait."""
        event = self.stream_events.get(stream.stream_id)
        if event is None:
            raise ConnectionClosedError("the stream is gone")
        await event.wait()
        if self.stream_events.get(stream.stream_id) is event:
            self.stream_events[stream.stream_id] = trio.Event()

    async def handle_incoming(self) -> None:
        self._reader = trio.lowlevel.current_task()
        await super().handle_incoming()

    async def write_control(self) -> None:
        """What the reader has to say; it must go on reading meanwhile."""
        while True:
            await self._control_filled.wait()
            while self._control:
                await self._write_frame(self._control.popleft())
            self._control_filled = trio.Event()

    async def _write_frame(self, data: bytes) -> None:
        if trio.lowlevel.current_task() is self._reader:
            if len(self._control) >= CONTROL_FRAMES_MAX:
                self.end()
            self._control.append(data)
            self._control_filled.set()
            return
        async with self._write_lock:
            # Half a frame would make garbage of all that follows on this connection.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + WRITE_DEADLINE_S) as patience:
                await self.secured_conn.write(data)
            if patience.cancelled_caught:
                self.end()
                raise ConnectionClosedError(f"the peer took no bytes for {WRITE_DEADLINE_S:g} s")

    async def _read_data_body(self, length: int) -> bytes:
        if length + sum(map(len, self.stream_buffers.values())) > self.buffered_bytes_max:
            self.end()
            raise ConnectionClosedError("the peer sent far more than its windows allow")
        try:
            return await super()._read_data_body(length)
        except BaseException:
            self.end()  # or yamux would call the stream ended, as if all its bytes had come
            raise


class MuxedStream:
    """ports.Stream on one yamux stream."""

    def __init__(
        self,
        peer: NodeId,
        muxer: Muxer,
        yamux: YamuxStream,
        soon: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        self._peer = peer
        self._muxer = muxer
        self._yamux = yamux
        self._soon = soon
        self._turn = trio.Lock()
        self._is_closed = False

    @property
    def peer(self) -> NodeId:
        return self._peer

    async def read(self, n: int) -> bytes:
        """See ports.Stream. No byte is taken that is not returned, also when cancelled."""
        await trio.lowlevel.checkpoint()
        while not self._is_closed:
            buffer = self._muxer.stream_buffers.get(self._yamux.stream_id)
            if buffer:
                data = bytes(buffer[:n])
                del buffer[:n]
                self._give_credit(len(buffer))
                return data
            if self._muxer.event_shutting_down.is_set():
                break
            if self._yamux.recv_closed:
                return b""
            if buffer is None or self._yamux.reset_received:
                break
            await self._muxer.wait_moved(self._yamux)
        raise await self._broken_off()

    async def write(self, data: bytes) -> None:
        """See ports.Stream. Cancelled in the middle it resets this stream, since nobody could make sense of the rest."""
        rest = memoryview(data)
        async with self._turn:
            try:
                while rest:
                    size = min(await self._wait_window(), FRAME_PAYLOAD_MAX, len(rest))
                    self._yamux.send_window -= size
                    await self._muxer.send(self._yamux, TYPE_DATA, payload=bytes(rest[:size]))
                    rest = rest[size:]
            except IOException as error:
                raise await self._broken_off() from error
            except BaseException:
                if len(rest) < len(data):
                    self.reset()
                raise

    async def close_write(self) -> None:
        if not self._yamux.send_closed:
            self._yamux.send_closed = True
            self._soon(lambda: self._muxer.send(self._yamux, TYPE_WINDOW_UPDATE, FLAG_FIN))
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if not self._is_closed:
            self._close()
            self._soon(lambda: self._muxer.let_go(self._yamux))

    def reset(self) -> None:
        if not self._is_closed:
            self._close()
            self._soon(lambda: self._muxer.reset(self._yamux))

    def _close(self) -> None:
        self._is_closed = True
        event = self._muxer.stream_events.get(self._yamux.stream_id)
        if event is not None:
            event.set()  # another task may be reading

    async def _wait_window(self) -> int:
        # Yamux announces room without an event, and itself looks every 10 ms.
        pause_s = 0.001
        with trio.move_on_after(WRITE_DEADLINE_S):
            while not (self._yamux.send_closed or self._yamux.closed or self._is_closed):
                if self._yamux.send_window > 0:
                    return self._yamux.send_window
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.02)
            raise await self._broken_off()
        self.reset()
        raise Unavailable(f"{self._peer} did not read for {WRITE_DEADLINE_S:g} s")

    async def _broken_off(self) -> Unavailable:
        await trio.lowlevel.checkpoint_if_cancelled()  # a task that is being stopped shall not take it for a loss
        return Unavailable(f"the stream to {self._peer} broke off")

    def _give_credit(self, unread: int) -> None:
        stream = self._yamux
        # As soon as half the window is free, not with every read: each update costs the peer a frame.
        if stream.target_recv_window - stream.recv_window - unread >= stream.target_recv_window // 2:
            self._soon(stream._auto_tune_and_send_window_update)
