"""Full disks: new work waits until a quorum of the voters has room, what ends work goes on, and others lead (protocol.md 9).

A follower on a full disk goes on with the room that its journal has reserved. When that is
nearly used up it takes no more entries, and catches up when there is room: the last of it
is for terms and votes. A leader proposes nothing then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from meshd.model import NodeId
from meshd.ports import NotCommitted
from meshd.raft.engine import Engine
from meshd.raft.messages import VoterId, node_of
from meshd.raft.storage.disk import Room
from meshd.room import is_full, soft_mark

LOOK_S = 1.0
"""Between looks at the disk: nobody fills the soft mark in so short a time."""
HAND_OVER_EVERY_S = 5.0


class Fullness:
    def __init__(self, engine: Engine, free_bytes_min: int, adds_work: Callable[[bytes], bool]) -> None:
        """`adds_work` tells the commands that can wait from those that free or end something."""
        self._engine = engine
        self._free_bytes_min = free_bytes_min
        self._adds_work = adds_work
        self._looked_s = float("-inf")
        self._handed_over_s = float("-inf")

    @property
    def is_full(self) -> bool:
        return self._engine.is_disk_full

    def next_look_s(self) -> float:
        return self._looked_s + LOOK_S

    def looked(self, room: Room, now_s: float) -> str:
        """What changed, for the log; empty when nothing did."""
        self._looked_s = now_s
        was_full = self.is_full
        self._engine.is_disk_full = is_full(room.free, room.total, self._free_bytes_min, was_full=was_full)
        if self.is_full == was_full:
            return ""
        if not self.is_full:
            return "there is room again"
        return (
            f"{room.free} bytes are free, and {soft_mark(room.total, self._free_bytes_min)} are kept for what ends work"
        )

    def full_voters(self) -> list[VoterId]:
        """As far as this leader knows."""
        engine = self._engine
        return [
            voter
            for voter in engine.voters
            if (
                self.is_full if voter == engine.me else voter in engine.progress and engine.progress[voter].is_disk_full
            )
        ]

    def refusal(self, command: bytes) -> NotCommitted | None:
        """While no quorum of the voters has room; None: let it in. A full leader hands over, and refuses nothing meanwhile."""
        full = self.full_voters()
        if self._has_quorum_room(full) or not self._adds_work(command):
            return None
        return NotCommitted(
            f"busy: disk full at {_named([node_of(voter) for voter in full])}",
            code="busy",
            hint="make room there: `mesh blob rm`, drain the node, or a larger disk; running work goes on meanwhile",
        )

    def _has_quorum_room(self, full: list[VoterId]) -> bool:
        return len(self._engine.voters) - len(full) > len(self._engine.voters) // 2

    def successor(self, now_s: float) -> VoterId | None:
        """Who leads instead of a full one: a voter with room that has everything."""
        engine = self._engine
        if not self.is_full or now_s - self._handed_over_s < HAND_OVER_EVERY_S:
            return None
        full = self.full_voters()
        able = [
            voter
            for voter in engine.voters
            if voter not in full
            and (progress := engine.progress.get(voter)) is not None
            and not progress.is_in_doubt
            and progress.match == engine.last
        ]
        if not able or not self._has_quorum_room(full):
            return None  # nobody could take more work than this one
        self._handed_over_s = now_s
        return max(able, key=lambda voter: engine.progress[voter].contact_s)


def _named(nodes: Sequence[NodeId]) -> str:
    return ", ".join(node[-8:] for node in nodes)
