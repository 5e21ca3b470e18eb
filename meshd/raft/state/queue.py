"""The jobs, and every way in which a task of them moves (protocol.md 3, 7).

    submissions.py: new jobs    leases.py: who holds which attempt    recovery.py: what a lost log may have begun
                 └──────────────────────────┬───────────────────────────────┘
                        Queue: the task moves, sums and indexes stay true, whoever waits is told

Others decide what a task becomes; here it becomes that. A single task changes in `move` alone, neighbours together in
`lease`, `finish` and `_stop_tasks`; after each of them `settle` gives the job its place in line, or its end.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from msgspec.structs import replace

from meshd.errors import Busy, InvalidRequest, NotFound
from meshd.model import JobId, TaskState
from meshd.raft.state.agenda import Agenda
from meshd.raft.state.commands import Accepted, Cancel, JobChanged, StopWanted
from meshd.raft.state.ids import SeenIds
from meshd.raft.state.jobs import Job, Row, after_loss
from meshd.raft.state.lineage import Lineage, since
from meshd.raft.state.matching import Matching
from meshd.raft.state.moment import Moment
from meshd.raft.state.ranges import Ranges
from meshd.raft.state.runs import Run

LIVE_JOBS_MAX = 200_000
"""About 3 KB each at every voter."""

FINISHED_JOBS_MAX = 10_000
"""Finished jobs in the core: so many wait for the history at most, then submissions wait. None is dropped before it is there."""

FINISHED_ROWS_MAX = 1_000_000
"""Tasks of finished jobs with something to tell; about 500 bytes each when nothing is inline."""

OUTCOME_BYTES_MAX = 256 << 20
"""Outcomes kept, of all jobs in the core. Beyond it submissions wait, until finished jobs have left for the history."""

CANCEL_RANGES_MAX = 1_000
"""Ranges in one Cancel; each is cut out of the job's sets."""

_QUEUE_DEADLINE = -1
_TOTAL_DEADLINE = -2
"""Timers are keyed by (job number, task), or one of these for the whole job."""

_AT_A_NODE = (TaskState.LEASED, TaskState.RUNNING, TaskState.HELD)


