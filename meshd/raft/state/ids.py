"""Which submissions were seen: ids are remembered until their own date is over an hour old (protocol.md 7).

An id is a UUIDv7, whose first 48 bits are the milliseconds of its making. Ids dated
outside [wall - 1 h, wall + 5 min] are refused, so whatever could still be accepted is
still remembered: a resend never runs twice, and the memory is bounded.
"""

from __future__ import annotations

import re
from heapq import heapify, heappop, heappush

from meshd.errors import Busy, InvalidRequest
from meshd.model import JobId

PAST_MS = 3_600_000
FUTURE_MS = 300_000

IDS_MAX = 1_000_000
"""About 100 MB at every voter; 278 submissions a second, for ever."""

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


class SeenIds:
    def __init__(self, ids_max: int = IDS_MAX) -> None:
        self._ids_max = ids_max
        self._seen: set[int] = set()  # asked, never iterated
        self._oldest: list[int] = []
        self.forgotten_ms = 0
        """The newest date of an id that was forgotten: when the clock is set back, none up to here comes in again."""

    def __len__(self) -> int:
        return len(self._oldest)

    def __contains__(self, number: int) -> bool:
        return number in self._seen

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
        if len(self._oldest) >= self._ids_max:
            raise Busy(
                f"{self._ids_max} jobs were submitted within the last hour", hint="submit arrays instead of single jobs"
            )

    def remember(self, number: int) -> None:
        self._seen.add(number)
        heappush(self._oldest, number)

    def forget_before(self, wall_ms: int) -> None:
        """Forget what is too old to be accepted again."""
        while self._oldest and date_ms_of(self._oldest[0]) < wall_ms - PAST_MS:
            number = heappop(self._oldest)
            self._seen.discard(number)
            self.forgotten_ms = max(self.forgotten_ms, date_ms_of(number))

    def take_apart(self) -> None:
        """Free the ids one after the other: a million at once take a while."""
        self._oldest.clear()
        while self._seen:
            self._seen.pop()

    def captured(self) -> list[int]:
        return self._oldest.copy()

    def restore(self, data: bytes, forgotten_ms: int) -> None:
        self.forgotten_ms = forgotten_ms
        self._oldest = [int.from_bytes(data[i : i + 16], "big") for i in range(0, len(data), 16)]
        heapify(self._oldest)
        self._seen = set(self._oldest)


def packed(captured: list[int]) -> bytes:
    """The bytes of what `captured` gave; sorted, so that equal memories are equal bytes."""
    return b"".join(number.to_bytes(16, "big") for number in sorted(captured))
