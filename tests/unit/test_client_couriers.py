"""What the threads of an executor make of a mesh that refuses them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from meshd.client import Client, MeshExecutor
from meshd.client.board import Board, MeshFuture
from meshd.client.couriers import Watcher
from meshd.errors import NotAllowed
from meshd.views import EventView


class Revoked(Client):
    """Of a token that was good until now."""

    def events(self, after: int | None = None) -> Iterator[EventView]:
        raise NotAllowed("this token was revoked")


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
