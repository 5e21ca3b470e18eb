"""A job as `apply` keeps it, and what becomes of a task when an attempt of it ends.

                       ┌──────────── backoff over ────────────┐
                       ▼                                      │
      submit ──────▶ READY ──lease──▶ LEASED ──▶ RUNNING ──▶ WAITING   (own failure, tries left)
                       ▲                 └────┬─────┘
                       │        session ended │     ╲ outcome
           rerun, wait │                      ▼      ╲
                       └─────────────────── HELD      ▶ DONE | FAILED | TIMED_OUT | CANCELLED
                              fail: FAILED ◀──┘         (SKIPPED only at birth, by a retry)

Tasks that nothing has happened to have no row: they are a range in `ready`. The first
lease makes them a part of a run (runs.py); a row is made when more is to be said of one.
It is kept among `rows` while the task lives, among `results` once it has ended; a first
attempt that ended well and left nothing behind leaves no row.
Rows are immutable, so a snapshot can be packed in a thread while the queue goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct, field
from msgspec.structs import replace

from meshd import codec
from meshd.model import (
    FINAL_STATES,
    AttemptKey,
    EndReason,
    Inline,
    JobId,
    JobSpec,
    NodeId,
    OnLost,
    Outcome,
    RetryOn,
    TaskState,
)
from meshd.raft.state.ranges import Ranges
from meshd.raft.state.runs import Run, Runs

if TYPE_CHECKING:
    from meshd.raft.state.matching import Kind

LOST_AFTER_AUTO_MAX_MS = 120_000
"""`auto` waits a tenth of the time an attempt has run, at most this long, for its node to come back."""

AHEAD_LOSSES_MAX = 3
"""A task that was lost more often is leased one by one: perhaps it is what takes nodes down, and all that they held ahead
with it, for which that counts as a loss as well."""

REASON_CHARS_MAX = 200

MESSAGE_CHARS = 256
"""Of an outcome, however many tasks its job has: enough for the first lines of a trap."""

BARE_OUTCOME = Outcome(reason=EndReason.EXIT, exit_code=0)
"""The outcome of a done task without a row."""

_RETRY_CLASS = {
    EndReason.EXIT: RetryOn.EXIT,
    EndReason.SIGNAL: RetryOn.EXIT,
    EndReason.TRAP: RetryOn.EXIT,
    EndReason.TIMEOUT: RetryOn.TIMEOUT,
    EndReason.MEMORY_LIMIT: RetryOn.LIMIT,
    EndReason.FUEL_LIMIT: RetryOn.LIMIT,
    EndReason.OUTPUT_LIMIT: RetryOn.LIMIT,
}


class Row(Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """One task of which there is more to say than where it stands in a run."""

    state: TaskState
    attempt: int = 0
    """Leases so far."""
    tries: int = 0
    """Attempts that ended by the job's own doing."""
    losses: int = 0
    fence: int = 0
    """Of the newest attempt."""
    node: NodeId | None = None
    """Whose the newest attempt is, or was when it was lost; None when that node can never speak for it again."""
    epoch: int = 0
    started_ms: int | None = None
    """When the node reported that it runs."""
    due_ms: int | None = None
    """WAITING: when it becomes ready. HELD: when it follows `on_lost`; None is never."""
    stop: TaskState | None = None
    """The attempt is unwanted: whatever it ends as, the task becomes this."""
    outcome: bytes | None = None
    """The encoded Outcome of the last attempt that ended."""
    reason: str = ""
    is_ahead: bool = False
    """LEASED, RUNNING, HELD: the attempt takes nothing of its node's resources (runs.py)."""


