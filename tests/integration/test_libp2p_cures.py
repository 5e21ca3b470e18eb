"""Each defect of py-libp2p 0.8.1 that would hurt a mesh, by its number in our notes, and that it is cured.

D1  an exception in a handler stops the host       D10  dialling is slow, remembers failures, trusts old addresses
D2  a dead connection stays "connected"            D11  a silent host costs a dial 120 s
D3  malformed gossip stops the host (not used)     D12  a cancelled dial leaks
D4  writers of one stream interleave               D13  two agents bind one port
D5  250 connections, then none                     D14  dialling oneself, dialling each other
D6  a cancelled write corrupts the connection      D15  stopping leaves sockets open
D7  a reader idle for 5 s resets the writer        D16  256 streams, then blocked for ever
D8  a stopped peer is never noticed                D17  idle connects shut out peers
D9  disconnecting hangs behind a blocked writer    D18  logging is taken over     D19  it dials by itself
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

from meshd.errors import Busy, MeshError, PeerFault, StartRefused, Unavailable
from meshd.model import NodeId
from meshd.net.addresses import parse, reachable
from meshd.net.identity_key import KeyPair
from meshd.net.libp2p import JOIN_PROTOCOL, Libp2pTransport
from meshd.net.libp2p import muxer as of_muxer
from meshd.net.libp2p import stream as of_stream
from meshd.net.libp2p import transport as of_transport
from meshd.net.libp2p.wire import Wire
from meshd.net.rpc import PROTOCOL as RPC_PROTOCOL
from meshd.net.rpc import StreamRpc
from meshd.ports import Stream

ECHO, DEAF, SINK = "/test/echo", "/test/deaf", "/test/sink"


@dataclass
class Node:
    """A transport that lets everyone speak everything, unless `members` says who may."""

    key: KeyPair = field(default_factory=KeyPair.generate)
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    members: set[NodeId] | None = None
    events: list[str] = field(default_factory=list)
    known: dict[NodeId, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.transport = Libp2pTransport(
            self.key, self.listen, gate=self.admits, book=lambda peer: self.known.get(peer, []), events=self
        )
        self.transport.handle(ECHO, echo)
        self.transport.handle(DEAF, deaf)
        self.transport.handle(JOIN_PROTOCOL, echo)

    @property
    def id(self) -> NodeId:
        return self.key.node_id

    @property
    def port(self) -> int:
        return parse(self.transport.addresses[0]).port

    def admits(self, peer: NodeId, protocol: str) -> bool:
        return self.members is None or peer in self.members or protocol == JOIN_PROTOCOL

    def peer_up(self, peer: NodeId) -> None:
        self.events.append("up")

    def peer_down(self, peer: NodeId) -> None:
        self.events.append("down")

    def knows(self, other: Node) -> None:
        self.known[other.id] = list(other.transport.addresses)


async def echo(stream: Stream) -> None:
    while data := await stream.read(65536):
        await stream.write(data)


async def deaf(stream: Stream) -> None:
    await trio.sleep_forever()


@asynccontextmanager
async def running(*nodes: Node, within_s: float = 25) -> AsyncIterator[trio.Nursery]:
    with trio.fail_after(within_s):
        async with trio.open_nursery() as nursery:
            for node in nodes:
                await nursery.start(node.transport.serve)
            for node in nodes:
                for other in nodes:
                    if other is not node:
                        node.knows(other)
            yield nursery
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], within_s: float = 5) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.01)


async def ask(node: Node, peer: Node, data: bytes = b"ping", protocol: str = ECHO) -> bytes:
    stream = await node.transport.open_stream(peer.id, protocol, timeout_s=5)
    try:
        await stream.write(data)
        return await stream.read(len(data))
    finally:
        await stream.aclose()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def tasks() -> int:
    count, todo = 0, [trio.lowlevel.current_root_task()]
    while todo:
        task = todo.pop()
        if task is not None:
            count += 1
            todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return count


@pytest.mark.parametrize(
    "bug", [RuntimeError("bug"), KeyError("bug"), EOFError("bug"), ExceptionGroup("bugs", [OSError()])]
)
async def test_d1_d2_whatever_escapes_a_handler_costs_its_stream_only(bug: Exception) -> None:
    async def trip(_stream: Stream) -> None:
        raise bug

    a, b = Node(), Node()
    b.transport.handle("/test/trip", trip)
    async with running(a, b):
        stream = await a.transport.open_stream(b.id, "/test/trip", timeout_s=5)
        with pytest.raises(Unavailable):
            await stream.read(10)
        assert await ask(a, b) == b"ping"
        assert (a.events, b.events) == (["up"], ["up"])


async def test_d4_messages_of_two_writers_do_not_interleave() -> None:
    a, b = Node(), Node()
    messages = [bytes([n]) * 400_000 for n in range(4)]
    async with running(a, b):
        stream = await a.transport.open_stream(b.id, ECHO, timeout_s=5)
        async with trio.open_nursery() as writers:
            for message in messages:
                writers.start_soon(stream.write, message)
            back = b""
            while len(back) < sum(map(len, messages)):
                back += await stream.read(1 << 20)
        assert sorted(back[at : at + 400_000] for at in range(0, len(back), 400_000)) == messages


async def test_d5_three_hundred_connections_come_and_go_without_refusal_or_leak() -> None:
    """The library refuses every inbound connection after its 250th."""
    hub, peer = Node(), Node()
    async with running(hub, peer, within_s=40):

        async def visit(times: int) -> None:
            for _ in range(times):
                assert await ask(peer, hub) == b"ping"
                await peer.transport.drop(hub.id)
            await until(lambda: not hub.transport.connected())
            await trio.sleep(0.1)
            gc.collect()

        def memory() -> int:
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize()

        await visit(40)  # caches fill
        files, running_tasks, before = open_files(), tasks(), memory()
        await visit(300)
        assert (open_files(), tasks()) == (files, running_tasks)
        assert (memory() - before) / 300 < 10_000


async def test_d6_a_write_cancelled_within_a_frame_does_not_corrupt_the_connection() -> None:
    """The socket is made to take only a few bytes, so that the cancel surely hits half a frame."""
    a, b = Node(), Node()
    async with running(a, b):
        good = await a.transport.open_stream(b.id, ECHO, timeout_s=5)
        stuck = await a.transport.open_stream(b.id, DEAF, timeout_s=5)
        wire = a.transport._connections[b.id][0].muxer._wire
        send_now, wait_sendable, halfway = wire.send_now, wire.wait_sendable, trio.Event()

        async def wait_a_little() -> None:
            halfway.set()
            await trio.sleep(0.2)
            await wait_sendable()

        wire.send_now = lambda data: send_now(data[:100])  # type: ignore[method-assign]
        wire.wait_sendable = wait_a_little  # type: ignore[method-assign]
        async with trio.open_nursery() as cancelled:
            cancelled.start_soon(stuck.write, bytes(200_000))
            await halfway.wait()
            cancelled.cancel_scope.cancel()
        wire.send_now, wire.wait_sendable = send_now, wait_sendable  # type: ignore[method-assign]
        await good.write(b"still in step")
        assert await good.read(100) == b"still in step"


async def test_d7_a_reader_that_is_idle_for_six_seconds_still_gets_every_byte() -> None:
    """The library resets the writer after 5 s with a full window, and does not tell the reader."""
    a, b = Node(), Node()
    sent = os.urandom(1_000_000)
    async with running(a, b):
        got: list[bytes] = []

        async def idle(stream: Stream) -> None:
            await trio.sleep(6)
            while data := await stream.read(65536):
                got.append(data)

        b.transport.handle("/test/idle", idle)
        stream = await a.transport.open_stream(b.id, "/test/idle", timeout_s=5)
        await stream.write(sent)
        await stream.close_write()
        assert await stream.read(1) == b""
        assert b"".join(got) == sent


async def test_d7_a_peer_that_never_reads_is_unavailable_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_stream, "WRITE_DEADLINE_S", 0.5)
    a, b = Node(), Node()
    async with running(a, b):
        stream = await a.transport.open_stream(b.id, DEAF, timeout_s=5)
        with pytest.raises(Unavailable, match="did not read"):
            await stream.write(bytes(10_000_000))
        assert await ask(a, b) == b"ping"


async def test_d9_drop_returns_at_once_behind_a_writer_that_is_blocked_in_the_socket() -> None:
    a = Node()
    async with running(a) as nursery, stopped_peer(nursery) as (peer, address):
        await a.transport.connect(peer, [address], timeout_s=5)
        muxer = a.transport._connections[peer][0].muxer
        failed: list[str] = []

        async def write() -> None:
            try:
                while True:
                    await muxer.wait_room()
                    muxer.put_bytes(bytes(65000))
            except Exception as error:
                failed.append(type(error).__name__)

        nursery.start_soon(write)
        await until(lambda: not muxer.has_room)
        await trio.sleep(0.3)  # the socket's buffers are full by now, or soon
        began_at = time.monotonic()
        await a.transport.drop(peer)
        assert time.monotonic() - began_at < 0.5
        assert a.transport.connected() == frozenset()
        await until(lambda: failed == ["ConnectionClosedError"])


@asynccontextmanager
async def stopped_peer(nursery: trio.Nursery) -> AsyncIterator[tuple[NodeId, str]]:
    """A node that answers the handshake and then reads nothing more."""
    node = Node()
    await nursery.start(node.transport.serve)

    async def read_nothing(_self: object) -> None:
        await trio.sleep_forever()

    accept = node.transport._keep

    async def keep(connection: of_transport._Connection, **_: object) -> None:
        connection.muxer.pump = read_nothing.__get__(connection.muxer)  # type: ignore[method-assign]
        await accept(connection)

    node.transport._keep = keep  # type: ignore[method-assign, assignment]
    yield node.id, node.transport.addresses[0]


async def test_d8_a_peer_that_stops_answering_is_dropped_and_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process, or a cut wire, keeps its connections open: only pings tell."""
    monkeypatch.setattr("meshd.net.rpc.PING_INTERVAL_S", 0.3)
    a, b = Node(), Node()
    async with running(a, b) as nursery:
        of_a, of_b = StreamRpc(a.transport), StreamRpc(b.transport)
        for rpc in (of_a, of_b):
            rpc.register("echo", answer)
            await nursery.start(rpc.serve)
        assert await of_a.call(b.id, "echo", b"1", timeout_s=5) == b"1"
        assert await of_b.call(a.id, "echo", b"1", timeout_s=5) == b"1"
        fall_silent(b.transport._connections[a.id][0].muxer._wire)
        stopped_at = time.monotonic()
        await until(lambda: a.events == ["up", "down"])
        assert time.monotonic() - stopped_at < 4 * 0.3 + 1
        assert await of_a.call(b.id, "echo", b"2", timeout_s=5) == b"2"
        await until(lambda: of_b.counters().get("peers_silent") == 1)  # its own stream on the old connection
        assert await of_a.call(b.id, "echo", b"3", timeout_s=5) == b"3"
        assert a.events == ["up", "down", "up"]


