"""Facts: what a node may say, how little it costs to say it again, and who is not believed."""

from __future__ import annotations

import pytest

from meshd import codec
from meshd.errors import Busy, InvalidRequest, TooLarge
from meshd.gossip import facts as facts_module
from meshd.gossip.facts import Facts, Merged
from meshd.gossip.messages import CHUNK_BYTES_MAX, DELTA_BYTES_MAX, Chunk, Row, SignedChunk, chunk_payload
from meshd.gossip.own import KEYS_KEPT, KEYS_MAX, LIVE_BYTES_MAX, VALUE_BYTES_MAX
from meshd.model import NodeId
from meshd.testing.gossiping import sign_as, verify

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def facts_of(me: NodeId, incarnation: int = 10) -> Facts:
    facts = Facts(me, incarnation, sign_as(me), verify)
    facts.set_members([A, B])
    return facts


def sealed(facts: Facts) -> list[SignedChunk]:
    chunks = []
    while not facts.is_sealed:
        chunks += facts.seal()
    return chunks


def caught_up(reader: Facts, owner: Facts, node: NodeId) -> int:
    """Bring the reader up to date; the bytes it took."""
    size = 0
    for _ in range(1000):
        chunks = owner.delta([Row(node, *reader.version(node))])
        size += sum(len(chunk.body) for chunk in chunks)
        for chunk in chunks:
            reader.merge(chunk)
        if not chunks:
            return size
    raise AssertionError("deltas never end")


def signed(chunk: Chunk, by: NodeId) -> SignedChunk:
    body = codec.encode(chunk)
    return SignedChunk(body, sign_as(by)(chunk_payload(body)))


def test_a_fact_is_read_where_its_chunk_arrived() -> None:
    a, b = facts_of(A), facts_of(B)
    a.set("offer", b"wasm")
    a.set("blob/ff", b"")

    for chunk in sealed(a):
        b.merge(chunk)

    assert b.fact(A, "offer") == b"wasm" and b.who_says("blob/ff") == (A,)
    assert b.facts("of") == {(A, "offer"): b"wasm"} and b.facts("blob/") == {(A, "blob/ff"): b""}
    assert b.fact(A, "addr") is None and b.fact(C, "offer") is None


def test_saying_the_same_again_costs_nothing() -> None:
    a = facts_of(A)
    assert a.set("offer", b"wasm")
    sealed(a)

    assert not a.set("offer", b"wasm") and a.seal() == []


def test_a_node_without_facts_still_voids_those_of_its_earlier_life() -> None:
    first, again, b = facts_of(A, 10), facts_of(A, 11), facts_of(B)
    first.set("offer", b"wasm")
    caught_up(b, first, A) if sealed(first) else None

    for chunk in sealed(again):
        b.merge(chunk)

    assert b.facts("") == {} and b.version(A) == again.version(A)


def test_what_is_too_large_or_too_much_is_refused_by_name() -> None:
    a = facts_of(A)
    with pytest.raises(TooLarge, match="'offer' has 4097 bytes"):
        a.set("offer", b"x" * (VALUE_BYTES_MAX + 1))
    with pytest.raises(InvalidRequest, match="257 characters"):
        a.set("k" * 257, b"")
    for number in range(KEYS_MAX):
        a.set(f"k{number}", b"")
    with pytest.raises(Busy, match="no room for 'one more': this node publishes 20000 facts"):
        a.set("one more", b"")
    a.set("k0", None)
    assert a.set("one more", b"")


@pytest.mark.parametrize("value", [b"", b"x" * VALUE_BYTES_MAX])
def test_what_a_node_has_leaves_room_for_what_it_says_of_itself(value: bytes) -> None:
    a, b = facts_of(A), facts_of(B)
    with pytest.raises(Busy, match="blob/"):
        [a.set(f"blob/{number:064x}", value) for number in range(KEYS_MAX)]

    for number in range(KEYS_KEPT):
        assert a.set(f"k{number}", b"x" * (VALUE_BYTES_MAX - 20))

    sealed(a)
    caught_up(b, a, A)
    assert b.facts("") == a.facts(""), "no more than its readers accept"


