"""What agent and runner say to each other. Plain tuples on the wire; imports nothing, since a runner must start fast.

The task socket carries frames: a list of `Task` one way, a list of `Ended` the other. So
many short tasks can share a frame. Orders about a task go by another socket, one datagram
each, because a runner's main thread is busy with its guest: ("leash", id, deadline_s or
None) and ("cancel", id).
"""

from __future__ import annotations

from typing import NamedTuple

ORDER_BYTES_MAX = 1024


class Task(NamedTuple):
    id: int
    """Rises with every task of this runner."""
    module: str
    module_hash: str
    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    workdir: str
    stdin: str | None
    stdout: str
    stderr: str
    run_s: float | None
    memory: int | None
    fuel: int | None
    output_bytes_max: int
    file_bytes_max: int | None
    leash_s: float | None
    """On CLOCK_BOOTTIME."""


class Ended(NamedTuple):
    id: int
    reason: str
    exit_code: int | None
    message: str
    run_ms: int
    is_last: bool = False
    """The runner exits now."""
