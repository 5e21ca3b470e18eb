"""The jobs, who holds which attempt, and every rule by which that changes (protocol.md 3, 5, 7).

Nothing here knows about sessions' commands: `sessions.py` says that leases become held,
that an attempt is adopted, lost, freed or ended; this module moves the task, keeps the
indexes true and leases what became possible. All changes of a task go through `_move`.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from msgspec.structs import replace

from meshd import codec
from meshd.errors import Busy, Conflict, InvalidRequest, NotFound
from meshd.model import AttemptKey, AttemptRun, ItemsInline, JobId, JobSpec, OnLost, Outcome, TaskState, runs_of
from meshd.placement import Demand
from meshd.raft.state.agenda import Agenda
from meshd.raft.state.commands import (
    Accepted,
    Cancel,
    JobChanged,
    Leased,
    Recovered,
    ReleaseJob,
    RetryJob,
    StopWanted,
    Submit,
    Submitted,
)
from meshd.raft.state.ids import SeenIds, date_ms_of, number_of
from meshd.raft.state.jobs import BARE_OUTCOME, Job, Row, after_loss, after_outcome, lost_after_ms
from meshd.raft.state.lineage import NUMBER_BITS, Lineage, is_next, since
from meshd.raft.state.matching import Matching, Node
from meshd.raft.state.moment import Moment
from meshd.raft.state.ranges import Ranges
from meshd.raft.state.runs import Run

LIVE_JOBS_MAX = 200_000
"""About 3 KB each at every voter."""

FINISHED_JOBS_MAX = 10_000
"""Finished jobs in the core. Beyond it the oldest is forgotten; once there is a history nothing is, and submissions wait."""

FINISHED_ROWS_MAX = 1_000_000
"""Tasks of finished jobs with something to tell; about 500 bytes each when nothing is inline."""

OUTCOME_BYTES_MAX = 256 << 20
"""Outcomes kept, of all jobs in the core. Beyond it finished jobs are forgotten, then submissions are refused."""

CANCEL_RANGES_MAX = 1_000
"""Ranges in one Cancel; each is cut out of the job's sets."""

FENCES_LOST_MAX = 1 << 32
"""More leases than any lost frame can have made; 65,000 such losses fit into the counter."""

LEASES_PER_ENTRY_MAX = 1_000
"""Rows and runs; about 10 ms. What is still possible then comes with the next entry, which is due at once."""

