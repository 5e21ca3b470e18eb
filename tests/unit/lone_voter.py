"""One engine without a mesh around it: its disk is memory, its clock is set by hand, what it says is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from meshd.raft.engine import Engine
from meshd.raft.messages import RaftMessage, VoterId
from meshd.raft.settings import RaftSettings
from meshd.raft.storage.frames import LocalHeader
from meshd.raft.storage.journal import Journal, create_journal
from meshd.testing.raft_disk import MemoryDisk


class LoneVoter(Engine):
    """At second 100, connected to all other voters, with one entry in its log when it is not given another."""

    def __init__(
        self,
        me: VoterId,
        voters: Sequence[VoterId],
        *,
        journal: Journal | None = None,
        apply: Callable[[int, bytes], list[bytes]] = lambda index, batch: [],
        now: Callable[[], float] | None = None,
    ) -> None:
        self.clock_s = 100.0
        self.sent: list[tuple[VoterId, RaftMessage]] = []
        self.bugs: list[int] = []
        self.journal = journal or create_journal(MemoryDisk(), LocalHeader("m", "01", 1, "aa"))

        def send(peer: VoterId, message: RaftMessage) -> bool:
            self.sent.append((peer, message))
            return True

        super().__init__(
            me=me, voters=voters, journal=self.journal, apply=apply, digest=lambda: "00", send=send, snapshot=lambda: None,
            now=now or (lambda: self.clock_s), wall_ms=lambda: 0, random=Random(1), settings=RaftSettings(),
            on_bug=lambda index, _: self.bugs.append(index),
        )  # fmt: skip
        for voter in voters:
            self.peer_up(voter)

    def turn(self, seconds: float = 0.0) -> None:
        self.clock_s += seconds
        self.doTick(0.0)
        self.journal.commit()
        self.synced()
