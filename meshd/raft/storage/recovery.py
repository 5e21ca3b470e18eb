"""`meshd recover`, the log's side: what one server's disk holds, and the recovery epoch that begins from it.

    … entries, committed or not │ term + 1, vote for itself │ voters: itself alone │ Recovered │
                                └──────────── one segment, there or not there ────────────────┘

Nothing of the log is given up, also not what nobody knows to be committed: it may have been
acknowledged. The new epoch is one rename of a synced file, so a power cut leaves the old one or
the new one (protocol.md 10).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec import Raw

from meshd import codec
from meshd.errors import StartRefused
from meshd.model import NodeId, TaskState
from meshd.raft.configurations import Configurations, as_command
from meshd.raft.messages import REPLICATED, VoterId, voter_id
from meshd.raft.state.commands import Batch, Recovered, Stamped
from meshd.raft.state.lineage import RECOVERIES_MAX, Lineage
from meshd.raft.state.machine import Machine
from meshd.raft.storage.disk import Disk
from meshd.raft.storage.journal import Journal, journal_lineage
from meshd.raft.storage.opening import open_log
from meshd.views import PAGE_MAX, JobPage, JobView, ListJobs

_APPLY_BATCH = 0
"""The number of the engine's one replicated method, as PySyncObj encodes a call of it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is on this server's disk; its journal is open, and the machine has applied all of it."""

    journal: Journal
    machine: Machine
    voters: tuple[VoterId, ...]
    """The newest configuration."""

    @property
    def newest(self) -> tuple[int, int]:
        """(term, index) of the last entry."""
        _, index, term = self.journal[-1]
        return term, index


def read_kept(disk: Disk, *, mesh: str, me: NodeId, random: str) -> Kept:
    """Blocks, for as long as replaying the whole log takes. Raises Corrupt, StartRefused."""
    lineage = journal_lineage(disk)
    if lineage is None:
        raise StartRefused("this directory holds no journal", hint="recover from another server's directory")
    journal, image = open_log(
        disk, mesh=mesh, lineage=lineage, me=me, is_founding=False, random=random, incarnation="", is_recovery=True
    )
    machine = Machine()
    if image is not None:
        machine.restore(image.state)
    configurations = Configurations(journal[0][1], journal.header.founding if image is None else image.voters)
    for entry in journal[1:]:
        configurations.note(entry)
        if (batch := batch_in(entry[0])) is not None:
            machine.apply(entry[1], batch)
            machine.take_events()
    return Kept(journal, machine, configurations.voters)


def begin_epoch(kept: Kept, *, me: NodeId, random: str, wall_ms: int) -> Lineage:
    """A recovery epoch in which this server votes alone; durable when this returns (blocks). Raises Corrupt, StartRefused."""
    journal = kept.journal
    if len(journal.header.lineage) >= RECOVERIES_MAX:
        raise StartRefused(
            f"this mesh has been recovered {RECOVERIES_MAX} times, and a fence counts no further",
            hint="found a new mesh, and submit there what is unfinished",
        )
    lineage = (*journal.header.lineage, random)
    alone = voter_id(me, journal.header.incarnation)
    term, index = kept.newest
    term = max(term, journal.getCurrentTerm()) + 1
    journal.setCurrentTerm(term, alone)
    journal.add(as_command([alone]), index + 1, term)
    journal.add(as_entry(_first_batch(kept, me, lineage, wall_ms)), index + 2, term)
    journal.begin_epoch(lineage)
    return lineage


def jobs_to_hold(kept: Kept, *, me: NodeId, random: str, wall_ms: int) -> Iterator[JobView]:
    """What the recovery will hold until it is released; the kept machine has applied it afterwards."""
    batch = _first_batch(kept, me, (*kept.journal.header.lineage, random), wall_ms)
    kept.machine.apply(kept.newest[1] + 2, batch)
    query = ListJobs(states=(TaskState.HELD,), limit=PAGE_MAX)
    while True:
        page: JobPage = kept.machine.answer(query)
        yield from (job for job in page.jobs if job.reason)
        if page.next is None:
            return
        query = ListJobs(states=(TaskState.HELD,), limit=PAGE_MAX, before=page.next)


def _first_batch(kept: Kept, me: NodeId, lineage: Lineage, wall_ms: int) -> bytes:
    # No time passes in it: the state's clocks go on when a leader stamps its first own batch.
    return codec.encode(Batch(0, kept.machine.wall_ms, (Stamped(me, Raw(codec.encode(Recovered(lineage, wall_ms)))),)))


def as_entry(batch: bytes) -> bytes:
    """The batch as a command of the log, as the engine itself writes it."""
    return REPLICATED + codec.pack((_APPLY_BATCH, (batch,)))


def batch_in(command: bytes) -> bytes | None:
    """The batch that an entry carries; None for the engine's own entries."""
    if command[:1] != REPLICATED:
        return None
    _, (batch,) = codec.unpack(command[1:])
    assert isinstance(batch, bytes)
    return batch
