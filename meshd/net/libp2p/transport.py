"""The Transport port: connections accepted, dialled, kept and closed.

accept ──▶ handshake (10 s, 128 at a time) ──▶ stranger ──15 s──▶ closed
                  ▲                              │ the gate lets it speak more than join
dial ──────── pinned key ──────────────────▶ connected ──▶ streams, each asked of the gate
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import structlog
import trio
from libp2p.abc import ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.io.exceptions import IOException, MessageTooLarge
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import ProtocolNotSupportedError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX

from meshd.errors import InvalidRequest, MeshError, NotAllowed, PeerFault, StartRefused, Unavailable
from meshd.model import NodeId
from meshd.net import addresses as multiaddrs
from meshd.net.identity_key import KeyPair, public_bytes
from meshd.net.libp2p.muxer import STREAMS_MAX, Muxer
from meshd.net.libp2p.stream import MuxedStream
from meshd.net.libp2p.wire import Wire, established
from meshd.ports import AddressBook, Gate, PeerEvents, Stream, StreamHandler

JOIN_PROTOCOL = "/meshd/join/1"
MEMBERS_PROTOCOL = "/meshd/blob/1"
"""Whom the gate does not let speak this is a stranger: the join desk and the greeting of calls are for anyone. Asked by name, since a
node that is starting does not serve it yet."""

HANDSHAKE_S = 10.0
"""TCP accept to yamux, on a busy machine. Also for negotiating a stream."""

NEGOTIATED_BYTES_MAX = 1024
"""One message of a negotiation: the name of a protocol. py-libp2p takes a length of 2^64 and keeps what comes."""

HANDSHAKES_MAX = 128
"""Inbound and unfinished; past it the oldest goes, since a true peer's takes 30 ms."""

STRANGERS_MAX = 64
"""Inbound connections of peers that may only join and greet; past it the oldest goes."""

STRANGER_S = 15.0
"""To join in. Joining takes one commit of the log."""

CONNECTIONS_PER_PEER_MAX = 4
"""Two are usual after a simultaneous dial, and tolerated: to close one would race with the peer closing the other."""

STREAMS_OF_STRANGER_MAX = 4

DIAL_STAGGER_S = 0.25
"""Head start of each address over the next one (RFC 8305 says 250 ms)."""

