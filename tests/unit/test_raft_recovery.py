"""A recovery epoch begins from one server's disk: all that it had is there, and a power cut leaves the old or the new, never half."""

from __future__ import annotations

from itertools import count
from random import Random

import pytest
from msgspec import Raw

from meshd import codec
from meshd.errors import StartRefused
from meshd.model import NodeId, OnLost, TaskState
from meshd.raft.configurations import as_command
from meshd.raft.messages import AnyMessage, VoterId
from meshd.raft.server import Server
from meshd.raft.settings import RaftSettings
from meshd.raft.state.commands import Batch, Stamped, Submit
from meshd.raft.state.lineage import NUMBER_BITS, RECOVERIES_MAX, Lineage
from meshd.raft.state.machine import Machine
from meshd.raft.storage.disk import Disk
from meshd.raft.storage.frames import LocalHeader
from meshd.raft.storage.journal import create_journal, journal_lineage
from meshd.raft.storage.opening import open_log
from meshd.raft.storage.recovery import Kept, as_entry, batch_in, begin_epoch, jobs_to_hold, read_kept
from meshd.raft.storage.rehearsal import Rehearsal
from meshd.raft.storage.snapshot import Image, pack_image, save
from meshd.raft.surroundings import Clocks
from meshd.raft.turn import Turns
from meshd.testing.raft_disk import MemoryDisk, PowerCut
from tests.scene import WALL_MS, A, B, C, Scene, job_id, spec

ME = VoterId(f"{A}/01")
VOTERS = (ME, VoterId(f"{B}/02"), VoterId(f"{C}/03"))


def a_life() -> Scene:
    """Three servers, one job that is leased and may not run twice, one that is ready, one that may run again."""
    scene = Scene(A, B, C)
    scene.submit(spec(on_lost=OnLost.WAIT))
    scene.submit(spec(on_lost=OnLost.FAIL, backend=("process",)))
    scene.submit(spec(count=2))
    return scene


def written(scene: Scene, *, snapshot_at: int = 0) -> MemoryDisk:
    """That life as the log of one of three voters; its last entry is known to be committed by nobody."""
    disk = MemoryDisk()
    journal = create_journal(disk, LocalHeader("m", "01", 1, "aa", founding=(ME,)))
    journal.setCurrentTerm(4, VOTERS[1])
    journal.add(as_command(VOTERS), 2, 3)
    for index, batch in enumerate(scene.entries, start=3):
        journal.add(as_entry(batch), index, 4)
        journal.commit()
    if snapshot_at:
        machine = Machine()
        for index, batch in enumerate(scene.entries[: snapshot_at - 2], start=3):
            machine.apply(index, batch)
        save(disk, pack_image(Image("m", snapshot_at, 4, VOTERS, machine.capture()())), journal.header)
    journal.close()
    return disk


def kept(disk: Disk) -> Kept:
    return read_kept(disk, mesh="m", me=A, random="bb")


def recovered(disk: MemoryDisk, random: str = "r1") -> Lineage:
    return begin_epoch(kept(disk), me=A, random=random, wall_ms=WALL_MS)


class Alone:
    """A server with nobody to speak to, turned on a clock of its own."""

    def __init__(self, disk: MemoryDisk) -> None:
        self.now = 0.0
        self.machine = Machine()
        lineage = journal_lineage(disk)
        assert lineage is not None
        self.journal, image = open_log(
            disk, mesh="m", lineage=lineage, me=A, is_founding=False, random="cc", incarnation=""
        )
        if image is not None:
            self.machine.restore(image.state)
        self.server = Server(
            node=A,
            journal=self.journal,
            image=image,
            machine=self.machine,
            links=self,
            servers=self.machine.server_ids,
            draining=tuple,
            zones=dict,
            settings=RaftSettings(),
            clocks=Clocks(lambda: self.now, lambda: WALL_MS, lambda: True),
            random=Random(1),
            packed=lambda: None,
            report=lambda event, fields: None,
        )
        self.turns = Turns(self.server, self.journal, disk, "m", self.machine, lambda: None)

    def send(self, peer: VoterId, message: AnyMessage) -> bool:
        return False

    def take(self) -> None:
        return None

    def connected(self) -> list[VoterId]:
        return []

    def reach(self, peers: object) -> None: ...

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += 0.02
            for work in self.turns.turn():
                work()


def test_the_recovery_writes_its_batch_as_the_engine_writes_one() -> None:
    disk = written(a_life())
    recovered(disk)
    alone = Alone(disk)
    alone.run(3)
    alone.server.submit(A, codec.encode(Submit(job_id(9), spec())), lambda result: None)
    alone.run(1)
    [*_, command] = [command for command, _, _ in alone.journal[1:] if batch_in(command) is not None]
    batch = batch_in(command)
    assert batch is not None and as_entry(batch) == command
    assert codec.decode(batch, Batch).commands[0] == Stamped(A, Raw(codec.encode(Submit(job_id(9), spec()))))


