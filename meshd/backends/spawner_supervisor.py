"""Keeps one spawner: it starts when it is first needed, again when it has died, and ends after a while without work.

What is asked while there is none waits here; what had not begun when one died runs in the next.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import structlog
import trio

from meshd.backends import spawners
from meshd.backends.limits import TOO_LARGE
from meshd.backends.spawners import Lane, Spawner
from meshd.errors import TooLarge
from meshd.model import EndReason, Outcome
from meshd.ports import Execution, Finished, Plan, Planned

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Spawning:
    """What all spawners of a backend have in common."""

    scratch: Path
    """Absolute; each spawner has a directory of its own in it."""
    term_grace_s: float
    lock: int | None
    """Every spawner inherits it (leftovers.py)."""
    remove: Callable[[str], None]
    """What commands left in this directory; must not wait."""


class Start(NamedTuple):
    """What `start` was asked for, while there is no spawner."""

    lane: int
    plan: Plan
    attempts: list[Planned]
    ended: Callable[[Sequence[Finished]], None]


class Supervisor:
    def __init__(self, token: str, spawning: Spawning, nursery: trio.Nursery) -> None:
        """Processes that outlived a killed spawner are known by its token."""
        self._token = token
        self._spawning = spawning
        self._nursery = nursery
        self._spawner: Spawner | None = None
        self._starting = trio.Lock()
        self._pending: list[Start] = []
        self._singles = 0
        self._is_ending = False

    @property
    def load(self) -> int:
        """More or less how many commands run, one for each lane."""
        lanes = 0 if self._spawner is None else len(self._spawner.lanes)
        return self._singles + lanes + len(self._pending)

    def has_lane(self, number: int) -> bool:
        if self._spawner is not None and number in self._spawner.lanes:
            return True
        return any(start.lane == number for start in self._pending)

    async def run(self, execution: Execution) -> Outcome:
        self._singles += 1
        try:
            spawner = await self._live_spawner()
            return await spawner.run(execution, self._spawning.term_grace_s)
        except OSError as error:
            return Outcome(EndReason.BACKEND, message=f"the spawner cannot be started: {error}")
        except TooLarge:
            return TOO_LARGE
        finally:
            self._singles -= 1

    def start(self, start: Start) -> None:
        if self._spawner is not None and not self._spawner.is_ending and not self._pending:
            self._give(self._spawner, start)
        else:
            self._pend(start, len(self._pending))

    def _pend(self, start: Start, place: int) -> None:
        if not self._pending:
            self._nursery.start_soon(self._give_pending)
        self._pending.insert(place, start)

    def stop(self, fence: int) -> bool:
        """Whether it runs or waits here."""
        for start in self._pending:
            for attempt in start.attempts:
                if attempt.key.fence == fence:
                    start.attempts.remove(attempt)
                    stopped = Outcome(EndReason.CANCELLED, message="stopped before it started")
                    self._nursery.start_soon(tell, start._replace(attempts=[attempt]), stopped)
                    return True
        if self._spawner is None or (number := self._spawner.find(fence)) is None:
            return False
        self._spawner.stop(number, self._spawning.term_grace_s)
        return True

    async def recall(self, fences: Collection[int]) -> list[int]:
        back: list[int] = []
        for start in self._pending:
            back += [each.key.fence for each in start.attempts if each.key.fence in fences]
            start.attempts[:] = [each for each in start.attempts if each.key.fence not in fences]
        if (spawner := self._spawner) is not None:
            numbers = [
                number
                for lane in spawner.lanes.values()
                for number, each in lane.given.items()
                if each.key.fence in fences
            ]
            if numbers:
                back += [each.key.fence for each in await spawner.give_back(numbers)]
        return back

    async def read_output(self, fence: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        if self._spawner is None or (number := self._spawner.find(fence)) is None:
            return None
        return await self._spawner.read_output(number, stream, offset, bytes_max)

    # --- its spawner -------------------------------------------------------------------------------------------------

    async def tend(self, idle_s: float) -> None:
        """End a spawner that had nothing to do for so long, or says nothing. To be called now and then."""
        now_s = trio.current_time()
        async with self._starting:
            spawner = self._spawner
            if spawner is not None and spawner.is_idle and spawner.used_at_s <= now_s - idle_s:
                self._spawner = None
                await spawner.end()
        spawner = self._spawner
        before_s = now_s - self._spawning.term_grace_s - spawners.LATE_S
        if spawner is not None and not spawner.is_ending and spawner.silent_since(before_s):
            log.warning("process.spawner_silent", pid=spawner.child.pid)
            await spawner.end(is_now=True)

    async def end(self) -> None:
        """Nothing of it runs when this returns."""
        self._is_ending = True
        if self._spawner is not None:
            await self._spawner.end()
        for start in self._pending:
            await tell(start, _stopping())
        self._pending.clear()

    async def _live_spawner(self) -> Spawner:
        """Raises OSError."""
        if self._spawner is not None and not self._spawner.is_ending:
            return self._spawner
        async with self._starting:
            if self._spawner is not None and self._spawner.is_ending:
                # What is left of it dies by its mark, and the commands of the next carry the same.
                await self._spawner.buried.wait()
                self._spawner = None
            if self._spawner is None:
                common = self._spawning
                # Never a former one's name: what that left may not be removed yet.
                scratch = str(common.scratch / secrets.token_hex(8))
                self._spawner = await Spawner.start(
                    self._token, common.term_grace_s, scratch, common.lock, self._nursery, self
                )
            return self._spawner

    async def _give_pending(self) -> None:
        try:
            spawner = await self._live_spawner()
        except OSError as error:
            pending, self._pending = self._pending, []
            for start in pending:
                await tell(start, Outcome(EndReason.BACKEND, message=f"the spawner cannot be started: {error}"[:2048]))
            return
        pending, self._pending = self._pending, []
        for start in pending:
            if start.attempts:
                self._give(spawner, start)

    def _give(self, spawner: Spawner, start: Start) -> None:
        if too_large := spawner.give(start.lane, start.plan, start.attempts, start.ended):
            self._nursery.start_soon(tell, start._replace(attempts=too_large), TOO_LARGE)

    # --- what it tells its supervisor --------------------------------------------------------------------------------

    def remove(self, directory: str) -> None:
        self._spawning.remove(directory)

    def run_elsewhere(self, lane: Lane, attempts: Sequence[Planned]) -> None:
        if self._is_ending:
            lane.ended([Finished(each.key, _stopping()) for each in attempts])
            return
        log.info("process.run_elsewhere", job=lane.plan.job, attempts=len(attempts))
        # Before what the lane has been given since.
        self._pend(Start(lane.number, lane.plan, list(attempts), lane.ended), 0)


async def tell(start: Start, outcome: Outcome) -> None:
    """Of all its attempts. Async, so that it can be told later."""
    if start.attempts:
        start.ended([Finished(each.key, outcome) for each in start.attempts])


def _stopping() -> Outcome:
    return Outcome(EndReason.BACKEND, message="the process backend is stopping")
