"""When and where in the log `apply` is, and what it did so far: shared by the parts of the machine.

Durations are sums of elapsed times and go on whatever the clocks say. Dates are compared with
the wall time: what a leader stamped, never back, until an operator sets it (protocol.md 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshd.model import NodeId
from meshd.raft.state.commands import ClockSet, Event
from meshd.views import ClockMove

ENTRY_ELAPSED_MS_MAX = 60_000
"""Time that one entry counts at most: a leader's long absence ends no timer that others kept (protocol.md 3)."""
MOVE_MS_MIN = 60_000
"""A wall time that differs by more from what has elapsed has jumped, and people are told."""
MOVES_KEPT = 8


@dataclass(slots=True)
class Moment:
    now_ms: int = 0
    """The sum of the leaders' elapsed times: durations are measured on this."""
    wall_ms: int = 0
    """The newest wall time that a leader stamped, or an operator set: dates are compared with this."""
    position: int = 0
    """The index of the log entry being applied."""
    moves: tuple[ClockMove, ...] = ()
    """The last times that the wall time jumped, and every one of them by an operator."""
    events: list[Event] = field(default_factory=list)

    def advance(self, position: int, elapsed_ms: int, wall_ms: int) -> None:
        """An entry begins."""
        self.position = position
        self.now_ms += min(elapsed_ms, ENTRY_ELAPSED_MS_MAX)
        expected_ms = self.wall_ms + elapsed_ms
        if self.wall_ms and wall_ms - expected_ms > MOVE_MS_MIN:
            self._note(ClockMove(position, expected_ms, wall_ms))
        self.wall_ms = max(self.wall_ms, wall_ms)

    def set_wall(self, origin: NodeId, command: ClockSet) -> bool:
        """Forward or back; False when this very command was done before: a resend, later, would set it back a little."""
        if any(move.id == command.id for move in self.moves):
            return False
        self._note(ClockMove(self.position, self.wall_ms, command.wall_ms, origin, command.id))
        self.wall_ms = command.wall_ms
        return True

    def _note(self, move: ClockMove) -> None:
        self.moves = (*self.moves, move)[-MOVES_KEPT:]
