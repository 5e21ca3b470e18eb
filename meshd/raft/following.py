"""Following: what a leader's entries do to the log of a server that hears them.

Entries are taken only where both logs agree just before them; ours are cut only where
they truly contradict (F1), and never below what is committed: there the server stops.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from meshd.errors import Corrupt, InvalidRequest, PeerFault
from meshd.raft.configurations import voters_of
from meshd.raft.election import Elections
from meshd.raft.messages import Append, Appended, Entry, VoterId
from meshd.raft.pysyncobj_state import RaftState
from meshd.raft.storage.journal import RECORD_BYTES


class Following:
    def __init__(self, raft: RaftState, elections: Elections) -> None:
        self._raft = raft
        self._elections = elections
        self._said: tuple[VoterId, Appended] | None = None
        """The last answer, and to whom, but for the time in it."""

    def peer_up(self) -> None:
        """On a new stream an answer is one more: what was said on an older one may be lost."""
        self._said = None

    def on_append(self, peer: VoterId, m: Append) -> None:
        raft = self._raft
        if any(e[1] != m.prev_index + k or not m.prev_term <= e[2] <= m.term for k, e in enumerate(m.entries, 1)):
            raise PeerFault(f"{peer} sent entries out of order after {m.prev_index}")
        _check_configurations(peer, m.entries)
        if m.term < raft.term:
            raft.send(peer, Appended(raft.term, m.round, m.sent_ms, False, 0, is_in_doubt=raft.is_in_doubt))
            return
        self._elections.hear(peer, m.term)
        fits = not raft.is_disk_full or raft.has_room_for(sum(len(e[0]) + RECORD_BYTES for e in m.entries))
        is_ok, next_index = self._merge(peer, m) if m.prev_index and fits else (False, 0)
        raft.checkpoints.hear(m.agreed, m.agreed_state)
        if is_ok:
            # F2: entries behind those of this message may be ours alone.
            raft.commit = max(raft.commit, min(m.commit, next_index - 1))
            if m.ends_doubt:
                raft.log.end_doubt()
        answer = Appended(
            raft.term, m.round, 0, is_ok, next_index, 0, *raft.checkpoints.newest, raft.is_in_doubt, raft.is_disk_full
        )
        # The news of a commit between two rounds needs no answer: it would say again what the last one did.
        if not m.entries and self._said == (peer, answer):
            return
        if raft.send(peer, structs.replace(answer, sent_ms=m.sent_ms, wall_ms=raft.wall_ms())):
            self._said = (peer, answer)

    def _merge(self, peer: VoterId, m: Append) -> tuple[bool, int]:
        """(whether our log now agrees with this message, the next entry to send)."""
        raft, log, first = self._raft, self._raft.log, self._raft.first
        prev_index, prev_term, entries = m.prev_index, m.prev_term, m.entries
        if prev_index < first:
            # What a snapshot covers is committed, so it is the leader's own.
            covered = first - prev_index
            if len(entries) < covered:
                return False, raft.commit + 1
            prev_index, prev_term, entries = first, entries[covered - 1][2], entries[covered:]
        if prev_index > raft.last:
            return False, raft.last + 1
        if log[prev_index - first][2] != prev_term:
            if prev_index <= raft.commit:
                raise Corrupt(f"{peer} contradicts entry {prev_index}, which is committed here")
            return False, raft.commit + 1  # F3: at once, not one step back for each round trip
        agreed = 0
        for _, index, term in entries:
            if index > raft.last or log[index - first][2] != term:
                break
            agreed += 1
        fresh = entries[agreed:]
        if fresh and fresh[0][1] <= raft.last:
            if fresh[0][1] <= raft.commit:
                raise Corrupt(f"{peer} contradicts entry {fresh[0][1]}, which is committed here")
            raft.cut_from(fresh[0][1])
        for entry in fresh:
            raft.add(entry)
        if fresh:
            raft.received_s = raft.now()
        return True, prev_index + len(entries) + 1


def _check_configurations(peer: VoterId, entries: Sequence[Entry]) -> None:
    """Before anything changes: a configuration counts from the moment it is in the log. Raises PeerFault."""
    try:
        for command, _, _ in entries:
            voters_of(command)
    except InvalidRequest as error:
        raise PeerFault(f"{peer} sent nonsense for a configuration: {error.message}") from error
