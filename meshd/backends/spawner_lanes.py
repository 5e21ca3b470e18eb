"""Commands that wait in the spawner, so that it never waits for the agent: lanes, and the directories that they work in.

    lane    commands of one plan, one after the other; the next starts when nothing of the one before is left
            and its end is with the agent, so that of each lane only the first without an end has ever begun
    desk    an empty working directory. One in which a command left nothing is used again: to make and remove
            one was seen to take 3 ms on ext4, three times as long as the command

Standard library only, as the spawner.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from meshd.backends.output import Capture

DESKS_KEPT = 256
"""As many as commands may run at a time, more or less."""


@dataclass(slots=True)
class Lane:
    plan: Mapping[str, Any]
    leash_s: float | None
    waiting: deque[list[Any]] = field(default_factory=deque)
    """Each `[id, task, attempt, fence, item]`."""
    running: int = 0
    """Its id; 0 is none."""

    def take_out(self, ids: Iterable[int]) -> list[int]:
        """Those of them that wait: they do so no more."""
        wanted = set(ids)
        out = [task[0] for task in self.waiting if task[0] in wanted]
        if out:
            self.waiting = deque(task for task in self.waiting if task[0] not in wanted)
        return out


class Seat(NamedTuple):
    """Where a command of a lane runs."""

    lane: Lane
    desk: str
    name: str
    """For output that is left in a file."""
    capture: Capture


def request_of(lane: Lane, task: list[Any], workdir: str) -> dict[str, Any]:
    """As for a command that brings its own files."""
    number, index, attempt, fence, item = task
    plan = lane.plan
    return {
        **plan,
        "id": number,
        "args": [argument.replace("{item}", item) for argument in plan["args"]],
        "env": [
            *plan["env"],
            ("MESHD_TASK", str(index)),
            ("MESHD_ATTEMPT", str(attempt)),
            ("MESHD_FENCE", str(fence)),
            ("MESHD_ITEM", item),
        ],
        "workdir": workdir,
        "stdin": None,
        "leash_s": lane.leash_s,
    }


class Desks:
    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._free: list[str] = []
        self._made = 0

    def take(self) -> str:
        """Raises OSError."""
        if self._free:
            return self._free.pop()
        self._made += 1
        path = os.path.join(self._directory, str(self._made))
        os.makedirs(path, mode=0o700)
        return path

    def give_back(self, path: str) -> bool:
        """False: something was left, and whoever has time is to remove it."""
        with suppress(OSError):
            found = os.lstat(path)
            is_as_made = found.st_mode == stat.S_IFDIR | 0o700 and found.st_uid == os.geteuid()
            if is_as_made and not os.listdir(path) and not os.listxattr(path) and len(self._free) < DESKS_KEPT:
                self._free.append(path)
                return True
        return False
