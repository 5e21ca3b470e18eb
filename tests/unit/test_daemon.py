"""What the agent's own task must not get wrong, apart from a whole agent."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import trio
import trio.testing

from meshd.daemon import _Daemon
from meshd.home import Counters


async def test_no_epoch_is_used_before_it_is_on_the_disk_nor_an_older_one_written_over_it() -> None:
    may_write, written = threading.Event(), []

    def write_counters(counters: Counters) -> None:
        if counters.epoch == 5:
            assert may_write.wait(10)
        written.append(counters.epoch)

    daemon = object.__new__(_Daemon)
    daemon.counters, daemon.saving = Counters(2, 4), trio.Lock()
    daemon.home = SimpleNamespace(write_counters=write_counters)  # type: ignore[assignment]
    used: list[tuple[int, list[int]]] = []

    async def open_session(epoch: int) -> None:
        await daemon._save_epoch(epoch)
        used.append((epoch, written.copy()))

    async with trio.open_nursery() as nursery:
        for epoch in (5, 5, 6):
            nursery.start_soon(open_session, epoch)
            await trio.testing.wait_all_tasks_blocked(0.01)
        may_write.set()
    assert written == [5, 6] and all(epoch in on_disk for epoch, on_disk in used), used
