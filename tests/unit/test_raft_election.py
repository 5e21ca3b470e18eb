"""Two that ask for votes at the same time: one gives way, so that the first round elects."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from meshd.raft.election import GIVE_WAY_S
from meshd.raft.messages import Vote, Voted, VoterId
from tests.unit.lone_voter import LoneVoter

A, B, C, D = (VoterId(f"{name}/01") for name in "abcd")
OLDER, SAME, NEWER = (1, -1), (1, 0), (9, 1)
"""Last index and term of a log, beside one that has only its first entry."""


class Voter(LoneVoter):
    def turn_at(self, at_s: float) -> None:
        self.turn(at_s - self.clock_s)

    def asks(self) -> None:
        self.turn_at(self.next_deadline() or 0.0)
        assert self.questions(is_trial=True)

    def questions(self, *, is_trial: bool) -> Sequence[Vote]:
        return [each for _, each in self.sent if isinstance(each, Vote) and each.is_trial == is_trial]

    def asked_by(self, peer: VoterId, log: tuple[int, int], *, granted: bool = True) -> None:
        self.receive(peer, Vote(1, log[0], log[1], True))
        assert self.sent[-1] == (peer, Voted(0, 1, granted, True))


def test_who_would_vote_for_a_peer_leaves_it_time_to_ask() -> None:
    voter = Voter(A, (A, B, C))
    due_s = voter.next_deadline() or 0.0
    voter.turn_at(due_s - 0.01)
    voter.asked_by(B, SAME)

    assert voter.next_deadline() == pytest.approx(due_s - 0.01 + GIVE_WAY_S)
    voter.turn_at(due_s + 0.1)
    assert voter.sent[1:] == [], "it does not ask in between"
    voter.asks()


def test_nobody_waits_for_one_that_it_would_not_vote_for_or_that_is_no_voter() -> None:
    voter = Voter(A, (A, B, C))
    due_s = voter.next_deadline() or 0.0
    voter.turn_at(due_s - 0.01)
    voter.asked_by(B, OLDER, granted=False)
    voter.asked_by(D, SAME)

    assert voter.next_deadline() == due_s


def test_a_candidate_waits_for_its_votes_whoever_asks() -> None:
    voter = Voter(A, (A, B, C))
    voter.asks()
    voter.receive(B, Voted(0, 1, True, True))
    assert voter.questions(is_trial=False)
    due_s = voter.next_deadline() or 0.0
    voter.clock_s = due_s - 0.01
    voter.receive(C, Vote(2, 9, 1, True))

    assert voter.next_deadline() == due_s


@pytest.mark.parametrize(
    ("me", "peer", "log", "goes_on"),
    [(A, B, SAME, True), (B, A, SAME, False), (A, B, NEWER, False), (B, A, NEWER, False)],
)
def test_of_two_that_ask_at_once_the_newer_log_goes_on_and_of_equals_the_smaller_id(
    me: VoterId, peer: VoterId, log: tuple[int, int], goes_on: bool
) -> None:
    voter = Voter(me, (A, B, C))
    voter.asks()
    voter.asked_by(peer, log)
    for other in {A, B, C} - {me}:
        voter.receive(other, Voted(0, 1, True, True))

    assert bool(voter.questions(is_trial=False)) == goes_on
