"""Who leads: elections with a trial before each, votes, terms, and stepping down.

A term rises only when a majority has said that it would vote (F10), so a server that was
cut off, or that nobody needs, disturbs nobody when it comes back.
"""

from __future__ import annotations

from meshd.errors import Corrupt
from meshd.raft.leading import Leadership
from meshd.raft.messages import TimeoutNow, Vote, Voted, VoterId
from meshd.raft.pysyncobj_state import CANDIDATE, FOLLOWER, LEADER, RaftState

LATE_S = 0.25
"""A turn so long after its deadline means that this process stood still: it reads its mail before it judges."""


class Elections:
    def __init__(self, raft: RaftState) -> None:
        self._raft = raft
        self.leading: Leadership | None = None
        """This server's own, while it leads."""
        self._votes: set[VoterId] = set()
        self._trial_term = 0
        self._heard_s = float("-inf")
        self._was_late = False

    def timeout_s(self) -> float:
        settings = self._raft.settings
        return self._raft.random.uniform(settings.election_min_s, settings.election_max_s)

    def begin(self) -> None:
        raft = self._raft
        # A sole voter needs nobody's vote, so it need not wait for anybody to lead.
        raft.election_at = raft.now() if raft.voters == (raft.me,) else raft.now() + self.timeout_s()

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask_when_due(self) -> None:
        raft, now = self._raft, self._raft.now()
        if not raft.is_voter or now < raft.election_at:
            return
        if now - raft.election_at > LATE_S and not self._was_late:
            self._was_late = True
            raft.election_at = now + self.timeout_s()
            return
        self._ask_trial()

    def _ask_trial(self) -> None:
        """Would a majority vote for us? Nothing changes until it would; the term least of all."""
        raft = self._raft
        raft.election_at = raft.now() + self.timeout_s()
        raft.become(FOLLOWER)
        raft.leader = None
        self._trial_term = raft.term + 1
        self._votes = {raft.me}
        self._ask_votes(self._trial_term, is_trial=True)
        if raft.configurations.is_majority(self._votes):
            self._campaign()

    def _campaign(self) -> None:
        raft = self._raft
        raft.election_at = raft.now() + self.timeout_s()
        raft.leader = None
        raft.become(CANDIDATE)
        raft.set_term(raft.term + 1, raft.me)
        self._trial_term = 0
        self._votes = {raft.me}
        self._ask_votes(raft.term, is_trial=False)
        if raft.configurations.is_majority(self._votes):
            self.lead()

    def _ask_votes(self, term: int, *, is_trial: bool) -> None:
        raft = self._raft
        question = Vote(term, raft.last, raft.last_term, is_trial)
        for voter in raft.voters:
            if voter != raft.me:
                raft.send(voter, question)

    def on_voted(self, peer: VoterId, m: Voted) -> None:
        raft = self._raft
        if peer not in raft.voters:
            return
        if m.term > raft.term:
            self.adopt_term(m.term)
        elif m.is_granted and m.is_trial and raft.role == FOLLOWER and m.asked == self._trial_term == raft.term + 1:
            self._votes.add(peer)
            if raft.configurations.is_majority(self._votes):
                self._campaign()
        elif m.is_granted and not m.is_trial and raft.role == CANDIDATE and m.asked == raft.term:
            self._votes.add(peer)
            if raft.configurations.is_majority(self._votes):
                self.lead()

    def on_timeout_now(self, peer: VoterId, m: TimeoutNow) -> None:
        raft = self._raft
        if raft.leader == peer and m.term == raft.term and raft.is_voter and not raft.is_leader:
            self._campaign()

    # --- answering ----------------------------------------------------------------------------------------------------

    def on_vote(self, peer: VoterId, m: Vote) -> None:
        """Any server may ask and is answered: the candidate's configuration decides whether it counts."""
        raft, leading = self._raft, self.leading
        is_newer = (m.last_term, m.last_index) >= (raft.last_term, raft.last)
        if m.is_trial:
            has_leader = (
                raft.now() - self._heard_s < raft.settings.election_min_s if leading is None else leading.in_contact()
            )
            raft.send(peer, Voted(raft.term, m.term, is_newer and m.term > raft.term and not has_leader, True))
            if leading is not None:
                leading.asked_by(peer)
            return
        if m.term > raft.term:
            self.adopt_term(m.term)
        is_granted = m.term == raft.term and is_newer and not raft.is_leader and raft.vote in (peer, None)
        if is_granted:
            raft.set_term(raft.term, peer)
            raft.election_at = raft.now() + self.timeout_s()
        raft.send(peer, Voted(raft.term, m.term, is_granted, False))

    def hear(self, leader: VoterId, term: int) -> None:
        """A leader of this or a newer term speaks. It may be unknown to our old configuration, so it need not be in it."""
        raft = self._raft
        if term == raft.term and raft.is_leader:
            raise Corrupt(f"two leaders in term {term}: {leader} and this server")
        if term > raft.term:
            raft.set_term(term, None)
        if raft.role != FOLLOWER or raft.leader != leader:
            self.step_down(leader)
        self._was_late = False
        self._heard_s = raft.now()
        raft.election_at = self._heard_s + self.timeout_s()

    # --- becoming and ceasing -----------------------------------------------------------------------------------------

    def lead(self) -> None:
        raft = self._raft
        raft.become(LEADER)
        raft.leader = raft.me
        self.leading = Leadership(raft)

    def check_contact(self) -> None:
        """F17: before mail is read, so that a leader that was paused does not believe old answers."""
        if self.leading is not None and self.leading.has_lost_contact():
            self.step_down(None)

    def adopt_term(self, term: int) -> None:
        self._raft.set_term(term, None)
        self.step_down(None)

    def step_down(self, leader: VoterId | None) -> None:
        """Stop leading or asking. Batches in the log stay there: they may yet be committed, so nobody is answered."""
        raft = self._raft
        leading, self.leading = self.leading, None
        raft.become(FOLLOWER)
        raft.leader = leader
        self._trial_term = 0
        raft.election_at = raft.now() + self.timeout_s()
        if leading is not None:
            leading.end()