async def test_d8_a_connection_made_since_the_silence_is_spared_by_the_drop() -> None:
    a, b = Node(), Node()
    async with running(a, b):
        await a.transport.connect(b.id, b.transport.addresses, timeout_s=5)
        await trio.sleep(0.3)
        await a.transport._dial(b.id, b.transport.addresses)
        assert len(a.transport._connections[b.id]) == 2
        await a.transport.drop(b.id, age_s=0.25)
        assert len(a.transport._connections[b.id]) == 1
        assert await ask(a, b) == b"ping"
        assert a.events == ["up"]


async def answer(_peer: NodeId, body: bytes) -> bytes:
    return body


def fall_silent(wire: Wire) -> None:
    """It says nothing more, still hears, and does not hear when the other end closes."""
    hear = wire.receive

    async def until_closed_here() -> None:
        while wire._socket.socket.fileno() != -1:
            await trio.sleep(0.01)
        raise ConnectionClosedError("closed here")

    async def receive() -> bytes:
        try:
            return await hear()
        except ConnectionClosedError:
            await until_closed_here()
            raise

    wire.send_now, wire.wait_sendable, wire.receive = lambda _data: 0, until_closed_here, receive  # type: ignore[method-assign]


async def test_d10_a_dial_takes_milliseconds_and_no_failure_is_remembered() -> None:
    a, b = Node(), Node()
    async with running(a, b):
        with pytest.raises(Unavailable):
            await a.transport.connect(b.id, ["/ip4/127.0.0.1/tcp/1"], timeout_s=3)
        with pytest.raises(PeerFault):
            await a.transport.connect(KeyPair.generate().node_id, b.transport.addresses, timeout_s=3)
        took_s = []
        for _ in range(5):
            began_at = time.monotonic()
            await a.transport.connect(b.id, b.transport.addresses, timeout_s=3)
            took_s.append(time.monotonic() - began_at)
            await a.transport.drop(b.id)
        assert min(took_s) < 0.1


