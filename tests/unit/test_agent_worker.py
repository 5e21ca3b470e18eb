"""A node's own side of its session (protocol.md 4 and 5)."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from meshd import model
from meshd.model import (
    Array,
    AttemptKey,
    AttemptRun,
    EndReason,
    Inline,
    JobId,
    JobSpec,
    Offer,
    OnLost,
    Outcome,
    Resources,
    Retry,
    Run,
)
from meshd.raft.state.commands import Ended, OpenSession, Reason, Reconcile, Rejected, Report, Reported, SessionOpened
from meshd.work.session_messages import Granted, Notice, Refusal, Refused
from meshd.work.worker import (
    AttemptsEnded,
    HandOver,
    MoveLeash,
    NoticeArrived,
    Offering,
    Open,
    Propose,
    Proposed,
    Recall,
    Recalled,
    Recovered,
    RenewAnswered,
    SendRenew,
    Start,
    State,
    Stop,
    Worker,
    WorkerEffect,
)

JOB = JobId("018f0000-0000-7000-8000-000000000001")
OFFER = Offer(resources=Resources(cpu_milli=1000))
OK = Outcome(EndReason.EXIT, exit_code=0)
T0 = 1_000_000


def key(fence: int) -> AttemptKey:
    return AttemptKey(JOB, task=fence, attempt=1, fence=fence)


def run(fence: int, count: int = 1) -> AttemptRun:
    return AttemptRun(JOB, task=fence, attempt=1, fence=fence, count=count)


def spec(on_lost: OnLost = OnLost.RERUN, lost_after_ms: int | None = None) -> JobSpec:
    return JobSpec(backend=("process",), run=Run(args=("true",)), on_lost=on_lost, lost_after_ms=lost_after_ms)


def notice(worker: Worker, *fences: int, of: JobSpec | None = None) -> NoticeArrived:
    return NoticeArrived(Notice(worker.epoch, tuple(map(run, fences)), ((JOB, of or spec()),)))


def ended(fence: int, outcome: Outcome) -> AttemptsEnded:
    return AttemptsEnded(((key(fence), outcome),))


def stop_notice(worker: Worker, fence: int) -> NoticeArrived:
    return NoticeArrived(Notice(worker.epoch, stops=(key(fence),)))


def opening(worker: Worker) -> OpenSession:
    assert worker._opening is not None
    return worker._opening


def opened(worker: Worker, now_ms: int, *leased: int) -> list[WorkerEffect]:
    answer = SessionOpened(worker.epoch, tuple(map(key, leased)))
    return worker.handle(Proposed(opening(worker), answer), now_ms)


def open_worker(*, now_ms: int = T0) -> Worker:
    worker = Worker(epoch=6)
    worker.handle(Offering(2, OFFER), now_ms)
    opened(worker, now_ms)
    return worker


def only(effects: list[WorkerEffect], kind: type) -> list:  # type: ignore[type-arg]
    return [effect for effect in effects if isinstance(effect, kind)]


def test_the_first_offer_opens_the_epoch_after_the_saved_one() -> None:
    worker = Worker(epoch=6)

    assert worker.handle(Offering(2, OFFER), T0) == [Open(7, OpenSession(7, (), 2, OFFER))]


def test_a_copy_of_its_machine_waits_and_asks_again_with_the_boot_it_has() -> None:
    worker = Worker(epoch=6, boot="copy")
    [first] = worker.handle(Offering(2, OFFER), T0)
    assert first == Open(7, OpenSession(7, (), 2, OFFER, "copy"))

    refused = Proposed(opening(worker), Rejected(Reason.BUSY, "another boot may still be at work"))

    assert worker.handle(refused, T0 + 10) == [] and worker.state is State.OPENING
    assert worker.handle(None, T0 + 2_010) == [first], "the same epoch, until its view would be over"


def test_the_first_view_counts_from_the_first_sending_of_the_open() -> None:
    worker = Worker(epoch=0)
    [first] = worker.handle(Offering(2, OFFER), T0)
    worker.handle(Proposed(opening(worker), None), T0 + 3_000)
    assert worker.handle(None, T0 + 3_250) == [first]

    opened(worker, T0 + 9_000)

    assert (worker.state, worker.view_end_ms) == (State.OPEN, T0 + 10_000)


def test_an_answer_later_than_that_opens_nothing() -> None:
    worker = Worker(epoch=0)
    worker.handle(Offering(2, OFFER), T0)
    late = Proposed(opening(worker), SessionOpened(1, ()))

    [effect] = worker.handle(late, T0 + 10_000)

    assert isinstance(effect, Open)
    assert (worker.state, worker.epoch) == (State.OPENING, 2)


def test_a_refused_epoch_is_overtaken_in_doubling_steps() -> None:
    worker = Worker(epoch=0)
    worker.handle(Offering(2, OFFER), T0)
    for _ in range(4):
        worker.handle(Proposed(opening(worker), Rejected(Reason.WRONG_EPOCH, "")), T0)

    assert worker.epoch == 1 + 2 + 4 + 8 + 16


def test_a_view_counts_from_the_sending_of_the_renewal_that_was_granted() -> None:
    worker = open_worker()
    [renewal] = only(worker.handle(None, T0 + 2_000), SendRenew)

    worker.handle(RenewAnswered(worker.epoch, renewal.sent_ms, Granted()), T0 + 9_000)

    assert worker.view_end_ms == T0 + 12_000


def test_a_view_that_has_ended_is_noticed_before_the_grant_that_came_meanwhile() -> None:
    worker = open_worker()
    grant = RenewAnswered(worker.epoch, T0 + 9_999, Granted())

    worker.handle(grant, T0 + 10_000)

    assert (worker.state, worker.epoch, worker.view_end_ms) == (State.OPENING, 8, T0 + 10_000)


def test_a_refusal_of_a_leader_that_leads_no_more_says_nothing_about_the_session() -> None:
    worker = open_worker()
    worker.handle(RenewAnswered(worker.epoch, T0, Refused(Refusal.NOT_LEADING)), T0 + 1)
    assert worker.state is State.OPEN

    worker.handle(RenewAnswered(worker.epoch, T0, Refused(Refusal.OVER)), T0 + 2)
    assert (worker.state, worker.epoch) == (State.OPENING, 8)


def test_a_notice_that_overtakes_the_answer_to_the_open_waits_for_it() -> None:
    worker = Worker(epoch=0)
    worker.handle(Offering(2, OFFER), T0)
    assert worker.handle(notice(worker, 1), T0 + 1) == []

    assert only(opened(worker, T0 + 2), Start) == [Start(1, (key(1),), spec(), None)]


def test_attempts_beyond_what_fits_wait_in_fence_order() -> None:
    worker = open_worker()
    assert only(worker.handle(notice(worker, 3, 2, 1), T0 + 1), Start) == [Start(1, (key(1),), spec(), None)]

    assert only(worker.handle(ended(1, OK), T0 + 2), Start) == [Start(2, (key(2),), spec(), None)]


def test_an_attempt_is_obeyed_once_over_all_epochs() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1), T0)
    [report] = only(worker.handle(ended(1, OK), T0 + 1), Propose)
    worker.handle(Proposed(report.command, None), T0 + 2)
    worker.handle(None, T0 + 10_000)
    [report] = only(opened(worker, T0 + 10_001, 1), Propose)
    worker.handle(Proposed(report.command, Reported()), T0 + 10_002)
    assert worker.attempts.listing() == ()

    assert only(worker.handle(notice(worker, 1), T0 + 10_003), Start) == []


def test_an_unanswered_report_is_sent_again_unchanged_and_the_next_one_waits() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1, 2), T0)
    [first] = only(worker.handle(ended(1, OK), T0 + 1), Propose)
    assert first.command == Report(7, 1, done=(run(1),))
    assert only(worker.handle(ended(2, OK), T0 + 2), Propose) == []

    worker.handle(Proposed(first.command, None), T0 + 3)
    assert only(worker.handle(None, T0 + 300), Propose) == [first]
    [second] = only(worker.handle(Proposed(first.command, Reported()), T0 + 301), Propose)

    assert second.command == Report(7, 2, done=(run(2),))
    assert worker.attempts.listing() == (key(2),)


def test_what_the_opens_answer_does_not_name_is_seen_dead_before_anything_starts() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1, 2), T0)
    [lapse] = only(worker.handle(None, T0 + 10_000), Open)
    assert lapse.command.held == (key(1), key(2))

    effects = opened(worker, T0 + 10_001, 2)
    assert only(effects, Stop) == [Stop(key(1), EndReason.LOST)]
    assert only(effects, Start) == []
    assert only(worker.handle(notice(worker, 5), T0 + 10_002), Start) == []

    assert only(worker.handle(ended(1, OK), T0 + 12_000), Start) == [Start(2, (key(2),), spec(), None)]
    assert worker.attempts.listing() == (key(2), key(5))


def test_after_a_list_no_lease_up_to_its_fence_is_obeyed() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 4), T0)
    [listed] = only(worker.handle(RenewAnswered(7, T0, Granted(list_fence=9)), T0 + 1), Propose)
    assert listed.command == Reconcile(7, 9, (key(4),))

    worker.handle(notice(worker, 9, 10), T0 + 2)

    assert worker.attempts.listing() == (key(4), key(10))


@pytest.mark.parametrize(
    ("job", "allowance_ms"),
    [
        (spec(OnLost.RERUN, 45_000), 15_000),
        (spec(OnLost.RERUN, 5_000), 0),
        (spec(OnLost.FAIL), 0),
        (spec(OnLost.RERUN), None),
        (spec(OnLost.RERUN, 0), None),
        (spec(OnLost.WAIT, 45_000), None),
    ],
)
def test_a_cut_off_attempt_is_stopped_when_its_job_says_so(job: JobSpec, allowance_ms: int | None) -> None:
    worker = open_worker()
    [start] = only(worker.handle(notice(worker, 1, of=job), T0), Start)
    deadline_ms = None if allowance_ms is None else T0 + 10_000 + allowance_ms
    assert start.leash_ms == deadline_ms

    stops = {}
    for at_ms in range(T0, T0 + 60_000, 500):
        for stop in only(worker.handle(None, at_ms), Stop):
            stops[at_ms] = stop

    expected = {} if deadline_ms is None else {deadline_ms: Stop(key(1), EndReason.LOST)}
    assert stops == expected


def test_a_granted_renewal_moves_the_leash_of_what_runs() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1, of=spec(OnLost.FAIL)), T0)

    effects = worker.handle(RenewAnswered(7, T0 + 2_000, Granted()), T0 + 2_001)

    assert only(effects, MoveLeash) == [MoveLeash(key(1), T0 + 12_000)]


def test_what_it_stopped_by_itself_stays_listed_as_lost() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1, of=spec(OnLost.FAIL)), T0)
    worker.handle(None, T0 + 10_000)
    lost = Outcome(EndReason.LOST)
    worker.handle(ended(1, lost), T0 + 11_000)
    assert worker.attempts.listing() == (key(1),)

    [report] = only(opened(worker, T0 + 12_000, 1), Propose)

    assert report.command == Report(8, 1, (Ended(key(1), lost),))


def test_a_cancelled_attempt_is_stopped_or_ends_before_it_starts() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1, 2), T0)

    assert only(worker.handle(stop_notice(worker, 1), T0), Stop) == [Stop(key(1), EndReason.CANCELLED)]
    [report] = only(worker.handle(stop_notice(worker, 2), T0), Propose)
    assert [ended.outcome.reason for ended in report.command.ended] == [EndReason.CANCELLED]


def test_what_is_given_back_before_it_began_is_held_as_before_and_starts_again() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1, 2), T0)

    [start] = only(worker.handle(Recalled((key(1),)), T0 + 1), Start)

    assert start.keys == (key(1),)
    assert worker.attempts.listing() == (key(1), key(2))


def test_what_was_to_be_stopped_and_is_given_back_has_ended_so() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1), T0)
    worker.handle(stop_notice(worker, 1), T0)

    [report] = only(worker.handle(Recalled((key(1),)), T0 + 1), Propose)

    assert [each.outcome.reason for each in report.command.ended] == [EndReason.CANCELLED]


def test_a_lease_notice_that_comes_after_its_stop_is_not_obeyed() -> None:
    worker = open_worker()
    worker.handle(stop_notice(worker, 1), T0)

    assert only(worker.handle(notice(worker, 1), T0), Start) == []


def test_handing_over_stops_what_runs_and_gives_back_what_never_started() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1, 2), T0)

    effects = worker.handle(HandOver(), T0)

    assert only(effects, Stop) == [Stop(key(1), EndReason.LOST)]
    [report] = only(effects, Propose)
    assert report.command == Report(7, 1, returned=(run(2),))
    worker.handle(Proposed(report.command, Reported()), T0 + 1)
    assert worker.attempts.listing() == (key(1),)


def test_who_is_handing_over_gives_back_what_is_leased_to_it_meanwhile_and_starts_nothing() -> None:
    worker = open_worker()
    worker.handle(HandOver(), T0)

    effects = worker.handle(notice(worker, 1), T0 + 1)

    assert only(effects, Start) == []
    [report] = only(effects, Propose)
    assert report.command == Report(7, 1, returned=(run(1),))


def test_a_drained_node_claims_no_slots_and_lets_its_work_end() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1), T0)

    [claim] = only(worker.handle(Offering(0, OFFER), T0), Propose)

    assert (claim.command.seq, claim.command.slots) == (1, 0)
    assert worker.attempts.listing() == (key(1),)


def test_a_backends_impossible_outcome_becomes_one_that_the_log_takes() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1), T0)

    [report] = only(worker.handle(ended(1, Outcome(EndReason.EXIT, message="x" * 3000)), T0), Propose)

    assert report.command.ended[0].outcome.reason is EndReason.BACKEND


def test_an_outcome_over_its_tasks_share_becomes_one_that_the_log_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "RESULTS_BYTES", 2 * 300)
    worker = open_worker()
    worker.handle(notice(worker, 1, of=replace(spec(), array=Array(count=2))), T0)
    said = Outcome(EndReason.EXIT, exit_code=0, stdout=Inline(b"x" * 301))

    [report] = only(worker.handle(ended(1, said), T0), Propose)

    assert report.command.ended[0].outcome.reason is EndReason.BACKEND
    assert "stdout of 301 bytes inline, not 300" in report.command.ended[0].outcome.message
    assert worker.state is State.OPEN


def test_its_timer_is_never_in_the_past() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 1, 2, of=spec(OnLost.FAIL)), T0)
    now_ms = T0
    for _ in range(200):
        timer_ms = worker.next_timer_ms()
        assert timer_ms is not None and timer_ms > now_ms
        now_ms = timer_ms
        worker.handle(None, now_ms)


def test_a_node_that_has_followed_its_mesh_to_a_new_epoch_opens_a_session_there_with_all_that_it_holds() -> None:
    worker = open_worker()
    worker.handle(notice(worker, 5), T0 + 100)
    old = worker.epoch

    [effect] = only(worker.handle(Recovered(), T0 + 200), Open)

    assert effect.epoch == old + 1 and effect.command.held == (key(5),)
    # What the lost log had leased is obeyed no more.
    late = NoticeArrived(Notice(old, (key(6),), ((JOB, spec()),)))
    assert only(worker.handle(late, T0 + 300), Start) == []
    assert Worker(epoch=1).handle(Recovered(), T0) == [], "it has no session yet"


def test_a_restarted_node_obeys_nothing_that_was_leased_to_the_process_before_it() -> None:
    worker = Worker(epoch=6)

    # The leader may be this very node, restarted: its keeper tells every lease of the live session again.
    assert worker.handle(notice(worker, 5), T0) == []

    [effect] = worker.handle(Offering(2, OFFER), T0 + 100)
    assert effect == Open(7, OpenSession(7, (), 2, OFFER))


# --- arrays of small tasks


def array(count: int = 10_000, **fields: Any) -> JobSpec:
    return JobSpec(backend=("wasm",), run=Run(args=("x",)), array=Array(count=count), **fields)


def given(worker: Worker, first: int, count: int, of: JobSpec) -> NoticeArrived:
    return NoticeArrived(Notice(worker.epoch, (run(first, count),), ((JOB, of),)))


def all_end(worker: Worker, keys: tuple[AttemptKey, ...], now_ms: int) -> list[WorkerEffect]:
    return worker.handle(AttemptsEnded(tuple((each, OK) for each in keys)), now_ms)


def answered(worker: Worker, effects: list[WorkerEffect], now_ms: int) -> list[WorkerEffect]:
    """Whatever it proposes is accepted at once; all that it does then."""
    effects = list(effects)
    for each in effects:
        if isinstance(each, Propose):
            effects += worker.handle(Proposed(each.command, Reported()), now_ms)
    return effects


def at_work(
    worker: Worker, of: JobSpec, batches: int, batch_ms: int = 2
) -> tuple[int, list[WorkerEffect], list[Start]]:
    """So many batches, each of which takes so long; the time then, all that was done, and what is running.

    There is always as much to do as was asked for.
    """
    now_ms, fence = T0, 1
    done: list[WorkerEffect] = []
    for batch in range(batches + 1):
        asked = next((dict(report.ahead)[JOB] for report in reversed(reports(done)) if report.ahead), 10)
        more = asked - sum(worker.attempts.waiting_of.values())
        if more > 0:
            done += answered(worker, worker.handle(given(worker, fence, more, of), now_ms), now_ms)
            fence += more
        [*_, start] = only(done, Start)
        now_ms += batch_ms
        if batch < batches:
            done += answered(worker, all_end(worker, start.keys, now_ms), now_ms)
    return now_ms - batch_ms, done, only(done, Start)[-1:]


def reports(effects: list[WorkerEffect]) -> list[Report]:
    return [each.command for each in only(effects, Propose) if isinstance(each.command, Report)]


def test_tasks_that_end_fast_start_many_together_and_slow_ones_one_by_one() -> None:
    _, fast, _ = at_work(open_worker(), array(), 8)
    _, slow, _ = at_work(open_worker(), array(), 8, batch_ms=50)

    assert [len(start.keys) for start in only(fast, Start)][:6] == [1, 4, 16, 29, 52, 95]
    assert {len(start.keys) for start in only(slow, Start)} == {1}


def starts(effects: list[WorkerEffect]) -> list[tuple[int, int]]:
    """Lane, and how many."""
    return [(start.lane, len(start.keys)) for start in only(effects, Start)]


def learned(task_ms: int, count: int = 200) -> tuple[Worker, int, list[WorkerEffect]]:
    """One place, which has seen the job's first tasks take so long; the time then, and what was done last."""
    worker = open_worker()
    assert starts(worker.handle(given(worker, 1, count, array()), T0)) == [(1, 1)], "nothing is known yet"
    return worker, T0 + task_ms, all_end(worker, (key(1),), T0 + task_ms)


