"""What this node says of itself, packed into signed chunks.

    set ──▶ pending ──seal──▶ chunk n, n+1 …   every chunk names the floor: what is below is void
                                 │
             too much waste ─────┘──▶ what is alive is written again, and then the floor rises

A log with a floor, not a page per key: one new blob costs its own hundred bytes and no
signature over old ones. A key taken back is a None in a newer chunk; when the floor has
passed it, nothing older is left that it could hide, so no tombstone outlives its reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from meshd import codec
from meshd.errors import Busy, InvalidRequest, TooLarge
from meshd.gossip.messages import (
    CHUNK_BYTES_MAX,
    KEY_CHARS_MAX,
    VALUE_BYTES_MAX,
    Chunk,
    SignedChunk,
    chunk_payload,
)
from meshd.model import NodeId

KEYS_MAX = 20_000
"""Per node. Every node holds everyone's facts, so this bounds memory: about 4 MB for a full node."""

LIVE_BYTES_MAX = 3 << 20
"""Per node: 20,000 blob locations are 2 MB."""

KEYS_KEPT = 64
BYTES_KEPT = KEYS_KEPT * VALUE_BYTES_MAX
"""For facts about the node itself, keys without a "/": however many blobs it has, it can say where it is and what it offers."""

CHUNKS_SLACK = 64
BYTES_SLACK = 64 << 10
"""Waste allowed on top of what is alive; a small node writes itself again only every 64 changes."""

SEAL_CHUNKS_MAX = 16
"""Written in one go: 16 signatures and encodings take about 3 ms."""

_ENTRY_OVERHEAD = 8
_BODY_ROOM = CHUNK_BYTES_MAX - 256
"""The rest is for the node's name and the numbers."""

Sign = Callable[[bytes], bytes]


class OwnFacts:
    def __init__(self, me: NodeId, incarnation: int, sign: Sign) -> None:
        self._me = me
        self._sign = sign
        self.incarnation = incarnation
        self._values: dict[str, bytes] = {}
        self._live_bytes = 0
        self._restart()

    def _restart(self) -> None:
        self._pending: dict[str, bytes | None] = {}
        self._numbers: dict[str, int] = {}
        self._sizes: dict[int, int] = {}
        self._floor = self._next = 1
        self._rewriting: deque[str] | None = None
        self._rewrite_from = 0

    def set(self, key: str, value: bytes | None) -> bool:
        """Say this from the next `seal` on; None takes it back. True when it changes anything.

        Raises InvalidRequest (key), TooLarge (value) or Busy (this node says too much already).
        """
        if not 1 <= len(key) <= KEY_CHARS_MAX:
            raise InvalidRequest(f"fact key of {len(key)} characters; 1 to {KEY_CHARS_MAX} are allowed")
        old = self._values.get(key)
        if old == value:
            return False
        if value is not None and len(value) > VALUE_BYTES_MAX:
            raise TooLarge(f"fact {key!r} has {len(value)} bytes, over the limit of {VALUE_BYTES_MAX}")
        live_bytes = self._live_bytes
        live_bytes += (0 if value is None else _cost(key, value)) - (0 if old is None else _cost(key, old))
        keys_max, bytes_max = _limits(key)
        if value is not None and old is None and len(self._values) >= keys_max:
            raise Busy(f"no room for {key!r}: this node publishes {len(self._values)} facts already")
        if live_bytes > bytes_max and live_bytes > self._live_bytes:
            raise Busy(
                f"no room for {key!r}: this node's facts would take {live_bytes} bytes, over the limit of {bytes_max}"
            )
        self._live_bytes = live_bytes
        if value is None:
            del self._values[key]
        else:
            self._values[key] = value
        self._pending[key] = value
        return True

    @property
    def is_sealed(self) -> bool:
        """Nothing waits to be written."""
        return not self._pending and self._rewriting is None and self._next > 1

    def seal(self) -> list[SignedChunk]:
        """Write what is pending, at most `SEAL_CHUNKS_MAX` chunks; call again while not `is_sealed`."""
        written: list[SignedChunk] = []
        if self._next == 1 and not self._pending:
            # Even nothing must be said once, or others would keep what an earlier life said.
            written.append(self._write([]))
        while self._pending and len(written) < SEAL_CHUNKS_MAX:
            batch = list(_batch(self._pending.items()))
            for key, _ in batch:
                del self._pending[key]
            written.append(self._write(batch))
        if not self._pending and self._rewriting is None and self._is_wasteful():
            self._rewriting = deque(sorted(self._numbers, key=self._numbers.__getitem__))
            self._rewrite_from = self._next
        while self._rewriting is not None and len(written) < SEAL_CHUNKS_MAX:
            written.append(self._rewrite_some(self._rewriting))
        return written

    def outbid(self, incarnation: int) -> None:
        """An older life of ours, met on the network, is ahead of our clock: say everything again above it."""
        self.incarnation = max(self.incarnation, incarnation) + 1
        self._restart()
        self._pending = dict(self._values)

    def _is_wasteful(self) -> bool:
        chunks_max = CHUNKS_SLACK + 4 * (self._live_bytes // CHUNK_BYTES_MAX)
        return len(self._sizes) > chunks_max or sum(self._sizes.values()) > 2 * self._live_bytes + BYTES_SLACK

    def _rewrite_some(self, keys: deque[str]) -> SignedChunk:
        batch: list[tuple[str, bytes | None]] = []
        room = _BODY_ROOM
        while keys:
            key = keys[0]
            # What was said anew, or taken back, since the rewriting began is in a newer chunk already.
            if self._numbers.get(key, self._rewrite_from) < self._rewrite_from:
                value = self._values[key]
                room -= _cost(key, value)
                if room < 0:
                    break
                batch.append((key, value))
            keys.popleft()
        if not keys:
            # Only with the last part does the floor rise: until then everyone still has the old ones.
            self._rewriting = None
            self._floor = self._rewrite_from
            self._sizes = {number: size for number, size in self._sizes.items() if number >= self._floor}
        return self._write(batch)

    def _write(self, entries: list[tuple[str, bytes | None]]) -> SignedChunk:
        number = self._next
        self._next += 1
        body = codec.encode(Chunk(self._me, self.incarnation, number, self._floor, tuple(entries)))
        self._sizes[number] = len(body)
        for key, value in entries:
            if value is None:
                self._numbers.pop(key, None)
            else:
                self._numbers[key] = number
        return SignedChunk(body, self._sign(chunk_payload(body)))


def _limits(key: str) -> tuple[int, int]:
    """Keys and bytes of all facts, past which this one has no room."""
    if "/" in key:
        return KEYS_MAX - KEYS_KEPT, LIVE_BYTES_MAX - BYTES_KEPT
    return KEYS_MAX, LIVE_BYTES_MAX


def _cost(key: str, value: bytes | None) -> int:
    return len(key.encode()) + len(value or b"") + _ENTRY_OVERHEAD


def _batch(entries: Iterable[tuple[str, bytes | None]]) -> Iterator[tuple[str, bytes | None]]:
    """As many as fit into one chunk, at least one."""
    room = _BODY_ROOM
    for key, value in entries:
        room -= _cost(key, value)
        if room < 0:
            return
        yield key, value
