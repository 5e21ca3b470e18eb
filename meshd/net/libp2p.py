"""The Transport port over libp2p: TCP, Noise and yamux. The only module that touches py-libp2p.

What is used of it: the Noise handshake, yamux frames, multistream-select and peer ids, so that any libp2p node
can connect. What is not: its host, swarm, listener and dialer. Measured on 0.8.1, one exception in a handler stops
that host, it refuses every connection after 250, blocks a peer for 60 s after one failed dial, and binds a port
that another process already has. So connections are accepted, dialled, kept and closed here:

      accept ──▶ handshake (10 s, 128 at a time) ──▶ stranger ──15 s──▶ closed
                        ▲                              │ the gate lets it speak more than join
      dial ──────── pinned key ──────────────────▶ connected ──▶ streams, each asked of the gate

    yamux needs four cures, all in `_Muxer` and `_Stream`: a frame once begun is always written to its end (a cancelled
    write corrupts every stream of the connection); its reader never waits for a write (two full directions would wait
    for each other); a stream's writer waits 30 s for the peer's reader, not 5; a closed stream always leaves.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog
import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import ProtocolNotSupportedError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.exceptions import MuxedConnError, MuxedStreamError
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
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX

from meshd.errors import Busy, InvalidRequest, MeshError, NotAllowed, PeerFault, StartRefused, Unavailable
from meshd.model import NodeId
from meshd.net import addresses as multiaddrs
from meshd.net.identity_key import KeyPair, public_bytes
from meshd.ports import AddressBook, Gate, PeerEvents, Stream, StreamHandler

JOIN_PROTOCOL = "/meshd/join/1"
"""Whom the gate lets speak nothing else is a stranger."""

HANDSHAKE_S = 10.0
"""TCP accept to yamux, on a busy machine. Also for negotiating a stream."""

HANDSHAKES_MAX = 128
"""Inbound and unfinished; past it the oldest goes, since a true peer's takes 30 ms."""

STRANGERS_MAX = 64
"""Inbound connections of peers that the gate lets speak nothing but join; past it the oldest goes."""

STRANGER_S = 15.0
"""To join in. Joining takes one commit of the log."""

CONNECTIONS_PER_PEER_MAX = 4
"""Two are usual after a simultaneous dial, and tolerated: to close one would race with the peer closing the other."""

STREAMS_MAX = 256
"""Per connection and direction; yamux peers count on no more."""

STREAMS_OF_STRANGER_MAX = 4

BUFFERED_BYTES_MAX = 64 << 20
"""Received on one connection and not yet read: four windows of yamux's largest. Nothing else holds a peer to them."""

BUFFERED_BYTES_OF_STRANGER_MAX = 1 << 20

WRITE_DEADLINE_S = 30.0
"""For one frame into the socket, and for a stream's reader to make room. Frames are 64 KiB: 2 kB/s is too slow."""

LINGER_S = 10.0
"""A closed stream waits so long for the peer to close its side, then is reset."""

DIAL_STAGGER_S = 0.25
"""Head start of each address over the next one (RFC 8305 says 250 ms)."""

ADDRESSES_MAX = 16
"""Dialled for one peer."""

CONTROL_FRAMES_MAX = 1024
"""Acknowledgements and pongs that wait to be written. A peer that causes more does not read what it asks for."""

FRAME_PAYLOAD_MAX = 65535 - 16 - 12
"""One yamux frame in exactly one Noise message: less the tag and the header."""

SOCKET_READ_BYTES = 256 << 10

logging.getLogger("libp2p").addHandler(logging.NullHandler())
logging.getLogger("libp2p").setLevel(logging.CRITICAL + 1)  # it shouts about every failed dial; errors are raised here


