"""A slow disk is no reason for an election; one that hangs must not be led by."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from meshd import codec
from meshd.model import NodeId
from meshd.net.memory import MemoryTransport
from meshd.ports import Committed
from meshd.raft.log import ServerLog
from meshd.raft.settings import RaftSettings
from meshd.raft.storage.disk import DirectoryDisk, OpenFile
from tests.integration.test_raft_log import Mesh, until

HANGS_S = 1.6
SETTINGS = RaftSettings(election_min_s=0.4, election_max_s=0.8, heartbeat_s=0.08, contact_s=0.7, disk_hangs_s=HANGS_S)
SLOW_S = 1.1
"""Longer than any election timeout, and than contact lasts without an answer."""


class HangingFile:
    def __init__(self, disk: HangingDisk, file: OpenFile) -> None:
        self._disk = disk
        self.write_at, self.reserve, self.close = file.write_at, file.reserve, file.close
        self._sync = file.sync

    def sync(self) -> None:
        if self._disk.runs.is_set():
            self._sync()
        else:
            self._disk.hangs.set()
            self._disk.runs.wait()
            self._sync()


class HangingDisk(DirectoryDisk):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.runs, self.hangs = threading.Event(), threading.Event()
        self.runs.set()

    def open(self, name: str) -> HangingFile:
        return HangingFile(self, super().open(name))


class Hanging(Mesh):
    disks: dict[NodeId, HangingDisk]

    def log(self, node: NodeId, transport: MemoryTransport) -> ServerLog:
        log = super().log(node, transport)
        self.disks[node] = HangingDisk(self.directory / node)
        log._directory = self.disks[node]
        return log


@asynccontextmanager
async def meshed(directory: Path) -> AsyncIterator[tuple[Hanging, NodeId]]:
    async with trio.open_nursery() as nursery:
        mesh = Hanging(directory, nursery, SETTINGS)
        mesh.disks = {}
        await mesh.start("a", "b", "c")
        leader = await mesh.formed(3)
        assert isinstance(await mesh.propose(leader, "before"), Committed)
        try:
            yield mesh, leader
        finally:
            for disk in mesh.disks.values():
                disk.runs.set()
            nursery.cancel_scope.cancel()


async def hang(mesh: Hanging, node: NodeId) -> None:
    """Its next sync does not come back, and that is under way."""
    disk = mesh.disks[node]
    disk.hangs.clear()
    disk.runs.clear()
    # What a leader writes, all write.
    with trio.move_on_after(0.1):
        await mesh.logs[mesh.leader() or node].propose(node, codec.encode("hangs"), timeout_s=0.1)
    await until(disk.hangs.is_set, "the disk hangs")


async def test_a_leader_with_a_slow_disk_goes_on_leading(tmp_path: Path) -> None:
    async with meshed(tmp_path) as (mesh, leader):
        term = mesh.logs[leader].term
        await hang(mesh, leader)
        for _ in range(int(SLOW_S / 0.05)):
            await trio.sleep(0.05)
            assert mesh.logs[leader].leads(), "its rounds are answered meanwhile"
        mesh.disks[leader].runs.set()
        assert isinstance(await mesh.propose(leader, "after"), Committed)
        assert {log.term for log in mesh.logs.values()} == {term}


async def test_followers_with_slow_disks_cost_the_leader_no_contact(tmp_path: Path) -> None:
    async with meshed(tmp_path) as (mesh, leader):
        term = mesh.logs[leader].term
        others = [node for node in mesh.servers if node != leader]
        for node in others:
            await hang(mesh, node)
        for _ in range(int(SLOW_S / 0.05)):
            await trio.sleep(0.05)
            assert mesh.logs[leader].leads(), "they answer rounds meanwhile"
        for node in others:
            mesh.disks[node].runs.set()
        assert isinstance(await mesh.propose(leader, "after"), Committed)
        assert {log.term for log in mesh.logs.values()} == {term}


async def test_a_leader_whose_disk_hangs_steps_down_and_another_leads(tmp_path: Path) -> None:
    async with meshed(tmp_path) as (mesh, leader):
        await hang(mesh, leader)
        with trio.fail_after(HANGS_S + 1.0):
            await until(lambda: not mesh.logs[leader].leads(), "it leads no more")
        await until(lambda: mesh.leader() not in (None, leader), "another leads, though the disk still hangs")
        assert isinstance(await mesh.propose(mesh.leader() or "", "without it"), Committed)
        mesh.disks[leader].runs.set()
        await mesh.logs[leader].barrier(timeout_s=5)
        assert mesh.machines[leader].seen[-1].endswith("without it")


async def test_a_follower_whose_disk_hung_deposes_nobody_when_it_is_back(tmp_path: Path) -> None:
    async with meshed(tmp_path) as (mesh, leader):
        term = mesh.logs[leader].term
        hung = next(node for node in mesh.servers if node != leader)
        await hang(mesh, hung)
        await trio.sleep(HANGS_S + 0.8)
        assert isinstance(await mesh.propose(leader, "meanwhile"), Committed)
        mesh.disks[hung].runs.set()
        await until(lambda: mesh.machines[hung].seen == mesh.machines[leader].seen, "it has everything")
        await trio.sleep(0.5)
        assert mesh.logs[leader].leads()
        assert {log.term for log in mesh.logs.values()} == {term}