def test_a_place_is_given_more_while_half_of_its_batch_is_left() -> None:
    worker, now_ms, effects = learned(5)
    assert starts(effects) == [(2, 4)]

    assert starts(all_end(worker, (key(2),), now_ms + 5)) == []
    assert starts(all_end(worker, (key(3),), now_ms + 10)) == [(2, 4)], "20 ms of work, in the same lane"
    assert starts(all_end(worker, tuple(map(key, range(4, 10))), now_ms + 40)) == [(10, 4)], "all are over: another"


def test_behind_a_task_of_100_ms_the_next_waits_in_its_place_and_behind_a_slow_one_none() -> None:
    worker, now_ms, effects = learned(100)
    assert starts(effects) == [(2, 1), (2, 1)]
    assert starts(all_end(worker, (key(2),), now_ms + 100)) == [(2, 1)]

    _, _, effects = learned(500)
    assert starts(effects) == [(2, 1)]


def test_the_last_task_waits_for_the_place_that_is_free_first() -> None:
    worker = Worker(epoch=6)
    worker.handle(Offering(2, Offer(resources=Resources(cpu_milli=2000))), T0)
    opened(worker, T0)
    assert starts(worker.handle(given(worker, 1, 5, array()), T0)) == [(1, 1), (2, 1)]

    assert starts(all_end(worker, (key(1),), T0 + 100)) == [(3, 1), (2, 1)]
    assert starts(all_end(worker, (key(3),), T0 + 200)) == [(5, 1)]
    assert len(worker.attempts.batches) == 2


