"""One server's history in the simulated mesh: the real decisions and bytes, on a modelled disk; the index is made at each start.

What meshd/history/archive.py does with a blob store, threads and SQLite is done here on virtual time. A file is
written beside, synced and renamed, and its directory synced, each after a while: the power may go between.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from meshd import codec
from meshd.history.keeping import work_of
from meshd.history.reading import explanation, one_page, tasks_page
from meshd.history.segment import entries, pack, read_rows
from meshd.model import JobId
from meshd.ports import ProposeResult
from meshd.raft.state.commands import AnyCommand, Seal
from meshd.raft.state.history import Segment, Tail
from meshd.raft.state.jobs import Job
from meshd.raft.state.queries import choose_tasks, job_view, no_such_job
from meshd.testing.raft_disk import PowerCut
from meshd.views import AnyQuery, Explain, GetJob, ListJobs, ListTasks

if TYPE_CHECKING:
    from meshd.testing.servers import SimServer

LOOK_MS = 50.0
AGAIN_MS = 2_000
PROPOSE_MS = 3_000
FETCH_MS = 3_000
NEW = ".new"


class NotHere(Exception):
    """The index lacks what the core has dropped: whoever asks waits."""


class Archive:
    """Of one process."""

    def __init__(self, server: SimServer, tail: Tail) -> None:
        self._server, self._tail = server, tail
        self._node = server.node
        self._disk = server.node.segments
        self._jobs: dict[str, list[Job]] = {}
        """The index: by hash, what is synced here."""
        self._later: dict[int, float] = {}
        self._is_busy = False
        for name in self._disk.names():
            if name.endswith(NEW) or blake3(self._disk.read(name)).hexdigest() != name:
                self._disk.remove(name)
            else:
                self._take_in(name)
        self._node.after(LOOK_MS, self._look)

    def give(self, name: str) -> bytes | None:
        """To another server."""
        return self._read(name) if name in self._jobs else None

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._node.after(LOOK_MS, self._look)
        server, history = self._server, self._server.machine.history
        if self._is_busy or (not history.last and not server.engine.leads()):
            return
        now_ms = self._node.world.heap.now_ms
        work = work_of(
            history,
            me=server.voter,
            voters=server.engine.voters,
            leads=server.engine.leads(),
            has=lambda segment: segment.hash in self._jobs,
            later=[number for number, until_ms in self._later.items() if until_ms > now_ms],
        )
        for segment in work.write[:1]:
            if (records := history.records(segment.number)) is not None:
                self._write(segment, b"".join(pack(segment.number, records)))
                return
        for segment in work.fetch[:1]:
            self._fetch(segment)
            return
        if work.tell is not None:
            self._propose(work.tell)
        elif work.drop is not None:
            self._propose(work.drop)
        elif work.may_seal and (jobs := history.due(self._tail)):
            number, records = history.last + 1, [job.recorded() for job in jobs]
            data = b"".join(pack(number, records))
            self._propose(Seal(number, blake3(data).hexdigest(), len(data), len(records), records[-1].id))

    def _propose(self, command: AnyCommand) -> None:
        self._is_busy = True

        def answered(_: ProposeResult) -> None:
            self._is_busy = False

        self._server.propose(self._node.id, codec.encode(command), answered, timeout_ms=PROPOSE_MS)

    def _write(self, segment: Segment, data: bytes) -> None:
        """In three steps, each of which takes the disk a while and may be the last."""
        name = segment.hash
        if blake3(data).hexdigest() != name:
            self._node.world.checks.breach("segments are the same everywhere", f"{self._node.name}: {segment.number}")
        self._is_busy = True

        def write() -> None:
            self._disk.open(name + NEW).write_at(0, data)

        def sync() -> None:
            self._disk.open(name + NEW).sync()
            self._disk.rename(name + NEW, name)

        def done() -> None:
            self._disk.sync_directory()
            self._take_in(name)
            self._is_busy = False
            self._server.wake()

        self._go_on(segment, [write, sync, done])

    def _go_on(self, segment: Segment, steps: list[Callable[[], None]]) -> None:
        try:
            steps[0]()
        except PowerCut:
            self._node.crash(loses_power=True)
            self._node.comes_back()
            return
        except OSError:  # full, or a sync that failed: what is beside is begun anew
            self._is_busy = False
            self._later[segment.number] = self._node.world.heap.now_ms + AGAIN_MS
            with suppress(OSError, KeyError):
                self._disk.remove(segment.hash + NEW)
            return
        if len(steps) > 1:
            self._node.after(self._node.sync_ms(), lambda: self._go_on(segment, steps[1:]))

    def _fetch(self, segment: Segment) -> None:
        world = self._node.world
        others = [node.id for node in world.nodes.values() if node.is_server and node is not self._node]
        self._is_busy = True

        def answered(data: bytes | None, _is_silent: bool) -> None:
            self._is_busy = False
            if data and blake3(data).hexdigest() == segment.hash:
                world.heap.note(f"{self._node.name}: fetched segment {segment.number}")
                self._write(segment, data)
            else:
                self._later[segment.number] = world.heap.now_ms + AGAIN_MS // 4

        if not others:
            answered(None, False)
            return
        peer = world.heap.random.choice(others)
        self._node.call(peer, "history.get", segment.hash.encode(), FETCH_MS, answered)

    def _take_in(self, name: str) -> None:
        data = self._disk.read(name)
        number = int.from_bytes(data[8:16], "little")
        jobs: list[Job] = []
        for _, entry in entries(number, data):
            job = entry.record.job()
            for piece in entry.pieces:
                job.results |= read_rows(data[piece.offset : piece.offset + piece.length])
            jobs.append(job)
        self._jobs[name] = jobs

    def _read(self, name: str) -> bytes | None:
        """None when its bits have turned over: then it is gone, and fetched."""
        data = self._disk.read(name) if name in self._disk.names() else b""
        if blake3(data).hexdigest() == name:
            return data
        self._node.world.heap.note(f"{self._node.name}: finds segment {name[:8]} damaged")
        self._jobs.pop(name, None)
        return None

    # --- answers ------------------------------------------------------------------------------------------------------

    def answer(self, query: AnyQuery) -> Any:
        """As the real one, of this moment. Raises the query's error, and NotHere."""
        machine = self._server.machine
        match query:
            case GetJob(selector) | ListTasks(selector) | Explain(selector):
                if machine.find(selector) is not None:
                    return machine.answer(query)
                job = self._dropped().get(JobId(selector))
                if job is None:
                    raise no_such_job(selector)
                return self._answer_about(query, job)
            case ListJobs():
                core = machine.answer(query)
                found = [job for job in self._dropped().values() if query.before is None or job.id < query.before]
                jobs = sorted(found, key=lambda job: job.id, reverse=True)
                page = [job_view(job, machine.position) for job in jobs[: query.limit]]
                return one_page(core, page, page[-1].id if len(jobs) > query.limit else None, query.limit)
            case _:
                return machine.answer(query)

    def _answer_about(self, query: AnyQuery, job: Job) -> Any:
        position = self._server.machine.position
        match query:
            case ListTasks():
                chosen, after = choose_tasks(job, query)
                return tasks_page(job, chosen, after, job.results, position)
            case Explain(_, task):
                return explanation(job, query, job.row(task))
            case _:
                return job_view(job, position)

    def _dropped(self) -> dict[JobId, Job]:
        history = self._server.machine.history
        found: dict[JobId, Job] = {}
        for number in range(history.oldest, history.dropped + 1):
            name = history.segments[number].hash
            if name not in self._jobs or self._read(name) is None:
                raise NotHere
            found |= {job.id: job for job in self._jobs[name]}
        return found
