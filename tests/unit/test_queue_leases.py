"""Submit, lease, report: the ordinary life of tasks, and who may finish one."""

from __future__ import annotations

from meshd.model import (
    Array,
    AttemptRun,
    BackendOffer,
    EndReason,
    Inline,
    Needs,
    Offer,
    Outcome,
    Resources,
    TaskState,
    runs_of,
)
from meshd.raft.state.commands import Claim, Ended, Reason, Report, Reported, SetDraining, Submit
from meshd.raft.state.machine import Machine
from tests.scene import BAD, GOOD, OFFER, A, B, C, Scene, job_id, spec


def test_a_job_is_leased_in_the_entry_that_brings_it():
    scene = Scene(A)
    job = scene.submit()
    [key] = scene.leases(A)
    assert scene.state(job) is TaskState.LEASED
    assert scene.notices() == [key]
    assert key.attempt == 1


def test_a_finished_task_gives_its_slot_to_the_next():
    scene = Scene(A)
    first, second = scene.submit(), scene.submit()
    assert scene.finish(A) == Reported()
    assert scene.job(first).state is TaskState.DONE and scene.job(first).is_final
    assert scene.state(second) is TaskState.LEASED


def test_a_late_worker_cannot_overwrite_its_successor():
    scene = Scene(A, B)
    job = scene.submit(spec(lost_after_ms=0))
    [old] = scene.leases(A)
    scene.end(A)
    [new] = scene.leases(B)
    assert new.attempt == 2 and new.fence > old.fence
    scene.open(A, 2)
    assert scene.report(A, (old, GOOD), epoch=2) == Reported(stale=(old,))
    assert scene.state(job) is TaskState.LEASED
    scene.finish(B)
    assert scene.state(job) is TaskState.DONE


def test_another_node_cannot_finish_a_task_it_does_not_hold():
    scene = Scene(A, B)
    job = scene.submit()
    [key] = scene.leases(A)
    assert scene.report(B, (key, GOOD)) == Reported(stale=(key,))
    assert scene.state(job) is TaskState.LEASED


def test_a_finished_task_never_moves():
    scene = Scene(A)
    job = scene.submit()
    [key] = scene.leases(A)
    scene.report(A, (key, BAD))
    assert scene.report(A, (key, GOOD)) == Reported(stale=(key,))
    assert scene.state(job) is TaskState.FAILED


def test_higher_priority_goes_first_then_age():
    scene = Scene(A)
    scene.submit()
    low = scene.submit(spec(priority=10))
    old, young = scene.submit(spec(priority=90)), scene.submit(spec(priority=90))
    order = []
    for _ in range(3):
        scene.finish(A)
        [key] = scene.leases(A)
        order.append(key.job)
    assert order == [old, young, low]


def test_a_claim_says_how_many_in_all_and_stands():
    scene = Scene(A, slots=2)
    job = scene.submit(spec(count=10))
    assert len(scene.leases(A)) == 2
    scene.claim(A, 5)
    assert len(scene.leases(A)) == 5
    scene.finish(A)
    assert len(scene.leases(A)) == 5
    scene.claim(A, 3)
    scene.finish(A)
    scene.finish(A)
    assert len(scene.leases(A)) == 3
    assert scene.job(job).counts.done == 3


def test_a_claim_of_nothing_is_the_drain():
    scene = Scene(A)
    scene.claim(A, 0)
    job = scene.submit()
    assert scene.state(job) is TaskState.READY
    scene.claim(A, 1)
    assert scene.state(job) is TaskState.LEASED


def test_a_draining_member_gets_no_work_until_it_is_taken_back():
    scene = Scene(A, B, slots=1)
    scene.do(B, SetDraining(A, is_draining=True))
    first, second = scene.submit(), scene.submit()
    assert scene.task(first).node == B
    assert scene.state(second) is TaskState.READY
    scene.do(B, SetDraining(A, is_draining=False))
    assert scene.task(second).node == A


def test_work_is_spread_over_the_nodes():
    scene = Scene(A, B, C, slots=4)
    scene.submit(spec(count=6))
    assert [len(scene.leases(node)) for node in (A, B, C)] == [2, 2, 2]


def test_resources_taken_by_one_task_are_not_given_to_another():
    offer = Offer(backends=(BackendOffer("wasm"),), resources=Resources(cpu_milli=4000, custom=(("license", 1),)))
    scene = Scene(A, slots=10, offer=offer)
    licensed = Needs(resources=Resources(cpu_milli=1000, custom=(("license", 1),)))
    first, second = scene.submit(spec(needs=licensed)), scene.submit(spec(needs=licensed))
    others = scene.submit(spec(count=10))
    assert scene.state(first) is TaskState.LEASED and scene.state(second) is TaskState.READY
    assert scene.job(others).counts.leased == 3
    scene.finish(A)
    assert scene.state(second) is TaskState.LEASED


def test_a_new_offer_makes_waiting_work_fit():
    scene = Scene(A, B)
    job = scene.submit(spec(needs=Needs(resources=Resources(gpu=1))))
    assert scene.state(job) is TaskState.READY
    scene.claim(B, 1, offer=Offer(OFFER.backends, Resources(cpu_milli=1000, gpu=1)))
    assert scene.task(job).node == B


