"""What one node makes of what it is told: claims with and without proof, and messages nobody should have sent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd import codec
from meshd.errors import InvalidRequest, NotFound, TooLarge
from meshd.gossip.core import Gossip, Tell
from meshd.gossip.membership import Changed, PeerDown, Probe, ProbeEnded, Relay, RelayEnded, State, Tick
from meshd.gossip.messages import (
    MESSAGE_BYTES_MAX,
    Beat,
    Claim,
    News,
    Reach,
    SignedChunk,
    life_payload,
)
from meshd.model import NodeId
from meshd.testing.gossiping import sign_as, verify

ME, A, B, STRANGER = NodeId("me"), NodeId("a"), NodeId("b"), NodeId("stranger")
NOW = 5_000


def core_of(me: NodeId = ME, incarnation: int = 10) -> Gossip:
    core = Gossip(me, incarnation, Random(1), sign_as(me), verify)
    core.set_members([ME, A, B], NOW)
    return core


def claim(node: NodeId, incarnation: int, *, accused: bool = False, by: NodeId | None = None) -> Claim:
    return Claim(node, incarnation, accused, sign_as(by or node)(life_payload(node, incarnation)))


def tell(core: Gossip, *claims: Claim, source: NodeId = A) -> list[object]:
    return list(core.told(source, codec.encode(News(claims=claims)), NOW)[1])


def state(core: Gossip, node: NodeId) -> tuple[State, int]:
    health = core.liveness()[node]
    return health.state, health.incarnation


def test_an_accused_node_objects_with_its_next_incarnation_in_the_same_breath() -> None:
    core = core_of()
    accusation = Beat(bytes(8), claim(A, 7), claim(ME, 10, accused=True))

    answer, effects = core.pinged(A, codec.encode(accusation), NOW + 500)

    assert codec.decode(answer, Beat).mine == claim(ME, 11)
    assert core.counters()["objections"] == 1
    assert any(isinstance(effect, Tell) and A in effect.peers for effect in effects)


def test_an_accusation_makes_a_suspect_and_only_time_without_objection_makes_it_dead() -> None:
    core = core_of()
    tell(core, claim(B, 7))
    tell(core, claim(B, 7, accused=True))
    assert state(core, B) == (State.SUSPECT, 7)

    tell(core, claim(B, 8))
    assert state(core, B) == (State.ALIVE, 8)

    tell(core, claim(B, 8, accused=True))
    effects = [core.handle(Tick(), NOW + later) for later in (500, 1_000, 1_500, 2_000)]
    assert state(core, B) == (State.DEAD, 8)
    assert Changed(B, State.DEAD) in effects[-1]


def test_who_hears_an_accusation_asks_the_accused_and_says_what_it_is_accused_of() -> None:
    core = core_of()
    tell(core, claim(B, 7))
    [probe] = [effect for effect in tell(core, claim(B, 7, accused=True)) if isinstance(effect, Probe)]

    assert probe.peer == B
    assert codec.decode(core.ping(B), Beat).yours == claim(B, 7, accused=True)
    assert codec.decode(core.ping(A), Beat).yours is None


def test_a_member_that_speaks_to_us_while_our_probe_fails_is_not_accused() -> None:
    core = core_of()
    core.pinged(B, codec.encode(Beat(bytes(8), claim(B, 7))), NOW)
    [probe] = [effect for effect in core.handle(PeerDown(B), NOW + 100) if isinstance(effect, Probe)]
    core.pinged(B, codec.encode(Beat(bytes(8), claim(B, 7))), NOW + 200)

    effects = core.handle(ProbeEnded(probe.probe, answered=False), NOW + 300)
    for _ in [effect for effect in effects if isinstance(effect, Relay)]:
        core.handle(RelayEnded(probe.probe, reached=False), NOW + 400)

    assert state(core, B) == (State.ALIVE, 7)


def test_replayed_claims_change_nothing() -> None:
    core = core_of()
    tell(core, claim(B, 7), claim(B, 7, accused=True), claim(B, 9))

    tell(core, claim(B, 7, accused=True), claim(B, 8), claim(B, 8, accused=True))

    assert state(core, B) == (State.ALIVE, 9)


@pytest.mark.parametrize("accused", [True, False])
def test_nobody_can_put_a_node_into_an_incarnation_it_never_signed(accused: bool) -> None:
    core = core_of()
    tell(core, claim(B, 7))

    tell(core, claim(B, 2**40, accused=accused, by=A), Claim(ME, 2**40, accused, b"x" * 64))

    assert state(core, B) == (State.ALIVE, 7) and state(core, ME) == (State.ALIVE, 10)
    assert core.counters()["forged"] == 2


def test_an_earlier_life_under_a_clock_that_ran_ahead_is_overtaken() -> None:
    core = core_of(incarnation=10)
    tell(core, claim(ME, 99))

    assert state(core, ME) == (State.ALIVE, 100)


def test_claims_and_relays_about_strangers_are_counted_and_nothing_else() -> None:
    core = core_of()
    root = core.root
    tell(core, claim(STRANGER, 7))

    assert core.root == root and core.counters()["strangers"] == 1 and STRANGER not in core.liveness()
    with pytest.raises(NotFound, match="stranger is no member"):
        core.asked_to_reach(A, codec.encode(Reach(STRANGER)), NOW)


def test_a_peer_may_speak_in_a_ping_only_for_itself_and_to_us() -> None:
    core = core_of()
    for beat in (
        Beat(bytes(8), claim(B, 7)),
        Beat(bytes(8), claim(A, 7, accused=True)),
        Beat(bytes(8), claim(A, 7), claim(B, 7, accused=True)),
    ):
        with pytest.raises(InvalidRequest):
            core.pinged(A, codec.encode(beat), NOW)
    assert core.counters()["malformed"] == 3 and state(core, B) == (State.ALIVE, 0)


def test_a_forged_chunk_does_not_spoil_the_true_one_beside_it() -> None:
    core, a = core_of(), core_of(A)
    a.publish("offer", b"wasm")
    [told] = [effect for effect in a.handle(Tick(), NOW + 1_000) if isinstance(effect, Tell)]
    [true] = codec.decode(told.body, News).chunks
    news = News((SignedChunk(true.body, b"x" * 64), SignedChunk(b"\xff", b""), true))

    core.told(B, codec.encode(news), NOW)

    assert core.facts.fact(A, "offer") == b"wasm"
    assert core.counters()["chunks_forged"] == core.counters()["chunks_malformed"] == 1


def test_news_is_told_on_at_most_ten_times_a_second_however_much_changes() -> None:
    core = core_of()
    tells = 0
    for later in range(1_000):
        core.publish("health", str(later).encode())
        tells += sum(isinstance(effect, Tell) for effect in core.handle(Tick(), NOW + later))

    assert tells <= 11
    assert core.facts.fact(ME, "health") is not None


def test_without_news_nothing_is_due_before_the_next_probe() -> None:
    core = core_of()
    core.handle(Tick(), NOW + 500)
    assert core.due_ms > NOW + 500

    core.publish("offer", b"new")
    assert core.due_ms <= NOW + 600


almost = st.recursive(st.none() | st.integers(-(2**63), 2**63) | st.binary() | st.sampled_from(["Swap", "a"]), st.lists)
"""Well-formed msgpack of the wrong shape."""


def answers(core: Gossip) -> list[Callable[[NodeId, bytes, int], object]]:
    return [core.pinged, core.told, core.exchanged, core.asked_to_reach, core.ponged, core.settle, core.reached]


@given(st.binary(max_size=600) | almost.map(codec.pack))
def test_random_bytes_in_any_message_are_an_error_for_the_sender_and_nothing_else(noise: bytes) -> None:
    core = core_of()
    root = core.root
    for answer in answers(core):
        with suppress(InvalidRequest, NotFound):
            answer(A, noise, NOW)
    assert core.root == root


def test_an_oversized_message_is_refused_before_it_is_parsed() -> None:
    core = core_of()
    for answer in answers(core):
        with pytest.raises(TooLarge):
            answer(A, b"\x91" * (MESSAGE_BYTES_MAX + 1), NOW)
    assert core.counters()["malformed"] == len(answers(core))
