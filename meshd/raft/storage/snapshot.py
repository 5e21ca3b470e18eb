"""The state at one index, on disk and on its way to a peer that is too far behind for entries.

    file   magic, local header, image, BLAKE3 of all before it
    image  msgpack (mesh, index, term, voters, state): the same bytes travel to peers

A snapshot is written beside, synced, read back and verified, renamed, and its directory
synced, before it counts. The one before it is kept, and the log back to that one: should the
newest rot, a start goes on from there without a gap (protocol.md 9). Everybody does so, not
only a sole voter: it costs one more copy of the state, and saves the transfer of another.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Annotated

from blake3 import blake3
from msgspec import Meta, Struct

from meshd import codec
from meshd.errors import Busy, Corrupt, MeshError, PeerFault
from meshd.raft.configurations import VOTERS_MAX
from meshd.raft.messages import SNAPSHOT_BYTES_MAX, Number, VoterId
from meshd.raft.storage.disk import Disk
from meshd.raft.storage.frames import LocalHeader
from meshd.raft.storage.segments import NEW, is_full, set_aside

_MAGIC = b"meshdsn1"
_LENGTHS = struct.Struct("<II")
_DIGEST_BYTES = 32
_PREFIX = "snapshot-"

INDEX_MAX = 2**48
"""No mesh writes so much; the entries after it must have numbers that messages can carry."""

KEPT = 2
"""Snapshots on disk: the newest, and the one to fall back to."""


class Image(Struct, frozen=True, array_like=True):
    """What a snapshot says, whoever holds it."""

    mesh: str
    index: Annotated[int, Meta(ge=1, le=INDEX_MAX)]
    term: Number
    voters: Annotated[tuple[VoterId, ...], Meta(max_length=VOTERS_MAX)]
    """The configuration as of `index`."""
    state: bytes


class Packed(Struct, frozen=True):
    """An image as bytes, ready to be sent or written."""

    index: int
    term: int
    data: bytes
    digest: bytes


def pack_image(image: Image) -> Packed:
    """Blocks for as long as packing and hashing take; for a thread."""
    data = codec.encode(image)
    return Packed(image.index, image.term, data, blake3(data).digest())


def unpack_image(data: bytes, *, digest: bytes, mesh: str) -> Image:
    """What a peer sent, verified and parsed (blocks). Raises PeerFault."""
    if blake3(data).digest() != digest:
        raise PeerFault("a snapshot's bytes do not have its digest")
    try:
        return _parse(data, mesh, "a snapshot from a peer")
    except Corrupt as error:
        raise PeerFault(error.message) from error


def save(disk: Disk, packed: Packed, header: LocalHeader) -> int:
    """Durable and read back when it returns (blocks). The index of the one before it: up to there the log may go.

    Raises Busy when the disk is full, and then nothing has changed; Corrupt when it fails.
    """
    name = f"{_PREFIX}{packed.index:020d}"
    beside = name + NEW
    local = codec.encode(header)
    content = _MAGIC + _LENGTHS.pack(len(local), len(packed.data)) + local + packed.data
    content += blake3(content).digest()
    try:
        file = disk.open(beside)
        try:
            # Taken first: a disk that is full refuses here, and not in the middle of a sync.
            file.reserve(len(content))
            file.write_at(0, content)
            file.sync()
        finally:
            file.close()
        if disk.read(beside) != content:
            raise Corrupt(f"{beside} does not read back as it was written")
        disk.rename(beside, name)
        disk.sync_directory()
        kept = _names(disk)[-KEPT:]
        for older in _names(disk)[:-KEPT]:
            disk.remove(older)
        return int(kept[0].removeprefix(_PREFIX)) if len(kept) == KEPT else 0
    except OSError as error:
        if is_full(error):
            with suppress(OSError):
                disk.remove(beside)
            raise Busy(f"snapshot {name} found no room: {error}") from error
        raise Corrupt(f"snapshot {name} could not be written: {error}") from error


def load(disk: Disk, *, mesh: str) -> Packed | None:
    """The newest one as it is sent (blocks); None when there is none. Raises Corrupt."""
    names = _names(disk)
    return _read(disk, names[-1], mesh)[1] if names else None


def newest_readable(disk: Disk, *, mesh: str) -> tuple[Image | None, list[str]]:
    """At a start (blocks): the newest image that is what was written, and the names of newer ones that are not."""
    for name in disk.names():
        if name.startswith(_PREFIX) and name.endswith(NEW):
            disk.remove(name)
    damaged: list[str] = []
    for name in reversed(_names(disk)):
        try:
            return _read(disk, name, mesh)[0], damaged
        except Corrupt:
            damaged.append(name)
    return None, damaged


def _read(disk: Disk, name: str, mesh: str) -> tuple[Image, Packed]:
    try:
        content = disk.read(name)
    except OSError as error:  # a disk that cannot give it back has damaged it
        raise Corrupt(f"{name} cannot be read: {error}") from error
    start = len(_MAGIC) + _LENGTHS.size
    if len(content) < start + _DIGEST_BYTES or content[: len(_MAGIC)] != _MAGIC:
        raise Corrupt(f"{name} is not a snapshot")
    if blake3(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        raise Corrupt(f"{name} is damaged: its {len(content)} bytes do not have its digest")
    local, size = _LENGTHS.unpack_from(content, len(_MAGIC))
    data = content[start + local : start + local + size]
    image = _parse(data, mesh, name)
    return image, Packed(image.index, image.term, data, blake3(data).digest())


def set_all_aside(disk: Disk) -> None:
    """The state that snapshots hold is not to be trusted: the next start gets it anew. They stay for whoever looks into it (blocks)."""
    for name in _names(disk):
        set_aside(disk, name)
    disk.sync_directory()


def set_newest_aside(disk: Disk) -> None:
    """It cannot be read (blocks)."""
    set_aside(disk, _names(disk)[-1])
    disk.sync_directory()


def _parse(data: bytes, mesh: str, what: str) -> Image:
    try:
        image: Image = codec.decode(data, Image, bytes_max=SNAPSHOT_BYTES_MAX)
    except MeshError as error:
        raise Corrupt(f"{what} cannot be read: {error.message}") from error
    if image.mesh != mesh:
        raise Corrupt(f"{what} belongs to mesh {image.mesh}, not {mesh}")
    return image


def _names(disk: Disk) -> list[str]:
    return sorted(name for name in disk.names() if name.startswith(_PREFIX) and name[len(_PREFIX) :].isdigit())
