"""The log on disk: entries, truncations, term and vote in one chain of frames, one sync for each turn.

What was synced is never rewritten (frames.py has the format, replay.py reads it back).
Each frame proves that all before it were synced; the last one proves nothing about
itself, so a start rewrites it into a new segment, beside, before the node says a word
(protocol.md 9).

`Journal` is also PySyncObj's journal: a list of (command, index, term) whose first item
stands for all that a snapshot covers. Memory changes at once, the disk with `commit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

from msgspec import structs
from pysyncobj.journal import Journal as StockJournal

from meshd import codec
from meshd.errors import Corrupt, StartRefused
from meshd.raft.disk import Disk, OpenFile
from meshd.raft.frames import (
    FIRST_INDEX,
    FRAME,
    FRAME_BODY_BYTES_MAX,
    PREFIX,
    LocalHeader,
    Record,
    aligned,
    checksum,
    read_header,
    segment_name,
)
from meshd.raft.lineage import Lineage, descends, is_next, name_of
from meshd.raft.messages import NO_OP, Entry, VoterId
from meshd.raft.replay import Replay

SEGMENT_BYTES_MAX = 64 << 20
"""A new segment begins beyond this: what one unlink gives back, and what one read at start holds in memory."""

RELEASE_BYTES_MIN = 4 << 20
"""A snapshot begins a new segment only when the present one is worth giving back."""


class Journal(StockJournal):  # type: ignore[misc]
    """Made by `create_journal` or `open_journal`. Not safe for two threads: whoever calls `commit` waits for it."""

    def __init__(self, disk: Disk, header: LocalHeader, number: int, entries: list[Entry]) -> None:
        self.header = header
        self._disk = disk
        self._entries = entries
        self._term = header.term
        self._vote = header.vote
        self._staged: list[Record] = []
        self._segments: dict[int, _Segment] = {}
        self._number = number
        self._file: OpenFile | None = None
        self._offset = 0
        self._last_crc = 0
        self._disk_last = (entries[-1][1], entries[-1][2])
        self._has_failed = False
        self._is_witnessed = True
        self.durable_index = entries[-1][1]
        """The last entry that is on this disk for sure."""
        self.witnessed_index = entries[-1][1]
        """The last entry whose frame a later, synced one proves: should it be damaged, that is told from a torn tail."""

    # --- the list of entries, as PySyncObj sees it --------------------------------------------------------------------

    def add(self, command: bytes, idx: int, term: int) -> None:
        self._entries.append((command, idx, term))
        self._staged.append(("e", command, idx, term))

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        if entryFrom < len(self._entries):
            index = self._entries[entryFrom][1]
            del self._entries[entryFrom:]
            self._staged.append(("x", index))
            self.durable_index = min(self.durable_index, index - 1)
            self.witnessed_index = min(self.witnessed_index, index - 1)

    def deleteEntriesTo(self, entryTo: int) -> None:
        """Forget what a durable snapshot covers; `release` gives back the disk."""
        del self._entries[:entryTo]

    def reset(self, index: int, term: int) -> None:
        """All entries give way to a snapshot at (index, term)."""
        self._entries = [(NO_OP, index, term)]
        self._staged.append(("r", index, term))
        self.durable_index = self.witnessed_index = index

    def clear(self) -> None:
        raise AssertionError("a journal is reset to a snapshot, never emptied")

    @overload
    def __getitem__(self, item: int) -> Entry: ...
    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...
    def __getitem__(self, item: int | slice) -> Entry | list[Entry]:
        return self._entries[item]

    def __len__(self) -> int:
        return len(self._entries)

    def setCurrentTerm(self, term: int, votedForNodeId: VoterId | None) -> None:
        if (term, votedForNodeId) != (self._term, self._vote):
            self._term, self._vote = term, votedForNodeId
            self._staged.append(("t", term, votedForNodeId))

    def getCurrentTerm(self) -> int:
        return self._term

    def getVotedForNodeId(self) -> VoterId | None:
        return self._vote

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """Not kept: Raft learns it again, and a stored one was seen to outlive the entries it named."""

    def getRaftCommitIndex(self) -> int:
        return self._entries[0][1]

    def onOneSecondTimer(self) -> None:
        """Stock saves its metadata now and then; here it is in the chain."""

    def _destroy(self) -> None:
        self.close()

    # --- the disk ------------------------------------------------------------------------------------------------------

    @property
    def is_dirty(self) -> bool:
        return bool(self._staged)

    @property
    def is_vote_staged(self) -> bool:
        """A term or a vote waits for the next commit: nothing may be said in it before."""
        return any(record[0] == "t" for record in self._staged)

    @property
    def wants_witness(self) -> bool:
        """The last frame has no later one to prove it; an idle moment is well spent on an empty one."""
        return not self._is_witnessed

    @property
    def bytes_on_disk(self) -> int:
        return self._offset + sum(segment.size for segment in self._segments.values())

    def commit(self) -> None:
        """Write what was staged as one frame and sync it (blocks). Raises Corrupt when the disk fails, and ever after:

        after a failed fsync the kernel may have thrown the pages away and would report success the next time.
        """
        if not self._staged and self._is_witnessed:
            return
        if self._has_failed or self._file is None:
            raise Corrupt(f"journal {segment_name(self._number)} failed before and takes nothing more")
        last = self._entries[-1]
        records, self._staged = self._staged, []
        try:
            if self._offset > SEGMENT_BYTES_MAX:
                self._begin_segment(takes_over_at=self._offset, records=[])
            self._write_frame(records)
            self._file.sync()
        except OSError as error:
            self._has_failed = True
            raise Corrupt(
                f"journal {segment_name(self._number)} could not be written: {error}",
                hint="this server stops so that it never acknowledges what it may lose; check the disk, then start it",
            ) from error
        # This frame proves all before it, and nothing of itself; the next one will.
        self.witnessed_index, self.durable_index = self.durable_index, last[1]
        self._disk_last = (last[1], last[2])
        self._is_witnessed = not records

    def release(self, snapshot_index: int) -> None:
        """Unlink the segments that a durable snapshot at this index covers (blocks). Call it with nothing staged."""
        assert not self._staged
        try:
            if self._offset > RELEASE_BYTES_MIN:
                self._begin_segment(takes_over_at=self._offset, records=[])
            for number in sorted(self._segments)[:-1]:
                # The next segment must join the snapshot without this one's help.
                if self._segments[number + 1].base > snapshot_index:
                    break
                self._disk.remove(segment_name(number))
                del self._segments[number]
        except OSError as error:
            self._has_failed = True
            raise Corrupt(f"journal could not be trimmed: {error}") from error

    def begin_epoch(self, lineage: Lineage) -> None:
        """What is staged begins a recovery epoch, in a segment of its own: all of that is durable when this returns, or nothing (blocks)."""
        assert is_next(lineage, self.header.lineage)
        records, self._staged = self._staged, []
        self.header = structs.replace(self.header, lineage=lineage, is_in_doubt=False)
        self._begin_segment(takes_over_at=self._offset, records=records)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin_segment(self, *, takes_over_at: int | None, records: list[Record]) -> None:
        """A new segment, complete and durable under its name before anything refers to it."""
        old, new = self._number, self._number + 1
        self.close()
        if old in self._segments:
            self._segments[old].size = max(self._segments[old].size, self._offset)
        self.header = structs.replace(
            self.header,
            term=self._term,
            vote=self._vote,
            takes_over=None if takes_over_at is None else (old, takes_over_at),
            base=self._disk_last,
        )
        beside = segment_name(new) + ".new"
        self._file, self._number, self._offset, self._last_crc = self._disk.open(beside), new, 0, 0
        self._write_body(codec.encode(self.header))
        if records:
            self._write_frame(records)
        self._file.sync()
        self._disk.rename(beside, segment_name(new))
        self._disk.sync_directory()
        self._segments[new] = _Segment(base=self._disk_last[0])

    def _write_frame(self, records: list[Record]) -> None:
        self._write_body(codec.pack(records))

    def _write_body(self, body: bytes) -> None:
        assert self._file is not None and len(body) <= FRAME_BODY_BYTES_MAX
        crc = checksum(self.header, self._number, self._offset, self._last_crc, self._offset, body)
        self._file.write_at(self._offset, FRAME.pack(len(body), crc, self._last_crc, self._offset) + body)
        self._last_crc = crc
        self._offset = aligned(self._offset + FRAME.size + len(body))


@dataclass(slots=True)
class _Segment:
    base: int
    """The last entry before it."""
    size: int = 0
    """Bytes, once it is closed."""


def create_journal(disk: Disk, header: LocalHeader) -> Journal:
    """The first segment of a new incarnation (blocks). The directory holds no journal."""
    assert not journal_names(disk)
    journal = Journal(disk, header, 0, [(NO_OP, FIRST_INDEX, 0)])
    journal._begin_segment(takes_over_at=None, records=[])
    return journal


def open_journal(disk: Disk, *, mesh: str, lineage: Lineage, random: str, snapshot: tuple[int, int] | None) -> Journal:
    """Replay, cut a torn tail, and begin this start's own segment (blocks).

    `snapshot` is the (index, term) of the newest one, already verified. Raises Corrupt
    with file and offset when what was durable cannot be read; StartRefused when the
    journal belongs to another mesh.
    """
    for name in disk.names():
        if name.startswith(PREFIX) and name.endswith(".new"):
            disk.remove(name)
    replay = Replay()
    names = journal_names(disk)
    contents = [disk.read(name) for name in names]
    headers = [read_header(name, data) for name, data in zip(names, contents, strict=True)]
    numbers = [int(name.removeprefix(PREFIX)) for name in names]
    successors = [*headers[1:], None]
    for name, number, header, data, after in zip(names, numbers, headers, contents, successors, strict=True):
        if header.mesh != mesh:
            raise StartRefused(
                f"the journal {name} belongs to mesh {header.mesh}, not {mesh}", hint="start in that mesh's directory"
            )
        # An older segment may be of an epoch that its successor began from.
        expected = lineage if after is None else after.lineage
        if header.lineage != expected and (after is None or not descends(expected, header.lineage)):
            raise StartRefused(
                f"the journal {name} is of recovery {name_of(header.lineage)}, not {name_of(lineage)}",
                hint="`meshd rejoin` gives this directory a new journal in the present mesh",
            )
        if after is not None and (after.takes_over is None or after.takes_over[0] != number):
            raise Corrupt(f"journal segment after {name} is missing")
        limit = None if after is None or after.takes_over is None else after.takes_over[1]
        replay.segment(name, number, header, data, limit)

    header, number = headers[-1], numbers[-1]
    entries = replay.entries_after(snapshot)
    journal = Journal(disk, structs.replace(header, start=header.start + 1, random=random), number, entries)
    journal._term, journal._vote = replay.term, replay.vote
    journal._segments = {
        number: _Segment(header.base[0], len(data))
        for number, header, data in zip(numbers, headers, contents, strict=True)
    }
    journal._disk_last = replay.durable_last
    journal._begin_segment(takes_over_at=replay.durable_offset, records=replay.unproven)
    journal._disk_last = (entries[-1][1], entries[-1][2])
    if replay.unproven:
        # Rewritten as the last frame of the new segment: until the next one nothing is taken for witnessed.
        journal._is_witnessed, journal.witnessed_index = False, entries[0][1]
    return journal


def journal_lineage(disk: Disk) -> Lineage | None:
    """Of the newest segment (blocks); None when there is no journal. Raises Corrupt."""
    names = journal_names(disk)
    return read_header(names[-1], disk.read(names[-1])).lineage if names else None


def journal_names(disk: Disk) -> list[str]:
    return sorted(name for name in disk.names() if name.startswith(PREFIX) and not name.endswith(".new"))
