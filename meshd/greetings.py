"""Who speaks on a stream: certificates are shown and checked first, clocks compared, doubles of one identity refused.

While a start of an identity is heard from, another start of the same one is refused: a copied
data directory would otherwise answer in the original's name (protocol.md 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from meshd import codec
from meshd.certificates import Greeting
from meshd.directory import Directory
from meshd.errors import Conflict
from meshd.model import EpochCertificate, NodeId

CLOCK_OFF_MS = 5000
DOUBLE = "this identity is running twice"
"""How the refusal begins; the double recognises it and stops."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Start:
    counter: int
    random: bytes


class Greetings:
    """`hears(peer)`: is a stream of calls from this peer open now?"""

    def __init__(
        self,
        *,
        directory: Directory,
        greeting: Callable[[], Greeting],
        hears: Callable[[NodeId], bool],
        wall_ms: Callable[[], int],
        meet_epoch: Callable[[NodeId, EpochCertificate], None],
    ) -> None:
        """`meet_epoch` raises where the two belong to different lives of the mesh's log."""
        self._directory = directory
        self._greeting = greeting
        self._hears = hears
        self._wall_ms = wall_ms
        self._meet_epoch = meet_epoch
        self._starts: dict[NodeId, Start] = {}
        self._offsets_ms: dict[NodeId, int] = {}

    def ours(self) -> bytes:
        return codec.encode(self._greeting())

    async def admit(self, peer: NodeId, data: bytes) -> None:
        """Raises NotAllowed, Conflict, InvalidRequest, or Unavailable for a member of another epoch."""
        greeting = codec.decode(data, Greeting, bytes_max=16 << 10)
        start = Start(greeting.start_counter, greeting.start_random)
        known = self._starts.get(peer)
        if known is not None and known != start and self._hears(peer):
            raise Conflict(
                f"{DOUBLE}: {peer} is connected already, from {', '.join(self._directory.book(peer)) or 'elsewhere'}",
                hint="stop one of the two; a copied data directory must not be started: join with a new one",
            )
        self._directory.greet(peer, greeting)
        self._meet_epoch(peer, greeting.epoch)
        self._starts[peer] = start
        offset_ms = greeting.wall_ms - self._wall_ms()
        if abs(offset_ms) > CLOCK_OFF_MS and peer not in self._offsets_ms:
            log.warning("clock.off", peer=peer, name=greeting.name, seconds=round(offset_ms / 1000, 1))
        self._offsets_ms[peer] = offset_ms

    def offset_ms(self, peer: NodeId) -> int | None:
        """The peer's clock less ours, as of its last greeting."""
        return self._offsets_ms.get(peer)
