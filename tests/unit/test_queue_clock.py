"""The mesh's wall time jumps, and is set by an operator: what dates had decided stays decided."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.model import JobId, Member, NodeId, Role
from meshd.raft.state.commands import ClockSet, Command, CreateInvite, Join, Joined, Reason, Submit, Submitted
from meshd.raft.state.ids import FUTURE_MS, PAST_MS
from meshd.raft.state.machine import Machine
from meshd.views import GetMembers
from tests.scene import WALL_MS, A, B, C, Scene, job_id, spec

HOUR_MS = 3_600_000
YEAR_MS = 365 * 24 * HOUR_MS


def set_clock(scene: Scene, wall_ms: int, number: int = 1, origin: NodeId = A):
    return do(scene, origin, ClockSet(f"{number:064x}", wall_ms))


def do(scene: Scene, origin: NodeId, command: Command):
    """At the state's own time, wherever that is."""
    [answer] = scene.batch((origin, command), wall_ms=scene.machine.wall_ms)
    return answer


def moves(scene: Scene):
    return scene.machine.answer(GetMembers()).clock_moves


def test_an_operator_sets_it_forward_and_back_and_once():
    scene = Scene(A)
    set_clock(scene, WALL_MS + YEAR_MS, 1)
    assert scene.machine.wall_ms == WALL_MS + YEAR_MS
    set_clock(scene, WALL_MS - HOUR_MS, 2)
    assert scene.machine.wall_ms == WALL_MS - HOUR_MS
    scene.batch(wall_ms=WALL_MS - HOUR_MS + 5000, elapsed_ms=5000)
    set_clock(scene, WALL_MS - HOUR_MS, 2)  # resent
    assert scene.machine.wall_ms == WALL_MS - HOUR_MS + 5000
    assert [(move.from_ms, move.to_ms, move.by) for move in moves(scene)] == [
        (WALL_MS, WALL_MS + YEAR_MS, A),
        (WALL_MS + YEAR_MS, WALL_MS - HOUR_MS, A),
    ]


def test_only_a_server_sets_it_and_to_no_nonsense():
    scene = Scene(A)
    scene.do(A, CreateInvite("e" * 64, (Role.WORKER,), 1, 60_000))
    scene.do(A, Join("e" * 64, Member(B, "b", (Role.WORKER,))))
    assert set_clock(scene, WALL_MS + 1, origin=B).reason is Reason.NOT_ALLOWED
    assert set_clock(scene, 0).reason is Reason.INVALID_REQUEST
    assert scene.machine.wall_ms == WALL_MS


def test_jumps_of_over_a_minute_are_told_and_what_elapsed_is_none():
    scene = Scene(A)
    scene.batch(wall_ms=WALL_MS + 3 * HOUR_MS, elapsed_ms=3 * HOUR_MS)
    scene.batch(wall_ms=WALL_MS + 3 * HOUR_MS + 60_000)
    assert moves(scene) == ()
    scene.batch(wall_ms=WALL_MS + 5 * HOUR_MS, elapsed_ms=1000)
    [move] = moves(scene)
    assert (move.from_ms, move.to_ms, move.by) == (WALL_MS + 3 * HOUR_MS + 61_000, WALL_MS + 5 * HOUR_MS, "")
    for number in range(20):
        set_clock(scene, WALL_MS + number * HOUR_MS, number + 1)
    assert len(moves(scene)) == 8 and moves(scene)[-1].to_ms == WALL_MS + 19 * HOUR_MS


def test_an_id_that_was_forgotten_before_the_clock_was_set_back_does_not_run_again():
    """Year 2036 makes everybody forget; back in the present, those ids are within the window once more."""
    scene = Scene(A)
    job = scene.submit()
    scene.finish(A)
    scene.machine._queue.jobs.clear()  # the job itself is long forgotten
    set_clock(scene, WALL_MS + 10 * YEAR_MS, 1)
    set_clock(scene, WALL_MS + 60_000, 2)
    again = scene.do(A, Submit(job, spec()))
    assert again.reason is Reason.INVALID_REQUEST and "set back" in again.message
    assert scene.do(A, Submit(job_id(9, WALL_MS + 60_000), spec())).is_new, "the present is open"


def test_what_was_submitted_in_the_wrong_year_is_known_when_that_year_comes():
    scene = Scene(A)
    set_clock(scene, WALL_MS + YEAR_MS, 1)
    job = job_id(5, WALL_MS + YEAR_MS)
    scene.do(A, Submit(job, spec()))
    scene.finish(A)
    scene.machine._queue.jobs.clear()
    set_clock(scene, WALL_MS, 2)
    scene.batch(wall_ms=WALL_MS + YEAR_MS)
    assert scene.do(A, Submit(job, spec())) == Submitted(job, is_new=False)


def test_an_invite_keeps_the_time_it_had_left_and_an_expired_one_stays_so():
    scene = Scene(A)
    both = (Role.SERVER, Role.WORKER)
    scene.do(A, CreateInvite("1" * 64, both, 5, HOUR_MS))
    set_clock(scene, WALL_MS + 5 * HOUR_MS, 1)
    scene.do(A, CreateInvite("2" * 64, both, 5, HOUR_MS))
    set_clock(scene, WALL_MS, 2)
    assert "expired" in scene.do(A, Join("1" * 64, Member(B, "b", both))).message
    scene.batch(wall_ms=WALL_MS + HOUR_MS - 1, elapsed_ms=HOUR_MS - 1)
    assert isinstance(scene.do(A, Join("2" * 64, Member(B, "b", both))), Joined)
    scene.batch(wall_ms=WALL_MS + HOUR_MS, elapsed_ms=1)
    assert "expired" in scene.do(A, Join("2" * 64, Member(C, "c", both))).message


steps = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 5), st.integers(-PAST_MS - 9, FUTURE_MS + 9)),
    st.tuples(st.just("resend"), st.integers(0, 20), st.just(0)),
    st.tuples(st.just("set"), st.just(0), st.sampled_from([-YEAR_MS, -2 * HOUR_MS, -60_000, 60_000, 2 * HOUR_MS, YEAR_MS])),
    st.tuples(st.just("pass"), st.just(0), st.sampled_from([1, 60_000, HOUR_MS, 2 * HOUR_MS])),
    st.tuples(st.just("restart"), st.just(0), st.just(0)),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=25))
def test_whatever_the_clock_does_no_id_is_new_twice(script: list[tuple[str, int, int]]):
    scene = Scene(A)
    accepted: list[JobId] = []
    sets = 0
    for what, number, by_ms in script:
        now_ms = scene.machine.wall_ms
        match what:
            case "set":
                sets += 1
                set_clock(scene, now_ms + by_ms, sets)
            case "pass":
                scene.batch(wall_ms=now_ms + by_ms, elapsed_ms=by_ms)
            case "restart":
                data = scene.machine.capture()()
                scene.machine = Machine()
                scene.machine.restore(data)
                assert scene.machine.capture()() == data
            case "submit" | "resend":
                if what == "submit":
                    job = job_id(number, now_ms + by_ms)
                elif accepted:
                    job = accepted[number % len(accepted)]
                else:
                    continue
                answer = do(scene, A, Submit(job, spec()))
                if isinstance(answer, Submitted) and answer.is_new:
                    assert job not in accepted, f"{job} runs twice"
                    accepted.append(job)
                scene.machine._queue.jobs.pop(job, None)  # a job is forgotten sooner or later; its id must not be
                scene.machine._queue.ordered[:] = list(scene.machine._queue.jobs)
