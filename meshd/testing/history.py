"""What clients asked and were told, each held against one order of it all: linearizability (protocol.md 2).

Every answer says at which position of the log it was given. That order explains what all
clients saw exactly if no operation comes before one that had ended when it began, and if
each read shows its job as the entries up to its position made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from meshd.model import JobId
from meshd.views import JobView

Breach = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Operation:
    what: str
    floor: int
    """The newest position that any client had been told when this began."""


class History:
    def __init__(self, breach: Breach) -> None:
        self._breach = breach
        self._states: dict[JobId, list[JobView]] = {}
        self._told = 0

    def changed(self, view: JobView) -> None:
        """The log has made this of a job."""
        self._states.setdefault(view.id, []).append(replace(view, position=0))

    def begins(self, what: str) -> Operation:
        return Operation(what, self._told)

    def written(self, operation: Operation, position: int) -> None:
        """Whatever was sent after something else was answered comes after it."""
        if position <= operation.floor:
            self._breach(
                "writes come after what was told before",
                f"{operation.what} is entry {position}, sent when {operation.floor} had been told",
            )
        self._told = max(self._told, position)

    def read(self, operation: Operation, job: JobId, view: JobView | None, position: int) -> None:
        if position < operation.floor:
            self._breach(
                "reads see what was told before",
                f"{operation.what} was answered as of {position}, asked when {operation.floor} had been told",
            )
        made = next((state for state in reversed(self._states.get(job, [])) if state.version <= position), None)
        if (None if view is None else replace(view, position=0)) != made:
            self._breach("reads show what the log made", f"{operation.what} at {position}: {view}, not {made}")
        self._told = max(self._told, position)
