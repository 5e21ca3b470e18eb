"""Which finished jobs leave the core for segments of history, which servers hold these, and what is forgotten (protocol.md 8).

    finished ──Seal──▶ sealed, rows stay ──Stored, by a quorum of the voters──▶ Drop: rows gone ──age, count──▶ forgotten

Jobs leave in the order in which they ended, so the sealed ones are the first of `queue.finished`: a
segment is a number and a count of jobs. The state lists every segment that is kept, by the hash of
its bytes: a server that lacks one sees so by this list, and gets it from others.
"""

from __future__ import annotations

from itertools import islice

from msgspec import Struct

from meshd.errors import Conflict, InvalidRequest
from meshd.model import JobId, NodeId, TaskState
from meshd.raft.state.commands import Accepted, Drop, Seal, Stored
from meshd.raft.state.jobs import Job, JobRecord
from meshd.raft.state.moment import Moment
from meshd.raft.state.queue import OUTCOME_BYTES_MAX, Queue

SEGMENT_JOBS_MAX = 2_000
"""About 1.5 MB; dropping so many takes 5 ms."""
SEGMENT_ROWS_MAX = 20_000
"""Unless the first job alone has more."""
SEALED_MAX = 4
"""Segments that may wait for their Drop: the next one is made while the last is written."""

LARGE_ROWS = 10_000
"""Freeing so many rows takes a millisecond."""


class Tail(Struct, frozen=True):
    """What stays in the core of the finished jobs. Not agreed: a leader goes by it when it seals."""

    jobs: int = 1_000
    """The newest …"""
    age_ms: int = 3_600_000
    """… for an hour at most …"""
    rows: int = 50_000
    bytes: int = OUTCOME_BYTES_MAX // 16
    """… and not with more rows and outcomes than this."""
    batch: int = 500
    """Fewer beyond the tail wait for others: each segment is a file on every voter."""
    segment_jobs: int = SEGMENT_JOBS_MAX


TAIL = Tail()

HISTORY_JOBS_MAX = 2_000_000
"""About 1 KB each on the disk of every voter, and as much again in its index."""
HISTORY_AGE_MS = 90 * 86_400_000
"""Since it was sealed, as long as the mesh was at work: a silence counts for a minute."""
HISTORY_BYTES_MAX = 16 << 30
SEGMENTS_MAX = 20_000
"""A listed segment takes 200 bytes of every snapshot."""


class Segment(Struct, frozen=True, array_like=True, gc=False):
    """What is agreed about one. `hash` names its canonical, uncompressed bytes, as a blob."""

    number: int
    hash: str
    size: int
    jobs: int
    last: JobId
    sealed_ms: int
    """On the state's clock, which no wrong date moves: a clock set ten years ahead forgets nothing."""
    counts: tuple[int, ...]
    """Tasks by state, in the order of TaskState."""


class HistoryRecord(Struct, frozen=True, array_like=True):
    """In a snapshot."""

    dropped: int = 0
    segments: tuple[Segment, ...] = ()
    held: tuple[tuple[NodeId, str, int], ...] = ()
    last: int = 0


