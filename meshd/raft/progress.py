"""What a leader knows of one peer: how far it has come, what is on its way, when it last answered.

A leader first probes with one message, then keeps a window of unanswered ones going
(flow.py). Success only ever moves `match` and `next` forward; what was lost is sent again
when the answer to a later message shows the gap, from what is known to be there (holes F4
and F5).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshd.raft.flow import Flow

CHUNK_BYTES = 256 << 10
"""The largest range of a snapshot in one message."""


@dataclass(slots=True)
class Transfer:
    """A snapshot on its way to this peer."""

    index: int
    term: int
    data: bytes = field(repr=False)
    """The same bytes in all transfers of one snapshot; a later peer may get a later one, so at worst there is one for each."""
    digest: bytes
    sent: int = 0
    acked: int = 0
    sent_round: int = 0
    """In which round bytes of it were last sent."""


@dataclass(slots=True)
class Pin:
    """What a peer that is far behind still needs stays in the log, while it moves and the log behind it does not grow too long."""

    bytes_before: int
    """Of all entries ever written here, when it began to be fed."""
    began_s: float
    advanced_s: float
    """When it last came further."""
    taken_bytes: int = 0
    """What it has taken since then."""


@dataclass(slots=True)
class Progress:
    next: int
    """The next entry to send."""
    match: int = 0
    """Known to be on the peer's disk up to here."""
    is_connected: bool = False
    is_probing: bool = True
    probed_from: int = 0
    probed_round: int = -1
    """From where and when it last had to go back: refusals of that time that ask for no more were on their way already."""
    commit_told: int = 0
    round: int = 0
    """The newest round of this term that it answered …"""
    contact_s: float = float("-inf")
    """… and when the newest answered round was sent."""
    heard_s: float = float("-inf")
    """When an answer of this term last came."""
    clock_offset_ms: int | None = None
    """Its wall clock minus our CLOCK_BOOTTIME, as told in this term."""
    is_disk_full: bool = False
    is_in_doubt: bool = False
    doubted_round: int = 0
    """A round that was sent after it said so, or later …"""
    doubted_s: float = float("-inf")
    """… and when that was."""
    transfer: Transfer | None = None
    pin: Pin | None = None
    breaks: int = 0
    """How often the log grew too long before this peer was level …"""
    rate: float = 0.0
    """Bytes a second that it took then …"""
    broken_at: int = 0
    """… and where the log began when its pin was last taken away."""
    flow: Flow = field(default_factory=Flow)

    def may_send(self) -> bool:
        return self.flow.is_empty if self.is_probing else self.flow.has_room

    def sent(self, last_index: int, size: int, now_s: float) -> None:
        self.flow.sent(last_index, size, now_s)
        self.next = last_index + 1

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
        size = self.flow.arrived(next_index - 1, now_s)
        if next_index - 1 > self.match:
            self.match = next_index - 1
            self._advanced(size, now_s)
        self.next = max(self.next, next_index)

    def begin_transfer(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.flow.forget()

    def received(self, offset: int, round_: int, now_s: float) -> None:
        """So much of the snapshot is there, says the answer to a message of that round."""
        transfer = self.transfer
        assert transfer is not None
        if offset > transfer.acked:
            self.flow.arrived(offset, now_s)
            self._advanced(offset - transfer.acked, now_s)
            transfer.sent = max(transfer.sent, offset)
        elif offset < transfer.acked or round_ > transfer.sent_round:
            # The peer started anew, or has not got what was sent before this round.
            self.flow.forget()
            transfer.sent = offset
        transfer.acked = offset

    def installed(self, next_index: int) -> None:
        """The snapshot is in place; entries go on after it."""
        self.transfer = None
        self._probe_from(next_index)

    def give_up(self) -> None:
        """Nothing waits for it any longer: it begins again with the newest snapshot, when the log does not reach back to it."""
        self.transfer = self.pin = None
        self.flow.forget()

    def refused(self, next_index: int, round_: int, round_now: int) -> None:
        """Its log does not join ours at `next`: probe from where it says, never below what it is known to have."""
        if round_ > self.probed_round or next_index < self.probed_from:
            self.probed_round = round_now
            self._probe_from(max(min(next_index, self.next), self.match + 1))

    def begin_anew(self, last: int) -> None:
        """A new stream. A snapshot goes on where the peer has it."""
        self._probe_from(self.match + 1 if self.match else last + 1)
        self.probed_round = -1
        self.flow.begin_anew()

    def _probe_from(self, next_index: int) -> None:
        self.is_probing = True
        self.next = self.probed_from = next_index
        self.commit_told = 0
        self.flow.forget()
        if self.transfer is not None:
            self.transfer.sent = self.transfer.acked

    def _advanced(self, size: int, now_s: float) -> None:
        if self.pin is not None:
            self.pin.advanced_s = now_s
            self.pin.taken_bytes += size
