"""What a server has said, or was counted for, it stands by: after a restart, a new leader, a snapshot (Raft's own safety).

`spoke` hears the frames that leave, `applies` what a leader takes for committed, `turned` sees the
log after each turn, `started` what a start has found on the disk. Who is in doubt may have lost something, says so, and begins anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshd.raft.messages import AnyMessage, Append, Appended, Entry, Vote, Voted, VoterId

if TYPE_CHECKING:
    from meshd.testing.servers import SimServer

LOSSES = ("what followed entry", "a vote may be lost")
"""Doubts of replay.py that no loss of power explains; a last frame that is damaged may be a torn one."""


@dataclass
class _Promise:
    term: int = 0
    """The highest that it has named as its own."""
    vote: VoterId | None = None
    """What it has said of its vote in that term."""
    acknowledged: int = 0
    """In that term."""
    led: tuple[int, int] = (0, 0)
    """The term in which it led a turn ago, and up to where it took entries for committed."""
    agreed: int = 0
    """Up to here its disk held what is committed."""
    tail: int = 0
    """The last entry of its log, which a snapshot was about to replace in part."""


class Promises:
    def __init__(self, breach: Callable[[str, str], None]) -> None:
        self._breach = breach
        self._promises: dict[VoterId, _Promise] = {}
        self._servers: dict[VoterId, SimServer] = {}
        """The newest process of each."""
        self._committed: dict[int, Entry] = {}
        self._last = 0

    def spoke(self, server: SimServer, peer: VoterId, message: AnyMessage) -> None:
        match message:
            case Vote(term=term, is_trial=False):
                self._says(server, term, vote=server.voter)
            case Voted(term=term, is_granted=True, is_trial=False):
                self._says(server, term, vote=peer)
            case Appended(term=term, is_ok=True, next=following):
                self._says(server, term, acknowledged=following - 1)
            case Voted(term=term) | Append(term=term) | Appended(term=term):
                self._says(server, term)

    def _says(self, server: SimServer, term: int, *, vote: VoterId | None = None, acknowledged: int = 0) -> None:
        promise = self._promises[server.voter]
        if term > promise.term:
            promise.term, promise.vote, promise.acknowledged = term, vote, acknowledged
        elif term == promise.term:
            if vote is not None and promise.vote not in (None, vote):
                self._breach("one vote a term", f"{server.node.name} gives {term} to {promise.vote} and to {vote}")
            promise.vote = vote or promise.vote
            promise.acknowledged = max(promise.acknowledged, acknowledged)

    def started(self, server: SimServer) -> None:
        """Before it says a word."""
        journal, name = server.journal, server.node.name
        self._servers[server.voter] = server
        if journal.is_in_doubt:
            if journal.doubt.startswith(LOSSES) and not server.node.has_rotted:
                self._breach("only rot loses what was synced", f"{name}: {journal.doubt}")
            self._promises[server.voter] = _Promise()
            return
        promise = self._promises.setdefault(server.voter, _Promise())
        term, vote = journal.getCurrentTerm(), journal.getVotedForNodeId()
        if term < promise.term:
            self._breach(
                "what was said is remembered", f"{name} starts in term {term}, and has spoken in {promise.term}"
            )
        if term == promise.term and promise.vote is not None and vote != promise.vote:
            self._breach(
                "what was said is remembered",
                f"{name} has given its vote of term {term} to {promise.vote}, and knows of {vote}",
            )
        self._nothing_is_gone(server, promise)

    def turned(self, server: SimServer) -> None:
        engine, promise = server.engine, self._promises[server.voter]
        first, log = engine.first, engine.log
        if engine.is_leader:
            led_term, commit = promise.led
            if led_term != engine.term and (engine.last < self._last or not self._agrees(server, self._last)):
                self._breach(
                    "a leader has all that is committed", f"{server.node.name} is elected without entry {self._last}"
                )
            if led_term == engine.term and engine.commit > commit and engine.term_at(engine.commit) != led_term:
                self._breach(
                    "a leader commits by its own term", f"{server.node.name} commits {engine.commit}, which is older"
                )
            promise.led = (engine.term, engine.commit)
            self._majorities_overlap(server)
        self._nothing_is_gone(server, promise)
        while self._last < engine.commit:
            self._last += 1
            if self._last > first:
                self._committed[self._last] = log[self._last - first]
        durable = min(server.journal.durable_index, self._last)
        promise.agreed = max(promise.agreed, min(first, durable))
        while promise.agreed < durable and self._agrees(server, promise.agreed + 1):
            promise.agreed += 1

    def gets_snapshot(self, server: SimServer, index: int) -> None:
        """It is about to go on from a leader's snapshot. What follows it in a log that agrees with it may have been acknowledged."""
        first, last = server.engine.first, server.engine.last
        agrees = first < index <= last and self._committed.get(index) == server.engine.log[index - first]
        self._promises[server.voter].tail = last if agrees else 0

    def restored(self, server: SimServer) -> None:
        promise = self._promises.get(server.voter)
        if promise is not None and server.engine.last < promise.tail:
            self._breach("a snapshot takes nothing back", f"{server.node.name} had entry {promise.tail}")

    def _majorities_overlap(self, leader: SimServer) -> None:
        """Of those who vote by what is committed, whoever knows of it, and by whatever may be committed next."""
        configurations = leader.engine.configurations
        decided = configurations.at(max(self._last, leader.engine.first))
        newest = configurations.voters
        if decided and len(decided) // 2 + 1 + len(newest) // 2 + 1 <= len({*decided, *newest}):
            self._breach("two majorities share a voter", f"{leader.node.name} goes from {decided} to {newest}")

    def _agrees(self, server: SimServer, index: int) -> bool:
        """What is committed at this index is in its log."""
        journal = server.journal
        first = journal[0][1]
        known = self._committed.get(index)
        return index <= first or known is None or (index <= journal[-1][1] and journal[index - first] == known)

    def _nothing_is_gone(self, server: SimServer, promise: _Promise) -> None:
        if server.journal.getCurrentTerm() == promise.term and server.journal[-1][1] < promise.acknowledged:
            self._breach(
                "what is acknowledged stays while its term lasts",
                f"{server.node.name} had everything up to {promise.acknowledged}, and has it no more",
            )
        if server.journal[-1][1] < promise.agreed or not self._agrees(server, promise.agreed):
            self._breach(
                "what is committed stays where it is",
                f"{server.node.name} had everything up to {promise.agreed} on its disk, and has it no more",
            )

    def applies(self, leader: SimServer, index: int) -> None:
        """It takes this entry for committed. Then, by what lies on the disks now, a majority refuses all who lack it."""
        engine = leader.engine
        if not engine.is_leader:
            return
        entry = engine.log[index - engine.first]
        voters = [voter for voter in leader.engine.voters if not self._is_in_doubt(voter)]
        ends = {voter: self._end(voter) for voter in voters}
        for voter in voters:
            server = self._servers.get(voter)
            if server is not None and self._holds(server, index, entry):
                continue
            supporters = [other for other in voters if ends[other] <= ends[voter]]
            if len(supporters) > len(leader.engine.voters) // 2:
                self._breach(
                    "nobody can lead without what is committed",
                    f"{leader.node.name} commits {index}; {voter}, whose log ends with {ends[voter]}, would be elected by {supporters}",
                )

    @staticmethod
    def _holds(server: SimServer, index: int, entry: Entry) -> bool:
        journal, first = server.journal, server.journal[0][1]
        return index <= first or (index <= journal.durable_index and journal[index - first] == entry)

    def _is_in_doubt(self, voter: VoterId) -> bool:
        return voter in self._servers and self._servers[voter].journal.is_in_doubt

    def _end(self, voter: VoterId) -> tuple[int, int]:
        """The term and the index of the last entry on its disk."""
        if (server := self._servers.get(voter)) is None:
            return 0, 0
        journal = server.journal
        index = max(journal.durable_index, journal[0][1])
        return journal[index - journal[0][1]][2], index
