"""One engine in doubt, or among voters that are: what it says, whom it counts, and when that is over (protocol.md 9)."""

from __future__ import annotations

from collections.abc import Sequence

from meshd.raft import election
from meshd.raft.messages import NO_OP, Append, Appended, TimeoutNow, Vote, Voted, VoterId
from meshd.raft.settings import RaftSettings
from meshd.raft.storage.frames import LocalHeader
from meshd.raft.storage.journal import Journal
from meshd.raft.storage.segments import JournalSizes, Segments
from meshd.testing.raft_disk import MemoryDisk
from tests.unit.lone_voter import LoneVoter

A, B, C, D, E = (VoterId(f"{name}/0{number}") for number, name in enumerate("abcde", 1))
SIZES = JournalSizes(step=16 << 10, reserve=16 << 10, reserves=1)


class Voter(LoneVoter):
    """A, with one entry in its log."""

    def __init__(self, *voters: VoterId, is_in_doubt: bool, known: Sequence[VoterId] = ()) -> None:
        header = LocalHeader("m", "01", 1, "aa", voters=tuple(known or voters))
        entries = [(NO_OP, 1, 0), (NO_OP, 2, 1)]
        journal = Journal(header, Segments(MemoryDisk(), SIZES), entries, "a test" if is_in_doubt else "")
        journal.setCurrentTerm(1, None)
        journal.begin_segment(None, [])
        super().__init__(A, voters, journal=journal)

    def asks(self) -> None:
        """Until it asks whether others would vote for it."""
        self.sent.clear()
        for _ in range(200):
            self.turn(0.05)
            if any(isinstance(message, Vote) for _, message in self.sent):
                return
        raise AssertionError("it asks nobody")

    def granted(self, *voters: VoterId, is_trial: bool, in_doubt: Sequence[VoterId] = ()) -> None:
        for voter in voters:
            self.receive(voter, Voted(self.term, self.term + is_trial, True, is_trial, voter in in_doubt))

    def elected(self, *voters: VoterId, in_doubt: Sequence[VoterId] = ()) -> bool:
        self.asks()
        self.granted(*voters, is_trial=True, in_doubt=in_doubt)
        self.granted(*voters, is_trial=False, in_doubt=in_doubt)
        self.turn()
        return self.is_leader

    def appended(self, peer: VoterId, next_index: int, *, round_: int = 1, in_doubt: bool = False) -> None:
        sent_ms = int(self.clock_s * 1000)
        self.receive(peer, Appended(self.term, round_, sent_ms, True, next_index, is_in_doubt=in_doubt))

    def told(self, peer: VoterId) -> list[Append]:
        return [message for to, message in self.sent if to == peer and isinstance(message, Append)]


def vote(term: int) -> Vote:
    return Vote(term, 9, term - 1, False)


# --- in doubt itself --------------------------------------------------------------------------------------------------


def test_it_says_nothing_until_whoever_may_have_its_vote_has_given_up() -> None:
    voter = Voter(A, B, C, is_in_doubt=True)
    voter.receive(B, vote(5))
    voter.turn(2.9)
    voter.receive(B, vote(5))
    assert voter.sent == [] and voter.term == 1
    assert RaftSettings().election_max_s < election.SILENT_S > RaftSettings().contact_s
    voter.turn(0.2)
    voter.receive(B, vote(5))
    assert voter.sent == [(B, Voted(5, 5, True, False, is_in_doubt=True))]


def test_a_vote_that_came_in_a_pause_does_not_count_its_voter_may_have_forgotten_it_by_now() -> None:
    voter = Voter(A, B, C, is_in_doubt=False)
    voter.asks()
    voter.granted(B, is_trial=True)
    voter.clock_s += 2.0
    voter.granted(B, is_trial=False)
    voter.turn()
    assert not voter.is_leader


def test_it_is_elected_by_everybody_or_by_a_majority_of_others_that_are_not_in_doubt() -> None:
    assert not Voter(A, B, C, is_in_doubt=True).elected(B)
    assert Voter(A, B, C, is_in_doubt=True).elected(B, C)
    assert Voter(A, B, C, is_in_doubt=True).elected(B, C, in_doubt=[B, C])
    assert not Voter(A, B, C, D, E, is_in_doubt=True).elected(B, C)
    assert Voter(A, B, C, D, E, is_in_doubt=True).elected(B, C, D)


