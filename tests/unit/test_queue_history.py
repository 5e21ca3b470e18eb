"""Seal, Stored, Drop and what is forgotten: the agreed side of the history (protocol.md 8)."""

from __future__ import annotations

import pytest

from meshd.model import EndReason, Inline, Member, Outcome, Role, TaskState
from meshd.raft.state import history, queue
from meshd.raft.state.commands import (
    Accepted,
    Drop,
    Join,
    Reason,
    Rejected,
    RemoveMember,
    RetryJob,
    Seal,
    Stored,
    Submit,
)
from meshd.raft.state.machine import Machine
from meshd.views import GetSummary, ListJobs
from tests.scene import BAD, GOOD, SECRET, WALL_MS, A, B, C, Scene, job_id, spec

HASH = "ab" * 32
VOTERS = ("node-a/1", "node-b/1", "node-c/1")


def scene_with(finished: int, **fields: object) -> tuple[Scene, list[str]]:
    scene = Scene(A, B, C, slots=0)
    scene.open(A, 1, slots=1)
    jobs = []
    for number in range(finished):
        jobs.append(scene.submit(spec(**fields)))
        scene.finish(A, BAD if number % 3 == 0 else GOOD)
    return scene, jobs


def sealed(scene: Scene, number: int, jobs: list[str], size: int = 10):
    return scene.do(A, Seal(number, HASH, size, len(jobs), jobs[-1]))


def test_jobs_leave_when_a_quorum_of_the_voters_has_their_segment():
    scene, jobs = scene_with(5)
    assert sealed(scene, 1, jobs[:3]) == Accepted()
    assert len(scene.machine.answer(ListJobs()).jobs) == 5, "the rows stay"
    assert isinstance(scene.do(A, Drop(1, VOTERS)), Rejected)
    scene.do(A, Stored("1", 1))
    assert isinstance(scene.do(A, Drop(1, VOTERS)), Rejected), "one of three is no quorum"
    scene.do(B, Stored("0", 1))
    assert isinstance(scene.do(A, Drop(1, VOTERS)), Rejected), "another life of the server does not count"
    scene.do(B, Stored("1", 1))
    assert scene.do(A, Drop(1, VOTERS)) == Accepted()
    assert [view.id for view in scene.machine.answer(ListJobs()).jobs] == jobs[:2:-1]
    assert scene.do(A, Drop(1, VOTERS)) == Accepted(), "again changes nothing"
    summary = scene.machine.answer(GetSummary())
    assert (summary.jobs, summary.counts.done, summary.counts.failed) == (5, 3, 2)


def test_what_a_disk_has_lost_does_not_count_any_more():
    scene, jobs = scene_with(3)
    sealed(scene, 1, jobs[:2])
    scene.do(A, Stored("1", 1))
    scene.do(B, Stored("1", 1))
    scene.do(B, Stored("1", 0))
    assert isinstance(scene.do(A, Drop(1, VOTERS)), Rejected)
    scene.do(A, RemoveMember(B))
    assert B not in scene.machine.history.held


def test_a_seal_names_the_next_finished_jobs_or_is_refused():
    scene, jobs = scene_with(4)
    running = scene.submit()
    for wrong in (
        Seal(2, HASH, 1, 2, jobs[1]),
        Seal(1, HASH, 1, 2, jobs[2]),
        Seal(1, HASH, 1, 0, jobs[0]),
        Seal(1, HASH, 1, 5, running),
        Seal(1, HASH, 1, history.SEGMENT_JOBS_MAX + 1, jobs[3]),
    ):
        assert isinstance(scene.do(A, wrong), Rejected)
    scene.do(A, Join(SECRET, Member("worker", "w", (Role.WORKER,))))
    refused = scene.do("worker", Seal(1, HASH, 1, 1, jobs[0]))
    assert isinstance(refused, Rejected) and refused.reason is Reason.NOT_ALLOWED
    for number in range(history.SEALED_MAX):
        assert sealed(scene, number + 1, jobs[number : number + 1]) == Accepted()
    assert isinstance(sealed(scene, history.SEALED_MAX + 1, jobs[3:]), Rejected), "too many wait"


