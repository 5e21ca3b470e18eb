"""What every Transport promises, asked of the one in memory and of the one on libp2p alike."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from meshd.errors import MeshError, NotAllowed, PeerFault, Unavailable
from meshd.model import NodeId
from meshd.net.identity_key import KeyPair
from meshd.net.libp2p import Libp2pTransport
from meshd.net.memory import MemoryNetwork
from meshd.ports import Stream, Transport

ECHO, SINK, TRIP, SECRET, DEAF = "/test/echo", "/test/sink", "/test/trip", "/test/secret", "/test/deaf"


@dataclass
class Node:
    transport: Any
    events: list[str] = field(default_factory=list)
    heard: list[bytes] = field(default_factory=list)
    lost: list[Exception] = field(default_factory=list)

    @property
    def id(self) -> NodeId:
        return NodeId(self.transport.me)

    def peer_up(self, peer: NodeId) -> None:
        self.events.append("up")

    def peer_down(self, peer: NodeId) -> None:
        self.events.append("down")


class World:
    """Nodes that know each other's addresses and answer the test protocols."""

    def __init__(self, kind: str, nursery: trio.Nursery) -> None:
        self.kind = kind
        self.nursery = nursery
        self.network = MemoryNetwork()
        self.known: dict[NodeId, list[str]] = {}

    async def node(self) -> Node:
        node = Node(None)

        def gate(_peer: NodeId, protocol: str) -> bool:
            return protocol != SECRET

        def book(peer: NodeId) -> list[str]:
            return self.known.get(peer, [])

        key = KeyPair.generate()
        if self.kind == "memory":
            node.transport = self.network.transport(key.node_id, gate, book, node)
        else:
            node.transport = Libp2pTransport(key, ["/ip4/127.0.0.1/tcp/0"], gate=gate, book=book, events=node)

        async def echo(stream: Stream) -> None:
            while data := await stream.read(65536):
                await stream.write(data)

        async def sink(stream: Stream) -> None:
            try:
                while data := await stream.read(65536):
                    node.heard.append(data)
            except MeshError as error:
                node.lost.append(error)

        async def trip(stream: Stream) -> None:
            raise KeyError("bug")

        async def deaf(stream: Stream) -> None:
            await trio.sleep_forever()

        for protocol, handler in ((ECHO, echo), (SINK, sink), (TRIP, trip), (SECRET, echo), (DEAF, deaf)):
            node.transport.handle(protocol, handler)
        await self.nursery.start(node.transport.serve)
        self.known[node.id] = list(node.transport.addresses)
        return node


@pytest.fixture(params=["memory", "libp2p"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def world(kind: str) -> AsyncIterator[World]:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            yield World(kind, nursery)
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], within_s: float = 5) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.01)


async def read_all(stream: Stream) -> bytes:
    data = b""
    while piece := await stream.read(65536):
        data += piece
    return data


