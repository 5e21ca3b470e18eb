"""A sole voter that may have lost its last frame asks every server that its state knows for it.

Nobody else could have written what follows its log, so whatever a server holds behind it is
its own. A configuration cannot be there: that leaves only when a later frame proves its own
(protocol.md 9). Who does not answer for half a minute is not waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from meshd.errors import PeerFault
from meshd.model import NodeId
from meshd.raft.feeding import APPEND_BYTES_MAX
from meshd.raft.messages import MEMBERSHIP, Entry, Fetch, Fetched, VoterId, node_of
from meshd.raft.pysyncobj_state import RaftState

WAIT_S = 30.0
"""A server that lost power with this one is back by then, or nobody knows when."""


class Witnesses:
    def __init__(self, raft: RaftState, servers: Callable[[], Collection[NodeId]]) -> None:
        self._raft = raft
        self._servers = servers
        self._until_s: float | None = None
        self._have_no_more: set[NodeId] = set()

    def have_answered(self) -> bool:
        """All have, or were waited for; asks those that did not."""
        raft = self._raft
        if self._until_s is None:
            # Alone it has committed whatever it had: only now does its state know all servers.
            raft.commit = raft.last
            self._until_s = raft.now() + WAIT_S
        if raft.applied < raft.commit:
            return False
        missing = {*self._servers()} - {node_of(raft.me)} - self._have_no_more
        for peer in sorted(raft.connected):
            if node_of(peer) in missing:
                raft.send(peer, Fetch(raft.last, raft.last_term))
        return not missing or raft.now() >= self._until_s

    def on_fetched(self, peer: VoterId, m: Fetched) -> None:
        raft = self._raft
        if not raft.is_alone_in_doubt or raft.is_leader or (m.index, m.of_term) != (raft.last, raft.last_term):
            return
        if not m.entries:
            self._have_no_more.add(node_of(peer))
            return
        previous = m.of_term
        for number, (command, index, term) in enumerate(m.entries, 1):
            if index != m.index + number or term < previous or command[:1] == MEMBERSHIP:
                raise PeerFault(f"{peer} sent what cannot follow entry {m.index}")
            previous = term
        if previous > raft.term:
            raft.set_term(previous, None)
        for entry in m.entries:
            raft.add(entry)
        raft.commit = raft.last
        self._have_no_more.clear()


def on_fetch(raft: RaftState, peer: VoterId, m: Fetch) -> None:
    """Any server answers with what it holds behind that entry."""
    entries: list[Entry] = []
    if raft.first <= m.index <= raft.last and raft.term_at(m.index) == m.of_term:
        size, start = 0, m.index + 1 - raft.first
        for entry in raft.log[start : start + raft.settings.append_entries]:
            entries.append(entry)
            size += len(entry[0])
            if size > APPEND_BYTES_MAX:
                break
    raft.send(peer, Fetched(m.index, m.of_term, tuple(entries)))
