"""How long a server's Raft waits, and when it writes its state down."""

from __future__ import annotations

from dataclasses import dataclass

from meshd.raft.storage.segments import JournalSizes
from meshd.room import FREE_BYTES_MIN


@dataclass(frozen=True, slots=True)
class RaftSettings:
    """Seconds. Elections well above what a loaded loop stalls for; heartbeats four to the shortest of them."""

    election_min_s: float = 0.8
    election_max_s: float = 1.3
    """Half a second apart is enough, since of two that ask at once one gives way (election.py)."""
    heartbeat_s: float = 0.15
    contact_s: float = 1.0
    append_entries: int = 512
    """In one message at most."""
    disk_hangs_s: float = 2.0
    """A sync that takes longer ends the leadership: it is no slow disk any more."""
    apply_slice_s: float = 0.008
    """Applying stops after so long and goes on in the next turn."""
    checkpoint_entries: int = 256
    """Applied entries between two hashes of the state that replicas compare; the same at all of them."""
    snapshot_entries: int = 20_000
    """Applied entries after which the state is written down and the log trimmed …"""
    snapshot_bytes: int = 64 << 20
    """… or bytes of them, whichever comes first."""
    disk_free_min: int = FREE_BYTES_MIN
    """Bytes of its disk below which a server takes no new work."""
    journal: JournalSizes = JournalSizes()
    retain_entries: int = 1_000
    """Kept behind a snapshot, so that a peer that blinked needs no snapshot."""
    pinned_s: float = 60.0
    """What a peer needs that is further behind stays while it comes further at least so often …"""
    pinned_bytes: int = 1 << 30
    """… and while so much was written meanwhile: all of it is in memory."""
