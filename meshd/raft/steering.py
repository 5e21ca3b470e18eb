"""The autopilot's hands: what a server tells others of whom it hears, and what a leader does about who votes.

`voters.py` decides, one step at a time; here its view is put together and its step is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import assert_never

from meshd.model import NodeId
from meshd.raft.engine import Engine
from meshd.raft.fullness import Fullness
from meshd.raft.hearsay import Hearsay
from meshd.raft.messages import Heard, SeatTaken, VoterId, node_of
from meshd.raft.surroundings import Links, Report
from meshd.raft.voters import NEVER_MS, Add, HandOver, Peer, Remove, View, decide, learners, seats_taken

STEER_S = 0.05
"""The autopilot looks no more often …"""
STEER_IDLE_S = 1.0
"""… and no less often while leading."""
HAND_OVER_PAUSE_S = 0.5
"""No batches for so long after another voter was asked to lead: it must have everything."""
SEATS_TOLD_S = 10.0
"""A newcomer that waits for the seat of its own older journal is told why no more often."""


class Steering:
    def __init__(
        self,
        engine: Engine,
        links: Links,
        fullness: Fullness,
        *,
        servers: Callable[[], Sequence[NodeId]],
        draining: Callable[[], Collection[NodeId]],
        zones: Callable[[], Mapping[NodeId, str]],
        lacks_history: Callable[[VoterId], bool],
        now: Callable[[], float],
        report: Report,
    ) -> None:
        self._engine = engine
        self._links = links
        self._fullness = fullness
        self._servers = servers
        self._draining = draining
        self._zones = zones
        self._lacks_history = lacks_history
        self._now = now
        self._report = report
        self._hearsay = Hearsay(now)
        self._looked_s = float("-inf")
        self._seats_told_s = float("-inf")
        self.paused_until_s = float("-inf")
        """No batches before: another voter shall have everything, and lead."""

    def next_due_s(self) -> float:
        """When a leader looks again although nothing happens."""
        return self._looked_s + STEER_IDLE_S

    def steer(self) -> None:
        engine, now = self._engine, self._now()
        if not engine.is_leader:
            wanted = [node_of(voter) for voter in engine.voters] if engine.is_voter else []
            self._links.reach([*wanted, *self._servers()] if engine.is_alone_in_doubt else wanted)
            return
        if now - self._looked_s < STEER_S:
            return
        self._looked_s = now
        servers = self._servers()
        self._links.reach({*servers, *(node_of(voter) for voter in engine.voters)})
        view = View(
            me=engine.me,
            voters=engine.voters,
            peers={voter: self._peer(voter) for voter in {*self._links.connected(), *engine.progress}},
            servers=servers,
            draining=self._draining(),
            leading_ms=int(engine.leading_s * 1000),
            zones=self._zones(),
        )
        if (successor := self._fullness.successor(now)) is not None:
            self._hand_over_to(successor)
            return
        engine.set_learners(learners(view))
        self._tell_seats_taken(view)
        if not engine.may_change_voters() or not engine.leads():
            return
        match decision := decide(view):
            case Add(voter):
                self._report("raft.voter_added", {"voter": voter})
                engine.change_voters([*engine.voters, voter])
            case Remove(voter):
                self._report("raft.voter_removed", {"voter": voter})
                engine.change_voters([other for other in engine.voters if other != voter])
            case HandOver(to):
                self._hand_over_to(to)
            case None:
                pass
            case _:
                assert_never(decision)

    # --- handing over -------------------------------------------------------------------------------------------------

    def hand_over(self) -> bool:
        """Ask the voter that has most to lead; False when there is none."""
        engine = self._engine
        others = [
            voter for voter in engine.voters if voter in engine.progress and not engine.progress[voter].is_in_doubt
        ]
        if not others:
            return False
        self._hand_over_to(
            max(others, key=lambda voter: (engine.progress[voter].contact_s, engine.progress[voter].match))
        )
        return True

    def _hand_over_to(self, voter: VoterId) -> None:
        self.paused_until_s = self._now() + HAND_OVER_PAUSE_S
        self._engine.transfer_to(voter)

    # --- who is heard -------------------------------------------------------------------------------------------------

    def tell_heard(self, peer: VoterId) -> None:
        """Mail of this peer came: the leader, which may not hear it, is told now and then."""
        engine, leader = self._engine, self._engine.leader
        if leader != engine.me and self._hearsay.must_tell(peer, leader, engine.voters):
            assert leader is not None
            self._links.send(leader, Heard(peer))

    def on_heard(self, peer: VoterId, voter: VoterId) -> None:
        engine = self._engine
        if engine.is_leader and peer in engine.voters and voter in engine.voters:
            self._hearsay.told(voter)

    def on_seat_taken(self, peer: VoterId, older: VoterId) -> None:
        if peer == self._engine.leader:
            self._report("raft.identity_runs_twice", {"older": older, "heard_by": peer})

    def silent_ms(self, heard_s: float) -> int:
        return NEVER_MS if heard_s == float("-inf") else max(0, int((self._now() - heard_s) * 1000))

    def _peer(self, voter: VoterId) -> Peer:
        progress = self._engine.progress.get(voter)
        if progress is None:
            return Peer(lag=self._engine.last, silent_ms=NEVER_MS)
        silent_ms = self.silent_ms(progress.doubted_s if progress.is_in_doubt else progress.heard_s)
        by_others_ms = self.silent_ms(self._hearsay.heard_s(voter))
        return Peer(
            self._engine.last - progress.match,
            silent_ms,
            by_others_ms,
            progress.is_in_doubt,
            lacks_history=self._lacks_history(voter),
        )

    def _tell_seats_taken(self, view: View) -> None:
        """Whoever waits for the seat of its own older journal learns why."""
        self._hearsay.forget(view.voters)
        if self._now() - self._seats_told_s >= SEATS_TOLD_S:
            self._seats_told_s = self._now()
            for newcomer, older in seats_taken(view):
                self._report("raft.identity_runs_twice", {"older": older, "newer": newcomer})
                self._links.send(newcomer, SeatTaken(older))
