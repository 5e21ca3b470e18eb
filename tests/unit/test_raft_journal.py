"""The journal on disk: what was synced is read back; what was torn is cut; what was damaged is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from meshd.errors import Corrupt, StartRefused
from meshd.raft.messages import VoterId
from meshd.raft.storage.disk import DirectoryDisk
from meshd.raft.storage.frames import BLOCK, FRAME_BYTES_MIN, LocalHeader
from meshd.raft.storage.journal import Journal, create_journal, journal_lineage, journal_names
from meshd.raft.storage.reopening import Found, open_journal
from meshd.raft.storage.segments import JournalSizes
from meshd.testing.raft_disk import MemoryDisk, PowerCut

A, B, C = VoterId("a/01"), VoterId("b/02"), VoterId("c/03")


SMALL = JournalSizes(step=32 << 10, reserve=32 << 10)


def fresh(disk: MemoryDisk) -> Journal:
    return create_journal(disk, LocalHeader("m", "01", 1, "aa", founding=(A,)), SMALL)


def again(disk: MemoryDisk, *, snapshot: tuple[int, int] | None = None, random: str = "bb") -> Journal:
    return open_journal(disk, mesh="m", lineage=(), random=random, found=Found(snapshot, (A, B, C)), sizes=SMALL)


def written(disk: MemoryDisk, frames: int) -> Journal:
    """One entry in each frame: entry k is b"entry k" in term 1."""
    journal = fresh(disk)
    journal.setCurrentTerm(1, A)
    for index in range(2, frames + 2):
        journal.add(b"entry %d" % index, index, 1)
        journal.commit()
    return journal


def alone(disk: MemoryDisk, *, random: str = "bb") -> Journal:
    """As the only voter that its log knows of."""
    return open_journal(disk, mesh="m", lineage=(), random=random, found=Found(), sizes=SMALL)


def bytes_written(disk: MemoryDisk, name: str) -> bytes:
    """Without the room that is taken and not used; no frame ends in a zero."""
    return disk.read(name).rstrip(b"\0")


def entries(journal: Journal) -> list[tuple[bytes, int, int]]:
    return journal[1:]


def test_what_was_committed_is_there_after_a_restart() -> None:
    disk = MemoryDisk()
    journal = fresh(disk)
    journal.setCurrentTerm(3, A)
    journal.add(b"one", 2, 3)
    journal.add(b"two", 3, 3)
    journal.deleteEntriesFrom(2)
    journal.add(b"other", 3, 4)
    journal.setCurrentTerm(4, None)
    journal.commit()

    reopened = again(disk)
    assert entries(reopened) == [(b"one", 2, 3), (b"other", 3, 4)]
    assert (reopened.getCurrentTerm(), reopened.getVotedForNodeId()) == (4, None)
    assert reopened.header.founding == (A,) and reopened.header.start == 2
    assert reopened.durable_index == 3


def test_what_was_not_committed_is_not() -> None:
    disk = MemoryDisk()
    journal = written(disk, 2)
    journal.add(b"never", 4, 1)
    assert journal.is_dirty and journal.durable_index == 3
    assert [entry[1] for entry in entries(again(disk))] == [2, 3]


@pytest.mark.parametrize("length", [0, 1, 19, 20, 21, 60])
def test_a_frame_cut_at_any_byte_is_as_if_it_had_never_been(length: int) -> None:
    disk = MemoryDisk()
    written(disk, 3)
    name = journal_names(disk)[-1]
    content = bytes_written(disk, name)
    last = (len(content) - 1) // BLOCK * BLOCK
    for size in range(last + length, min(last + length + 8, len(content))):
        # The file ends there; or it goes on with the zeros of room that was taken and never written.
        for rest in (0, BLOCK) if size == last or size > last + FRAME_BYTES_MIN else (0,):
            torn = MemoryDisk()
            torn.open(name).write_at(0, content[:size] + bytes(rest))
            reopened = again(torn)
            assert [entry[1] for entry in entries(reopened)] == [2, 3], f"cut at byte {size}"
            assert reopened.getCurrentTerm() == 1 and not reopened.is_in_doubt


def test_a_flipped_bit_below_a_later_frame_leaves_the_voter_in_doubt_with_what_was_before_it() -> None:
    """A sole voter stops, names file and offset, and has changed nothing."""
    disk = MemoryDisk()
    written(disk, 6)
    name = journal_names(disk)[0]
    content = bytes_written(disk, name)
    random = Random(1)
    for offset in range(BLOCK, len(content) - BLOCK, BLOCK):
        body_bits = int.from_bytes(content[offset : offset + 4], "little") * 8 + FRAME_BYTES_MIN * 8
        for _ in range(20):
            bit = offset * 8 + random.randrange(body_bits)
            other = MemoryDisk()
            file = other.open(name)
            file.write_at(0, content)
            file.sync()
            other.flip(name, bit)
            before = other.read(name)
            with pytest.raises(Corrupt, match=f"{name} at byte {offset}.*meshd recover"):
                alone(other)
            assert [other.read(each) for each in other.names()] == [before]
            reopened = again(other)
            assert reopened.is_in_doubt and f"{name} at byte {offset}" in reopened.doubt
            assert [entry[1] for entry in entries(reopened)] == list(range(2, offset // BLOCK + 1))
            assert other.read(f"{name}.bad-1") == before
            assert again(other, random="cc").is_in_doubt, "it ends by a synced record only"


def test_damage_to_what_a_later_segment_follows_is_found() -> None:
    disk = MemoryDisk()
    written(disk, 4)
    again(disk)
    name = journal_names(disk)[0]
    disk.flip(name, (2 * BLOCK + 30) * 8)
    reopened = again(disk, random="cc")
    assert reopened.is_in_doubt and f"{name} at byte {2 * BLOCK}" in reopened.doubt
    assert [entry[1] for entry in entries(reopened)] == [2]
    assert journal_names(disk) == ["journal-000000000002"], "the new one needs none of those that were set aside"
    assert [entry[1] for entry in entries(again(disk, random="dd"))] == [2]


def test_a_segment_whose_header_is_damaged_is_lost_whole() -> None:
    disk = MemoryDisk()
    written(disk, 3)
    journal = again(disk)
    journal.add(b"lost", 5, 1)
    journal.commit()
    disk.flip(journal_names(disk)[-1], 300)
    reopened = again(disk, random="cc")
    # What the first segment says is not lost with the second, which had rewritten its last frame.
    assert reopened.is_in_doubt and [entry[1] for entry in entries(reopened)] in ([2, 3], [2, 3, 4])
    assert reopened.header.incarnation == "01"


def test_a_journal_without_any_readable_header_names_the_ways_out() -> None:
    disk = MemoryDisk()
    written(disk, 1)
    disk.flip(journal_names(disk)[0], 300)
    with pytest.raises(Corrupt, match="meshd rejoin"):
        again(disk)


def test_a_full_length_bad_last_frame_leaves_the_voter_in_doubt_and_everything_before_it() -> None:
    """Nothing later proves it: it may be a power cut in the middle of it, or damage to what was acknowledged."""
    for reopen in (again, alone):
        disk = MemoryDisk()
        written(disk, 3)
        name = journal_names(disk)[0]
        disk.flip(name, (3 * BLOCK + 30) * 8)
        reopened = reopen(disk)
        assert reopened.is_in_doubt and f"{name} at byte {3 * BLOCK}" in reopened.doubt
        assert [entry[1] for entry in entries(reopened)] == [2, 3]
        reopened.end_doubt()
        assert reopen(disk, random="cc").is_in_doubt, "it was not synced"
        reopened.commit()


def test_doubt_ends_by_a_synced_record() -> None:
    disk = MemoryDisk()
    written(disk, 3)
    disk.flip(journal_names(disk)[0], (3 * BLOCK + 30) * 8)
    reopened = again(disk)
    reopened.end_doubt()
    reopened.commit()
    assert not again(disk, random="cc").is_in_doubt


def test_the_end_of_an_earlier_doubt_does_not_end_the_next_one() -> None:
    """It was in the last whole frame, which a start writes anew behind its header: the start after that read it there."""
    disk = MemoryDisk()
    written(disk, 3)
    disk.flip(journal_names(disk)[0], (3 * BLOCK + 30) * 8)
    journal = again(disk)
    journal.end_doubt()
    journal.commit()
    journal.add(b"acknowledged", 4, 1)
    journal.commit()
    name = journal_names(disk)[-1]
    disk.flip(name, (len(bytes_written(disk, name)) - 3) * 8)
    assert again(disk, random="cc").is_in_doubt
    assert again(disk, random="dd").is_in_doubt


@pytest.mark.parametrize("bit", range(32))
def test_a_flipped_length_of_the_last_frame_does_not_pass_for_a_torn_tail(bit: int) -> None:
    disk = MemoryDisk()
    written(disk, 3)
    disk.flip(journal_names(disk)[0], 3 * BLOCK * 8 + bit)
    assert again(disk).is_in_doubt


def test_what_a_good_snapshot_covers_is_no_reason_for_doubt() -> None:
    disk = MemoryDisk()
    written(disk, 6)
    again(disk, snapshot=(5, 1))
    disk.flip(journal_names(disk)[0], (2 * BLOCK + 30) * 8)
    reopened = again(disk, snapshot=(5, 1), random="cc")
    assert not reopened.is_in_doubt and [entry[1] for entry in entries(reopened)] == [6, 7]
    # Without it, the same damage is a loss.
    assert again(disk, random="dd").is_in_doubt


def test_a_vote_that_may_be_lost_leaves_the_voter_in_doubt_although_a_snapshot_covers_the_entries() -> None:
    disk = MemoryDisk()
    written(disk, 6)
    disk.flip(journal_names(disk)[0], (2 * BLOCK + 30) * 8)
    reopened = again(disk, snapshot=(5, 1))
    assert reopened.is_in_doubt and "vote" in reopened.doubt
    assert [entry[1] for entry in entries(reopened)] == [6, 7]


def test_a_sole_voter_does_not_mind_a_damaged_witness() -> None:
    """Nobody else can have led, so entries in a row have none between them."""
    disk = MemoryDisk()
    journal = written(disk, 2)
    journal.commit()  # the witness
    journal.add(b"after", 4, 1)
    journal.commit()
    disk.flip(journal_names(disk)[0], (3 * BLOCK + 10) * 8)
    reopened = alone(disk)
    assert not reopened.is_in_doubt and [entry[1] for entry in entries(reopened)] == [2, 3, 4]
    # The segment of that start says what it follows, across the gap: the next start found "entry 4 follows 1", and refused.
    reopened.add(b"later", 5, 1)
    reopened.commit()
    reopened.commit()
    assert [entry[1] for entry in entries(alone(disk, random="cc"))] == [2, 3, 4, 5]


def test_a_file_that_the_disk_cannot_give_back_is_damaged() -> None:
    class Unreadable(MemoryDisk):
        def read(self, name: str) -> bytes:
            if name == "journal-000000000001":
                raise OSError(5, "Input/output error")
            return super().read(name)

    disk = MemoryDisk()
    written(disk, 3)
    again(disk)
    disk.__class__ = Unreadable
    assert journal_lineage(disk) == (), "which a start and `meshd recover` ask first"
    assert again(disk, random="cc").is_in_doubt


def test_bytes_behind_the_offset_where_a_successor_took_over_are_not_judged() -> None:
    disk = MemoryDisk()
    journal = written(disk, 2)
    name = journal_names(disk)[0]
    again(disk, random="bb")
    journal.add(b"by nobody", 4, 1)  # an older process that still had the file open
    journal.commit()
    assert [entry[1] for entry in entries(again(disk, random="cc"))] == [2, 3]
    disk.open(name).write_at(50 * BLOCK, b"rubbish" * 1000)
    assert [entry[1] for entry in entries(again(disk, random="dd"))] == [2, 3]


def test_an_old_frame_at_the_same_offset_is_no_frame_of_this_start() -> None:
    disk = MemoryDisk()
    written(disk, 3)
    old = disk.read(journal_names(disk)[0])
    journal = again(disk)
    name = journal_names(disk)[-1]
    size = len(bytes_written(disk, name))
    journal.add(b"new", 5, 2)
    journal.commit()
    file = disk.open(name)
    for offset in range((size // BLOCK + 2) * BLOCK, (size // BLOCK + 5) * BLOCK, BLOCK):
        file.write_at(offset, old[BLOCK : 2 * BLOCK])
    assert [entry[1] for entry in entries(again(disk, random="cc"))] == [2, 3, 4, 5]


def each_cut(do: Callable[[MemoryDisk, Journal], None], check: Callable[[Journal], None]) -> int:
    """Lose power before each disk operation of `do` in turn, several ways; `check` what is read back."""
    operations = 0
    while True:
        for seed in range(6):
            disk = MemoryDisk()
            journal = written(disk, 3)
            disk.cut_in(operations)
            try:
                do(disk, journal)
            except PowerCut:
                disk.lose_power(Random(seed))
                check(again(disk, random="cc"))
            else:
                return operations
        operations += 1


def test_a_start_that_loses_power_anywhere_loses_nothing() -> None:
    def check(journal: Journal) -> None:
        assert [entry[1] for entry in entries(journal)] == [2, 3, 4]

    assert each_cut(lambda disk, _: again(disk) and None, check) >= 5


def test_a_commit_that_loses_power_has_all_of_its_frame_or_nothing() -> None:
    def do(_: MemoryDisk, journal: Journal) -> None:
        journal.deleteEntriesFrom(3)
        journal.setCurrentTerm(2, None)
        for index in range(4, 40):
            journal.add(b"x" * 1000, index, 2)
        journal.commit()

    def check(journal: Journal) -> None:
        found = [entry[1:] for entry in entries(journal)]
        old, new = [(2, 1), (3, 1), (4, 1)], [(2, 1), (3, 1), *((index, 2) for index in range(4, 40))]
        assert (found, journal.getCurrentTerm()) in [(old, 1), (new, 2)]

    assert each_cut(do, check) == 3


def test_trimming_gives_segments_back_and_keeps_term_and_vote() -> None:
    disk = MemoryDisk()
    journal = fresh(disk)
    journal.setCurrentTerm(9, A)
    for index in range(2, 12):
        journal.add(bytes(1 << 20), index, 9)
        journal.commit()
    before = journal.bytes_on_disk
    journal.deleteEntriesTo(9)
    journal.release(10)
    journal.add(b"last", 12, 9)
    journal.commit()
    journal.release(12)
    assert journal.bytes_on_disk < before / 4

    reopened = again(disk, snapshot=(11, 9))
    assert entries(reopened) == [(b"last", 12, 9)]
    assert (reopened.getCurrentTerm(), reopened.getVotedForNodeId()) == (9, A)


def test_a_tail_that_agrees_with_a_newer_snapshot_is_kept() -> None:
    """F11: those entries were acknowledged."""
    disk = MemoryDisk()
    written(disk, 5)
    assert [entry[1] for entry in entries(again(disk, snapshot=(4, 1)))] == [5, 6]


def test_a_log_that_contradicts_a_snapshot_gives_way_to_it() -> None:
    disk = MemoryDisk()
    written(disk, 5)
    reopened = again(disk, snapshot=(4, 2))
    assert (len(reopened), reopened[0][1:]) == (1, (4, 2))


def test_a_gap_between_snapshot_and_log_leaves_the_voter_in_doubt() -> None:
    disk = MemoryDisk()
    journal = written(disk, 2)
    journal.reset(10, 3)
    journal.add(b"after", 11, 3)
    journal.commit()
    reopened = again(disk, snapshot=(5, 1))
    assert reopened.is_in_doubt and reopened[0][1:] == (5, 1) and len(reopened) == 1
    assert entries(again(disk, snapshot=(5, 1), random="cc")) == []


def test_a_log_goes_on_behind_a_snapshot_that_replaced_it_before_the_power_went() -> None:
    disk = MemoryDisk()
    written(disk, 3)
    journal = again(disk, snapshot=(20, 4))
    journal.add(b"after", 21, 4)
    journal.commit()
    reopened = again(disk, snapshot=(20, 4), random="cc")
    assert entries(reopened) == [(b"after", 21, 4)] and not reopened.is_in_doubt


def test_another_meshs_journal_is_refused() -> None:
    disk = MemoryDisk()
    written(disk, 1)
    with pytest.raises(StartRefused, match="belongs to mesh m, not other"):
        open_journal(disk, mesh="other", lineage=(), random="bb", found=Found())


def test_after_a_failed_sync_nothing_is_ever_written_again() -> None:
    class Failing(MemoryDisk):
        def step(self) -> None:
            raise OSError(5, "Input/output error")

    disk = MemoryDisk()
    journal = written(disk, 1)
    disk.__class__ = Failing
    journal.add(b"two", 3, 1)
    with pytest.raises(Corrupt, match="Input/output error"):
        journal.commit()
    disk.__class__ = MemoryDisk
    journal.add(b"three", 4, 1)
    with pytest.raises(Corrupt, match="failed before"):
        journal.commit()
    assert journal.durable_index == 2


def test_an_empty_frame_proves_the_last_one_once() -> None:
    disk = MemoryDisk()
    journal = written(disk, 2)
    assert journal.wants_witness
    journal.commit()
    assert not journal.wants_witness
    syncs = disk.syncs
    journal.commit()
    assert disk.syncs == syncs


def test_two_agents_cannot_share_a_directory(tmp_path: Path) -> None:
    held = DirectoryDisk(tmp_path)
    with pytest.raises(StartRefused, match="in use by another agent"):
        DirectoryDisk(tmp_path)
    held.close()
    DirectoryDisk(tmp_path).close()


def test_a_real_directory_holds_a_journal(tmp_path: Path) -> None:
    disk = DirectoryDisk(tmp_path)
    journal = create_journal(disk, LocalHeader("m", "01", 1, "aa"))
    journal.add(b"x" * 100_000, 2, 1)
    journal.commit()
    journal.close()
    reopened = open_journal(disk, mesh="m", lineage=(), random="bb", found=Found())
    assert entries(reopened) == [(b"x" * 100_000, 2, 1)]
    reopened.close()
    disk.close()


def test_a_last_frame_whose_first_block_reads_as_zeros_was_perhaps_acknowledged() -> None:
    disk = MemoryDisk()
    journal = fresh(disk)
    journal.add(bytes(range(1, 251)) * 80, 2, 1)  # five blocks
    journal.commit()
    [name] = journal_names(disk)
    content = disk._files[name]
    for target in (content.durable, content.seen):
        target[BLOCK : 2 * BLOCK] = bytes(BLOCK)
    assert again(disk).is_in_doubt
