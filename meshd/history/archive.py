"""The history at one server: keeps its segments as blobs, tells so in the log, moves jobs there while it leads, and answers.

    state lists a segment ─▶ written from the core's rows, or fetched ─▶ synced ─▶ Stored ─▶ (leader) Drop
                                              └─▶ index, in a thread; questions wait until it has what the core dropped

Three tasks: one for what the log waits for, one that fetches, one that indexes. What each does next is
decided by `keeping.work_of` from the list and the disk, whatever happened before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog
import trio
from blake3 import blake3

from meshd import codec
from meshd.errors import Corrupt, MeshError, NotFound, PeerFault, TooLarge, Unavailable
from meshd.history.index import Archived, Bounds, Index, content_of
from meshd.history.keeping import Work, work_of
from meshd.history.reading import explanation, one_page, pieces_of, tasks_page
from meshd.history.segment import pack, read_rows
from meshd.model import BlobRef, NodeId
from meshd.ports import BlobStore, ProposeResult
from meshd.raft.messages import VoterId
from meshd.raft.state.commands import AnyCommand, Seal
from meshd.raft.state.history import TAIL, Segment, Tail
from meshd.raft.state.jobs import Job, JobRecord, Row
from meshd.raft.state.machine import Machine
from meshd.raft.state.queries import choose_tasks, job_view, no_such_job, several_jobs
from meshd.views import AnyQuery, Explain, GetJob, JobPage, ListJobs, ListTasks

PAUSE_S = 0.02
"""Between two looks while the log moves …"""
LOOK_S = 1.0
"""… and while it does not."""
PROPOSE_S = 3.0
FETCH_S = 120.0
AGAIN_S = 10.0
"""Before a segment that nobody had is asked for again, or one that could not be written is tried again."""
CATCH_UP_S = 3.0
"""How long a question waits for the index; then another voter is asked."""
SEGMENT_BYTES_MAX = 4 << 30

T = TypeVar("T")
log = structlog.get_logger()


class Log(Protocol):
    """What the archive needs of the server's log."""

    @property
    def me(self) -> VoterId | None:
        """This life of the server; None while the log does not run."""
        ...

    @property
    def voter_ids(self) -> tuple[VoterId, ...]: ...
    def leads(self) -> bool: ...
    async def propose(self, origin: NodeId, command: bytes, *, timeout_s: float) -> ProposeResult: ...


