"""Who holds which attempt: leases are made, and end by the word of a node or because its session did (protocol.md 3, 5).

    free slot, or asked for ahead ──lease──▶ held by a session ──its node says how it ended──▶ an outcome
                                                  │        └──its node says it never began──▶ ready again
                                                  └──the session ended──▶ waits for its node ──▶ adopted | lost

Sessions say when (`sessions.py`), the queue moves the task (`queue.py`); which task meets which node is `matching.py`'s.
A node's word counts for exactly what is leased to it: the attempt's whole key has to be right.
"""

from __future__ import annotations

from msgspec.structs import replace

from meshd import codec
from meshd.model import AttemptKey, AttemptRun, Outcome, TaskState, runs_of
from meshd.raft.state.commands import Leased
from meshd.raft.state.jobs import (
    BARE_OUTCOME,
    Job,
    Row,
    after_loss,
    after_outcome,
    after_recovery,
    bounded,
    lost_after_ms,
)
from meshd.raft.state.matching import Matching, Node
from meshd.raft.state.moment import Moment
from meshd.raft.state.queue import Queue
from meshd.raft.state.runs import Run

LEASES_PER_ENTRY_MAX = 1_000
"""Rows and runs; about 10 ms. What is still possible then comes with the next entry, which is due at once."""