class Job(Struct, eq=False, gc=False):
    """Nothing that it refers to refers to it, so no cycle needs the collector; only its ranges have arrays to look at."""

    id: JobId
    number: int
    """Jobs are numbered as they come: the age in `priority, then age`."""
    spec: JobSpec
    owner: str
    submitted_ms: int
    submitted_wall_ms: int
    retry_of: JobId | None = None
    version: int = 0
    ended_wall_ms: int | None = None
    ready: Ranges = field(default_factory=Ranges)
    ended: dict[TaskState, Ranges] = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)
    results: dict[int, Row] = field(default_factory=dict)
    runs: Runs = field(default_factory=Runs)
    again: Ranges = field(default_factory=Ranges)
    """What is ready and has a row."""
    fragile: Ranges = field(default_factory=Ranges)
    """What of that was lost more often than AHEAD_LOSSES_MAX."""
    waiting: int = 0
    leased: int = 0
    running: int = 0
    held: int = 0
    stopping: int = 0
    """Live tasks that were told to stop: no other end awaits them."""
    hold: int = 0
    """The recovery that holds it until an operator releases it (protocol.md 10); 0 is none."""
    outcome_bytes: int = 0
    """Of the outcomes in its rows."""
    kind: Kind | None = None
    """Set while the job is live."""
    record: JobRecord | None = None
    """The job as it stands, for snapshots; None when it has changed since it was made."""
    measured: int = 0
    """Bytes of its spec; 0 before somebody asked."""

    @property
    def spec_bytes(self) -> int:
        if not self.measured:
            self.measured = len(codec.encode(self.spec))
        return self.measured

    @property
    def active(self) -> int:
        """Attempts that run or may run."""
        return self.leased + self.running + self.held

    @property
    def is_final(self) -> bool:
        return self.ended_wall_ms is not None

    @property
    def unfinished(self) -> int:
        return len(self.ready) + self.waiting + self.active

    @property
    def may_lease(self) -> bool:
        at_once = self.spec.array.at_once
        return bool(self.ready) and not self.hold and (not at_once or self.active < at_once)

    def count(self, state: TaskState) -> int:
        match state:
            case TaskState.READY:
                return len(self.ready)
            case TaskState.WAITING:
                return self.waiting
            case TaskState.LEASED:
                return self.leased
            case TaskState.RUNNING:
                return self.running
            case TaskState.HELD:
                return self.held
            case _:
                return len(self.ended[state]) if state in self.ended else 0

    @property
    def state(self) -> TaskState:
        """Derived: what the job as a whole is doing, or how it ended."""
        if self.is_final:
            for state in (TaskState.FAILED, TaskState.TIMED_OUT, TaskState.CANCELLED, TaskState.DONE):
                if self.count(state):
                    return state
            return TaskState.SKIPPED
        if self.hold:
            return TaskState.HELD
        if self.running or self.leased or self.held:
            return TaskState.RUNNING
        return TaskState.READY if self.ready else TaskState.WAITING

    def state_of(self, task: int) -> TaskState:
        row = self.row(task)
        if row is not None:
            return row.state
        if task in self.ready:
            return TaskState.READY
        if self.runs.find(task) is not None:
            return TaskState.LEASED
        return next(state for state, tasks in self.ended.items() if task in tasks)

    def row(self, task: int) -> Row | None:
        row = self.rows.get(task) or self.results.get(task)
        if row is None and (run := self.runs.find(task)) is not None:
            return row_of(run, task)
        return row

    def untouched(self, task: int) -> int:
        """How many tasks, from this ready one on, are ready neighbours and were never leased."""
        if task in self.again:
            return 0
        stop, again = self.ready.bound_after(task), self.again.bound_after(task)
        assert stop is not None
        return (stop if again is None else min(stop, again)) - task

    def first_ahead(self) -> int | None:
        """The first ready task that may be held ahead: none that was lost often."""
        task: int | None = self.ready.first() if self.ready else None
        for low, high in self.fragile:
            if task is None or task < low:
                break
            if task < high:
                task = high if high in self.ready else self.ready.bound_after(high)
        return task

    def lease(self, run: Run) -> None:
        """The first ready tasks, all untouched."""
        self.ready.remove(run.start, run.stop)
        self.runs.add(run)
        self.leased += len(run)

    def finish(self, run: Run, start: int, stop: int) -> None:
        """These of the run ended well and left nothing behind."""
        self.runs.cut(run, start, stop)
        self.leased -= stop - start
        self._ended(TaskState.DONE).add(start, stop)

    def lay_out(self, run: Run, task: int) -> Row:
        """One task of the run gets a row, which says the same."""
        self.runs.cut(run, task, task + 1)
        row = self.rows[task] = row_of(run, task)
        # A snapshot has to say it in the same way, or the replica that begins with it has another hash.
        self.record = None
        return row

    def put(self, task: int, row: Row) -> None:
        """Move one live task, which is in no run, to what the row says."""
        before = self.rows.get(task)
        if before is not None and before.stop is not None:
            self.stopping -= 1
        if before is None or before.state is TaskState.READY:
            self.ready.remove(task, task + 1)
            if before is not None:
                self.again.remove(task, task + 1)
                if before.losses > AHEAD_LOSSES_MAX:
                    self.fragile.remove(task, task + 1)
        else:
            self._count(before.state, -1)
        if row.state in FINAL_STATES:
            self.rows.pop(task, None)
            if not _is_bare(row):
                self.results[task] = row
            self._ended(row.state).add(task, task + 1)
            return
        self.rows[task] = row
        if row.stop is not None:
            self.stopping += 1
        if row.state is TaskState.READY:
            self.ready.add(task, task + 1)
            self._is_ready_again(task, row)
        else:
            self._count(row.state, +1)

    def _is_ready_again(self, task: int, row: Row) -> None:
        self.again.add(task, task + 1)
        if row.losses > AHEAD_LOSSES_MAX:
            self.fragile.add(task, task + 1)

    def end_untouched(self, start: int, stop: int, state: TaskState) -> int:
        """End the tasks of [start, stop) that never had an attempt, as ranges; returns how many these were.

        Live tasks with a row must have been ended before.
        """
        found = list(self.ready.within(start, stop))
        for low, high in found:
            self._ended(state).add(low, high)
            self.ready.remove(low, high)
        return sum(high - low for low, high in found)

    def _ended(self, state: TaskState) -> Ranges:
        tasks = self.ended.get(state)
        if tasks is None:
            tasks = self.ended[state] = Ranges()
        return tasks

    def _count(self, state: TaskState, change: int) -> None:
        match state:
            case TaskState.WAITING:
                self.waiting += change
            case TaskState.LEASED:
                self.leased += change
            case TaskState.RUNNING:
                self.running += change
            case _:
                self.held += change

    def key(self, task: int, row: Row) -> AttemptKey:
        return AttemptKey(self.id, task, row.attempt, row.fence)

    def recorded(self) -> JobRecord:
        if self.record is None:
            self.record = JobRecord(
                id=self.id,
                number=self.number,
                spec=self.spec,
                owner=self.owner,
                submitted_ms=self.submitted_ms,
                submitted_wall_ms=self.submitted_wall_ms,
                retry_of=self.retry_of,
                version=self.version,
                ended_wall_ms=self.ended_wall_ms,
                ready=self.ready.packed(),
                ended=tuple([(state, tasks.packed()) for state, tasks in self.ended.items()]),
                rows=self.rows.copy(),
                results=self.results.copy(),
                hold=self.hold,
                runs=self.runs.packed(),
            )
        return self.record


