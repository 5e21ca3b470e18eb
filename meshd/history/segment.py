"""A segment of history as bytes: finished jobs, the same at every server that makes it from the same rows.

    file    magic, number of the segment, then frames
    frame   kind, length, CRC-32 of kind and body, body (msgpack)
    job     its rows in pieces of a few hundred tasks, then one entry: the job without rows, and where the pieces lie

The BLAKE3 of all of it is agreed by the log and names the blob. The CRCs are for whoever reads one
job out of a file that was verified long ago.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from meshd import codec
from meshd.errors import Corrupt, InvalidRequest
from meshd.model import FINAL_STATES
from meshd.raft.state.ids import number_of
from meshd.raft.state.jobs import Job, JobRecord, Row

_HEAD = struct.Struct("<8sQ")
_FRAME = struct.Struct("<BII")
_MAGIC = b"meshdhi1"
_ROWS, _ENTRY = 1, 2

PIECE_ROWS = 256
"""Up to 12 KiB each inline: one piece is read for one task."""
BODY_BYTES_MAX = 1 << 30
"""An array of 10⁷ tasks whose every other one failed takes 160 MB of ranges."""
CHUNK_BYTES = 1 << 20
NUMBER_MAX = (1 << 63) - 1
"""More jobs no index can number."""


class Piece(Struct, frozen=True, array_like=True, gc=False):
    """Rows of tasks `first` to `last`: a frame of `length` bytes at `offset`."""

    first: int
    last: int
    offset: int
    length: int


class Entry(Struct, frozen=True, array_like=True, gc=False):
    record: JobRecord
    """Without its rows."""
    pieces: tuple[Piece, ...]


def pack(number: int, records: Iterable[JobRecord]) -> Iterator[bytes]:
    """The segment in chunks of about a megabyte: canonical, whatever the order in which a replica came to its rows."""
    waiting, waiting_bytes = [_HEAD.pack(_MAGIC, number)], _HEAD.size
    offset = _HEAD.size
    for record in records:
        for frame in _frames(record, offset):
            offset += len(frame)
            waiting.append(frame)
            waiting_bytes += len(frame)
            if waiting_bytes >= CHUNK_BYTES:
                yield b"".join(waiting)
                waiting, waiting_bytes = [], 0
    if waiting:
        yield b"".join(waiting)


def _frames(record: JobRecord, offset: int) -> Iterator[bytes]:
    pieces: list[Piece] = []
    rows = iter(sorted(record.results.items()))
    while piece := dict(islice(rows, PIECE_ROWS)):
        frame = _frame(_ROWS, piece)
        pieces.append(Piece(min(piece), max(piece), offset, len(frame)))
        offset += len(frame)
        yield frame
    bare = replace(record, rows={}, results={}, ended=tuple(sorted(record.ended)))
    yield _frame(_ENTRY, Entry(bare, tuple(pieces)))


def _frame(kind: int, value: Any) -> bytes:
    body = codec.encode(value)
    return _FRAME.pack(kind, len(body), zlib.crc32(body, kind)) + body


def entries(number: int, data: bytes) -> Iterator[tuple[bytes, Entry]]:
    """The jobs of a segment in order, each with the bytes of its frame. Raises Corrupt."""
    if len(data) < _HEAD.size or _HEAD.unpack_from(data) != (_MAGIC, number):
        raise Corrupt(f"this is no segment {number} of the history")
    at, view = _HEAD.size, memoryview(data)
    while at < len(data):
        kind, length = _extent(view[at:])
        end = at + _FRAME.size + length
        if kind == _ENTRY:
            frame = bytes(view[at:end])
            yield frame, read_entry(frame)
        else:
            read_rows(view[at:end])
        at = end


def read_entry(frame: bytes) -> Entry:
    """Raises Corrupt."""
    entry: Entry = _read(frame, _ENTRY, Entry)
    try:
        number_of(entry.record.id)
        if not _is_finished(entry.record.job()):
            raise ValueError(f"{entry.record.id} is not finished")
    except (InvalidRequest, ValueError, OverflowError) as error:
        raise Corrupt(f"an entry of the history is no finished job: {error}") from error
    return entry


def _is_finished(job: Job) -> bool:
    ended = sum(len(tasks) for state, tasks in job.ended.items() if state in FINAL_STATES)
    is_whole = ended == job.spec.array.count and not job.unfinished
    return is_whole and job.is_final and 0 <= job.number <= NUMBER_MAX


def read_rows(frame: bytes | memoryview) -> dict[int, Row]:
    """Raises Corrupt."""
    return _read(frame, _ROWS, dict[int, Row])  # type: ignore[no-any-return]


def _extent(data: bytes | memoryview) -> tuple[int, int]:
    if len(data) < _FRAME.size:
        raise Corrupt("a frame of the history is cut off")
    kind, length, _ = _FRAME.unpack_from(data)
    if kind not in (_ROWS, _ENTRY) or _FRAME.size + length > len(data):
        raise Corrupt("a frame of the history is damaged: its head is nonsense")
    return kind, length


def _read(frame: bytes | memoryview, wanted: int, kind_of: Any) -> Any:
    kind, length = _extent(frame)
    body = frame[_FRAME.size : _FRAME.size + length]
    if kind != wanted or zlib.crc32(body, kind) != _FRAME.unpack_from(frame)[2]:
        raise Corrupt("a frame of the history is damaged: it does not have its checksum")
    try:
        return codec.decode(body, kind_of, bytes_max=BODY_BYTES_MAX)
    except InvalidRequest as error:
        raise Corrupt(f"a frame of the history cannot be read: {error.message}") from error