async def test_d10_a_peer_that_comes_back_on_another_port_is_reached_although_stale_addresses_stay_first() -> None:
    a, b = Node(), Node()
    async with running(a) as nursery:
        async with trio.open_nursery() as first_life:
            await first_life.start(b.transport.serve)
            stale = list(b.transport.addresses)
            await a.transport.connect(b.id, stale, timeout_s=5)
            first_life.cancel_scope.cancel()
        await until(lambda: not a.transport.connected())
        again = Node(key=b.key)
        await nursery.start(again.transport.serve)
        a.known[b.id] = [*stale, "/ip4/192.0.2.1/tcp/4001", *again.transport.addresses]
        began_at = time.monotonic()
        assert await ask(a, again) == b"ping"
        assert time.monotonic() - began_at < 2


async def test_d11_a_host_that_accepts_and_stays_silent_costs_a_dial_its_timeout_and_no_more() -> None:
    a, b = Node(), Node()
    async with running(a, b) as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, lambda _stream: trio.sleep_forever(), [listener])
        silent = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
        began_at = time.monotonic()
        with pytest.raises(Unavailable):
            await a.transport.connect(b.id, [silent], timeout_s=0.5)
        assert 0.4 < time.monotonic() - began_at < 1.5
        await a.transport.connect(b.id, [silent, *b.transport.addresses], timeout_s=2)


