"""After `meshd recover`: fences rise, sessions are over, and what may not run twice waits for an operator (protocol.md 10)."""

from __future__ import annotations

import pytest

from meshd.model import OnLost, TaskState
from meshd.raft.state.commands import (
    Accepted,
    Cancel,
    RaiseFences,
    Recovered,
    Rejected,
    ReleaseJob,
    RemoveMember,
    Reported,
    Submit,
)
from meshd.raft.state.lineage import NUMBER_BITS, RECOVERIES_MAX
from meshd.raft.state.machine import Machine
from meshd.raft.state.recovery import FENCES_LOST_MAX, RECOVERED_AHEAD_MS_MAX
from meshd.views import ListJobs, ListTasks
from tests.scene import BAD, GOOD, WALL_MS, A, B, Scene, job_id, spec

ONCE = pytest.mark.parametrize("on_lost", [OnLost.WAIT, OnLost.FAIL])


def recover(scene: Scene, *lineage: str, wall_ms: int = WALL_MS) -> object:
    return scene.do(A, Recovered(lineage or ("r1",), wall_ms))


def test_a_fence_given_after_a_recovery_is_above_all_before_it() -> None:
    scene = Scene(A)
    scene.submit()
    [before] = scene.leases(A)
    recover(scene)
    scene.open(A, 2)
    scene.submit()
    [after] = scene.leases(A, 2)
    assert before.fence < 1 << NUMBER_BITS < after.fence
    recover(scene, "r1", "r2")
    assert scene.machine.fence >> NUMBER_BITS == 2


def test_a_recovery_applied_again_changes_nothing_and_another_that_does_not_follow_is_refused() -> None:
    scene = Scene(A)
    assert recover(scene, "r1") == Accepted()
    fence = scene.machine.fence
    assert recover(scene, "r1") == Accepted() and scene.machine.fence == fence
    assert isinstance(recover(scene, "other"), Rejected)
    assert isinstance(recover(scene, "r1", "r2", "r3"), Rejected)
    assert scene.machine.lineage == ("r1",)


def test_there_are_only_as_many_recoveries_as_a_fence_can_count() -> None:
    scene = Scene(A)
    lineage: tuple[str, ...] = ()
    for number in range(RECOVERIES_MAX):
        lineage = (*lineage, f"r{number}")
        assert recover(scene, *lineage) == Accepted()
    scene.open(A, 2)
    scene.submit()
    assert scene.leases(A, 2)[0].fence < 2**53
    assert isinstance(recover(scene, *lineage, "one too many"), Rejected)


def test_every_session_ends_with_a_recovery_and_a_rerun_task_comes_back_with_its_node() -> None:
    scene = Scene(A)
    job = scene.submit(spec(lost_after_ms=60_000))
    [key] = scene.leases(A)
    recover(scene)
    assert scene.machine.sessions_live() == [] and scene.state(job) is TaskState.HELD
    assert scene.open(A, 2, held=(key,)).leased == (key,)
    assert scene.report(A, (key, GOOD), epoch=2) == Reported()
    assert scene.state(job) is TaskState.DONE


@ONCE
def test_a_leased_task_that_may_not_run_twice_is_held_whatever_its_node_says(on_lost: OnLost) -> None:
    scene = Scene(A, B)
    job = scene.submit(spec(on_lost=on_lost))
    [key] = scene.leases(A)
    recover(scene)
    # Its node lists it: not its own any more. Its node comes without it, is removed, time passes: still held.
    assert scene.open(A, 2, held=(key,)).leased == ()
    scene.open(A, 3)
    scene.tick(3_600_000)
    scene.open(B, 2)
    assert scene.state(job) is TaskState.HELD and scene.job(job).state is TaskState.HELD
    assert f"mesh job release {job}" in scene.job(job).reason
    assert f"mesh job release {job}" in scene.explain(job).summary

    scene.do(A, ReleaseJob(job))
    if on_lost is OnLost.WAIT:
        [again] = [*scene.leases(A, 3), *scene.leases(B, 2)]
        assert again.attempt == 2 and again.fence > key.fence
    else:
        # It may have been started, and is never started again.
        assert scene.state(job) is TaskState.FAILED


@ONCE
def test_a_task_that_was_never_leased_is_held_too_and_runs_when_it_is_released(on_lost: OnLost) -> None:
    scene = Scene(A, slots=0)
    job = scene.submit(spec(on_lost=on_lost, count=3))
    recover(scene)
    scene.open(A, 1, slots=4)
    assert scene.leases(A) == ()
    assert scene.job(job).counts.held == 3 and scene.job(job).counts.ready == 0
    assert scene.state(job, 2) is TaskState.HELD
    assert scene.do(A, ReleaseJob(job)) == Accepted()
    assert len(scene.leases(A)) == 3 and scene.job(job).reason == ""
    assert scene.do(A, ReleaseJob(job)) == Accepted()