def test_the_first_backend_that_some_node_offers_is_used():
    process = Offer((BackendOffer("process"),), OFFER.resources)
    scene = Scene(A, slots=0)
    scene.open(A, 1, slots=2, offer=process)
    job = scene.submit(spec(backend=("wasm", "process"), count=3))
    assert scene.job(job).counts.leased == 2
    scene.claim(A, 3, offer=Offer((BackendOffer("process"), BackendOffer("wasm")), OFFER.resources))
    assert scene.job(job).counts.leased == 3


def test_a_later_alternative_is_used_when_the_node_with_the_first_is_gone():
    process = Offer((BackendOffer("process"),), OFFER.resources)
    scene = Scene(A, B, slots=0)
    scene.open(A, 1, slots=1)
    scene.open(B, 1, slots=1, offer=process)
    first, second = (scene.submit(spec(backend=("wasm", "process"))) for _ in range(2))
    assert scene.task(first).node == A and scene.state(second) is TaskState.READY
    assert "prefers" in str(scene.explain(second).nodes[1].lacks)
    scene.claim(A, 0)
    assert scene.task(second).node == B


def test_at_once_bounds_what_runs():
    scene = Scene(A, slots=8)
    job = scene.submit(spec(array=Array(count=5, at_once=2)))
    assert scene.job(job).counts.leased == 2
    scene.finish(A)
    assert scene.job(job).counts == scene.job(job).counts.__class__(ready=2, leased=2, done=1)
    assert "at_once" in scene.machine.answer(_explain(job, 4)).summary


def _explain(job, task):
    from meshd.views import Explain

    return Explain(job, task)


def test_running_is_what_the_node_reports():
    scene = Scene(A)
    job = scene.submit()
    scene.report(A, running=scene.leases(A))
    assert scene.state(job) is TaskState.RUNNING
    scene.finish(A)
    assert scene.state(job) is TaskState.DONE


def test_an_outcome_is_kept_and_a_bare_one_costs_nothing():
    scene = Scene(A)
    spoken = Outcome(reason=EndReason.EXIT, exit_code=0, stdout=Inline(b"hello"), holders=(A,))
    job = scene.submit(spec(count=2))
    scene.finish(A, spoken)
    scene.finish(A)
    first, second = scene.task(job, 0), scene.task(job, 1)
    assert first.outcome == spoken and first.node == A
    assert second.outcome == GOOD
    assert scene.machine._queue.jobs[job].results.keys() == {0}


def test_commands_of_a_session_are_applied_once_and_in_order():
    scene = Scene(A, slots=2)
    job = scene.submit(spec(count=3))
    first, second = scene.leases(A)
    report = Report(1, 1, (Ended(first, GOOD),))
    assert scene.do(A, report) == Reported()
    assert scene.do(A, report) == Reported()
    assert scene.do(A, Report(1, 3, (Ended(second, GOOD),))).reason is Reason.GAP
    assert scene.do(A, Report(1, 2)) == Reported()
    assert scene.do(A, report).reason is Reason.OLD
    assert scene.do(A, Claim(2, 1, 1, OFFER)).reason is Reason.WRONG_EPOCH
    assert scene.job(job).counts.done == 1


def test_a_fence_only_rises_over_tries_and_jobs():
    scene = Scene(A)
    scene.submit(spec(attempts=3))
    scene.submit()
    fences = []
    for outcome in (BAD, BAD, GOOD, GOOD):
        fences.append(scene.leases(A)[0].fence)
        scene.finish(A, outcome)
    assert fences == sorted(set(fences))


# --- runs, and what is held ahead

TWO_CORES = Offer(backends=(BackendOffer("wasm"),), resources=Resources(cpu_milli=2000))
ONE_CORE = Needs(Resources(cpu_milli=1000))


def test_what_was_asked_for_ahead_takes_nothing_from_who_comes_first():
    scene = Scene(A, slots=8, offer=TWO_CORES)
    small = scene.submit(spec(count=1000, needs=ONE_CORE))
    assert len(scene.leases(A)) == 2

    scene.report_runs(A, ahead=((small, 100),))
    assert len(scene.leases(A)) == 102

    urgent = scene.submit(spec(needs=ONE_CORE, priority=90))
    assert scene.state(urgent) is TaskState.READY
    scene.report_runs(A, done=runs_of(scene.leases(A)[:2]))
    assert scene.state(urgent) is TaskState.LEASED
    assert len(scene.leases(A)) == 102


def test_what_replaces_reported_ends_is_leased_in_the_same_entry():
    scene = Scene(A, slots=8, offer=TWO_CORES)
    job = scene.submit(spec(count=1000, needs=ONE_CORE))
    scene.report_runs(A, ahead=((job, 100),))
    scene.notices()

    scene.report_runs(A, done=runs_of(scene.leases(A)[:60]))

    assert len(scene.leases(A)) == 102
    assert len(scene.notices()) == 60


