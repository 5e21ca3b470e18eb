"""The machine's state as bytes, and back.

Taking it must not hold up the loop, so `capture` only collects references to immutable
records: a job's record is made when the job changes, and a job with many rows hands over
a shallow copy of them (rows are immutable). The packing, which takes seconds for a big
state, is done by the function it returns, in pieces small enough to let other threads run.

What is only an index of something else (leases by node, lines, timers, names) is not
stored: it is built again, so that it cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from msgspec import Struct
from msgspec.structs import replace

from meshd import codec
from meshd.errors import Corrupt, InvalidRequest
from meshd.model import JobId, KeyLink, NodeId, Offer, TaskState
from meshd.raft.state import ids
from meshd.raft.state.history import History, HistoryRecord
from meshd.raft.state.jobs import JobRecord, Row
from meshd.raft.state.matching import Matching, Node
from meshd.raft.state.members import Invite, MemberRecord, Members, Token
from meshd.raft.state.moment import Moment
from meshd.raft.state.queue import Queue
from meshd.views import ClockMove

VERSION = 2
"""1 had no runs: what it says is also a state of 2, but not the other way round."""

SNAPSHOT_BYTES_MAX = 8 << 30
PIECE_JOBS = 100
PIECE_ROWS = 1_000
"""One piece is packed in about a millisecond."""


class NodeRecord(Struct, frozen=True, array_like=True):
    id: NodeId
    may_work: bool
    epoch: int
    is_live: bool
    seq: int
    answer: bytes
    slots: int
    offer: Offer | None
    last_fence: int
    boot: str = ""
    ended_ms: int = 0
    ahead: tuple[tuple[JobId, int], ...] = ()


class Header(Struct, frozen=True, array_like=True):
    version: int
    now_ms: int
    wall_ms: int
    position: int
    digest: bytes
    mesh: str
    recovery_epoch: int
    leases_made: int
    jobs_made: int
    members: list[MemberRecord]
    revoked: list[NodeId]
    invites: dict[str, Invite]
    tokens: dict[str, Token]
    nodes: list[NodeRecord]
    finished: list[JobId]
    lineage: tuple[str, ...] = ()
    recovered_wall_ms: int = 0
    clock_moves: tuple[ClockMove, ...] = ()
    ids_forgotten_ms: int = 0
    key_links: tuple[KeyLink, ...] = ()
    history: HistoryRecord = HistoryRecord()
    gained: tuple[NodeId, ...] = ()
    woken: tuple[int, ...] = ()
    hungry: tuple[NodeId, ...] = ()
    """What one entry could not lease is leased by the next, in this order."""


Rows = dict[int, Row]
_RowPiece = tuple[JobId, bool, Rows]
"""Rows of a job: is it those of ended tasks?"""


def capture(
    moment: Moment, members: Members, matching: Matching, queue: Queue, history: History, digest: bytes
) -> Callable[[], bytes]:
    gained, woken, hungry = matching.unsettled()
    header = Header(
        version=VERSION,
        now_ms=moment.now_ms,
        wall_ms=moment.wall_ms,
        position=moment.position,
        digest=digest,
        mesh=members.mesh,
        recovery_epoch=len(queue.lineage),
        leases_made=queue.leases_made,
        jobs_made=queue.jobs_made,
        members=list(members.records.values()),
        revoked=list(members.revoked),
        invites=members.invites.copy(),
        tokens=members.tokens.copy(),
        nodes=[
            NodeRecord(
                node.id, node.may_work, node.epoch, node.is_live, node.seq, node.answer, node.slots, node.offer,
                node.last_fence, node.boot, node.ended_ms, tuple(node.ahead.items()),
            )
            for node in matching.nodes.values()
        ],
        finished=list(queue.finished),
        lineage=queue.lineage,
        recovered_wall_ms=queue.recovered_wall_ms,
        clock_moves=moment.moves,
        ids_forgotten_ms=queue.seen.forgotten_ms,
        key_links=members.key_links,
        history=history.captured(),
        gained=tuple(gained),
        woken=tuple(woken),
        hungry=tuple(hungry),
    )  # fmt: skip
    jobs = [job.record or job.recorded() for job in queue.jobs.values()]
    seen = queue.seen.captured()
    return lambda: codec.encode([codec.encode(header), ids.packed(seen), *_pieces(jobs)])


def _pieces(jobs: list[JobRecord]) -> Iterator[bytes]:
    """Alternating: some jobs with few rows or without their rows, then the rows that were left out."""
    for start in range(0, len(jobs), PIECE_JOBS):
        group = jobs[start : start + PIECE_JOBS]
        large = [job for job in group if len(job.rows) + len(job.results) > PIECE_ROWS // PIECE_JOBS]
        apart = {job.id for job in large}
        yield codec.encode([replace(job, rows={}, results={}) if job.id in apart else job for job in group])
        rows: list[bytes] = []
        for job in large:
            for is_ended, source in ((False, job.rows), (True, job.results)):
                items = iter(source.items())
                while piece := dict(islice(items, PIECE_ROWS)):
                    rows.append(codec.encode((job.id, is_ended, piece)))
        yield codec.encode(rows)


def restore(data: bytes, moment: Moment, members: Members, matching: Matching, queue: Queue, history: History) -> bytes:
    """Fill empty parts with what was captured; returns the digest. Raises Corrupt.

    What was captured is whole. Bytes that can be read and still are no state come from a fault of memory or from a
    leader that lies: then the parts are left half filled, and nobody uses them.
    """
    try:
        return _restore(data, moment, members, matching, queue, history)
    except (InvalidRequest, LookupError, ValueError, OverflowError, AssertionError) as error:
        raise Corrupt(f"the snapshot is no state of the queue: {error!r}") from error


def _restore(
    data: bytes, moment: Moment, members: Members, matching: Matching, queue: Queue, history: History
) -> bytes:
    try:
        pieces = codec.decode(data, list[bytes], bytes_max=SNAPSHOT_BYTES_MAX)
        if len(pieces) < 2:
            raise InvalidRequest(f"a snapshot has at least 2 pieces, not {len(pieces)}")
        header = codec.decode(pieces[0], Header, bytes_max=SNAPSHOT_BYTES_MAX)
        if not 1 <= header.version <= VERSION:
            raise InvalidRequest(f"its version is {header.version}, this meshd reads up to {VERSION}")
        records = list(_records(pieces[2:]))
    except InvalidRequest as error:
        raise Corrupt(f"the snapshot cannot be read: {error.message}") from error
    moment.now_ms, moment.wall_ms, moment.position = header.now_ms, header.wall_ms, header.position
    members.mesh = header.mesh
    members.records = {record.member.node: record for record in header.members}
    members.revoked = dict.fromkeys(header.revoked)
    members.key_links = header.key_links
    members.invites, members.tokens = header.invites, header.tokens
    queue.lineage, queue.recovered_wall_ms = header.lineage, header.recovered_wall_ms
    queue.leases_made, queue.jobs_made = header.leases_made, header.jobs_made
    moment.moves = header.clock_moves
    queue.seen.restore(pieces[1], header.ids_forgotten_ms)
    queue.finished = dict.fromkeys(header.finished)
    for it in header.nodes:
        matching.nodes[it.id] = Node(
            it.id,
            it.may_work,
            it.epoch,
            it.is_live,
            it.seq,
            it.answer,
            it.slots,
            it.offer,
            last_fence=it.last_fence,
            boot=it.boot,
            ended_ms=it.ended_ms,
        )
        matching.ask_ahead(matching.nodes[it.id], it.ahead)
    for record in records:
        _restore_job(record, matching, queue)
    if not members.records.keys() <= matching.nodes.keys() or not queue.finished.keys() <= queue.jobs.keys():
        raise ValueError("members without a place, or finished jobs that are not there")
    history.restore(header.history)
    woken = [queue.numbered(number) for number in header.woken]
    matching.settle(header.gained, woken, header.hungry)
    return header.digest


def take_apart(matching: Matching, queue: Queue) -> None:
    """Free a state that was replaced, piece by piece: freed at once it holds the interpreter for a tenth of a second."""
    matching.take_apart()
    queue.take_apart()


def _records(pieces: list[bytes]) -> Iterator[JobRecord]:
    for start in range(0, len(pieces), 2):
        jobs = codec.decode(pieces[start], list[JobRecord], bytes_max=SNAPSHOT_BYTES_MAX)
        by_id = {job.id: job for job in jobs}
        if start + 1 >= len(pieces):
            raise InvalidRequest("its last piece is missing")
        for data in codec.decode(pieces[start + 1], list[bytes], bytes_max=SNAPSHOT_BYTES_MAX):
            job_id, is_ended, rows = codec.decode(data, _RowPiece, bytes_max=SNAPSHOT_BYTES_MAX)
            if job_id not in by_id:
                raise InvalidRequest(f"rows of an unknown job {job_id}")
            (by_id[job_id].results if is_ended else by_id[job_id].rows).update(rows)
        yield from jobs


def _restore_job(record: JobRecord, matching: Matching, queue: Queue) -> None:
    job = record.job()
    job.record = record
    queue.add(job)
    totals = queue.totals
    totals[TaskState.READY] += len(job.ready)
    for state, tasks in job.ended.items():
        totals[state] += len(tasks)
    for row in job.rows.values():
        if row.state is not TaskState.READY:
            totals[row.state] += 1
    totals[TaskState.LEASED] += sum(map(len, record.runs))
    job.outcome_bytes = sum(len(row.outcome or b"") for row in (*job.rows.values(), *job.results.values()))
    queue.outcome_bytes += job.outcome_bytes
    if job.is_final:
        queue.finished_rows += len(job.results)
        return
    if job.hold:
        queue.on_hold[job.id] = job
    queue.index(job)
    for task, row in job.rows.items():
        if row.node is None or row.node not in matching.nodes:
            continue
        node = matching.nodes[row.node]
        if row.state is TaskState.HELD:
            node.held[row.fence] = (job, task)
        elif row.state in (TaskState.LEASED, TaskState.RUNNING):
            matching.take(node, row.fence, job, task, is_ahead=row.is_ahead)
    for run in record.runs:
        matching.take_run(matching.nodes[run.node], job, run)
    matching.line_up(job)
