"""Calls over real connections, some of them to a real other process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from meshd.errors import MeshError, NotAllowed, Unavailable, UnknownOutcome
from meshd.model import NodeId
from meshd.net.identity_key import KeyPair
from meshd.net.libp2p import Libp2pTransport
from meshd.net.rpc import PROTOCOL, StreamRpc
from meshd.ports import Stream

OTHER = """
import sys, trio
from tests.integration.test_net_rpc_libp2p import Node
async def main():
    async with trio.open_nursery() as nursery:
        node = Node()
        await node.start(nursery)
        print(node.id, node.transport.addresses[0], flush=True)
trio.run(main)
"""


class Node:
    """Answers `echo`; admits who greets with its word."""

    def __init__(self, word: bytes = b"member") -> None:
        self.key = KeyPair.generate()
        self.known: dict[NodeId, list[str]] = {}
        self.events: list[str] = []
        self.transport = Libp2pTransport(
            self.key,
            ["/ip4/127.0.0.1/tcp/0"],
            gate=lambda _peer, _protocol: True,
            book=lambda peer: self.known.get(peer, []),
            events=self,
        )
        self.word = word
        self.rpc = StreamRpc(self.transport, greeting=lambda: self.word, admit=self.admit)
        self.rpc.register("echo", self.echo)

    @property
    def id(self) -> NodeId:
        return self.key.node_id

    async def start(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.transport.serve)
        await nursery.start(self.rpc.serve)

    async def admit(self, peer: NodeId, greeting: bytes) -> None:
        if greeting != b"member":
            raise NotAllowed(f"{peer} is no member")

    async def echo(self, _peer: NodeId, body: bytes) -> bytes:
        return body

    def peer_up(self, peer: NodeId) -> None:
        self.events.append("up")

    def peer_down(self, peer: NodeId) -> None:
        self.events.append("down")


@asynccontextmanager
async def running(*nodes: Node, within_s: float = 25) -> AsyncIterator[trio.Nursery]:
    with trio.fail_after(within_s):
        async with trio.open_nursery() as nursery:
            for node in nodes:
                await node.start(nursery)
            for node in nodes:
                node.known |= {other.id: list(other.transport.addresses) for other in nodes}
            yield nursery
            nursery.cancel_scope.cancel()


async def test_calls_go_both_ways_while_bulk_bytes_do() -> None:
    a, b = Node(), Node()
    async with running(a, b) as nursery:

        async def swallow(stream: Stream) -> None:
            while await stream.read(1 << 20):
                pass

        for one, other in ((a, b), (b, a)):
            other.transport.handle("/test/bulk", swallow)
            bulk = await one.transport.open_stream(other.id, "/test/bulk", timeout_s=5)
            nursery.start_soon(bulk.write, bytes(200 << 20))
        slowest_s = 0.0
        for n in range(100):
            for one, other in ((a, b), (b, a)):
                began_at = time.monotonic()
                assert await one.rpc.call(other.id, "echo", b"%d" % n, timeout_s=5) == b"%d" % n
                slowest_s = max(slowest_s, time.monotonic() - began_at)
        assert slowest_s < 2.5  # far from looking silent
        assert (a.events, b.events) == (["up"], ["up"])


async def test_ten_thousand_calls_in_flight_are_all_answered() -> None:
    a, b = Node(), Node()
    async with running(a, b):
        answers: dict[int, bytes] = {}

        async def ask(first: int) -> None:
            for n in range(first, 10_000, 200):
                answers[n] = await a.rpc.call(b.id, "echo", b"%d" % n, timeout_s=20)

        async with trio.open_nursery() as many:
            for first in range(200):
                many.start_soon(ask, first)
        assert answers == {n: b"%d" % n for n in range(10_000)}


async def test_the_largest_bodies_go_through() -> None:
    a, b = Node(), Node()
    body = os.urandom(4_000_000)
    async with running(a, b):
        assert await a.rpc.call(b.id, "echo", body, timeout_s=10) == body


async def test_who_is_no_member_hears_so_and_its_connection_stays() -> None:
    a, b = Node(word=b"stranger"), Node()
    async with running(a, b):
        with pytest.raises(NotAllowed, match="is no member"):
            await a.rpc.call(b.id, "echo", b"", timeout_s=5)
        a.word = b"member"
        assert await a.rpc.call(b.id, "echo", b"joined", timeout_s=5) == b"joined"
        assert a.events == ["up"]


@pytest.mark.parametrize(
    "data", [os.urandom(1000), b"\xff\xff\xff\xff", b"\0\0\0\x0b\x93\0\xc3\xc4\6member" + b"\0\0\0\1\xc1"]
)
async def test_malformed_frames_reset_their_stream_and_leave_the_peers_other_streams(data: bytes) -> None:
    a, b = Node(), Node()
    async with running(a, b):
        a.word = b"member"
        assert await a.rpc.call(b.id, "echo", b"1", timeout_s=5) == b"1"
        other = Libp2pTransport(
            KeyPair.generate(), [], gate=lambda _p, _q: True, book=lambda p: a.known[p], events=Node()
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(other.serve)
            stream = await other.open_stream(b.id, PROTOCOL, timeout_s=5)
            with pytest.raises(MeshError):
                await _write_until_it_breaks(stream, data)
            nursery.cancel_scope.cancel()
        assert await a.rpc.call(b.id, "echo", b"2", timeout_s=5) == b"2"
        assert a.events == ["up"]
        assert b.rpc.counters() == {"frames_malformed": 1}


async def _write_until_it_breaks(stream: Stream, data: bytes) -> None:
    await stream.write(data)
    await stream.close_write()
    while await stream.read(1000):
        pass
    raise MeshError("the stream ended")


@asynccontextmanager
async def other_process() -> AsyncIterator[tuple[subprocess.Popen[str], NodeId, str]]:
    root = Path(__file__).parents[2]
    process = await trio.to_thread.run_sync(
        lambda: subprocess.Popen([sys.executable, "-c", OTHER], cwd=root, stdout=subprocess.PIPE, text=True)
    )
    try:
        assert process.stdout is not None
        line = await trio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True)
        peer, address = line.split()
        yield process, NodeId(peer), address
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def test_a_stopped_process_is_noticed_within_ten_seconds_and_taken_back() -> None:
    a = Node()
    async with running(a, within_s=60), other_process() as (process, peer, address):
        a.known[peer] = [address]
        assert await a.rpc.call(peer, "echo", b"1", timeout_s=10) == b"1"
        process.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        with pytest.raises(UnknownOutcome):
            await a.rpc.call(peer, "echo", b"2", timeout_s=30)
        assert time.monotonic() - stopped_at < 10.5
        assert a.events == ["up", "down"]
        process.send_signal(signal.SIGCONT)
        assert await a.rpc.call(peer, "echo", b"3", timeout_s=10) == b"3"


async def test_a_killed_process_is_noticed_at_once() -> None:
    a = Node()
    async with running(a, within_s=60), other_process() as (process, peer, address):
        a.known[peer] = [address]
        assert await a.rpc.call(peer, "echo", b"1", timeout_s=10) == b"1"
        process.kill()
        killed_at = time.monotonic()
        while a.events != ["up", "down"]:
            await trio.sleep(0.01)
        assert time.monotonic() - killed_at < 1
        with pytest.raises(Unavailable):
            await a.rpc.call(peer, "echo", b"2", timeout_s=3)