async def test_d12_cancelled_dials_leave_nothing_behind() -> None:
    a, b = Node(), Node()
    async with running(a, b) as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, lambda _stream: trio.sleep_forever(), [listener])
        silent = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
        files = open_files()
        for _ in range(20):
            with trio.move_on_after(0.02):
                await a.transport.connect(b.id, [silent], timeout_s=5)
        # The far ends of the 20 belong to the silent listener.
        assert open_files() <= files + 20
        assert a.transport._dialling == {}
        assert await ask(a, b) == b"ping"


async def test_d13_a_port_in_use_is_refused_at_once() -> None:
    a = Node()
    async with running(a):
        for host in ("127.0.0.1", "0.0.0.0"):
            second = Node(listen=(f"/ip4/{host}/tcp/{a.port}",))
            with pytest.raises(StartRefused, match="in use"):
                await second.transport.serve()


@pytest.mark.parametrize(
    "address", ["/ip4/192.0.2.1/tcp/0", "nonsense", "/ip4/127.0.0.1/udp/1", "/ip4/127.0.0.1/tcp/x"]
)
async def test_d13_an_address_that_cannot_be_listened_at_is_an_error(address: str) -> None:
    with pytest.raises(MeshError):
        await Node(listen=(address,)).transport.serve()


async def test_addresses_are_concrete() -> None:
    node = Node(listen=("/ip4/0.0.0.0/tcp/0",))
    async with running(node):
        assert all(parse(address).port == node.port > 0 for address in node.transport.addresses)
        assert "0.0.0.0" not in str(node.transport.addresses)
        assert node.transport.addresses[-1] == f"/ip4/127.0.0.1/tcp/{node.port}"
    assert reachable("::", 7)[-1] == "/ip6/::1/tcp/7"


async def test_d14_two_nodes_that_dial_each_other_at_once_stay_connected_without_flapping() -> None:
    a, b = Node(), Node()
    async with running(a, b):
        async with trio.open_nursery() as both:
            both.start_soon(ask, a, b)
            both.start_soon(ask, b, a)
        for _ in range(3):
            assert await ask(a, b) == b"ping"
            assert await ask(b, a) == b"ping"
        assert (a.events, b.events) == (["up"], ["up"])


