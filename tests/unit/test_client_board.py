"""A future is resolved once and is never forgotten, whatever order things happen in."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest

from meshd.client.board import PACES_MAX, Board, MeshFuture, SentJob, SentTask
from meshd.model import JobId


def future(board: Board, payload: bytes = b"x") -> MeshFuture[Any]:
    return MeshFuture(board, b"f", payload, 0)


def sent(board: Board, *groups: list[MeshFuture[Any]], name: str = "job") -> SentJob:
    board.add([call for group in groups for call in group])
    board.take()
    job = SentJob(JobId(name), [SentTask(group, 0) for group in groups])
    board.sending(job)
    board.agreed(job)
    return job


def test_the_last_call_is_waited_for_also_between_queue_and_job() -> None:
    board = Board()
    call = future(board)
    board.add([call])
    taken = board.take()
    board.close()
    assert taken == [call]
    ended = threading.Event()
    threading.Thread(target=lambda: (board.wait_news(), ended.set()), daemon=True).start()
    assert not ended.wait(0.05), "its job is not even sent yet"
    job = SentJob(JobId("job"), [SentTask(taken, 0)])
    board.sending(job)
    board.agreed(job)
    board.resolve(call, 1, None)
    board.settled(job.tasks[0], [])
    assert board.take() == []
    assert ended.wait(5) and board.wait_news() is None and call.result(0) == 1


def test_what_is_handed_back_goes_first() -> None:
    board = Board()
    a, b, c = (future(board) for _ in range(3))
    job = sent(board, [a, b])
    board.add([c])
    board.resolve(a, 0, None)
    board.settled(job.tasks[0], [b])
    assert board.take() == [b, c]


def test_a_cancelled_call_that_waits_is_never_sent() -> None:
    board = Board()
    a, b = future(board), future(board)
    board.add([a, b])
    assert a.cancel() and a.cancel()
    assert board.take() == [b]
    assert wait([a], timeout=1).done == {a}
    with pytest.raises(CancelledError):
        a.result(0)


def test_a_task_is_stopped_when_nobody_wants_any_of_its_calls() -> None:
    board = Board()
    a, b, c = (future(board) for _ in range(3))
    job = sent(board, [a, b], [c])
    board.wait_news()
    a.cancel()
    c.cancel()
    assert board.wait_news() == ([], [job.tasks[1]])
    b.cancel()
    assert board.wait_news() == ([], [job.tasks[0]])


def test_a_task_of_a_job_that_is_not_agreed_yet_is_stopped_when_it_is() -> None:
    board = Board()
    a = future(board)
    board.add([a])
    board.take()
    job = SentJob(JobId("job"), [SentTask([a], 0)])
    board.sending(job)
    a.cancel()
    board.agreed(job)
    assert board.wait_news() == ([job], [job.tasks[0]])


def test_a_result_that_comes_after_cancel_is_not_taken_and_the_other_way_round() -> None:
    board = Board()
    a, b = future(board), future(board)
    sent(board, [a, b])
    a.cancel()
    board.resolve(a, 1, None)
    board.resolve(b, 2, None)
    board.resolve(b, 3, None)
    assert a.cancelled() and b.result(0) == 2 and not b.cancel()
    assert (a.payload, b.payload) == (b"", b""), "arguments are not kept"


def test_how_long_functions_take_is_remembered_of_the_latest_ones() -> None:
    board = Board()
    board.pace(b"often").learn(1, 2.0)
    for number in range(PACES_MAX * 2):
        board.pace(str(number).encode())
        board.pace(b"often")
    assert board.pace(b"often").call_s == 2.0
    board.pace(b"0").learn(1, 1.0)
    for number in range(PACES_MAX):
        board.pace(f"other {number}".encode())
    assert board.pace(b"0").call_s is None


def test_news_of_other_jobs_wake_nobody() -> None:
    board = Board()
    job = sent(board, [future(board)])
    board.wait_news()
    board.changed(JobId("another"))
    board.changed(None)
    board.changed(job.id)
    assert board.wait_news() == ([job], [])


def test_nothing_new_is_taken_after_shutdown_or_a_breakdown() -> None:
    board = Board()
    board.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        board.add([future(board)])
    broken = Board()
    a, b, c = (future(broken) for _ in range(3))
    sent(broken, [a])
    broken.add([b])
    broken.take()
    broken.add([c])
    error = OSError("the disk")
    broken.break_down(error)
    assert [each.exception(0) for each in (a, b, c)] == [error] * 3
    with pytest.raises(RuntimeError, match="broken"):
        broken.add([future(broken)])
    assert broken.wait_news() is None and broken.take() == []


def test_cancelling_all_calls_of_a_task_one_by_one_takes_no_longer_for_each() -> None:
    board = Board()
    calls = [future(board) for _ in range(20_000)]
    job = sent(board, calls)
    began_s = time.process_time()
    for call in calls:
        call.cancel()
    assert time.process_time() - began_s < 2, "each looks at all others"
    assert board.wait_news() == ([job], [job.tasks[0]])


def test_a_task_that_was_cancelled_before_it_was_sent_is_told_of_once() -> None:
    board = Board()
    a = future(board)
    board.add([a])
    taken = board.take()
    a.cancel()
    job = SentJob(JobId("job"), [SentTask(taken, 0)])
    board.sending(job)
    board.agreed(job)
    assert board.wait_news() == ([job], [job.tasks[0]])
    board.changed(job.id)
    assert board.wait_news() == ([job], [])


def test_a_cancelled_task_whose_job_could_not_be_sent_is_forgotten() -> None:
    board = Board()
    a, b = future(board), future(board)
    lost, other = SentJob(JobId("lost"), [SentTask([a], 0)]), SentJob(JobId("other"), [SentTask([b], 0)])
    for job in (lost, other):
        board.sending(job)
    a.cancel()
    board.settled(lost.tasks[0], [])
    board.agreed(other)
    assert board.wait_news() == ([other], [])
    assert not board._unwanted
