"""Sessions open, end and come back; what becomes of the work of a lost node."""

from __future__ import annotations

import pytest

from meshd.model import Array, AttemptKey, EndReason, NodeId, OnLost, Outcome, Retry, TaskState
from meshd.raft.state.commands import (
    Accepted,
    EndSession,
    Reason,
    Reconciled,
    RemoveMember,
    Reported,
    SessionOpened,
    SetDraining,
)
from meshd.raft.state.machine import Machine
from tests.scene import BAD, GOOD, A, B, Scene, spec

LOST = Outcome(reason=EndReason.LOST)


def test_an_epoch_only_rises():
    scene = Scene(A)
    assert scene.open(A, 3) == SessionOpened(3, ())
    assert scene.open(A, 2).reason is Reason.WRONG_EPOCH
    assert scene.open(A, 3) == SessionOpened(3, ())
    scene.end(A, 3)
    assert scene.open(A, 3).reason is Reason.WRONG_EPOCH
    assert scene.open(A, 4) == SessionOpened(4, ())


def test_only_a_server_ends_a_session_and_only_the_live_one():
    scene = Scene(A, B)
    scene.submit()
    assert scene.end(A, epoch=7) == Accepted()
    assert scene.machine.sessions_live() == [(A, 1), (B, 1)]
    assert scene.do(NodeId("stranger"), EndSession(A, 1)).reason is Reason.NOT_ALLOWED
    scene.end(A)
    scene.end(A)
    assert scene.machine.sessions_live() == [(B, 1)]


def test_a_restart_gives_the_leases_on_in_the_same_entry():
    scene = Scene(A)
    job = scene.submit(spec(lost_after_ms=60_000))
    assert scene.open(A, 2) == SessionOpened(2, ())
    [key] = scene.leases(A, 2)
    assert (scene.task(job).attempt, scene.task(job).losses) == (2, 1)
    assert key.attempt == 2


def test_listed_work_runs_on_under_the_new_epoch_without_a_notice():
    scene = Scene(A, B)
    job = scene.submit(spec(on_lost=OnLost.FAIL, lost_after_ms=0))
    [key] = scene.leases(A)
    scene.notices()
    assert scene.open(A, 2, (key,)) == SessionOpened(2, (key,))
    assert scene.notices() == []
    assert scene.leases(A, 2) == (key,)
    scene.finish(A, epoch=2)
    assert (scene.state(job), scene.task(job).attempt) == (TaskState.DONE, 1)


def test_a_resent_opening_is_answered_as_before():
    scene = Scene(A)
    scene.submit(spec(count=2))
    [key] = scene.leases(A)
    first = scene.open(A, 2, (key,), slots=2)
    assert scene.open(A, 2, (key,), slots=2) == first == SessionOpened(2, (key,))


def test_listed_work_that_is_no_longer_its_own_is_not_named():
    scene = Scene(A, B)
    scene.submit(spec(lost_after_ms=0))
    [key] = scene.leases(A)
    scene.end(A)
    assert scene.leases(B)[0].attempt == 2
    assert scene.open(A, 2, (key,)) == SessionOpened(2, ())


def test_work_ready_by_loss_and_not_leased_since_is_adopted():
    scene = Scene(A)
    job = scene.submit(spec(lost_after_ms=0))
    [key] = scene.leases(A)
    scene.end(A)
    assert scene.state(job) is TaskState.READY
    assert scene.open(A, 2, (key,)) == SessionOpened(2, (key,))
    assert scene.task(job).attempt == 1


def test_what_was_lost_is_not_adopted_beyond_the_slots():
    scene = Scene(A, slots=2)
    scene.submit(spec(count=2, lost_after_ms=0))
    keys = scene.leases(A)
    scene.end(A)
    assert scene.open(A, 2, keys, slots=1) == SessionOpened(2, keys[:1])
    assert len(scene.leases(A, 2)) == 1


def test_held_work_is_adopted_also_beyond_fewer_slots():
    scene = Scene(A, slots=2)
    scene.submit(spec(count=3, on_lost=OnLost.WAIT))
    keys = scene.leases(A)
    assert scene.open(A, 2, keys, slots=1) == SessionOpened(2, keys)
    scene.finish(A, epoch=2)
    assert len(scene.leases(A, 2)) == 1


def test_adopted_work_comes_before_new_work():
    scene = Scene(A)
    running, waiting = scene.submit(), scene.submit(spec(priority=100))
    [key] = scene.leases(A)
    scene.end(A)
    assert scene.open(A, 2, (key,)) == SessionOpened(2, (key,))
    assert scene.state(running) is TaskState.LEASED and scene.state(waiting) is TaskState.READY


