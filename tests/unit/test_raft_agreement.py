"""Which replica is wrong, when states differ that should be equal."""

from __future__ import annotations

import pytest

from meshd.raft.agreement import CHECKPOINTS_KEPT, Checkpoints, Comparison, Diverged, judge
from meshd.raft.messages import VoterId

A, B, C, D, E = (VoterId(f"{name}/01") for name in "abcde")
ONE, TWO, THREE = (bytes([number]) * 16 for number in (1, 2, 3))


def replica(*states: bytes) -> Checkpoints:
    own = Checkpoints(every=10)
    for number, state in enumerate(states, 1):
        own.applied(10 * number, state.hex)
    return own


def test_more_than_half_of_the_voters_decide() -> None:
    assert judge({A: ONE, B: ONE}, (A, B, C)) == (ONE, False)
    assert judge({A: ONE, B: ONE, C: TWO}, (A, B, C)) == (ONE, False)
    assert judge({A: ONE, B: TWO}, (A, B, C)) == (None, True)
    assert judge({A: ONE, B: TWO}, (A, B)) == (None, True)
    assert judge({A: ONE, B: ONE, C: TWO, D: TWO, E: THREE}, (A, B, C, D, E)) == (None, True)
    assert judge({A: ONE}, (A, B, C)) == (None, False)
    assert judge({A: ONE}, (A,)) == (ONE, False)


def test_who_does_not_vote_is_not_counted() -> None:
    assert judge({A: ONE, D: TWO, E: TWO}, (A, B, C)) == (None, False)
    assert judge({A: ONE, D: TWO}, (A,)) == (ONE, False)


def test_hashes_are_taken_every_so_many_entries_and_the_last_ones_kept() -> None:
    own = Checkpoints(every=10)
    for index in range(1, 10 * CHECKPOINTS_KEPT + 30):
        own.applied(index, lambda index=index: f"{index:08x}")  # type: ignore[misc]
    assert own.newest == (10 * CHECKPOINTS_KEPT + 20, (10 * CHECKPOINTS_KEPT + 20).to_bytes(4, "big"))
    assert (own.at(20), own.at(30)) == (None, (30).to_bytes(4, "big"))


def test_a_replica_that_differs_from_what_is_agreed_stops_and_others_do_not() -> None:
    replica(ONE, TWO).agree(20, TWO)
    with pytest.raises(Diverged, match="at entry 20"):
        replica(ONE, TWO).agree(20, THREE)


def test_a_replica_that_lags_is_compared_when_it_gets_there() -> None:
    own = replica(ONE)
    own.agree(20, TWO)
    own.agree(30, THREE)
    own.applied(20, ONE.hex)
    with pytest.raises(Diverged, match="at entry 30"):
        own.applied(30, ONE.hex)


def test_a_state_that_came_as_a_snapshot_is_not_compared_with_the_one_before() -> None:
    own = replica(ONE)
    own.forget()
    own.agree(10, TWO)
    assert own.newest == (0, b"")


def test_a_leader_agrees_with_a_majority_and_disputes_without_one() -> None:
    comparison = Comparison(A, replica(ONE, TWO))
    comparison.settle((A, B, C))
    assert (comparison.agreed, comparison.disputed) == ((0, b""), 0)
    comparison.told(B, 20, THREE)
    comparison.settle((A, B, C))
    assert (comparison.agreed, comparison.disputed) == ((0, b""), 20)
    comparison.told(C, 20, TWO)
    comparison.settle((A, B, C))
    assert (comparison.agreed, comparison.disputed) == ((20, TWO), 0)
    comparison.told(B, 10, THREE)
    comparison.settle((A, B, C))
    assert comparison.disputed == 0, "it hears what is agreed, and stops"


def test_a_leader_that_differs_from_the_others_stops() -> None:
    comparison = Comparison(A, replica(ONE))
    for peer in (B, C):
        comparison.told(peer, 10, TWO)
    with pytest.raises(Diverged):
        comparison.settle((A, B, C))


def test_a_later_checkpoint_stays_disputed_though_an_earlier_one_is_agreed() -> None:
    comparison = Comparison(A, replica(ONE, ONE))
    comparison.told(B, 20, TWO)
    comparison.told(C, 10, ONE)
    comparison.settle((A, B, C))
    assert (comparison.agreed, comparison.disputed) == ((10, ONE), 20)
