"""A start goes on with the journal of the one before it: torn, damaged or whole.

What no later frame proves durable is rewritten into this start's own segment before the
node answers anything. After damage to what was acknowledged, what is left of the log is
rewritten whole and the old files are set aside, and the voter is in doubt; a sole voter,
whom nobody can mend, stops (protocol.md 9).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec import structs

from meshd.errors import Corrupt, StartRefused
from meshd.raft.messages import VoterId
from meshd.raft.state.lineage import Lineage, name_of
from meshd.raft.storage.disk import Disk
from meshd.raft.storage.frames import LocalHeader, Record, numbers, read_header, segment_name
from meshd.raft.storage.journal import Journal, parted
from meshd.raft.storage.replay import Replay
from meshd.raft.storage.segments import JournalSizes, Segments, forget_unfinished, readable, set_aside

REWRITE_BYTES = 1 << 20
"""Of entries in one frame, when the log is rewritten."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of snapshots when the journal is read."""

    at: tuple[int, int] | None = None
    """(index, term) of the newest that can be read."""
    voters: tuple[VoterId, ...] = ()
    damaged: Sequence[str] = ()
    """Newer ones, that cannot."""


@dataclass(frozen=True, slots=True)
class _Segment:
    number: int
    data: bytes
    header: LocalHeader | None
    limit: int | None
    """Where its successor takes over."""


def open_journal(
    disk: Disk, *, mesh: str, lineage: Lineage, random: str, found: Found,
    sizes: JournalSizes | None = None, is_recovery: bool = False,
) -> Journal:  # fmt: skip
    """Replay, decide what is lost, and begin this start's own segment (blocks).

    Raises Corrupt, with file and offset, when this voter must not go on; StartRefused when
    the journal belongs to another mesh. Nothing on the disk has been changed then. With
    `is_recovery` also a sole voter goes on, with what is left.
    """
    chain = list(_chain(disk))
    headers = [(segment.number, segment.header) for segment in chain if segment.header is not None]
    if not headers:
        raise Corrupt(
            f"the journal is damaged: no header of its {len(chain)} segments can be read",
            hint="give this voter a new life with `meshd rejoin`; if it is the only one, see `meshd recover`",
        )
    its_number, newest = headers[-1]
    name = segment_name(chain[-1].number)
    if newest.mesh != mesh:
        raise StartRefused(
            f"the journal {name} belongs to mesh {newest.mesh}, not {mesh}", hint="start in that mesh's directory"
        )
    if newest.lineage != lineage:
        raise StartRefused(
            f"the journal {name} is of recovery {name_of(newest.lineage)}, not {name_of(lineage)}",
            hint="`meshd rejoin` gives this directory a new journal in the present mesh",
        )
    needed = _needed(chain, found.at)
    replay = Replay()
    for segment in needed:
        name = segment_name(segment.number)
        if segment.header is None:
            replay.gap(f"{name} at byte 0")
        else:
            replay.segment(name, segment.number, segment.header, segment.data, segment.limit)

    voters = replay.voters(found.voters, newest.founding)
    is_sole = len(voters) == 1 and voters[0].endswith(f"/{newest.incarnation}")
    verdict = replay.verdict(found.at, is_sole=is_sole)
    lost = verdict.doubt if verdict.is_loss else replay.lost
    if is_sole and lost and not is_recovery:
        raise Corrupt(
            f"the only voter of this mesh has lost what it acknowledged: {lost}"
            + (f"; damaged: {', '.join(found.damaged)}" if found.damaged else ""),
            hint="`meshd recover` goes on with what is left and says what that is; if other voters run, `meshd rejoin` here",
        )
    # Each start has begun a segment: a later one whose header cannot be read may be a start that others remember.
    start = newest.start + 1 + chain[-1].number - its_number
    header = structs.replace(newest, start=start, random=random, voters=voters, lost=lost)
    forget_unfinished(disk)
    journal = Journal(header, Segments(disk, sizes or JournalSizes()), verdict.entries, verdict.doubt)
    last = (verdict.entries[-1][1], verdict.entries[-1][2])
    kept: list[_Segment] = []
    if verdict.is_loss:
        frames = parted([("e", *entry) for entry in verdict.entries[1:]], REWRITE_BYTES)
        journal.goes_on_from([], term=replay.term, vote=replay.vote, last=verdict.entries[0][1:])
        journal.begin_segment(None, frames)
    else:
        kept = [segment for segment in chain if segment.header is not None]
        untils = [segment.header.base[0] for segment in kept[1:] if segment.header is not None]
        closed = [(segment.number, len(segment.data)) for segment in kept]
        journal.goes_on_from(
            [(*each, until) for each, until in zip(closed, [*untils, replay.durable_last[0]], strict=True)],
            term=replay.term, vote=replay.vote, last=replay.durable_last,
        )  # fmt: skip
        # A log that the snapshot covers whole, or contradicts, begins behind it.
        reset: list[Record] = [("r", *last)] if len(verdict.entries) == 1 and replay.last != last else []
        # An end of doubt is in this segment's header already; behind it, it would end the doubt that this start brings.
        unproven = [record for record in replay.unproven if record[0] != "c"]
        frames = [records] if (records := [*unproven, *reset]) else []
        journal.begin_segment(replay.durable_offset, frames)
        if not verdict.doubt:
            disk.shorten(segment_name(kept[-1].number), replay.durable_offset)
    journal.begins_with(last, has_unproven=bool(frames))
    for number in set(numbers(disk.names())) - {segment.number for segment in kept} - {journal.number}:
        set_aside(disk, segment_name(number))
    disk.sync_directory()
    journal.refill_reserve()
    return journal


def _chain(disk: Disk) -> Iterator[_Segment]:
    """From the newest segment back, each to the one that it took over from; oldest first."""
    backwards: list[_Segment] = []
    limit: int | None = None
    wanted: int | None = None
    for number in reversed(numbers(disk.names())):
        if wanted is not None and number > wanted:
            continue  # a later one took its place
        if wanted is not None and number < wanted:
            break  # given back, and all before it
        data = readable(disk, segment_name(number))
        header = read_header(number, data)
        backwards.append(_Segment(number, data, header, limit if wanted == number else None))
        if header is None:
            limit = wanted = None
        elif header.takes_over is None:
            break
        else:
            wanted, limit = header.takes_over
    return reversed(backwards)


def _needed(chain: list[_Segment], snapshot: tuple[int, int] | None) -> list[_Segment]:
    """Without those that a snapshot covers, however damaged they are."""
    if snapshot is not None:
        for at in range(len(chain) - 1, 0, -1):
            header = chain[at].header
            if header is not None and header.base[0] <= snapshot[0]:
                return chain[at:]
    return chain
