"""The disk may be slow; the loop it serves may not be."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from meshd import codec
from meshd.ids import new_job_id
from meshd.model import JobId, JobSpec, Member, NodeId, Role, Run, TaskState
from meshd.net.memory import MemoryNetwork, MemoryTransport
from meshd.ports import Committed
from meshd.raft.clocks import wall_clock_ms
from meshd.raft.log import ServerLog
from meshd.raft.replica import Replica
from meshd.raft.settings import RaftSettings
from meshd.raft.state import machine as queue
from meshd.raft.state.commands import Cancel, Command, Found, Submit
from meshd.raft.storage.disk import DirectoryDisk, OpenFile, Room
from meshd.views import PAGE_MAX, GetSummary, ListJobs
from tests.integration.test_raft_log import PATIENCE_S, Machine, Mesh, Silent, until

FSYNC_S = 0.05
LIVE_JOBS = 30_000
STEP_MS_MAX = 50.0


class SlowFile:
    def __init__(self, disk: SlowDisk, file: OpenFile) -> None:
        self._disk = disk
        self._file = file

    def write_at(self, offset: int, data: bytes) -> None:
        self._disk.seen()
        self._file.write_at(offset, data)

    def reserve(self, size: int) -> None:
        self._disk.seen()
        self._file.reserve(size)

    def sync(self) -> None:
        self._disk.seen()
        time.sleep(FSYNC_S)
        self._disk.syncs += 1
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class SlowDisk:
    """Every sync takes 50 ms, and who touches the disk is noted."""

    def __init__(self, directory: Path) -> None:
        self._disk = DirectoryDisk(directory)
        self.loop = threading.get_ident()
        self.syncs = 0
        self.touches_from_loop = 0

    def seen(self) -> None:
        self.touches_from_loop += threading.get_ident() == self.loop

    def names(self) -> list[str]:
        self.seen()
        return self._disk.names()

    def read(self, name: str) -> bytes:
        self.seen()
        return self._disk.read(name)

    def open(self, name: str) -> SlowFile:
        self.seen()
        return SlowFile(self, self._disk.open(name))

    def rename(self, name: str, to: str) -> None:
        self.seen()
        self._disk.rename(name, to)

    def remove(self, name: str) -> None:
        self.seen()
        self._disk.remove(name)

    def shorten(self, name: str, size: int) -> None:
        self.seen()
        self._disk.shorten(name, size)

    def room(self) -> Room:
        self.seen()
        return self._disk.room()

    def sync_directory(self) -> None:
        self.seen()
        time.sleep(FSYNC_S)
        self._disk.sync_directory()

    def close(self) -> None:
        self._disk.close()


class Unhurried(Machine):
    """Its state takes 0.3 s to unpack, and who does it is noted."""

    unpacked_by: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.unpacked_by = []

    def unpack(self, data: bytes) -> Callable[[], None]:
        self.unpacked_by.append(threading.get_ident())
        time.sleep(0.3)
        return super().unpack(data)


def queued_s() -> float:
    """For how long this thread was ready to run and another process had the core."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


async def test_a_sync_of_50_ms_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    disk = SlowDisk(tmp_path / "a")
    network = MemoryNetwork()
    me = NodeId("a")
    log = ServerLog(
        directory=disk,
        mesh="m",
        me=me,
        machine=Machine(),
        transport=network.transport(me, lambda *_: True, lambda peer: [], Silent()),
        servers=lambda: [me],
        founding=True,
        settings=RaftSettings(snapshot_entries=5, retain_entries=1),
        on_applied=lambda index: None,
        on_leadership=lambda leads: None,
    )
    stalls = 0

    async def pulse() -> None:
        nonlocal stalls
        while True:
            began_s = time.perf_counter() - queued_s()
            await trio.sleep(0.001)
            stalls += time.perf_counter() - queued_s() - began_s > FSYNC_S

    async with trio.open_nursery() as nursery:
        await nursery.start(log.serve)
        await until(log.leads, "it leads")
        nursery.start_soon(pulse)
        before = disk.syncs
        for number in range(15):
            assert isinstance(await log.propose(me, codec.encode(number), timeout_s=PATIENCE_S), Committed)
        await until(lambda: log.status().first > 5, "snapshots were written and the log was trimmed")
        nursery.cancel_scope.cancel()
    disk.close()
    assert disk.touches_from_loop == 0
    assert disk.syncs - before >= 15
    # A busy machine may stall now and then; a loop that syncs stalls each time.
    assert stalls * 4 < disk.syncs - before, f"{stalls} stalls of over 50 ms in {disk.syncs - before} syncs"


