"""A snapshot that arrives from the leader, because this server is too far behind for entries.

Its ranges are collected in order; the owner verifies the whole, writes it, and installs
it. Nothing of the own log goes before the snapshot is durable here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshd.errors import PeerFault
from meshd.raft.election import Elections
from meshd.raft.messages import Appended, Chunk, Received, VoterId
from meshd.raft.progress import CHUNK_BYTES
from meshd.raft.pysyncobj_state import RaftState
from meshd.raft.storage.snapshot import Image


@dataclass(slots=True)
class _Incoming:
    index: int
    term: int
    size: int
    digest: bytes
    data: bytearray


@dataclass(frozen=True, slots=True)
class Arrived:
    """A whole snapshot, not yet verified: the owner verifies it, writes it, and calls `install`."""

    peer: VoterId
    data: bytearray
    digest: bytes


class Arrival:
    def __init__(self, raft: RaftState, elections: Elections) -> None:
        self._raft = raft
        self._elections = elections
        self._incoming: _Incoming | None = None
        self.arrived: Arrived | None = None

    def on_chunk(self, peer: VoterId, m: Chunk) -> None:
        raft = self._raft
        if m.offset + len(m.data) > m.size or len(m.data) > CHUNK_BYTES:
            raise PeerFault(f"{peer} sent a range outside of its snapshot")
        if m.term < raft.term:
            raft.send(peer, Appended(raft.term, m.round, m.sent_ms, False, 0, is_in_doubt=raft.is_in_doubt))
            return
        self._elections.hear(peer, m.term)
        if m.index <= raft.commit:
            self._acknowledge(peer, m.index, m.round, m.sent_ms)
            return
        incoming = self._incoming
        if incoming is None or (incoming.index, incoming.digest) != (m.index, m.digest):
            if self.arrived is None:
                incoming = self._incoming = _Incoming(m.index, m.snapshot_term, m.size, m.digest, bytearray())
            else:
                incoming = None  # one that is being verified comes first; this one is asked for again
        has = 0
        if incoming is not None:
            if m.offset == len(incoming.data) < incoming.size:
                incoming.data += m.data
                if len(incoming.data) == incoming.size:
                    self.arrived = Arrived(peer, incoming.data, incoming.digest)
            has = len(incoming.data)
        raft.send(peer, Received(raft.term, m.round, m.sent_ms, m.index, has, raft.is_in_doubt))

    def install(self, image: Image, restore: Callable[[], None]) -> bool:
        """Whether it was news: F12, a snapshot speaks up to its own index only, and never takes anything back."""
        self._incoming = self.arrived = None
        raft = self._raft
        if image.index <= raft.commit:
            return False
        raft.begin_at(image.index, image.term, image.voters)
        restore()
        raft.received_s = raft.now()
        return True

    def acknowledge(self, peer: VoterId, index: int) -> None:
        """To whom it came from, while that is the leader: entries go on after it."""
        raft = self._raft
        if peer == raft.leader:
            self._acknowledge(peer, index, 0, 0)

    def _acknowledge(self, peer: VoterId, index: int, round_: int, sent_ms: int) -> None:
        raft = self._raft
        answer = Appended(raft.term, round_, sent_ms, True, index + 1, raft.wall_ms(), is_in_doubt=raft.is_in_doubt)
        raft.send(peer, answer)

    def discard(self) -> None:
        """It was not what its digest says: let it come again."""
        self.arrived = self._incoming = None
