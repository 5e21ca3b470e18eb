"""How long a trio loop is away from its sockets and timers, and which task kept it.

A turn is what happens between two polls of the operating system: every task that was ready takes one step. While it
lasts no heartbeat is read or sent. Three clocks tell it: the wall; the wall without the time in which the loop's
thread stood in line for a core, which other processes had; and the thread's own CPU time. What is between the last
two is a wait for the interpreter, held by another thread.
"""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass, fields

import trio

PULSE_S = 0.005


@dataclass(slots=True)
class Longest:
    """Each is the longest by itself, not all of one turn."""

    wall_ms: float = 0.0
    turn_ms: float = 0.0
    """The wall, less the wait for a core: what the turn would take on a machine with a core to spare."""
    cpu_ms: float = 0.0
    late_ms: float = 0.0
    """Beyond its timeout in a poll, less the wait for a core: another thread holds the interpreter."""
    collector_ms: float = 0.0
    """A pause for the garbage collector, wherever it struck."""
    step: str = ""
    """The task with the longest single step, when steps are watched."""
    step_ms: float = 0.0
    """CPU time of that step."""

    def keep(self, **figures: float) -> None:
        for name, value in figures.items():
            setattr(self, name, max(getattr(self, name), value))

    def with_(self, other: Longest) -> None:
        """The longer ones of both."""
        self.step = self.step if self.step_ms >= other.step_ms else other.step
        self.keep(**{it.name: getattr(other, it.name) for it in fields(self) if it.name != "step"})


class Turns(trio.abc.Instrument):
    """Add it to a loop, with `pulse` as a task, and ask `taken` now and then."""

    def __init__(self) -> None:
        self.is_pulsing = True
        self.count = 0
        """Of turns so far."""
        self._longest = Longest()
        self._stat: int | None = None
        self._began = self._began_cpu = self._began_queued = 0.0
        self._poll_began = self._poll_queued = self._step_began = self._collector_began = 0.0
        gc.callbacks.append(self._collects)

    def taken(self) -> Longest:
        """The longest since this was last asked."""
        longest, self._longest = self._longest, Longest()
        return longest

    async def pulse(self) -> None:
        """So that every poll has a timeout that can be missed."""
        while self.is_pulsing:  # noqa: ASYNC110 - nothing is waited for
            await trio.sleep(PULSE_S)

    def before_io_wait(self, timeout: float) -> None:
        now, cpu, queued = time.perf_counter(), time.thread_time(), self._queued()
        if self._began:
            wall = now - self._began
            self._longest.keep(
                wall_ms=wall * 1e3,
                turn_ms=(wall - (queued - self._began_queued)) * 1e3,
                cpu_ms=(cpu - self._began_cpu) * 1e3,
            )
        self._poll_began, self._poll_queued = now, queued

    def after_io_wait(self, timeout: float) -> None:
        self.count += 1
        self._began, self._began_cpu, self._began_queued = time.perf_counter(), time.thread_time(), self._queued()
        if self._poll_began:
            waited = self._began - self._poll_began - timeout
            self._longest.keep(late_ms=(waited - (self._began_queued - self._poll_queued)) * 1e3)

    def _queued(self) -> float:
        """Seconds for which this thread was ready and had no core."""
        if self._stat is None:
            self._stat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        return int(os.pread(self._stat, 64, 0).split()[1]) / 1e9

    def _collects(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._collector_began = time.thread_time()
        else:
            self._longest.keep(collector_ms=(time.thread_time() - self._collector_began) * 1e3)


class Steps(Turns):
    """Turns whose single steps are watched too: half a microsecond more for each."""

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._step_began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        step_ms = (time.thread_time() - self._step_began) * 1e3
        if step_ms > self._longest.step_ms:
            self._longest.step_ms, self._longest.step = step_ms, task.name.removeprefix("meshd.")
