"""What stays in the log for peers that are far behind, for how long, and when that slows the others down.

A snapshot takes time to arrive, and the log behind it goes on growing and being trimmed.
If what follows the snapshot is gone by then, only a newer one helps, which is too late in
its turn: under load such a peer never comes back (stock: every compaction throws running
transfers away and trims). So a snapshot on its way is pinned with what follows it, until
its peer is level; so are the entries of a peer that lags without one. Not for ever: one
that stands still is let go, and so is one that lets the log grow too long. The second
time that this happens its link or disk carries less than the load, and submissions are
held to half of what it takes, then to a quarter, until it is through (protocol.md 9).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from meshd.raft.messages import VoterId
from meshd.raft.progress import Pin, Progress
from meshd.raft.pysyncobj_state import RaftState

BREAKS_FREE = 1
"""So often a peer may fall behind the log before the others wait for it."""
RATE_MIN = 1024.0
"""Bytes a second that may always be written: a peer that takes less is no reason to stop."""


class Pins:
    def __init__(self, raft: RaftState) -> None:
        self._raft = raft
        self.rate = inf
        """Bytes of commands a second that may be written."""

    def watch(self, peers: Mapping[VoterId, Progress]) -> None:
        """Once a round: who is far behind, who is level, and who has had its time."""
        for progress in peers.values():
            if self._is_level(progress):
                progress.pin, progress.breaks, progress.broken_at = None, 0, 0
            elif progress.pin is None:
                # After a break the log is trimmed first.
                if progress.transfer is not None or (progress.is_connected and progress.broken_at != self._raft.first):
                    now_s = self._raft.now()
                    progress.pin = Pin(self._raft.log.bytes_added, now_s, now_s)
            else:
                self._let_go(progress, progress.pin)
        self.rate = min((_allowed(progress) for progress in peers.values() if progress.is_connected), default=inf)

    def lowest(self, peers: Mapping[VoterId, Progress]) -> int | None:
        """The oldest entry behind which nothing may go."""
        pinned = [_needs_after(progress) for progress in peers.values() if progress.pin is not None]
        return min(pinned, default=None)

    def _is_level(self, progress: Progress) -> bool:
        return progress.transfer is None and self._raft.last - progress.match <= self._raft.settings.retain_entries

    def _let_go(self, progress: Progress, pin: Pin) -> None:
        raft, settings = self._raft, self._raft.settings
        has_outgrown = raft.log.bytes_added - pin.bytes_before > settings.pinned_bytes
        if has_outgrown or raft.now() - pin.advanced_s > settings.pinned_s:
            if has_outgrown:
                progress.breaks += 1
                progress.rate = pin.taken_bytes / (raft.now() - pin.began_s)
            progress.give_up()
            progress.broken_at = raft.first


def _allowed(progress: Progress) -> float:
    if progress.breaks <= BREAKS_FREE:
        return inf
    return max(RATE_MIN, progress.rate / 2.0 ** (progress.breaks - BREAKS_FREE))


def _needs_after(progress: Progress) -> int:
    if progress.transfer is not None:
        return progress.transfer.index
    return progress.match or progress.next - 1
