"""The disk may be slow; the loop it serves may not be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import trio

from meshd import codec
from meshd.model import NodeId
from meshd.net.memory import MemoryNetwork
from meshd.ports import Committed
from meshd.raft.disk import DirectoryDisk, OpenFile
from meshd.raft.log import ServerLog
from meshd.raft.settings import RaftSettings
from tests.integration.test_raft_log import PATIENCE_S, Machine, Mesh, Silent, until

FSYNC_S = 0.05


class SlowFile:
    def __init__(self, disk: SlowDisk, file: OpenFile) -> None:
        self._disk = disk
        self._file = file

    def write_at(self, offset: int, data: bytes) -> None:
        self._disk.seen()
        self._file.write_at(offset, data)

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
            began = time.perf_counter()
            await trio.sleep(0.001)
            stalls += time.perf_counter() - began > FSYNC_S

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