RECOVERED_AHEAD_MS_MAX = 30 * 86_400_000
"""A recovery is dated at most so long after the last entry: a clock that is far off would hold all that is submitted."""

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
        self.is_archiving = False
        """Finished jobs leave for the history (history.py): none is forgotten here."""
        self.archived_jobs = 0
        """Jobs in the history that the core has no more."""
        self.touched: dict[JobId, Job] = {}
        """What this entry changed, in order."""
        self._moment = moment
        self._matching = matching
        self._by_number: dict[int, Job] = {}
        self._timers: Agenda[tuple[int, int]] = Agenda()
        self._leases_left = LEASES_PER_ENTRY_MAX
        """In this entry."""

    @property
    def fence(self) -> int:
        """The newest one given."""
        return since(self.lineage, self.leases_made)

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

    # --- what users ask for

    def submit(self, command: Submit) -> Submitted:
        number = number_of(command.id)
        if number in self.seen or command.id in self.jobs:
            return Submitted(command.id, is_new=False)
        self._admit(number, command.spec)
        job = self._new_job(command.id, command.spec, command.owner)
        job.ready.add(0, command.spec.array.count)
        self._start(job, number)
        return Submitted(job.id, is_new=True)

    def retry(self, command: RetryJob) -> Submitted:
        """The tasks that did not end well, under their own numbers in a new job; the others are skipped there."""
        number = number_of(command.new)
        if number in self.seen or command.new in self.jobs:
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
            self.totals[TaskState.SKIPPED] += len(skipped)
        self._start(job, number)
        return Submitted(job.id, is_new=True)

    def _to_retry(self, command: RetryJob) -> tuple[JobSpec, str, list[tuple[int, int]]]:
        """What to run again, for whom, and which tasks: in order, since each is added, and cut out, at the end of a set."""
        old = self.jobs.get(command.job)
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

    def clock_moved(self) -> None:
        """Set forward, ids are too old at once; set back, those made before a recovery are still dated before now."""
        self.seen.forget_before(self._moment.wall_ms)
        self.recovered_wall_ms = min(self.recovered_wall_ms, self._moment.wall_ms)

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

    def _admit(self, number: int, spec: JobSpec) -> None:
        """Raises what a new job is refused for, before anything has changed."""
        self.seen.check(number, self._moment.wall_ms)
        demand = Demand.of(spec)
        items = spec.array.items
        if isinstance(items, ItemsInline) and len(items.items) != spec.array.count:
            raise InvalidRequest(f"the array has {spec.array.count} tasks and {len(items.items)} items")
        if len(self.jobs) - len(self.finished) >= LIVE_JOBS_MAX:
            raise Busy(f"{LIVE_JOBS_MAX} jobs are unfinished", hint="wait, or submit arrays instead of single jobs")
        if self.is_archiving and (len(self.finished) >= FINISHED_JOBS_MAX or self.finished_rows > FINISHED_ROWS_MAX):
            raise Busy(
                f"{len(self.finished)} finished jobs wait to be stored by a majority of the servers",
                hint="see `mesh cluster status`: is a disk full?",
            )
        if self.outcome_bytes > OUTCOME_BYTES_MAX:
            raise Busy("the results of unfinished jobs fill the queue's memory", hint="wait until some have finished")
        if not self._matching.knows(demand) and self._matching.is_full:
            raise Busy("too many unfinished jobs with different needs", hint="wait, or round what the jobs need")

    def _new_job(self, job_id: JobId, spec: JobSpec, owner: str) -> Job:
        self.jobs_made += 1
        moment = self._moment
        return Job(
            id=job_id,
            number=self.jobs_made,
            spec=spec,
            owner=owner,
            submitted_ms=moment.now_ms,
            submitted_wall_ms=moment.wall_ms,
        )

    def _start(self, job: Job, number: int) -> None:
        self.seen.remember(number)
        if job.spec.on_lost is not OnLost.RERUN and date_ms_of(number) < self.recovered_wall_ms:
            # Perhaps a resend of what the lost log had accepted, and begun.
            self._put_on_hold(job)
        self.add(job)
        self.totals[TaskState.READY] += len(job.ready)
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

    # --- recovery (protocol.md 10)

    def recover(self, command: Recovered) -> Accepted:
        """A new epoch begins: whatever may not run twice waits for an operator, since the log that is lost may have begun it."""
        if command.lineage == self.lineage:
            return Accepted()
        if not is_next(command.lineage, self.lineage):
            raise Conflict(f"recovery {len(command.lineage)} does not follow recovery {len(self.lineage)}")
        self.lineage = command.lineage
        latest_ms = self._moment.wall_ms + RECOVERED_AHEAD_MS_MAX
        self.recovered_wall_ms = max(self._moment.wall_ms, min(command.wall_ms, latest_ms))
        for job in self.jobs.values():
            if job.spec.on_lost is not OnLost.RERUN and not job.is_final:
                self._hold(job)
        return Accepted()

    def raise_fences(self, above: int) -> Accepted:
        """The next lease has a fence above this one, which is at most one raise ahead."""
        ahead = min(above - self.fence, FENCES_LOST_MAX, (1 << NUMBER_BITS) - 1 - self.leases_made)
        self.leases_made += max(0, ahead)
        return Accepted()

    def release(self, command: ReleaseJob) -> Accepted:
        job = self.jobs.get(command.job)
        if job is None:
            raise NotFound(f"no job {command.job}", hint="it may be too old; see `mesh ps`")
        if not job.hold or job.is_final:
            return Accepted()
        why = f"recovery {job.hold} held it"
        job.hold = 0
        del self.on_hold[job.id]
        for task in sorted(task for task, row in job.rows.items() if row.state is TaskState.HELD):
            # Failing one may have cancelled the rest of its job.
            if (row := job.rows.get(task)) is not None and row.state is TaskState.HELD:
                self._move(job, task, after_loss(job.spec, row, why, None))
                self._check_fails(job)
        self._settle(job)
        return Accepted()

    def _hold(self, job: Job) -> None:
        """Leases of live sessions follow when these end; no node can speak for an attempt of a held job."""
        self._put_on_hold(job)
        for task, row in list(job.rows.items()):
            if row.state is TaskState.HELD:
                if row.node is not None:
                    self._matching.nodes[row.node].held.pop(row.fence, None)
                self._move(job, task, _held(row, job.hold))
        self._settle(job)

    def _put_on_hold(self, job: Job) -> None:
        job.hold = len(self.lineage)
        self.on_hold[job.id] = job

    # --- leases

    def fill(self) -> None:
        """Lease whatever fits a free slot, then what nodes asked for ahead; as much as one entry may."""
        matching = self._matching
        matching.begin()
        shares: dict[int, int] = {}
        while self._leases_left and (pair := matching.next_pair()) is not None:
            job, node = self._by_number[pair[0]], pair[1]
            task = job.ready.first()
            count = job.untouched(task)
            if count:
                # Where several nodes have room, each gets its part of an array.
                share = shares.setdefault(job.number, -(-count // matching.places))
                count = min(count, share, matching.room_for(node, job), _at_once_left(job))
                self._lease_run(job, node, task, count, is_ahead=False)
            else:
                self._lease_again(job, node, task, is_ahead=False)
        while self._leases_left and (node_ := matching.next_hungry()) is not None:
            self._feed(node_)

    def _feed(self, node: Node) -> None:
        """Tasks of the jobs that it wants more of."""
        for job_id, wanted in node.ahead.items():
            job = self.jobs.get(job_id)
            missing = wanted - node.ahead_held.get(job_id, 0)
            if job is None or job.kind is None or missing <= 0 or not self._matching.suits(node, job.kind):
                continue
            while missing and self._leases_left and job.may_lease and (task := job.first_ahead()) is not None:
                count = min(job.untouched(task), missing, _at_once_left(job))
                if count:
                    self._lease_run(job, node, task, count, is_ahead=True)
                else:
                    self._lease_again(job, node, task, is_ahead=True)
                missing -= max(count, 1)
        if self._leases_left:
            self._matching.fed(node)

    def _lease_run(self, job: Job, node: Node, start: int, count: int, *, is_ahead: bool) -> None:
        first = self.fence + 1
        self.leases_made += count
        self._leases_left -= 1
        run = Run(start, start + count, first, node.id, node.epoch, is_ahead)
        job.lease(run)
        self._matching.take_run(node, job, run)
        self.totals[TaskState.READY] -= count
        self.totals[TaskState.LEASED] += count
        self._settle(job)
        self._moment.events.append(Leased(node.id, node.epoch, run.attempts(job.id)))

    def _lease_again(self, job: Job, node: Node, task: int, *, is_ahead: bool) -> None:
        old = job.rows[task]
        self.leases_made += 1
        self._leases_left -= 1
        row = Row(
            TaskState.LEASED,
            attempt=old.attempt + 1,
            tries=old.tries,
            losses=old.losses,
            fence=self.fence,
            node=node.id,
            epoch=node.epoch,
            outcome=old.outcome,
            is_ahead=is_ahead,
        )
        self._matching.take(node, row.fence, job, task, is_ahead=is_ahead)
        self._move(job, task, row)
        self._moment.events.append(Leased(node.id, node.epoch, AttemptRun(job.id, task, row.attempt, row.fence)))

    def _lay_out(self, job: Job, task: int) -> None:
        """If the task is in a run: more is to be said of it now, so it gets a row. Nothing changes by that."""
        run = job.runs.find(task)
        if run is not None:
            job.lay_out(run, task)
            self._matching.lay_out(self._matching.nodes[run.node], run.fence_of(task), job, task)

    def _lay_out_own(self, node: Node, key: AttemptKey) -> None:
        """The same, if this very attempt is the node's: nobody else's word makes a row."""
        if key.job not in node.runs:
            return
        job = node.runs[key.job][0]
        run = job.runs.find(key.task)
        if run is not None and run.node == node.id and (run.fence_of(key.task), 1) == (key.fence, key.attempt):
            self._lay_out(job, key.task)

    def _lay_out_all(self, node: Node) -> None:
        for job, run in node.each_run():
            for task in range(run.start, run.stop):
                self._lay_out(job, task)

    def adopt(self, node: Node, key: AttemptKey) -> bool:
        """The attempt runs on under the node's new epoch, if it is still the node's (protocol.md 5, Coming back)."""
        found = self._find(key)
        if found is None:
            return False
        job, row = found
        if row.node != node.id:
            return False
        if row.state is TaskState.HELD:
            del node.held[key.fence]
        elif row.state is TaskState.READY:
            # Ready by its loss and not leased since: the node still runs it, so let it, if there is room.
            if not (node.has_room and job.may_lease and job.kind and self._matching.fits_now(node, job.kind)):
                return False
            row = replace(row, is_ahead=False)
        else:
            return False
        state = TaskState.LEASED if row.started_ms is None else TaskState.RUNNING
        self._matching.take(node, key.fence, job, key.task, is_ahead=row.is_ahead)
        self._move(job, key.task, replace(row, state=state, epoch=node.epoch, due_ms=None, reason=""))
        return True

    def hold_leases(self, node: Node) -> None:
        """The session has ended: each of its tasks waits for the node, as long as `on_lost` and `lost_after` say."""
        self._lay_out_all(node)
        for fence in sorted(node.leases):
            job, task = node.leases[fence]
            row = job.rows[task]
            self._matching.give_back(node, fence, is_ahead=row.is_ahead)
            if row.stop is not None:
                self._move(job, task, after_loss(job.spec, row, "", None))
                continue
            if job.hold:
                self._move(job, task, _held(row, job.hold))
                continue
            node.held[fence] = (job, task)
            after_ms = lost_after_ms(job.spec, row, self._moment.now_ms)
            due_ms = None if after_ms is None else self._moment.now_ms + after_ms
            self._move(job, task, replace(row, state=TaskState.HELD, due_ms=due_ms, reason="its node is lost"))

    def lose_due(self, node: Node) -> None:
        """What is held for no time at all is lost at once."""
        now_ms = self._moment.now_ms
        for fence, (job, task) in sorted(node.held.items()):
            due_ms = job.rows[task].due_ms if fence in node.held else None
            if due_ms is not None and due_ms <= now_ms:
                self._lose(job, task, "its node was lost")

    def lose_held(self, node: Node, why: str) -> None:
        """What is still held for the node follows `on_lost` without further delay."""
        for fence in sorted(node.held):
            if fence in node.held:  # losing one may have cancelled the rest of its job
                self._lose(*node.held[fence], why)

    def free_unheld(self, node: Node, fence_max: int, held: frozenset[int]) -> None:
        """Leases the node does not hold, and will refuse, were never started: ready again, nothing lost."""
        for job, run in node.each_run():
            for task in range(run.start, run.stop):
                if run.fence_of(task) <= fence_max and run.fence_of(task) not in held:
                    self._lay_out(job, task)
        for fence in sorted(node.leases):
            if fence <= fence_max and fence not in held:
                self._free(node, fence)

    def take_back(self, node: Node, attempts: AttemptRun) -> None:
        """The node holds them, has not started them, and never will: ready again, nothing lost."""
        for key in attempts.each():
            self._lay_out_own(node, key)
            lease = node.leases.get(key.fence)
            if lease is not None and lease[0].key(lease[1], lease[0].rows[lease[1]]) == key:
                self._free(node, key.fence)

    def _free(self, node: Node, fence: int) -> None:
        job, task = node.leases[fence]
        row = job.rows[task]
        self._matching.give_back(node, fence, is_ahead=row.is_ahead)
        self._move(job, task, replace(row, state=row.stop or TaskState.READY, node=None, started_ms=None))

    def finish_bare(self, node: Node, attempts: AttemptRun) -> list[AttemptRun]:
        """All ended well and left nothing to tell; returns those that are not, or no longer, this session's."""
        job = self.jobs.get(attempts.job)
        if job is None:
            return [attempts]
        stale: list[AttemptRun] = []
        task, stop = attempts.task, attempts.task + attempts.count
        for run in job.runs.within(task, stop):
            if not (
                attempts.attempt == 1
                and run.node == node.id
                and run.epoch == node.epoch
                and run.fence - run.start == attempts.fence - attempts.task
            ):
                continue
            stale += self._finish_each(node, attempts.part(task - attempts.task, run.start - attempts.task))
            self._finish_run(node, job, run)
            task = run.stop
        if task < stop:
            stale += self._finish_each(node, attempts.part(task - attempts.task, attempts.count))
        return stale

    def _finish_run(self, node: Node, job: Job, run: Run) -> None:
        whole = job.runs.find(run.start)
        assert whole is not None
        job.finish(whole, run.start, run.stop)
        self._matching.give_back_run(node, job, run)
        self.totals[TaskState.LEASED] -= len(run)
        self.totals[TaskState.DONE] += len(run)
        self._settle(job)

    def _finish_each(self, node: Node, attempts: AttemptRun) -> tuple[AttemptRun, ...]:
        """Those that have rows, or were never this session's."""
        job = self.jobs[attempts.job]
        if not job.rows:
            return (attempts,) if attempts.count else ()
        return runs_of([key for key in attempts.each() if not self._finish_row(node, key, BARE_OUTCOME)])

    def finish(self, node: Node, key: AttemptKey, outcome: Outcome) -> bool:
        """The outcome of an attempt; False when it is not, or no longer, this session's."""
        if outcome.is_bare:
            return not self.finish_bare(node, AttemptRun(key.job, key.task, key.attempt, key.fence))
        self._lay_out_own(node, key)
        return self._finish_row(node, key, outcome)

    def _finish_row(self, node: Node, key: AttemptKey, outcome: Outcome) -> bool:
        lease = node.leases.get(key.fence)
        if lease is None:
            return False
        job, task = lease
        row = job.rows[task]
        if job.key(task, row) != key:
            return False
        self._matching.give_back(node, key.fence, is_ahead=row.is_ahead)
        # A good end that carries nothing is one more number in a range, not a row.
        encoded = None if outcome.is_bare and row.stop is None else codec.encode(outcome)
        self._move(job, task, after_outcome(job.spec, row, outcome, encoded, self._moment.now_ms))
        self._check_fails(job)
        return True

    def mark_running(self, node: Node, key: AttemptKey) -> None:
        self._lay_out_own(node, key)
        lease = node.leases.get(key.fence)
        if lease is None:
            return
        job, task = lease
        row = job.rows[task]
        if row.state is TaskState.LEASED and job.key(task, row) == key:
            self._move(job, task, replace(row, state=TaskState.RUNNING, started_ms=self._moment.now_ms))

    # --- time

    def begin(self) -> None:
        """The beginning of an entry."""
        self._leases_left = LEASES_PER_ENTRY_MAX

    def end(self) -> None:
        """The end of it."""
        if not self._leases_left:
            self._matching.tidy()

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
            elif job.rows[task].state is TaskState.HELD:
                self._lose(job, task, "its node did not come back in time")
            else:
                self._move(job, task, replace(job.rows[task], state=TaskState.READY, due_ms=None))

    def forget(self) -> None:
        """Drop the oldest finished jobs beyond the bounds; the newest one always stays."""
        while (
            not self.is_archiving
            and len(self.finished) > 1
            and (
                len(self.finished) > FINISHED_JOBS_MAX
                or self.finished_rows > FINISHED_ROWS_MAX
                or self.outcome_bytes > OUTCOME_BYTES_MAX
            )
        ):
            job = self.jobs[next(iter(self.finished))]
            self.put_away(job)
            for state in job.ended:
                self.totals[state] -= job.count(state)

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

    # --- how a task moves

    def _find(self, key: AttemptKey) -> tuple[Job, Row] | None:
        """The live task whose newest attempt this is: by fence, the rest of the key is for whoever forges one."""
        job = self.jobs.get(key.job)
        row = None if job is None else job.rows.get(key.task)
        if job is None or row is None or job.key(key.task, row) != key:
            return None
        return job, row

    def _lose(self, job: Job, task: int, why: str) -> None:
        row = job.rows[task]
        assert row.node is not None
        self._matching.nodes[row.node].held.pop(row.fence, None)
        self._move(job, task, after_loss(job.spec, row, why, None))
        self._check_fails(job)

    def _stop_tasks(self, job: Job, wanted: Ranges, state: TaskState, why: str) -> None:
        """End what does not run; what does is to be stopped, and ends so when its node says that it has.

        Each row is looked at once, however many ranges are wanted: a thousand of them held the loop for seconds.
        """
        for start, stop in wanted:
            for run in job.runs.within(start, stop):
                for task in range(run.start, run.stop):
                    self._lay_out(job, task)
        for task in sorted(task for task in job.rows if task in wanted):
            row = job.rows[task]
            match row.state:
                case TaskState.LEASED | TaskState.RUNNING:
                    if row.stop is None:
                        assert row.node is not None
                        self._move(job, task, replace(row, stop=state, reason=why))
                        self._moment.events.append(StopWanted(row.node, row.epoch, job.key(task, row)))
                case TaskState.HELD:
                    if row.node is not None:
                        self._matching.nodes[row.node].held.pop(row.fence, None)
                    self._move(job, task, replace(row, state=state, node=None, due_ms=None, reason=why))
                case _:
                    self._move(job, task, replace(row, state=state, node=None, due_ms=None, reason=why))
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
            self._settle(job)

    def _check_fails(self, job: Job) -> None:
        most = job.spec.array.max_fails
        failed = job.count(TaskState.FAILED) + job.count(TaskState.TIMED_OUT)
        if most and failed > most and not job.is_final:
            why = f"more than {most} tasks failed"
            self._stop_tasks(job, Ranges.of([(0, job.spec.array.count)]), TaskState.CANCELLED, why)

    def _move(self, job: Job, task: int, row: Row) -> None:
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
        self._settle(job)

    def _settle(self, job: Job) -> None:
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

    def announce_touched(self) -> list[Job]:
        """At the end of an entry: tell what changed."""
        changed = list(self.touched.values())
        self.touched.clear()
        self._moment.events.extend(JobChanged(job.id, job.is_final) for job in changed)
        return changed


def _held(row: Row, recovery: int) -> Row:
    """Until an operator releases it: what its node says does not count any more."""
    why = f"recovery {recovery} holds it: attempt {row.attempt} was at {row.node or 'a lost node'}"
    return replace(row, state=TaskState.HELD, node=None, due_ms=None, reason=why)


def _at_once_left(job: Job) -> int:
    at_once = job.spec.array.at_once
    return at_once - job.active if at_once else len(job.ready)


def _size(row: Row) -> int:
    return 0 if row.outcome is None else len(row.outcome)