async def test_d14_a_peer_may_have_a_few_connections_and_no_more() -> None:
    hub = Node()
    key = KeyPair.generate()
    clones = [Node(key=key) for _ in range(6)]
    async with running(hub, *clones):
        for clone in clones:
            await clone.transport.connect(hub.id, hub.transport.addresses, timeout_s=5)
        await until(lambda: len(hub.transport._connections[key.node_id]) <= of_transport.CONNECTIONS_PER_PEER_MAX)
        assert hub.events == ["up"]
        await until(lambda: clones[0].events == ["up", "down"])


async def test_d15_stopping_closes_every_socket_also_behind_a_blocked_writer() -> None:
    files = open_files()
    async with running(Node()) as nursery, stopped_peer(nursery) as (peer, address):
        a = Node()
        began_at = 0.0
        async with trio.open_nursery() as life:
            await life.start(a.transport.serve)
            await a.transport.connect(peer, [address], timeout_s=5)
            muxer = a.transport._connections[peer][0].muxer
            while muxer.has_room:
                muxer.put_bytes(bytes(65_000))
            await trio.sleep(0.3)
            began_at = time.monotonic()
            life.cancel_scope.cancel()
        assert time.monotonic() - began_at < 1
    assert open_files() == files


async def test_d16_a_stream_too_many_is_busy_at_once_and_closed_ones_make_room() -> None:
    a, b = Node(), Node()
    async with running(a, b):
        streams = []
        for _ in range(of_muxer.STREAMS_MAX):
            streams.append(await a.transport.open_stream(b.id, ECHO, timeout_s=5))
        with pytest.raises(Busy):
            await a.transport.open_stream(b.id, ECHO, timeout_s=5)
        for stream in streams:
            await stream.aclose()
        await until(lambda: a.transport._connections[b.id][0].muxer._opened == 0)
        assert await ask(a, b) == b"ping"
        await until(lambda: not b.transport._connections[a.id][0].muxer.streams)


async def test_d16_a_peer_that_opens_streams_without_end_is_refused_them() -> None:
    a, b = Node(), Node()
    async with running(a, b):
        assert await ask(a, b) == b"ping"
        muxer = a.transport._connections[b.id][0].muxer
        muxer._opened = -1000  # a does not count its own
        for _ in range(of_muxer.STREAMS_MAX + 50):
            muxer.open_stream()
        await until(lambda: b.transport.counters().get("streams_refused", 0) >= 50)
        assert b.transport._connections[a.id][0].streams_answered <= of_muxer.STREAMS_MAX


async def test_d16_a_stream_whose_peer_never_closes_its_side_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_muxer, "LINGER_S", 0.2)
    a, b = Node(), Node()
    async with running(a, b):
        stream = await a.transport.open_stream(b.id, DEAF, timeout_s=5)
        await stream.aclose()
        await until(lambda: not a.transport._connections[b.id][0].muxer.streams)


async def test_d17_half_open_connections_do_not_shut_out_a_peer_and_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_transport, "HANDSHAKE_S", 2.0)
    a, b = Node(), Node()
    async with running(a, b):
        idle = [socket.create_connection(("127.0.0.1", b.port)) for _ in range(200)]
        for each in idle:
            each.send(b"\x13")
        assert await ask(a, b) == b"ping"
        files = open_files()
        await until(lambda: b.transport.counters().get("handshakes_failed", 0) == 200, within_s=8)
        assert open_files() <= files - 120  # the rest were let go before
        for each in idle:
            each.close()


@pytest.mark.parametrize(
    "garbage",
    [
        os.urandom(4096),
        b"\x13/multistream/1.0.0\n\x07/noise\n" + os.urandom(2000),
        b"\xff\xff\xff\xff\x7f" + b"A" * 100_000,
        b"\x13/multistream/1.0.0\n\x04\xff\xff\xff\n",
        b"",
    ],
)
async def test_d17_garbage_instead_of_a_handshake_costs_its_connection_only(garbage: bytes) -> None:
    a, b = Node(), Node()
    async with running(a, b):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", b.port)) as one:
                one.sendall(garbage)
        assert await ask(a, b) == b"ping"
        await until(lambda: b.transport.counters().get("handshakes_failed", 0) == 10)


ENDLESS = b"\x80\x80\x80\x80\x80\x20"
"""The length of a negotiation's message of 2^40 bytes. The library keeps whatever then comes."""


