"""Gossip at work: carries what the core decides over the peers' RPC streams, and tells the node what it learns.

    GossipService ─ owns ─▶ Gossip (core.py: decides)          one loop: sleep until due, Tick, perform
                  ─ uses ─▶ Rpc    (gossip.ping · indirect · exchange · tell)

A peer that talks nonsense gets an error and is counted; nothing a peer sends stops this node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from random import Random
from typing import assert_never

import structlog
import trio

from meshd.errors import Busy, MeshError, Unavailable, UnknownOutcome
from meshd.gossip.core import Effect, Exchange, Gossip, Tell
from meshd.gossip.facts import Verify
from meshd.gossip.membership import (
    Changed,
    Event,
    Health,
    PeerDown,
    PeerUp,
    Probe,
    ProbeEnded,
    Relay,
    RelayEnded,
    State,
    Tick,
)
from meshd.gossip.own import Sign
from meshd.model import NodeId
from meshd.ports import Rpc

PING = "gossip.ping"
INDIRECT = "gossip.indirect"
EXCHANGE = "gossip.exchange"
TELL = "gossip.tell"

RELAY_PING_S = 0.35
"""For the relay's own ping; what is left of the asker's 500 ms is the way there and back."""

RELAYING_MAX = 32
"""Pings on behalf of others at a time; past it the asker gets Busy and asks another."""

EXCHANGE_STEP_S = 2.0
"""64 KiB either way takes a few ms on a LAN; a peer that needs longer is left for another."""

EXCHANGE_ROUNDS_MAX = 16
"""In a row with one peer: 1 MiB. Who still lacks something asks the next one."""

TELL_S = 1.0
"""News that could not be told by then is found by a ping."""

OnChange = Callable[[NodeId, State], None]

log = structlog.get_logger()


class GossipService:
    def __init__(
        self,
        me: NodeId,
        rpc: Rpc,
        sign: Sign,
        verify: Verify,
        rng: Random,
        clock_ms: Callable[[], int],
        *,
        incarnation: int,
        on_change: OnChange = lambda _node, _state: None,
    ) -> None:
        """`clock_ms` is monotonic. `incarnation` rises with every start: a counter, or the wall clock in ms.

        `on_change` is called from the loop and must not wait.
        """
        self._rpc = rpc
        self._clock_ms = clock_ms
        self._on_change = on_change
        self._core = Gossip(me, incarnation, rng, sign, verify)
        self._members: frozenset[NodeId] = frozenset()
        self._wake = trio.Event()
        self._sleeps_until_ms = 0
        self._nursery: trio.Nursery | None = None
        self._relaying = 0
        rpc.register(PING, self._answer_ping)
        rpc.register(INDIRECT, self._answer_indirect)
        rpc.register(EXCHANGE, self._answer_exchange)
        rpc.register(TELL, self._answer_tell)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Gossip until cancelled. Owns every task it starts."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                self.set_members(self._members)
                task_status.started()
                while True:
                    self._handle(Tick())
                    self._sleeps_until_ms = self._core.due_ms
                    with trio.move_on_after(max(0, self._sleeps_until_ms - self._clock_ms()) / 1000):
                        await self._wake.wait()
            finally:
                self._nursery = None

    # --- what the daemon tells ---

    def set_members(self, nodes: Iterable[NodeId]) -> None:
        """The members by the replicated state, with or without this node. Only they are probed and believed."""
        self._members = frozenset(nodes)
        if self._nursery is not None:
            self._perform(self._core.set_members(self._members, self._clock_ms()))

    def peer_up(self, peer: NodeId) -> None:
        self._handle(PeerUp(peer))

    def peer_down(self, peer: NodeId) -> None:
        """A lost connection is probed at once, so that a killed process is noticed without waiting for its turn."""
        self._handle(PeerDown(peer))

    def publish(self, key: str, value: bytes | None) -> None:
        """Say this of this node, until taken back with None. Changes within 100 ms leave together.

        Raises InvalidRequest, TooLarge (over 4 KiB) or Busy (over 20,000 facts or 3 MiB).
        """
        self._core.publish(key, value)
        self._wake_if_due()

    def publish_blob(self, blob: str, *, present: bool) -> None:
        """This node has, or no longer has, the blob. Raises Busy while there is still room for what it says of itself."""
        self.publish(f"blob/{blob}", b"" if present else None)

    # --- what the daemon asks ---

    def fact(self, node: NodeId, key: str) -> bytes | None:
        return self._core.facts.fact(node, key)

    def facts(self, prefix: str) -> dict[tuple[NodeId, str], bytes]:
        """By node and key, of dead nodes too: ask `liveness` where it matters."""
        return self._core.facts.facts(prefix)

    def holders(self, blob: str) -> tuple[NodeId, ...]:
        """Who says it has the blob and is not known to be dead (this node too); the surely alive first."""
        return self._core.holders(blob)

    def health(self, node: NodeId) -> Health | None:
        """None of a node that is no member."""
        return self._core.health(node)

    def liveness(self) -> dict[NodeId, Health]:
        """Of every member and this node."""
        return self._core.liveness()

    def counters(self) -> dict[str, int]:
        return self._core.counters()

    # --- what peers ask ---

    async def _answer_ping(self, peer: NodeId, body: bytes) -> bytes:
        return self._answer(self._core.pinged(peer, body, self._now()))

    async def _answer_tell(self, peer: NodeId, body: bytes) -> bytes:
        return self._answer(self._core.told(peer, body, self._now()))

    async def _answer_exchange(self, peer: NodeId, body: bytes) -> bytes:
        return self._answer(self._core.exchanged(peer, body, self._now()))

    async def _answer_indirect(self, peer: NodeId, body: bytes) -> bytes:
        target, effects = self._core.asked_to_reach(peer, body, self._now())
        self._perform(effects)
        if self._relaying >= RELAYING_MAX:
            raise Busy(f"already pinging {RELAYING_MAX} nodes for others")
        self._relaying += 1
        try:
            reached = await self._ping(target, RELAY_PING_S)
        finally:
            self._relaying -= 1
        return self._core.reach_answer(target, reached=reached)

    def _answer(self, answered: tuple[bytes, list[Effect]]) -> bytes:
        answer, effects = answered
        self._perform(effects)
        return answer

    def _now(self) -> int:
        if self._nursery is None:
            raise Unavailable("gossip has not started yet")
        return self._clock_ms()

    # --- performing ---

    def _handle(self, event: Event) -> None:
        if self._nursery is not None:
            self._perform(self._core.handle(event, self._clock_ms()))

    def _perform(self, effects: Iterable[Effect]) -> None:
        if self._nursery is None:
            return  # stopping
        for effect in effects:
            match effect:
                case Changed(node, state):
                    log.info("gossip.member", node=node, state=str(state))
                    self._on_change(node, state)
                case Tell(peers, body):
                    for peer in peers:
                        self._nursery.start_soon(self._tell, peer, body)
                case Probe():
                    self._nursery.start_soon(self._probe, effect)
                case Relay():
                    self._nursery.start_soon(self._relay, effect)
                case Exchange(peer):
                    self._nursery.start_soon(self._exchange, peer)
                case _:
                    assert_never(effect)
        self._wake_if_due()

    def _wake_if_due(self) -> None:
        """The loop sleeps until it was due when it went to sleep; news may be due earlier."""
        if self._core.due_ms < self._sleeps_until_ms:
            self._wake.set()
            self._wake = trio.Event()

    async def _probe(self, effect: Probe) -> None:
        answered = await self._ping(effect.peer, effect.timeout_ms / 1000)
        self._handle(ProbeEnded(effect.probe, answered))

    async def _relay(self, effect: Relay) -> None:
        body = self._core.reach(effect.target)
        reached: bool | None
        try:
            answer = await self._rpc.call(effect.relay, INDIRECT, body, timeout_s=effect.timeout_ms / 1000)
            reached, effects = self._core.reached(effect.relay, answer, self._clock_ms())
            self._perform(effects)
        except UnknownOutcome:
            reached = None
        except MeshError:
            reached = False
        self._handle(RelayEnded(effect.probe, reached))

    async def _ping(self, peer: NodeId, timeout_s: float) -> bool:
        try:
            answer = await self._rpc.call(peer, PING, self._core.ping(peer), timeout_s=timeout_s)
            self._perform(self._core.ponged(peer, answer, self._clock_ms()))
        except MeshError:
            return False
        return True

    async def _tell(self, peer: NodeId, body: bytes) -> None:
        with suppress(MeshError):
            await self._rpc.call(peer, TELL, body, timeout_s=TELL_S)

    async def _exchange(self, peer: NodeId) -> None:
        try:
            for _ in range(EXCHANGE_ROUNDS_MAX):
                if not await self._exchange_once(peer):
                    break
        except MeshError as error:
            log.debug("gossip.exchange_failed", node=peer, why=str(error))
        finally:
            self._core.exchange_ended()

    async def _exchange_once(self, peer: NodeId) -> bool:
        """True when there was more than fits into one message."""
        versions = await self._rpc.call(peer, EXCHANGE, self._core.compare(), timeout_s=EXCHANGE_STEP_S)
        swap = self._core.swap(versions)
        if swap is None:
            return False
        news = await self._rpc.call(peer, EXCHANGE, swap, timeout_s=EXCHANGE_STEP_S)
        is_full, effects = self._core.settle(peer, news, self._clock_ms())
        self._perform(effects)
        return is_full
