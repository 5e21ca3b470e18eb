"""Everyone's facts: a map that any two nodes can merge, in any order, as often as they like.

Each node owns the facts it signed, in its newest incarnation, as numbered chunks
(own.py). What is known of an owner is a set of chunks: merging is set union, then
whatever lies below the highest floor seen falls away, and a higher incarnation
replaces a lower one whole. So merge is commutative, associative and idempotent, and
a replayed or reordered chunk changes nothing (the laws are in tests/laws).

The version of an owner is one pair, (incarnation, upto): all chunks to `upto` are here.
Two nodes with equal pairs hold equal facts (van Renesse 2008, "scuttlebutt"), unless the
owner itself signs two different chunks of one number; then they differ on its facts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

from meshd import codec
from meshd.errors import MeshError
from meshd.gossip.messages import (
    CHUNK_BYTES_MAX,
    CHUNKS_PER_NEWS_MAX,
    DELTA_BYTES_MAX,
    Chunk,
    Row,
    SignedChunk,
    chunk_payload,
)
from meshd.gossip.own import KEYS_MAX, OwnFacts, Sign
from meshd.model import NodeId

OWNER_BYTES_MAX = 12 << 20
"""Chunks kept of one owner: what is alive, as much waste, and both once more while it writes itself anew."""

OWNER_CHUNKS_MAX = 4096
"""An honest owner stays under 1,100 (own.py); chunks with gaps between them count too."""

GONE_MAX = 2 * KEYS_MAX
"""Keys taken back and remembered, of one owner: an honest one writes itself anew long before."""

_PAST_EVERYTHING = 2**53

Verify = Callable[[NodeId, bytes, bytes], bool]
"""verify(node, payload, signature): did this node sign it?"""


class Merged(StrEnum):
    """What became of a chunk."""

    NEW = "new"
    KNOWN = "known"
    """A duplicate, or void already: harmless."""
    STALE = "stale"
    """Of an incarnation that has been replaced: a replay, or a slow path."""
    MALFORMED = "malformed"
    STRANGER = "stranger"
    """Its owner is not a member (or not known to be one yet)."""
    FORGED = "forged"
    OVER_LIMIT = "over_limit"
    OUTBID = "outbid"
    """An older life of this very node was ahead of it; it has moved past that."""


class _Owner:
    """The chunks of one node in one incarnation, and the facts in them."""

    def __init__(self, incarnation: int, *, floor: int = 1) -> None:
        self.incarnation = incarnation
        self.floor = floor
        self.upto = floor - 1
        self.chunks: dict[int, SignedChunk] = {}
        # Two levels, the part before "/" first: whoever looks for offers need not pass 20,000 blobs.
        self.spaces: dict[str, dict[str, tuple[int, bytes]]] = {}
        # A key taken back is remembered only while something older may still arrive; by key, and by chunk.
        self._gone: dict[str, int] = {}
        self._gone_in: dict[int, list[str]] = {}
        self._bytes = 0
        self._keys = 0

    def knows(self, number: int) -> bool:
        return number < self.floor or number <= self.upto or number in self.chunks

    def add(self, chunk: Chunk, signed: SignedChunk) -> bool:
        """False when the owner now says more than any honest node may."""
        self.chunks[chunk.number] = signed
        self._bytes += len(signed.body)
        for key, value in chunk.entries:
            self._put(key, value, chunk.number)
        if chunk.floor > self.floor:
            self._raise_floor(chunk.floor)
        while self.upto + 1 in self.chunks:
            self.upto += 1
        self._forget_gone()
        is_honest = self._keys <= KEYS_MAX and len(self._gone) <= GONE_MAX
        return is_honest and self._bytes <= OWNER_BYTES_MAX and len(self.chunks) <= OWNER_CHUNKS_MAX

    def lacking(self, upto: int) -> list[SignedChunk]:
        """What someone needs who has everything to `upto`, in the order that helps most."""
        missing = sorted(number for number in self.chunks if number > upto)
        if missing and upto + 1 < self.floor:
            # The newest chunk names the floor. Without it the receiver would wait for void parts for ever.
            missing.insert(0, missing.pop())
        return [self.chunks[number] for number in missing]

    def _put(self, key: str, value: bytes | None, number: int) -> None:
        name = key.partition("/")[0]
        space = self.spaces.get(name, {})
        old = space.get(key)
        if self._gone.get(key, 0) > number or (old is not None and old[0] > number):
            return
        if value is not None:
            self._keys += old is None
            space[key] = (number, value)
            self.spaces[name] = space
            return
        self._gone[key] = number
        self._gone_in.setdefault(number, []).append(key)
        if old is not None:
            self._drop(name, key)

    def _forget_gone(self) -> None:
        for number in [number for number in self._gone_in if number <= self.upto]:
            for key in self._gone_in.pop(number):
                if self._gone.get(key) == number:
                    del self._gone[key]

    def _drop(self, name: str, key: str) -> None:
        space = self.spaces[name]
        del space[key]
        if not space:
            del self.spaces[name]
        self._keys -= 1

    def _raise_floor(self, floor: int) -> None:
        self.floor = floor
        self.upto = max(self.upto, floor - 1)
        for number in [number for number in self.chunks if number < floor]:
            self._bytes -= len(self.chunks.pop(number).body)
        for name, space in list(self.spaces.items()):
            for key in [key for key, (number, _) in space.items() if number < floor]:
                self._drop(name, key)


class Facts:
    def __init__(self, me: NodeId, incarnation: int, sign: Sign, verify: Verify) -> None:
        self._me = me
        self._verify = verify
        self._own = OwnFacts(me, incarnation, sign)
        self._owners: dict[NodeId, _Owner] = {me: _Owner(incarnation)}

    @property
    def incarnation(self) -> int:
        return self._own.incarnation

    @property
    def is_sealed(self) -> bool:
        """Nothing of this node waits to be signed."""
        return self._own.is_sealed

    def set(self, key: str, value: bytes | None) -> bool:
        """Say this of ourselves from the next `seal` on; None takes it back. True when it changes anything.

        Raises InvalidRequest, TooLarge or Busy, see `OwnFacts.set`.
        """
        return self._own.set(key, value)

    def seal(self) -> list[SignedChunk]:
        """Sign what is pending, a bounded part at a time, and see it ourselves."""
        written = self._own.seal()
        mine = self._owners[self._me]
        for signed in written:
            mine.add(codec.decode(signed.body, Chunk), signed)
        return written

    def set_members(self, nodes: Iterable[NodeId]) -> None:
        """Keep facts of these nodes only, and accept only theirs."""
        self._owners = {node: self._owners.get(node) or _Owner(0) for node in {*nodes, self._me}}

    def merge(self, signed: SignedChunk) -> tuple[Merged, NodeId | None]:
        """Take a chunk from whoever brought it; the owner it is about, when it could be read. Never raises.

        The cheap questions come first: a signature is checked only of what would be new.
        """
        try:
            chunk: Chunk = codec.decode(signed.body, Chunk, bytes_max=CHUNK_BYTES_MAX)
        except MeshError:
            return Merged.MALFORMED, None
        node = chunk.node
        owner = self._owners.get(node)
        if owner is None:
            return Merged.STRANGER, node
        if chunk.floor > chunk.number:
            return Merged.MALFORMED, node
        if chunk.incarnation < owner.incarnation:
            return Merged.STALE, node
        if chunk.incarnation == owner.incarnation and owner.knows(chunk.number):
            return Merged.KNOWN, node
        if not self._verify(node, chunk_payload(signed.body), signed.signature):
            return Merged.FORGED, node
        if node == self._me:
            self._own.outbid(chunk.incarnation)
            self._owners[node] = _Owner(self._own.incarnation)
            return Merged.OUTBID, node
        if chunk.incarnation > owner.incarnation:
            owner = self._owners[node] = _Owner(chunk.incarnation)
        if not owner.add(chunk, signed):
            # Nothing of it is kept, and nothing more is asked for, or it would be sent again and again.
            self._owners[node] = _Owner(chunk.incarnation, floor=_PAST_EVERYTHING)
            return Merged.OVER_LIMIT, node
        return Merged.NEW, node

    def version(self, node: NodeId) -> tuple[int, int]:
        """(incarnation, upto); (0, 0) of a node nothing is known of."""
        owner = self._owners.get(node)
        return (owner.incarnation, owner.upto) if owner is not None else (0, 0)

    def delta(self, theirs: Iterable[Row], *, bytes_max: int = DELTA_BYTES_MAX) -> tuple[SignedChunk, ...]:
        """What a peer with these versions lacks, at most `bytes_max` and `CHUNKS_PER_NEWS_MAX` chunks of it.

        Who lacks little comes first, so that a newcomer with much to say does not hold up small news.
        """
        lacking = []
        for row in theirs:
            owner = self._owners.get(row.node)
            if owner is None or row.incarnation > owner.incarnation:
                continue
            upto = row.upto if row.incarnation == owner.incarnation else 0
            lacking.append((max(0, owner.upto - upto), row.node, owner.lacking(upto)))
        chunks: list[SignedChunk] = []
        for _, _, missing in sorted(lacking, key=lambda entry: entry[:2]):
            for signed in missing:
                bytes_max -= len(signed.body)
                if bytes_max < 0 or len(chunks) == CHUNKS_PER_NEWS_MAX:
                    return tuple(chunks)
                chunks.append(signed)
        return tuple(chunks)

    def fact(self, node: NodeId, key: str) -> bytes | None:
        """What a node says, as far as it has reached us; our own once it is sealed."""
        owner = self._owners.get(node)
        found = owner.spaces.get(key.partition("/")[0], {}).get(key) if owner is not None else None
        return None if found is None else found[1]

    def facts(self, prefix: str) -> dict[tuple[NodeId, str], bytes]:
        """All facts whose key begins so. A prefix with a "/" reads that space only; ask for "blob/" rarely."""
        name, slash, _ = prefix.partition("/")
        found = {}
        for node, owner in self._owners.items():
            for space_name, space in owner.spaces.items():
                if space_name == name or (not slash and space_name.startswith(name)):
                    found.update({(node, key): fact[1] for key, fact in space.items() if key.startswith(prefix)})
        return found

    def who_says(self, key: str) -> tuple[NodeId, ...]:
        """The nodes that have this key."""
        name = key.partition("/")[0]
        return tuple(node for node, owner in self._owners.items() if key in owner.spaces.get(name, {}))