async def test_a_negotiation_of_endless_length_ends_at_once_by_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_transport, "HANDSHAKE_S", 60)
    a, b = Node(), Node()
    async with running(a, b):
        async with await trio.open_tcp_stream("127.0.0.1", b.port) as stranger:
            await stranger.send_all(ENDLESS)
            with suppress(trio.BrokenResourceError):
                async for _ in stranger:
                    pass
        await a.transport.connect(b.id, b.transport.addresses, timeout_s=5)
        stream = a.transport._connections[b.id][0].muxer.open_stream()
        await stream.write(ENDLESS)
        with suppress(Unavailable):
            while await stream.read(100):
                pass


async def test_a_dial_ends_at_once_where_the_answer_is_of_endless_length() -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(ENDLESS)
        with suppress(trio.BrokenResourceError):
            async for _ in stream:
                pass

    a = Node()
    async with running(a) as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(trio.serve_tcp, answer, 0)
        port = listeners[0].socket.getsockname()[1]
        with trio.fail_after(5), pytest.raises(Unavailable, match="cannot reach"):
            await a.transport.connect(Node().id, [f"/ip4/127.0.0.1/tcp/{port}"], timeout_s=20)


async def test_garbage_after_the_handshake_costs_its_connection_only() -> None:
    a, b, good = Node(), Node(), Node()
    async with running(a, b, good):
        stream = await good.transport.open_stream(b.id, ECHO, timeout_s=5)
        for garbage in (os.urandom(1000), b"\0" * 12 + os.urandom(100), b"\0\0\0\1" + b"\xff" * 8):
            await a.transport.connect(b.id, b.transport.addresses, timeout_s=5)
            a.transport._connections[b.id][0].muxer.put_bytes(garbage)
            await trio.sleep(0.05)
            await a.transport.drop(b.id)
        await stream.write(b"alive")
        assert await stream.read(10) == b"alive"
        assert good.events == ["up"]


async def test_a_peer_that_ignores_its_windows_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_muxer, "BUFFERED_BYTES_MAX", 1 << 20)
    a, b = Node(), Node()
    async with running(a, b):
        stream = await a.transport.open_stream(b.id, DEAF, timeout_s=5)
        stream.send_window = 1 << 30  # type: ignore[attr-defined]
        with pytest.raises(Unavailable):
            await stream.write(bytes(20 << 20))
        await until(lambda: b.events == ["up", "down"])


async def test_a_stranger_may_join_for_a_while_and_speak_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_transport, "STRANGER_S", 0.5)
    stranger, member, b = Node(), Node(), Node(members=set())
    b.members = {member.id}
    async with running(stranger, member, b):
        assert await ask(member, b) == b"ping"
        assert await ask(stranger, b, protocol=JOIN_PROTOCOL) == b"ping"
        with pytest.raises(MeshError):
            await ask(stranger, b)
        await until(lambda: stranger.events == ["up", "down"])
        assert b.transport.connected() == {member.id}
        assert b.transport.counters()["strangers_closed"] == 1


async def test_who_has_joined_in_time_stays_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_transport, "STRANGER_S", 0.3)
    newcomer, b = Node(), Node(members=set())
    async with running(newcomer, b):
        assert await ask(newcomer, b, protocol=JOIN_PROTOCOL) == b"ping"
        b.members = {newcomer.id}
        await trio.sleep(0.5)
        assert await ask(newcomer, b) == b"ping"
        assert b.events == ["up"]


async def test_a_member_that_connects_while_a_node_starts_is_no_stranger() -> None:
    a, b = Node(), Node()
    b.transport._handlers.clear()
    b.transport.handle(RPC_PROTOCOL, echo)  # what members alone may speak is not served yet
    async with running(a, b):
        assert await ask(a, b, protocol=RPC_PROTOCOL) == b"ping"
        assert not b.transport._strangers


async def test_who_is_known_a_moment_after_it_connected_is_a_stranger_no_longer() -> None:
    """It greets a node that has not heard of it yet, and keeps that connection for its whole life."""
    newcomer, b = Node(), Node(members=set())
    async with running(newcomer, b):
        call = await newcomer.transport.open_stream(b.id, JOIN_PROTOCOL, timeout_s=5)
        b.members = {newcomer.id}
        for _ in range(2 * of_transport.STREAMS_OF_STRANGER_MAX):
            await newcomer.transport.open_stream(b.id, DEAF, timeout_s=3)
        assert await ask(newcomer, b) == b"ping"
        await call.write(b"still here")
        assert await call.read(100) == b"still here"
        assert (b.events, b.transport._strangers) == (["up"], {})


