"""Who votes: 1 with one or two servers, 3 from three, 5 from seven; replaced add-first, one step at a time.

The leader asks `decide` again and again; each answer is one change of one server, so
that any two configurations in a row share a majority. An even size is only ever on the
way to an odd one: additions begin when all the newcomers that are needed have caught
up, and a server that leaves goes when enough others are there (protocol.md 1). Only
two voters of a mesh of three servers or more stay two until a third can follow: with
one, what is acknowledged would rest on one disk.

Zones: a newcomer comes from the zone with the fewest voters, and whoever is too many
goes from the one with the most. A whole set is touched for the sake of zones only if
that makes the fullest zone smaller: each such swap does, so they end, and a mesh whose
zones are as even as its servers allow is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from meshd.model import NodeId
from meshd.raft.messages import VoterId, node_of

READY_MS = 200
"""A newcomer has answered so lately …"""
READY_LAG = 1000
"""… and lacks at most so many entries: what a busy log writes in a moment. Its next answers bring it level."""
RESPONSIVE_MS = 1000
"""Counts towards the quorum that must be left when somebody is removed."""
SILENT_MS = 10_000
"""A voter that said nothing for so long is replaced, when somebody can."""
SUPERSEDED_MS = 12_000
"""So long must a leader have led, and heard nothing of a lost incarnation, before the new one takes its place."""
NEVER_MS = 1 << 40
STANDBYS = 1
"""Servers fed beyond those that are needed: the next voter starts from a copy."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that the leader feeds or could feed."""

    lag: int
    """Entries of the leader's log that it is not known to have."""
    silent_ms: int
    """Since it last answered; in doubt, since it has been."""
    unheard_ms: int = NEVER_MS
    """Since another voter last said that it heard it."""
    is_in_doubt: bool = False
    """What it answers does not count towards a quorum."""
    lacks_history: bool = False
    """Segments that the leader has are not on its disk yet."""


@dataclass(frozen=True, slots=True)
class View:
    me: VoterId
    voters: tuple[VoterId, ...]
    peers: Mapping[VoterId, Peer]
    """Voters and connected others, without the leader itself."""
    servers: Collection[NodeId]
    """Certified and not removed."""
    draining: Collection[NodeId]
    leading_ms: int
    zones: Mapping[NodeId, str] = field(default_factory=dict)
    """By its label `zone`. A server that has none shares nothing that we know of: it is a zone of its own."""


@dataclass(frozen=True, slots=True)
class Add:
    voter: VoterId


@dataclass(frozen=True, slots=True)
class Remove:
    voter: VoterId


@dataclass(frozen=True, slots=True)
class HandOver:
    """The leader itself has to go: another one must lead first."""

    to: VoterId


Decision = Add | Remove | HandOver | None


def voters_wanted(servers: int) -> int:
    if servers < 3:
        return 1
    return 3 if servers < 7 else 5


def decide(view: View) -> Decision:
    """The next step. None: nothing to do, or nothing that is safe now."""
    gone = [voter for voter in view.voters if _is_gone(view, voter)]
    if (step := _without_one_of(view, gone)) is not None:
        return step
    target, size = _target(view), len(view.voters)
    leaving = [voter for voter in view.voters if not _stays(view, voter)]
    candidates = _candidates(view)
    ready = [voter for voter in candidates if _is_ready(view, voter)]
    if ready and (_completes(target, size, len(leaving), len(ready)) or (leaving and size <= target)):
        return Add(ready[0])
    if size > target or (_is_stuck_even(view, size, leaving, candidates) and not ready):
        return _smaller(view, leaving)
    if ready and size == target and _spreads(view, ready[0]):
        return Add(ready[0])
    return None


def learners(view: View) -> tuple[VoterId, ...]:
    """Whom to feed beyond the voters: those that are needed and a standby, and whoever would spread them better."""
    staying = sum(_stays(view, voter) for voter in view.voters)
    candidates = _candidates(view)
    fed = candidates[: max(0, _target(view) - staying) + STANDBYS]
    load = _load(view)
    rarest = min(candidates, key=lambda voter: load[_zone(view, voter)], default=None)
    return tuple(fed if rarest is None or rarest in fed else [*fed, rarest])


def _completes(target: int, size: int, leaving: int, ready: int) -> bool:
    """Those who are ready, but for the successors of those who leave, make a larger odd size."""
    reachable = min(target, size + max(0, ready - leaving))
    return size < (reachable if reachable % 2 else reachable - 1)


def _is_stuck_even(view: View, size: int, leaving: Sequence[VoterId], candidates: Sequence[VoterId]) -> bool:
    """It began to grow, and whoever was to make it odd again is gone."""
    is_coming = any(view.peers[voter].silent_ms < SILENT_MS for voter in candidates)
    return size % 2 == 0 and size > 2 and (bool(leaving) or not is_coming)


