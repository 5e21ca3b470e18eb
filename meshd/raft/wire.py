"""Raft's frames between servers: one authenticated stream in each direction, first in, first out.

A stream begins with a greeting from both ends, so that a frame always belongs to one life
of one journal. What is staged leaves with `flush`, which the owner calls when the disk
has what the frames promise. A buffer that is full refuses, and Raft sends again later; a
stream that breaks is reported down before its successor is reported up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Annotated

import structlog
import trio
from msgspec import Meta, Struct

from meshd import codec
from meshd.errors import MeshError, PeerFault, Unavailable
from meshd.model import NodeId, ShortText
from meshd.ports import Stream, Transport
from meshd.raft.acquaintances import Acquaintances, Seen
from meshd.raft.messages import (
    AnyMessage,
    Append,
    Appended,
    Chunk,
    Number,
    Received,
    TimeoutNow,
    Vote,
    Voted,
    VoterId,
    node_of,
    voter_id,
)
from meshd.raft.state.lineage import RECOVERIES_MAX, name_of
from meshd.raft.surroundings import Down, Incident, Mail, Up

PROTOCOL = "/meshd/raft/1"

BUFFER_BYTES_MAX = 8 << 20
"""Staged and unsent bytes to one peer: one window of entries, one of a snapshot, and room for the rest."""
INBOX_BYTES_MAX = 16 << 20
"""Received and unread, of all peers: beyond it nobody is read from."""
WRITE_BYTES_MAX = 1 << 20
"""Frames joined into one write."""
READ_BYTES = 256 << 10
GREETING_S = 5.0
GREETING_BYTES_MAX = 1024
DIAL_S = 5.0
REDIAL_S_MIN, REDIAL_S_MAX = 0.05, 3.0

log = structlog.get_logger()


class Greeting(Struct, frozen=True, array_like=True, tag=True):
    """Which log this end speaks for, and which opening of it."""

    mesh: ShortText
    lineage: Annotated[tuple[ShortText, ...], Meta(max_length=RECOVERIES_MAX)]
    incarnation: Annotated[str, Meta(min_length=1, max_length=64, pattern="^[0-9a-f]+$")]
    start: Number
    random: ShortText
    term: Number = 0
    """The newest that is on its disk."""
    is_in_doubt: bool = False
    """It may have lost the end of its log, and terms with it, before this start."""


class Refused(Struct, frozen=True, array_like=True, tag=True):
    """In place of a greeting or of the first message: who reads it speaks with an older copy of its journal."""

    why: ShortText


_Hello = Greeting | Refused
_Frame = AnyMessage | Refused


@dataclass(slots=True)
class _Link:
    """The stream to one peer."""

    peer: VoterId
    stream: Stream
    staged: list[bytes] = field(default_factory=list)
    leaving: deque[bytes] = field(default_factory=deque)
    bytes: int = 0
    is_writing: bool = False
    """Frames that left `leaving` are still on their way into the stream."""
    wake: trio.Event = field(default_factory=trio.Event)


class Wire:
    """Own it with `serve`; read `take`, send with `send` and `flush`, name whom to reach with `reach`."""

    def __init__(
        self,
        transport: Transport,
        greeting: Callable[[], Greeting],
        random: Random,
        wake: Callable[[], None],
        *,
        acquaintances: Acquaintances,
        on_refused: Callable[[NodeId, str], None],
    ) -> None:
        """`wake` is called when there is something to take, `on_refused` when a peer takes this journal for an older copy."""
        self._transport = transport
        self._greeting = greeting
        self._random = random
        self._wake = wake
        self._acquaintances = acquaintances
        self._on_refused = on_refused
        self._inbox: deque[Incident] = deque()
        self._inbox_bytes = 0
        self._has_room = trio.Event()
        self._links: dict[NodeId, _Link] = {}
        self._inward: dict[NodeId, trio.CancelScope] = {}
        self._reached: set[NodeId] = set()
        self._dials: dict[NodeId, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer streams and keep dialling until cancelled."""
        async with trio.open_nursery() as self._nursery:
            self._transport.handle(PROTOCOL, self._answer)
            task_status.started()
            await trio.sleep_forever()

    def connected(self) -> list[VoterId]:
        """Whom a frame can be sent to now, in order."""
        return sorted(link.peer for link in self._links.values())

    def reach(self, peers: Collection[NodeId]) -> None:
        """Keep a stream to these; to others only while they keep one to us, for our answers."""
        if self._reached != (reached := set(peers)):
            self._reached = reached
            self._dial_wanted()

    def take(self) -> Incident | None:
        """The oldest thing that happened."""
        if not self._inbox:
            return None
        incident = self._inbox.popleft()
        if isinstance(incident, Mail):
            self._inbox_bytes -= incident.size
            if self._inbox_bytes < INBOX_BYTES_MAX:
                self._has_room.set()
        return incident

    @property
    def has_incidents(self) -> bool:
        return bool(self._inbox)

    def send(self, peer: VoterId, message: AnyMessage) -> bool:
        """Stage a frame; False when there is no stream or its buffer is full."""
        link = self._links.get(NodeId(peer.partition("/")[0]))
        if link is None or link.peer != peer or link.bytes > BUFFER_BYTES_MAX:
            return False
        body = codec.encode(message)
        link.staged.append(len(body).to_bytes(4, "little") + body)
        link.bytes += 4 + len(body)
        return True

    def send_at_once(self, peer: VoterId, message: AnyMessage) -> bool:
        """Past everything that waits for the disk."""
        if not self.send(peer, message):
            return False
        link = self._links[NodeId(peer.partition("/")[0])]
        link.leaving.append(link.staged.pop())
        link.wake.set()
        return True

    def unread(self, since: int) -> list[Incident]:
        """What waits to be taken, without the first so many."""
        return list(islice(self._inbox, since, None))

    def flush(self) -> None:
        """What was staged may leave."""
        for link in self._links.values():
            if not link.staged:
                continue
            # At once where the stream takes it: the task that writes is a pass of the loop away.
            is_next = not (link.leaving or link.is_writing)
            if is_next and link.stream.write_now(b"".join(link.staged)):
                link.bytes = 0
            else:
                link.leaving.extend(link.staged)
                link.wake.set()
            link.staged.clear()

    # --- outward ------------------------------------------------------------------------------------------------------

    def _dial_wanted(self) -> None:
        wanted = {*self._reached, *self._inward} - {self._transport.me}
        for node in [node for node in self._dials if node not in wanted]:
            self._dials.pop(node).cancel()
        if self._nursery is not None:
            for node in sorted(wanted - self._dials.keys()):
                self._dials[node] = trio.CancelScope()
                self._nursery.start_soon(self._keep_stream, node, self._dials[node])

    async def _keep_stream(self, node: NodeId, scope: trio.CancelScope) -> None:
        pause_s = REDIAL_S_MIN
        with scope:
            while True:
                began_s = trio.current_time()
                try:
                    await self._run_stream(node)
                except MeshError as error:
                    log.debug("raft.stream_lost", peer=node, why=str(error))
                if trio.current_time() - began_s > REDIAL_S_MAX:
                    pause_s = REDIAL_S_MIN
                await trio.sleep(pause_s * self._random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, REDIAL_S_MAX)

    async def _run_stream(self, node: NodeId) -> None:
        stream = await self._transport.open_stream(node, PROTOCOL, timeout_s=DIAL_S)
        try:
            with trio.move_on_after(GREETING_S) as patience:
                await stream.write(_framed(codec.encode(self._greeting())))
                frames = _Frames(stream)
                try:
                    peer = self._greeted(node, await frames.next(GREETING_BYTES_MAX))
                except _OlderCopy as copy:
                    # It may never dial this server: told here as well.
                    await stream.write(_framed(codec.encode(Refused(copy.message))))
                    raise
            if patience.cancelled_caught:
                raise PeerFault(f"{node} did not greet within {GREETING_S:g} s")
            self._end_link(self._links.get(node))
            link = self._links[node] = _Link(peer, stream)
            self._put(Up(peer))
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, link, stream, nursery.cancel_scope)
                    # Nothing more is said this way: the end of it means that the peer is gone.
                    with suppress(MeshError):
                        await stream.read(1)
                    nursery.cancel_scope.cancel()
            finally:
                self._end_link(link)
        finally:
            await stream.aclose()

    def _end_link(self, link: _Link | None) -> None:
        """Down, before a successor is up: a write that cannot be cancelled may hold up the end of its stream for longer."""
        if link is not None and self._links.get(node := node_of(link.peer)) is link:
            del self._links[node]
            self._put(Down(link.peer))

    async def _write(self, link: _Link, stream: Stream, scope: trio.CancelScope) -> None:
        with suppress(MeshError):
            while True:
                while not link.leaving:
                    link.wake = trio.Event()
                    await link.wake.wait()
                frames, size = [], 0
                while link.leaving and size < WRITE_BYTES_MAX:
                    frames.append(link.leaving.popleft())
                    size += len(frames[-1])
                link.is_writing = True
                await stream.write(b"".join(frames))
                link.is_writing = False
                link.bytes -= size
        scope.cancel()

    # --- inward -------------------------------------------------------------------------------------------------------

    async def _answer(self, stream: Stream) -> None:
        """Frames of one peer, until it ends or opens another stream. Raises PeerFault on nonsense."""
        node = stream.peer
        with trio.fail_after(GREETING_S):
            frames = _Frames(stream)
            try:
                peer = self._greeted(node, await frames.next(GREETING_BYTES_MAX))
            except _OlderCopy as copy:
                await stream.write(_framed(codec.encode(Refused(copy.message))))
                raise
            await stream.write(_framed(codec.encode(self._greeting())))
        if (older := self._inward.pop(node, None)) is not None:
            older.cancel()
        scope = self._inward[node] = trio.CancelScope()
        self._dial_wanted()
        try:
            with scope, suppress(Unavailable):
                term = 0
                while True:
                    body = await frames.next(codec.FRAME_BYTES_MAX)
                    if scope.cancel_called:
                        return
                    message = codec.decode(body, _Frame)
                    if isinstance(message, Refused):
                        self._on_refused(node, message.why)
                        return
                    if (spoken := spoken_term(message)) > term:
                        term = spoken
                        self._acquaintances.spoke(peer, term)
                    self._inbox_bytes += len(body)
                    self._put(Mail(peer, message, len(body)))
                    while self._inbox_bytes > INBOX_BYTES_MAX:
                        if self._has_room.is_set():
                            self._has_room = trio.Event()  # never one that others still wait for
                        await self._has_room.wait()
        finally:
            if self._inward.get(node) is scope:
                del self._inward[node]
                self._dial_wanted()

    def _greeted(self, node: NodeId, body: bytes) -> VoterId:
        """Who it is. Raises PeerFault for one of another log, _OlderCopy when it is not what is remembered of it."""
        greeting: Greeting | Refused = codec.decode(body, _Hello)
        if isinstance(greeting, Refused):
            self._on_refused(node, greeting.why)
            raise PeerFault(f"{node} refuses this server's journal: {greeting.why}")
        ours = self._greeting()
        if (greeting.mesh, greeting.lineage) != (ours.mesh, ours.lineage):
            raise PeerFault(f"{node} speaks for mesh {greeting.mesh}, recovery {name_of(greeting.lineage)}")
        voter = voter_id(node, greeting.incarnation)
        seen = Seen(voter, greeting.start, greeting.random, greeting.term)
        if why := self._acquaintances.why_older(seen, is_in_doubt=greeting.is_in_doubt):
            raise _OlderCopy(why)
        self._acquaintances.greeted(seen)
        return voter

    def _put(self, incident: Incident) -> None:
        self._inbox.append(incident)
        self._wake()


