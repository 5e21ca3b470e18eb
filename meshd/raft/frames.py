"""The journal's format on disk: a chain of frames in segments, and what proves that a frame was written whole.

    segment   [header frame][frame][frame]…      every frame begins at a 4 KiB boundary
    frame     length, CRC, CRC of the frame before, offset known durable before it, records

The CRC also covers the incarnation, the segment, the offset and a random of this start, so
neither a user's payload nor an old file that lies in re-used space can pass for a frame.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import Struct

from meshd import codec
from meshd.errors import Corrupt, MeshError
from meshd.raft.lineage import Lineage
from meshd.raft.messages import VoterId

BLOCK = 4096
"""A sync of one frame never touches the pages of another."""

FRAME_BODY_BYTES_MAX = 64 << 20
"""No group commit comes near; a length beyond it is not a frame."""

FIRST_INDEX = 1
"""PySyncObj's log begins with a placeholder at index 1, term 0."""

FRAME = struct.Struct("<IIIQ")
_PLACE = struct.Struct("<QQ")
PREFIX = "journal-"

Record = tuple[Any, ...]
"""("e", command, index, term) | ("t", term, vote) | ("x", from index) | ("r", index, term)"""


class LocalHeader(Struct, frozen=True):
    """What begins each segment: whose log this is, and what trimming must not lose."""

    mesh: str
    incarnation: str
    start: int
    """How often this journal has been opened."""
    random: str
    """Of this start, in hex."""
    term: int = 0
    vote: VoterId | None = None
    is_in_doubt: bool = False
    founding: tuple[VoterId, ...] = ()
    """The first configuration; only the founder's is not empty."""
    takes_over: tuple[int, int] | None = None
    """(segment, offset): what that segment holds from there on is ignored, not judged."""
    base: tuple[int, int] = (FIRST_INDEX, 0)
    """(index, term) of the last entry before this segment."""
    lineage: Lineage = ()
    """The recoveries of the mesh that this log has been through."""


def frames(
    name: str, number: int, header: LocalHeader, data: bytes, limit: int | None
) -> Iterator[tuple[int, int, bytes]]:
    """(offset, end, body) of each frame of the chain, up to `limit` or a torn tail. Raises Corrupt."""
    offset, previous = 0, 0
    while limit is None or offset < limit:
        frame = _frame_at(header, number, data, offset)
        if frame is None or frame[1] != previous:
            break
        body, _, crc, _ = frame
        end = aligned(offset + FRAME.size + len(body))
        yield offset, end, body
        offset, previous = end, crc
    else:
        return
    if offset == 0:
        raise Corrupt(f"journal {name} is damaged at byte 0: its header is not what was written")
    if limit is not None:
        raise Corrupt(f"journal {name} is damaged at byte {offset}, before byte {limit} where its successor takes over")
    for later in range(offset + BLOCK, len(data), BLOCK):
        frame = _frame_at(header, number, data, later)
        if frame is not None and frame[3] > offset:
            raise Corrupt(f"journal {name} is damaged at byte {offset}: the frame at {later} proves it was durable")


def _frame_at(header: LocalHeader, number: int, data: bytes, offset: int) -> tuple[bytes, int, int, int] | None:
    """(body, CRC of the frame before, own CRC, offset durable before), or None when there is no whole frame here."""
    if offset + FRAME.size > len(data):
        return None
    length, crc, previous, durable = FRAME.unpack_from(data, offset)
    start = offset + FRAME.size
    if length > FRAME_BODY_BYTES_MAX or start + length > len(data):
        return None
    body = data[start : start + length]
    if crc != checksum(header, number, offset, previous, durable, body):
        return None
    return body, previous, crc, durable


def checksum(header: LocalHeader, number: int, offset: int, previous: int, durable: int, body: bytes) -> int:
    place = f"{header.incarnation}{header.random}".encode() + _PLACE.pack(number, offset)
    return zlib.crc32(body, zlib.crc32(place + FRAME.pack(len(body), 0, previous, durable)))


def read_header(name: str, data: bytes) -> LocalHeader:
    try:
        length = FRAME.unpack_from(data, 0)[0]
        return codec.decode(data[FRAME.size : FRAME.size + length], LocalHeader)
    except (MeshError, struct.error) as error:
        raise Corrupt(f"journal {name} is damaged at byte 0: its header cannot be read") from error


def records_of(name: str, offset: int, body: bytes) -> list[Record]:
    try:
        records: Sequence[Record] = codec.unpack(body, bytes_max=FRAME_BODY_BYTES_MAX)
    except MeshError as error:
        raise Corrupt(f"journal {name} at byte {offset}: {error.message}") from error
    return list(records)


def segment_name(number: int) -> str:
    return f"{PREFIX}{number:012d}"


def aligned(offset: int) -> int:
    return -(-offset // BLOCK) * BLOCK
