"""Who speaks on a stream: certificates are shown and checked first, clocks compared, doubles of one identity refused.

While a start of an identity is heard from, another start of the same one is refused: a copied
data directory would otherwise answer in the original's name (protocol.md 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import trio

from meshd import codec
from meshd.admission.certificates import Greeting
from meshd.directory import Directory
from meshd.errors import Conflict, MeshError, NotAllowed, StartRefused
from meshd.model import EpochCertificate, NodeId
from meshd.ports import Rpc

CLOCK_OFF_MS = 5000
DOUBLE = "this identity is running twice"
"""How the refusal begins; the double recognises it and stops."""

GREETED_MAX = 16
"""Members greeted at the start; the rest when there is something to say."""
HELLO_S = 12.0
"""How long a refusal as a double is tried again: a peer notices within 10 s that an older start of ours is gone."""

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


async def say_hello(rpc: Rpc, members: Callable[[], Sequence[NodeId]]) -> None:
    """Greet who is known; learn at once whether this identity is running elsewhere, or was removed.

    Raises StartRefused for a double, else the refusal where nobody lets this node in.
    """
    refusals: list[MeshError] = []
    welcomes: list[NodeId] = []

    async def greet(peer: NodeId) -> None:
        try:
            await rpc.call(peer, "mesh.hello", b"", timeout_s=3)
            welcomes.append(peer)
        except (Conflict, NotAllowed) as error:
            refusals.append(error)
        except MeshError as error:
            log.info("peer.unreached", peer=peer, error=str(error))

    deadline = trio.current_time() + HELLO_S
    while True:
        refusals.clear()
        with trio.move_on_after(4):
            async with trio.open_nursery() as nursery:
                for peer in members()[:GREETED_MAX]:
                    nursery.start_soon(greet, peer)
        doubles = [error for error in refusals if isinstance(error, Conflict) and DOUBLE in error.message]
        if refusals and not doubles and not welcomes:
            raise refusals[0]
        if not doubles:
            return
        if trio.current_time() > deadline:
            raise StartRefused(doubles[0].message, hint=doubles[0].hint)
        await trio.sleep(1)


async def on_hello(peer: NodeId, body: bytes) -> bytes:
    """Answers `mesh.hello`: the greeting before it said everything."""
    return b""
