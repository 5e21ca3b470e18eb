"""The one thread that does what a turn has for the disk, so that nothing there holds up the loop, nor a crowd of other threads a heartbeat.

A turn is short and its two hand-overs are most of it: through trio's own threads they took a task step, a pass
of the loop and 40 us of its CPU more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

import trio

Work = Callable[[], None]


class DiskThread:
    def __init__(self) -> None:
        self._orders: SimpleQueue[Work | None] = SimpleQueue()
        self._done = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._failure: BaseException | None = None
        # A disk may hang for ever; the process shall be able to end.
        Thread(target=self._work, name="raft-disk", daemon=True).start()

    async def do(self, work: Work) -> None:
        """One at a time. Raises what `work` raises; not to be cancelled while that runs."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._orders.put(work)
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(self._done)
        os.eventfd_read(self._done)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Nothing is being done."""
        self._orders.put(None)
        os.close(self._done)

    def _work(self) -> None:
        while (work := self._orders.get()) is not None:
            try:
                work()
            except BaseException as error:
                self._failure = error
            os.eventfd_write(self._done, 1)