def test_nothing_overtakes_the_job_that_waits_first() -> None:
    worker, now_ms, _ = learned(5, count=8)
    other = JobId("018f0000-0000-7000-8000-000000000002")
    worker.handle(NoticeArrived(Notice(worker.epoch, (AttemptRun(other, 0, 1, 9, 1),), ((other, array()),))), now_ms)
    worker.handle(given(worker, 10, 90, array()), now_ms)

    assert starts(all_end(worker, (key(2), key(3)), now_ms + 10)) == [(2, 3)]
    assert starts(all_end(worker, tuple(map(key, range(4, 8))), now_ms + 30)) == []
    assert starts(all_end(worker, (key(8),), now_ms + 40)) == [(9, 1)]


def test_a_task_is_slow_when_it_takes_twice_as_long_as_those_before_it() -> None:
    worker, now_ms, _ = learned(100)

    assert only(worker.handle(None, now_ms + 150), Recall) == []
    assert only(worker.handle(None, now_ms + 200), Recall) == [Recall((key(3),))]
    assert starts(worker.handle(Recalled((key(3),)), now_ms + 201)) == []


def test_a_slow_task_is_looked_at_later_when_its_jobs_tasks_turn_out_to_be_slow() -> None:
    worker = Worker(epoch=6)
    worker.handle(Offering(3, Offer(resources=Resources(cpu_milli=3000))), T0)
    opened(worker, T0)
    worker.handle(given(worker, 1, 3, array()), T0)
    all_end(worker, (key(1),), T0 + 90)
    worker.handle(None, T0 + 180)
    assert worker.attempts.batches[2].is_slow
    all_end(worker, (key(3),), T0 + 350)

    now_ms = T0 + 360
    worker.handle(None, now_ms)

    timer_ms = worker.next_timer_ms()
    assert timer_ms is not None and timer_ms > now_ms, "the same tick for ever"


