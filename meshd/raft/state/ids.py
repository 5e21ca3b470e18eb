"""Which submissions were seen: ids are remembered until their own date is over an hour old (protocol.md 7).

An id is a UUIDv7, whose first 48 bits are the milliseconds of its making. Ids dated
outside [wall - 1 h, wall + 5 min] are refused, so whatever could still be accepted is
still remembered: a resend never runs twice, and the memory is bounded.
"""

from __future__ import annotations

import re
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from heapq import heappop, heappush, merge

from meshd.errors import Busy, InvalidRequest
from meshd.model import JobId

PAST_MS = 3_600_000
FUTURE_MS = 300_000

IDS_MAX = 1_000_000
"""About 16 MB at every voter; 278 submissions a second, for ever."""
RUN_IDS = 8192
"""Putting so many in order takes 3 ms."""
ID_BYTES = 16
NEVER_MS = 1 << 62
_LOW = (1 << 64) - 1

_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def number_of(job: JobId) -> int:
    """The id as a number; numbers sort by date. Raises InvalidRequest unless it is a canonical UUIDv7."""
    if not _UUID7.fullmatch(job):
        raise InvalidRequest(
            f"{job[:64]!r} is not a UUIDv7 in lower case", hint="leave the id out: one is made for you"
        )
    return int(job.replace("-", ""), 16)


def date_ms_of(number: int) -> int:
    return number >> 80


class _Run:
    """Ids in order, halved into two arrays: 16 bytes each instead of a hundred."""

    __slots__ = ("_high", "_low", "_start", "newest", "upto")

    def __init__(self, high: array[int], low: array[int], upto: int = 0) -> None:
        self._high, self._low = high, low
        self._start = 0
        self.newest = high[-1]
        self.upto = max(self.newest, upto)
        """The newest of this run and of all before it."""

    def __len__(self) -> int:
        return len(self._high) - self._start

    def __contains__(self, number: int) -> bool:
        high, low = number >> 64, number & _LOW
        start = bisect_left(self._high, high, self._start)
        stop = bisect_right(self._high, high, start)
        at = bisect_left(self._low, low, start, stop)
        return at < stop and self._low[at] == low

    def __iter__(self) -> Iterator[int]:
        return (self._high[at] << 64 | self._low[at] for at in range(self._start, len(self._high)))

    @property
    def oldest_ms(self) -> int:
        return self._high[self._start] >> 16

    def forget_before(self, date_ms: int) -> int | None:
        """The newest date that was forgotten."""
        stop = bisect_left(self._high, date_ms << 16, self._start)
        newest = None if stop == self._start else self._high[stop - 1] >> 16
        self._start = stop
        return newest

    def copy(self) -> _Run:
        """The arrays are never changed, so they are shared."""
        made = _Run(self._high, self._low)
        made._start = self._start
        return made


Captured = tuple[list[int], list[_Run]]


class SeenIds:
    """The latest ones in a set; each time there are RUN_IDS of them they become a run, which is a sixth as large."""

    def __init__(self, ids_max: int = IDS_MAX) -> None:
        self._ids_max = ids_max
        self._seen: set[int] = set()  # asked, never iterated
        self._oldest: list[int] = []
        """The same as a heap."""
        self._runs: list[_Run] = []
        self._in_runs = 0
        self._runs_oldest_ms = NEVER_MS
        self.forgotten_ms = 0
        """The newest date of an id that was forgotten: when the clock is set back, none up to here comes in again."""

    def __len__(self) -> int:
        return len(self._oldest) + self._in_runs

    def __contains__(self, number: int) -> bool:
        if number in self._seen:
            return True
        high = number >> 64
        for run in reversed(self._runs):
            if run.upto < high:
                return False
            if run.newest >= high and number in run:
                return True
        return False

    def check(self, number: int, wall_ms: int) -> None:
        """May this new id be accepted now? Raises InvalidRequest outside the window, Busy when the memory is full."""
        date_ms = date_ms_of(number)
        off_ms = date_ms - wall_ms
        if not -PAST_MS <= off_ms <= FUTURE_MS:
            side = "ahead of" if off_ms > 0 else "behind"
            raise InvalidRequest(
                f"the id is dated {abs(off_ms) // 1000} s {side} the mesh's clock: too old to resend, or your clock is off",
                hint="see `mesh job show ID`; else set the clock that is wrong (`date` here, `mesh cluster status` there), "
                "and submit with a new id",
            )
        if date_ms <= self.forgotten_ms:
            raise InvalidRequest(
                "the id is from before the mesh's clock was set back, and may have been submitted then",
                hint="see `mesh job show ID`, or submit with a new id",
            )
        if len(self) >= self._ids_max:
            raise Busy(
                f"{self._ids_max} jobs were submitted within the last hour", hint="submit arrays instead of single jobs"
            )

    def remember(self, number: int) -> None:
        self._seen.add(number)
        heappush(self._oldest, number)
        if len(self._oldest) >= RUN_IDS:
            numbers = sorted(self._oldest)
            self._add_run(array("Q", [each >> 64 for each in numbers]), array("Q", [each & _LOW for each in numbers]))
            self._seen, self._oldest = set(), []

    def forget_before(self, wall_ms: int) -> None:
        """Forget what is too old to be accepted again."""
        date_ms = wall_ms - PAST_MS
        while self._oldest and date_ms_of(self._oldest[0]) < date_ms:
            number = heappop(self._oldest)
            self._seen.discard(number)
            self.forgotten_ms = max(self.forgotten_ms, date_ms_of(number))
        if self._runs_oldest_ms < date_ms:
            for run in self._runs:
                self._in_runs -= len(run)
                self.forgotten_ms = max(self.forgotten_ms, run.forget_before(date_ms) or 0)
                self._in_runs += len(run)
            self._runs = [run for run in self._runs if len(run)]
            self._runs_oldest_ms = min((run.oldest_ms for run in self._runs), default=NEVER_MS)

    def _add_run(self, high: array[int], low: array[int]) -> None:
        run = _Run(high, low, self._runs[-1].upto if self._runs else 0)
        self._runs.append(run)
        self._in_runs += len(run)
        self._runs_oldest_ms = min(self._runs_oldest_ms, run.oldest_ms)

    def take_apart(self) -> None:
        """Free the ids, of which few are objects of their own."""
        self._oldest.clear()
        self._seen.clear()
        self._runs.clear()

    def captured(self) -> Captured:
        return self._oldest.copy(), [run.copy() for run in self._runs]

    def restore(self, data: bytes, forgotten_ms: int) -> None:
        """Raises ValueError when these are no ids."""
        if len(data) % ID_BYTES:
            raise ValueError(f"{len(data)} bytes are no ids")
        self.__init__(self._ids_max)  # type: ignore[misc]
        self.forgotten_ms = forgotten_ms
        for start in range(0, len(data), RUN_IDS * ID_BYTES):
            halves = array("Q", data[start : start + RUN_IDS * ID_BYTES])
            if sys.byteorder == "little":
                halves.byteswap()
            self._add_run(halves[::2], halves[1::2])


def packed(captured: Captured) -> bytes:
    """The bytes of what `captured` gave; sorted, so that equal memories are equal bytes."""
    latest, runs = captured
    data = bytearray()
    for number in merge(sorted(latest), *runs):
        data += number.to_bytes(ID_BYTES, "big")
    return bytes(data)