def test_a_wait_task_is_held_until_its_node_reports():
    scene = Scene(A, B)
    job = scene.submit(spec(on_lost=OnLost.WAIT))
    [key] = scene.leases(A)
    scene.end(A)
    scene.tick(10 * 86_400_000)
    assert scene.state(job) is TaskState.HELD
    assert "until its node" in scene.explain(job).summary
    scene.open(A, 2, (key,))
    scene.finish(A, epoch=2)
    assert scene.state(job) is TaskState.DONE


def test_a_node_that_comes_back_without_its_wait_task_sets_it_free():
    scene = Scene(A, B)
    job = scene.submit(spec(on_lost=OnLost.WAIT))
    scene.end(A)
    scene.open(A, 2)
    assert (scene.state(job), scene.task(job).attempt) == (TaskState.LEASED, 2)


def test_removing_a_node_releases_what_waited_for_it():
    scene = Scene(A, B)
    job = scene.submit(spec(on_lost=OnLost.WAIT), origin=B)
    assert scene.task(job).node == A
    scene.end(A)
    scene.do(B, RemoveMember(A))
    assert scene.task(job).node == B
    assert scene.open(A, 2).reason is Reason.NOT_ALLOWED


def test_a_fail_task_is_never_started_again():
    scene = Scene(A, B)
    job = scene.submit(spec(on_lost=OnLost.FAIL, attempts=5, lost_after_ms=0))
    scene.end(A)
    assert scene.state(job) is TaskState.FAILED
    assert "lost" in scene.task(job).reason


def test_own_failures_of_a_fail_task_still_follow_tries():
    scene = Scene(A)
    job = scene.submit(spec(on_lost=OnLost.FAIL, attempts=2))
    scene.finish(A, BAD)
    assert scene.state(job) is TaskState.LEASED
    scene.finish(A, BAD)
    assert scene.state(job) is TaskState.FAILED


@pytest.mark.parametrize(("ran_s", "held_s"), [(0, 0), (100, 10), (5_000, 120)])
def test_auto_waits_a_tenth_of_the_run_and_two_minutes_at_most(ran_s: int, held_s: int):
    scene = Scene(A, B)
    job = scene.submit()
    scene.report(A, running=scene.leases(A))
    scene.tick(ran_s * 1000)
    scene.end(A)
    if held_s:
        assert scene.machine.next_timer_ms() == held_s * 1000
        scene.tick(held_s * 1000 - 1)
        assert scene.state(job) is TaskState.HELD
        scene.tick(1)
    assert scene.task(job).node == B


def test_a_timer_armed_in_an_entry_starts_at_zero():
    """The entry that ends the session may itself carry a long elapsed time."""
    scene = Scene(A, B)
    job = scene.submit(spec(lost_after_ms=30_000))
    scene.batch((A, EndSession(A, 1)), elapsed_ms=60_000)
    assert scene.state(job) is TaskState.HELD
    assert scene.machine.next_timer_ms() == 30_000


def test_what_the_node_stopped_itself_follows_on_lost():
    scene = Scene(A)
    again, never = scene.submit(), scene.submit(spec(on_lost=OnLost.FAIL))
    scene.finish(A, LOST)
    assert (scene.task(again).attempt, scene.task(again).losses) == (2, 1)
    scene.finish(A)
    scene.finish(A, LOST)
    assert scene.state(never) is TaskState.FAILED


def test_losses_end_at_the_crash_limit():
    scene = Scene(A)
    job = scene.submit(spec(retry=Retry(crash_limit=3)))
    for epoch in (2, 3):
        scene.open(A, epoch)
        assert scene.state(job) is TaskState.LEASED
    scene.open(A, 4)
    assert scene.state(job) is TaskState.FAILED
    assert scene.task(job).tries == 0


def test_reconcile_frees_what_never_arrived_and_stops_what_is_not_leased():
    scene = Scene(A, slots=2)
    job = scene.submit(spec(count=2, on_lost=OnLost.FAIL))
    here, lost_notice = scene.leases(A)
    stray = here.__class__(here.job, 1, 9, 999)
    assert scene.reconcile(A, here, stray) == Reconciled(stop=(stray,))
    assert scene.task(job, 1).losses == 0
    assert scene.leases(A)[1].fence > lost_notice.fence


def test_a_list_older_than_a_lease_does_not_free_it():
    scene = Scene(A, slots=2)
    fence = scene.machine.fence
    scene.submit()
    leased = scene.leases(A)
    assert scene.reconcile(A, fence=fence) == Reconciled()
    assert scene.leases(A) == leased


