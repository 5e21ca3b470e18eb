"""Tries, backoff, cancelling and timeouts: how tasks end other than well."""

from __future__ import annotations

import pytest

from meshd import model
from meshd.model import (
    Array,
    AttemptRun,
    EndReason,
    Inline,
    Needs,
    OnLost,
    Outcome,
    Resources,
    Retry,
    RetryOn,
    TaskState,
    Timeout,
)
from meshd.raft.state.commands import Accepted, Cancel, JobChanged, Reason, Reported, RetryJob, Submitted
from meshd.raft.state.machine import Machine
from meshd.raft.state.queue import Queue
from tests.scene import BAD, GOOD, A, B, C, Scene, job_id, spec


def test_a_failed_try_is_repeated_after_a_backoff_that_doubles():
    scene = Scene(A)
    job = scene.submit(spec(retry=Retry(attempts=4, backoff_min_ms=1000, backoff_max_ms=3000)))
    for wait_ms in (1000, 2000, 3000):
        scene.finish(A, BAD)
        assert scene.state(job) is TaskState.WAITING
        assert scene.machine.next_timer_ms() == wait_ms
        scene.tick(wait_ms - 1)
        assert scene.state(job) is TaskState.WAITING
        scene.tick(1)
        assert scene.state(job) is TaskState.LEASED
    scene.finish(A, BAD)
    assert (scene.state(job), scene.task(job).tries) == (TaskState.FAILED, 4)


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (EndReason.EXIT, TaskState.FAILED),
        (EndReason.TRAP, TaskState.FAILED),
        (EndReason.SIGNAL, TaskState.FAILED),
        (EndReason.MEMORY_LIMIT, TaskState.FAILED),
        (EndReason.TIMEOUT, TaskState.TIMED_OUT),
        (EndReason.INVALID, TaskState.FAILED),
    ],
)
def test_how_a_task_ends_says_why(reason: EndReason, state: TaskState):
    scene = Scene(A)
    job = scene.submit()
    scene.finish(A, Outcome(reason=reason, exit_code=3))
    assert (scene.state(job), scene.task(job).outcome.reason) == (state, reason)


def test_only_what_the_job_names_is_tried_again():
    scene = Scene(A)
    job = scene.submit(spec(retry=Retry(attempts=5, on=(RetryOn.TIMEOUT,), backoff_min_ms=0)))
    scene.finish(A, Outcome(reason=EndReason.TIMEOUT))
    assert scene.state(job) is TaskState.LEASED
    scene.finish(A, BAD)
    assert scene.state(job) is TaskState.FAILED


def test_what_can_never_run_is_not_tried_again():
    scene = Scene(A)
    job = scene.submit(spec(attempts=5))
    scene.finish(A, Outcome(reason=EndReason.INVALID, message="not a wasm module"))
    assert scene.state(job) is TaskState.FAILED
    assert "not a wasm module" in scene.task(job).reason


def test_a_failing_backend_is_a_loss_and_not_a_try():
    scene = Scene(A)
    job = scene.submit(spec(retry=Retry(crash_limit=2, backoff_min_ms=500)))
    scene.finish(A, Outcome(reason=EndReason.BACKEND))
    assert (scene.state(job), scene.task(job).losses, scene.task(job).tries) == (TaskState.WAITING, 1, 0)
    scene.tick(500)
    scene.finish(A, Outcome(reason=EndReason.BACKEND))
    assert scene.state(job) is TaskState.FAILED


def test_cancel_ends_what_does_not_run_and_stops_what_does():
    scene = Scene(A, slots=2)
    job = scene.submit(spec(count=5))
    keys = scene.leases(A)
    assert scene.do(A, Cancel(job)) == Accepted()
    assert scene.stops() == list(keys) == list(scene.machine.stops_of(A, 1))
    assert scene.job(job).counts.cancelled == 3 and not scene.job(job).is_final
    scene.report(A, (keys[0], Outcome(reason=EndReason.CANCELLED)), (keys[1], GOOD))
    assert scene.job(job).state is TaskState.CANCELLED and scene.job(job).counts.cancelled == 5
    assert scene.task(job, 1).outcome == Outcome(reason=EndReason.EXIT, exit_code=0)
    assert scene.do(A, Cancel(job)) == Accepted()


def test_cancelling_twice_tells_the_node_once():
    scene = Scene(A)
    job = scene.submit()
    scene.do(A, Cancel(job))
    scene.do(A, Cancel(job))
    assert len(scene.stops()) == 1


def test_cancelled_work_of_a_lost_node_ends_with_the_session():
    scene = Scene(A)
    job = scene.submit(spec(on_lost=OnLost.WAIT))
    [key] = scene.leases(A)
    scene.do(A, Cancel(job))
    scene.end(A)
    assert scene.state(job) is TaskState.CANCELLED
    assert scene.open(A, 2, (key,)).leased == ()


