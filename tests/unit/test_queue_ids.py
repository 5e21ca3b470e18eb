"""A resend never runs twice: the window of ids (protocol.md 7)."""

from __future__ import annotations

import random

import pytest

from meshd.errors import Busy, InvalidRequest
from meshd.model import JobId
from meshd.raft.state import ids
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


def test_many_ids_are_remembered_and_forgotten_as_a_plain_set_does(monkeypatch: pytest.MonkeyPatch):
    """In whatever order of their dates they come, also from a snapshot."""
    monkeypatch.setattr(ids, "RUN_IDS", 16)
    rng = random.Random(7)
    seen, plain, wall_ms = SeenIds(), set(), WALL_MS
    for step in range(3_000):
        wall_ms += rng.choice((0, 0, 5_000, 60_000))
        date_ms = wall_ms + rng.choice((0, -PAST_MS, FUTURE_MS, rng.randrange(-PAST_MS, FUTURE_MS)))
        number = number_of(job_id(rng.randrange(3), date_ms))
        assert (number in seen) == (number in plain)
        if number not in plain:
            seen.remember(number)
            plain.add(number)
        seen.forget_before(wall_ms)
        gone = [each for each in plain if ids.date_ms_of(each) < wall_ms - PAST_MS]
        plain.difference_update(gone)
        assert len(seen) == len(plain) and not any(each in seen for each in gone[:5])
        if step % 50 == 0:
            data = ids.packed(seen.captured())
            assert data == b"".join(each.to_bytes(16, "big") for each in sorted(plain))
            if rng.random() < 0.5:
                forgotten_ms = seen.forgotten_ms
                seen = SeenIds()
                seen.restore(data, forgotten_ms)