async def test_a_large_state_is_unpacked_beside_the_loop_at_the_start_and_when_it_arrives(tmp_path: Path) -> None:
    settings = RaftSettings(
        election_min_s=0.3, election_max_s=0.6, heartbeat_s=0.06, snapshot_entries=10, retain_entries=1
    )
    machines: list[Unhurried] = []

    class Large(Mesh):
        def log(self, node: NodeId, transport: object) -> ServerLog:
            log = super().log(node, transport)  # type: ignore[arg-type]
            self.machines[node] = log._machine = Unhurried()
            machines.append(self.machines[node])  # type: ignore[arg-type]
            return log

    async with trio.open_nursery() as nursery:
        mesh = Large(tmp_path, nursery, settings)
        await mesh.start("a", "b", "c")
        leader = await mesh.formed(3)
        away = next(name for name in mesh.servers if name != leader)
        await mesh.stop(away)
        for number in range(25):
            assert isinstance(await mesh.propose(leader, str(number)), Committed)
        await until(lambda: mesh.logs[leader].status().first > 15, "the log is trimmed")
        for _ in range(2):
            await mesh.start(away)
            await until(lambda: mesh.machines[away].seen == mesh.machines[leader].seen, "it has everything")
            await mesh.stop(away)
        nursery.cancel_scope.cancel()
    unpacked = [thread for machine in machines for thread in machine.unpacked_by]
    assert len(unpacked) >= 2
    assert threading.get_ident() not in unpacked


class LongestStep(trio.abc.Instrument):
    """CPU time of the loop's own thread, which does not depend on who else uses the machine."""

    def __init__(self) -> None:
        self.ms = 0.0
        self.task = ""
        self._began_s: float | None = None  # the step that adds this began unseen, and is not measured

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began_s = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._began_s is None:
            return
        if (took_ms := (time.thread_time() - self._began_s) * 1000) > self.ms:
            self.ms, self.task = took_ms, task.name


@contextmanager
def frozen() -> Iterator[None]:
    """As in an agent: the collector does not look at what was there before, here pytest and all its tests."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Queue(queue.Machine):
    """The real one; who takes replaced states apart is noted."""

    def __init__(self, apart_by: list[int]) -> None:
        super().__init__()
        self._apart_by = apart_by

    def unpack(self, data: bytes) -> Callable[[], Callable[[], None]]:
        restore, apart_by = super().unpack(data), self._apart_by

        def replace() -> Callable[[], None]:
            take_apart = restore()
            self._apart_by = apart_by
            return lambda: (take_apart(), apart_by.append(threading.get_ident()))[0]

        return replace


class Queues(Mesh):
    """Servers with the real queue."""

    queues: dict[NodeId, Queue]
    apart_by: list[int]

    def log(self, node: NodeId, transport: MemoryTransport) -> ServerLog:
        log = super().log(node, transport)
        machine = Queue(self.apart_by)
        log._machine = machine
        replica = Replica(log, machine, lambda events: None)
        log._on_applied = replica.applied
        self.queues[node] = machine
        return log

    async def perform(self, node: NodeId, command: Command) -> None:
        result = await self.logs[node].propose(node, codec.encode(command), timeout_s=PATIENCE_S)
        assert isinstance(result, Committed)

    async def submit(self, node: NodeId) -> JobId:
        job = new_job_id(wall_clock_ms(), os.urandom(10))
        await self.perform(node, Submit(job, JobSpec(backend=("wasm",), run=Run(args=("work",)))))
        return job

    def live_jobs(self, node: NodeId) -> int:
        return int(self.queues[node].answer(GetSummary()).live_jobs)


async def test_no_step_of_the_loop_is_long_with_many_live_jobs(tmp_path: Path) -> None:
    longest = LongestStep()
    settings = RaftSettings(
        election_min_s=2.0, election_max_s=4.0, contact_s=2.0, snapshot_entries=20, retain_entries=1, pinned_s=1.0
    )
    with frozen():
        async with trio.open_nursery() as nursery:
            mesh = Queues(tmp_path, nursery, settings)
            mesh.queues, mesh.apart_by = {}, []
            leader, away = NodeId("a"), NodeId("b")
            await mesh.start(leader)
            await mesh.formed(1)
            await mesh.perform(leader, Found("m", Member(leader, leader, (Role.SERVER, Role.WORKER))))
            trio.lowlevel.add_instrument(longest)

            async def submit_share(count: int) -> None:
                for _ in range(count):
                    await mesh.submit(leader)

            async with trio.open_nursery() as submitters:
                for _ in range(300):
                    submitters.start_soon(submit_share, LIVE_JOBS // 300)

            # The first time its state is empty, the second time a full one is replaced.
            for _ in range(2):
                await mesh.start(away)
                await until(lambda: mesh.logs[away].position == mesh.logs[leader].position, "it has everything")
                assert mesh.live_jobs(away) == LIVE_JOBS
                await until(lambda: bool(mesh.apart_by), "the replaced state is taken apart")
                assert threading.get_ident() not in mesh.apart_by
                mesh.apart_by.clear()
                last = mesh.logs[away].position
                await mesh.stop(away)
                while mesh.logs[leader].status().first <= last:
                    await mesh.perform(leader, Cancel(await mesh.submit(leader)))
            for states in ((), (TaskState.RUNNING,)):
                before: JobId | None = None
                while (page := mesh.queues[leader].answer(ListJobs(states, limit=PAGE_MAX, before=before))).next:
                    before = page.next
                    await trio.lowlevel.checkpoint()
            trio.lowlevel.remove_instrument(longest)
            gc.collect()
            objects_looked_at = len(gc.get_objects())
            nursery.cancel_scope.cancel()
    # Each costs a full collection a quarter of a microsecond; a job with its spec once was eight of them.
    assert objects_looked_at < LIVE_JOBS
    assert longest.ms < STEP_MS_MAX, f"{longest.ms:.1f} ms of CPU time in a step of {longest.task}"
