"""What servers say to each other about the log. Typed, so that nonsense from a peer is one clear error.

An election asks (`Vote`, first with `is_trial`), a leader feeds (`Append`, `Chunk`) and
is told how far (`Appended`, `Received`); the rest lets any server propose and read
through the leader. Every message of a leader carries a round and when that round was
sent, and the answer repeats both: that is how a leader knows that it still leads
(protocol.md 2). Nobody can hand over a ready-made entry but the leader of a term.
"""

from __future__ import annotations

from typing import Annotated, NewType

from msgspec import Meta, Struct

from meshd.model import NodeId, ShortText

VoterId = NewType("VoterId", str)
"""A server with one life of its journal: `peer id/incarnation`. A lost journal is another voter (protocol.md 1)."""

TERM_MAX = 2**53
"""No mesh elects that often; a larger number is nonsense."""

Number = Annotated[int, Meta(ge=0, le=TERM_MAX)]
StateHash = Annotated[bytes, Meta(max_length=32)]
Entry = tuple[bytes, Number, Number]
"""(command, index, term): PySyncObj's own shape of a log entry. The first byte of a command is its kind:"""

REPLICATED, NO_OP, MEMBERSHIP = b"\x00", b"\x01", b"\x02"

SNAPSHOT_BYTES_MAX = 1 << 30
"""A larger state is refused; the live state of a mesh is bounded far below."""


def voter_id(node: NodeId, incarnation: str) -> VoterId:
    return VoterId(f"{node}/{incarnation}")


def node_of(voter: VoterId) -> NodeId:
    return NodeId(voter.partition("/")[0])


class Message(Struct, frozen=True, gc=False, array_like=True, tag=True):
    """Base of all messages."""


class Vote(Message, frozen=True, array_like=True, tag=True):
    """Would you (`is_trial`), or do you, vote for me in this term? My log ends at (last_index, last_term)."""

    term: Number
    last_index: Number
    last_term: Number
    is_trial: bool


class Voted(Message, frozen=True, array_like=True, tag=True):
    """`term` is the voter's own; `asked` the term of the question."""

    term: Number
    asked: Number
    is_granted: bool
    is_trial: bool
    is_in_doubt: bool = False
    """It may have lost what it acknowledged or voted for: this counts only where everybody has answered (election.py)."""


class Append(Message, frozen=True, array_like=True, tag=True):
    """Entries after (prev_index, prev_term). prev_index 0: only a round, nothing is said about the log."""

    term: Number
    round: Number
    sent_ms: Number
    commit: Number
    prev_index: Number
    prev_term: Number
    entries: tuple[Entry, ...] = ()
    agreed: Number = 0
    """At this entry more than half of the voters have the state with this hash, or, without one, their states differ; 0: nothing is said (agreement.py)."""
    agreed_state: StateHash = b""
    ends_doubt: bool = False
    """Whoever holds all up to `prev_index` has, with it, everything that it ever acknowledged."""


class Appended(Message, frozen=True, array_like=True, tag=True):
    """`is_ok`: everything before `next` is the leader's own and on disk here. Else: send from `next` (0: just an answer)."""

    term: Number
    round: Number
    sent_ms: Number
    is_ok: bool
    next: Number
    wall_ms: Number = 0
    checkpoint: Number = 0
    """The hash of the state here, at the newest entry where it was taken."""
    state: StateHash = b""
    is_in_doubt: bool = False
    """What it holds counts for nobody's commit until a leader ends that."""
    is_disk_full: bool = False


class Chunk(Message, frozen=True, array_like=True, tag=True):
    """A range of the leader's snapshot at (index, snapshot_term), `size` bytes with BLAKE3 `digest` in all."""

    term: Number
    round: Number
    sent_ms: Number
    index: Number
    snapshot_term: Number
    size: Annotated[int, Meta(ge=1, le=SNAPSHOT_BYTES_MAX)]
    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]
    offset: Number
    data: bytes


class Received(Message, frozen=True, array_like=True, tag=True):
    """So many bytes of the snapshot at `index` have come."""

    term: Number
    round: Number
    sent_ms: Number
    index: Number
    offset: Number
    is_in_doubt: bool = False


class Fetch(Message, frozen=True, array_like=True, tag=True):
    """I am the sole voter and may have lost my last frame: what do you hold behind this entry?"""

    index: Number
    of_term: Number


class Fetched(Message, frozen=True, array_like=True, tag=True):
    """What follows it here; nothing, also when this log does not have it."""

    index: Number
    of_term: Number
    entries: tuple[Entry, ...] = ()


class TimeoutNow(Message, frozen=True, array_like=True, tag=True):
    """The leader hands over: ask for votes at once."""

    term: Number


class Propose(Message, frozen=True, array_like=True, tag=True):
    """A command for the leader to batch. The origin was authenticated by the server that sends this."""

    request: Number
    origin: NodeId
    command: bytes


class Proposed(Message, frozen=True, array_like=True, tag=True):
    """`outcome` is committed, not_committed or unknown."""

    request: Number
    outcome: ShortText
    answer: bytes = b""
    position: Number = 0
    why: str = ""
    code: ShortText = ""
    """Of an error that sending it again does not change now."""
    hint: str = ""


class Read(Message, frozen=True, array_like=True, tag=True):
    """Up to where must a reader have applied that asks now?"""

    request: Number


class ReadAt(Message, frozen=True, array_like=True, tag=True):
    """`position` 0: I do not lead."""

    request: Number
    position: Number


class Heard(Message, frozen=True, array_like=True, tag=True):
    """To the leader: this voter has just said something here."""

    voter: VoterId


class SeatTaken(Message, frozen=True, array_like=True, tag=True):
    """From the leader to a new journal of a node: an older one of it is still heard, and keeps its vote."""

    voter: VoterId


RaftMessage = Vote | Voted | Append | Appended | Chunk | Received | TimeoutNow | Fetch | Fetched
"""For the engine."""

AnyMessage = RaftMessage | Propose | Proposed | Read | ReadAt | Heard | SeatTaken
