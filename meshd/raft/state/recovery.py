"""The log was lost and recovered: what may not run twice waits for an operator, and no fence comes again (protocol.md 10).

The log that is lost may have begun what this one knows as waiting, and may have given fences that this one has not seen.
"""

from __future__ import annotations

from meshd.errors import Conflict, NotFound
from meshd.model import OnLost, TaskState
from meshd.raft.state.commands import Accepted, Recovered, ReleaseJob
from meshd.raft.state.jobs import Job, after_loss, after_recovery
from meshd.raft.state.lineage import NUMBER_BITS, is_next
from meshd.raft.state.matching import Matching
from meshd.raft.state.moment import Moment
from meshd.raft.state.queue import Queue

FENCES_LOST_MAX = 1 << 32
"""More leases than any lost frame can have made; 65,000 such losses fit into the counter."""

RECOVERED_AHEAD_MS_MAX = 30 * 86_400_000
"""A recovery is dated at most so long after the last entry: a clock that is far off would hold all that is submitted."""


class Recovery:
    def __init__(self, moment: Moment, matching: Matching, queue: Queue) -> None:
        self._moment = moment
        self._matching = matching
        self._queue = queue

    def recover(self, command: Recovered) -> Accepted:
        """A new epoch begins: whatever may not run twice waits for an operator, since the log that is lost may have begun it."""
        queue = self._queue
        if command.lineage == queue.lineage:
            return Accepted()
        if not is_next(command.lineage, queue.lineage):
            raise Conflict(f"recovery {len(command.lineage)} does not follow recovery {len(queue.lineage)}")
        queue.lineage = command.lineage
        latest_ms = self._moment.wall_ms + RECOVERED_AHEAD_MS_MAX
        queue.recovered_wall_ms = max(self._moment.wall_ms, min(command.wall_ms, latest_ms))
        for job in queue.jobs.values():
            if job.spec.on_lost is not OnLost.RERUN and not job.is_final:
                self._hold(job)
        return Accepted()

    def _hold(self, job: Job) -> None:
        """Leases of live sessions follow when these end; no node can speak for an attempt of a held job."""
        self._queue.put_on_hold(job)
        for task, row in list(job.rows.items()):
            if row.state is TaskState.HELD:
                if row.node is not None:
                    self._matching.nodes[row.node].held.pop(row.fence, None)
                self._queue.move(job, task, after_recovery(row, job.hold))
        self._queue.settle(job)

    def release(self, command: ReleaseJob) -> Accepted:
        job = self._queue.jobs.get(command.job)
        if job is None:
            raise NotFound(f"no job {command.job}", hint="it may be too old; see `mesh ps`")
        if not job.hold or job.is_final:
            return Accepted()
        why = f"recovery {job.hold} held it"
        job.hold = 0
        del self._queue.on_hold[job.id]
        for task in sorted(task for task, row in job.rows.items() if row.state is TaskState.HELD):
            # Failing one may have cancelled the rest of its job.
            if (row := job.rows.get(task)) is not None and row.state is TaskState.HELD:
                self._queue.move(job, task, after_loss(job.spec, row, why, None))
                self._queue.check_fails(job)
        self._queue.settle(job)
        return Accepted()

    def raise_fences(self, above: int) -> Accepted:
        """The next lease has a fence above this one, which is at most one raise ahead."""
        ahead = min(above - self._queue.fence, FENCES_LOST_MAX, (1 << NUMBER_BITS) - 1 - self._queue.leases_made)
        self._queue.leases_made += max(0, ahead)
        return Accepted()