def test_handing_over_gives_back_what_waits_behind_what_runs_and_stops_what_came_to_run_meanwhile() -> None:
    worker, now_ms, _ = learned(5, count=6)

    effects = worker.handle(HandOver(), now_ms)

    assert only(effects, Recall) == [Recall(tuple(map(key, (3, 4, 5))))]
    assert only(effects, Stop) == [Stop(key(2), EndReason.LOST)]
    effects = worker.handle(Recalled((key(4), key(5))), now_ms + 1)
    assert starts(effects) == []
    effects = worker.handle(ended(2, Outcome(EndReason.LOST)), now_ms + 2)
    assert only(effects, Stop) == [Stop(key(3), EndReason.LOST)], "it had begun when it was to be recalled"
    worker.handle(ended(3, Outcome(EndReason.LOST)), now_ms + 3)
    done = answered(worker, [Propose(worker._pending)] if worker._pending else [], now_ms + 30)  # type: ignore[arg-type]
    done += answered(worker, worker.handle(None, now_ms + 60), now_ms + 60)
    assert worker.attempts.is_empty, done


def test_ends_with_nothing_to_tell_are_reported_as_one_run() -> None:
    _, done, _ = at_work(open_worker(), array(), 8)
    runs = [run for report in reports(done) for run in report.done]

    assert [report.ended for report in reports(done)] == [()] * len(reports(done))
    assert len(runs) <= 2 * len(reports(done)) and runs[0].fence == 1
    assert sum(run.count for run in runs) > 100