def test_held_work_can_be_cancelled():
    scene = Scene(A)
    job = scene.submit(spec(on_lost=OnLost.WAIT))
    scene.end(A)
    scene.do(A, Cancel(job))
    assert scene.state(job) is TaskState.CANCELLED


def test_a_task_that_leaves_more_in_the_log_than_its_share_is_lost_by_its_node_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "RESULTS_BYTES", 20 * 200)
    scene = Scene(A, slots=4)
    job = scene.submit(spec(count=20, retry=Retry(backoff_min_ms=1000)))
    ends = [
        Outcome(EndReason.EXIT, exit_code=0, stdout=Inline(b"x" * 201)),
        Outcome(EndReason.EXIT, exit_code=0, outputs=Inline(b"x" * 201)),
        Outcome(EndReason.EXIT, exit_code=0, stdout=Inline(b"x" * 200), stderr=Inline(b"y" * 200)),
        Outcome(EndReason.TRAP, message="z" * 2000),
    ]

    answer = scene.report(A, *zip(scene.leases(A), ends, strict=True))

    assert answer == Reported(), "its node goes on"
    assert [scene.state(job, task) for task in range(4)] == [
        TaskState.WAITING,
        TaskState.WAITING,
        TaskState.DONE,
        TaskState.FAILED,
    ]
    assert (scene.task(job, 0).losses, scene.task(job, 0).tries) == (1, 0)
    assert "stdout of 201 bytes inline, not 200" in scene.task(job, 0).reason
    assert scene.task(job, 3).outcome.message == "z" * 256
    assert scene.machine._queue.outcome_bytes < 1500
    scene.tick(1000)
    assert scene.state(job, 0) is TaskState.READY, "for whoever has room next"


def test_some_tasks_can_be_cancelled():
    scene = Scene(A)
    job = scene.submit(spec(count=10))
    scene.do(A, Cancel(job, ((2, 4), (8, 10))))
    assert [task for task in range(10) if scene.state(job, task) is TaskState.CANCELLED] == [2, 3, 8, 9]
    assert scene.do(A, Cancel(job, ((5, 11),))).reason is Reason.INVALID_REQUEST
    assert scene.do(A, Cancel(job_id(99))).reason is Reason.NOT_FOUND


def test_too_many_failures_cancel_the_rest():
    scene = Scene(A, slots=2)
    job = scene.submit(spec(array=Array(count=10, max_fails=1)))
    scene.finish(A, BAD)
    assert scene.job(job).counts.cancelled == 0
    scene.finish(A, BAD)
    assert len(scene.machine.stops_of(A, 1)) == 1
    scene.finish(A, GOOD)
    assert scene.job(job).state is TaskState.FAILED
    assert (scene.job(job).counts.failed, scene.job(job).counts.cancelled) == (2, 8)