class _OlderCopy(PeerFault):
    """The message says what shows it."""


def spoken_term(message: AnyMessage) -> int:
    """The term that its sender was in, and had on its disk before it said so; 0 where it says nothing of that."""
    match message:
        case Vote(is_trial=True):
            return 0  # asks about a term that it is not in yet
        case Vote(term=term) | Voted(term=term) | Append(term=term) | Appended(term=term):
            return term
        case Chunk(term=term) | Received(term=term) | TimeoutNow(term=term):
            return term
        case _:
            return 0


class _Frames:
    """Length-prefixed frames out of a stream; a length is checked before anything is kept."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def next(self, bytes_max: int) -> bytes:
        """Raises PeerFault when the frame is too long, Unavailable when the stream ends."""
        await self._fill(4)
        length = int.from_bytes(self._buffer[:4], "little")
        if length > bytes_max:
            raise PeerFault(f"{self._stream.peer} sent a frame of {length} bytes, over the limit of {bytes_max}")
        await self._fill(4 + length)
        body = bytes(self._buffer[4 : 4 + length])
        del self._buffer[: 4 + length]
        return body

    async def _fill(self, size: int) -> None:
        while len(self._buffer) < size:
            data = await self._stream.read(READ_BYTES)
            if not data:
                raise Unavailable(f"{self._stream.peer} ended the stream")
            self._buffer += data


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body
