"""New jobs: whether they are let in, and what of them is to be run (protocol.md 7).

An id that was seen names a job that was let in: whatever is sent again under it is answered as before. A job to be
tried again is a new one too, in which what need not run again is skipped from the start.
"""

from __future__ import annotations

from meshd.errors import Busy, Conflict, InvalidRequest, NotFound
from meshd.model import ItemsInline, JobId, JobSpec, OnLost, TaskState
from meshd.placement import Demand
from meshd.raft.state.commands import RetryJob, Submit, Submitted
from meshd.raft.state.ids import date_ms_of, number_of
from meshd.raft.state.jobs import Job
from meshd.raft.state.matching import Matching
from meshd.raft.state.moment import Moment
from meshd.raft.state.queue import Queue
from meshd.raft.state.ranges import Ranges


class Submissions:
    def __init__(self, moment: Moment, matching: Matching, queue: Queue) -> None:
        self._moment = moment
        self._matching = matching
        self._queue = queue

    def submit(self, command: Submit) -> Submitted:
        number = number_of(command.id)
        if number in self._queue.seen or command.id in self._queue.jobs:
            return Submitted(command.id, is_new=False)
        self._admit(number, command.spec)
        job = self._new_job(command.id, command.spec, command.owner)
        job.ready.add(0, command.spec.array.count)
        self._start(job, number)
        return Submitted(job.id, is_new=True)

    def retry(self, command: RetryJob) -> Submitted:
        """The tasks that did not end well, under their own numbers in a new job; the others are skipped there."""
        number = number_of(command.new)
        if number in self._queue.seen or command.new in self._queue.jobs:
            return Submitted(command.new, is_new=False)
        spec, owner, again = self._to_retry(command)
        if not again:
            raise Conflict(
                f"job {command.job} has no failed, cancelled or timed-out task", hint="nothing is to be run again"
            )
        self._admit(number, spec)
        job = self._new_job(command.new, spec, owner)
        job.retry_of = command.job
        skipped = Ranges.of([(0, spec.array.count)])
        for start, stop in again:
            job.ready.add(start, stop)
            skipped.remove(start, stop)
        if skipped:
            job.ended[TaskState.SKIPPED] = skipped
        self._start(job, number)
        return Submitted(job.id, is_new=True)

    def _to_retry(self, command: RetryJob) -> tuple[JobSpec, str, list[tuple[int, int]]]:
        """What to run again, for whom, and which tasks: in order, since each is added, and cut out, at the end of a set."""
        old = self._queue.jobs.get(command.job)
        if old is None and command.spec is not None:
            count = command.spec.array.count
            if any(not start < stop <= count for start, stop in command.again):
                raise InvalidRequest(f"the tasks to run again are not among the {count} of job {command.job}")
            return command.spec, command.owner, sorted(command.again)
        if old is None:
            raise NotFound(f"no job {command.job}", hint="it may be too old; see `mesh ps`")
        if not old.is_final:
            raise Conflict(f"job {old.id} still runs", hint=f"mesh job wait {old.id}, or cancel it first")
        states = (TaskState.FAILED, TaskState.CANCELLED, TaskState.TIMED_OUT)
        return old.spec, old.owner, sorted(span for state in states for span in old.ended.get(state, ()))

    def _admit(self, number: int, spec: JobSpec) -> None:
        """Raises what a new job is refused for, before anything has changed."""
        self._queue.seen.check(number, self._moment.wall_ms)
        demand = Demand.of(spec)
        items = spec.array.items
        if isinstance(items, ItemsInline) and len(items.items) != spec.array.count:
            raise InvalidRequest(f"the array has {spec.array.count} tasks and {len(items.items)} items")
        self._queue.check_room()
        if not self._matching.knows(demand) and self._matching.is_full:
            raise Busy("too many unfinished jobs with different needs", hint="wait, or round what the jobs need")

    def _new_job(self, job_id: JobId, spec: JobSpec, owner: str) -> Job:
        self._queue.jobs_made += 1
        moment = self._moment
        return Job(
            id=job_id,
            number=self._queue.jobs_made,
            spec=spec,
            owner=owner,
            submitted_ms=moment.now_ms,
            submitted_wall_ms=moment.wall_ms,
        )

    def _start(self, job: Job, number: int) -> None:
        self._queue.seen.remember(number)
        if job.spec.on_lost is not OnLost.RERUN and date_ms_of(number) < self._queue.recovered_wall_ms:
            # Perhaps a resend of what the lost log had accepted, and begun.
            self._queue.put_on_hold(job)
        self._queue.enqueue(job)

    def clock_moved(self) -> None:
        """Set forward, ids are too old at once; set back, those made before a recovery are still dated before now."""
        self._queue.seen.forget_before(self._moment.wall_ms)
        self._queue.recovered_wall_ms = min(self._queue.recovered_wall_ms, self._moment.wall_ms)
