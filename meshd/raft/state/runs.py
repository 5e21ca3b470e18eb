"""Leases of one job that differ only in number: neighbouring tasks with neighbouring fences, leased to one session at once.

A task's first lease is a part of a run, not a row: a thousand of them are five numbers. It stays so while nothing
more can be said of it. What ends well and bare is cut out; for everything else (it runs, is stopped, is lost, ends
with something to tell) the task gets a row of its own, by `Queue.lay_out`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

from msgspec import Struct
from msgspec.structs import replace

from meshd.model import AttemptRun, JobId, NodeId

_start = attrgetter("start")
_stop = attrgetter("stop")


class Run(Struct, frozen=True, array_like=True, gc=False):
    """Tasks [start, stop), in their first attempt; the first one's fence is `fence`."""

    start: int
    stop: int
    fence: int
    node: NodeId
    epoch: int
    is_ahead: bool = False
    """Beyond what the node has room for: these wait there, and take nothing of its resources."""

    def __len__(self) -> int:
        return self.stop - self.start

    def fence_of(self, task: int) -> int:
        return self.fence + task - self.start

    def within(self, start: int, stop: int) -> Run:
        """The part of it that lies in [start, stop), which must not be empty."""
        start, stop = max(start, self.start), min(stop, self.stop)
        return replace(self, start=start, stop=stop, fence=self.fence_of(start))

    def attempts(self, job: JobId) -> AttemptRun:
        return AttemptRun(job, self.start, 1, self.fence, len(self))


TUPLE_RUNS_MAX = 16
"""Few runs are a tuple, which the garbage collector need not look at; many, of a job at hundreds of nodes, a list."""


class Runs(Struct, eq=False, gc=False):
    """Disjoint runs in the order of their tasks: what one node holds of a job is nearly always in a few pieces."""

    _runs: Sequence[Run] = ()

    @classmethod
    def of(cls, runs: Iterable[Run]) -> Runs:
        return cls(tuple(sorted(runs, key=_start)))

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __bool__(self) -> bool:
        return bool(self._runs)

    def find(self, task: int) -> Run | None:
        """The run that the task is in."""
        runs = self._runs
        at = bisect_right(runs, task, key=_start) - 1
        return runs[at] if at >= 0 and task < runs[at].stop else None

    def within(self, start: int, stop: int) -> Iterator[Run]:
        """What of [start, stop) is in runs, in order and no sooner than it is asked for: they must not change meanwhile."""
        runs = self._runs
        low, high = bisect_right(runs, start, key=_stop), bisect_left(runs, stop, key=_start)
        return (runs[at].within(start, stop) for at in range(low, high))

    def add(self, run: Run) -> None:
        self._replace(bisect_left(self._runs, run.start, key=_start), 0, [run])

    def cut(self, run: Run, start: int, stop: int) -> None:
        """Take [start, stop) out of the run that it lies in."""
        at = bisect_left(self._runs, run.start, key=_start)
        rest = []
        if run.start < start:
            rest.append(run.within(run.start, start))
        if stop < run.stop:
            rest.append(run.within(stop, run.stop))
        self._replace(at, 1, rest)

    def packed(self) -> tuple[Run, ...]:
        return tuple(self._runs)

    def _replace(self, at: int, count: int, by: list[Run]) -> None:
        runs = self._runs if isinstance(self._runs, list) else list(self._runs)
        runs[at : at + count] = by
        self._runs = runs if len(runs) > TUPLE_RUNS_MAX else tuple(runs)
