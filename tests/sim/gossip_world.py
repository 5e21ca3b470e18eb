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

from meshd.errors import MeshError
from meshd.gossip import membership as swim
from meshd.gossip.core import Changed, Exchange, Gossip, Probe, Relay, Tell
from meshd.gossip.membership import ProbeEnded, RelayEnded, State, Tick
from meshd.gossip.service import EXCHANGE_ROUNDS_MAX, EXCHANGE_STEP_S, RELAY_PING_S
from meshd.model import NodeId

Done = Callable[[bytes | None, bool], None]
"""(answer or None, did we hear nothing at all?)"""


def sign_as(node: NodeId) -> Callable[[bytes], bytes]:
    """A stand-in for a key: fast, and as unforgeable as tests need."""
    return lambda payload: blake2b(payload, key=node.encode()).digest()


def verify(node: NodeId, payload: bytes, signature: bytes) -> bool:
    return sign_as(node)(payload) == signature


class Node:
    def __init__(self, world: World, me: NodeId, life: int) -> None:
        self.me = me
        # A plain count of starts: each objection in one life then collides with the lives to come.
        self.core = Gossip(me, life, Random(f"{world.seed} {me} {life}"), sign_as(me), verify)
        self.life = life
        self.is_up = True
        self.is_paused = False
        self.held: list[Callable[[], None]] = []


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
                self.at(self._delay(), lambda other=other: self._event(other, swim.PeerDown(me)))

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
        self.nodes[me].core.publish(key, value)
        self._event(self.nodes[me], Tick())

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
            self._perform(node, node.core.set_members(self.ids, self.now_ms))
            self._wait(node)

    def _wait(self, node: Node) -> None:
        due_ms = node.core.due_ms

        def wake() -> None:
            if node.core.due_ms <= self.now_ms:
                self._perform(node, node.core.handle(Tick(), self.now_ms))
            self._wait(node)

        self.at(max(0, due_ms - self.now_ms), lambda: self._on(node, wake))

    def _on(self, node: Node, action: Callable[[], None]) -> None:
        if not node.is_up or self.nodes[node.me] is not node:
            return
        if node.is_paused:
            node.held.append(action)
        else:
            action()

    def _event(self, node: Node, event: swim.Event) -> None:
        self._on(node, lambda: self._perform(node, node.core.handle(event, self.now_ms)))

    def _delay(self) -> int:
        return self.random.randint(*self.delay_ms)

    def _passes(self, one: NodeId, other: NodeId) -> bool:
        return self._sides.get(one, 0) == self._sides.get(other, 0) and self.random.random() >= self.loss

    def _call(self, node: Node, peer: NodeId, method: str, body: bytes, timeout_ms: int, done: Done) -> None:
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
            if not target.is_up:
                return
            self._on(target, lambda: serve(target))

        def serve(target: Node) -> None:
            if method == "indirect":
                reached, effects = target.core.asked_to_reach(node.me, body, self.now_ms)
                self._perform(target, effects)
                self._ping(target, reached, round(RELAY_PING_S * 1000), lambda ok: relayed(target, reached, ok))
                return
            answer_one = getattr(target.core, {"ping": "pinged", "tell": "told", "exchange": "exchanged"}[method])
            try:
                answer, effects = answer_one(node.me, body, self.now_ms)
            except MeshError:
                return
            self._perform(target, effects)
            reply(answer)

        def relayed(relay: Node, reached: NodeId, ok: bool) -> None:
            reply(relay.core.reach_answer(reached, reached=ok))

        def reply(answer: bytes) -> None:
            count_bytes(answer)
            if self._passes(peer, node.me):
                self.at(self._delay(), lambda: self._on(node, lambda: end(answer, False)))

        count_bytes(body)
        if self._passes(node.me, peer):
            self.at(self._delay(), arrive)
        self.at(timeout_ms, lambda: self._on(node, lambda: end(None, True)))

    def _ping(self, node: Node, peer: NodeId, timeout_ms: int, done: Callable[[bool], None]) -> None:
        def ended(answer: bytes | None, _is_silent: bool) -> None:
            if answer is not None:
                self._perform(node, node.core.ponged(peer, answer, self.now_ms))
            done(answer is not None)

        self._call(node, peer, "ping", node.core.ping(peer), timeout_ms, ended)

    def _perform(self, node: Node, effects: Iterable[object]) -> None:
        for effect in effects:
            match effect:
                case Changed(about, state):
                    self.changes.append((self.now_ms, node.me, about, state))
                case Tell(peers, body):
                    for peer in peers:
                        self._call(node, peer, "tell", body, 1000, lambda _answer, _is_silent: None)
                case Probe(number, peer, timeout_ms):
                    self._ping(
                        node, peer, timeout_ms, lambda ok, number=number: self._event(node, ProbeEnded(number, ok))
                    )
                case Relay():
                    self._relay(node, effect)
                case Exchange(peer):
                    self._exchange(node, peer, EXCHANGE_ROUNDS_MAX)
                case _:
                    raise AssertionError(effect)
        if effects:
            self._wait(node)

    def _relay(self, node: Node, effect: Relay) -> None:
        def ended(answer: bytes | None, is_silent: bool) -> None:
            reached: bool | None = None if is_silent else False
            if answer is not None:
                reached, effects = node.core.reached(effect.relay, answer, self.now_ms)
                self._perform(node, effects)
            self._event(node, RelayEnded(effect.probe, reached))

        self._call(node, effect.relay, "indirect", node.core.reach(effect.target), effect.timeout_ms, ended)

    def _exchange(self, node: Node, peer: NodeId, rounds: int) -> None:
        step_ms = round(EXCHANGE_STEP_S * 1000)

        def compared(answer: bytes | None, _is_silent: bool) -> None:
            swap = node.core.swap(answer) if answer is not None else None
            if swap is None:
                node.core.exchange_ended()
            else:
                self._call(node, peer, "exchange", swap, step_ms, swapped)

        def swapped(answer: bytes | None, _is_silent: bool) -> None:
            is_full = False
            if answer is not None:
                is_full, effects = node.core.settle(peer, answer, self.now_ms)
                self._perform(node, effects)
            if is_full and rounds > 1:
                self._exchange(node, peer, rounds - 1)
            else:
                node.core.exchange_ended()

        self._call(node, peer, "exchange", node.core.compare(), step_ms, compared)
