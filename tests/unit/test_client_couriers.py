"""What the threads of an executor make of a mesh that refuses them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import IO

import pytest

from meshd.client import Client, MeshExecutor, calls, pickles
from meshd.client.board import Board, MeshFuture, SentJob, SentTask
from meshd.client.couriers import Gatherer, Watcher
from meshd.errors import Corrupt, NotAllowed
from meshd.model import BlobRef, EndReason, JobId, NodeId, Outcome, TaskState
from meshd.views import EventView, Explanation, Lack, TaskView


class Revoked(Client):
    """Of a token that was good until now."""

    def events(self, after: int | None = None) -> Iterator[EventView]:
        raise NotAllowed("this token was revoked")


class Standing(Client):
    """Of a mesh where each task is in the state that is written here; it changes with each look."""

    def __init__(self, looks: list[list[TaskState]]) -> None:
        super().__init__(["unix:/nowhere"])
        self.looks = looks
        self.state = TaskState.READY
        self.can_ever_run = False

    def explain(self, job: str, task: int = 0) -> Explanation:
        lacks = Lack(NodeId("n"), "small", ("100 cores (has 2)",), is_permanent=True)
        summary = "cannot run: no node has what it needs"
        return Explanation(JobId(job), task, self.state, summary, (lacks,), self.can_ever_run)

    def tasks(
        self, job: str, *, states: Sequence[TaskState | str] = (), start: int = 0, stop: int | None = None
    ) -> Iterator[TaskView]:
        for number, state in enumerate(self.looks.pop(0)):
            if state in states:
                yield TaskView(JobId(job), number, state, 1, 1, 0, 1, None, None)


def standing(board: Board, client: Standing) -> tuple[Gatherer, SentJob, list[MeshFuture[int]]]:
    """A gatherer, and a job with a call in each of its tasks."""
    calls: list[MeshFuture[int]] = [MeshFuture(board, b"f", b"x", 0) for _ in client.looks[0]]
    board.add(calls)
    board.take()
    job = SentJob(JobId("job"), [SentTask([call], 0) for call in calls])
    board.sending(job)
    board.agreed(job)
    return Gatherer(board, client, Watcher(board, client)), job, calls


def test_a_future_runs_while_the_mesh_says_so_and_can_still_be_cancelled() -> None:
    ready, runs = TaskState.READY, TaskState.RUNNING
    gatherer, job, (a, b) = standing(Board(), Standing([[ready, runs], [runs, runs], [runs, ready]]))
    found = []
    for _ in range(3):
        gatherer.look(job)
        found.append((a.running(), b.running()))
    assert found == [(False, True), (True, True), (True, False)], "the second's node was lost"
    assert a.cancel() and not a.running()


def test_that_no_node_can_run_a_call_is_warned_of_once_and_the_call_goes_on_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ready = TaskState.READY
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    gatherer, job, (call,) = standing(Board(), Standing([[ready]] * 4))
    gatherer.look(job)
    assert not caplog.records, "a node that is about to join has had no time"
    for _ in range(3):
        now_s += 10
        gatherer.look(job)
    (told,) = caplog.records
    assert told.name == "meshd.client"
    assert "cannot run: no node has what it needs\n  small: 100 cores (has 2)" in told.getMessage()
    assert not call.done()


def test_a_call_that_waits_for_its_turn_is_not_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("meshd.client.couriers.UNPLACED_S", 0)
    client = Standing([[TaskState.READY], [TaskState.LEASED]])
    gatherer, job, _ = standing(Board(), client)
    client.can_ever_run = True
    gatherer.look(job)
    client.can_ever_run, client.state = False, TaskState.LEASED
    gatherer.look(job)
    assert not caplog.records


def test_what_a_thread_dies_of_is_told_to_callers_and_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    board = Board()
    call: MeshFuture[int] = MeshFuture(board, b"f", b"x", 0)
    board.add([call])
    watcher = Watcher(board, Revoked(["unix:/nowhere"]))
    watcher.start()
    watcher.join(10)
    error = call.exception(0)
    assert isinstance(error, NotAllowed)
    with pytest.raises(RuntimeError, match="NotAllowed: this token was revoked") as refused:
        board.add([call])
    assert refused.value.__cause__ is error and not printed


class Damaged(Client):
    """Of a mesh whose first answer about a result is that its bytes are damaged."""

    damaged = 1

    def tasks(
        self, job: str, *, states: Sequence[TaskState | str] = (), start: int = 0, stop: int | None = None
    ) -> Iterator[TaskView]:
        outcome = Outcome(EndReason.EXIT, 0, stdout=BlobRef(job, 1))
        yield TaskView(JobId(job), 0, TaskState.DONE, 1, 1, 0, 1, None, outcome)

    def get_blob(self, blob: str, target: IO[bytes]) -> int:
        if self.damaged:
            self.damaged -= 1
            raise Corrupt(f"blob {blob} is not what was written")
        result = calls.record(calls.RESULT, pickles.dump_result(blob, len))
        return target.write(calls.record(calls.BEGIN, b"") + result + calls.end_record(0.1))


def test_one_result_that_cannot_be_had_now_ends_no_other_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshd.client.board.SWEEP_YOUNG_S", 0.05)
    board = Board()
    futures: list[MeshFuture[str]] = [MeshFuture(board, b"f", b"x", 0) for _ in range(2)]
    board.add(futures)
    board.take()
    for name, call in zip(("first", "second"), futures, strict=True):
        job = SentJob(JobId(name), [SentTask([call], 0)])
        board.sending(job)
        board.agreed(job)
    board.close()
    gatherer = Gatherer(board, Damaged(["unix:/nowhere"]), Watcher(board, Client(["unix:/nowhere"])))
    gatherer.start()
    assert [call.result(10) for call in futures] == ["first", "second"]
    assert board.take() == []
    gatherer.join(10)
    assert not gatherer.is_alive()


@pytest.mark.parametrize("token", ["", "none"])
def test_an_executor_without_a_good_token_is_refused_where_it_is_made(token: str) -> None:
    with pytest.raises(NotAllowed, match="token"):
        MeshExecutor(["127.0.0.1:1"], token=token)
