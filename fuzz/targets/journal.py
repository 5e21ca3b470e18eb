"""Arbitrary bytes in the files of a server's log, also with right checksums: what a disk, or another program, left there.

May be raised: Corrupt, StartRefused. What opens, opens again with the same entries, and takes more.
A frame is a piece of the newest segment: 0 begins a segment with these raw bytes, 1 begins one with this header,
2 goes on with this body as a right frame of the chain, 3 with these raw bytes; 7 is a snapshot beside them.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import structs

from fuzz.inputs import join, split
from meshd import codec
from meshd.errors import Corrupt, MeshError, StartRefused
from meshd.model import NodeId
from meshd.raft.messages import NO_OP
from meshd.raft.storage.frames import LocalHeader, aligned, framed, segment_name
from meshd.raft.storage.journal import Journal
from meshd.raft.storage.opening import open_log
from meshd.raft.storage.segments import JournalSizes
from meshd.raft.storage.snapshot import Image, pack_image, save
from meshd.testing.raft_disk import MemoryDisk

FRAMED = True
MESH = "mesh"
SEGMENTS_MAX = 8
STARTS_MAX = 2**52
"""Nobody starts that often; the counter's end is not what this is about."""
SIZES = JournalSizes(segment=1 << 16, step=1 << 13, reserve=1 << 13, reserves=1, release=1 << 14)


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
        frame, self._last_crc = framed(self.header, self.number, offset, self._last_crc, body)
        self.data += frame


def fuzz(data: bytes) -> None:
    segments: list[Segment] = []
    disk = MemoryDisk()
    for frame in split(data):
        kind, body = (frame[0] & 7 if frame else 0), frame[1:]
        if kind == 7:
            _put(disk, f"snapshot-{3:020d}", body)
            continue
        if (kind < 2 or not segments) and len(segments) < SEGMENTS_MAX:
            segments.append(Segment(len(segments)))
        match kind:
            case 1 if segments[-1].header is None and not segments[-1].data:
                segments[-1].begin(body)
            case 2:
                segments[-1].add(body)
            case _:
                segments[-1].data += body
    for segment in segments:
        _put(disk, segment_name(segment.number), bytes(segment.data))
    if not segments or any(segment.header and segment.header.start > STARTS_MAX for segment in segments):
        return
    try:
        journal, image = _open(disk, "bb")
    except (Corrupt, StartRefused):
        return
    kept = journal[:]
    journal.add(NO_OP, kept[-1][1] + 1, max(journal.getCurrentTerm(), kept[-1][2]))
    journal.commit()
    journal.commit()
    again, same = _open(disk, "cc")
    assert again[:-1] == kept and same == image, "it opened, and opened again with other entries"
    assert again.getCurrentTerm() >= journal.getCurrentTerm()
    assert again.is_in_doubt or not journal.is_in_doubt, "a doubt was forgotten"


def _open(disk: MemoryDisk, random: str) -> tuple[Journal, Image | None]:
    return open_log(
        disk, mesh=MESH, lineage=(), me=NodeId("a"), is_founding=False, random=random, incarnation="01", sizes=SIZES
    )


def _put(disk: MemoryDisk, name: str, data: bytes) -> None:
    file = disk.open(name)
    file.write_at(0, data)
    file.sync()
    disk.sync_directory()


def seeds() -> Iterator[bytes]:
    def header(**fields: object) -> bytes:
        return b"\x01" + codec.encode(structs.replace(LocalHeader(MESH, "01", 1, "aa"), **fields))

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
    # A segment that says its predecessor ends past all bytes; a damaged frame in the middle; two lives in one row.
    yield join([header(), frame(*entries), header(takes_over=(0, 2**53), base=(4, 1)), frame(("e", NO_OP, 5, 1))])
    yield join(
        [header(founding=("a/01", "b/01")), frame(*entries), b"\x03" + b"x" * 5000, frame(("e", NO_OP, 5, 1)), frame()]
    )
    yield join([header(founding=("a/01",)), frame(*entries), b"\x03" + b"x" * 5000, frame(("e", NO_OP, 5, 1)), frame()])
    yield join([header(founding=("a/01", "b/01"), is_in_doubt=True), frame(("e", b"\x02\x05", 2, 1)), frame(("c",))])
    snapshots = MemoryDisk()
    save(snapshots, pack_image(Image(MESH, 3, 1, (), b"state")), LocalHeader(MESH, "01", 1, "aa"))
    content = snapshots.read(f"snapshot-{3:020d}")
    yield join([b"\x07" + content, header(), frame(*entries), frame()])
    yield join([b"\x07" + content[:-1], header(founding=("a/01", "b/01"), base=(3, 1)), frame(entries[-1]), frame()])
    yield join(
        [
            b"\x07" + content,
            header(),
            frame(("r", 9, 2), ("e", NO_OP, 10, 2)),
            header(takes_over=(0, 8192), base=(10, 2)),
            frame(),
        ]
    )
    yield join([header(term=2**64 - 1, base=(2**64 - 1, 2**64 - 1)), frame()])
    yield join([header(), frame(("t", 1, 5)), frame(("t", 1, ("a",)))])
