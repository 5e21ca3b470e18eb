"""How fast this node gets through a job's tasks, and what follows: how many start together, when a place gets its next,
how many to hold ahead.

A slot that waits for the log between two tasks of a millisecond does nothing most of the time; a node that holds
a hundred tasks of an hour keeps them from the others. So both numbers follow from what was measured here: nothing is
known of a new job and its tasks start one by one; each batch says how long the next may be. A place is given its next
tasks while it still has some, since the way from an end to the next start is milliseconds in which it would do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshd.model import JobSpec, OnLost, Resources
from meshd.raft.state.jobs import AHEAD_LOSSES_MAX
from meshd.work.attempts import cut_off_allowance_ms

BATCH_MS = 20
"""Of work in one batch: long against the few hundred microseconds that a batch costs, short for whoever waits behind it."""
BATCH_MAX = 256
GROWTH_MAX = 4
"""Of a batch, and of what a task is thought to take, from one batch to the next: tasks of a job need not be alike, and a
machine that stood still for a moment says nothing of them."""

AHEAD_MS = 250
"""Of work held beyond what runs: several times what the log takes to bring more."""
AHEAD_MAX = 4096
TASK_MS_MAX = 2_000
"""Nothing is held ahead of slower tasks: the log's 20 ms are 1 % of them, and other nodes may be free."""

NEXT_MS_MAX = 400
"""Behind slower tasks nothing waits in a place: 3 ms are 1 % of them, and another place may be free sooner."""

RECALL_AFTER_MS = 100
"""A task that takes so long, and twice as long as those before it, gives up what waits behind it."""
STUCK_MS = 3_000
"""When all that runs of a job takes so long, or what waits would, the rest is given back: others may be free."""


def may_batch(spec: JobSpec) -> bool:
    """Nothing hangs on whether an attempt of it was really started, or when it is to be dead."""
    return (
        spec.array.count > 1
        and spec.on_lost is OnLost.RERUN
        and spec.retry.crash_limit > AHEAD_LOSSES_MAX
        and cut_off_allowance_ms(spec) is None
    )


@dataclass(slots=True)
class Pace:
    """Of one job. `size`: of its next batch. `task_ms`: for one task in one slot; 0 is not known."""

    need: Resources
    size: int = 1
    task_ms: float = 0.0
    told: int = 0
    """What was asked for ahead."""

    def learn(self, ran: int, took_ms: int) -> None:
        """So many ran one after the other."""
        if not ran:
            return
        task_ms = max(took_ms, 1) / ran
        self.task_ms = (self.task_ms + min(task_ms, GROWTH_MAX * self.task_ms)) / 2 if self.task_ms else task_ms
        self.size = max(1, min(int(BATCH_MS / self.task_ms), GROWTH_MAX * self.size, BATCH_MAX))

    def next_in_place(self, left: int) -> int:
        """How many more to give to a place where so many are left: half of its batch, or the one that runs."""
        if not 0 < self.task_ms <= NEXT_MS_MAX or left > max(1, self.size // 2):
            return 0
        return self.size

    @property
    def slow_after_ms(self) -> int:
        return max(RECALL_AFTER_MS, int(2 * self.task_ms))

    def ahead(self, places: int, stuck_ms: int) -> int:
        """What to hold beyond what runs: powers of two, and only told anew when it is far from that.

        `stuck_ms`: for at least so long each of its tasks that run here has been running.
        """
        task_ms = self._task_ms(stuck_ms)
        if not self.task_ms or task_ms > TASK_MS_MAX:
            return 0
        wanted = min(max(1, int(AHEAD_MS / task_ms)) * places, AHEAD_MAX)
        rounded = 1 << (wanted - 1).bit_length()
        return self.told if self.told and rounded // 2 <= self.told <= rounded * 2 else rounded

    def most_waiting(self, places: int, stuck_ms: int) -> int:
        """More of it than this keeps others from work."""
        return int(STUCK_MS / max(self._task_ms(stuck_ms), 1e-3)) * places

    def _task_ms(self, stuck_ms: int) -> float:
        return max(self.task_ms, stuck_ms if stuck_ms >= STUCK_MS else 0)
