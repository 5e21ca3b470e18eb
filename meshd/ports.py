"""What the shell needs from the world, as small protocols. Adapters live beside their feature and are built by daemon.py.

Transport   authenticated byte streams to peers           net/libp2p, net/memory.py
Rpc         calls over one long-lived stream per peer      net/rpc.py, on any Transport
BlobStore   bytes by their hash, on this disk              blobs/store.py
Backend     runs attempts                                  backends/*.py
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import trio

from meshd.model import (
    INLINE_STREAM_BYTES_MAX,
    AttemptKey,
    BackendProbe,
    BlobRef,
    JobId,
    NodeId,
    Outcome,
    Resources,
)

# --- peers -----------------------------------------------------------------------------------------------------------


class Stream(Protocol):
    """A byte stream to one authenticated peer. Not safe for two writers at a time."""

    @property
    def peer(self) -> NodeId: ...

    async def read(self, bytes_max: int) -> bytes:
        """1 to `bytes_max` bytes; b"" at the end. Raises Unavailable when the peer is lost. Safe to cancel."""
        ...

    async def write(self, data: bytes) -> None:
        """Raises Unavailable when the peer is lost or does not read for 30 s. Cancelling never corrupts another stream."""
        ...

    def write_now(self, data: bytes) -> bool:
        """All of it, if nobody has to wait for that; else nothing, and False."""
        ...

    async def close_write(self) -> None:
        """No more bytes from here; the peer reads the end."""
        ...

    async def aclose(self) -> None:
        """Give it up, both ways, at once. Never raises, never blocks for over 2 s."""
        ...


StreamHandler = Callable[[Stream], Awaitable[None]]


class PeerEvents(Protocol):
    """Called from the loop, must not wait."""

    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


class Transport(Protocol):
    """Connections to peers by key. Who may speak which protocol is asked of the gate at each stream."""

    @property
    def me(self) -> NodeId: ...

    @property
    def addresses(self) -> Sequence[str]:
        """Where this node listens, as multiaddrs without /p2p; known once `serve` has started."""
        ...

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Answer streams of this protocol. An exception in the handler resets the stream, counts, and nothing else."""
        ...

    async def connect(self, peer: NodeId, addresses: Sequence[str], *, timeout_s: float) -> None:
        """One live connection afterwards. Raises Unavailable (nobody there) or PeerFault (another key answered)."""
        ...

    async def open_stream(self, peer: NodeId, protocol: str, *, timeout_s: float) -> Stream:
        """Over the live connection; dials through the address book if there is none. Raises Unavailable, NotAllowed."""
        ...

    async def drop(self, peer: NodeId, *, age_s: float = 0.0) -> None:
        """Close every connection to the peer that is at least so old, at once, even behind a blocked writer."""
        ...

    def connected(self) -> frozenset[NodeId]: ...


AddressBook = Callable[[NodeId], Sequence[str]]
"""Where a peer may be found, best first; multiaddrs without /p2p."""

Gate = Callable[[NodeId, str], bool]
"""May this authenticated peer speak this protocol now? Asked before a handler sees the stream."""


class Rpc(Protocol):
    """Request and answer over one long-lived stream per direction and peer; frames of many calls share a write."""

    def register(self, method: str, handler: Callable[[NodeId, bytes], Awaitable[bytes]]) -> None:
        """A MeshError raised by the handler reaches the caller as the same class; anything else as PeerFault."""
        ...

    async def call(self, peer: NodeId, method: str, body: bytes, *, timeout_s: float) -> bytes:
        """Raises Unavailable (not sent, or peer lost), UnknownOutcome (sent, no answer in time), or the peer's MeshError."""
        ...


# --- the log ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Committed:
    """The command is in the log for ever. `answer` is the encoded `AnyAnswer`, `position` its log index."""

    answer: bytes
    position: int


@dataclass(frozen=True, slots=True)
class NotCommitted:
    """The command is certainly not in the log: send it again."""

    why: str
    code: str = ""
    """Of the error to tell the caller: sent again now it would end the same way."""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Perhaps in the log: ask, or resend with the same id. Never guess."""

    why: str


ProposeResult = Committed | NotCommitted | Unknown


# --- blobs -----------------------------------------------------------------------------------------------------------


class BlobWriter(Protocol):
    """A blob being written; nothing is visible until `commit`."""

    async def write(self, data: bytes) -> None: ...

    async def commit(self, *, expected: BlobRef | None = None) -> BlobRef:
        """Fsynced, named and durable (file and directory). Raises PeerFault when it is not `expected`."""
        ...

    async def abort(self) -> None: ...


class BlobStore(Protocol):
    """This node's disk. All methods that touch the disk do so in a thread."""

    def has(self, blob: str) -> bool: ...
    def size(self, blob: str) -> int:
        """Raises NotFound."""
        ...

    def path(self, blob: str) -> Path:
        """Where it lies, for reading only and for a moment; it was verified when it was put there. Raises NotFound."""
        ...

    async def check_room_for_new(self) -> None:
        """Ask before bytes are taken that can wait. Raises Busy when the disk is nearly full."""
        ...

    async def create(self) -> BlobWriter:
        """Raises Busy when the disk is full."""
        ...

    async def put_bytes(self, data: bytes) -> BlobRef: ...

    async def put_many(self, datas: Sequence[bytes]) -> Sequence[BlobRef]:
        """Small ones together: one thread call, durable when it returns."""
        ...

    async def put_file(self, path: Path) -> BlobRef: ...

    async def read(self, blob: str, offset: int, length: int) -> bytes:
        """Raises NotFound."""
        ...

    async def get_bytes(self, ref: BlobRef, *, bytes_max: int) -> bytes:
        """Whole and verified. Raises NotFound, TooLarge, Corrupt (and puts the bad file aside)."""
        ...

    def open_verified(self, ref: BlobRef) -> AsyncIterator[bytes]:
        """Chunks, verified: the last one is only yielded when the hash agrees. Raises NotFound, Corrupt."""
        ...

    async def export(self, ref: BlobRef, target: Path, *, executable: bool = False) -> None:
        """A private copy at `target` (reflink or copy, never a hard link: the job may write to it). Verified."""
        ...

    async def export_many(self, copies: Generator[tuple[BlobRef, Path, bool], None, None]) -> None:
        """As `export` for each (blob, target, executable), in one thread call: the generator runs in that thread, too."""
        ...

    async def remove(self, blob: str) -> bool: ...

    async def list(self) -> Sequence[BlobRef]: ...

    async def page(self, *, prefix: str, after: str, limit: int) -> Sequence[BlobRef]:
        """The first of those whose names begin with `prefix` and come behind `after`, in order."""
        ...


