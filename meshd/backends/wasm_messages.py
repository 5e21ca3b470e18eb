"""What agent and runner say to each other. Plain tuples on the wire; imports nothing, since a runner must start fast.

Frames of msgpack on the task socket. To the runner: `(PLAN, *Plan)`, then as often as needed `(RUN, [Task, …])`: tasks
of the plan that came last, run in order. From it: `(ENDED, *Ended)` for each task as it ends, so that nothing that has
ended is forgotten when the next one takes the runner down.

Orders go by another socket, one datagram each, because a runner's main thread is busy with its guest:
    ("leash", plan, deadline_s or None)            for all tasks of the plan
    ("cancel", id)                                 the running task, or one that waits
    ("back", call, first, last)                    give back those of these tasks that have not begun
    ("output", call, id, stream, offset, max)      what the running task has written
The answers come back on it: `(ENDED, *Ended)` of a task that never begins or ends with its runner, `(BACK, call, ids)`,
`(OUTPUT, call, data or None)`.
"""

from __future__ import annotations

from typing import NamedTuple

ORDER_BYTES_MAX = 1024
REPLY_BYTES_MAX = 128 << 10
"""More than the largest answer: a piece of output."""

OUTPUT_BYTES_MAX = 64 << 10
"""Of one piece of a running task's output: a datagram that every kernel takes."""

PLAN, RUN = 1, 2
ENDED, BACK, OUTPUT = 1, 2, 3


class Files(NamedTuple):
    """Of an attempt that brings its own: then its output stays there, and the plan has one task."""

    workdir: str
    stdin: str | None
    stdout: str
    stderr: str


class Plan(NamedTuple):
    id: int
    """Rises with every plan of this runner."""
    module: str
    module_hash: str
    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    files: Files | None
    spill: str
    """Without `files`: where output is left that is longer than what is told, as FENCE.stdout and FENCE.stderr."""
    run_s: float | None
    memory: int | None
    fuel: int | None
    output_bytes_max: int
    inline_bytes_max: int
    """Without `files`: so much of stdout and of stderr is told with the end."""
    file_bytes_max: int | None
    leash_s: float | None
    """On CLOCK_BOOTTIME."""


class Task(NamedTuple):
    id: int
    """Rises with every task of this runner."""
    task: int
    attempt: int
    fence: int
    item: str


class Ended(NamedTuple):
    id: int
    reason: str
    exit_code: int | None
    message: str
    run_ms: int
    stdout: bytes | None
    """None: it was left in its file."""
    stderr: bytes | None
    is_last: bool = False
    """The runner exits now."""
