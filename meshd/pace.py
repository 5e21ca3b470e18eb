"""How fast this node gets through a job's tasks, and what follows: how many start together, how many to hold ahead.

A slot that waits for the log between two tasks of a millisecond does nothing most of the time; a node that holds
a hundred tasks of an hour keeps them from the others. So both numbers follow from what was measured here: nothing is
known of a new job and its tasks start one by one; each batch that comes to its end says how long the next may be.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshd.attempts import cut_off_allowance_ms
from meshd.model import JobSpec, OnLost

BATCH_MS = 20
"""Of work in one batch: long against the few hundred microseconds that a batch costs, short for whoever waits behind it."""
BATCH_MAX = 256
GROWTH_MAX = 4
"""From one batch to the next: tasks of a job need not be alike."""

AHEAD_MS = 250
"""Of work held beyond what runs: several times what the log takes to bring more."""
AHEAD_MAX = 4096
TASK_MS_MAX = 2_000
"""Nothing is held ahead of slower tasks: the log's 20 ms are 1 % of them, and other nodes may be free."""

RECALL_AFTER_MS = 100
"""A task that takes so long gives up what waits behind it."""


def may_batch(spec: JobSpec) -> bool:
    """Nothing hangs on whether an attempt of it was really started, or when it is to be dead."""
    return spec.array.count > 1 and spec.on_lost is OnLost.RERUN and cut_off_allowance_ms(spec) is None


@dataclass(slots=True)
class Pace:
    """Of one job. `size`: of its next batch. `task_ms`: for one task in one slot; 0 is not known."""

    size: int = 1
    task_ms: float = 0.0
    told: int = 0
    """What was asked for ahead."""

    def batch_over(self, ran: int, took_ms: int) -> None:
        if not ran:
            return
        task_ms = max(took_ms, 1) / ran
        self.task_ms = task_ms if not self.task_ms else (self.task_ms + task_ms) / 2
        self.size = max(1, min(int(BATCH_MS / self.task_ms), GROWTH_MAX * self.size, BATCH_MAX))

    def is_slow(self, runs_ms: int) -> None:
        """A task of it has been running for so long."""
        if runs_ms > self.task_ms:
            self.task_ms = float(runs_ms)
            self.size = 1

    def ahead(self, places: int) -> int:
        """What to hold beyond what runs. Powers of two, so that it is seldom told anew."""
        if not self.task_ms or self.task_ms > TASK_MS_MAX:
            return 0
        wanted = min(max(1, int(AHEAD_MS / self.task_ms)) * places, AHEAD_MAX)
        rounded = 1 << (wanted - 1).bit_length()
        # Between two of them it stays as it was told.
        return self.told if self.told and rounded // 2 <= self.told <= rounded * 2 else rounded
