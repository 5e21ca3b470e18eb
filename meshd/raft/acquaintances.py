"""What this server remembers of other servers' journals, so that an older copy of one cannot pass for it (protocol.md 1).

A directory that was restored from a backup, or started a second time from a copy, has a start
counter, or a term, below what its peers have seen; a copy that ran beside it has the same
counter with another random. Voting with it could undo what it had promised. Where no peer
remembers, it goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3
from msgspec import Struct
from msgspec.structs import replace

from meshd import codec
from meshd.errors import MeshError
from meshd.raft.messages import VoterId
from meshd.raft.storage.disk import Disk

SEEN_MAX = 256
"""Incarnations remembered; who greeted longest ago is forgotten first. Servers are few, and each has one at a time."""

_FILE = "acquaintances"
_DIGEST_BYTES = 32


class Seen(Struct, frozen=True, array_like=True):
    """The newest that was heard of one incarnation."""

    voter: VoterId
    start: int
    random: str
    term: int


class Acquaintances:
    def __init__(self, seen: Iterable[Seen] = ()) -> None:
        """`seen` in the order in which they greeted."""
        self._seen = {each.voter: each for each in seen}
        self.changes = 0
        """Rises with each change worth writing down."""

    def why_older(self, told: Seen, *, is_in_doubt: bool = False) -> str:
        """What shows that whoever says this of itself is an older copy; empty when nothing does.

        Of one start, a greeting may well be overtaken by what was said later: its term shows nothing.
        One in doubt may have lost terms with the end of its log, and does not count before it is mended.
        """
        known = self._seen.get(told.voter)
        if known is None:
            return ""
        if told.start < known.start:
            return f"it was started {known.start} times before, and this is start {told.start}"
        if told.start == known.start:
            return "" if told.random == known.random else f"its start {known.start} was another one"
        if told.term < known.term and not is_in_doubt:
            return f"it has been in term {known.term}, and this one has only reached {told.term}"
        return ""

    def greeted(self, told: Seen) -> None:
        """It was let in with this."""
        known = self._seen.pop(told.voter, None)
        if known is not None and known.random == told.random:
            told = replace(told, term=max(known.term, told.term))
        self._seen[told.voter] = told
        if known == told:
            return
        while len(self._seen) > SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        self.changes += 1

    def spoke(self, voter: VoterId, term: int) -> None:
        """It said something in this term, which was on its disk by then."""
        known = self._seen.get(voter)
        if known is not None and term > known.term:
            self._seen[voter] = replace(known, term=term)
            self.changes += 1

    def packed(self) -> bytes:
        data = codec.encode(tuple(self._seen.values()))
        return blake3(data).digest() + data


def load_acquaintances(disk: Disk) -> Acquaintances:
    """As they were last saved (blocks)."""
    try:
        return unpack_acquaintances(disk.read(_FILE)) if _FILE in disk.names() else Acquaintances()
    except OSError:
        return Acquaintances()


def unpack_acquaintances(content: bytes) -> Acquaintances:
    """What cannot be read is forgotten: it is a memory, and nothing rests on it."""
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if blake3(data).digest() != digest:
        return Acquaintances()
    try:
        return Acquaintances(codec.decode(data, tuple[Seen, ...]))
    except MeshError:
        return Acquaintances()


def save_acquaintances(disk: Disk, packed: bytes) -> None:
    """Durable when it returns (blocks). Raises OSError."""
    beside = f"{_FILE}.new"
    if beside in disk.names():
        disk.remove(beside)
    file = disk.open(beside)
    try:
        file.write_at(0, packed)
        file.sync()
    finally:
        file.close()
    disk.rename(beside, _FILE)
    disk.sync_directory()