ADDRESSES_MAX = 16
"""Dialled for one peer."""

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

    async def drop(self, peer: NodeId, *, age_s: float = 0.0) -> None:
        for connection in list(self._connections.get(peer, ())):
            if trio.current_time() - connection.made_at >= age_s:
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
        except (OSError, InvalidRequest, ValueError) as error:  # a name that no resolver takes is a ValueError
            raise Unavailable(f"{address}: {error}") from error
        wire = Wire(socket, is_initiator=True)
        try:
            await _select(wire, NOISE)
            secured = await self._noise.secure_outbound(wire, peer_id)
            await _select(secured, YAMUX)
            return _Connection(peer, _muxer_on(secured, peer, wire), is_inbound=False)
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
        await self._welcome(Wire(socket, is_initiator=False))

    async def _welcome(self, wire: Wire) -> None:
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

    async def _greet(self, wire: Wire) -> _Connection | None:
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
            peer = NodeId(str(secured.get_remote_peer()))
            public_bytes(peer)  # a key of another kind has no place here
            if peer == self._me:
                return None
            return _Connection(peer, _muxer_on(secured, peer, wire), is_inbound=True)
        self._counters["handshakes_failed"] += 1
        return None

    async def _keep(
        self, connection: _Connection, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Own one connection from its handshake to its end; nothing of it is left behind."""
        peer, muxer = connection.peer, connection.muxer
        muxer.on_opened = partial(self._answer_soon, connection)
        self._add(connection)
        task_status.started()
        try:
            async with trio.open_nursery() as tasks:
                try:
                    tasks.start_soon(muxer.write_out)
                    tasks.start_soon(muxer.see_off)
                    if connection.is_inbound and self._is_stranger(peer):
                        self._admit_stranger(connection, tasks)
                    await muxer.pump()
                finally:
                    muxer.end()
        except* IOException:
            pass  # that is how connections end
        except* Exception as group:
            self._counters["connections_failed"] += 1
            self._log.warning("connection.failed", peer=peer, error=repr(group.exceptions[0])[:200])
        finally:
            self._strangers.pop(connection, None)
            self._remove(connection)

    def _is_stranger(self, peer: NodeId) -> bool:
        return not self._gate(peer, MEMBERS_PROTOCOL)

    def _is_strangers(self, connection: _Connection) -> bool:
        """Judged anew each time: many a newcomer is known a moment after it connected, and stays on that connection."""
        if connection in self._strangers and not self._is_stranger(connection.peer):
            del self._strangers[connection]
        return connection in self._strangers

    def _admit_stranger(self, connection: _Connection, tasks: trio.Nursery) -> None:
        async def see_off() -> None:
            await trio.sleep(STRANGER_S)
            if self._is_strangers(connection):
                self._counters["strangers_closed"] += 1
                self._remove(connection)

        if len(self._strangers) >= STRANGERS_MAX:
            strangers = [each for each in list(self._strangers) if self._is_strangers(each)]
            if len(strangers) >= STRANGERS_MAX:
                self._counters["strangers_closed"] += 1
                del self._strangers[strangers[0]]
                self._remove(strangers[0])
        self._strangers[connection] = None
        connection.muxer.is_strangers = partial(self._is_strangers, connection)
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
                stream = muxer.open_stream()
            except IOException as error:
                raise Unavailable(f"the connection to {peer} was lost") from error
            try:
                return await self._ask(stream, protocol)
            except BaseException:
                stream.reset()
                raise
        raise Unavailable(f"{peer} did not open a stream within {timeout_s:g} s")

    async def _ask(self, stream: MuxedStream, protocol: str) -> MuxedStream:
        client, communicator = MultiselectClient(), _negotiation(stream)
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

    def _answer_soon(self, connection: _Connection, stream: MuxedStream) -> None:
        streams_max = STREAMS_OF_STRANGER_MAX if self._is_strangers(connection) else STREAMS_MAX
        if connection.streams_answered >= streams_max or self._work is None:
            self._counters["streams_refused"] += 1
            stream.reset()
            return
        connection.streams_answered += 1
        self._work.start_soon(self._answer, connection, stream)

    async def _answer(self, connection: _Connection, stream: MuxedStream) -> None:
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

    async def _negotiate(self, stream: MuxedStream) -> StreamHandler | None:
        """What the peer asks for; it is offered only what the gate lets it speak."""
        offered: Any = {
            protocol: each for protocol, each in self._handlers.items() if self._gate(stream.peer, protocol)
        }
        with trio.move_on_after(HANDSHAKE_S):
            try:
                _, handler = await Multiselect(offered).negotiate(_negotiation(stream))
            except Exception:
                return None  # it took no for an answer, or sent garbage
            return handler  # type: ignore[return-value]
        return None


class _Connection:
    """A peer, authenticated, and its streams."""

    def __init__(self, peer: NodeId, muxer: Muxer, *, is_inbound: bool) -> None:
        self.peer = peer
        self.muxer = muxer
        self.is_inbound = is_inbound
        self.made_at = trio.current_time()
        self.streams_answered = 0


class _Layer(Protocol):
    """What multistream-select is spoken on."""

    async def read(self, n: int, /) -> bytes: ...
    async def write(self, data: bytes, /) -> None: ...


class _Terse:
    """The layer below, for a negotiation: a message that is too long is refused by its length."""

    def __init__(self, layer: _Layer) -> None:
        self._layer = layer
        self.write = layer.write

    async def read(self, n: int) -> bytes:
        if n > NEGOTIATED_BYTES_MAX:
            raise MessageTooLarge(f"a message of {n} bytes is over the limit of {NEGOTIATED_BYTES_MAX}")
        return await self._layer.read(n)


def _negotiation(layer: _Layer) -> MultiselectCommunicator:
    return MultiselectCommunicator(_Terse(layer))  # type: ignore[arg-type]


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


async def _select(conn: Wire | ISecureConn, protocol: str) -> None:
    """Agree on the next layer with multistream-select, as whichever side this is."""
    communicator = _negotiation(conn)
    if conn.is_initiator:
        client = MultiselectClient()
        await client.handshake(communicator)
        await client.try_select(communicator, protocol)  # type: ignore[arg-type]
    else:
        await Multiselect({protocol: None}).negotiate(communicator)  # type: ignore[dict-item]


def _muxer_on(secured: ISecureConn, peer: NodeId, wire: Wire) -> Muxer:
    cipher, received = established(secured)
    return Muxer(peer, wire, cipher, received=received)


def _peer_id_bytes(peer: NodeId) -> bytes:
    return bytes.fromhex("002408011220") + public_bytes(peer)
