"""Gossip that a member sends: as question and as answer, in any order, with signatures that hold or do not.

May be raised: InvalidRequest, TooLarge, NotFound, Busy; they are told to the member or counted.
Besides: nothing that any of it changed keeps this node from speaking on in messages that others can read.
The first byte of a frame says which message, from whom, and whether its signatures hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from random import Random

from fuzz.inputs import join, split
from meshd import codec
from meshd.errors import Busy, InvalidRequest, NotFound
from meshd.gossip.core import Effect, Exchange, Gossip, Tell
from meshd.gossip.membership import Probe, ProbeEnded, Relay, RelayEnded, Tick
from meshd.gossip.messages import (
    BUCKETS,
    Beat,
    Chunk,
    Claim,
    Compare,
    News,
    Reach,
    Reached,
    Row,
    SignedChunk,
    Swap,
    Versions,
)
from meshd.model import NodeId
from meshd.neighbours import LEADER_FACT, Neighbours

FRAMED = True
ME = NodeId("node-a")
PEERS = (NodeId("node-b"), NodeId("node-c"), NodeId("node-d"))


def fuzz(data: bytes) -> None:
    is_genuine = True

    def verify(node: NodeId, payload: bytes, signature: bytes) -> bool:
        return is_genuine and node != ME  # nobody else has our key

    gossip = Gossip(ME, 5, Random(1), lambda payload: b"s" * 64, verify)  # noqa: S311
    now_ms = 1000
    gossip.set_members([ME, *PEERS], now_ms)
    gossip.publish("offer", b"x")
    effects: list[Effect] = []
    for frame in split(data):
        if not frame:
            continue
        is_genuine = not frame[0] & 0x80
        now_ms += (1, 100, 700, 4000)[frame[0] >> 5 & 3]
        peer = PEERS[frame[0] >> 3 & 1]
        with suppress(InvalidRequest, NotFound, Busy):
            effects += _take(gossip, frame[0] & 7, peer, frame[1:], now_ms)
        effects += gossip.handle(Tick(), now_ms)
        for effect in effects:
            _go_on(gossip, effect, now_ms)
        effects.clear()
    gossip.root, gossip.counters(), gossip.liveness()
    assert gossip.due_ms >= 0
    _read_facts(gossip)
    codec.decode(gossip.ping(PEERS[0]), Beat)
    codec.decode(gossip.compare(), Compare)


def _take(gossip: Gossip, kind: int, peer: NodeId, body: bytes, now_ms: int) -> list[Effect]:
    match kind:
        case 0:
            answer, effects = gossip.pinged(peer, body, now_ms)
            codec.decode(answer, Beat)
        case 1:
            _, effects = gossip.told(peer, body, now_ms)
        case 2:
            answer, effects = gossip.exchanged(peer, body, now_ms)
            codec.decode(answer, Versions if _is_compare(body) else News)
        case 3:
            target, effects = gossip.asked_to_reach(peer, body, now_ms)
            codec.decode(gossip.reach_answer(target, reached=True), Reached)
        case 4:
            effects = gossip.ponged(peer, body, now_ms)
        case 5:
            swap = gossip.swap(body)
            effects = []
            if swap is not None:
                codec.decode(swap, Swap)
        case 6:
            _, effects = gossip.settle(peer, body, now_ms)
        case _:
            _, effects = gossip.reached(peer, body, now_ms)
    return effects


def _is_compare(body: bytes) -> bool:
    return isinstance(codec.decode(body, Compare | Swap), Compare)


def _go_on(gossip: Gossip, effect: Effect, now_ms: int) -> None:
    match effect:
        case Tell(_, body):
            codec.decode(body, News)
        case Probe(probe, peer):
            codec.decode(gossip.ping(peer), Beat)
            gossip.handle(ProbeEnded(probe, answered=False), now_ms)
        case Relay(probe, _, target):
            codec.decode(gossip.reach(target), Reach)
            gossip.handle(RelayEnded(probe, reached=None), now_ms)
        case Exchange():
            gossip.exchange_ended()
        case _:
            pass


class _Told:
    """What neighbours.py asks of the service, from a core."""

    def __init__(self, gossip: Gossip) -> None:
        self._gossip = gossip

    def fact(self, node: NodeId, key: str) -> bytes | None:
        return self._gossip.facts.fact(node, key)

    def facts(self, prefix: str) -> dict[tuple[NodeId, str], bytes]:
        return self._gossip.facts.facts(prefix)


class _Addresses:
    def learn_addresses(self, peer: NodeId, addresses: tuple[str, ...], api_address: str) -> None:
        assert len(addresses) <= 8 and len(api_address) <= 256


def _read_facts(gossip: Gossip) -> None:
    neighbours = Neighbours(ME, _Addresses(), _Told(gossip))  # type: ignore[arg-type]
    for node in PEERS:
        neighbours.offer(node)
        gossip.holders("a" * 64)
    neighbours.told_numbers(LEADER_FACT)
    neighbours.learn_addresses()


# --- seeds ------------------------------------------------------------------------------------------------------------


def _chunk(node: NodeId, number: int, *, incarnation: int = 3, floor: int = 1, **entries: bytes | None) -> SignedChunk:
    return SignedChunk(codec.encode(Chunk(node, incarnation, number, floor, tuple(entries.items()))), b"s" * 64)


def _claim(node: NodeId, incarnation: int = 3, *, is_accused: bool = False) -> Claim:
    return Claim(node, incarnation, is_accused, b"s" * 64)


def _frame(kind: int, message: object) -> bytes:
    return bytes([kind]) + codec.encode(message)


def seeds() -> Iterator[bytes]:
    b, c, d = PEERS
    root, hashes = b"12345678", bytes(8 * BUCKETS)
    beat = Beat(root, _claim(b))
    yield join(
        [_frame(0, beat), _frame(0x24, beat), _frame(0x20, Beat(root, _claim(b, 4), _claim(ME, 5, is_accused=True)))]
    )
    news = News(
        (
            _chunk(b, 1, leader=codec.encode(7), addr=codec.encode((("/ip4/1.2.3.4/tcp/1",), "x:1"))),
            _chunk(b, 2, gone=None, offer=b"\x80"),
        ),
        (_claim(c), _claim(d, 9, is_accused=True)),
    )
    yield join(
        [
            _frame(1, news),
            _frame(0x81, news),
            _frame(6, news),
            _frame(0x41, News((_chunk(b, 5, floor=5, leader=b"\xc0"),), ())),
        ]
    )
    yield join(
        [
            _frame(2, Compare(hashes)),
            _frame(2, Swap((1, 5, 63), (Row(b, 3, 1, 3, True), Row(c)), news)),
            _frame(2, Compare(b"\xff" * 8 * BUCKETS)),
        ]
    )
    yield join(
        [
            _frame(3, Reach(c, _claim(c, 3, is_accused=True))),
            _frame(3, Reach(NodeId("nobody"))),
            _frame(0x67, Reached(True, _claim(d, 5))),
            _frame(7, Reached(False)),
        ]
    )
    yield join(
        [
            _frame(5, Versions((0, 1), (Row(b, 3, 9), Row(d, 2**53, 2**53, 2**53)))),
            _frame(1, News((_chunk(ME, 1, incarnation=9, x=b"y"),), (_claim(ME, 2**53),))),
        ]
    )
    yield join(
        [
            _frame(1, News((_chunk(b, 2**53, floor=2**53, incarnation=2**53),), (_claim(b, 2**53, is_accused=True),))),
            _frame(0x61, news),
        ]
    )
