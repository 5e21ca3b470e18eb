"""An older copy of a journal is recognised by whoever has seen a later life of it, and a healthy one never is."""

from __future__ import annotations

import errno

import pytest

from meshd.model import NodeId
from meshd.raft.acquaintances import SEEN_MAX, Acquaintances, Seen, load_acquaintances, save_acquaintances
from meshd.raft.messages import Append, Appended, Propose, TimeoutNow, Vote, Voted, VoterId
from meshd.raft.storage.frames import LocalHeader
from meshd.raft.storage.journal import create_journal, journal_names
from meshd.raft.storage.reopening import Found, open_journal
from meshd.raft.wire import spoken_term
from meshd.testing.raft_disk import MemoryDisk

A, B = VoterId("a/01"), VoterId("b/01")


def seen(start: int, random: str, term: int, voter: VoterId = A) -> Seen:
    return Seen(voter, start, random, term)


def after(*greetings: Seen) -> Acquaintances:
    known = Acquaintances()
    for greeting in greetings:
        assert not known.why_older(greeting)
        known.greeted(greeting)
    return known


def test_a_restart_with_all_that_it_had_is_let_in() -> None:
    known = after(seen(3, "aa", 7), seen(4, "bb", 7), seen(9, "cc", 12))
    assert not known.why_older(seen(10, "dd", 12))
    assert not known.why_older(seen(1, "ee", 0, VoterId("a/02"))), "another incarnation is another voter"


@pytest.mark.parametrize(
    ("copy", "why"),
    [
        (seen(2, "xx", 9), "started 3 times before, and this is start 2"),
        (seen(3, "xx", 9), "its start 3 was another one"),
        (seen(4, "xx", 6), "has been in term 7, and this one has only reached 6"),
    ],
)
def test_an_older_copy_is_refused_with_what_shows_it(copy: Seen, why: str) -> None:
    assert why in after(seen(3, "aa", 7)).why_older(copy)


def test_what_it_said_counts_for_its_next_start_and_is_no_reason_against_the_present_one() -> None:
    known = after(seen(3, "aa", 7))
    known.spoke(A, 9)
    # A greeting that was overtaken on another stream by what was said later.
    assert not known.why_older(seen(3, "aa", 7))
    known.greeted(seen(3, "aa", 7))
    assert "has been in term 9" in known.why_older(seen(4, "bb", 8))


def test_one_in_doubt_may_have_lost_terms_but_not_starts() -> None:
    known = after(seen(3, "aa", 7))
    assert known.why_older(seen(2, "bb", 7), is_in_doubt=True)
    assert not known.why_older(seen(4, "bb", 5), is_in_doubt=True)
    known.greeted(seen(4, "bb", 5))
    assert not known.why_older(seen(5, "cc", 5))


def test_only_what_was_on_the_senders_disk_counts_as_its_term() -> None:
    assert spoken_term(Vote(8, 1, 1, is_trial=True)) == 0
    assert spoken_term(Vote(8, 1, 1, is_trial=False)) == 8
    assert spoken_term(Voted(5, 9, False, True)) == 5
    assert spoken_term(Append(4, 0, 0, 0, 0, 0)) == spoken_term(Appended(4, 0, 0, True, 1)) == 4
    assert spoken_term(TimeoutNow(3)) == 3 and spoken_term(Propose(1, NodeId("a"), b"")) == 0


def test_it_outlives_a_restart_of_whoever_remembers_and_a_damaged_file_is_only_forgotten() -> None:
    disk = MemoryDisk()
    assert not load_acquaintances(disk).why_older(seen(1, "xx", 0))
    known = after(seen(3, "aa", 7))
    known.spoke(A, 8)
    save_acquaintances(disk, known.packed())
    save_acquaintances(disk, known.packed())
    again = load_acquaintances(disk)
    assert again.why_older(seen(2, "xx", 9)) and again.why_older(seen(4, "bb", 7))
    starts_at = 32 + len(b"\x91\x94\xa4a/01")
    disk.flip("acquaintances", starts_at * 8 + 2)  # start 3 reads as start 7
    assert not load_acquaintances(disk).why_older(seen(5, "xx", 9))


def test_memory_is_bounded_and_who_greeted_last_is_kept() -> None:
    known = after(seen(3, "aa", 7))
    for number in range(SEEN_MAX - 1):
        known.greeted(seen(3, "aa", 7, VoterId(f"n{number}/01")))
    known.greeted(seen(4, "bb", 7))
    known.greeted(seen(3, "aa", 7, B))
    assert known.why_older(seen(3, "xx", 7)) and not known.why_older(seen(2, "xx", 7, VoterId("n0/01")))


def test_what_changes_nothing_is_not_written_down() -> None:
    known = after(seen(3, "aa", 7))
    before = known.changes
    known.greeted(seen(3, "aa", 7))
    known.spoke(A, 7)
    known.spoke(B, 9)
    assert known.changes == before


def test_a_journal_whose_newest_header_rotted_is_not_taken_for_an_older_copy() -> None:
    """The starts that its lost headers counted are counted all the same: it is in doubt, and others mend it."""
    disk = MemoryDisk()
    create_journal(disk, LocalHeader("m", "01", 1, "aa", founding=(A, B)))
    known = Acquaintances()

    def started(random: str) -> str:
        header = open_journal(disk, mesh="m", lineage=(), random=random, found=Found()).header
        told = seen(header.start, header.random, header.term)
        if why := known.why_older(told, is_in_doubt=header.is_in_doubt):
            return why
        known.greeted(told)
        return ""

    assert not started("bb") and not started("cc")
    disk.flip(journal_names(disk)[-1], 8 * 30)
    assert not started("dd") and not started("ee")


def test_a_memory_that_the_disk_cannot_give_back_is_only_forgotten() -> None:
    class Unreadable(MemoryDisk):
        def read(self, name: str) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    disk = Unreadable()
    save_acquaintances(disk, after(seen(3, "aa", 7)).packed())
    assert not load_acquaintances(disk).why_older(seen(2, "xx", 9))
