"""What the threads of an executor make of a mesh that refuses them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from meshd.client import Client, MeshExecutor
from meshd.client.board import Board, MeshFuture, SentJob, SentTask
from meshd.client.couriers import Gatherer, Watcher
from meshd.errors import NotAllowed
from meshd.model import JobId, TaskState
from meshd.views import EventView, TaskView


class Revoked(Client):
    """Of a token that was good until now."""

    def events(self, after: int | None = None) -> Iterator[EventView]:
        raise NotAllowed("this token was revoked")


class Standing(Client):
    """Of a mesh where each task is in the state that is written here; it changes with each look."""

    def __init__(self, looks: list[list[TaskState]]) -> None:
        super().__init__(["unix:/nowhere"])
        self.looks = looks

    def tasks(
        self, job: str, *, states: Sequence[TaskState | str] = (), start: int = 0, stop: int | None = None
    ) -> Iterator[TaskView]:
        for number, state in enumerate(self.looks.pop(0)):
            if state in states:
                yield TaskView(JobId(job), number, state, 1, 1, 0, 1, None, None)


def standing(board: Board, looks: list[list[TaskState]]) -> tuple[Gatherer, SentJob, list[MeshFuture[int]]]:
    """A gatherer, and a job with a call in each of its tasks."""
    calls: list[MeshFuture[int]] = [MeshFuture(board, b"f", b"x", 0) for _ in looks[0]]
    board.add(calls)
    board.take()
    job = SentJob(JobId("job"), [SentTask([call], 0) for call in calls])
    board.sending(job)
    board.agreed(job)
    client = Standing(looks)
    return Gatherer(board, client, Watcher(board, client)), job, calls


def test_a_future_runs_while_the_mesh_says_so_and_can_still_be_cancelled() -> None:
    ready, runs = TaskState.READY, TaskState.RUNNING
    gatherer, job, (a, b) = standing(Board(), [[ready, runs], [runs, runs], [runs, ready]])
    found = []
    for _ in range(3):
        gatherer.look(job)
        found.append((a.running(), b.running()))
    assert found == [(False, True), (True, True), (True, False)], "the second's node was lost"
    assert a.cancel() and not a.running()


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


@pytest.mark.parametrize("token", ["", "none"])
def test_an_executor_without_a_good_token_is_refused_where_it_is_made(token: str) -> None:
    with pytest.raises(NotAllowed, match="token"):
        MeshExecutor(["127.0.0.1:1"], token=token)
