"""The journal's format on disk: a chain of frames in segments, and what proves that a frame was written whole.

    segment   [header frame][frame][frame]…[zeros]      every frame begins at a 4 KiB boundary
    frame     length, CRC, CRC of the frame before, offset known durable before it, CRC of these; records; a last byte

The CRCs also cover the incarnation, the segment, the offset and a random of this start, so
neither a user's payload nor an old file that lies in re-used space can pass for a frame.

Where a chain ends, and it always does somewhere, four things can lie (protocol.md 9):

    nothing    zeros to the end of the file: the frame before was the last
    torn       a frame without its last byte: never synced, so never acknowledged
    unproven   a frame of full length that is not what was written: perhaps it was acknowledged
    a gap      the same, or anything else, before a frame that proves it durable: it was
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from msgspec import Struct

from meshd import codec
from meshd.errors import Corrupt, MeshError
from meshd.raft.messages import Number, VoterId
from meshd.raft.state.lineage import Lineage

BLOCK = 4096
"""A sync of one frame never touches the pages of another."""

FRAME_BODY_BYTES_MAX = 64 << 20
"""No group commit comes near; a length beyond it is not a frame."""

FIRST_INDEX = 1
"""PySyncObj's log begins with a placeholder at index 1, term 0."""

FRAME = struct.Struct("<IIIQI")
LAST = b"\xa7"
"""Not zero, whichever one of its bits turns over: a frame that ends in zero was never written to its end."""
FRAME_BYTES_MIN = FRAME.size + len(LAST)
_PLACE = struct.Struct("<QQ")
_SIGNED = struct.Struct("<IIIQ")
PREFIX = "journal-"

Record = tuple[Any, ...]
"""("e", command, index, term) | ("t", term, vote) | ("x", from index) | ("r", index, term) | ("c",): in doubt no more"""


class LocalHeader(Struct, frozen=True):
    """What begins each segment: whose log this is, and what trimming must not lose."""

    mesh: str
    incarnation: str
    start: Number
    """How often this journal has been opened."""
    random: str
    """Of this start, in hex."""
    term: Number = 0
    vote: VoterId | None = None
    is_in_doubt: bool = False
    founding: tuple[VoterId, ...] = ()
    """The first configuration; only the founder's is not empty."""
    takes_over: tuple[Number, Number] | None = None
    """(segment, offset): what that segment holds from there on is ignored, not judged."""
    base: tuple[Number, Number] = (FIRST_INDEX, 0)
    """(index, term) of the last entry before this segment."""
    lineage: Lineage = ()
    """The recoveries of the mesh that this log has been through."""
    voters: tuple[VoterId, ...] = ()
    """The newest configuration that was known when it began: who can help when the entries that say so are lost."""
    lost: str = ""
    """In doubt: what of that was acknowledged for sure. A sole voter must not go on over it, however often it starts."""


class End(Enum):
    """What lies behind the last frame of a chain."""

    NOTHING = "nothing"
    TORN = "torn"
    UNPROVEN = "unproven"
    TAKEN_OVER = "taken over"


@dataclass(frozen=True, slots=True)
class Frame:
    offset: int
    end: int
    body: bytes
    crc: int
    follows: int
    """CRC of the frame before."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes that a later frame, or the successor segment, proves durable, and that are not what was written."""

    offset: int


@dataclass(frozen=True, slots=True)
class Ended:
    offset: int
    end: End


def read_segment(header: LocalHeader, number: int, data: bytes, limit: int | None) -> Iterator[Frame | Gap | Ended]:
    """Its frames in order, gaps among them, and last how it ended. What lies beyond `limit` is ignored, not judged."""
    size = len(data) if limit is None else limit
    offset, previous = 0, 0
    while offset < size:
        frame = _frame_at(header, number, data, offset)
        if frame is not None and frame.follows != previous:
            # Whole, but not of this chain: the one before it is lost.
            yield Gap(offset)
        if frame is None:
            later = _next_frame(header, number, data, offset, size)
            if later is None:
                break
            yield Gap(offset)
            frame = later
        yield frame
        offset, previous = frame.end, frame.crc
    if limit is None:
        yield Ended(offset, _end_at(header, number, data, offset))
        return
    if offset < limit:
        yield Gap(offset)
    yield Ended(limit, End.TAKEN_OVER)