def test_a_list_of_another_epoch_is_ignored():
    scene = Scene(A)
    scene.submit()
    [key] = scene.leases(A)
    scene.open(A, 2, (key,))
    assert scene.reconcile(A, epoch=1).reason is Reason.WRONG_EPOCH
    assert scene.leases(A, 2) == (key,)


def test_an_outcome_that_came_while_cut_off_is_delivered_after_coming_back():
    scene = Scene(A, B)
    job = scene.submit(spec(on_lost=OnLost.WAIT))
    [key] = scene.leases(A)
    scene.end(A)
    scene.open(A, 2, (key,))
    assert scene.report(A, (key, GOOD), epoch=2) == Reported()
    assert (scene.state(job), scene.task(job).attempt) == (TaskState.DONE, 1)


def test_adoption_of_what_was_lost_keeps_at_once():
    scene = Scene(A, B)
    job = scene.submit(spec(array=Array(count=2, at_once=1), lost_after_ms=0))
    [key] = scene.leases(A)
    scene.do(B, SetDraining(B, is_draining=True))
    scene.end(A)
    scene.do(B, SetDraining(B, is_draining=False))
    assert scene.leases(B)[0].task == 0 and scene.leases(B)[0].attempt == 2
    assert scene.open(A, 2, (key,)).leased == ()
    assert scene.job(job).counts.leased == 1


def test_a_report_must_name_its_attempt_wholly():
    scene = Scene(A)
    job = scene.submit()
    [key] = scene.leases(A)
    forged = AttemptKey(key.job, key.task, key.attempt + 1, key.fence)
    assert scene.report(A, (forged, GOOD)) == Reported(stale=(forged,))
    assert scene.open(A, 2, (forged,)).leased == ()
    assert scene.state(job) is TaskState.LEASED


@pytest.mark.parametrize("comes_back", [True, False])
def test_losses_that_cancel_the_rest_of_the_job_find_some_of_it_held(comes_back: bool):
    scene = Scene(A, slots=4)
    job = scene.submit(spec(array=Array(count=4, max_fails=1), on_lost=OnLost.FAIL, lost_after_ms=0))
    if comes_back:
        scene.open(A, 2)
    else:
        scene.end(A)
    counts = scene.job(job).counts
    assert (counts.failed, counts.cancelled) == (2, 2)


def test_what_the_node_said_it_stopped_is_not_adopted():
    scene = Scene(A)
    scene.submit()
    [key] = scene.leases(A)
    scene.claim(A, 0)
    scene.report(A, (key, LOST))
    assert scene.open(A, 2, (key,)).leased == ()
    assert scene.leases(A, 2)[0].attempt == 2


def test_another_boot_of_a_node_is_let_in_12_s_after_the_last_grant_at_the_earliest():
    """A copy of the machine says that it holds nothing, while the first one runs what may not run twice."""
    scene = Scene(A, B, slots=0)
    scene.open(B, 1, boot="first")
    job = scene.submit(spec(on_lost=OnLost.WAIT))
    [key] = scene.leases(B)
    refused = scene.open(B, 2, boot="copy")
    assert refused.reason is Reason.BUSY and scene.leases(B) == (key,)
    scene.tick(60_000)
    assert scene.open(B, 2, boot="copy").reason is Reason.BUSY, "the first one is granted views all the while"
    scene.end(B)  # 12 s after its last grant; 5 s, if it was agreed to be dead
    assert scene.open(B, 2, boot="copy").reason is Reason.BUSY
    scene.tick(6_999)
    assert scene.open(B, 2, boot="copy").reason is Reason.BUSY
    assert scene.state(job) is TaskState.HELD
    scene.tick(1)
    assert scene.open(B, 2, boot="copy").epoch == 2
    assert scene.task(job).attempt == 2 and scene.open(B, 2, boot="copy").epoch == 2, "a resend is answered as before"


@pytest.mark.parametrize(("before", "now"), [("same", "same"), ("", "new"), ("old", "")])
def test_the_same_boot_and_an_unknown_one_wait_for_nothing(before: str, now: str):
    scene = Scene(A, slots=0)
    scene.open(A, 1, boot=before)
    assert scene.open(A, 2, boot=now).epoch == 2


def test_who_was_where_is_in_the_snapshot():
    scene = Scene(A, slots=0)
    scene.open(A, 1, boot="first")
    scene.end(A)
    data = scene.machine.capture()()
    scene.machine = Machine()
    scene.machine.restore(data)
    assert scene.open(A, 2, boot="copy").reason is Reason.BUSY
    assert scene.open(A, 2, boot="first").epoch == 2