@pytest.mark.parametrize("snapshot_at", [0, 6])
def test_a_server_left_alone_leads_again_with_everything_that_it_had(snapshot_at: int) -> None:
    scene = a_life()
    disk = written(scene, snapshot_at=snapshot_at)
    assert kept(disk).voters == VOTERS
    before = Alone(disk)
    before.run(10)
    assert not before.server.engine.leads(), "one of three voters led"

    assert recovered(disk) == ("r1",)
    after = Alone(disk)
    after.run(3)
    assert after.server.engine.leads() and after.server.engine.voters == (ME,)
    assert after.machine.lineage == ("r1",)
    assert after.machine.fence >> NUMBER_BITS == 1
    scene.machine = after.machine
    held, ready, rerun = job_id(1), job_id(2), job_id(3)
    assert scene.job(held).reason and scene.job(ready).reason and not scene.job(rerun).reason
    assert scene.state(held) is TaskState.HELD


def test_the_epoch_begins_in_a_term_above_all_that_this_server_has_promised() -> None:
    disk = written(a_life())
    again = kept(disk)
    again.journal.setCurrentTerm(9, VOTERS[2])
    again.journal.commit()
    recovered(disk)
    found = kept(disk)
    assert found.newest[0] == 10 == found.journal.getCurrentTerm()
    terms = [term for _, _, term in found.journal[1:]]
    assert terms == sorted(terms)


def test_a_server_that_never_voted_recovers_from_its_copy() -> None:
    disk = MemoryDisk()
    journal = create_journal(disk, LocalHeader("m", "01", 1, "aa"))
    journal.add(as_command(VOTERS[1:2]), 2, 3)
    for index, batch in enumerate(a_life().entries, start=3):
        journal.add(as_entry(batch), index, 4)
    journal.commit()
    journal.close()
    assert kept(disk).voters == VOTERS[1:2]
    recovered(disk)
    alone = Alone(disk)
    alone.run(3)
    assert alone.server.engine.leads() and alone.server.engine.voters == (ME,)


def test_a_rehearsal_reads_and_recovers_as_the_disk_would_and_leaves_it_alone() -> None:
    disk = written(a_life(), snapshot_at=6)
    before = {name: disk.read(name) for name in disk.names()}
    rehearsal = Rehearsal(disk)
    found = kept(rehearsal)
    begin_epoch(found, me=A, random="r1", wall_ms=WALL_MS)
    again = kept(rehearsal)
    assert journal_lineage(rehearsal) == ("r1",) and again.voters == (ME,) and again.newest == (5, found.newest[1])
    assert {name: disk.read(name) for name in disk.names()} == before
    real = kept(disk)
    assert real.voters == VOTERS and real.journal[1:] == again.journal[1:-2]


def test_it_says_beforehand_what_it_will_hold() -> None:
    disk = written(a_life())
    found = kept(disk)
    assert found.voters == VOTERS and found.newest == (4, len(a_life().entries) + 2)
    assert {job.id for job in jobs_to_hold(found, me=A, random="r1", wall_ms=WALL_MS)} == {job_id(1), job_id(2)}
    assert journal_lineage(disk) == ()


def test_a_power_cut_at_any_step_leaves_the_old_epoch_or_the_new_one_never_half() -> None:
    entries = [as_command(VOTERS), *(as_entry(batch) for batch in a_life().entries)]
    seen = set()
    for cut, seed in ((cut, seed) for cut in count() for seed in range(6)):
        disk = written(a_life())
        disk.cut_in(cut)
        try:
            recovered(disk)
        except PowerCut:
            is_whole = False
        else:
            is_whole = True
        # Sometimes only the process dies, and the kernel keeps every byte.
        disk.be_killed() if seed == 0 else disk.lose_power(Random(f"{cut}-{seed}"))
        lineage = journal_lineage(disk)
        assert lineage in ((), ("r1",)) and (not is_whole or lineage == ("r1",))
        seen.add(lineage)
        found = kept(disk)
        commands = [command for command, _, _ in found.journal[1:]]
        assert commands[: len(entries)] == entries
        assert len(commands) == len(entries) + (2 if lineage else 0)
        assert found.voters == ((ME,) if lineage else VOTERS)
        assert found.machine.lineage == lineage
        # And from there it can be done again, to the end.
        assert begin_epoch(found, me=A, random="r2", wall_ms=WALL_MS) == (*lineage, "r2")
        assert kept(disk).machine.lineage == (*lineage, "r2")
        if is_whole and seed == 5:
            break
    assert cut > 8 and seen == {(), ("r1",)}


def test_a_journal_of_another_epoch_is_refused_with_the_way_out() -> None:
    disk = written(a_life())
    recovered(disk)
    for lineage in ((), ("other",), ("r1", "r2")):
        with pytest.raises(StartRefused) as refused:
            open_log(disk, mesh="m", lineage=lineage, me=A, is_founding=False, random="dd", incarnation="")
        assert "meshd rejoin" in refused.value.hint


def test_recovering_has_an_end_and_an_empty_directory_nothing_to_recover() -> None:
    with pytest.raises(StartRefused):
        kept(MemoryDisk())
    disk = written(a_life())
    for number in range(RECOVERIES_MAX):
        recovered(disk, f"r{number}")
    with pytest.raises(StartRefused, match="31 times"):
        recovered(disk, "one too many")
    assert kept(disk).machine.fence < 2**53


def test_doubt_ends_with_a_recovery() -> None:
    disk = MemoryDisk()
    journal = create_journal(disk, LocalHeader("m", "01", 1, "aa", founding=(ME,), is_in_doubt=True))
    journal.add(as_entry(Scene(NodeId(A)).entries[0]), 2, 1)
    journal.commit()
    recovered(disk)
    assert not kept(disk).journal.header.is_in_doubt