def test_more_is_asked_for_ahead_the_faster_tasks_end_and_nothing_of_slow_ones() -> None:
    _, fast, _ = at_work(open_worker(), array(), 8)
    _, slow, _ = at_work(open_worker(), array(), 8, batch_ms=100)
    _, hours, _ = at_work(open_worker(), array(), 8, batch_ms=3_000)

    asked = [[dict(report.ahead)[JOB] for report in reports(each) if report.ahead] for each in (fast, slow, hours)]
    assert max(asked[0]) == 2048 and max(asked[1]) == 2 and asked[2] == []


@pytest.mark.parametrize(
    "promising",
    [
        array(on_lost=OnLost.WAIT),
        array(on_lost=OnLost.FAIL),
        array(lost_after_ms=60_000),
        array(retry=Retry(crash_limit=2)),
        array(count=1),
    ],
)
def test_nothing_is_held_ahead_of_a_job_whose_losses_matter(promising: JobSpec) -> None:
    _, done, _ = at_work(open_worker(), promising, 8)

    assert {len(start.keys) for start in only(done, Start)} == {1}
    assert not any(report.ahead for report in reports(done))


def test_what_waits_behind_a_task_that_takes_long_is_recalled() -> None:
    worker = open_worker()
    now_ms, _, [start] = at_work(worker, array(), 8)
    assert len(start.keys) > 100

    [recall] = only(worker.handle(None, now_ms + 100), Recall)

    assert recall.keys == start.keys[1:]
    assert only(worker.handle(Recalled(recall.keys), now_ms + 101), Start) == []
    [again] = only(all_end(worker, start.keys[:1], now_ms + 150), Start)
    assert again.keys == start.keys[1:5]


