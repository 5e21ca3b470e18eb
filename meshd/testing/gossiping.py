"""A node's gossip in a simulated world: the real core, carried by calls on virtual time instead of streams.

What meshd/gossip/service.py does with trio and the peers' RPC streams, this does with callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from random import Random
from typing import Protocol, assert_never

from meshd.errors import MeshError
from meshd.gossip import service
from meshd.gossip.core import Effect, Exchange, Gossip, Tell
from meshd.gossip.membership import Changed, Event, Probe, ProbeEnded, Relay, RelayEnded, State, Tick
from meshd.model import NodeId

EXCHANGE_STEP_MS = round(service.EXCHANGE_STEP_S * 1000)
RELAY_PING_MS = round(service.RELAY_PING_S * 1000)
TELL_MS = round(service.TELL_S * 1000)

Done = Callable[[bytes | None, bool], None]
"""(the answer or None, did we hear nothing at all?)"""

Reply = Callable[[bytes | None], None]
"""None: an error, which comes back at once."""


def sign_as(node: NodeId) -> Callable[[bytes], bytes]:
    """A stand-in for a key: fast, and as unforgeable as tests need."""
    return lambda payload: blake2b(payload, key=node.encode()).digest()


def verify(node: NodeId, payload: bytes, signature: bytes) -> bool:
    return sign_as(node)(payload) == signature


class Host(Protocol):
    """The process that gossips. Nothing is called back once it has died."""

    def clock_ms(self) -> int: ...

    def wake_at(self, clock_ms: int, action: Callable[[], None]) -> None: ...

    def call(self, peer: NodeId, method: str, body: bytes, timeout_ms: int, done: Done) -> None:
        """`done` exactly once, after `timeout_ms` at the latest."""

    def liveness_changed(self, node: NodeId, state: State) -> None: ...


class Gossiping:
    def __init__(self, host: Host, me: NodeId, incarnation: int, random: Random) -> None:
        self.core = Gossip(me, incarnation, random, sign_as(me), verify)
        self._host = host
        self._wakes_ms: int | None = None

    def set_members(self, nodes: Iterable[NodeId]) -> None:
        """The first time it begins to gossip."""
        self._perform(self.core.set_members(nodes, self._host.clock_ms()))

    def publish(self, key: str, value: bytes | None) -> None:
        self.core.publish(key, value)
        self._sleep()

    def handle(self, event: Event) -> None:
        self._perform(self.core.handle(event, self._host.clock_ms()))

    def answer(self, method: str, peer: NodeId, body: bytes, reply: Reply) -> None:
        now_ms = self._host.clock_ms()
        try:
            match method:
                case service.PING:
                    answer, effects = self.core.pinged(peer, body, now_ms)
                case service.TELL:
                    answer, effects = self.core.told(peer, body, now_ms)
                case service.EXCHANGE:
                    answer, effects = self.core.exchanged(peer, body, now_ms)
                case service.INDIRECT:
                    target, effects = self.core.asked_to_reach(peer, body, now_ms)
                    self._perform(effects)
                    self._ping(
                        target,
                        RELAY_PING_MS,
                        lambda reached: reply(self.core.reach_answer(target, reached=reached)),
                    )
                    return
                case _:
                    raise AssertionError(method)
        except MeshError:
            reply(None)
            return
        self._perform(effects)
        reply(answer)

    # --- performing ---------------------------------------------------------------------------------------------------

    def _sleep(self) -> None:
        due_ms = self.core.due_ms
        if self._wakes_ms is None or due_ms < self._wakes_ms:
            self._wakes_ms = due_ms
            self._host.wake_at(due_ms, lambda: self._wake(due_ms))

    def _wake(self, due_ms: int) -> None:
        if self._wakes_ms == due_ms:
            self._wakes_ms = None
            self.handle(Tick())

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Changed(node, state):
                    self._host.liveness_changed(node, state)
                case Tell(peers, body):
                    for peer in peers:
                        self._host.call(peer, service.TELL, body, TELL_MS, lambda _answer, _is_silent: None)
                case Probe():
                    self._probe(effect)
                case Relay():
                    self._relay(effect)
                case Exchange(peer):
                    self._exchange(peer, service.EXCHANGE_ROUNDS_MAX)
                case _:
                    assert_never(effect)
        self._sleep()

    def _probe(self, effect: Probe) -> None:
        self._ping(effect.peer, effect.timeout_ms, lambda answered: self.handle(ProbeEnded(effect.probe, answered)))

    def _ping(self, peer: NodeId, timeout_ms: int, done: Callable[[bool], None]) -> None:
        def ended(answer: bytes | None, _is_silent: bool) -> None:
            if answer is not None:
                self._perform(self.core.ponged(peer, answer, self._host.clock_ms()))
            done(answer is not None)

        self._host.call(peer, service.PING, self.core.ping(peer), timeout_ms, ended)

    def _relay(self, effect: Relay) -> None:
        def ended(answer: bytes | None, is_silent: bool) -> None:
            reached: bool | None = None if is_silent else False
            if answer is not None:
                reached, effects = self.core.reached(effect.relay, answer, self._host.clock_ms())
                self._perform(effects)
            self.handle(RelayEnded(effect.probe, reached))

        self._host.call(effect.relay, service.INDIRECT, self.core.reach(effect.target), effect.timeout_ms, ended)

    def _exchange(self, peer: NodeId, rounds: int) -> None:
        def compared(answer: bytes | None, _is_silent: bool) -> None:
            swap = self.core.swap(answer) if answer is not None else None
            if swap is None:
                self.core.exchange_ended()
            else:
                self._host.call(peer, service.EXCHANGE, swap, EXCHANGE_STEP_MS, swapped)

        def swapped(answer: bytes | None, _is_silent: bool) -> None:
            is_full = False
            if answer is not None:
                is_full, effects = self.core.settle(peer, answer, self._host.clock_ms())
                self._perform(effects)
            if is_full and rounds > 1:
                self._exchange(peer, rounds - 1)
            else:
                self.core.exchange_ended()

        self._host.call(peer, service.EXCHANGE, self.core.compare(), EXCHANGE_STEP_MS, compared)
