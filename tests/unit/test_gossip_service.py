"""Gossip over real RPC streams on the memory network: what a daemon sees of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
from trio.testing import MockClock

from meshd import codec
from meshd.errors import MeshError
from meshd.gossip.membership import State
from meshd.gossip.messages import Beat, Chunk, Claim, News, SignedChunk, life_payload
from meshd.gossip.service import EXCHANGE, INDIRECT, PING, TELL, GossipService
from meshd.model import NodeId
from meshd.net.memory import MemoryNetwork
from meshd.net.rpc import StreamRpc
from meshd.testing.gossiping import sign_as, verify

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
BLOB = "ab" * 32


class Events:
    """Passes what the transport sees to the gossip service, once there is one."""

    service: GossipService | None = None

    def peer_up(self, peer: NodeId) -> None:
        if self.service is not None:
            self.service.peer_up(peer)

    def peer_down(self, peer: NodeId) -> None:
        if self.service is not None:
            self.service.peer_down(peer)


class Node:
    def __init__(self, network: MemoryNetwork, me: NodeId, incarnation: int) -> None:
        self.me = me
        events = Events()
        self.transport = network.transport(me, lambda *_: True, lambda peer: [f"/memory/{peer}"], events)
        self.rpc = StreamRpc(self.transport)
        self.changes: list[tuple[NodeId, State]] = []
        self.gossip = events.service = GossipService(
            me,
            self.rpc,
            sign_as(me),
            verify,
            Random(f"{me} {incarnation}"),
            lambda: round(trio.current_time() * 1000),
            incarnation=incarnation,
            on_change=lambda node, state: self.changes.append((node, state)),
        )
        self.life = trio.CancelScope()


class Mesh:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork()
        self.nodes: dict[NodeId, Node] = {}
        self._nursery = nursery
        self._starts = 0

    async def start(self, me: NodeId) -> Node:
        self._starts += 1
        node = self.nodes[me] = Node(self.network, me, self._starts)
        await self._nursery.start(self._live, node)
        return node

    async def _live(self, node: Node, *, task_status: trio.TaskStatus[None]) -> None:
        with node.life:
            async with trio.open_nursery() as nursery:
                await nursery.start(node.transport.serve)
                await nursery.start(node.rpc.serve)
                node.gossip.set_members([A, B, C])
                await nursery.start(node.gossip.serve)
                task_status.started()

    def kill(self, me: NodeId) -> None:
        self.nodes[me].life.cancel()
        self.network.lose(me)


@asynccontextmanager
async def three() -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        mesh = Mesh(nursery)
        for me in (A, B, C):
            await mesh.start(me)
        yield mesh
        nursery.cancel_scope.cancel()


async def until(true: Callable[[], bool], limit_s: float) -> None:
    with trio.fail_after(limit_s):
        while not true():
            await trio.sleep(0.05)


def states(node: Node) -> dict[NodeId, State]:
    return {peer: health.state for peer, health in node.gossip.liveness().items()}


async def test_what_one_publishes_all_can_read(autojump_clock: MockClock) -> None:
    async with three() as mesh:
        mesh.nodes[A].gossip.publish("offer", b"wasm")
        mesh.nodes[A].gossip.publish_blob(BLOB, present=True)
        mesh.nodes[B].gossip.publish_blob(BLOB, present=True)
        reader = mesh.nodes[C].gossip

        await until(lambda: set(reader.holders(BLOB)) == {A, B}, 2)
        assert reader.fact(A, "offer") == b"wasm" and reader.facts("offer") == {(A, "offer"): b"wasm"}

        mesh.nodes[A].gossip.publish_blob(BLOB, present=False)
        await until(lambda: reader.holders(BLOB) == (B,), 2)


async def test_a_killed_node_is_dead_everywhere_within_five_seconds_and_holds_nothing(
    autojump_clock: MockClock,
) -> None:
    async with three() as mesh:
        mesh.nodes[A].gossip.publish_blob(BLOB, present=True)
        await until(lambda: all(mesh.nodes[node].gossip.holders(BLOB) == (A,) for node in (B, C)), 3)

        mesh.kill(A)
        await until(lambda: all(states(mesh.nodes[node])[A] is State.DEAD for node in (B, C)), 5)
        assert mesh.nodes[B].gossip.holders(BLOB) == ()
        assert mesh.nodes[B].changes == [(A, State.SUSPECT), (A, State.DEAD)]

        back = await mesh.start(A)
        back.gossip.publish("offer", b"again")
        await until(lambda: all(mesh.nodes[node].gossip.fact(A, "offer") == b"again" for node in (B, C)), 5)
        assert {*states(mesh.nodes[B]).values(), *states(back).values()} == {State.ALIVE}


async def test_a_cut_between_two_is_bridged_by_the_third(autojump_clock: MockClock) -> None:
    async with three() as mesh:
        await trio.sleep(3)
        mesh.network.cut(A, B)
        await trio.sleep(30)

        assert {*states(mesh.nodes[A]).values(), *states(mesh.nodes[B]).values()} <= {State.ALIVE, State.SUSPECT}
        mesh.nodes[A].gossip.publish("offer", b"round the corner")
        await until(lambda: mesh.nodes[B].gossip.fact(A, "offer") == b"round the corner", 3)


async def test_a_node_cut_off_is_dead_to_both_and_taken_back_when_healed(autojump_clock: MockClock) -> None:
    async with three() as mesh:
        await trio.sleep(3)
        mesh.network.cut(A, C)
        mesh.network.cut(B, C)
        await until(lambda: states(mesh.nodes[A])[C] is states(mesh.nodes[B])[C] is State.DEAD, 10)
        await trio.sleep(20)

        mesh.network.heal(A, C)
        mesh.network.heal(B, C)
        await until(lambda: {*states(mesh.nodes[A]).values(), *states(mesh.nodes[C]).values()} == {State.ALIVE}, 5)


async def test_a_member_that_sends_nonsense_is_answered_counted_and_survived(autojump_clock: MockClock) -> None:
    async with three() as mesh:
        await trio.sleep(2)
        evil, target = mesh.nodes[C].rpc, mesh.nodes[A].gossip
        forged_chunk = SignedChunk(codec.encode(Chunk(B, 99, 1, 1, (("offer", b"mine"),))), b"x" * 64)
        forged_claim = Claim(B, 99, True, sign_as(C)(life_payload(B, 99)))
        before = target.counters()

        for method in (PING, INDIRECT, EXCHANGE, TELL):
            for body in (b"", b"\xc1", b"\x92\x00\x00", b"x" * 200_000):
                with pytest.raises(MeshError):
                    await evil.call(A, method, body, timeout_s=1)
        with pytest.raises(MeshError):
            await evil.call(A, PING, codec.encode(Beat(bytes(8), forged_claim)), timeout_s=1)
        await evil.call(A, TELL, codec.encode(News((forged_chunk,), (forged_claim,))), timeout_s=1)

        after = target.counters()
        assert after["malformed"] - before["malformed"] == 17
        assert after["chunks_forged"] == after["forged"] == 1
        await trio.sleep(3)
        assert states(mesh.nodes[A]) == dict.fromkeys((A, B, C), State.ALIVE) and target.fact(B, "offer") is None


async def test_idle_nodes_ping_each_other_twice_a_second_and_do_nothing_else(autojump_clock: MockClock) -> None:
    calls: list[str] = []

    class Counting(StreamRpc):
        async def call(self, peer: NodeId, method: str, body: bytes, *, timeout_s: float) -> bytes:
            calls.append(method)
            return await super().call(peer, method, body, timeout_s=timeout_s)

    async with three() as mesh:
        for node in mesh.nodes.values():
            node.rpc.__class__ = Counting
        await trio.sleep(5)
        calls.clear()
        await trio.sleep(20)

        assert set(calls) == {PING} and len(calls) <= 3 * 2 * 20


async def test_stopping_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    async with three() as mesh:
        node = mesh.nodes[A]
        node.life.cancel()
        await trio.sleep(1)

        node.gossip.peer_down(B)
        node.gossip.publish("offer", b"into the void")
        node.gossip.set_members([A, B])