def test_bytes_are_bounded_too_and_taking_back_is_always_possible() -> None:
    a = facts_of(A)
    for number in range(LIVE_BYTES_MAX // (VALUE_BYTES_MAX + 20)):
        a.set(f"k{number}", b"x" * VALUE_BYTES_MAX)

    with pytest.raises(Busy, match="over the limit"):
        [a.set(f"more{number}", b"x" * VALUE_BYTES_MAX) for number in range(20)]
    assert a.set("k0", None)


def test_a_full_node_reaches_another_in_bounded_deltas() -> None:
    a, b = facts_of(A), facts_of(B)
    for number in range(KEYS_MAX - KEYS_KEPT):
        a.set(f"blob/{number:064x}", b"")
    chunks = sealed(a)
    assert max(len(chunk.body) for chunk in chunks) <= CHUNK_BYTES_MAX
    assert sum(len(chunk.body) for chunk in a.delta([Row(A)])) <= DELTA_BYTES_MAX

    caught_up(b, a, A)

    assert len(b.facts("blob/")) == KEYS_MAX - KEYS_KEPT


def test_one_new_blob_of_a_node_with_thousands_costs_hundreds_of_bytes() -> None:
    a, b = facts_of(A), facts_of(B)
    for number in range(5_000):
        a.set(f"blob/{number:064x}", b"")
    sealed(a)
    caught_up(b, a, A)

    spent = 0
    for number in range(5_000, 5_500):
        a.set(f"blob/{number:064x}", b"")
        sealed(a)
        spent += caught_up(b, a, A)

    assert len(b.facts("blob/")) == 5_500
    assert spent / 500 < 8_000, "rewriting included"


def test_a_value_that_changes_for_ever_leaves_no_trail() -> None:
    a, b = facts_of(A), facts_of(B)
    for number in range(2_000):
        a.set("health", str(number).encode())
        a.set(f"blob/{number}", b"")
        a.set(f"blob/{number - 1}", None)
        sealed(a)
        caught_up(b, a, A)

    fresh = facts_of(B)
    size = caught_up(fresh, a, A)
    assert fresh.facts("") == b.facts("") == {(A, "health"): b"1999", (A, "blob/1999"): b""}
    assert size < 10_000, "tombstones and old values are gone from the owner's log"


def test_only_the_owner_is_believed_about_itself() -> None:
    b = facts_of(B)
    said = Chunk(A, 10, 1, 1, (("offer", b"all mine"),))

    assert b.merge(signed(said, by=C)) == (Merged.FORGED, A)
    assert b.merge(SignedChunk(signed(said, by=A).body, b"")) == (Merged.FORGED, A)
    assert b.merge(signed(Chunk(C, 10, 1, 1, ()), by=C)) == (Merged.STRANGER, C)
    assert b.merge(SignedChunk(b"\xc1", b"")) == (Merged.MALFORMED, None)
    assert b.merge(signed(Chunk(A, 10, 1, 2, ()), by=A)) == (Merged.MALFORMED, A)
    assert b.facts("") == {}


def test_an_owner_that_says_too_much_is_dropped_and_asked_for_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "OWNER_BYTES_MAX", 1000)
    b = facts_of(B)
    flood = [signed(Chunk(A, 10, number, 1, ((f"k{number}", b"x" * 400),)), by=A) for number in range(1, 5)]

    assert [b.merge(chunk)[0] for chunk in flood] == [Merged.NEW, Merged.NEW, Merged.OVER_LIMIT, Merged.KNOWN]
    assert b.facts("") == {} and b.delta([Row(A)]) == ()
    assert b.merge(signed(Chunk(A, 11, 1, 1, (("offer", b"sane"),)), by=A)) == (Merged.NEW, A), (
        "a new life, a new chance"
    )


def test_a_node_whose_clock_went_back_outbids_its_earlier_life() -> None:
    before, b = facts_of(A, 100), facts_of(B)
    before.set("offer", b"old")
    [*_, old] = sealed(before)
    now = facts_of(A, 50)
    now.set("offer", b"new")
    sealed(now)

    assert now.merge(old) == (Merged.OUTBID, A)
    b.merge(old)
    for chunk in sealed(now):
        b.merge(chunk)

    assert b.fact(A, "offer") == b"new" and b.version(A)[0] == 101


def test_a_removed_member_is_forgotten() -> None:
    a, b = facts_of(A), facts_of(B)
    a.set("offer", b"wasm")
    for chunk in sealed(a):
        b.merge(chunk)

    b.set_members([B, C])

    assert b.facts("") == {} and b.version(A) == (0, 0)
