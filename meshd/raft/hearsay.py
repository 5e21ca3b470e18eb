"""Whom other voters hear: a leader that is cut off from a voter must not take its silence for its end (protocol.md 1).

A voter that cannot reach its leader asks others for their votes, so they hear it. They tell
the leader, on the same stream as their answers: who answers and has told nothing has heard
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from meshd.raft.messages import VoterId

TELL_EVERY_S = 1.0
"""Of one voter; a seat is given away after 12 s of silence."""
TOLD_MAX = 64
"""Voters are at most nine; who is none any more is forgotten."""


class Hearsay:
    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._told_s: dict[VoterId, float] = {}
        self._heard_s: dict[VoterId, float] = {}

    def must_tell(self, peer: VoterId, leader: VoterId | None, voters: Collection[VoterId]) -> bool:
        """A message of this peer came: is that news for the leader?"""
        if leader is None or peer == leader or peer not in voters:
            return False
        if self._now() - self._told_s.get(peer, float("-inf")) < TELL_EVERY_S:
            return False
        self._told_s = {voter: at for voter, at in self._told_s.items() if voter in voters} | {peer: self._now()}
        return True

    def told(self, voter: VoterId) -> None:
        """Another voter says that it heard this one just now."""
        if voter in self._heard_s or len(self._heard_s) < TOLD_MAX:
            self._heard_s[voter] = self._now()

    def heard_s(self, voter: VoterId) -> float:
        """When anybody last said that it heard this voter; -inf is never."""
        return self._heard_s.get(voter, float("-inf"))

    def forget(self, voters: Collection[VoterId]) -> None:
        """All but these."""
        self._heard_s = {voter: at for voter, at in self._heard_s.items() if voter in voters}
