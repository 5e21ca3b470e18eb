"""What gossip says on the wire: small typed messages, bounded before they are read.

    gossip.ping      Beat → Beat              I am here, and this is the hash of all I know
    gossip.indirect  Reach → Reached          can you reach this node, which I cannot?
    gossip.exchange  Compare → Versions       where do we differ? (only after two hashes differed)
                     Swap → News              here is what you lack; give me what I lack
    gossip.tell      News → b""               this has just changed

What is said of a third node carries that node's signature: a chunk of its facts, and the
incarnation of a claim about it. Bytes that are signed begin with a domain of their own, so
that a signature made for one purpose proves nothing in another.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from meshd import codec
from meshd.model import Count, NodeId

VALUE_BYTES_MAX = 4096
"""One fact; anything larger is a blob."""

KEY_CHARS_MAX = 256

CHUNK_BYTES_MAX = 16 << 10
"""One signed chunk: about 200 blob locations, so that a signature is shared, yet four fit into one delta."""

CHUNKS_PER_NEWS_MAX = 32
"""Checking a signature takes about 0.13 ms, and one message may hold up the loop for 10 ms at most."""

CLAIMS_PER_NEWS_MAX = 32
"""Each may need its signature checked, too. A mesh of hundreds takes some rounds to be told whole."""

DELTA_BYTES_MAX = 64 << 10
"""Chunks in one message. More is asked for again; a slow peer is never drowned."""

BUCKETS = 64
"""Hashes in one comparison: 512 bytes narrow a difference to 1/64 of the mesh."""

ROWS_MAX = 256
"""Versions in one answer, about 80 bytes each. Full buckets are sent until this many are reached."""

MESSAGE_BYTES_MAX = 160 << 10
"""A delta, its claims and rows, with room for framing."""

NodeName = Annotated[NodeId, Meta(min_length=1, max_length=128)]
Signature = Annotated[bytes, Meta(max_length=64)]


class Chunk(Struct, frozen=True, array_like=True):
    """Part `number` of what a node says of itself in this incarnation; parts below `floor` are void.

    A value of None takes the key back.
    """

    node: NodeName
    incarnation: Count
    number: Annotated[int, Meta(ge=1, le=2**53)]
    floor: Annotated[int, Meta(ge=1, le=2**53)]
    entries: tuple[
        tuple[
            Annotated[str, Meta(min_length=1, max_length=KEY_CHARS_MAX)],
            Annotated[bytes, Meta(max_length=VALUE_BYTES_MAX)] | None,
        ],
        ...,
    ]


class SignedChunk(Struct, frozen=True, array_like=True):
    """The msgpack of a `Chunk`, passed on as it is, with its owner's signature."""

    body: Annotated[bytes, Meta(max_length=CHUNK_BYTES_MAX)]
    signature: Signature


class Claim(Struct, frozen=True, array_like=True):
    """This node lives, or does not answer, in this incarnation. `proof`: its own signature that it got that far.

    Incarnation 0 is a node nobody has heard from; it needs no proof.
    """

    node: NodeName
    incarnation: Count
    is_accused: bool
    proof: Signature = b""


class Row(Struct, frozen=True, array_like=True):
    """How much is known of a node: its chunks up to `upto`, and the claim about its life."""

    node: NodeName
    incarnation: Count = 0
    upto: Count = 0
    life: Count = 0
    is_accused: bool = False


class Beat(Struct, frozen=True, array_like=True):
    """Ping and answer. `yours`: what is held against the receiver, so that it can object at once."""

    root: Annotated[bytes, Meta(min_length=8, max_length=8)]
    mine: Claim
    yours: Claim | None = None


class Reach(Struct, frozen=True, array_like=True):
    target: NodeName
    about: Claim | None = None


class Reached(Struct, frozen=True, array_like=True):
    is_reached: bool
    claim: Claim | None = None
    """What the relay knows of the target after it answered."""


class News(Struct, frozen=True, array_like=True):
    chunks: Annotated[tuple[SignedChunk, ...], Meta(max_length=CHUNKS_PER_NEWS_MAX)] = ()
    claims: Annotated[tuple[Claim, ...], Meta(max_length=CLAIMS_PER_NEWS_MAX)] = ()


class Compare(Struct, frozen=True, array_like=True, tag=True):
    hashes: Annotated[bytes, Meta(min_length=8 * BUCKETS, max_length=8 * BUCKETS)]


Rows = Annotated[tuple[Row, ...], Meta(max_length=ROWS_MAX)]
BucketList = Annotated[tuple[Annotated[int, Meta(ge=0, lt=BUCKETS)], ...], Meta(max_length=BUCKETS)]


class Versions(Struct, frozen=True, array_like=True):
    """All rows of these buckets."""

    buckets: BucketList
    rows: Rows


class Swap(Struct, frozen=True, array_like=True, tag=True):
    buckets: BucketList
    rows: Rows
    news: News


def chunk_payload(body: bytes) -> bytes:
    """The bytes a node signs for a chunk of its facts."""
    return b"meshd/gossip/facts/1\n" + body


def life_payload(node: NodeId, incarnation: int) -> bytes:
    """The bytes a node signs for having reached an incarnation."""
    return b"meshd/gossip/life/1\n" + codec.encode((node, incarnation))