class JobRecord(Struct, frozen=True, array_like=True, gc=False):
    """A job in a snapshot. Its rows may be packed apart, a thousand at a time."""

    id: JobId
    number: int
    spec: JobSpec
    owner: str
    submitted_ms: int
    submitted_wall_ms: int
    retry_of: JobId | None
    version: int
    ended_wall_ms: int | None
    ready: bytes
    ended: tuple[tuple[TaskState, bytes], ...]
    rows: dict[int, Row]
    results: dict[int, Row]
    hold: int = 0
    runs: tuple[Run, ...] = ()

    def job(self) -> Job:
        job = Job(
            id=self.id,
            number=self.number,
            spec=self.spec,
            owner=self.owner,
            submitted_ms=self.submitted_ms,
            submitted_wall_ms=self.submitted_wall_ms,
            retry_of=self.retry_of,
            version=self.version,
            ended_wall_ms=self.ended_wall_ms,
            ready=Ranges.unpacked(self.ready),
            ended={state: Ranges.unpacked(data) for state, data in self.ended},
            rows=dict(self.rows),
            results=dict(self.results),
            hold=self.hold,
            runs=Runs.of(self.runs),
            leased=sum(map(len, self.runs)),
        )
        for task, row in sorted(job.rows.items()):
            if row.stop is not None:
                job.stopping += 1
            if row.state is TaskState.READY:
                job._is_ready_again(task, row)
            else:
                job._count(row.state, +1)
        return job


def row_of(run: Run, task: int) -> Row:
    """What is to be said of a task in a run."""
    return Row(
        TaskState.LEASED,
        attempt=1,
        fence=run.fence_of(task),
        node=run.node,
        epoch=run.epoch,
        is_ahead=run.is_ahead,
    )


def bounded(spec: JobSpec, outcome: Outcome) -> Outcome:
    """The outcome as the log takes it of a task of this job; instead of one that leaves too much, what says so.

    A node asks before it reports, so that nothing of its is refused; apply asks again, since workers may lie.
    """
    most = spec.inline_bytes_max
    for name, content in (("stdout", outcome.stdout), ("stderr", outcome.stderr), ("outputs", outcome.outputs)):
        if isinstance(content, Inline) and len(content.data) > most:
            why = f"the backend's outcome breaks a limit: {name} of {len(content.data)} bytes inline, not {most}"
            return Outcome(EndReason.BACKEND, message=why)
    if len(outcome.message) > (chars := max(most, MESSAGE_CHARS)):
        return replace(outcome, message=outcome.message[:chars])
    return outcome