def test_everybody_is_also_who_was_known_before_the_log_was_damaged() -> None:
    voter = Voter(A, is_in_doubt=True, known=[A, B, C])
    assert not voter.elected(B)
    assert voter.elected(B, C)


def test_it_takes_over_from_nobody() -> None:
    voter = Voter(A, B, C, is_in_doubt=True)
    voter.turn(3.1)
    voter.receive(B, Append(2, 1, 0, 1, 2, 1))
    voter.receive(B, TimeoutNow(2))
    assert voter.term == 2, "it does not ask for votes"


def test_its_doubt_is_over_when_a_leader_says_so_of_a_log_that_it_has() -> None:
    voter = Voter(A, B, C, is_in_doubt=True)
    voter.turn(3.1)
    voter.receive(B, Append(2, 1, 0, 5, 5, 2, ends_doubt=True))
    assert voter.is_in_doubt, "it lacks entry 5"
    voter.receive(B, Append(2, 2, 0, 5, 2, 1, tuple((NO_OP, index, 2) for index in (3, 4, 5))))
    assert voter.is_in_doubt
    voter.receive(B, Append(2, 3, 0, 5, 5, 2, ends_doubt=True))
    assert not voter.is_in_doubt
    answer = voter.sent[-1][1]
    assert isinstance(answer, Appended) and answer.is_ok and not answer.is_in_doubt


# --- a leader of voters in doubt ----------------------------------------------------------------------------------------


def test_votes_in_doubt_elect_only_where_everybody_has_granted() -> None:
    assert not Voter(A, B, C, is_in_doubt=False).elected(B, in_doubt=[B])
    assert Voter(A, B, C, is_in_doubt=False).elected(B, C, in_doubt=[B, C])
    assert Voter(A, B, C, is_in_doubt=False).elected(B)


def test_acknowledgements_in_doubt_neither_commit_nor_prove_that_it_leads() -> None:
    leader = Voter(A, B, C, is_in_doubt=False)
    assert leader.elected(B)
    leader.appended(C, leader.last + 1, in_doubt=True)
    leader.turn()
    assert leader.commit < leader.last and not leader.in_contact()
    leader.appended(B, leader.last + 1)
    leader.turn()
    assert leader.commit == leader.last and leader.in_contact()


def test_what_it_acknowledged_before_its_doubt_is_found_out_again() -> None:
    leader = Voter(A, B, C, is_in_doubt=False)
    assert leader.elected(B)
    leader.appended(C, leader.last + 1)
    leader.peer_down(C)
    leader.peer_up(C)
    leader.receive(C, Appended(leader.term, 1, 0, False, 2, is_in_doubt=True))
    assert leader.progress[C].match < 2
    leader.turn(0.2)
    assert leader.told(C)[-1].prev_index == 1 and leader.told(C)[-1].entries


def test_doubt_ends_after_a_quorum_without_it_has_answered_since_and_it_has_what_is_committed() -> None:
    leader = Voter(A, B, C, is_in_doubt=False)
    assert leader.elected(B)
    leader.appended(B, leader.last + 1)
    leader.appended(C, leader.last + 1, in_doubt=True)
    leader.turn(0.2)
    assert not leader.told(C)[-1].ends_doubt, "the others have answered no round since"
    round_ = leader.told(B)[-1].round
    leader.appended(B, leader.last + 1, round_=round_)
    leader.turn(0.2)
    assert leader.told(C)[-1].ends_doubt
    leader.appended(C, leader.last + 1, round_=round_)
    assert not leader.progress[C].is_in_doubt


def test_after_an_election_by_everybody_doubt_ends_with_the_leaders_first_entry_not_before() -> None:
    leader = Voter(A, B, C, is_in_doubt=True)
    assert leader.elected(B, C, in_doubt=[B, C]) and not leader.is_in_doubt
    leader.appended(B, leader.last, in_doubt=True)  # it lacks the newest
    leader.turn(0.2)
    assert not leader.told(B)[-1].ends_doubt
    leader.appended(B, leader.last + 1, in_doubt=True)
    leader.turn(0.2)
    assert leader.told(B)[-1].ends_doubt and leader.commit < leader.last
    # Another start of it may have lost more: the election was not about that.
    leader.peer_down(B)
    leader.peer_up(B)
    leader.appended(B, leader.last + 1, in_doubt=True)
    leader.turn(0.2)
    assert not leader.told(B)[-1].ends_doubt
