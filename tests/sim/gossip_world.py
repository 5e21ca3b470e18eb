"""A mesh of real gossip cores in one heap: virtual time, a modelled network, one seed.

What the network can do to a message: delay it, lose it, hold it while a node is paused,
refuse it at once (its process is gone) or say nothing (its machine is gone, or a partition).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from hashlib import blake2b
from itertools import count
from random import Random

from meshd.gossip.core import Gossip
from meshd.gossip.membership import PeerDown, State
from meshd.model import NodeId
from meshd.testing.gossiping import Done, Gossiping


class Node:
    """A process that gossips, as meshd.testing.gossiping wants it."""

    def __init__(self, world: World, me: NodeId, life: int) -> None:
        self.me = me
        self._world = world
        # A plain count of starts: each objection in one life then collides with the lives to come.
        self.gossip = Gossiping(self, me, life, Random(f"{world.seed} {me} {life}"))
        self.life = life
        self.is_up = True
        self.is_paused = False
        self.held: list[Callable[[], None]] = []

    @property
    def core(self) -> Gossip:
        return self.gossip.core

    def clock_ms(self) -> int:
        return self._world.now_ms

    def wake_at(self, clock_ms: int, action: Callable[[], None]) -> None:
        self._world.at(max(0, clock_ms - self._world.now_ms), lambda: self._world.run_on(self, action))

    def call(self, peer: NodeId, method: str, body: bytes, timeout_ms: int, done: Done) -> None:
        self._world.call(self, peer, method, body, timeout_ms, done)

    def liveness_changed(self, node: NodeId, state: State) -> None:
        self._world.changes.append((self._world.now_ms, self.me, node, state))


class World:
    def __init__(self, size: int, seed: int, *, loss: float = 0.0, delay_ms: tuple[int, int] = (1, 5)) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now_ms = 1_000
        self.loss = loss
        self.delay_ms = delay_ms
        self.bytes_sent = 0
        self.messages = 0
        self.changes: list[tuple[int, NodeId, NodeId, State]] = []
        """(when, at whom, about whom, what)"""
        self.history = blake2b(digest_size=8)
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._sides: dict[NodeId, int] = {}
        self.ids = [NodeId(f"node-{number:03}") for number in range(size)]
        self.nodes = {me: Node(self, me, 1) for me in self.ids}
        for node in self.nodes.values():
            self.at(self.random.randrange(300), lambda node=node: self._start(node))

    # --- what a test does ---

    def run(self, for_ms: int) -> World:
        until = self.now_ms + for_ms
        while self._heap and self._heap[0][0] <= until:
            self.now_ms, _, action = heapq.heappop(self._heap)
            action()
        self.now_ms = until
        return self

    def at(self, delay_ms: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now_ms + delay_ms, next(self._order), action))

    def kill(self, me: NodeId, *, seen: bool = True) -> None:
        """`seen`: the process is gone and its connections break. Otherwise its machine has lost power."""
        self.nodes[me].is_up = False
        if seen:
            for other in self.up():
                self.at(
                    self._delay(), lambda other=other: self.run_on(other, lambda: other.gossip.handle(PeerDown(me)))
                )

    def restart(self, me: NodeId) -> None:
        node = self.nodes[me] = Node(self, me, self.nodes[me].life + 1)
        self._start(node)

    def pause(self, me: NodeId) -> None:
        self.nodes[me].is_paused = True

    def resume(self, me: NodeId) -> None:
        node = self.nodes[me]
        node.is_paused = False
        held, node.held = node.held, []
        for action in held:
            action()

    def split(self, side: Iterable[NodeId]) -> None:
        self._sides = dict.fromkeys(side, 1)

    def heal(self) -> None:
        self._sides = {}

    def publish(self, me: NodeId, key: str, value: bytes | None) -> None:
        self.nodes[me].gossip.publish(key, value)

    # --- what a test sees ---

    def up(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.is_up]

    def seen(self, me: NodeId) -> set[State]:
        """What the others, as far as they are up, believe of this node."""
        return {health.state for node in self.up() if node.me != me and (health := node.core.health(me))}

    def is_settled(self) -> bool:
        """All who are up know the same."""
        return len({node.core.root for node in self.up()}) == 1

    def run_until(self, true: Callable[[], bool], limit_ms: int) -> int:
        """How long it took, in steps of 50 ms."""
        started = self.now_ms
        while not true():
            assert self.now_ms - started < limit_ms, f"seed={self.seed}: not within {limit_ms} ms"
            self.run(50)
        return self.now_ms - started

    def digest(self) -> str:
        return self.history.hexdigest()

    # --- the machinery ---

    def _start(self, node: Node) -> None:
        if node.is_up:
            node.gossip.set_members(self.ids)

    def run_on(self, node: Node, action: Callable[[], None]) -> None:
        if not node.is_up or self.nodes[node.me] is not node:
            return
        if node.is_paused:
            node.held.append(action)
        else:
            action()

    def _delay(self) -> int:
        return self.random.randint(*self.delay_ms)

    def _passes(self, one: NodeId, other: NodeId) -> bool:
        return self._sides.get(one, 0) == self._sides.get(other, 0) and self.random.random() >= self.loss

    def call(self, node: Node, peer: NodeId, method: str, body: bytes, timeout_ms: int, done: Done) -> None:
        is_over = False

        def end(answer: bytes | None, is_silent: bool) -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                done(answer, is_silent)

        def count_bytes(data: bytes) -> None:
            self.bytes_sent += len(data)
            self.messages += 1
            self.history.update(data)

        def arrive() -> None:
            target = self.nodes[peer]
            self.run_on(target, lambda: target.gossip.answer(method, node.me, body, reply))

        def reply(answer: bytes | None) -> None:
            if answer is None:
                return
            count_bytes(answer)
            if self._passes(peer, node.me):
                self.at(self._delay(), lambda: self.run_on(node, lambda: end(answer, False)))

        count_bytes(body)
        if self._passes(node.me, peer):
            self.at(self._delay(), arrive)
        self.at(timeout_ms, lambda: self.run_on(node, lambda: end(None, True)))