def after_outcome(spec: JobSpec, row: Row, outcome: Outcome, encoded: bytes | None, now_ms: int) -> Row:
    """The task's row after its current attempt ended with this outcome. The node has forgotten the attempt."""
    ended = replace(row, started_ms=None, due_ms=None, outcome=encoded, reason="")
    if row.stop is not None:
        tries = row.tries + (1 if outcome.is_success or outcome.reason in _RETRY_CLASS else 0)
        return replace(ended, state=row.stop, tries=tries, reason=row.reason)
    if outcome.is_success:
        return replace(ended, state=TaskState.DONE, tries=row.tries + 1)
    match outcome.reason:
        case EndReason.INVALID:
            return replace(
                ended, state=TaskState.FAILED, tries=row.tries + 1, reason=_short("it could not run", outcome)
            )
        case EndReason.BACKEND:
            # A backend that always fails at once must not burn the crash limit in a second.
            delay_ms = backoff_ms(spec, row.losses + 1)
            lost = after_loss(spec, ended, _short("its backend failed", outcome), now_ms + delay_ms)
        case EndReason.LOST | EndReason.CANCELLED:
            # CANCELLED without our wish is a node that drains or stops: a loss that says good-bye.
            lost = after_loss(spec, ended, "its node stopped it", None)
        case reason:
            tries = row.tries + 1
            if tries < spec.retry.attempts and _RETRY_CLASS[reason] in spec.retry.on:
                delay_ms = backoff_ms(spec, tries)
                again = replace(
                    ended, node=None, tries=tries, reason=f"try {tries} of {spec.retry.attempts} ended: {reason.value}"
                )
                if delay_ms:
                    return replace(again, state=TaskState.WAITING, due_ms=now_ms + delay_ms)
                return replace(again, state=TaskState.READY)
            state = TaskState.TIMED_OUT if reason is EndReason.TIMEOUT else TaskState.FAILED
            return replace(ended, state=state, tries=tries, reason=f"ended: {reason.value}")
    # The node has let go of the attempt: it can never list it again.
    return lost if lost.state in FINAL_STATES else replace(lost, node=None)


def after_loss(spec: JobSpec, row: Row, why: str, due_ms: int | None) -> Row:
    """The task's row after its attempt was lost: `on_lost`, within the crash limit. `due_ms`: not ready before then."""
    if row.stop is not None:
        return replace(row, state=row.stop, started_ms=None, due_ms=None)
    losses = row.losses + 1
    lost = replace(row, losses=losses, started_ms=None, due_ms=None, reason=why)
    if spec.on_lost is OnLost.FAIL:
        return replace(lost, state=TaskState.FAILED, reason=f"lost: {why}")
    if losses >= spec.retry.crash_limit:
        return replace(lost, state=TaskState.FAILED, reason=f"lost {losses} times, its crash limit: {why}")
    if due_ms is not None:
        return replace(lost, state=TaskState.WAITING, due_ms=due_ms)
    return replace(lost, state=TaskState.READY)


def after_recovery(row: Row, recovery: int) -> Row:
    """Held until an operator releases it: what its node says does not count any more."""
    why = f"recovery {recovery} holds it: attempt {row.attempt} was at {row.node or 'a lost node'}"
    return replace(row, state=TaskState.HELD, node=None, due_ms=None, reason=why)


def lost_after_ms(spec: JobSpec, row: Row, now_ms: int) -> int | None:
    """How long a lost node may take to come back to this attempt; None is for ever."""
    if spec.on_lost is OnLost.WAIT:
        return None
    if spec.lost_after_ms is not None:
        return spec.lost_after_ms
    ran_ms = 0 if row.started_ms is None else now_ms - row.started_ms
    return min(ran_ms // 10, LOST_AFTER_AUTO_MAX_MS)


def backoff_ms(spec: JobSpec, failures: int) -> int:
    """Doubles with each failure, from the first one's minimum to the maximum."""
    # The shift is bounded: beyond 2**60 times the minimum, every maximum is reached.
    return min(spec.retry.backoff_min_ms << min(failures - 1, 60), spec.retry.backoff_max_ms)


def _is_bare(row: Row) -> bool:
    return row.state is TaskState.DONE and row.outcome is None and row.attempt == 1


def _short(why: str, outcome: Outcome) -> str:
    return f"{why}: {outcome.message}"[:REASON_CHARS_MAX] if outcome.message else why
