"""Arbitrary bytes in the segment files of a journal, also with right checksums: what a disk, or another program, left there.

May be raised: Corrupt, StartRefused. What opens, opens again with the same entries.
A frame is a piece of the newest segment: 0 begins a segment with these raw bytes, 1 begins one with this header,
2 goes on with this body as a right frame of the chain, 3 with these raw bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

from fuzz.inputs import join, split
from meshd import codec
from meshd.errors import Corrupt, MeshError, StartRefused
from meshd.raft.frames import FRAME, LocalHeader, aligned, checksum, segment_name
from meshd.raft.journal import open_journal
from meshd.raft.messages import NO_OP
from meshd.testing.raft_disk import MemoryDisk

FRAMED = True
MESH = "mesh"
SEGMENTS_MAX = 8


class Segment:
    def __init__(self, number: int) -> None:
        self.number = number
        self.data = bytearray()
        self.header: LocalHeader | None = None
        self._last_crc = 0

    def begin(self, header: bytes) -> None:
        try:
            self.header = codec.decode(header, LocalHeader)
        except MeshError:
            self.data += header
            return
        self.add(header)

    def add(self, body: bytes) -> None:
        if self.header is None:
            self.data += body
            return
        offset = aligned(len(self.data))
        self.data += bytes(offset - len(self.data))
        try:
            crc = checksum(self.header, self.number, offset, self._last_crc, offset, body)
        except UnicodeEncodeError:
            crc = 0
        self.data += FRAME.pack(len(body), crc, self._last_crc, offset) + body
        self._last_crc = crc


def fuzz(data: bytes) -> None:
    segments: list[Segment] = []
    for frame in split(data):
        kind, body = (frame[0] & 3 if frame else 0), frame[1:]
        if (kind < 2 or not segments) and len(segments) < SEGMENTS_MAX:
            segments.append(Segment(len(segments)))
        match kind:
            case 1 if segments[-1].header is None and not segments[-1].data:
                segments[-1].begin(body)
            case 2:
                segments[-1].add(body)
            case _:
                segments[-1].data += body
    disk = MemoryDisk()
    for segment in segments:
        disk.open(segment_name(segment.number)).write_at(0, bytes(segment.data))
    if not segments:
        return
    snapshot = (3, 1) if len(data) % 2 else None
    try:
        journal = open_journal(disk, mesh=MESH, lineage=(), random="bb", snapshot=snapshot)
    except (Corrupt, StartRefused):
        return
    again = open_journal(disk, mesh=MESH, lineage=(), random="cc", snapshot=snapshot)
    assert again[:] == journal[:], "it opened, and opened again with other entries"
    assert again.getCurrentTerm() == journal.getCurrentTerm()


def seeds() -> Iterator[bytes]:
    def header(**fields: object) -> bytes:
        return b"\x01" + codec.encode(
            LocalHeader(**{"mesh": MESH, "incarnation": "01", "start": 1, "random": "aa", **fields})
        )  # type: ignore[arg-type]

    def frame(*records: object) -> bytes:
        return b"\x02" + codec.pack(records)

    entries = [("e", NO_OP, 2, 1), ("e", b"\x00x", 3, 1), ("e", b"\x02" + codec.pack(("a/01",)), 4, 1)]
    yield join([header(founding=("a/01",)), frame(("t", 1, "a/01")), *(frame(entry) for entry in entries)])
    yield join([header(), frame(*entries), frame(("x", 3), ("e", NO_OP, 3, 2)), frame()]) + b"\0"
    yield join(
        [
            header(),
            frame(*entries),
            b"\x03torn",
            header(takes_over=(0, 8192), base=(4, 1)),
            frame(("r", 9, 2), ("e", NO_OP, 10, 2)),
        ]
    )
    yield join([header(base=(3, 1)), frame(("e", NO_OP, 4, 1)), frame(("t", 2, None))]) + b"\0"
    yield join([header(mesh="another"), frame()])
    yield join([header(lineage=("ab",)), frame()])
    yield join([b"\x00" + b"\0" * 20])
    yield join([b"\x00"])
    # No lists of records, numbers at the end of what 64 bits hold, texts that are none.
    for nonsense in (
        b"\x05",
        b"\xc0",
        b"\x81\x01\x02",
        b"\xa1x",
        b"\x91\x91\xa1e",
        b"\x91\x93\xa1t\xcf" + b"\xff" * 8 + b"\xc0",
        b"\x91\x92\xa1x\xff",
    ):
        yield join([header(), b"\x02" + nonsense, frame()])
    yield join([header(start=2**64 - 1), frame()])
    yield join([header(term=2**64 - 1, base=(2**64 - 1, 2**64 - 1)), frame()])
    yield join([header(), frame(("t", 1, 5)), frame(("t", 1, ("a",)))])
