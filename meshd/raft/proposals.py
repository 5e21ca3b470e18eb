"""Commands on their way into the log: queued at the leader, or forwarded to it, each with one end.

Committed, certainly not committed, or unknown: a command that was never put into a batch
can be taken back; one that was, or that left for another server, is unknown until an
answer comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from msgspec import Raw

from meshd import codec
from meshd.errors import InvalidRequest
from meshd.model import NodeId
from meshd.ports import Committed, NotCommitted, ProposeResult, Unknown
from meshd.raft.messages import Proposed, VoterId
from meshd.raft.state.commands import AnyCommand, Stamped

BATCH_BYTES_MAX = 256 << 10
"""Of one entry, unless a single command is larger."""
BATCH_COMMANDS = 400
"""One entry is applied in one go; a submit takes about 18 us, so a full one holds the loop for 7 ms."""
PENDING_MAX = 20_000
"""Commands waiting at the leader: fifty full batches."""
PENDING_BYTES_MAX = 32 << 20
NESTING_MAX = 400
"""Of containers in a command. Ours have ten levels; a decoder manages at least twice this on any stack that a replica has."""
UNUSUAL_BYTES_MAX = 32 << 10
"""Of a command with fields of another version: looking through it byte by byte holds the loop for 7 ms."""
_NO_CONTAINER = bytes(byte for byte in range(256) if not (0x80 <= byte < 0xA0 or 0xDC <= byte < 0xE0))
"""Bytes that cannot begin an array or a map."""

Resolve = Callable[[ProposeResult], None]


class Proposal:
    """One command and who waits for it."""

    __slots__ = ("_resolve", "command", "is_batched", "is_over", "origin")

    def __init__(self, origin: NodeId, command: bytes, resolve: Resolve) -> None:
        self.origin = origin
        self.command = command
        self.is_batched = False
        self.is_over = False
        self._resolve = resolve

    def end(self, result: ProposeResult) -> None:
        if not self.is_over:
            self.is_over = True
            self._resolve(result)


class Pending:
    """What waits for the next batch at the leader."""

    def __init__(self) -> None:
        self._queue: deque[Proposal] = deque()
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, proposal: Proposal) -> bool:
        """False, and nothing kept, when the queue is full."""
        if len(self._queue) >= PENDING_MAX or self.bytes >= PENDING_BYTES_MAX:
            return False
        self._queue.append(proposal)
        self.bytes += len(proposal.command)
        return True

    def take_batch(self, bytes_max: int = BATCH_BYTES_MAX) -> list[Proposal]:
        batch: list[Proposal] = []
        size = 0
        while self._queue and len(batch) < BATCH_COMMANDS:
            proposal = self._queue[0]
            if batch and size + len(proposal.command) > bytes_max:
                break
            self._queue.popleft()
            self.bytes -= len(proposal.command)
            if not proposal.is_over:
                size += len(proposal.command)
                proposal.is_batched = True
                batch.append(proposal)
        return batch

    def refuse_all(self, why: str) -> None:
        queue, self._queue, self.bytes = self._queue, deque(), 0
        for proposal in queue:
            proposal.end(NotCommitted(why))


def stamped(batch: list[Proposal]) -> tuple[Stamped, ...]:
    return tuple(Stamped(proposal.origin, Raw(proposal.command)) for proposal in batch)


def resolver(batch: list[Proposal]) -> Callable[[list[bytes] | None, int, str], None]:
    """Ends each proposal of a batch when the engine knows what became of it."""

    def resolve(answers: list[bytes] | None, index: int, why: str) -> None:
        if answers is not None and len(answers) == len(batch):
            for proposal, answer in zip(batch, answers, strict=True):
                proposal.end(Committed(answer, index))
            return
        result: ProposeResult = NotCommitted(why) if not index else Unknown(why or "the answers are lost")
        for proposal in batch:
            proposal.end(result)

    return resolve


def is_readable(command: bytes) -> bool:
    """One msgpack value that every replica can read, wherever it does so: anything else spoils the batch around it.

    Fields that this version does not know may be nested as deep as the proposer likes. Where a decoder gives up
    depends on the stack that it is called on, so that of two replicas one would apply what the other skips.
    """
    try:
        codec.decode(command, Raw, bytes_max=codec.COMMAND_BYTES_MAX)
    except InvalidRequest:
        return False
    if len(command.translate(None, _NO_CONTAINER)) <= NESTING_MAX:
        return True
    try:
        # Nothing but the fields of a type, which are nested as deep as the type is.
        if codec.encode(codec.decode(command, AnyCommand, bytes_max=codec.COMMAND_BYTES_MAX)) == command:
            return True
    except InvalidRequest:
        pass
    return len(command) <= UNUSUAL_BYTES_MAX and codec.nesting(command) <= NESTING_MAX


def first_request(start: int) -> int:
    """Numbers of requests begin here at the journal's n-th start.

    A leader answers what the process before it has asked on the stream of the next one: were the numbers the
    same, another command's answer would be taken for ours.
    """
    return (start & 0xFFFFF) << 32


class Forwarded:
    """What went to the leader from here and is not answered."""

    def __init__(self, first: int = 0) -> None:
        """`first` is `first_request` of this start."""
        self._waiting: dict[int, tuple[VoterId, Proposal]] = {}
        self._next = first

    def add(self, leader: VoterId, proposal: Proposal) -> int:
        self._next += 1
        self._waiting[self._next] = (leader, proposal)
        return self._next

    def forget(self, request: int) -> None:
        self._waiting.pop(request, None)

    def forget_proposal(self, proposal: Proposal) -> None:
        for request in [request for request, (_, waiting) in self._waiting.items() if waiting is proposal]:
            del self._waiting[request]

    def answered(self, peer: VoterId, m: Proposed) -> None:
        leader, proposal = self._waiting.get(m.request, (None, None))
        if proposal is None or leader != peer:
            return
        del self._waiting[m.request]
        match m.outcome:
            case "committed":
                proposal.end(Committed(m.answer, m.position))
            case "not_committed":
                proposal.end(NotCommitted(m.why, m.code, m.hint))
            case _:
                proposal.end(Unknown(m.why))

    def lost(self, peer: VoterId | None) -> None:
        """The stream to this leader (None: to any) broke: what it took may or may not be in the log."""
        for request in [request for request, (leader, _) in self._waiting.items() if peer in (leader, None)]:
            leader, proposal = self._waiting.pop(request)
            proposal.end(Unknown(f"the connection to the leader {leader} was lost"))


def as_message(request: int, result: ProposeResult) -> Proposed:
    match result:
        case Committed(answer, position):
            return Proposed(request, "committed", answer, position)
        case NotCommitted(why, code, hint):
            return Proposed(request, "not_committed", why=why, code=code, hint=hint)
        case Unknown(why):
            return Proposed(request, "unknown", why=why)
