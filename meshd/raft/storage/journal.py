"""The log on disk: entries, truncations, term and vote in one chain of frames, one sync for each turn.

What was synced is never rewritten (frames.py has the format, reopening.py reads it back, segments.py has
the files). Each frame proves that all before it were synced; the last one proves nothing about
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
from meshd.errors import Busy, Corrupt, MeshError
from meshd.raft.messages import MEMBERSHIP, NO_OP, Entry, VoterId
from meshd.raft.state.lineage import Lineage, is_next
from meshd.raft.storage.disk import Disk
from meshd.raft.storage.frames import (
    FIRST_INDEX,
    FRAME_BODY_BYTES_MAX,
    FRAME_BYTES_MIN,
    LocalHeader,
    Record,
    aligned,
    framed,
    numbers,
    read_header,
    segment_name,
)
from meshd.raft.storage.segments import JournalSizes, Segments, is_full, readable

RECORD_BYTES = 32
"""What a record takes beside its command, at most: to tell how much waits for a commit."""


class Journal(StockJournal):  # type: ignore[misc]
    """Made by `create_journal` or `open_journal`. Not safe for two threads: whoever calls `commit` waits for it."""

    def __init__(self, header: LocalHeader, segments: Segments, entries: list[Entry], doubt: str = "") -> None:
        """It can be written from its first `begin_segment`."""
        self.header = header
        self.doubt = doubt
        """Why this start is in doubt, for people; see `is_in_doubt`."""
        self.is_in_doubt = self._was_in_doubt = bool(doubt)
        """Something that this voter has acknowledged may be missing here (protocol.md 9)."""
        self.voters = header.voters
        """The newest configuration, also when its entry is covered by a snapshot: what the next header says."""
        self._segments = segments
        self._entries = entries
        self._term = header.term
        self._vote = header.vote
        self._staged: list[Record] = []
        self._staged_bytes = 0
        self._closed: dict[int, _Closed] = {}
        self._number = -1
        """Of the segment that is written, or taken over from."""
        self._offset = 0
        self._last_crc = 0
        self._disk_last = (entries[-1][1], entries[-1][2])
        self._has_failed = False
        self._is_witnessed = True
        self.bytes_added = 0
        """Of commands, since the start: how much the log has grown between two moments."""
        self.durable_index = entries[-1][1]
        """The last entry that is on this disk for sure."""
        self.witnessed_index = entries[-1][1]
        """The last entry whose frame a later, synced one proves: should it be damaged, that is told from a torn tail."""

    # --- the list of entries, as PySyncObj sees it --------------------------------------------------------------------

    def add(self, command: bytes, idx: int, term: int) -> None:
        self._entries.append((command, idx, term))
        self.bytes_added += len(command)
        self._staged.append(("e", command, idx, term))
        self._staged_bytes += len(command) + RECORD_BYTES
        if command[:1] == MEMBERSHIP:
            self.voters = tuple(codec.unpack(command[1:]))

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        if entryFrom < len(self._entries):
            index, gone = self._entries[entryFrom][1], self._entries[entryFrom:]
            del self._entries[entryFrom:]
            if any(command[:1] == MEMBERSHIP for command, _, _ in gone):
                kept = (command for command, _, _ in reversed(self._entries) if command[:1] == MEMBERSHIP)
                self.voters = next((tuple(codec.unpack(command[1:])) for command in kept), self.header.voters)
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

    def end_doubt(self) -> None:
        """Others have brought this log up to date: once this is synced, its votes and acknowledgements count."""
        if self.is_in_doubt:
            self.is_in_doubt = False
            self._staged.append(("c",))

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
        return self._offset + sum(closed.size for closed in self._closed.values())

    @property
    def bytes_left(self) -> int:
        """What can still be staged for sure, on a disk however full: room that is this journal's own already."""
        return self._segments.bytes_left(self._offset) - self._staged_bytes

    @property
    def bytes_for_votes(self) -> int:
        """Of these, what frames need that say only a term, a vote or nothing: 1,000 of them."""
        return self._segments.sizes.reserve

    def commit(self) -> None:
        """Write what was staged as one frame and sync it (blocks). Raises when the disk fails, and ever after:

        after a failed fsync the kernel may have thrown the pages away and would report success the next time.
        """
        if not self._staged and self._is_witnessed:
            return
        if self._has_failed or not self._segments.is_open:
            raise Corrupt(f"journal {segment_name(self._number)} failed before and takes nothing more")
        last = self._entries[-1]
        records, self._staged, self._staged_bytes = self._staged, [], 0
        try:
            self._append(records)
        except OSError as error:
            raise self._failed("could not be written", error) from error
        # This frame proves all before it, and nothing of itself; the next one will.
        self.witnessed_index, self.durable_index = self.durable_index, last[1]
        self._disk_last = (last[1], last[2])
        self._was_in_doubt = self.is_in_doubt
        self._is_witnessed = not records

    def release(self, snapshot_index: int) -> None:
        """Unlink the segments that a durable snapshot at this index covers (blocks). Call it with nothing staged."""
        assert not self._staged
        try:
            if self._offset > self._segments.sizes.release and self._segments.has_room_for_next():
                self._go_on_in_next([])
            for number in sorted(self._closed):
                # The next segment must join the snapshot without this one's help.
                if self._closed[number].until > snapshot_index:
                    break
                self._segments.disk.remove(segment_name(number))
                del self._closed[number]
        except OSError as error:
            raise self._failed("could not be trimmed", error) from error

    def refill_reserve(self) -> None:
        """As far as there is room (blocks). Call it between commits."""
        try:
            self._segments.refill()
        except OSError as error:
            raise self._failed("could not reserve room", error) from error

    @property
    def is_reserve_whole(self) -> bool:
        return self._segments.is_reserve_whole

    def begin_epoch(self, lineage: Lineage) -> None:
        """What is staged begins a recovery epoch, in a segment of its own: all of that is durable when this returns, or nothing (blocks)."""
        assert is_next(lineage, self.header.lineage)
        records, self._staged, self._staged_bytes = self._staged, [], 0
        self.header = structs.replace(self.header, lineage=lineage)
        self.is_in_doubt = self._was_in_doubt = False
        self.begin_segment(self._offset, [records])

    def close(self) -> None:
        self._segments.close()

    def goes_on_from(
        self, closed: list[tuple[int, int, int]], *, term: int, vote: VoterId | None, last: tuple[int, int]
    ) -> None:
        """Segments of earlier starts: number, size and the last entry before the one after it; and what they say."""
        self._closed = {number: _Closed(size, until) for number, size, until in closed}
        self._number = closed[-1][0] if closed else -1
        self._term, self._vote, self._disk_last = term, vote, last

    def begins_with(self, last: tuple[int, int], *, has_unproven: bool) -> None:
        """This start's own segment is there, up to the entry `last`."""
        self._disk_last = last
        if has_unproven:
            # Rewritten as the last frames of the new segment: until the next one nothing is taken for witnessed.
            self._is_witnessed, self.witnessed_index = False, self._entries[0][1]

    @property
    def number(self) -> int:
        """Of the segment that is written."""
        return self._number

    def begin_segment(self, takes_over_at: int | None, frames: list[list[Record]]) -> None:
        """A new segment, complete and durable under its name before anything refers to it.

        `takes_over_at` is where it takes over from the present one; None: it needs nothing before it.
        """
        old, is_first = self._number, self._offset == 0
        bodies = [codec.pack(records) for records in frames]
        header = structs.replace(
            self.header,
            term=self._term,
            vote=self._vote,
            is_in_doubt=self._was_in_doubt,
            takes_over=None if takes_over_at is None else (old, takes_over_at),
            base=self._disk_last,
            voters=self.header.voters if self._was_in_doubt else self.voters,
            lost=self.header.lost if self._was_in_doubt else "",
        )
        head = codec.encode(header)
        number = self._segments.begin(sum(aligned(len(body) + FRAME_BYTES_MIN) for body in (head, *bodies)))
        if not is_first:
            self._closed[old] = _Closed(self._offset, self._disk_last[0])
        self.header, self._number, self._offset, self._last_crc = header, number, 0, 0
        for body in (head, *bodies):
            self._write(body)
        self._segments.file.sync()
        self._segments.name()

    def _append(self, records: list[Record]) -> None:
        if self._offset > self._segments.sizes.segment and self._segments.has_room_for_next():
            self._go_on_in_next([])
        body = codec.pack(records)
        try:
            self._segments.take(self._offset + len(body) + FRAME_BYTES_MIN)
            self._write(body)
        except OSError as error:
            if not is_full(error):
                raise
            # Nothing of this frame counts: the next segment takes over where it began.
            for part in parted(records, self._segments.sizes.reserve // 2) or [[]]:
                self._go_on_in_next([part])
                if part and part[-1][0] == "e":
                    self._disk_last = (part[-1][2], part[-1][3])
        else:
            self._segments.file.sync()

    def _go_on_in_next(self, frames: list[list[Record]]) -> None:
        at, old = self._offset, self._number
        self.begin_segment(at, frames)
        self._segments.disk.shorten(segment_name(old), at)

    def _write(self, body: bytes) -> None:
        assert len(body) <= FRAME_BODY_BYTES_MAX
        data, crc = framed(self.header, self._segments.number, self._offset, self._last_crc, body)
        self._segments.file.write_at(self._offset, data)
        self._last_crc = crc
        self._offset = aligned(self._offset + len(data))

    def _failed(self, what: str, error: OSError) -> MeshError:
        self._has_failed = True
        where = f"journal {segment_name(self._number)} {what}: {error}"
        if is_full(error):
            return Busy(
                f"{where}, and its reserve is used up",
                hint="this server stops and has lost nothing: make room on its disk, then start it",
            )
        return Corrupt(
            where,
            hint="this server stops so that it never acknowledges what it may lose; check the disk, then start it",
        )


def parted(records: list[Record], bytes_max: int) -> list[list[Record]]:
    """In order, each with about so many bytes and all but the last one up to an entry: what fits into a file of the reserve."""
    parts: list[list[Record]] = []
    size = 0
    for record in records:
        added = RECORD_BYTES + (len(record[1]) if record[0] == "e" else 0)
        if not parts or (size + added > bytes_max and parts[-1][-1][0] == "e"):
            parts.append([])
            size = 0
        parts[-1].append(record)
        size += added
    return parts


@dataclass(slots=True)
class _Closed:
    size: int
    until: int
    """The last entry before the segment that follows."""


def create_journal(disk: Disk, header: LocalHeader, sizes: JournalSizes | None = None) -> Journal:
    """The first segment of a new incarnation (blocks). The directory holds no journal."""
    assert not journal_names(disk)
    journal = Journal(header, Segments(disk, sizes or JournalSizes()), [(NO_OP, FIRST_INDEX, 0)])
    journal.begin_segment(None, [])
    journal.refill_reserve()
    return journal


def journal_lineage(disk: Disk) -> Lineage | None:
    """Of the newest segment that can be read (blocks); None when there is no journal."""
    for number in reversed(numbers(disk.names())):
        if (header := read_header(number, readable(disk, segment_name(number)))) is not None:
            return header.lineage
    return None


def journal_names(disk: Disk) -> list[str]:
    return [segment_name(number) for number in numbers(disk.names())]
