"""Leading, from the election to the end of it: rounds and contact, what is committed, who votes, who is fed.

A round is one heartbeat to everybody, and every message repeats its number: a quorum that
has answered a round knew this leader when it was sent. Contact (F17) and reads rest on
that. All of this ends with the leadership; nothing of it is carried into the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from meshd.errors import PeerFault
from meshd.raft.agreement import Comparison
from meshd.raft.configurations import VOTERS_MAX, as_command
from meshd.raft.feeding import Feeder
from meshd.raft.messages import NO_OP, AnyMessage, Append, Appended, Received, TimeoutNow, VoterId
from meshd.raft.pinning import Pins
from meshd.raft.progress import Progress
from meshd.raft.pysyncobj_state import RaftState
from meshd.raft.storage.frames import FIRST_INDEX

NEWS_S = 0.001
"""So long the news of a commit waits for entries to travel with: of its own it costs each side a frame, a turn and an answer."""


@dataclass(frozen=True, slots=True)
class _Barrier:
    round: int
    position: int
    answer: Callable[[int | None], None]


class Leadership:
    def __init__(self, raft: RaftState, *, excused: set[VoterId]) -> None:
        """It begins with an entry of its own term: only together with that are older ones committed.

        `excused` are in doubt, and have granted their votes together with everybody else: whatever
        they have lost is in this leader's log, or nowhere.
        """
        now = raft.now()
        self._raft = raft
        self._feeder = Feeder(raft)
        self._excused = excused
        self._pins = Pins(raft)
        self._comparison = Comparison(raft.me, raft.checkpoints)
        self.elected_s = now
        self.progress: dict[VoterId, Progress] = {}
        """Of each peer that is fed."""
        self._owed: dict[VoterId, int] = {}
        """Who does not vote any more and must still learn it, from the entry at this index."""
        self._round = 0
        self._barriers_new: list[Callable[[int | None], None]] = []
        self._barriers: list[_Barrier] = []
        self._news = 0
        """The commit that was last found to be new."""
        self.news_due_s = inf
        """When those who do not know it are told, entries or not."""
        self.reconfigure()
        raft.own_first = raft.append(NO_OP)
        raft.heartbeat_at = now

    def end(self) -> None:
        waiting = [barrier.answer for barrier in self._barriers] + self._barriers_new
        self._barriers, self._barriers_new = [], []
        for answer in waiting:
            answer(None)

    # --- rounds and contact -------------------------------------------------------------------------------------------

    def in_contact(self) -> bool:
        """A quorum has answered a round that was sent less than a second ago."""
        return self._raft.now() - self._contact_s() < self._raft.settings.contact_s

    def has_lost_contact(self) -> bool:
        since = max(self.elected_s, self._contact_s())
        return self._raft.now() - since >= self._raft.settings.contact_s

    def _contact_s(self) -> float:
        """When the newest round was sent that a quorum has answered; a leader answers its own at once."""
        return self._raft.configurations.reached(self._contact_of)

    def _contact_of(self, voter: VoterId) -> float:
        if voter == self._raft.me:
            return self._raft.now()
        progress = self.progress.get(voter)
        return progress.contact_s if progress is not None and self._counts(voter, progress) else float("-inf")

    def _counts(self, voter: VoterId, progress: Progress) -> bool:
        """Its answers prove that it knows no other leader: in doubt it might have forgotten one."""
        return not progress.is_in_doubt or voter in self._excused

    def is_settled(self) -> bool:
        """Everything of earlier leaders is applied, and the voters agree on what it led to: batches may be stamped."""
        return self._raft.applied >= self._raft.own_first and not self.disputed

    @property
    def disputed(self) -> int:
        """The entry at which the voters' states differ, none with a majority; 0: none."""
        return self._comparison.disputed

    def barrier(self, answer: Callable[[int | None], None]) -> None:
        """`answer(position)` once a round sent after this call is answered; None when leadership is lost first."""
        self._barriers_new.append(answer)

    def speak(self) -> None:
        """A round when one is due, and to each peer what it has not."""
        raft, now = self._raft, self._raft.now()
        is_round = now >= raft.heartbeat_at or bool(self._barriers_new)
        if is_round:
            self._round += 1
            raft.heartbeat_at = now + raft.settings.heartbeat_s
            self._barriers += [_Barrier(self._round, raft.commit, answer) for answer in self._barriers_new]
            self._barriers_new = []
            self._settle_debts()
            self._pins.watch(self.progress)
        is_news_due = self._is_news_due(now)
        for peer, progress in self.progress.items():
            if progress.is_connected:
                ends_doubt = progress.is_in_doubt and self._may_end_doubt(peer, progress)
                self._feeder.feed(
                    peer, progress, self._round, now, self._comparison.telling, ends_doubt=ends_doubt,
                    is_round=is_round, is_news_due=is_news_due,
                )  # fmt: skip
        if all(it.commit_told >= raft.commit for it in self.progress.values() if it.is_connected):
            self.news_due_s = inf
        if self._barriers:
            self._answer_barriers()

    def _is_news_due(self, now: float) -> bool:
        """Who proposes again when it is answered makes the next entry, and that tells of this commit."""
        if self._news < self._raft.commit:
            self._news = self._raft.commit
            self.news_due_s = min(self.news_due_s, now + NEWS_S)
        is_due = now >= self.news_due_s
        if is_due:
            self.news_due_s = inf
        return is_due

    def beat(self, say: Callable[[VoterId, AnyMessage], bool]) -> None:
        """A round about no entry, when one is due: the disk has not answered yet."""
        raft, now = self._raft, self._raft.now()
        if now < raft.heartbeat_at:
            return
        self._round += 1
        raft.heartbeat_at = now + raft.settings.heartbeat_s
        for peer, progress in self.progress.items():
            if progress.is_connected:
                say(peer, Append(raft.term, self._round, int(now * 1000), 0, 0, 0))

    def hear_of(self, peer: VoterId, m: Appended | Received) -> None:
        """An answer in this term that is not read yet: at least its peer knows this leader."""
        if peer in self.progress:
            self._answered(peer, m)

    def _answer_barriers(self) -> None:
        answered = self._raft.configurations.reached(self._round_of)
        done = [barrier for barrier in self._barriers if barrier.round <= answered]
        self._barriers = [barrier for barrier in self._barriers if barrier.round > answered]
        for barrier in done:
            barrier.answer(barrier.position)

    def _round_of(self, voter: VoterId) -> int:
        if voter == self._raft.me:
            return self._round
        progress = self.progress.get(voter)
        return progress.round if progress is not None and self._counts(voter, progress) else 0

    def _may_end_doubt(self, peer: VoterId, progress: Progress) -> bool:
        """It holds everything that it can ever have acknowledged (protocol.md 9).

        A quorum without it has answered since it said that it is in doubt, so no other leader has
        committed anything with its help; or everybody has voted for this leader, whose log is the newest.
        """
        raft = self._raft
        if peer in self._excused:
            return progress.match >= raft.own_first
        is_confirmed = raft.configurations.reached(self._round_of) >= progress.doubted_round
        return is_confirmed and progress.match >= raft.commit >= raft.own_first

    # --- what peers answer, in this term ------------------------------------------------------------------------------

    def on_appended(self, peer: VoterId, m: Appended) -> None:
        progress = self._answered(peer, m)
        progress.is_disk_full = m.is_disk_full
        if m.checkpoint:
            self._comparison.told(peer, m.checkpoint, m.state)
        if m.wall_ms:
            progress.clock_offset_ms = m.wall_ms - int(self._raft.now() * 1000)
        if m.is_ok:
            if m.next > self._raft.last + 1:
                raise PeerFault(f"{peer} acknowledged entry {m.next - 1}, which does not exist")
            if progress.transfer is not None and m.next > progress.transfer.index:
                progress.installed(m.next)
            progress.succeeded(m.next, self._raft.now())
        elif m.next and progress.transfer is None:
            # The first item of every log is the same: there is no snapshot that ends before it.
            progress.refused(max(m.next, FIRST_INDEX + 1), m.round, self._round)

    def on_received(self, peer: VoterId, m: Received) -> None:
        progress = self._answered(peer, m)
        if progress.transfer is not None and progress.transfer.index == m.index:
            progress.received(m.offset, m.round, self._raft.now())

    def _answered(self, peer: VoterId, m: Appended | Received) -> Progress:
        progress = self.progress[peer]
        if m.is_in_doubt and not progress.is_in_doubt:
            progress.doubted(self._round + 1, self._raft.now())
        progress.is_in_doubt = m.is_in_doubt
        progress.answered(m.round, m.sent_ms / 1000, self._raft.now())
        return progress

    def peer_up(self, peer: VoterId) -> None:
        if (progress := self.progress.get(peer)) is not None:
            progress.is_connected = True
            # It may be another start of it, that has lost more: its doubt is not the one that was excused.
            progress.is_in_doubt = False
            self._excused.discard(peer)
            progress.begin_anew(self._raft.last)

    def peer_down(self, peer: VoterId) -> None:
        if (progress := self.progress.get(peer)) is not None:
            progress.is_connected = False

    # --- what is committed --------------------------------------------------------------------------------------------

    def advance_commit(self) -> None:
        """The newest entry of this term that a quorum has on disk; the leader counts itself when it has synced.

        Nothing more while the voters' states differ and none has a majority: nobody shall apply further.
        """
        raft = self._raft
        self._comparison.settle(raft.voters)
        if self._comparison.disputed:
            return
        index = raft.configurations.reached(self._stored)
        if index > raft.commit and raft.term_at(index) == raft.term:
            raft.commit = index

    def _stored(self, voter: VoterId) -> int:
        if voter == self._raft.me:
            return self._raft.log.durable_index
        progress = self.progress.get(voter)
        return 0 if progress is None or progress.is_in_doubt else progress.match

    def has_removed_itself(self) -> bool:
        """The configuration without it is committed."""
        return self._raft.configurations.since <= self._raft.commit and not self._raft.is_voter

    # --- who votes, and who is fed ------------------------------------------------------------------------------------

    def may_change_voters(self) -> bool:
        """F15: the own first entry of the term, and every earlier change, must be committed."""
        raft = self._raft
        return raft.commit >= raft.own_first and raft.configurations.since <= raft.commit

    def change_voters(self, voters: Sequence[VoterId]) -> None:
        """Append a configuration that differs from the present one by one server."""
        raft, voters = self._raft, tuple(sorted(voters))
        assert self.may_change_voters() and len(set(voters) ^ set(raft.voters)) == 1 and 1 <= len(voters) <= VOTERS_MAX
        for voter in set(raft.voters) - set(voters) - {raft.me}:
            self._owed[voter] = raft.last + 1
        raft.append(as_command(voters))
        self.reconfigure()

    def asked_by(self, peer: VoterId) -> None:
        """Who asks for votes while we lead was away when it was removed: it shall learn that."""
        if peer not in self.progress:
            self._owed[peer] = self._raft.configurations.since
            self.reconfigure()

    def _settle_debts(self) -> None:
        """Who has the entry that removed it, and was told that it is committed, is fed no longer."""
        for peer, index in list(self._owed.items()):
            progress = self.progress[peer]
            if not progress.is_connected or min(progress.match, progress.commit_told) >= index:
                del self._owed[peer]
                self.reconfigure()

    def reconfigure(self) -> None:
        """Voters, learners, and who must still learn that it is neither."""
        raft, kept = self._raft, self.progress
        self.progress = {
            peer: kept.get(peer) or Progress(next=raft.last + 1, is_connected=peer in raft.connected)
            for peer in sorted({*raft.voters, *raft.learners, *self._owed} - {raft.me})
        }

    def transfer_to(self, voter: VoterId) -> bool:
        """Ask a voter that has everything to take over at once."""
        raft, progress = self._raft, self.progress.get(voter)
        if voter not in raft.voters or progress is None or progress.match != raft.last or progress.is_in_doubt:
            return False
        return raft.send(voter, TimeoutNow(raft.term))

    def pinned(self) -> int | None:
        """The entry behind which nothing may be forgotten: a peer that is far behind needs it."""
        return self._pins.lowest(self.progress)

    def write_rate(self) -> float:
        """Bytes of commands a second, so that one who is far behind comes level."""
        return self._pins.rate
