"""When and where in the log `apply` is, and what it did so far: shared by the parts of the machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshd.raft.commands import Event


@dataclass(slots=True)
class Moment:
    now_ms: int = 0
    """The sum of the leaders' elapsed times: durations are measured on this."""
    wall_ms: int = 0
    """The newest wall time that a leader stamped: dates are compared with this."""
    position: int = 0
    """The index of the log entry being applied."""
    events: list[Event] = field(default_factory=list)
