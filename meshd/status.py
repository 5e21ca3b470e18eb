"""`mesh cluster status`: who leads, who votes, who is alive, and how many failures the mesh survives now."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from meshd.directory import Directory
from meshd.errors import MeshError, Unavailable
from meshd.gossip.membership import Health
from meshd.gossip.service import GossipService
from meshd.model import NodeId, Role
from meshd.neighbours import Neighbours
from meshd.quorum import describe_stop
from meshd.raft.log import RaftStatus
from meshd.raft.remote import MeshLog
from meshd.raft.state.lineage import name_of
from meshd.recovery.epochs import Epochs
from meshd.units import format_duration
from meshd.views import ClusterStatus, GetMembers, MembersView, NodeStatus

ASK_S = 3.0
CLOCK_JUMP_MS = 60_000
CLOCK_OFF_MS = 5000
"""More than this between two clocks is warned about (protocol.md 3)."""


async def cluster_status(
    *,
    me: NodeId,
    my_name: str,
    my_roles: tuple[Role, ...],
    mesh: str,
    version: str,
    mesh_log: MeshLog,
    gossip: GossipService,
    neighbours: Neighbours,
    directory: Directory,
    clock_offset_ms: Callable[[NodeId], int | None],
    epochs: Epochs,
) -> ClusterStatus:
    """Also without a quorum: then from what this node last knew, and it says so."""
    warnings: list[str] = []
    raft: RaftStatus | None = None
    members: MembersView | None = None
    is_stopped = False
    try:
        raft = await mesh_log.status(timeout_s=ASK_S)
        members = await mesh_log.query(GetMembers(), MembersView, timeout_s=ASK_S)
    except Unavailable as error:
        is_stopped = True
        warnings.append(f"no decision can be taken now: {error.message}")
        with suppress(MeshError):
            members = await mesh_log.query(GetMembers(), MembersView, timeout_s=ASK_S, is_stale_ok=True)
    liveness = gossip.liveness()
    nodes = []
    for node in sorted({me, *directory.members()} if members is None else {row.member.node for row in members.members}):
        row = next((each for each in members.members if each.member.node == node), None) if members else None
        known = directory.peer(node)
        health = liveness.get(node)
        offer = neighbours.offer(node)
        offset = 0 if node == me else clock_offset_ms(node)
        if offset is not None and abs(offset) > CLOCK_OFF_MS:
            warnings.append(f"the clock of {directory.name(node) or node} is off by {offset / 1000:.0f} s: set it")
        nodes.append(
            NodeStatus(
                node=node,
                name=row.member.name if row else (my_name if node == me else known.name if known else ""),
                health="alive" if node == me else _word(health),
                roles=row.member.roles if row else (my_roles if node == me else directory.roles(node)),
                is_leader=raft is not None and raft.leader == node,
                is_voter=raft is not None and node in raft.voters,
                is_draining=row.member.is_draining if row else False,
                version=version if node == me else (offer.version if offer else ""),
                addresses=known.addresses if known else (row.member.addresses if row else ()),
                api_address=row.member.api_address if row else (known.api_address if known else ""),
                clock_offset_ms=offset,
                last_heard_ms=0 if node == me else (health.since_ms if health else None),
            )
        )
    if raft is not None:
        warnings.extend(_disk_warnings(raft, lambda node: directory.name(node) or (my_name if node == me else node)))
        warnings.extend(_clock_warnings(raft, directory.name(raft.me) or (my_name if raft.me == me else raft.me)))
    if (torn := epochs.torn()) is not None:
        warnings.append(f"{torn.message}: {torn.hint}")
    voters = raft.voters if raft else ()
    alive = {node.node for node in nodes if node.health == "alive"}
    survived = raft.failures_survived if raft else 0
    return ClusterStatus(
        mesh=mesh,
        me=me,
        position=members.position if members else directory.position,
        term=raft.term if raft else 0,
        leader=raft.leader if raft else None,
        voters=voters,
        failures_survived=survived,
        advice=_advice(raft, nodes, alive, is_stopped=is_stopped),
        nodes=tuple(nodes),
        warnings=tuple(warnings),
        clock_moves=members.clock_moves if members else (),
        recovery=name_of(epochs.lineage) if epochs.lineage else "",
    )


def _disk_warnings(raft: RaftStatus, name: Callable[[NodeId], str]) -> list[str]:
    """What voters have lost, or cannot write any more."""
    warnings = [
        f"{name(row.node)} may have lost what it acknowledged and does not count until it is brought up to date"
        for row in raft.servers
        if row.is_in_doubt and row.node != raft.me
    ]
    if raft.doubt:
        warnings.append(f"{name(raft.me)}: {raft.doubt}; see docs/disk.md")
    if raft.full:
        names = ", ".join(name(node) for node in raft.full)
        warnings.append(f"disk full at {names}: make room, or new work waits; running work goes on meanwhile")
    return warnings


def _clock_warnings(raft: RaftStatus, name: str) -> list[str]:
    """The mesh's own time is not what the clock says of the server that stamps it."""
    if abs(raft.clock_ahead_ms) <= CLOCK_JUMP_MS:
        return []
    by = f"{format_duration(abs(raft.clock_ahead_ms))} {'ahead of' if raft.clock_ahead_ms > 0 else 'behind'}"
    why = " (which is not believed)" if raft.is_clock_refused else ""
    what = f"the mesh's time is {by} the clock of {name}{why}"
    return [f"{what}: set that clock if it is wrong, else set the mesh's: `mesh cluster set-clock`"]


def _word(health: Health | None) -> str:
    return "unknown" if health is None else str(health.state.value)


def _advice(raft: RaftStatus | None, nodes: list[NodeStatus], alive: set[NodeId], *, is_stopped: bool) -> str:
    if raft is not None and raft.disputed:
        return (
            f"the voters' states differ at entry {raft.disputed} and none has a majority, so nothing is decided any more:"
            " bring back the other voters, or keep one server's state with `meshd recover`"
        )
    if raft is None or raft.leader is None or is_stopped:
        stop = describe_stop({node.name or node.node: node.node in alive for node in nodes if node.is_voter})
        return stop or "bring back enough servers for a majority of the voters"
    servers = [node for node in nodes if Role.SERVER in node.roles]
    if len(servers) < 3:
        return "one disk: add a third server" if len(servers) == 2 else "one disk: add two more servers"
    if len(raft.voters) < 3:
        slow = [node.name or node.node for node in servers if not node.is_voter and not node.is_draining]
        return (
            f"one disk while {' and '.join(slow) or 'no other server'} cannot vote yet: see that they run and catch up"
        )
    down = [node.name or node.node for node in servers if node.is_voter and node.node not in alive]
    if down:
        return f"bring back {', '.join(down)}, or remove it for good: `mesh node remove NAME`"
    return ""