def _next_frame(header: LocalHeader, number: int, data: bytes, offset: int, size: int) -> Frame | None:
    for later in range(offset + BLOCK, min(size, len(data)), BLOCK):
        if (frame := _frame_at(header, number, data, later)) is not None:
            return frame
    return None


def _end_at(header: LocalHeader, number: int, data: bytes, offset: int) -> End:
    if not data[offset:].strip(b"\0"):
        return End.NOTHING
    if offset + FRAME.size > len(data):
        return End.TORN
    length = _length_at(header, number, data, offset)
    if length is None:
        # A sector is written whole or not at all, and these bytes fit into one.
        return End.UNPROVEN
    last = offset + FRAME.size + length
    return End.TORN if last >= len(data) or data[last] == 0 else End.UNPROVEN


def _length_at(header: LocalHeader, number: int, data: bytes, offset: int) -> int | None:
    """How long the frame is that begins here; None when none does."""
    length, crc, previous, durable, check = FRAME.unpack_from(data, offset)
    signed = _SIGNED.pack(length, crc, previous, durable)
    if length > FRAME_BODY_BYTES_MAX or check != zlib.crc32(_place(header, number, offset) + signed):
        return None
    return int(length)


def _frame_at(header: LocalHeader, number: int, data: bytes, offset: int) -> Frame | None:
    """The whole and undamaged frame that begins here."""
    if offset + FRAME_BYTES_MIN > len(data) or (length := _length_at(header, number, data, offset)) is None:
        return None
    _, crc, previous, durable, _ = FRAME.unpack_from(data, offset)
    start = offset + FRAME.size
    last = start + length
    body = data[start:last]
    if data[last : last + 1] != LAST or crc != _checksum(header, number, offset, previous, durable, body):
        return None
    return Frame(offset, aligned(last + 1), body, crc, previous)


def framed(header: LocalHeader, number: int, offset: int, previous: int, body: bytes) -> tuple[bytes, int]:
    """The bytes of a frame at this place, where all before it is durable; and its CRC."""
    crc = _checksum(header, number, offset, previous, offset, body)
    signed = _SIGNED.pack(len(body), crc, previous, offset)
    check = zlib.crc32(_place(header, number, offset) + signed)
    return FRAME.pack(len(body), crc, previous, offset, check) + body + LAST, crc


def _checksum(header: LocalHeader, number: int, offset: int, previous: int, durable: int, body: bytes) -> int:
    signed = _SIGNED.pack(len(body), 0, previous, durable)
    return zlib.crc32(body, zlib.crc32(_place(header, number, offset) + signed))


def _place(header: LocalHeader, number: int, offset: int) -> bytes:
    return f"{header.incarnation}{header.random}".encode() + _PLACE.pack(number, offset)


def read_header(number: int, data: bytes) -> LocalHeader | None:
    """None when it is not what was written: then no frame of the segment can be told from rubbish."""
    try:
        length = FRAME.unpack_from(data, 0)[0]
        header: LocalHeader = codec.decode(data[FRAME.size : FRAME.size + length], LocalHeader)
    except (MeshError, struct.error):
        return None
    return None if _frame_at(header, number, data, 0) is None else header


def records_of(name: str, offset: int, body: bytes) -> Sequence[Record]:
    try:
        records = codec.unpack(body, bytes_max=FRAME_BODY_BYTES_MAX)
    except MeshError as error:
        raise Corrupt(f"journal {name} at byte {offset}: {error.message}") from error
    if not isinstance(records, tuple):
        raise Corrupt(f"journal {name} at byte {offset}: no list of records")
    return records


def segment_name(number: int) -> str:
    return f"{PREFIX}{number:012d}"


def numbers(names: Sequence[str]) -> list[int]:
    """The segments among these files, oldest first."""
    found = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    return sorted(int(rest) for rest in found if rest.isascii() and rest.isdigit())


def aligned(offset: int) -> int:
    return -(-offset // BLOCK) * BLOCK