def test_a_resend_of_an_archived_job_is_the_same_job_and_later_too_old():
    scene, jobs = scene_with(2)
    drop_all(scene, jobs)
    answer = scene.do(A, Submit(jobs[0], spec()))
    assert (answer.job, answer.is_new) == (jobs[0], False)
    assert not scene.do(A, RetryJob(jobs[1], jobs[0])).is_new
    scene.tick(3_600_001)
    refused = scene.do(A, Submit(jobs[0], spec()))
    assert isinstance(refused, Rejected) and "too old to resend" in refused.message


def drop_all(scene: Scene, jobs: list[str], size: int = 10) -> None:
    number = scene.machine.history.last + 1
    assert sealed(scene, number, jobs, size) == Accepted()
    for node in (A, B):
        scene.do(node, Stored("1", number))
    assert scene.do(A, Drop(number, VOTERS)) == Accepted()


def test_old_segments_are_forgotten_by_age_count_and_size(monkeypatch: pytest.MonkeyPatch):
    scene, jobs = scene_with(6)
    drop_all(scene, jobs[:2])
    drop_all(scene, jobs[2:4])
    monkeypatch.setattr(history, "HISTORY_JOBS_MAX", 3)
    scene.tick(1)
    assert list(scene.machine.history.segments) == [2]
    summary = scene.machine.answer(GetSummary())
    assert summary.jobs == 4 and summary.counts.done + summary.counts.failed == 4
    monkeypatch.setattr(history, "HISTORY_BYTES_MAX", 25)
    drop_all(scene, jobs[4:5])
    assert list(scene.machine.history.segments) == [2, 3]
    drop_all(scene, jobs[5:])
    assert list(scene.machine.history.segments) == [3, 4]
    monkeypatch.setattr(history, "HISTORY_AGE_MS", 600_000)
    scene.batch(wall_ms=WALL_MS + 10 * 365 * 86_400_000)
    assert list(scene.machine.history.segments) == [3, 4], "a date is no age"
    scene.tick(660_000)
    assert not scene.machine.history.segments and scene.machine.history.oldest == 5
    assert scene.machine.answer(GetSummary()).jobs == 0


def test_a_snapshot_lists_the_segments_and_goes_on_alike():
    scene, jobs = scene_with(8)
    drop_all(scene, jobs[:2])
    sealed(scene, 2, jobs[2:5])
    copy = Machine()
    copy.restore(scene.machine.capture()())
    assert copy.digest() == scene.machine.digest()
    assert copy.history.captured() == scene.machine.history.captured()
    for node in (B, C):
        scene.do(node, Stored("1", 2))
    scene.do(A, Drop(2, VOTERS))
    for index, entry in enumerate(scene.entries[-3:]):
        copy.apply(scene.index - 2 + index, entry)
    assert copy.digest() == scene.machine.digest()
    assert copy.answer(GetSummary()).counts == scene.machine.answer(GetSummary()).counts
    assert [view.id for view in copy.answer(ListJobs()).jobs] == jobs[:4:-1]


def test_what_waits_for_the_history_is_never_forgotten_but_submissions_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queue, "FINISHED_JOBS_MAX", 3)
    scene, jobs = scene_with(3)
    refused = scene.do(A, Submit(job_id(99, WALL_MS), spec()))
    assert isinstance(refused, Rejected) and refused.reason is Reason.BUSY
    sealed(scene, 1, jobs[:1])
    refused = scene.do(A, Submit(job_id(99, WALL_MS), spec()))
    assert isinstance(refused, Rejected) and refused.reason is Reason.BUSY
    assert len(scene.machine.answer(ListJobs()).jobs) == 3
    for node in (A, B):
        scene.do(node, Stored("1", 1))
    scene.do(A, Drop(1, VOTERS))
    assert scene.do(A, Submit(job_id(99, WALL_MS), spec())).is_new


