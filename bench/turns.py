"""How long a trio loop is away from its sockets and timers, and which task kept it.

A turn is what happens between two polls of the operating system: every task that was ready takes one step. While it
lasts no heartbeat is read or sent. Its CPU time is told beside: on a busy machine a turn is also long because
another process has the core.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import trio

PULSE_S = 0.005


@dataclass(frozen=True, slots=True)
class Longest:
    turn_ms: float
    turn_cpu_ms: float
    """Of the loop's own thread in the turn that took most of it: independent of who else uses the machine."""
    late_ms: float
    """Beyond its timeout in a poll: another thread holds the interpreter, or another process the core."""
    step: str
    """The task with the longest single step, and its milliseconds of CPU time; empty when steps are not watched."""


class Turns(trio.abc.Instrument):
    """Add it to a loop, with `pulse` as a task, and ask `taken` now and then."""

    def __init__(self) -> None:
        self._clear()
        self.is_pulsing = True
        self._began = self._began_cpu = self._poll_began = self._poll_timeout = self._step_began = 0.0

    def _clear(self) -> None:
        self._turn = self._turn_cpu = self._late = self._step = 0.0
        self._step_of = ""

    def taken(self) -> Longest:
        """The longest since this was last asked."""
        step = f"{self._step_of}, {self._step * 1e3:.1f} ms" if self._step_of else ""
        longest = Longest(self._turn * 1e3, self._turn_cpu * 1e3, self._late * 1e3, step)
        self._clear()
        return longest

    async def pulse(self) -> None:
        """So that every poll has a timeout that can be missed."""
        while self.is_pulsing:  # noqa: ASYNC110 - nothing is waited for
            await trio.sleep(PULSE_S)

    def before_io_wait(self, timeout: float) -> None:
        now, cpu = time.perf_counter(), time.thread_time()
        if self._began:
            self._turn = max(self._turn, now - self._began)
            self._turn_cpu = max(self._turn_cpu, cpu - self._began_cpu)
        self._poll_began, self._poll_timeout = now, timeout

    def after_io_wait(self, timeout: float) -> None:
        self._began, self._began_cpu = time.perf_counter(), time.thread_time()
        if self._poll_began:
            self._late = max(self._late, self._began - self._poll_began - self._poll_timeout)


class Steps(Turns):
    """Turns whose single steps are watched too: half a microsecond more for each."""

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._step_began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        took = time.thread_time() - self._step_began
        if took > self._step:
            self._step, self._step_of = took, task.name.removeprefix("meshd.")