class History:
    def __init__(self, moment: Moment, queue: Queue) -> None:
        self._moment = moment
        self._queue = queue
        self.segments: dict[int, Segment] = {}
        """Those that are kept, oldest first: dropped ones, then sealed ones."""
        self.last = 0
        """The newest segment's number; 0: nothing was ever sealed."""
        self.dropped = 0
        """Jobs of segments up to this one are not in the core any more."""
        self.held: dict[NodeId, tuple[str, int]] = {}
        """(incarnation, n): this life of the server has every kept segment up to n on its disk."""
        self.sealed_jobs = 0
        self.size = 0
        """Bytes of all kept segments."""
        self.large: list[Job] = []
        """Dropped, and not freed yet: a million rows freed at once hold the interpreter for a tenth of a second."""

    # --- what the log says

    def seal(self, command: Seal) -> Accepted:
        """The rows stay until enough disks have them."""
        if command.segment != self.last + 1:
            raise Conflict(f"segment {command.segment} does not follow segment {self.last}")
        if self.last - self.dropped >= SEALED_MAX:
            raise Conflict(f"{SEALED_MAX} segments wait to be stored")
        if not 0 < command.jobs <= SEGMENT_JOBS_MAX:
            raise InvalidRequest(f"a segment has 1 to {SEGMENT_JOBS_MAX} jobs, not {command.jobs}")
        jobs = self._jobs(self.sealed_jobs, command.jobs)
        if len(jobs) != command.jobs or jobs[-1].id != command.last:
            raise Conflict(f"the next {command.jobs} finished jobs do not end with {command.last}")
        segment = Segment(
            number=command.segment,
            hash=command.hash,
            size=command.size,
            jobs=command.jobs,
            last=command.last,
            sealed_ms=self._moment.now_ms,
            counts=tuple([sum([job.count(state) for job in jobs]) for state in TaskState]),
        )
        self._list(segment)
        self.sealed_jobs += segment.jobs
        return Accepted()

    def stored(self, origin: NodeId, command: Stored) -> Accepted:
        """Also less than before: a disk may be lost, and what was on it is then asked of others."""
        self.held[origin] = (command.incarnation, min(command.upto, self.last))
        return Accepted()

    def drop(self, command: Drop) -> Accepted:
        if command.segment <= self.dropped:
            return Accepted()
        if command.segment != self.dropped + 1 or command.segment > self.last:
            raise Conflict(f"segment {command.segment} is not the next to be dropped")
        if not self.is_safe(command.segment, command.voters):
            raise Conflict(f"segment {command.segment} is not on the disks of a quorum")
        segment = self.segments[command.segment]
        for job in self._jobs(0, segment.jobs):
            self._queue.put_away(job)
            if len(job.results) > LARGE_ROWS:
                self.large.append(job)
        self.sealed_jobs -= segment.jobs
        self.dropped = segment.number
        self._queue.archived_jobs += segment.jobs
        return Accepted()

    def is_safe(self, segment: int, voters: tuple[str, ...]) -> bool:
        """More than half of these voters, by incarnation, have said that it is on their disks."""
        return 2 * sum(self.holds(voter, segment) for voter in voters) > len(voters)

    def holds(self, voter: str, segment: int) -> bool:
        node, _, incarnation = voter.partition("/")
        held_by, upto = self.held.get(NodeId(node), ("", 0))
        return held_by == incarnation and upto >= segment

    def upto(self, node: NodeId) -> int:
        """How far this server has all segments, as it has said."""
        return self.held.get(node, ("", 0))[1]

    def forget(self) -> None:
        """The oldest segments beyond the bounds go, for everybody. At the end of every entry."""
        while (first := next(iter(self.segments), self.last + 1)) <= self.dropped:
            segment = self.segments[first]
            is_old = self._moment.now_ms - segment.sealed_ms > HISTORY_AGE_MS
            if not (
                is_old
                or self._queue.archived_jobs > HISTORY_JOBS_MAX
                or self.size > HISTORY_BYTES_MAX
                or len(self.segments) > SEGMENTS_MAX
            ):
                break
            del self.segments[first]
            self.size -= segment.size
            self._queue.archived_jobs -= segment.jobs
            for state, count in zip(TaskState, segment.counts, strict=True):
                self._queue.totals[state] -= count

    # --- what a server asks, and does beside the log

    @property
    def oldest(self) -> int:
        """Number of the first segment that is kept."""
        return next(iter(self.segments), self.last + 1)

    def records(self, number: int) -> list[JobRecord] | None:
        """The jobs of a sealed segment, while the core has them."""
        if not self.dropped < number <= self.last:
            return None
        before = sum(self.segments[other].jobs for other in range(self.dropped + 1, number))
        return [job.recorded() for job in self._jobs(before, self.segments[number].jobs)]

    def due(self, tail: Tail = TAIL) -> list[Job]:
        """The jobs that a leader should seal now, the oldest first; often none."""
        queue = self._queue
        unsealed = len(queue.finished) - self.sealed_jobs
        if unsealed <= 0 or self.last - self.dropped >= SEALED_MAX:
            return []
        beyond = unsealed - tail.jobs
        if beyond >= tail.batch:
            return self._first(min(beyond, tail.segment_jobs))
        [oldest] = self._jobs(self.sealed_jobs, 1)
        is_due = self._moment.wall_ms - (oldest.ended_wall_ms or 0) > tail.age_ms
        if not is_due and (queue.finished_rows > tail.rows or queue.outcome_bytes > tail.bytes):
            # What fills the memory may be of unfinished jobs, or sealed: counted are those that could leave.
            jobs = self._jobs(self.sealed_jobs, unsealed)
            rows, size = sum([len(job.results) for job in jobs]), sum([job.outcome_bytes for job in jobs])
            is_due = rows > tail.rows or size > tail.bytes
        return self._first(min(unsealed, tail.segment_jobs)) if is_due else []

    def _first(self, count: int) -> list[Job]:
        """Of the unsealed jobs, but not too many rows."""
        taken: list[Job] = []
        rows = 0
        for job in self._jobs(self.sealed_jobs, count):
            rows += len(job.results)
            if taken and rows > SEGMENT_ROWS_MAX:
                break
            taken.append(job)
        return taken

    def _jobs(self, start: int, count: int) -> list[Job]:
        jobs = self._queue.jobs
        return [jobs[job] for job in islice(self._queue.finished, start, start + count)]

    # --- snapshots

    def captured(self) -> HistoryRecord:
        held = tuple([(node, incarnation, upto) for node, (incarnation, upto) in self.held.items()])
        return HistoryRecord(self.dropped, tuple(self.segments.values()), held, self.last)

    def restore(self, record: HistoryRecord) -> None:
        """After the jobs. Raises ValueError."""
        self.dropped, self.last = record.dropped, record.last
        self.held = {node: (incarnation, upto) for node, incarnation, upto in record.held}
        for segment in record.segments:
            self._list(segment)
            if segment.number > self.dropped:
                self.sealed_jobs += segment.jobs
                continue
            self._queue.archived_jobs += segment.jobs
            for state, count in zip(TaskState, segment.counts, strict=True):
                self._queue.totals[state] += count
        numbers = list(self.segments)
        if numbers != list(range(self.oldest, record.last + 1)) or not 0 <= self.dropped <= record.last:
            raise ValueError("segments of the history are missing from the list")
        if self.sealed_jobs > len(self._queue.finished) or self.oldest > self.dropped + 1:
            raise ValueError("sealed jobs are missing")
        self.last = record.last

    def _list(self, segment: Segment) -> None:
        self.segments[segment.number] = segment
        self.last = max(self.last, segment.number)
        self.size += segment.size