def test_what_an_unfinished_job_says_drops_no_finished_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queue, "OUTCOME_BYTES_MAX", 100_000)
    scene = Scene(A, slots=50)
    jobs = [scene.submit() for _ in range(20)]
    scene.report(A, *((key, GOOD) for key in scene.leases(A)))
    array = scene.submit(spec(count=101))
    while scene.machine._queue.outcome_bytes <= queue.OUTCOME_BYTES_MAX:
        scene.report(A, *((key, said(4000)) for key in scene.leases(A)[:10]))
    assert not scene.job(array).is_final
    assert [scene.job(job).state for job in jobs] == [TaskState.DONE] * 20
    assert scene.machine.history.due(history.Tail(bytes=50_000)) == [], "what fills the memory is not theirs"
    refused = scene.do(A, Submit(job_id(99, WALL_MS), spec()))
    assert isinstance(refused, Rejected) and refused.reason is Reason.BUSY


def test_the_first_large_array_that_ends_drops_no_finished_job(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queue, "FINISHED_ROWS_MAX", 10)
    scene = Scene(A, slots=20)
    jobs = [scene.submit(), scene.submit(spec(count=11))]
    scene.report(A, *((key, said(1)) for key in scene.leases(A)))
    assert [scene.job(job).state for job in jobs] == [TaskState.DONE] * 2
    refused = scene.do(A, Submit(job_id(99, WALL_MS), spec()))
    assert isinstance(refused, Rejected) and refused.reason is Reason.BUSY


def said(size: int) -> Outcome:
    return Outcome(reason=EndReason.EXIT, exit_code=0, stdout=Inline(b"x" * size))


def test_what_is_due():
    tail = history.Tail(jobs=3, batch=2)
    scene, jobs = scene_with(4)
    assert scene.machine.history.due(tail) == []
    scene.submit()
    scene.finish(A, GOOD)
    assert [job.id for job in scene.machine.history.due(tail)] == jobs[:2], "all but the tail"
    assert [job.id for job in scene.machine.history.due(history.Tail(jobs=3, batch=2, segment_jobs=1))] == jobs[:1]
    tail = history.Tail(jobs=100, segment_jobs=1)
    assert scene.machine.history.due(tail) == []
    scene.tick(tail.age_ms + 60_000)
    assert [job.id for job in scene.machine.history.due(tail)] == jobs[:1], "old ones go, too"


def test_rows_that_are_many_are_due(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(history, "SEGMENT_ROWS_MAX", 2)
    scene = Scene(A, slots=3)
    jobs = [scene.submit(spec(count=3)) for _ in range(2)]
    while scene.leases(A):
        scene.finish(A, BAD)
    assert scene.job(jobs[0]).state is TaskState.FAILED
    assert scene.machine.history.due(history.Tail(rows=6)) == []
    assert [job.id for job in scene.machine.history.due(history.Tail(rows=5))] == jobs[:1]


def test_a_few_rows_that_say_much_are_due():
    scene = Scene(A, slots=3)
    jobs = [scene.submit() for _ in range(2)]
    scene.report(A, *((key, said(4000)) for key in scene.leases(A)))
    assert scene.machine.history.due(history.Tail(bytes=9000)) == []
    assert [job.id for job in scene.machine.history.due(history.Tail(bytes=8000))] == jobs


def test_a_job_that_only_the_history_has_is_retried_by_what_is_told_of_it():
    scene, jobs = scene_with(2)
    drop_all(scene, jobs)
    new = job_id(77, WALL_MS)
    refused = scene.do(A, RetryJob(jobs[0], new))
    assert isinstance(refused, Rejected) and refused.reason is Reason.NOT_FOUND
    beyond = scene.do(A, RetryJob(jobs[0], new, spec(count=3), "me", ((2, 4),)))
    assert isinstance(beyond, Rejected) and beyond.reason is Reason.INVALID_REQUEST
    assert scene.do(A, RetryJob(jobs[0], new, spec(count=3), "me", ((1, 2),))).is_new
    view = scene.job(new)
    assert (view.counts.skipped, view.owner, view.retry_of) == (2, "me", jobs[0])
    assert scene.state(new, 1) is TaskState.LEASED
