"""A turn's work on the disk: done elsewhere, one at a time, and never half waited for."""

from __future__ import annotations

import threading

import pytest
import trio

from meshd.errors import Corrupt
from meshd.raft.disk_thread import DiskThread


async def test_what_the_work_raises_is_raised_here_and_the_next_is_done() -> None:
    disk, done = DiskThread(), []

    def fail() -> None:
        raise Corrupt("the disk is broken")

    with pytest.raises(Corrupt, match="broken"):
        await disk.do(fail)
    await disk.do(lambda: done.append(threading.current_thread().name))

    assert done == ["raft-disk"]
    disk.close()


async def test_a_turn_that_is_cancelled_waits_for_its_disk() -> None:
    disk, may_end, did_end = DiskThread(), threading.Event(), []

    def work() -> None:
        may_end.wait(5)
        did_end.append(True)

    async def let_go() -> None:
        await trio.lowlevel.checkpoint()
        scope.cancel()
        threading.Timer(0.2, may_end.set).start()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(let_go)
        with trio.CancelScope() as scope:
            await disk.do(work)
        assert did_end == [True], "the journal belongs to the thread until it is done"

    disk.close()
