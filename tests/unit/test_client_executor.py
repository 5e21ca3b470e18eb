"""What becomes of the calls of a map whose results nobody takes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from meshd.client.board import Board, MeshFuture
from meshd.client.executor import Results


def submitted(board: Board, count: int) -> list[MeshFuture[int]]:
    calls: list[MeshFuture[int]] = [MeshFuture(board, b"f", b"x", 0) for _ in range(count)]
    board.add(calls)
    return calls


def test_a_map_that_is_closed_or_dropped_cancels_the_calls_whose_results_were_not_taken() -> None:
    board = Board()
    a, b, c = submitted(board, 3)
    results = Results([a, b, c], None)
    results.close()
    assert list(results) == [] and a.cancelled() and b.cancelled() and c.cancelled(), "closed before it was begun"

    a, b, c = submitted(board, 3)
    results = Results([a, b, c], None)
    board.resolve(a, 1, None)
    assert next(results) == 1
    del results
    assert not a.cancelled() and b.cancelled() and c.cancelled()


def test_a_map_whose_results_nobody_looks_at_is_for_its_effects() -> None:
    board = Board()
    calls = submitted(board, 2)
    Results(calls, None)
    assert not any(call.cancelled() for call in calls)


def test_a_map_that_raises_cancels_what_is_left() -> None:
    board = Board()
    a, b, c = submitted(board, 3)
    board.resolve(a, None, LookupError())
    with pytest.raises(LookupError):
        next(Results([a, b, c], None))
    assert b.cancelled() and c.cancelled()

    a, b, c = submitted(board, 3)
    late = Results([a, b, c], monotonic())
    with pytest.raises(TimeoutError):
        next(late)
    assert a.cancelled() and b.cancelled() and c.cancelled()


def test_the_collector_may_find_a_dropped_map_at_any_time() -> None:
    board = Board()
    a, b = submitted(board, 2)
    results = Results([a, b], None)
    board.resolve(a, 1, None)
    assert next(results) == 1
    cycle: list[object] = [results]
    cycle.append(cycle)
    del cycle, results

    def collected() -> Iterator[MeshFuture[int]]:
        gc.collect()
        yield MeshFuture(board, b"f", b"x", 0)

    thread = threading.Thread(target=board.add, args=(collected(),), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and b.cancelled()