def test_a_task_that_is_held_for_its_lost_node_loses_its_deadline() -> None:
    scene = Scene(A, B)
    job = scene.submit(spec(on_lost=OnLost.FAIL, lost_after_ms=5_000))
    scene.end(A)
    assert scene.state(job) is TaskState.HELD
    recover(scene)
    scene.tick(10_000)
    assert scene.state(job) is TaskState.HELD
    scene.do(B, RemoveMember(A))
    assert scene.state(job) is TaskState.HELD
    assert scene.do(B, Cancel(job)) == Accepted()
    assert scene.state(job) is TaskState.CANCELLED and not scene.machine._queue.on_hold


def test_an_attempt_that_its_user_has_cancelled_is_over_and_not_held() -> None:
    scene = Scene(A)
    job = scene.submit(spec(on_lost=OnLost.WAIT))
    scene.do(A, Cancel(job))
    recover(scene)
    assert scene.state(job) is TaskState.CANCELLED


def test_a_task_that_waits_for_its_next_try_is_held_beyond_it() -> None:
    scene = Scene(A)
    job = scene.submit(spec(on_lost=OnLost.WAIT, attempts=3))
    scene.finish(A, BAD)
    recover(scene)
    scene.open(A, 2)
    scene.tick(60_000)
    assert scene.state(job) is TaskState.HELD and scene.leases(A, 2) == ()


@ONCE
def test_a_resend_of_what_the_lost_log_may_have_begun_is_held_and_what_is_new_is_not(on_lost: OnLost) -> None:
    scene = Scene(A, slots=4)
    recovered_ms = WALL_MS + 10_000
    recover(scene, wall_ms=recovered_ms)
    scene.open(A, 2, slots=9)
    old, new, rerun = job_id(1, recovered_ms - 1), job_id(2, recovered_ms), job_id(3, recovered_ms - 1)
    scene.do(A, Submit(old, spec(on_lost=on_lost)))
    scene.do(A, Submit(new, spec(on_lost=on_lost)))
    scene.do(A, Submit(rerun, spec()))
    assert scene.state(old) is TaskState.HELD and "release" in scene.job(old).reason
    assert scene.state(new) is TaskState.LEASED and scene.state(rerun) is TaskState.LEASED
    scene.do(A, ReleaseJob(old))
    assert scene.state(old) is TaskState.LEASED


def test_a_clock_that_is_far_off_does_not_hold_what_is_submitted_for_ever() -> None:
    scene = Scene(A)
    recover(scene, wall_ms=WALL_MS + 10 * RECOVERED_AHEAD_MS_MAX)
    scene.batch(wall_ms=WALL_MS + RECOVERED_AHEAD_MS_MAX + 1)
    scene.open(A, 2)
    assert scene.state(scene.submit(spec(on_lost=OnLost.WAIT))) is TaskState.LEASED


def test_a_snapshot_keeps_the_recovery_and_what_it_holds() -> None:
    scene = Scene(A)
    leased, ready = scene.submit(spec(on_lost=OnLost.WAIT)), scene.submit(spec(on_lost=OnLost.FAIL))
    recover(scene, wall_ms=WALL_MS + 10_000)
    restored = Machine()
    restored.restore(scene.machine.capture()())
    assert restored.lineage == ("r1",) and restored.digest() == scene.machine.digest()
    scene.machine = restored
    scene.open(A, 2, slots=9)
    assert scene.state(leased) is scene.state(ready) is TaskState.HELD
    resent = job_id(9, WALL_MS + 9_999)
    scene.do(A, Submit(resent, spec(on_lost=OnLost.WAIT)))
    assert scene.state(resent) is TaskState.HELD
    scene.do(A, ReleaseJob(leased))
    assert scene.state(leased) is TaskState.LEASED


def test_jobs_that_are_held_are_found_by_that_state() -> None:
    scene = Scene(A)
    job = scene.submit(spec(on_lost=OnLost.WAIT, count=2))
    recover(scene)
    assert [view.id for view in scene.machine.answer(ListJobs(states=(TaskState.HELD,))).jobs] == [job]
    held = scene.machine.answer(ListTasks(job, states=(TaskState.HELD,))).tasks
    assert [(task.task, task.state) for task in held] == [(0, TaskState.HELD), (1, TaskState.HELD)]
    assert scene.machine.answer(ListTasks(job, states=(TaskState.READY,))).tasks == ()


def test_fences_are_raised_above_those_that_a_lost_frame_may_have_given_out() -> None:
    scene = Scene(A)
    before = scene.machine.fence
    above = before + FENCES_LOST_MAX
    assert scene.do(A, RaiseFences(above)) == Accepted()
    assert scene.machine.fence == above
    scene.do(A, RaiseFences(above))
    assert scene.machine.fence == above, "twice is once"
    scene.do(A, RaiseFences(1 << 52))
    assert scene.machine.fence == above + FENCES_LOST_MAX, "nobody raises them by more"