class Leases:
    def __init__(self, moment: Moment, matching: Matching, queue: Queue) -> None:
        self._moment = moment
        self._matching = matching
        self._queue = queue
        self._left = LEASES_PER_ENTRY_MAX
        """That may still be made in this entry."""

    # --- made

    def begin(self) -> None:
        """The beginning of an entry."""
        self._left = LEASES_PER_ENTRY_MAX

    def end(self) -> None:
        """The end of it."""
        if not self._left:
            self._matching.tidy()

    def fill(self) -> None:
        """Lease whatever fits a free slot, then what nodes asked for ahead; as much as one entry may."""
        matching = self._matching
        matching.begin()
        shares: dict[int, int] = {}
        while self._left and (pair := matching.next_pair()) is not None:
            job, node = self._queue.numbered(pair[0]), pair[1]
            task = job.ready.first()
            count = job.untouched(task)
            if count:
                # Where several nodes have room, each gets its part of an array.
                share = shares.setdefault(job.number, -(-count // matching.places))
                count = min(count, share, matching.room_for(node, job), _at_once_left(job))
                self._lease_run(job, node, task, count, is_ahead=False)
            else:
                self._lease_again(job, node, task, is_ahead=False)
        while self._left and (node_ := matching.next_hungry()) is not None:
            self._feed(node_)

    def _feed(self, node: Node) -> None:
        """Tasks of the jobs that it wants more of."""
        for job_id, wanted in node.ahead.items():
            job = self._queue.jobs.get(job_id)
            missing = wanted - node.ahead_held.get(job_id, 0)
            if job is None or job.kind is None or missing <= 0 or not self._matching.suits(node, job.kind):
                continue
            while missing and self._left and job.may_lease and (task := job.first_ahead()) is not None:
                count = min(job.untouched(task), missing, _at_once_left(job))
                if count:
                    self._lease_run(job, node, task, count, is_ahead=True)
                else:
                    self._lease_again(job, node, task, is_ahead=True)
                missing -= max(count, 1)
        if self._left:
            self._matching.fed(node)

    def _lease_run(self, job: Job, node: Node, start: int, count: int, *, is_ahead: bool) -> None:
        first = self._queue.fence + 1
        self._queue.leases_made += count
        self._left -= 1
        run = Run(start, start + count, first, node.id, node.epoch, is_ahead)
        self._matching.take_run(node, job, run)
        self._queue.lease(job, run)
        self._moment.events.append(Leased(node.id, node.epoch, run.attempts(job.id)))

    def _lease_again(self, job: Job, node: Node, task: int, *, is_ahead: bool) -> None:
        old = job.rows[task]
        self._queue.leases_made += 1
        self._left -= 1
        row = Row(
            TaskState.LEASED,
            attempt=old.attempt + 1,
            tries=old.tries,
            losses=old.losses,
            fence=self._queue.fence,
            node=node.id,
            epoch=node.epoch,
            outcome=old.outcome,
            is_ahead=is_ahead,
        )
        self._matching.take(node, row.fence, job, task, is_ahead=is_ahead)
        self._queue.move(job, task, row)
        self._moment.events.append(Leased(node.id, node.epoch, AttemptRun(job.id, task, row.attempt, row.fence)))

    # --- ended by the word of their node

    def mark_running(self, node: Node, key: AttemptKey) -> None:
        self._lay_out_own(node, key)
        lease = node.leases.get(key.fence)
        if lease is None:
            return
        job, task = lease
        row = job.rows[task]
        if row.state is TaskState.LEASED and job.key(task, row) == key:
            self._queue.move(job, task, replace(row, state=TaskState.RUNNING, started_ms=self._moment.now_ms))

    def finish(self, node: Node, key: AttemptKey, outcome: Outcome) -> bool:
        """The outcome of an attempt; False when it is not, or no longer, this session's."""
        if outcome.is_bare:
            return not self.finish_bare(node, AttemptRun(key.job, key.task, key.attempt, key.fence))
        self._lay_out_own(node, key)
        return self._finish_row(node, key, outcome)

    def finish_bare(self, node: Node, attempts: AttemptRun) -> list[AttemptRun]:
        """All ended well and left nothing to tell; returns those that are not, or no longer, this session's."""
        job = self._queue.jobs.get(attempts.job)
        if job is None:
            return [attempts]
        stale: list[AttemptRun] = []
        task, stop = attempts.task, attempts.task + attempts.count
        for part in tuple(job.runs.within(task, stop)):
            if not (
                attempts.attempt == 1
                and part.node == node.id
                and part.epoch == node.epoch
                and part.fence - part.start == attempts.fence - attempts.task
            ):
                continue
            stale += self._finish_each(node, attempts.part(task - attempts.task, part.start - attempts.task))
            task = part.start
            run = job.runs.find(task)
            if run is None:
                break  # too many have failed: what is left of the job was stopped, and has rows
            self._matching.give_back_run(node, job, part)
            self._queue.finish(job, run, part)
            task = part.stop
        if task < stop:
            stale += self._finish_each(node, attempts.part(task - attempts.task, attempts.count))
        return stale

    def _finish_each(self, node: Node, attempts: AttemptRun) -> tuple[AttemptRun, ...]:
        """Those that have rows, or were never this session's."""
        job = self._queue.jobs[attempts.job]
        if not job.rows:
            return (attempts,) if attempts.count else ()
        return runs_of([key for key in attempts.each() if not self._finish_row(node, key, BARE_OUTCOME)])

    def _finish_row(self, node: Node, key: AttemptKey, outcome: Outcome) -> bool:
        lease = node.leases.get(key.fence)
        if lease is None:
            return False
        job, task = lease
        row = job.rows[task]
        if job.key(task, row) != key:
            return False
        self._matching.give_back(node, key.fence, is_ahead=row.is_ahead)
        if not outcome.is_bare:
            outcome = bounded(job.spec, outcome)
        # A good end that carries nothing is one more number in a range, not a row.
        encoded = None if outcome.is_bare and row.stop is None else codec.encode(outcome)
        self._queue.move(job, task, after_outcome(job.spec, row, outcome, encoded, self._moment.now_ms))
        self._queue.check_fails(job)
        return True

    def take_back(self, node: Node, attempts: AttemptRun) -> None:
        """The node holds them, has not started them, and never will: ready again, nothing lost."""
        for key in attempts.each():
            self._lay_out_own(node, key)
            lease = node.leases.get(key.fence)
            if lease is not None and lease[0].key(lease[1], lease[0].rows[lease[1]]) == key:
                self._free(node, key.fence)

    def free_unheld(self, node: Node, fence_max: int, held: frozenset[int]) -> None:
        """Leases the node does not hold, and will refuse, were never started: ready again, nothing lost."""
        for job, run in node.each_run():
            for task in range(run.start, run.stop):
                if run.fence_of(task) <= fence_max and run.fence_of(task) not in held:
                    self._queue.lay_out(job, task)
        for fence in sorted(node.leases):
            if fence <= fence_max and fence not in held:
                self._free(node, fence)

    def _free(self, node: Node, fence: int) -> None:
        job, task = node.leases[fence]
        row = job.rows[task]
        self._matching.give_back(node, fence, is_ahead=row.is_ahead)
        self._queue.move(job, task, replace(row, state=row.stop or TaskState.READY, node=None, started_ms=None))

    def _lay_out_own(self, node: Node, key: AttemptKey) -> None:
        """A row for the attempt, if this very one is the node's: nobody else's word makes a row."""
        if key.job not in node.runs:
            return
        job = node.runs[key.job][0]
        run = job.runs.find(key.task)
        if run is not None and run.node == node.id and (run.fence_of(key.task), 1) == (key.fence, key.attempt):
            self._queue.lay_out(job, key.task)

    # --- ended with their session, and what comes back of them

    def hold_leases(self, node: Node) -> None:
        """The session has ended: each of its tasks waits for the node, as long as `on_lost` and `lost_after` say."""
        for job, run in node.each_run():
            for task in range(run.start, run.stop):
                self._queue.lay_out(job, task)
        for fence in sorted(node.leases):
            job, task = node.leases[fence]
            row = job.rows[task]
            self._matching.give_back(node, fence, is_ahead=row.is_ahead)
            if row.stop is not None:
                self._queue.move(job, task, after_loss(job.spec, row, "", None))
                continue
            if job.hold:
                self._queue.move(job, task, after_recovery(row, job.hold))
                continue
            node.held[fence] = (job, task)
            after_ms = lost_after_ms(job.spec, row, self._moment.now_ms)
            due_ms = None if after_ms is None else self._moment.now_ms + after_ms
            self._queue.move(job, task, replace(row, state=TaskState.HELD, due_ms=due_ms, reason="its node is lost"))

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
        self._queue.move(job, key.task, replace(row, state=state, epoch=node.epoch, due_ms=None, reason=""))
        return True

    def _find(self, key: AttemptKey) -> tuple[Job, Row] | None:
        """The live task whose newest attempt this is: by fence, the rest of the key is for whoever forges one."""
        job = self._queue.jobs.get(key.job)
        row = None if job is None else job.rows.get(key.task)
        if job is None or row is None or job.key(key.task, row) != key:
            return None
        return job, row

    def lose_due(self, node: Node) -> None:
        """What is held for no time at all is lost at once."""
        now_ms = self._moment.now_ms
        for fence, (job, task) in sorted(node.held.items()):
            due_ms = job.rows[task].due_ms if fence in node.held else None
            if due_ms is not None and due_ms <= now_ms:
                self._queue.lose(job, task, "its node was lost")

    def lose_held(self, node: Node, why: str) -> None:
        """What is still held for the node follows `on_lost` without further delay."""
        for fence in sorted(node.held):
            if fence in node.held:  # losing one may have cancelled the rest of its job
                self._queue.lose(*node.held[fence], why)


def _at_once_left(job: Job) -> int:
    at_once = job.spec.array.at_once
    return at_once - job.active if at_once else len(job.ready)