def _smaller(view: View, leaving: Sequence[VoterId]) -> Decision:
    """One less: of those who leave, of those who do not answer just now, of the fullest zone; never the leader by choice."""
    load = _load(view)
    others = [voter for voter in view.voters if voter not in leaving and voter != view.me]
    others.sort(key=lambda voter: (not _answers(view, voter), load[_zone(view, voter)], voter), reverse=True)
    return _without_one_of(view, leaving) or _without_one_of(view, others)


def _spreads(view: View, newcomer: VoterId) -> bool:
    """A whole set, known for a while, whose fullest zone becomes smaller by taking this one in for one of it."""
    load = _load(view)
    is_whole = all(voter == view.me or _answers(view, voter) for voter in view.voters)
    is_better = load[_zone(view, newcomer)] + 2 <= max(load.values())
    return is_better and is_whole and view.leading_ms >= SILENT_MS


def _target(view: View) -> int:
    return voters_wanted(len(set(view.servers) - set(view.draining)))


def _candidates(view: View) -> list[VoterId]:
    """Servers that could vote; those that answer and lack least come first, then those of zones with few voters."""
    seated = {node_of(voter) for voter in view.voters}
    named = [
        voter
        for voter in view.peers
        if node_of(voter) in view.servers
        and node_of(voter) not in view.draining
        # A new incarnation waits until the old one's seat is free, or one machine would vote twice.
        and node_of(voter) not in seated
    ]
    load = _load(view)
    return sorted(named, key=lambda voter: (not _is_ready(view, voter), load[_zone(view, voter)], voter))


def _load(view: View) -> Counter[str]:
    """Voters that stay, by zone."""
    return Counter(_zone(view, voter) for voter in view.voters if _stays(view, voter))


def _zone(view: View, voter: VoterId) -> str:
    node = node_of(voter)
    return view.zones.get(node, "") or f"of {node}"


def _is_ready(view: View, voter: VoterId) -> bool:
    peer = view.peers.get(voter)
    if peer is None or peer.is_in_doubt or peer.lacks_history:
        return False
    return peer.silent_ms <= READY_MS and peer.lag <= READY_LAG


def _is_gone(view: View, voter: VoterId) -> bool:
    """Not a member any more, or its journal is lost and another incarnation is there in its place."""
    if node_of(voter) not in view.servers:
        return True
    if voter == view.me:
        return False
    is_replaced = any(node_of(other) == node_of(voter) and other != voter for other in view.peers)
    return is_replaced and _is_over(view, voter)


def _is_over(view: View, voter: VoterId) -> bool:
    """Neither this leader nor anybody who answers it has heard that journal for long enough."""
    peer = view.peers.get(voter)
    is_unheard = peer is None or peer.unheard_ms >= SUPERSEDED_MS
    return is_unheard and _silent_ms(view, voter) >= SUPERSEDED_MS


def seats_taken(view: View) -> list[tuple[VoterId, VoterId]]:
    """(newcomer, older journal of the same node): the older is heard now, so both of them run."""
    return [
        (newcomer, older)
        for newcomer in sorted(view.peers)
        if newcomer not in view.voters
        for older in view.voters
        if node_of(older) == node_of(newcomer) and older in view.peers and _is_heard(view.peers[older])
    ]


def _is_heard(peer: Peer) -> bool:
    return min(peer.silent_ms, peer.unheard_ms) <= RESPONSIVE_MS


def _stays(view: View, voter: VoterId) -> bool:
    node = node_of(voter)
    return node in view.servers and node not in view.draining and _silent_ms(view, voter) < SILENT_MS


def _silent_ms(view: View, voter: VoterId) -> int:
    """A new leader has not heard of anybody yet: nobody is silent for longer than it has led."""
    if voter == view.me:
        return 0
    peer = view.peers.get(voter)
    return view.leading_ms if peer is None else min(peer.silent_ms, view.leading_ms)


def _is_safe_without(view: View, voter: VoterId) -> bool:
    """The others must be able to commit: more than half of them answer now."""
    rest: Sequence[VoterId] = [other for other in view.voters if other != voter]
    answering = sum(other == view.me or _answers(view, other) for other in rest)
    return answering > len(rest) // 2


def _answers(view: View, voter: VoterId) -> bool:
    peer = view.peers.get(voter)
    return peer is not None and peer.silent_ms <= RESPONSIVE_MS and not peer.is_in_doubt


def _without_one_of(view: View, voters: Sequence[VoterId]) -> Decision:
    """The first that the others can do without; the leader last, and only when another can lead."""
    for voter in sorted(voters, key=lambda voter: voter == view.me):
        if _is_safe_without(view, voter) and (step := _without(view, voter)) is not None:
            return step
    return None


def _without(view: View, voter: VoterId) -> Decision:
    if voter != view.me:
        return Remove(voter)
    others = [other for other in view.voters if other != view.me and _stays(view, other) and _answers(view, other)]
    return HandOver(min(others, key=lambda other: (view.peers[other].lag, other))) if others else None
