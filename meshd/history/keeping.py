"""What a server does next about the segments of the history: pure, from the agreed list and what is on its disk.

Everything here is by level, not by event: whatever was missed, a restart, a snapshot that took the state's
place, a disk that lost something, is seen by comparing the list with the disk (protocol.md 8).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from meshd.raft.messages import VoterId, node_of
from meshd.raft.state.commands import Drop, Stored
from meshd.raft.state.history import History, Segment


@dataclass(frozen=True, slots=True)
class Work:
    """For one server, in the order of the fields."""

    upto: int = 0
    """Every segment up to this one is here."""
    write: tuple[Segment, ...] = ()
    """The core still has their jobs."""
    fetch: tuple[Segment, ...] = ()
    """Only others can have them."""
    tell: Stored | None = None
    drop: Drop | None = None
    may_seal: bool = False


def work_of(
    history: History,
    *,
    me: VoterId,
    voters: Sequence[VoterId],
    leads: bool,
    has: Callable[[Segment], bool],
    known: int = 0,
    later: Collection[int] = (),
) -> Work:
    """`has`: it is on the disk, synced; not asked about segments up to `known`. `later`: numbers of those that are tried again later."""
    unsure = range(max(history.oldest, known + 1), history.last + 1)
    missing = [segment for number in unsure if not has(segment := history.segments[number])]
    upto = missing[0].number - 1 if missing else history.last
    incarnation = me.partition("/")[2]
    told = history.held.get(node_of(me), ("", 0))
    wanted = [segment for segment in missing if segment.number not in later]
    return Work(
        upto=upto,
        write=tuple([segment for segment in wanted if segment.number > history.dropped]),
        fetch=tuple([segment for segment in wanted if segment.number <= history.dropped]),
        tell=Stored(incarnation, upto) if history.last and told != (incarnation, upto) else None,
        drop=_drop(history, voters) if leads else None,
        may_seal=leads,
    )


def _drop(history: History, voters: Sequence[VoterId]) -> Drop | None:
    segment = history.dropped + 1
    if segment > history.last or not history.is_safe(segment, tuple(voters)):
        return None
    return Drop(segment, tuple(voters))


def lags_behind(history: History, newcomer: VoterId, leader: VoterId) -> bool:
    """It may not vote yet: the leader has segments that it has not. More than the leader nobody can ask for."""
    needed = min(history.upto(node_of(leader)), history.dropped)
    return needed >= history.oldest and not history.holds(newcomer, needed)