async def test_connect_makes_one_connection_that_both_ends_see(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        await a.transport.connect(b.id, b.transport.addresses, timeout_s=5)
        await a.transport.connect(b.id, b.transport.addresses, timeout_s=5)
        await until(lambda: b.events == ["up"])
        assert a.transport.connected() == {b.id} and b.transport.connected() == {a.id}
        assert a.events == ["up"]


async def test_bytes_come_back_whole_and_in_order_and_end_with_the_end(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        stream = await a.transport.open_stream(b.id, ECHO, timeout_s=5)
        sent = os.urandom(3_000_000)
        got: list[bytes] = []

        async def collect() -> None:
            got.append(await read_all(stream))

        async with trio.open_nursery() as both:
            both.start_soon(collect)
            await stream.write(sent)
            await stream.close_write()
        assert got == [sent]
        assert await stream.read(10) == b""
        await stream.aclose()


async def test_both_ends_know_who_the_other_is(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        peers: list[NodeId] = []

        async def note(stream: Stream) -> None:
            peers.append(stream.peer)

        b.transport.handle("/test/note", note)
        stream = await a.transport.open_stream(b.id, "/test/note", timeout_s=5)
        await read_all(stream)
        assert (stream.peer, peers) == (b.id, [a.id])


async def test_what_was_written_before_aclose_arrives(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        stream = await a.transport.open_stream(b.id, SINK, timeout_s=5)
        await stream.write(b"x" * 100_000)
        await stream.aclose()
        await until(lambda: sum(map(len, b.heard)) == 100_000)
        assert b.lost == []
        with pytest.raises(Unavailable):
            await stream.write(b"more")


async def test_streams_open_in_both_directions_over_one_connection(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        await a.transport.open_stream(b.id, SINK, timeout_s=5)
        back = await b.transport.open_stream(a.id, ECHO, timeout_s=5)
        await back.write(b"hello")
        assert await back.read(10) == b"hello"
        assert (a.events, b.events) == (["up"], ["up"])


async def test_nobody_there_is_unavailable(kind: str) -> None:
    async with world(kind) as w:
        a = await w.node()
        nobody = KeyPair.generate().node_id
        nowhere = {"memory": ["/memory/nobody"], "libp2p": ["/ip4/127.0.0.1/tcp/1", "nonsense", "/ip4/x/tcp/1"]}[kind]
        with pytest.raises(Unavailable):
            await a.transport.connect(nobody, nowhere, timeout_s=3)
        with pytest.raises(Unavailable):
            await a.transport.connect(nobody, [], timeout_s=3)
        with pytest.raises(Unavailable):
            await a.transport.open_stream(nobody, ECHO, timeout_s=3)


async def test_another_key_at_the_address_is_a_peers_fault(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        with pytest.raises(PeerFault):
            await a.transport.connect(KeyPair.generate().node_id, b.transport.addresses, timeout_s=3)
        await a.transport.connect(b.id, b.transport.addresses, timeout_s=3)  # and that is not held against b


async def test_a_stale_address_before_the_good_one_does_no_harm(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        stale = {"memory": "/memory/gone", "libp2p": "/ip4/127.0.0.1/tcp/1"}[kind]
        await a.transport.connect(b.id, [stale, *b.transport.addresses], timeout_s=5)
        assert a.transport.connected() == {b.id}


async def test_nobody_connects_to_itself(kind: str) -> None:
    async with world(kind) as w:
        a = await w.node()
        with pytest.raises(PeerFault):
            await a.transport.connect(a.id, a.transport.addresses, timeout_s=3)


@pytest.mark.parametrize("protocol", [SECRET, "/test/unheard-of"])
async def test_the_gate_and_unknown_protocols_refuse_and_count(kind: str, protocol: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        with pytest.raises(NotAllowed):
            await a.transport.open_stream(b.id, protocol, timeout_s=5)
        await until(lambda: b.transport.counters().get("streams_refused") == 1)
        assert a.transport.connected() == {b.id}


async def test_a_bug_in_a_handler_resets_its_stream_and_nothing_else(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        good = await a.transport.open_stream(b.id, ECHO, timeout_s=5)
        bad = await a.transport.open_stream(b.id, TRIP, timeout_s=5)
        with pytest.raises(Unavailable):
            await read_all(bad)
        await good.write(b"still here")
        assert await good.read(100) == b"still here"
        assert b.transport.counters()["handlers_failed"] == 1


async def test_drop_ends_every_stream_at_both_ends_and_a_new_connection_can_be_made(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        stream = await a.transport.open_stream(b.id, ECHO, timeout_s=5)
        await a.transport.drop(b.id)
        assert a.transport.connected() == frozenset()
        with pytest.raises(Unavailable):
            await stream.read(10)
        with pytest.raises(Unavailable):
            await stream.write(b"x")
        await until(lambda: b.events == ["up", "down"])
        again = await a.transport.open_stream(b.id, ECHO, timeout_s=5)
        await again.write(b"again")
        assert await again.read(10) == b"again"
        assert a.events == ["up", "down", "up"]


async def test_a_reader_waiting_when_the_peer_is_dropped_hears_of_it(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        stream = await a.transport.open_stream(b.id, ECHO, timeout_s=5)
        async with trio.open_nursery() as both:

            async def read() -> None:
                with pytest.raises(Unavailable):
                    await stream.read(10)

            both.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await b.transport.drop(a.id)


async def test_a_cancelled_read_loses_no_byte(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        stream = await a.transport.open_stream(b.id, ECHO, timeout_s=5)
        sent, got = os.urandom(300_000), b""

        async def write() -> None:
            await stream.write(sent)
            await stream.close_write()

        async with trio.open_nursery() as both:
            both.start_soon(write)
            with trio.fail_after(10):
                while len(got) < len(sent):
                    with trio.move_on_after(0.0005):
                        got += await stream.read(1000)
        assert got == sent


async def test_a_writer_cancelled_in_the_middle_leaves_other_streams_alone(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()
        good = await a.transport.open_stream(b.id, ECHO, timeout_s=5)
        for _ in range(5):
            stuck = await a.transport.open_stream(b.id, DEAF, timeout_s=5)
            with trio.move_on_after(0.05) as patience:
                await stuck.write(bytes(64 << 20))
            assert patience.cancelled_caught
            await stuck.aclose()
        await good.write(b"fine")
        assert await good.read(100) == b"fine"


async def test_a_peer_that_leaves_is_seen_to_leave(kind: str) -> None:
    async with world(kind) as w:
        a = await w.node()
        async with trio.open_nursery() as short:
            w.nursery = short
            b = await w.node()
            await a.transport.connect(b.id, b.transport.addresses, timeout_s=5)
            short.cancel_scope.cancel()
        await until(lambda: a.events == ["up", "down"])
        with pytest.raises(Unavailable):
            await a.transport.open_stream(b.id, ECHO, timeout_s=3)


async def test_many_streams_at_once(kind: str) -> None:
    async with world(kind) as w:
        a, b = await w.node(), await w.node()

        async def round_trip(number: int) -> None:
            stream = await a.transport.open_stream(b.id, ECHO, timeout_s=10)
            await stream.write(b"%d" % number)
            await stream.close_write()
            assert await read_all(stream) == b"%d" % number
            await stream.aclose()

        for _ in range(3):  # over 256 in all: none may be left behind
            async with trio.open_nursery() as many:
                for number in range(100):
                    many.start_soon(round_trip, number)
        assert a.events == ["up"]


def test_both_are_transports() -> None:
    def check(_: type[Transport]) -> None: ...

    check(Libp2pTransport)
