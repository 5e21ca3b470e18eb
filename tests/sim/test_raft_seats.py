"""Who loses its seat, or its link, troubles nobody: neither on leaving nor when it comes back."""

from __future__ import annotations

import pytest

from meshd.model import NodeId
from meshd.raft.pysyncobj_state import FOLLOWER
from tests.sim.raft_world import Node, RaftWorld


def formed(seed: int, servers: int = 3) -> RaftWorld:
    world = RaftWorld(seed, servers)
    world.run_until(lambda: world.leader() is not None and len(world.voters()) == 3, 10, "three voters")
    return world


def leader_of(world: RaftWorld) -> Node:
    leader = world.leader()
    assert leader is not None
    return leader


def follower_of(world: RaftWorld) -> Node:
    leader = leader_of(world)
    return next(world.nodes[name] for name in world.voters() if name != leader.name)


def term_of(node: Node) -> int:
    assert node.server is not None
    return node.server.engine.term


def keep_writing(world: RaftWorld, name: NodeId, seconds: float) -> None:
    until = world.now + seconds
    while world.now < until:
        world.propose(name, f"at {world.now}".encode())
        world.run(0.2)


@pytest.mark.parametrize("hears_nothing", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_voter_cut_off_one_way_deposes_nobody_when_it_is_back(seed: int, hears_nothing: bool) -> None:
    """Stock and the sketch raised its term for as long as it heard nothing, and its next word deposed the leader."""
    world = formed(seed)
    leader, away = leader_of(world), follower_of(world)
    term = term_of(leader)
    cuts = [(name, away.name) for name in world.names if name != away.name]
    for one, other in cuts:
        world.cut(*((one, other) if hears_nothing else (other, one)))
    keep_writing(world, leader.name, 12)
    assert world.leader() is leader
    for one, other in cuts:
        world.heal(*((one, other) if hears_nothing else (other, one)))
    keep_writing(world, leader.name, 6)
    assert (world.leader(), term_of(leader), term_of(away)) == (leader, term, term)
    world.settle()


def test_a_voter_that_applies_its_own_removal_goes_on_as_a_learner() -> None:
    world = formed(1, 4)
    leader, gone = leader_of(world), follower_of(world)
    term = term_of(leader)
    world.draining.append(gone.name)
    world.run_until(lambda: gone.name not in world.voters() and len(world.voters()) == 3, 20, "replaced")
    keep_writing(world, leader.name, 5)
    assert gone.server is not None and leader.server is not None
    engine = gone.server.engine
    assert (engine.is_voter, engine.role, engine.next_deadline()) == (False, FOLLOWER, None), "it never asks"
    assert term_of(leader) == term
    world.settle()


def test_a_removed_voter_that_never_heard_of_it_learns_it_when_it_is_back() -> None:
    world = formed(2, 4)
    leader, gone = leader_of(world), follower_of(world)
    for name in world.names:
        if name != gone.name:
            world.cut(name, gone.name)
            world.cut(gone.name, name)
    world.servers.remove(gone.name)
    world.run_until(lambda: gone.name not in world.voters() and len(world.voters()) == 3, 40, "replaced")
    term = term_of(leader_of(world))
    for name in world.names:
        world.heal(name, gone.name)
        world.heal(gone.name, name)
    keep_writing(world, leader.name, 10)
    assert gone.server is not None
    assert not gone.server.engine.is_voter, "it knows, and asks no more"
    assert (term_of(leader_of(world)), leader_of(world)) == (term, leader)


def test_a_leader_that_leaves_hands_over_first() -> None:
    world = formed(3, 4)
    leader = leader_of(world)
    pauses: list[float] = []
    without_since = None
    world.draining.append(leader.name)
    until = world.now + 20
    while world.now < until and leader.name in (world.voters() if world.leader() else [leader.name]):
        world.propose(leader.name, f"at {world.now}".encode())
        world.run(0.02)
        if world.leader() is None:
            without_since = without_since or world.now
        elif without_since is not None:
            pauses.append(world.now - without_since)
            without_since = None
    assert leader.name not in world.voters() and world.leader() is not leader
    assert max(pauses, default=0.0) < world.settings.election_min_s, "nobody waited for an election timeout"
    assert leader.server is not None and not leader.server.engine.is_voter
    world.settle()