class Libp2pTransport:
    """ports.Transport. `listen` are multiaddrs, port 0 takes a free one, none only dials; `book` says where to dial for open_stream."""

    def __init__(
        self, key: KeyPair, listen: Sequence[str], *, gate: Gate, book: AddressBook, events: PeerEvents
    ) -> None:
        self._me = key.node_id
        self._noise = NoiseTransport(create_new_key_pair(key.secret), create_noise_key_pair().private_key)
        self._listen = listen
        self._gate = gate
        self._book = book
        self._events = events
        self._addresses: tuple[str, ...] = ()
        self._handlers: dict[str, StreamHandler] = {}
        self._connections: dict[NodeId, list[_Connection]] = {}
        self._strangers: dict[_Connection, None] = {}
        self._handshakes: dict[trio.CancelScope, None] = {}
        self._dialling: dict[NodeId, trio.Lock] = {}
        self._counters: Counter[str] = Counter()
        self._work: trio.Nursery | None = None
        self._log = structlog.get_logger()

    @property
    def me(self) -> NodeId:
        return self._me

    @property
    def addresses(self) -> Sequence[str]:
        return self._addresses

    def connected(self) -> frozenset[NodeId]:
        return frozenset(self._connections)

    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and own every connection until cancelled. Raises StartRefused: port in use, no such address."""
        listeners = [listener for address in self._listen for listener in await _listen(address)]
        self._addresses = tuple(
            address for listener in listeners for address in multiaddrs.reachable(*listener.socket.getsockname()[:2])
        )
        try:
            async with trio.open_nursery() as self._work:
                if listeners:
                    self._work.start_soon(trio.serve_listeners, self._accept, listeners)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._work = None
            for listener in listeners:
                listener.socket.close()

    # --- connections -------------------------------------------------------------------------------------------------

    async def connect(self, peer: NodeId, addresses: Sequence[str], *, timeout_s: float) -> None:
        if peer == self._me:
            raise PeerFault(f"{peer} is this node itself")
        if self._work is None:
            raise Unavailable("this node is not running")
        with trio.move_on_after(timeout_s) as patience:
            dialling = self._dialling.setdefault(peer, trio.Lock())
            try:
                async with dialling:
                    if peer not in self._connections:
                        await self._dial(peer, addresses[:ADDRESSES_MAX])
            finally:
                if not dialling.locked():
                    self._dialling.pop(peer, None)
        if patience.cancelled_caught:
            raise Unavailable(f"{peer} did not answer within {timeout_s:g} s")

    async def drop(self, peer: NodeId) -> None:
        for connection in list(self._connections.get(peer, ())):
            self._counters["connections_dropped"] += 1
            self._remove(connection)
        await trio.lowlevel.checkpoint()

    async def _dial(self, peer: NodeId, addresses: Sequence[str]) -> None:
        """All addresses, each a moment after the one before or as soon as that has failed; the first to answer wins."""
        failures: list[MeshError] = []
        won: list[_Connection] = []
        try:
            async with trio.open_nursery() as racing:

                async def attempt(address: str, failed: trio.Event) -> None:
                    try:
                        won.append(await self._reach(peer, address))
                        racing.cancel_scope.cancel()
                    except MeshError as error:
                        failures.append(error)
                        failed.set()

                for address in addresses:
                    failed = trio.Event()
                    racing.start_soon(attempt, address, failed)
                    with trio.move_on_after(DIAL_STAGGER_S):
                        await failed.wait()
            if won and self._work is not None:
                await self._work.start(self._keep, won.pop(0))
                return
        finally:
            for connection in won:
                connection.muxer.end()
        self._counters["dials_failed"] += 1
        for failure in failures:
            if isinstance(failure, PeerFault):
                raise failure
        reasons = "; ".join(failure.message for failure in failures) or "no address of it is known"
        raise Unavailable(f"cannot reach {peer}: {reasons}")

    async def _reach(self, peer: NodeId, address: str) -> _Connection:
        try:
            host, port = multiaddrs.parse(address)
            peer_id = ID(_peer_id_bytes(peer))
            socket = await trio.open_tcp_stream(host, port)
        except (OSError, InvalidRequest) as error:
            raise Unavailable(f"{address}: {error}") from error
        wire = _Wire(socket, is_initiator=True)
        try:
            await _select(wire, NOISE)
            secured = await self._noise.secure_outbound(wire, peer_id)
            await _select(secured, YAMUX)
            return _Connection(peer, _Muxer(secured, peer_id, wire), is_inbound=False)
        except PeerIDMismatchesPubkey as error:
            wire.abort()
            raise PeerFault(f"another node than {peer} answers at {address}") from error
        except Exception as error:
            wire.abort()
            raise Unavailable(f"{address}: {type(error).__name__}") from error
        except BaseException:
            wire.abort()
            raise

    async def _accept(self, socket: trio.SocketStream) -> None:
        wire = _Wire(socket, is_initiator=False)
        try:
            connection = await self._greet(wire)
            if connection is not None:
                await self._keep(connection)
        except Exception as error:
            # Whatever a stranger may send: it costs this connection and nothing else.
            self._counters["handshakes_failed"] += 1
            self._log.debug("handshake.failed", error=repr(error)[:200])
        finally:
            wire.abort()

    async def _greet(self, wire: _Wire) -> _Connection | None:
        if len(self._handshakes) >= HANDSHAKES_MAX:
            next(iter(self._handshakes)).cancel()
        with trio.move_on_after(HANDSHAKE_S) as patience:
            self._handshakes[patience] = None
            try:
                await _select(wire, NOISE)
                secured = await self._noise.secure_inbound(wire)
                await _select(secured, YAMUX)
            finally:
                del self._handshakes[patience]
            peer_id = secured.get_remote_peer()
            peer = NodeId(str(peer_id))
            public_bytes(peer)  # a key of another kind has no place here
            if peer == self._me:
                return None
            return _Connection(peer, _Muxer(secured, peer_id, wire), is_inbound=True)
        self._counters["handshakes_failed"] += 1
        return None

    async def _keep(
        self, connection: _Connection, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Own one connection from its handshake to its end; nothing of it is left behind."""
        peer, muxer = connection.peer, connection.muxer
        self._add(connection)
        task_status.started()
        try:
            async with trio.open_nursery() as tasks:

                async def pump() -> None:
                    await muxer.start()
                    tasks.cancel_scope.cancel()

                try:
                    tasks.start_soon(pump)
                    tasks.start_soon(muxer.write_control)
                    if connection.is_inbound and self._is_stranger(peer):
                        self._admit_stranger(connection, tasks)
                    while True:
                        stream = await muxer.accept_stream()
                        assert isinstance(stream, YamuxStream)
                        self._answer_soon(connection, stream)
                finally:
                    muxer.end()  # before the tasks are waited for: one may be in the middle of a frame
        except* (MuxedConnError, IOException):
            pass  # that is how connections end
        except* Exception as group:
            self._counters["connections_failed"] += 1
            self._log.warning("connection.failed", peer=peer, error=repr(group.exceptions[0])[:200])
        finally:
            self._strangers.pop(connection, None)
            self._remove(connection)

    def _is_stranger(self, peer: NodeId) -> bool:
        return not any(self._gate(peer, protocol) for protocol in self._handlers if protocol != JOIN_PROTOCOL)

    def _admit_stranger(self, connection: _Connection, tasks: trio.Nursery) -> None:
        async def see_off() -> None:
            await trio.sleep(STRANGER_S)
            if self._is_stranger(connection.peer):
                self._counters["strangers_closed"] += 1
                self._remove(connection)

        if len(self._strangers) >= STRANGERS_MAX:
            self._counters["strangers_closed"] += 1
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            self._remove(oldest)
        self._strangers[connection] = None
        connection.muxer.buffered_bytes_max = BUFFERED_BYTES_OF_STRANGER_MAX
        tasks.start_soon(see_off)

    def _add(self, connection: _Connection) -> None:
        known = self._connections.setdefault(connection.peer, [])
        known.append(connection)
        if len(known) > CONNECTIONS_PER_PEER_MAX:
            self._remove(known[0])
        if len(known) == 1:
            self._events.peer_up(connection.peer)

    def _remove(self, connection: _Connection) -> None:
        connection.muxer.end()
        known = self._connections.get(connection.peer, [])
        if connection in known:
            known.remove(connection)
            if not known:
                del self._connections[connection.peer]
                self._events.peer_down(connection.peer)

    # --- streams -----------------------------------------------------------------------------------------------------

    async def open_stream(self, peer: NodeId, protocol: str, *, timeout_s: float) -> Stream:
        with trio.move_on_after(timeout_s):
            if peer not in self._connections:
                await self.connect(peer, self._book(peer), timeout_s=timeout_s)
            connections = self._connections.get(peer)
            if not connections:
                raise Unavailable(f"the connection to {peer} was lost")
            # The newest: an older one may be dead without anybody having noticed.
            muxer = connections[-1].muxer
            try:
                stream = _Stream(peer, muxer, await muxer.open_stream(), self._soon)
            except (IOException, MuxedStreamError) as error:
                raise Unavailable(f"the connection to {peer} was lost") from error
            try:
                return await self._ask(stream, protocol)
            except BaseException:
                stream.reset()
                raise
        raise Unavailable(f"{peer} did not open a stream within {timeout_s:g} s")

    async def _ask(self, stream: _Stream, protocol: str) -> _Stream:
        client, communicator = MultiselectClient(), MultiselectCommunicator(stream)  # type: ignore[arg-type]
        try:
            await client.handshake(communicator)
            await client.try_select(communicator, protocol)  # type: ignore[arg-type]
        except ProtocolNotSupportedError as error:
            raise NotAllowed(f"{stream.peer} does not let {self._me} speak {protocol}") from error
        except MeshError:
            raise
        except Exception as error:
            raise Unavailable(f"{stream.peer} did not agree on {protocol}: {type(error).__name__}") from error
        return stream

    def _answer_soon(self, connection: _Connection, yamux: YamuxStream) -> None:
        stream = _Stream(connection.peer, connection.muxer, yamux, self._soon)
        streams_max = STREAMS_OF_STRANGER_MAX if connection in self._strangers else STREAMS_MAX
        if connection.streams_answered >= streams_max or self._work is None:
            self._counters["streams_refused"] += 1
            stream.reset()
            return
        connection.streams_answered += 1
        self._work.start_soon(self._answer, connection, stream)

    async def _answer(self, connection: _Connection, stream: _Stream) -> None:
        try:
            handler = await self._negotiate(stream)
            if handler is None:
                self._counters["streams_refused"] += 1
                stream.reset()
            else:
                await handler(stream)
        except Exception as error:
            self._counters["handlers_failed"] += 1
            self._log.warning("stream.failed", peer=stream.peer, error=repr(error)[:200])
            stream.reset()
        finally:
            connection.streams_answered -= 1
            await stream.aclose()

    async def _negotiate(self, stream: _Stream) -> StreamHandler | None:
        """What the peer asks for; it is offered only what the gate lets it speak."""
        offered: Any = {
            protocol: each for protocol, each in self._handlers.items() if self._gate(stream.peer, protocol)
        }
        with trio.move_on_after(HANDSHAKE_S):
            try:
                _, handler = await Multiselect(offered).negotiate(MultiselectCommunicator(stream))  # type: ignore[arg-type]
            except Exception:
                return None  # it took no for an answer, or sent garbage
            return handler  # type: ignore[return-value]
        return None

    def _soon(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do it without making anybody wait, for a stream that may be gone."""

        async def guarded() -> None:
            # If the connection is lost, so is what was to be said.
            with suppress(IOException, MuxedStreamError, MuxedConnError):
                await work()

        if self._work is not None:
            self._work.start_soon(guarded)


class _Connection:
    """A peer, authenticated, and its streams."""

    def __init__(self, peer: NodeId, muxer: _Muxer, *, is_inbound: bool) -> None:
        self.peer = peer
        self.muxer = muxer
        self.is_inbound = is_inbound
        self.streams_answered = 0


class _Wire(IRawConnection):
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


class _Muxer(Yamux):
    """Yamux, with its writes made safe to cancel and its memory bounded."""

    def __init__(self, secured: ISecureConn, peer_id: ID, wire: _Wire) -> None:
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


class _Stream:
    """ports.Stream on one yamux stream."""

    def __init__(
        self,
        peer: NodeId,
        muxer: _Muxer,
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


async def _listen(address: str) -> list[trio.SocketListener]:
    host, port = multiaddrs.parse(address)
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartRefused(
                f"port {port} at {host} is in use by another program", hint="stop it, or choose another with --listen"
            ) from error
        raise StartRefused(f"cannot listen at {address}: {error.strerror or error}") from error


async def _select(conn: _Wire | ISecureConn, protocol: str) -> None:
    """Agree on the next layer with multistream-select, as whichever side this is."""
    communicator = MultiselectCommunicator(conn)
    if conn.is_initiator:
        client = MultiselectClient()
        await client.handshake(communicator)
        await client.try_select(communicator, protocol)  # type: ignore[arg-type]
    else:
        await Multiselect({protocol: None}).negotiate(communicator)  # type: ignore[dict-item]


def _peer_id_bytes(peer: NodeId) -> bytes:
    return bytes.fromhex("002408011220") + public_bytes(peer)
