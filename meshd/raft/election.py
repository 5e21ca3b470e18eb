"""Who leads: elections with a trial before each, votes, terms, and stepping down.

A term rises only when a majority has said that it would vote (F10), so a server that was
cut off, or that nobody needs, disturbs nobody when it comes back.

A voter in doubt may have forgotten entries and votes (protocol.md 9). Its vote, also for
itself, counts only where every voter has granted its own: then the candidate's log is the
newest of all, and whoever was promised a vote before is among those who granted. It is
silent at first, until every candidate that it may have promised has given up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from meshd.errors import Corrupt
from meshd.model import NodeId
from meshd.raft.leading import Leadership
from meshd.raft.messages import TimeoutNow, Vote, Voted, VoterId
from meshd.raft.pysyncobj_state import CANDIDATE, FOLLOWER, LEADER, RaftState
from meshd.raft.witnesses import Witnesses

SILENT_S = 3.0
"""Of a voter in doubt, after its start: longer than any election, and than any leader without contact goes on."""
WITNESSES_S = 0.5
"""Between questions of a sole voter in doubt."""
LATE_S = 0.25
"""A turn so long after its deadline means that this process stood still: it reads its mail before it judges."""

GIVE_WAY_S = 0.15
"""For a peer that would be voted for: its question, a sync of its vote, and the same here."""


class Elections:
    def __init__(self, raft: RaftState, servers: Callable[[], Collection[NodeId]]) -> None:
        """`servers` names those of the state."""
        self._raft = raft
        self.witnesses = Witnesses(raft, servers)
        self.leading: Leadership | None = None
        """This server's own, while it leads."""
        self._votes: set[VoterId] = set()
        self._doubtful: set[VoterId] = set()
        """Of those who have granted."""
        self.silent_until_s = float("-inf")
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
        if raft.is_in_doubt and not raft.is_alone_in_doubt:
            self.silent_until_s = raft.now() + SILENT_S
            raft.election_at = self.silent_until_s + self.timeout_s()

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask_when_due(self) -> None:
        raft, now = self._raft, self._raft.now()
        if not raft.is_voter or now < raft.election_at:
            return
        if now - raft.election_at > LATE_S and not self._was_late:
            self._was_late = True
            raft.election_at = now + self.timeout_s()
            return
        if raft.is_alone_in_doubt and not self.witnesses.have_answered():
            raft.election_at = now + WITNESSES_S
            return
        self._ask_trial()

    def _ask_trial(self) -> None:
        """Would a majority vote for us? Nothing changes until it would; the term least of all."""
        raft = self._raft
        raft.election_at = raft.now() + self.timeout_s()
        raft.become(FOLLOWER)
        raft.leader = None
        self._trial_term = raft.term + 1
        self._begin_votes()
        self._ask_votes(self._trial_term, is_trial=True)
        if self._is_granted():
            self._campaign()

    def _campaign(self) -> None:
        raft = self._raft
        raft.election_at = raft.now() + self.timeout_s()
        raft.leader = None
        raft.become(CANDIDATE)
        raft.set_term(raft.term + 1, raft.me)
        self._trial_term = 0
        self._begin_votes()
        self._ask_votes(raft.term, is_trial=False)
        if self._is_granted():
            self.lead()

    def _begin_votes(self) -> None:
        self._votes = {self._raft.me}
        self._doubtful = {self._raft.me} if self._raft.is_in_doubt else set()

    def _is_granted(self) -> bool:
        """By a majority that is not in doubt, or by everybody."""
        raft = self._raft
        return raft.configurations.is_majority(self._votes - self._doubtful) or raft.electorate <= self._votes

    def _ask_votes(self, term: int, *, is_trial: bool) -> None:
        raft = self._raft
        question = Vote(term, raft.last, raft.last_term, is_trial)
        for voter in sorted(raft.electorate - {raft.me}):
            raft.send(voter, question)

    def on_voted(self, peer: VoterId, m: Voted) -> None:
        raft = self._raft
        if peer not in raft.electorate:
            return
        if m.term > raft.term:
            self.adopt_term(m.term)
        elif m.is_granted and m.is_trial and raft.role == FOLLOWER and m.asked == self._trial_term == raft.term + 1:
            self._count(peer, m)
            if self._is_granted():
                self._campaign()
        # After a pause an old vote may be one that its voter, in doubt by now, has forgotten.
        elif (
            m.is_granted
            and not m.is_trial
            and raft.role == CANDIDATE
            and m.asked == raft.term
            and raft.now() < raft.election_at
        ):
            self._count(peer, m)
            if self._is_granted():
                self.lead()

    def _count(self, peer: VoterId, m: Voted) -> None:
        self._votes.add(peer)
        if m.is_in_doubt:
            self._doubtful.add(peer)

    def on_timeout_now(self, peer: VoterId, m: TimeoutNow) -> None:
        raft = self._raft
        may_ask = raft.is_voter and not raft.is_leader and not raft.is_in_doubt
        if raft.leader == peer and m.term == raft.term and may_ask:
            self._campaign()

    # --- answering ----------------------------------------------------------------------------------------------------

    def on_vote(self, peer: VoterId, m: Vote) -> None:
        """Any server may ask and is answered: the candidate's configuration decides whether it counts."""
        raft, leading = self._raft, self.leading
        is_newer = (m.last_term, m.last_index) >= (raft.last_term, raft.last)
        has_leader = (
            raft.now() - self._heard_s < raft.settings.election_min_s if leading is None else leading.in_contact()
        )
        if has_leader and not m.is_trial and peer not in raft.voters:
            # Nothing that a non-voter sends moves a term: not even one whom nobody told that it votes no more.
            raft.send(peer, Voted(raft.term, m.term, False, False, raft.is_in_doubt))
            return
        if m.is_trial:
            is_granted = is_newer and m.term > raft.term and not has_leader
            raft.send(peer, Voted(raft.term, m.term, is_granted, True, raft.is_in_doubt))
            if is_granted and peer in raft.electorate:
                self._give_way(peer, m)
            if leading is not None:
                leading.asked_by(peer)
            return
        if m.term > raft.term:
            self.adopt_term(m.term)
        is_granted = m.term == raft.term and is_newer and not raft.is_leader and raft.vote in (peer, None)
        if is_granted:
            raft.set_term(raft.term, peer)
            raft.election_at = raft.now() + self.timeout_s()
        raft.send(peer, Voted(raft.term, m.term, is_granted, False, raft.is_in_doubt))

    def _give_way(self, peer: VoterId, m: Vote) -> None:
        """Two that ask at the same time would each vote for itself, and both wait for another timeout.

        So whoever would vote for a peer leaves it time to ask; of two that already ask for the same term the one with the
        newer log goes on, and of equals the one with the smaller id.
        """
        raft = self._raft
        if raft.role != FOLLOWER:
            return  # until then votes for this candidate count
        if self._trial_term != m.term:
            raft.election_at = max(raft.election_at, raft.now() + GIVE_WAY_S)
        elif (m.last_term, m.last_index) > (raft.last_term, raft.last) or peer < raft.me:
            self._trial_term = 0

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
        # A sole voter's doubt ends with the entry in which it says so (server.py).
        excused = self._doubtful - {raft.me} if raft.electorate <= self._votes else set()
        if raft.is_in_doubt and not raft.is_alone_in_doubt:
            raft.log.end_doubt()
        self.leading = Leadership(raft, excused=excused)

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
