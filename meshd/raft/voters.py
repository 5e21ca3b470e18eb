"""Who votes: 1 with one or two servers, 3 from three, 5 from seven; replaced add-first, one step at a time.

The leader asks `decide` again and again; each answer is one change of one server, so
that any two configurations in a row share a majority. An even size is only ever on the
way to an odd one: additions begin when all the newcomers that are needed have caught
up, and a server that leaves goes when enough others are there (protocol.md 1).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

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
STANDBYS = 1
"""Servers fed beyond those that are needed: the next voter starts from a copy."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that the leader feeds or could feed."""

    lag: int
    """Entries of the leader's log that it is not known to have."""
    silent_ms: int
    """Since it last answered."""


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
    for voter in view.voters:
        if _is_gone(view, voter) and _is_safe_without(view, voter):
            return _without(view, voter)
    target = _target(view)
    staying = [voter for voter in view.voters if _stays(view, voter)]
    ready = [voter for voter in _candidates(view) if _is_ready(view, voter)]
    reachable = min(target, len(staying) + len(ready))
    goal = reachable if reachable % 2 else reachable - 1
    if goal > len(staying) and ready:
        return Add(ready[0])
    if len(view.voters) > target:
        leaving = [voter for voter in view.voters if voter not in staying]
        for voter in [*leaving, *sorted(set(staying) - {view.me}, reverse=True)]:
            if _is_safe_without(view, voter):
                return _without(view, voter)
    return None


def learners(view: View) -> tuple[VoterId, ...]:
    """Whom to feed beyond the voters: those that are needed, and a standby."""
    staying = sum(_stays(view, voter) for voter in view.voters)
    return tuple(_candidates(view)[: max(0, _target(view) - staying) + STANDBYS])


def _target(view: View) -> int:
    return voters_wanted(len(set(view.servers) - set(view.draining)))


def _candidates(view: View) -> list[VoterId]:
    """Servers that could vote; those that answer and lack least come first."""
    named = [
        voter
        for voter in view.peers
        if voter not in view.voters
        and node_of(voter) in view.servers
        and node_of(voter) not in view.draining
        # A new incarnation waits until the old one's seat is free, or one machine would vote twice.
        and not any(node_of(voter) == node_of(other) for other in view.voters)
    ]
    return sorted(named, key=lambda voter: (not _is_ready(view, voter), voter))


def _is_ready(view: View, voter: VoterId) -> bool:
    peer = view.peers.get(voter)
    return peer is not None and peer.silent_ms <= READY_MS and peer.lag <= READY_LAG


def _is_gone(view: View, voter: VoterId) -> bool:
    """Not a member any more, or its journal is lost and another incarnation is there in its place."""
    if node_of(voter) not in view.servers:
        return True
    if voter == view.me:
        return False
    is_replaced = any(node_of(other) == node_of(voter) and other != voter for other in view.peers)
    return is_replaced and view.leading_ms >= SUPERSEDED_MS and _silent_ms(view, voter) >= SUPERSEDED_MS


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
    return peer is not None and peer.silent_ms <= RESPONSIVE_MS


def _without(view: View, voter: VoterId) -> Decision:
    if voter != view.me:
        return Remove(voter)
    others = [other for other in view.voters if other != view.me and _stays(view, other) and _answers(view, other)]
    return HandOver(min(others, key=lambda other: (view.peers[other].lag, other))) if others else None
