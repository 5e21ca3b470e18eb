"""A resend never runs twice: the window of ids (protocol.md 7)."""

from __future__ import annotations

import pytest

from meshd.errors import Busy, InvalidRequest
from meshd.model import JobId
from meshd.raft.state.commands import Reason, Submit, Submitted
from meshd.raft.state.ids import FUTURE_MS, PAST_MS, SeenIds, number_of
from tests.scene import WALL_MS, A, Scene, job_id, spec


def test_a_resend_is_answered_and_not_run_again():
    scene = Scene(A)
    job = scene.submit()
    scene.finish(A)
    assert scene.do(A, Submit(job, spec())) == Submitted(job, is_new=False)
    assert scene.leases(A) == ()


@pytest.mark.parametrize(
    ("off_ms", "is_accepted"),
    [(-PAST_MS, True), (-PAST_MS - 1, False), (FUTURE_MS, True), (FUTURE_MS + 1, False)],
)
def test_ids_are_accepted_within_the_window(off_ms: int, is_accepted: bool):
    scene = Scene(A)
    answer = scene.do(A, Submit(job_id(1, WALL_MS + off_ms), spec()))
    assert isinstance(answer, Submitted) is is_accepted
    if not is_accepted:
        assert "clock" in answer.message


def test_an_id_is_remembered_until_its_own_date_is_an_hour_old():
    """Counting the hour from the submission would run a resend of an id from the future twice."""
    scene = Scene(A)
    early = job_id(1, WALL_MS + FUTURE_MS)
    scene.do(A, Submit(early, spec()))
    scene.finish(A)
    scene.machine._queue.jobs.clear()  # even when the job itself is long forgotten
    scene.tick(PAST_MS + FUTURE_MS)
    assert scene.do(A, Submit(early, spec())) == Submitted(early, is_new=False)
    scene.tick(1)
    assert scene.do(A, Submit(early, spec())).reason is Reason.INVALID_REQUEST


def test_a_job_that_still_lives_is_known_for_as_long_as_it_does():
    scene = Scene(A)
    job = scene.submit()
    scene.tick(3 * PAST_MS)
    assert scene.do(A, Submit(job, spec())) == Submitted(job, is_new=False)


@pytest.mark.parametrize(
    "bad", ["", "x", "0190a5b1-0000-4000-8000-000000000000", job_id(1).upper() + "F", f"{job_id(1)}\n"]
)
def test_other_ids_are_refused(bad: str):
    scene = Scene(A)
    assert scene.do(A, Submit(JobId(bad), spec())).reason is Reason.INVALID_REQUEST


def test_the_memory_is_bounded_and_says_busy():
    seen = SeenIds(ids_max=2)
    for number in (1, 2):
        seen.remember(number_of(job_id(number)))
    with pytest.raises(Busy):
        seen.check(number_of(job_id(3)), WALL_MS)
    seen.forget_before(WALL_MS + PAST_MS + 1)
    with pytest.raises(InvalidRequest):
        seen.check(number_of(job_id(3)), WALL_MS + PAST_MS + 1)
    assert len(seen) == 0
