"""Bugs for the checks that no single rule's absence trips: each breaks the sentence under which it stands here.

Like the ablations, each is what a plausible implementation would do. `tests/sim/test_ablations.py` names
the check that catches it, and a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace as changed

from meshd.errors import Conflict, Corrupt, NotFound
from meshd.gossip import membership
from meshd.gossip.facts import Facts
from meshd.gossip.own import OwnFacts
from meshd.model import AttemptKey, AttemptRun, EndReason, JobSpec, NodeId, Outcome, TaskState
from meshd.raft import steering
from meshd.raft.progress import Progress
from meshd.raft.state import queries
from meshd.raft.state.commands import Cancel, Join, OpenSession, Submit
from meshd.raft.state.jobs import Job
from meshd.raft.state.leases import Leases
from meshd.raft.state.machine import Machine
from meshd.raft.state.matching import Node
from meshd.raft.state.members import Members
from meshd.raft.state.queue import Queue
from meshd.raft.state.sessions import Sessions
from meshd.raft.state.submissions import Submissions
from meshd.raft.storage import replay
from meshd.raft.storage.frames import End
from meshd.raft.storage.frames import Ended as SegmentEnded
from meshd.testing.raft_ablations import Patch, wrapped
from meshd.work.attempts import Attempts, Waiting, places
from meshd.work.worker import Worker

STEPS_BACK_MAX = 12
"""More than a mesh has entries when it is founded."""

# --- who belongs to the mesh ------------------------------------------------------------------------------------------


def _joins_once(original: Callable[..., Any]) -> Callable[..., Any]:
    def join(self: Members, origin: NodeId, command: Join) -> Any:
        if command.member.node in self.records:
            raise Conflict(f"{command.member.name} is a member already")
        return original(self, origin, command)

    return join


def _knows_only_members(original: Callable[..., Any]) -> Callable[..., Any]:
    def remove(self: Machine, origin: NodeId, node: NodeId, links: Any) -> Any:
        if node in self.revoked():
            raise NotFound(f"no member {node}")
        return original(self, origin, node, links)

    return remove


def _never_lets_another_boot_in(original: Callable[..., bool]) -> Callable[..., bool]:
    def may_run_elsewhere(self: Sessions, node: Node, command: OpenSession) -> bool:
        return original(self, node, command) or bool(node.boot and node.boot != command.boot)

    return may_run_elsewhere


# --- the queue --------------------------------------------------------------------------------------------------------


def _takes_the_attempt_back(original: Callable[..., None]) -> Callable[..., None]:
    def free(self: Leases, node: Node, fence: int) -> None:
        job, task = node.leases[fence]
        original(self, node, fence)
        if (row := job.rows.get(task)) is not None:
            job.rows[task] = changed(row, attempt=row.attempt - 1)

    return free


def _uses_the_newest_fence_again(original: Callable[..., None]) -> Callable[..., None]:
    def lease_again(self: Leases, job: Job, node: Node, task: int, *, is_ahead: bool) -> None:
        self._queue.leases_made -= 1
        original(self, job, node, task, is_ahead=is_ahead)

    return lease_again


def _takes_no_job_twice(original: Callable[..., Any]) -> Callable[..., Any]:
    def submit(self: Submissions, command: Submit) -> Any:
        if command.id in self._queue.jobs:
            raise Conflict(f"there is a job {command.id} already")
        return original(self, command)

    return submit


def _cancels_what_has_finished_too(original: Callable[..., Any]) -> Callable[..., Any]:
    def cancel(self: Queue, command: Cancel) -> Any:
        job = self.jobs.get(command.job)
        if job is not None and job.is_final and (done := job.ended.pop(TaskState.DONE, None)) is not None:
            job.ended[TaskState.CANCELLED] = done
            job.results = {task: changed(row, state=TaskState.CANCELLED) for task, row in job.results.items()}
            self._touch(job)
        return original(self, command)

    return cancel


def _remembers_one_holder(original: Callable[..., bool]) -> Callable[..., bool]:
    def finish(self: Leases, node: Node, key: AttemptKey, outcome: Outcome) -> bool:
        return original(self, node, key, changed(outcome, holders=outcome.holders[:1]))

    return finish


# --- the node's side --------------------------------------------------------------------------------------------------


def _begins_again(self: Attempts, run: AttemptRun, spec: JobSpec) -> None:
    for at, key in enumerate(run.each()):
        is_new = not list(self._seen.within(key.fence, key.fence + 1))
        if key.fence > self._floor and (is_new or self.get(key) is not None):
            self._wait(Waiting(run.part(at, at + 1), spec))
        self.refuse(key)


def _refuses_what_has_to_wait(original: Callable[..., None]) -> Callable[..., None]:
    def start(self: Worker, now_ms: int) -> None:
        attempts = self.attempts
        taken = [batch.spec.needs.resources for batch in attempts.batches.values()]
        for at in range(len(attempts.waiting) - 1, -1, -1):
            spec = attempts.waiting[at].spec
            if not places(spec.needs.resources, taken, self._room):
                for key in attempts.take_waiting(at).run.each():
                    attempts.end_unstarted(key, spec, Outcome(EndReason.BACKEND, message="there is no room for it"))
        original(self, now_ms)

    return start


# --- gossip -----------------------------------------------------------------------------------------------------------


def _speaks_as_in_its_first_life(original: Callable[..., None]) -> Callable[..., None]:
    def begin(self: Facts, me: NodeId, incarnation: int, sign: Any, verify: Any) -> None:
        original(self, me, 1, sign, verify)

    return begin


# --- Raft -------------------------------------------------------------------------------------------------------------


def _goes_back_a_little(original: Callable[..., None]) -> Callable[..., None]:
    def refused(self: Progress, next_index: int, round_: int, round_now: int) -> None:
        if self.next - next_index < STEPS_BACK_MAX:
            original(self, next_index, round_, round_now)

    return refused


def _takes_a_torn_end_for_damage(original: Callable[..., Any]) -> Callable[..., Any]:
    def read(header: Any, number: int, data: bytes, limit: int | None) -> Any:
        for part in original(header, number, data, limit):
            if isinstance(part, SegmentEnded) and part.end is End.TORN:
                raise Corrupt(f"a frame at byte {part.offset} is not whole")
            yield part

    return read


PLANTED: dict[str, tuple[Patch, ...]] = {
    "as many vote as shall": ((steering, "decide", lambda view: None),),
    "to join twice is to join once": (wrapped(Members, "join", _joins_once),),
    "to remove twice is to remove once": (wrapped(Machine, "_remove", _knows_only_members),),
    "to submit twice is to submit once": (wrapped(Submissions, "submit", _takes_no_job_twice),),
    "another boot waits": ((Sessions, "_may_run_elsewhere", lambda self, node, command: False),),
    "another boot is let in after a while": (wrapped(Sessions, "_may_run_elsewhere", _never_lets_another_boot_in),),
    "a lease that was never started counts": (wrapped(Leases, "_free", _takes_the_attempt_back),),
    "a second attempt has a fence of its own": (wrapped(Leases, "_lease_again", _uses_the_newest_fence_again),),
    "what has finished is not cancelled": (wrapped(Queue, "cancel", _cancels_what_has_finished_too),),
    "the log remembers who holds what": (wrapped(Leases, "finish", _remembers_one_holder),),
    "why a job waits is said": ((queries, "permanent_lacks", lambda demand, offer: ()),),
    "what is held is not begun again": ((Attempts, "obey", _begins_again),),
    "what does not fit now waits": (wrapped(Worker, "_start", _refuses_what_has_to_wait),),
    "a peer has time to answer": (
        (membership, "PROBE_MS", 1),
        (membership, "RELAY_MS", 1),
        (membership, "SUSPICION_MS", 0),
    ),
    "what a node says outbids what it said before its start": (
        wrapped(Facts, "__init__", _speaks_as_in_its_first_life),
        (OwnFacts, "outbid", lambda self, incarnation: None),
    ),
    "a leader goes back to where its follower is": (wrapped(Progress, "refused", _goes_back_a_little),),
    "a torn end is cut": (wrapped(replay, "read_segment", _takes_a_torn_end_for_damage),),
}
