"""Frames between servers: nobody's stream is forgotten, and no stream speaks for the one that came after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
import trio

from meshd import codec
from meshd.errors import Unavailable
from meshd.model import NodeId
from meshd.net.memory import MemoryNetwork
from meshd.raft import wire as wire_module
from meshd.raft.acquaintances import Acquaintances
from meshd.raft.messages import Append, VoterId
from meshd.raft.surroundings import Down, Mail, Up
from meshd.raft.wire import PROTOCOL, Greeting, Wire

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
FRAME = Append(1, 1, 1, 1, 1, 1, ((bytes(1000), 2, 1),))


class Nobody:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


def wire_over(transport: object) -> Wire:
    return Wire(
        transport,  # type: ignore[arg-type]
        lambda: Greeting("m", (), "01", 1, "aa"),
        Random(1),
        lambda: None,
        acquaintances=Acquaintances(),
        on_refused=lambda node, why: None,
    )


async def test_everybody_is_read_from_again_when_a_full_inbox_is_emptied(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_module, "INBOX_BYTES_MAX", 4000)
    network = MemoryNetwork()
    names = (A, B, C)
    async with trio.open_nursery() as nursery:
        wires = {}
        for node in names:
            transport = network.transport(node, lambda p, q: True, lambda p: (f"/memory/{p}",), Nobody())
            await nursery.start(transport.serve)
            wires[node] = wire_over(transport)
            await nursery.start(wires[node].serve)
        for sender in (B, C):
            wires[sender].reach([A])
        await trio.sleep(1)
        for sender in (B, C):
            for _ in range(50):
                assert wires[sender].send(VoterId("a/01"), FRAME)
            wires[sender].flush()
        came: Counter[str] = Counter()
        with trio.move_on_after(60):
            while sum(came.values()) < 100:
                await trio.sleep(0.1)  # long enough for both streams to find the inbox full
                while (incident := wires[A].take()) is not None:
                    came[incident.peer] += isinstance(incident, Mail)
        assert came == {"b/01": 50, "c/01": 50}
        nursery.cancel_scope.cancel()


class StuckStream:
    """Greets; a write after that cannot be cancelled until it is let go, as on a connection whose peer reads nothing."""

    def __init__(self, peer: NodeId, greeting: bytes) -> None:
        self.peer = peer
        self._said = greeting
        self._writes = 0
        self.stuck = trio.Event()
        self.freed = trio.Event()

    async def read(self, bytes_max: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._said:
            await trio.sleep_forever()
        said, self._said = self._said[:bytes_max], self._said[bytes_max:]
        return said

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._writes += 1
        if self._writes > 1:
            self.stuck.set()
            with trio.CancelScope(shield=True):
                await self.freed.wait()

    def write_now(self, data: bytes) -> bool:
        return False

    async def close_write(self) -> None: ...
    async def aclose(self) -> None: ...


class GivenTransport:
    def __init__(self, streams: Sequence[StuckStream]) -> None:
        self.me = A
        self._streams = list(streams)

    def handle(self, protocol: str, handler: object) -> None:
        assert protocol == PROTOCOL

    async def open_stream(self, peer: NodeId, protocol: str, *, timeout_s: float) -> StuckStream:
        await trio.lowlevel.checkpoint()
        if not self._streams:
            raise Unavailable("nobody is there")
        return self._streams.pop(0)


async def test_a_stream_that_ends_late_takes_nothing_from_its_successor(
    autojump_clock: trio.testing.MockClock,
) -> None:
    hello = codec.encode(Greeting("m", (), "02", 1, "bb"))
    streams = [StuckStream(B, len(hello).to_bytes(4, "little") + hello) for _ in range(2)]
    wire, peer = wire_over(GivenTransport(streams)), VoterId("b/02")
    async with trio.open_nursery() as nursery:
        await nursery.start(wire.serve)
        wire.reach([B])
        await trio.sleep(1)
        assert wire.send(peer, FRAME)
        wire.flush()
        await streams[0].stuck.wait()
        wire.reach([])
        wire.reach([B])
        await trio.sleep(1)
        streams[0].freed.set()
        await trio.sleep(1)
        assert wire.connected() == [peer] and wire.send(peer, FRAME)
        happened = []
        while (incident := wire.take()) is not None:
            happened.append(incident)
        assert happened == [Up(peer), Down(peer), Up(peer)]
        wire.reach([])
        await trio.sleep(1)
        assert wire.connected() == [] and wire.take() == Down(peer)
        nursery.cancel_scope.cancel()