async def test_a_stranger_that_fills_memory_is_cut_off_and_who_is_known_by_then_is_not() -> None:
    newcomer, stranger, b = Node(), Node(), Node(members=set())
    b.transport.handle(JOIN_PROTOCOL, deaf)
    size = 2 * of_muxer.BUFFERED_BYTES_OF_STRANGER_MAX
    async with running(newcomer, stranger, b):

        async def fill(node: Node) -> None:
            stream = await node.transport.open_stream(b.id, JOIN_PROTOCOL, timeout_s=5)
            b.members = {newcomer.id}
            stream.send_window = 1 << 30  # type: ignore[attr-defined]
            await stream.write(bytes(size))

        await fill(newcomer)
        (connection,) = b.transport._connections[newcomer.id]
        await until(lambda: connection.muxer.bytes_unread == size)
        with suppress(Unavailable):
            await fill(stranger)
        await until(lambda: b.transport.connected() == {newcomer.id} and stranger.events == ["up", "down"])


async def test_who_is_a_stranger_no_longer_makes_no_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_transport, "STRANGERS_MAX", 1)
    newcomer, strangers, b = Node(), [Node(), Node()], Node(members=set())
    async with running(b, newcomer, *strangers):
        await newcomer.transport.connect(b.id, b.transport.addresses, timeout_s=5)
        await until(lambda: b.events == ["up"])
        b.members = {newcomer.id}
        for stranger in strangers:
            await stranger.transport.connect(b.id, b.transport.addresses, timeout_s=5)
        await until(lambda: strangers[0].events == ["up", "down"])
        assert b.transport.connected() == {newcomer.id, strangers[1].id}


async def test_strangers_are_few_and_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_transport, "STRANGERS_MAX", 2)
    b = Node(members=set())
    strangers = [Node() for _ in range(4)]
    async with running(b, *strangers):
        for stranger in strangers:
            await stranger.transport.connect(b.id, b.transport.addresses, timeout_s=5)
        assert await ask(strangers[-1], b, protocol=JOIN_PROTOCOL) == b"ping"
        await until(lambda: [s.events for s in strangers[:2]] == [["up", "down"]] * 2)
        assert len(b.transport.connected()) == 2


async def test_d18_the_library_writes_no_line_and_configures_no_logging(caplog: pytest.LogCaptureFixture) -> None:
    handlers = list(logging.getLogger().handlers)
    a, b = Node(), Node()
    async with running(a, b):
        with pytest.raises(Unavailable):
            await a.transport.connect(b.id, ["/ip4/127.0.0.1/tcp/1"], timeout_s=3)
        assert await ask(a, b) == b"ping"
        a.transport._connections[b.id][0].muxer._wire.abort()
        await until(lambda: not b.transport.connected())
    logging.getLogger("libp2p.stream_muxer").error("libp2p would say")
    assert logging.getLogger().handlers == handlers
    assert not [record for record in caplog.records if record.name.startswith("libp2p")]


async def test_d19_nobody_is_dialled_who_was_not_asked_for() -> None:
    a, b = Node(), Node()
    async with running(a, b):
        assert await ask(a, b) == b"ping"
        await a.transport.drop(b.id)
        await trio.sleep(0.5)
        assert (a.events, b.events) == (["up", "down"], ["up", "down"])


async def test_a_stock_libp2p_host_can_connect_and_speak() -> None:
    """What is on the wire is libp2p, whatever runs it here."""
    b = Node()
    async with running(b):
        host = new_host(key_pair=create_new_key_pair())
        async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            await host.connect(info_from_p2p_addr(Multiaddr(f"{b.transport.addresses[0]}/p2p/{b.id}")))
            stream = await host.new_stream(info_from_p2p_addr(Multiaddr(f"/p2p/{b.id}")).peer_id, [ECHO])  # type: ignore[list-item]
            await stream.write(b"hello")
            assert await stream.read(5) == b"hello"
            await host.close()