def test_what_waits_longer_than_others_would_need_is_given_back_unstarted() -> None:
    worker = open_worker()
    now_ms, _, [start] = at_work(worker, array(), 8)
    [recall] = only(answered(worker, worker.handle(None, now_ms + 100), now_ms + 100), Recall)
    answered(worker, worker.handle(Recalled(recall.keys), now_ms + 101), now_ms + 101)
    before = len(worker.attempts.listing())
    now, done = now_ms + 101, list[WorkerEffect]()
    while now < now_ms + 9_000:
        timer_ms = worker.next_timer_ms()
        assert timer_ms is not None and timer_ms > now
        now = timer_ms
        for effect in (effects := worker.handle(None, now)):
            if isinstance(effect, SendRenew):
                worker.handle(RenewAnswered(worker.epoch, now, Granted()), now)
        done += answered(worker, effects, now)

    returned = [run for report in reports(done) for run in report.returned]
    assert sum(run.count for run in returned) > 1_000
    assert len(worker.attempts.listing()) == before - sum(run.count for run in returned)
    assert start.keys[0] in worker.attempts.listing()
    assert reports(done)[-1].ahead == () or not worker._paces[JOB].told


def test_reports_wait_for_one_another_only_while_there_is_work_to_go_on_with() -> None:
    worker = open_worker()
    now_ms, done, [start] = at_work(worker, array(), 8)

    assert len(reports(done)) < len(only(done, Start))
    effects = answered(worker, all_end(worker, start.keys, now_ms), now_ms)
    worker.attempts.waiting.clear()
    worker.attempts.waiting_of.clear()
    [last] = only(effects, Start) or [start]
    assert reports(all_end(worker, last.keys, now_ms + 1)) != []