def test_a_free_node_comes_before_what_another_wants_ahead():
    scene = Scene(A, B, slots=1, offer=TWO_CORES)
    job = scene.submit(spec(count=2, needs=ONE_CORE))
    scene.report_runs(A, ahead=((job, 100),))
    scene.finish(B)

    more = scene.submit(spec(count=3, needs=ONE_CORE))
    scene.report_runs(A, ahead=((more, 100),))

    assert [len(scene.leases(node)) for node in (A, B)] == [3, 1]


def test_a_draining_node_is_leased_nothing_ahead_and_what_it_gives_back_is_not_lost():
    scene = Scene(A, B, slots=1, offer=TWO_CORES)
    job = scene.submit(spec(count=100, needs=ONE_CORE))
    scene.report_runs(A, ahead=((job, 10),))
    scene.do(A, SetDraining(A, is_draining=True))
    waiting = scene.leases(A)[1:]

    scene.report_runs(A, returned=runs_of(waiting))

    assert len(scene.leases(A)) == 1
    assert scene.job(job).counts.leased == 2
    assert {scene.task(job, key.task).losses for key in waiting} == {0}


def test_a_session_that_ended_asks_for_nothing_ahead_any_more():
    scene = Scene(A, slots=1, offer=TWO_CORES)
    job = scene.submit(spec(count=100, needs=ONE_CORE))
    scene.report_runs(A, ahead=((job, 10),))
    scene.end(A)
    scene.open(A, 2, slots=1, offer=TWO_CORES)

    assert len(scene.leases(A, 2)) == 1


def test_at_once_bounds_also_what_is_held_ahead():
    scene = Scene(A, slots=2, offer=TWO_CORES)
    job = scene.submit(spec(array=Array(count=100, at_once=5)))
    scene.report_runs(A, ahead=((job, 50),))

    assert len(scene.leases(A)) == 5


def test_a_task_that_was_lost_often_is_held_by_nobody_ahead():
    scene = Scene(A, slots=1, offer=TWO_CORES)
    job = scene.submit(spec(count=4, needs=ONE_CORE))
    for epoch in range(2, 6):
        scene.end(A, epoch - 1)
        if epoch == 5:
            urgent = scene.submit(spec(needs=ONE_CORE, priority=90))
        scene.open(A, epoch, slots=1, offer=TWO_CORES)
    assert scene.task(job, 0).losses == 4

    scene.report_runs(A, ahead=((job, 10),), epoch=5)

    assert [(key.job, key.task) for key in scene.leases(A, 5)] == [(urgent, 0), (job, 1), (job, 2), (job, 3)]
    scene.finish(A, epoch=5)
    assert scene.state(job) is TaskState.LEASED, "it has the slot"


def test_one_entry_leases_a_bounded_number_and_the_next_ones_the_rest():
    """10,000 different needs and one claim of 10,000 slots held every voter for 12 s."""
    scene = Scene(A, slots=0)
    kinds = 2_500
    for first in range(1, kinds + 1, 500):
        wanted = [
            (A, Submit(job_id(number), spec(needs=Needs(Resources(memory=number)))))
            for number in range(first, first + 500)
        ]
        scene.batch(*wanted)
    scene.open(A, 1, slots=kinds)

    leased = [len(scene.leases(A))]
    while scene.machine.next_timer_ms() == 0:
        scene.batch()
        leased.append(len(scene.leases(A)))

    assert leased == [1_000, 2_000, 2_500]
    assert [key.fence for key in scene.leases(A)] == list(range(1, kinds + 1))


def test_nobody_gives_back_or_ends_what_is_anothers():
    scene = Scene(A, B, slots=2, offer=TWO_CORES)
    one, two = scene.submit(spec(count=2, needs=ONE_CORE)), scene.submit(spec(count=2, needs=ONE_CORE))
    [mine, *_], [theirs, *_] = scene.leases(A), scene.leases(B)

    forged = AttemptRun(two if mine.job == one else one, mine.task, 1, mine.fence)
    scene.report_runs(A, returned=(AttemptRun(theirs.job, theirs.task, 1, theirs.fence), forged))
    answer = scene.report_runs(A, done=(AttemptRun(theirs.job, theirs.task, 1, theirs.fence), forged))

    assert [run.fence for run in answer.stale_runs] == [theirs.fence, mine.fence]
    restored = Machine()
    restored.restore(scene.machine.capture()())
    assert restored.digest() == scene.machine.digest(), "a snapshot says how it is, not how it was"
    assert [len(scene.leases(node)) for node in (A, B)] == [2, 2]


def test_a_node_that_drains_no_more_gets_what_it_asked_for_ahead():
    scene = Scene(A, slots=1, offer=TWO_CORES)
    job = scene.submit(spec(count=100, needs=ONE_CORE))
    scene.do(A, SetDraining(A, is_draining=True))
    scene.report_runs(A, ahead=((job, 10),))
    assert len(scene.leases(A)) == 1

    scene.do(A, SetDraining(A, is_draining=False))

    assert len(scene.leases(A)) == 11
