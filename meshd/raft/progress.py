"""What a leader knows of one peer: how far it has come, what is on its way, when it last answered.

A leader first probes with one message, then keeps a window of unanswered ones going.
Success only ever moves `match` and `next` forward; what seems lost is sent again only
after a silence, from what is known to be there (holes F4 and F5).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_MESSAGES = 64
"""Unanswered messages to one peer; enough to fill a fast link, few enough to resend."""

WINDOW_BYTES = 4 << 20
"""Unanswered bytes to one peer: below the wire's buffer, and a heartbeat never waits behind more."""

RESEND_S = 0.6
"""Silence after which unanswered messages count as lost: four heartbeats."""

CHUNK_BYTES = 256 << 10
CHUNKS_AHEAD = 4
"""Unanswered chunks of a snapshot: 1 MiB, so that heartbeats pass quickly."""


@dataclass(slots=True)
class Transfer:
    """A snapshot on its way to this peer; pinned until it has arrived."""

    index: int
    term: int
    data: bytes = field(repr=False)
    digest: bytes
    sent: int = 0
    acked: int = 0


@dataclass(slots=True)
class Progress:
    next: int
    """The next entry to send."""
    match: int = 0
    """Known to be on the peer's disk up to here."""
    is_connected: bool = False
    is_probing: bool = True
    commit_told: int = 0
    round: int = 0
    """The newest round of this term that it answered …"""
    contact_s: float = float("-inf")
    """… and when the newest answered round was sent."""
    heard_s: float = float("-inf")
    """When an answer of this term last came."""
    moved_s: float = float("-inf")
    """When something that was on its way arrived, or began to be on its way."""
    clock_offset_ms: int | None = None
    """Its wall clock minus our CLOCK_BOOTTIME, as told in this term."""
    is_in_doubt: bool = False
    doubted_round: int = 0
    """A round that was sent after it said so, or later …"""
    doubted_s: float = float("-inf")
    """… and when that was."""
    transfer: Transfer | None = None
    _flying: deque[tuple[int, int]] = field(default_factory=deque)
    _flying_bytes: int = 0

    def may_send(self) -> bool:
        if self.is_probing:
            return not self._flying
        return len(self._flying) < WINDOW_MESSAGES and self._flying_bytes < WINDOW_BYTES

    def sent(self, last_index: int, size: int, now_s: float) -> None:
        if not self._flying:
            self.moved_s = now_s
        self._flying.append((last_index, size))
        self._flying_bytes += size
        self.next = last_index + 1

    def has_gone_silent(self, now_s: float) -> bool:
        is_waiting = bool(self._flying) or self.transfer is not None
        return is_waiting and now_s - self.moved_s >= RESEND_S

    def answered(self, round_: int, sent_s: float, now_s: float) -> None:
        """Any answer in this term: it counts for contact by when its round was sent, not by when it came."""
        self.round = max(self.round, round_)
        self.contact_s = max(self.contact_s, sent_s)
        self.heard_s = now_s

    def doubted(self, next_round: int, now_s: float) -> None:
        """It may have lost what it had acknowledged: what it holds is found out again."""
        self.is_in_doubt = True
        self.doubted_round, self.doubted_s = next_round, now_s
        self.match = 0

    def succeeded(self, next_index: int, now_s: float) -> None:
        self.is_probing = False
        self.moved_s = now_s
        self.match = max(self.match, next_index - 1)
        self.next = max(self.next, next_index)
        while self._flying and self._flying[0][0] < next_index:
            self._flying_bytes -= self._flying.popleft()[1]

    def refused(self, next_index: int) -> None:
        """Its log does not join ours at `next`: probe from where it says, never below what it is known to have."""
        self.restart(max(min(next_index, self.next), self.match + 1))

    def restart(self, next_index: int) -> None:
        """Forget what was on its way (a new stream, or a silence) and probe."""
        self.is_probing = True
        self.next = next_index
        self.commit_told = 0
        self._flying.clear()
        self._flying_bytes = 0
        if self.transfer is not None:
            self.transfer.sent = self.transfer.acked
