"""What clients saw: every request with its two times and its end, kept in memory and in a file.

One line of JSON for each request, written when it has ended. Times are CLOCK_MONOTONIC of
the machine, the same for all clients.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

Result = Literal["ok", "unknown", "missing", "refused"]
"""`unknown`: it may have been done; `missing`: there is no such job; `refused`: an answer that no resend changes."""


class Op(Struct, frozen=True, omit_defaults=True):
    client: int
    kind: Literal["submit", "read"]
    node: str
    """Who was asked."""
    job: str
    invoked_s: float
    ended_s: float
    result: Result
    is_new: bool = False
    """Of a submission: this answer says that it made the job."""
    seen: str = ""
    """Of a read: `STATE/ATTEMPT/FENCE` of task 0."""
    error: str = ""


class History:
    """Appended to by all clients; a round of it is taken out to be checked."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._lock = threading.Lock()
        self._ops: list[Op] = []

    def add(self, op: Op) -> None:
        line = msgspec.json.encode(op) + b"\n"
        with self._lock:
            self._ops.append(op)
            self._file.write(line)

    def acknowledged_s(self, since_s: float) -> list[float]:
        """When writes were acknowledged, from this moment on."""
        with self._lock:
            found = []
            for op in reversed(self._ops):
                # Ends come in order but for the few microseconds between a reading of the clock and the lock.
                if op.ended_s < since_s - 1:
                    break
                if op.kind == "submit" and op.result == "ok" and op.ended_s >= since_s:
                    found.append(op.ended_s)
        return sorted(found)

    def acknowledged(self) -> int:
        with self._lock:
            return len({op.job for op in self._ops if op.kind == "submit" and op.result == "ok"})

    def take(self) -> list[Op]:
        with self._lock:
            ops, self._ops = self._ops, []
            self._file.flush()
        return ops

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[Op]:
    return [msgspec.json.decode(line, type=Op) for line in path.read_bytes().splitlines()]
