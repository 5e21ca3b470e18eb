"""Sets of task numbers as sorted, disjoint, half-open ranges: a million waiting tasks are two integers.

The bounds lie in one flat sequence `start, stop, start, stop, …`. A number is in the
set when an odd number of bounds is at or below it, which makes membership, adding
and removing one bisection and one slice each. Few bounds are a tuple, many an array:
an array can be cut without copying it, but the garbage collector looks at every one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

TUPLE_BOUNDS_MAX = 16
"""Nearly all jobs have fewer: one range of waiting tasks, one of done ones."""


class Ranges(Struct, eq=False, gc=False):
    """A mutable set of non-negative integers. `len` is its size, iteration gives `(start, stop)` in order.

    A struct only so that the collector does not look at it: every live job has one.
    """

    _bounds: Sequence[int] = ()
    """A tuple up to TUPLE_BOUNDS_MAX, an array beyond."""
    _size: int = 0

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Ranges:
        made = cls()
        for start, stop in ranges:
            made.add(start, stop)
        return made

    def __len__(self) -> int:
        return self._size

    @property
    def range_count(self) -> int:
        return len(self._bounds) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        bounds = self._bounds
        return ((bounds[i], bounds[i + 1]) for i in range(0, len(bounds), 2))

    def __contains__(self, number: int) -> bool:
        return bool(bisect_right(self._bounds, number) & 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self.packed() == other.packed()

    __hash__ = None  # type: ignore[assignment]

    def first(self) -> int:
        """The smallest number. The set must not be empty."""
        return self._bounds[0]

    def bound_after(self, number: int) -> int | None:
        """Where the range that it is in stops, or the next one starts."""
        at = bisect_right(self._bounds, number)
        return self._bounds[at] if at < len(self._bounds) else None

    def add(self, start: int, stop: int) -> None:
        self._replace(start, stop, keeps=0)

    def remove(self, start: int, stop: int) -> None:
        self._replace(start, stop, keeps=1)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """What of [start, stop) is in the set, in order and no sooner than it is asked for: it must not change meanwhile."""
        bounds = self._bounds
        i = bisect_right(bounds, start) - 1
        i = max(i - (i & 1), 0)  # to the start of a range, also when `start` lies in a gap
        while i < len(bounds) and bounds[i] < stop:
            low, high = max(bounds[i], start), min(bounds[i + 1], stop)
            if low < high:
                yield low, high
            i += 2

    def packed(self) -> bytes:
        """An immutable copy; `unpacked` reads it."""
        return array("q", self._bounds).tobytes()

    @classmethod
    def unpacked(cls, data: bytes) -> Ranges:
        bounds = array("q", data)
        return cls(_kept(bounds), sum(bounds[1::2]) - sum(bounds[::2]))

    def _replace(self, start: int, stop: int, *, keeps: int) -> None:
        """Cut [start, stop) out and put a bound where the parity `keeps` says that one is needed."""
        if start >= stop:
            return
        bounds = self._bounds
        low, high = bisect_left(bounds, start), bisect_right(bounds, stop)
        if low == high:  # no bound in between: all of it is in one range, or in one gap
            inside = stop - start if low & 1 else 0
        else:
            inside = sum([high - low for low, high in self.within(start, stop)])
        patch: tuple[int, ...] = ()
        if low & 1 == keeps:
            patch = (start,)
        if high & 1 == keeps:
            patch += (stop,)
        if isinstance(bounds, array):
            bounds[low:high] = array("q", patch)
            self._bounds = _kept(bounds)
        else:
            bounds = (*bounds[:low], *patch, *bounds[high:])
            self._bounds = bounds if len(bounds) <= TUPLE_BOUNDS_MAX else array("q", bounds)
        self._size += -inside if keeps else stop - start - inside


def _kept(bounds: array[int]) -> Sequence[int]:
    return bounds if len(bounds) > TUPLE_BOUNDS_MAX else tuple(bounds)