class Archive:
    """Build it with the log, `serve` it when there are blobs; until then it has nothing and says so."""

    def __init__(
        self, me: NodeId, machine: Machine, server_log: Log, index_file: Path, *, tail: Tail | None = TAIL
    ) -> None:
        """When it leads it moves finished jobs beyond the tail into the history; None: none, but it does all else."""
        self._me = me
        self._machine = machine
        self._log = server_log
        self._index = Index(index_file)
        self._tail = tail
        self._store: BlobStore | None = None
        self._fetch: Callable[[BlobRef], Awaitable[None]]
        self._indexed: dict[int, str] = {}
        self._later: dict[int, float] = {}
        """Segments that nobody had, and when to ask again."""
        self._known = 0
        """All segments up to this one were on the disk at the last look."""
        self._is_index_bad = False
        self._woken = trio.Event()
        self._stored = trio.Event()
        self._has_indexed = trio.Event()
        self._writing = trio.CapacityLimiter(1)
        self._reading = trio.CapacityLimiter(1)

    def applied(self) -> None:
        """The log has moved."""
        self._woken.set()

    def names(self, blob: str) -> bool:
        """It is a segment of the history: not to be removed."""
        return any(segment.hash == blob for segment in self._machine.history.segments.values())

    async def serve(
        self,
        store: BlobStore,
        fetch: Callable[[BlobRef], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """`fetch` gets a blob from other nodes onto this disk; raises a MeshError."""
        self._fetch = fetch
        await self._open_index()
        self._store = store
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep)
                nursery.start_soon(self._keep_fetching)
                nursery.start_soon(self._keep_indexing)
                task_status.started()
        finally:
            self._store = None
            self._index.close()

    # --- what the log waits for ---------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            woken = self._woken = trio.Event()
            try:
                await self._step()
            except MeshError as error:
                log.warning("history.waits", error=str(error))
                await trio.sleep(LOOK_S)
            with trio.move_on_after(LOOK_S):
                await woken.wait()
            await trio.sleep(PAUSE_S)

    async def _step(self) -> None:
        for segment in self._work().write:
            await self._write(segment)
        work = self._work()
        if work.tell is not None:
            await self._propose(work.tell)
        if (drop := self._work().drop) is not None:
            await self._propose(drop)
        while self._machine.history.large:
            await trio.to_thread.run_sync(_free, self._machine.history.large.pop())
        if self._tail is not None and self._work().may_seal:
            await self._seal(self._tail)

    def _work(self, *, is_quick: bool = True) -> Work:
        """`is_quick`: what was on the disk at the last look, a second ago, still is."""
        me, now = self._log.me, trio.current_time()
        if me is None:
            return Work()
        work = work_of(
            self._machine.history,
            me=me,
            voters=self._log.voter_ids,
            leads=self._log.leads(),
            has=self._has,
            known=self._known if is_quick else 0,
            later=[number for number, until in self._later.items() if until > now],
        )
        self._known = work.upto
        return work

    async def _write(self, segment: Segment) -> None:
        """Nothing when the core has dropped its jobs meanwhile, when these are not what the leader sealed, or on a full disk."""
        assert self._store is not None
        records = self._machine.history.records(segment.number)
        if records is None:
            return
        try:
            writer = await self._store.create()
            try:
                async for chunk in _chunks(segment.number, records):
                    await writer.write(chunk)
                await writer.commit(expected=BlobRef(segment.hash, segment.size))
            finally:
                await writer.abort()
            self._stored.set()
        except MeshError as error:
            self._later[segment.number] = trio.current_time() + AGAIN_S
            event = "history.differs" if isinstance(error, PeerFault) else "history.not_written"
            log.warning(event, segment=segment.number, error=str(error))

    async def _seal(self, tail: Tail) -> None:
        history = self._machine.history
        number, jobs = history.last + 1, history.due(tail)
        if not jobs:
            return
        records = [job.recorded() for job in jobs]
        hasher, size = blake3(), 0
        async for chunk in _chunks(number, records):
            hasher.update(chunk)
            size += len(chunk)
        await self._propose(Seal(number, hasher.hexdigest(), size, len(records), records[-1].id))

    async def _propose(self, command: AnyCommand) -> None:
        """Once; what came of it the state will show."""
        await self._log.propose(self._me, codec.encode(command), timeout_s=PROPOSE_S)

    def _has(self, segment: Segment) -> bool:
        return self._store is not None and self._store.has(segment.hash)

    # --- fetching -----------------------------------------------------------------------------------------------------

    async def _keep_fetching(self) -> None:
        assert self._store is not None
        while True:
            for segment in self._work(is_quick=False).fetch:
                try:
                    await self._fetch(BlobRef(segment.hash, segment.size))
                    if segment.number < self._machine.history.oldest:
                        await self._store.remove(segment.hash)  # too old while it was on its way: nothing names it
                        continue
                    self._later.pop(segment.number, None)
                    self._stored.set()
                    self._woken.set()
                    log.info("history.fetched", segment=segment.number)
                except MeshError as error:
                    self._later[segment.number] = trio.current_time() + AGAIN_S
                    log.warning("history.not_fetched", segment=segment.number, error=str(error))
            await trio.sleep(LOOK_S)

    # --- the index ----------------------------------------------------------------------------------------------------

    async def _open_index(self) -> None:
        """Made anew when it cannot be read; tried again later when the disk does not allow it."""
        self._is_index_bad = True
        try:
            try:
                self._indexed = await self._write_index(self._index.open)
            except Corrupt as error:
                log.warning("history.index_anew", error=str(error))
                self._indexed = {}
                await self._write_index(self._index.remove)
                self._indexed = await self._write_index(self._index.open)
            self._is_index_bad = False
        except MeshError as error:
            log.error("history.index_not_opened", error=str(error))

    async def _keep_indexing(self) -> None:
        while True:
            stored = self._stored = trio.Event()
            try:
                if self._is_index_bad:
                    await self._make_index_anew()
                await self._index_all()
            except Corrupt as error:
                log.warning("history.index_anew", error=str(error))
                self._is_index_bad = True
            except MeshError as error:
                log.warning("history.not_indexed", error=str(error))
            with trio.move_on_after(PAUSE_S if self._is_index_bad else LOOK_S):
                await stored.wait()

    async def _make_index_anew(self) -> None:
        self._indexed = {}
        async with self._reading:  # nobody reads while it is taken away
            await self._write_index(self._index.remove)
            await self._open_index()
        if self._is_index_bad:
            await trio.sleep(LOOK_S)

    async def _index_all(self) -> None:
        assert self._store is not None
        history = self._machine.history
        for number, name in list(self._indexed.items()):
            listed = history.segments.get(number)
            is_other = listed is not None and listed.hash != name
            if number < history.oldest or is_other:
                # The index last: it is what remembers that there is something to remove.
                await self._store.remove(name)
                await self._write_index(self._index.discard, number)
                del self._indexed[number]
        for segment in list(history.segments.values()):
            if segment.number in self._indexed or not self._has(segment):
                continue
            try:
                ref = BlobRef(segment.hash, segment.size)
                data = await self._store.get_bytes(ref, bytes_max=SEGMENT_BYTES_MAX)
                content = await self._write_index(content_of, segment.number, data)
            except (NotFound, Corrupt) as error:
                # Damaged, it was put aside: the next look finds it missing, and fetches it.
                log.warning("history.segment_damaged", segment=segment.number, error=str(error))
                continue
            except TooLarge as error:
                # It cannot become less: its jobs are not found here, and what else there is does not wait for it.
                log.error("history.segment_not_indexed", segment=segment.number, error=str(error))
            else:
                await self._write_index(self._index.add, segment.hash, content)
            self._indexed[segment.number] = segment.hash
            has_indexed, self._has_indexed = self._has_indexed, trio.Event()
            has_indexed.set()

    async def _write_index(self, work: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._writing)

    # --- answers ------------------------------------------------------------------------------------------------------

    async def answer(self, query: AnyQuery, *, timeout_s: float, is_stale_ok: bool = False) -> Any:
        """Of the core and the index as of one moment, which is now. Raises the query's error, Unavailable."""
        match query:
            case GetJob(selector) | ListTasks(selector) | Explain(selector):
                return await self._answer_about(query, selector, timeout_s, is_stale_ok=is_stale_ok)
            case ListJobs(states) if not states or any(state.is_final for state in states):
                core: JobPage = self._machine.answer(query)
                if (bounds := self._bounds()) is None:
                    return core
                await self._wait_indexed(bounds, timeout_s, is_stale_ok=is_stale_ok)
                jobs, after = await self._read_index(self._index.page, query, bounds)
                return one_page(core, [job_view(job, core.position) for job in jobs], after, query.limit)
            case _:
                return self._machine.answer(query)

    async def _answer_about(
        self, query: GetJob | ListTasks | Explain, selector: str, timeout_s: float, *, is_stale_ok: bool
    ) -> Any:
        # As of now, whatever is applied while the index is asked.
        position, bounds = self._machine.position, self._bounds()
        here = self._machine.find(selector)
        if bounds is None or (here is not None and here.id == selector):
            return self._machine.answer(query)
        of_core = None if here is None else self._machine.answer(query)
        found = await self._read_index(self._index.find, selector, bounds)
        if found is None or found.job.id != selector:
            await self._wait_indexed(bounds, timeout_s, is_stale_ok=is_stale_ok)
            found = await self._read_index(self._index.find, selector, bounds)
        if found is None:
            if here is None:
                raise no_such_job(selector)
            return of_core
        if here is not None:
            if selector not in ("last", here.spec.name, found.job.spec.name):
                raise several_jobs(selector)
            if here.number > found.job.number:
                return of_core
        return await self._archived(query, found, position)

    async def _archived(self, query: GetJob | ListTasks | Explain, found: Archived, position: int) -> Any:
        match query:
            case GetJob():
                return job_view(found.job, position)
            case ListTasks():
                chosen, after = choose_tasks(found.job, query)
                rows = await self._rows(found, [task for task, _ in chosen])
                return tasks_page(found.job, chosen, after, rows, position)
            case Explain(_, task):
                return explanation(found.job, query, (await self._rows(found, [task])).get(task))

    async def _rows(self, found: Archived, tasks: Sequence[int]) -> dict[int, Row]:
        """Raises Unavailable when the segment is not here, or turns out to be damaged: it is fetched then."""
        wanted = pieces_of(found.entry.pieces, tasks)
        segment = self._machine.history.segments.get(found.segment)
        if not wanted:
            return {}
        if segment is None or self._store is None:
            raise NotFound(f"job {found.job.id} is too old", hint="see `mesh ps`")
        rows: dict[int, Row] = {}
        try:
            for piece in wanted:
                rows.update(read_rows(await self._store.read(segment.hash, piece.offset, piece.length)))
        except (NotFound, Corrupt) as error:
            await self._look_into(segment)
            raise Unavailable(
                f"segment {segment.number} of the history is damaged or missing at this node", hint="try again"
            ) from error
        return rows

    async def _look_into(self, segment: Segment) -> None:
        """A file that is not what its name says is put aside by whoever reads all of it; it is fetched anew then."""
        assert self._store is not None
        with suppress(MeshError):
            async for _ in self._store.open_verified(BlobRef(segment.hash, segment.size)):
                pass
        self._woken.set()

    def _bounds(self) -> Bounds | None:
        """The segments whose jobs the core has dropped; None: there are none."""
        history = self._machine.history
        return Bounds(history.oldest, history.dropped) if history.oldest <= history.dropped else None

    async def _wait_indexed(self, bounds: Bounds, timeout_s: float, *, is_stale_ok: bool) -> None:
        """Until the index has all that the core had dropped. Raises Unavailable."""
        segments = self._machine.history.segments
        wanted = {number: segments[number].hash for number in range(bounds.oldest, bounds.newest + 1)}
        if is_stale_ok or wanted.items() <= self._indexed.items():
            return
        with trio.move_on_after(min(timeout_s, CATCH_UP_S)):
            while not wanted.items() <= self._indexed.items():
                self._stored.set()
                await self._has_indexed.wait()
            return
        lacking = wanted.keys() - self._indexed.keys()
        raise Unavailable(
            f"{len(lacking)} of {len(wanted)} segments of the history are not at this node yet, or not in its index",
            hint="try again, or ask with --stale for what is here",
        )

    async def _read_index(self, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return await trio.to_thread.run_sync(work, *arguments, limiter=self._reading)
        except Corrupt as error:
            self._is_index_bad = True
            self._stored.set()
            raise Unavailable(f"{error}; it is made anew", hint="try again") from error


def _free(job: Job) -> None:
    """Row after row, so that other threads run between."""
    job.record = None
    while job.results:
        job.results.popitem()


async def _chunks(number: int, records: Sequence[JobRecord]) -> AsyncIterator[bytes]:
    """Each made in a thread: rows of large jobs take their time."""
    chunks = pack(number, records)
    while (chunk := await trio.to_thread.run_sync(next, chunks, None)) is not None:
        yield chunk
