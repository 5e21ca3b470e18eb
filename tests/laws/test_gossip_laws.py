"""The map of facts is a lattice: whoever merges the same chunks, in whatever order, holds the same facts."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.gossip import own
from meshd.gossip.facts import Facts, Merged
from meshd.gossip.messages import Row, SignedChunk
from meshd.model import NodeId
from meshd.testing.gossiping import sign_as, verify

A, B, READER = NodeId("a"), NodeId("b"), NodeId("reader")
MEMBERS = (A, B, READER)

changes = st.tuples(st.sampled_from(["offer", "addr", "blob/1", "blob/2", "blob/3"]), st.none() | st.binary(max_size=4))
batches = st.lists(st.lists(changes, min_size=1, max_size=4), max_size=12)
lives = st.lists(batches, min_size=1, max_size=3)


@pytest.fixture(autouse=True)
def wasteful_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short histories, yet owners write themselves anew."""
    monkeypatch.setattr(own, "CHUNKS_SLACK", 3)


def facts_of(me: NodeId, incarnation: int = 1) -> Facts:
    facts = Facts(me, incarnation, sign_as(me), verify)
    facts.set_members(MEMBERS)
    return facts


def lived(me: NodeId, history: list[list[list[tuple[str, bytes | None]]]]) -> tuple[Facts, list[SignedChunk]]:
    """The owner at the end of its last life, and every chunk it ever signed."""
    chunks: list[SignedChunk] = []
    owner = facts_of(me)
    for incarnation, batched in enumerate(history, 1):
        owner = facts_of(me, incarnation)
        for batch in batched or [[]]:
            for key, value in batch:
                owner.set(key, value)
            while not owner.is_sealed:
                chunks += owner.seal()
    return owner, chunks


def merged(chunks: Sequence[SignedChunk]) -> Facts:
    reader = facts_of(READER)
    for chunk in chunks:
        assert reader.merge(chunk)[0] in (Merged.NEW, Merged.KNOWN, Merged.STALE)
    return reader


def known(facts: Facts, nodes: Sequence[NodeId] = (A, B)) -> object:
    said = {entry: value for entry, value in facts.facts("").items() if entry[0] in nodes}
    return said, [facts.version(node) for node in nodes]


@given(lives, lives, st.randoms(use_true_random=False))
def test_any_order_and_any_repetition_give_what_the_owners_say(
    history_a: list[list[list[tuple[str, bytes | None]]]],
    history_b: list[list[list[tuple[str, bytes | None]]]],
    rng: Random,
) -> None:
    (owner_a, chunks_a), (owner_b, chunks_b) = lived(A, history_a), lived(B, history_b)
    shuffled = chunks_a + chunks_b + rng.sample(chunks_a, len(chunks_a) // 2)
    rng.shuffle(shuffled)

    reader = merged(shuffled)

    assert known(reader, [A]) == known(owner_a, [A])
    assert known(reader, [B]) == known(owner_b, [B])


@given(lives, st.randoms(use_true_random=False), st.data())
def test_merging_parts_in_groups_equals_merging_them_all(
    history: list[list[list[tuple[str, bytes | None]]]], rng: Random, data: st.DataObject
) -> None:
    _, chunks = lived(A, history)
    cut = data.draw(st.integers(0, len(chunks)))
    first, second = chunks[:cut], chunks[cut:]
    rng.shuffle(first)

    assert known(merged(second + first)) == known(merged(first + second)) == known(merged(chunks + first + second))


@given(lives, st.integers(0, 40), st.integers(0, 40))
def test_two_readers_with_any_parts_of_it_become_equal_by_deltas_alone(
    history: list[list[list[tuple[str, bytes | None]]]], stop: int, start: int
) -> None:
    owner, chunks = lived(A, history)
    nodes = [owner, merged(chunks[:stop]), merged(chunks[start:])]

    for _ in range(len(chunks) + 2):  # each round brings at least one chunk
        for giver in nodes:
            for taker in nodes:
                for chunk in giver.delta([Row(A, *taker.version(A))], bytes_max=200):
                    taker.merge(chunk)

    assert known(nodes[0], [A]) == known(nodes[1], [A]) == known(nodes[2], [A])


@given(lives)
def test_a_replay_of_everything_changes_nothing(history: list[list[list[tuple[str, bytes | None]]]]) -> None:
    _, chunks = lived(A, history)
    reader = merged(chunks)
    before = known(reader)

    assert {reader.merge(chunk)[0] for chunk in chunks} <= {Merged.KNOWN, Merged.STALE}
    assert known(reader) == before


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 10_000), st.integers(1, 255))
def test_a_chunk_with_any_changed_byte_is_never_believed(noise: bytes, at: int, flip: int) -> None:
    _, [*_, chunk] = lived(A, [[[("offer", b"x" * 40)]]])
    body = bytearray(chunk.body)
    body[at % len(body)] ^= flip
    reader = facts_of(READER)

    assert reader.merge(SignedChunk(bytes(body), chunk.signature))[0] is not Merged.NEW
    assert reader.merge(SignedChunk(noise, chunk.signature))[0] is not Merged.NEW
    assert known(reader) == known(facts_of(READER))