def test_what_more_failures_stop_is_looked_for_once_however_many_ends_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked for at each: seconds for one report on an array with 32,000 leased tasks."""
    scene = Scene(A, B, C, slots=2000)
    job = scene.submit(spec(array=Array(count=100_000, max_fails=1), needs=Needs(Resources())))
    stopped = scene.leases(A)
    sweeps: list[TaskState] = []
    sweep = Queue._stop_tasks
    monkeypatch.setattr(Queue, "_stop_tasks", lambda *args: (sweeps.append(args[3]), sweep(*args)))

    scene.report(A, (stopped[0], BAD), (stopped[1], BAD))
    scene.report(A, *((key, Outcome(reason=EndReason.CANCELLED)) for key in stopped[2:502]))

    assert sweeps == [TaskState.CANCELLED]
    assert len(scene.stops()) == 5998
    counts = scene.job(job).counts
    assert (counts.failed, counts.cancelled, counts.leased) == (2, 100_000 - 6000 + 500, 5498)


def test_a_replica_that_begins_in_the_middle_of_a_stop_does_not_look_for_more_either() -> None:
    scene = Scene(A, B, slots=4)
    job = scene.submit(spec(array=Array(count=20, max_fails=1)))
    scene.report(A, *((key, BAD) for key in scene.leases(A)[:2]))
    restored = Machine()
    restored.restore(scene.machine.capture()())

    assert restored.digest() == scene.machine.digest()
    assert restored.find(job).stopping == scene.machine.find(job).stopping == 6

    position = scene.index
    scene.end(B)
    scene.report(A, *((key, GOOD) for key in scene.leases(A)))
    for at in range(position, scene.index):
        restored.apply(at + 1, scene.entries[at])
    assert restored.digest() == scene.machine.digest()
    assert scene.job(job).is_final and scene.machine.find(job).stopping == 0


def test_a_task_told_to_stop_does_not_keep_the_rest_from_it() -> None:
    scene = Scene(A, slots=4)
    job = scene.submit(spec(array=Array(count=8, max_fails=1)))
    scene.do(A, Cancel(job, ((2, 3),)))
    assert scene.machine.find(job).stopping == 1

    scene.report(A, *((key, BAD) for key in scene.leases(A)[:2]))

    assert len(scene.machine.stops_of(A, 1)) == 2
    assert scene.job(job).counts.cancelled == 4


def test_the_queue_timeout_ends_what_was_never_leased():
    scene = Scene(A)
    job = scene.submit(spec(count=3, timeout=Timeout(queue_ms=5000)))
    scene.tick(5000)
    assert scene.job(job).counts.timed_out == 2
    scene.finish(A)
    assert scene.job(job).is_final
    assert scene.machine.next_timer_ms() is None


def test_the_queue_timeout_spares_what_is_tried_again():
    scene = Scene(A)
    other = scene.submit(spec(priority=100, count=2))
    job = scene.submit(spec(attempts=2, timeout=Timeout(queue_ms=5000)))
    scene.do(A, Cancel(other))
    scene.finish(A)
    scene.finish(A, BAD)
    scene.claim(A, 0)
    scene.tick(5000)
    assert scene.state(job) is TaskState.LEASED


def test_the_total_timeout_stops_everything():
    scene = Scene(A)
    job = scene.submit(spec(count=3, timeout=Timeout(total_ms=5000)))
    scene.tick(4999)
    assert scene.job(job).counts.ready == 2
    scene.tick(1)
    assert scene.job(job).counts.timed_out == 2 and len(scene.stops()) == 1
    scene.finish(A, Outcome(reason=EndReason.CANCELLED))
    assert scene.job(job).state is TaskState.TIMED_OUT


def test_one_entry_counts_at_most_a_minute():
    scene = Scene(A)
    job = scene.submit(spec(count=2, timeout=Timeout(total_ms=60_001)))
    scene.batch(elapsed_ms=10**9)
    assert scene.state(job, 1) is TaskState.READY
    assert scene.machine.next_timer_ms() == 1


def test_a_retry_runs_only_what_did_not_end_well():
    scene = Scene(A)
    job = scene.submit(spec(count=3))
    for outcome in (GOOD, BAD, GOOD):
        scene.finish(A, outcome)
    new = job_id(77)
    assert scene.do(A, RetryJob(job, new)) == Submitted(new, is_new=True)
    assert scene.do(A, RetryJob(job, new)) == Submitted(new, is_new=False)
    assert [scene.state(new, task) for task in range(3)] == [TaskState.SKIPPED, TaskState.LEASED, TaskState.SKIPPED]
    scene.finish(A)
    assert scene.job(new).state is TaskState.DONE and scene.job(new).retry_of == job
    assert scene.do(A, RetryJob(new, job_id(78))).reason is Reason.CONFLICT


def test_a_job_that_still_runs_cannot_be_retried():
    scene = Scene(A)
    job = scene.submit()
    assert scene.do(A, RetryJob(job, job_id(77))).reason is Reason.CONFLICT


def test_whoever_waits_is_told_of_the_end():
    scene = Scene(A)
    job = scene.submit()
    scene.events.clear()
    scene.finish(A)
    assert JobChanged(job, is_final=True) in scene.events
    assert scene.job(job).ended_wall_ms is not None


def test_a_million_tasks_are_two_numbers():
    scene = Scene(A, B)
    job = scene.submit(spec(count=1_000_000))
    scene.do(A, Cancel(job, ((10, 999_990),)))
    assert scene.job(job).counts.cancelled == 999_980
    assert len(scene.machine.capture()()) < 4096


def test_tasks_that_waited_too_long_count_as_failures_and_what_runs_then_still_reports() -> None:
    scene = Scene(A, slots=4)
    job = scene.submit(spec(array=Array(count=8, max_fails=1), timeout=Timeout(queue_ms=5000)))
    first, second, *_ = leases = scene.leases(A)
    scene.report(A, running=(second,))

    scene.tick(6000)

    assert [scene.state(job, task) for task in range(4, 8)] == [TaskState.TIMED_OUT] * 4
    assert scene.stops() == list(leases), "more than one has failed"
    scene.report_runs(A, done=(AttemptRun(job, 0, 1, first.fence, 4),))
    assert scene.job(job).state is TaskState.TIMED_OUT
    assert [scene.state(job, task) for task in range(4)] == [TaskState.CANCELLED] * 4, "as ever after a stop"


def test_a_report_of_a_run_goes_on_when_its_job_is_stopped_in_the_middle_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the state of an older build may have it, which let too many fail."""
    scene = Scene(A, slots=4)
    job = scene.submit(spec(array=Array(count=8, max_fails=1), timeout=Timeout(queue_ms=5000)))
    first, second, *_ = scene.leases(A)
    scene.report(A, running=(second,))
    with monkeypatch.context() as older:
        older.setattr(Queue, "check_fails", lambda self, job: None)
        scene.tick(6000)

    scene.report_runs(A, done=(AttemptRun(job, 0, 1, first.fence, 4),))

    assert scene.job(job).is_final
    assert scene.job(job).counts.done == 2 and scene.job(job).counts.cancelled == 2