class Queue:
    def __init__(self, moment: Moment, matching: Matching) -> None:
        self.jobs: dict[JobId, Job] = {}
        self.ordered: list[JobId] = []
        """All known ids, sorted."""
        self.names: dict[str, dict[JobId, None]] = {}
        """Ids by the job's name, oldest first."""
        self.finished: dict[JobId, None] = {}
        """In the order in which they ended."""
        self.seen = SeenIds()
        self.lineage: Lineage = ()
        self.recovered_wall_ms = 0
        """Of the newest recovery: an id dated before it may have been submitted to the log that was lost."""
        self.on_hold: dict[JobId, Job] = {}
        """Unfinished jobs that a recovery holds."""
        self.leases_made = 0
        self.jobs_made = 0
        self.outcome_bytes = 0
        self.finished_rows = 0
        self.totals = dict.fromkeys(TaskState, 0)
        """Tasks of all known jobs by state, those in the history among them."""
        self.archived_jobs = 0
        """Jobs in the history that the core has no more."""
        self.touched: dict[JobId, Job] = {}
        """What this entry changed, in order."""
        self._moment = moment
        self._matching = matching
        self._by_number: dict[int, Job] = {}
        self._timers: Agenda[tuple[int, int]] = Agenda()

    @property
    def fence(self) -> int:
        """The newest one given."""
        return since(self.lineage, self.leases_made)

    # --- the jobs

    def check_room(self) -> None:
        """Raises Busy when no further job fits."""
        if len(self.jobs) - len(self.finished) >= LIVE_JOBS_MAX:
            raise Busy(f"{LIVE_JOBS_MAX} jobs are unfinished", hint="wait, or submit arrays instead of single jobs")
        if len(self.finished) >= FINISHED_JOBS_MAX or self.finished_rows > FINISHED_ROWS_MAX:
            raise Busy(
                f"{len(self.finished)} finished jobs wait to be stored by a majority of the servers",
                hint="see `mesh cluster status`: is a disk full?",
            )
        if self.outcome_bytes > OUTCOME_BYTES_MAX:
            raise Busy(
                "results of jobs that are unfinished, or not stored yet, fill the queue's memory",
                hint="wait until some have finished",
            )

    def enqueue(self, job: Job) -> None:
        """A new job: known, counted and in line."""
        self.add(job)
        self.totals[TaskState.READY] += len(job.ready)
        for state, tasks in job.ended.items():
            self.totals[state] += len(tasks)
        self.index(job)
        self._touch(job)
        self._matching.line_up(job)

    def add(self, job: Job) -> None:
        """Know the job by its id and its name."""
        self.jobs[job.id] = job
        insort(self.ordered, job.id)
        if job.spec.name:
            self.names.setdefault(job.spec.name, {})[job.id] = None

    def index(self, job: Job) -> None:
        """Know the live job everywhere but in line: its kind, its timers."""
        self._by_number[job.number] = job
        self._matching.enrol(job)
        timeout = job.spec.timeout
        for name, within_ms in ((_QUEUE_DEADLINE, timeout.queue_ms), (_TOTAL_DEADLINE, timeout.total_ms)):
            # In a snapshot a job may have lived through one already: that one has fired.
            if within_ms and job.submitted_ms + within_ms > self._moment.now_ms:
                self._timers.put((job.number, name), job.submitted_ms + within_ms)
        for task, row in job.rows.items():
            if row.due_ms is not None:
                self._timers.put((job.number, task), row.due_ms)

    def numbered(self, number: int) -> Job:
        """The live job of that number."""
        return self._by_number[number]

    def put_on_hold(self, job: Job) -> None:
        job.hold = len(self.lineage)
        self.on_hold[job.id] = job

    def put_away(self, job: Job) -> None:
        """The core has this finished job no more; its tasks still count."""
        del self.jobs[job.id], self.finished[job.id]
        del self.ordered[bisect_left(self.ordered, job.id)]
        if job.spec.name:
            named = self.names[job.spec.name]
            del named[job.id]
            if not named:
                del self.names[job.spec.name]
        self.finished_rows -= len(job.results)
        self.outcome_bytes -= job.outcome_bytes

    def announce_touched(self) -> list[Job]:
        """At the end of an entry: tell what changed."""
        changed = list(self.touched.values())
        self.touched.clear()
        self._moment.events.extend(JobChanged(job.id, job.is_final) for job in changed)
        return changed

    def take_apart(self) -> None:
        """Free everything, the jobs last and one after the other: freed at once they hold the interpreter for 0.1 s."""
        # Whatever else refers to the jobs goes first: that is quick, since it frees none of them.
        self._by_number.clear()
        self.ordered.clear()
        self.seen.take_apart()
        while self.names:
            self.names.popitem()
        while self.jobs:
            self.jobs.popitem()

    # --- time

    def next_timer_ms(self) -> int | None:
        """When the next timer is due, on the state's clock; at once, if this entry could not lease all that fits."""
        if self._matching.has_more:
            return self._moment.now_ms
        head = self._timers.first()
        return None if head is None else head[0]

    def fire_due(self) -> None:
        while (key := self._timers.take_until(self._moment.now_ms)) is not None:
            number, task = key
            job = self._by_number[number]
            count = job.spec.array.count
            if task == _TOTAL_DEADLINE:
                self._stop_tasks(job, Ranges.of([(0, count)]), TaskState.TIMED_OUT, "its total timeout is over")
            elif task == _QUEUE_DEADLINE:
                self._end_untouched(job, TaskState.TIMED_OUT)
                self.check_fails(job)
            elif job.rows[task].state is TaskState.HELD:
                self.lose(job, task, "its node did not come back in time")
            else:
                self.move(job, task, replace(job.rows[task], state=TaskState.READY, due_ms=None))

    # --- how a task moves

    def move(self, job: Job, task: int, row: Row) -> None:
        """The one way in which a single task changes."""
        if row.is_ahead and row.state not in _AT_A_NODE:
            row = replace(row, is_ahead=False)
        before = job.rows.get(task)
        was = TaskState.READY if before is None else before.state
        job.put(task, row)
        self.totals[was] -= 1
        self.totals[row.state] += 1
        change = _size(row) - (0 if before is None else _size(before))
        self.outcome_bytes += change
        job.outcome_bytes += change
        if row.due_ms is not None:
            self._timers.put((job.number, task), row.due_ms)
        elif before is not None and before.due_ms is not None:
            self._timers.drop((job.number, task))
        if row.state is TaskState.READY:
            self._matching.stir(job)
        self.settle(job)

    def lease(self, job: Job, run: Run) -> None:
        """The job's first ready tasks, all untouched, are a session's from now."""
        job.lease(run)
        self.totals[TaskState.READY] -= len(run)
        self.totals[TaskState.LEASED] += len(run)
        self.settle(job)

    def finish(self, job: Job, run: Run, part: Run) -> None:
        """A part of one of the job's runs, or all of it, ended well and left nothing behind."""
        job.finish(run, part.start, part.stop)
        self.totals[TaskState.LEASED] -= len(part)
        self.totals[TaskState.DONE] += len(part)
        self.settle(job)

    def settle(self, job: Job) -> None:
        """After any change: the job ends with its last task, or keeps its right place in line."""
        self._touch(job)
        if job.unfinished:
            self._matching.line_up(job)
            return
        if job.is_final:
            return
        job.ended_wall_ms = self._moment.wall_ms
        self.on_hold.pop(job.id, None)
        self._matching.retire(job)
        self._timers.drop((job.number, _QUEUE_DEADLINE))
        self._timers.drop((job.number, _TOTAL_DEADLINE))
        del self._by_number[job.number]
        self.finished[job.id] = None
        self.finished_rows += len(job.results)

    def _touch(self, job: Job) -> None:
        job.version = self._moment.position
        job.record = None
        self.touched[job.id] = job

    def lay_out(self, job: Job, task: int) -> None:
        """If the task is in a run: more is to be said of it now, so it gets a row. Nothing changes by that."""
        run = job.runs.find(task)
        if run is not None:
            job.lay_out(run, task)
            self._matching.lay_out(self._matching.nodes[run.node], run.fence_of(task), job, task)

    def lose(self, job: Job, task: int, why: str) -> None:
        row = job.rows[task]
        assert row.node is not None
        self._matching.nodes[row.node].held.pop(row.fence, None)
        self.move(job, task, after_loss(job.spec, row, why, None))
        self.check_fails(job)

    def check_fails(self, job: Job) -> None:
        """Asked at every end: once all that is left of the job was told to stop, nothing new appears, and no row is looked at."""
        most = job.spec.array.max_fails
        failed = job.count(TaskState.FAILED) + job.count(TaskState.TIMED_OUT)
        if most and failed > most and job.unfinished > job.stopping:
            why = f"more than {most} tasks failed"
            self._stop_tasks(job, Ranges.of([(0, job.spec.array.count)]), TaskState.CANCELLED, why)

    # --- how tasks are stopped

    def cancel(self, command: Cancel) -> Accepted:
        job = self.jobs.get(command.job)
        if job is None:
            raise NotFound(f"no job {command.job}", hint="it may be too old; see `mesh ps`")
        count = job.spec.array.count
        ranges = ((0, count),) if command.tasks is None else command.tasks
        if len(ranges) > CANCEL_RANGES_MAX:
            raise InvalidRequest(f"at most {CANCEL_RANGES_MAX} ranges at a time, not {len(ranges)}")
        for start, stop in ranges:
            if not start < stop <= count:
                raise InvalidRequest(f"tasks {start}-{stop} are not among the {count} of job {job.id}")
        self._stop_tasks(job, Ranges.of(ranges), TaskState.CANCELLED, "cancelled")
        return Accepted()

    def _stop_tasks(self, job: Job, wanted: Ranges, state: TaskState, why: str) -> None:
        """End what does not run; what does is to be stopped, and ends so when its node says that it has.

        Each row is looked at once, however many ranges are wanted: a thousand of them held the loop for seconds.
        """
        for start, stop in wanted:
            for run in tuple(job.runs.within(start, stop)):
                for task in range(run.start, run.stop):
                    self.lay_out(job, task)
        for task in sorted(task for task in job.rows if task in wanted):
            row = job.rows[task]
            match row.state:
                case TaskState.LEASED | TaskState.RUNNING:
                    if row.stop is None:
                        assert row.node is not None
                        self.move(job, task, replace(row, stop=state, reason=why))
                        self._moment.events.append(StopWanted(row.node, row.epoch, job.key(task, row)))
                case TaskState.HELD:
                    if row.node is not None:
                        self._matching.nodes[row.node].held.pop(row.fence, None)
                    self.move(job, task, replace(row, state=state, node=None, due_ms=None, reason=why))
                case _:
                    self.move(job, task, replace(row, state=state, node=None, due_ms=None, reason=why))
        # No row among them is ready any more: what still is never had an attempt.
        self._ended_untouched(job, sum(job.end_untouched(start, stop, state) for start, stop in wanted), state)

    def _end_untouched(self, job: Job, state: TaskState) -> None:
        """End the tasks that never had an attempt; those with one stay as they are."""
        again = list(job.again)
        for start, stop in again:
            job.ready.remove(start, stop)
        moved = job.end_untouched(0, job.spec.array.count, state)
        for start, stop in again:
            job.ready.add(start, stop)
        self._ended_untouched(job, moved, state)

    def _ended_untouched(self, job: Job, moved: int, state: TaskState) -> None:
        if moved:
            self.totals[TaskState.READY] -= moved
            self.totals[state] += moved
            self.settle(job)


def _size(row: Row) -> int:
    return 0 if row.outcome is None else len(row.outcome)