# --- backends --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    run_s: float | None = None
    memory: int | None = None
    """Bytes."""
    fuel: int | None = None
    cpu_milli: int | None = None
    output_bytes_max: int = 64 << 20
    """stdout and stderr, each."""
    inline_bytes_max: int = INLINE_STREAM_BYTES_MAX
    """… of which so much is told with the end of an attempt of a plan. More is left in its file."""


class Leash:
    """Until when an attempt may run while its node is cut off (protocol.md 5), on CLOCK_BOOTTIME.

    The agent moves `deadline_s` as its session's view moves; None is no limit. A backend tells
    whatever really holds the attempt (runner, spawner) each new deadline, so that a stopped
    agent keeps nothing alive.
    """

    def __init__(self, deadline_s: float | None = None) -> None:
        self.deadline_s = deadline_s
        self.watchers: set[Callable[[float | None], None]] = set()
        """Told each new deadline at once; must not wait or raise. A set, so that a run costs no task of its own."""
        self._changed = trio.Event()

    def move(self, deadline_s: float | None) -> None:
        if deadline_s == self.deadline_s:
            return
        self.deadline_s = deadline_s
        for told in tuple(self.watchers):
            told(deadline_s)
        self._changed.set()
        self._changed = trio.Event()

    async def wait_moved(self) -> None:
        await self._changed.wait()


@dataclass(frozen=True, slots=True)
class Execution:
    """One attempt, ready to run: everything it reads is on this disk."""

    key: AttemptKey
    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    workdir: Path
    """Private and writable; inputs are in it. The caller removes it."""
    stdout: Path
    stderr: Path
    """Existing empty files outside `workdir`; grow while it runs, followers read along."""
    stdin: Path | None = None
    module: Path | None = None
    """wasm: the verified module."""
    module_hash: str = ""
    limits: Limits = Limits()
    needs: Resources = Resources()
    leash: Leash = field(default_factory=Leash)


class Backend(Protocol):
    """Runs attempts in one kind of place. Found through entry point `meshd.backends`; built with `BackendSettings`."""

    name: str

    async def probe(self) -> BackendProbe:
        """Does it really work here? Tries, cheaply; never raises."""
        ...

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own whatever outlives one attempt (runner pool, spawner) until cancelled; leaves nothing behind."""
        ...

    async def run(self, execution: Execution) -> Outcome:
        """Run to the end. Never raises for what a job does: that is an Outcome (without logs, outputs and holders).

        Cancelling stops the attempt: TERM, then KILL after a grace; when it returns or raises, nothing of it runs.
        """
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What all attempts of one job have in common when they read no files and leave none: made once, run many times.

    Such an attempt finds an empty working directory, which the helper that runs it provides, and adds the variables
    MESHD_TASK, MESHD_ATTEMPT, MESHD_FENCE and MESHD_ITEM to the plan's.
    """

    job: JobId
    args: tuple[str, ...]
    """`{item}` stands for the task's item."""
    env: tuple[tuple[str, str], ...]
    spill: Path
    """Private, and on the disk that output may fill: what is too large to travel in an outcome is left there."""
    module: Path | None = None
    module_hash: str = ""
    limits: Limits = Limits()
    needs: Resources = Resources()
    leash: Leash = field(default_factory=Leash)
    """One for all: attempts of one job are promised the same."""


class Planned(NamedTuple):
    key: AttemptKey
    item: str


class Finished(NamedTuple):
    """How a planned attempt ended. Its small output is in the outcome; large output is a file, now the receiver's."""

    key: AttemptKey
    outcome: Outcome
    stdout: Path | None = None
    stderr: Path | None = None


@runtime_checkable
class BatchBackend(Backend, Protocol):
    """A backend that also takes many attempts of one plan at once. They cost the agent no task, thread or file each."""

    def start(
        self, plan: Plan, lane: int, attempts: Sequence[Planned], ended: Callable[[Sequence[Finished]], None]
    ) -> None:
        """Run these, one after the other, after what the same lane was given before; lanes run beside each other.

        Never waits or raises: each attempt is told of to `ended`, once, several at a time, and never before this returns.
        """
        ...

    async def recall(self, fences: Sequence[int]) -> Sequence[int]:
        """Give back those that have not begun, at once: they never will, and are not told of to `ended`."""
        ...

    def stop(self, fence: int) -> None:
        """It ends as cancelled unless it has ended otherwise; so does one that has not begun. It is told of to `ended`."""
        ...

    async def read_output(self, fence: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        """What a running attempt has written from there on; None when it does not run here or has not begun."""
        ...


@dataclass(frozen=True, slots=True)
class BackendSettings:
    directory: Path
    """The backend's own, private (0700): caches, sockets."""
    term_grace_s: float = 5.0
    helpers_lock: int | None = None
    """A descriptor that every helper process inherits, and no job: while one of them lives no later agent starts work."""
