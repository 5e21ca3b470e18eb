"""A replica whose state went its own way, whatever the reason: the minority stops, and without a majority nobody goes on."""

from __future__ import annotations

from meshd.model import NodeId
from meshd.raft.settings import RaftSettings
from tests.sim.raft_world import RaftWorld

COMPARING = RaftSettings(checkpoint_entries=5, snapshot_entries=4)


def formed(seed: int) -> RaftWorld:
    world = RaftWorld(seed, settings=COMPARING)
    world.run_until(lambda: world.leader() is not None and len(world.voters()) == 3, 10, "three voters")
    return world


def propose(world: RaftWorld, name: NodeId, commands: int, tag: str) -> None:
    for number in range(commands):
        world.propose(name, f"{tag}{number}".encode())
        world.run(0.05)


def leader_of(world: RaftWorld) -> NodeId:
    leader = world.leader()
    assert leader is not None
    return leader.name


def is_down(world: RaftWorld, name: NodeId) -> bool:
    return world.nodes[name].server is None


def test_a_replica_that_differs_once_stops_and_the_others_go_on() -> None:
    world = formed(1)
    leader = leader_of(world)
    wrong = next(name for name in world.names if name != leader)
    propose(world, leader, 3, "before")
    world.nodes[wrong].machine.is_wrong_once = True
    propose(world, leader, 15, "after")
    world.run_until(lambda: is_down(world, wrong), 5, "the one that differs stops")
    assert (world.counts["diverged"], leader_of(world)) == (1, leader)
    propose(world, leader, 10, "later")
    assert world.counts["Committed"] == 28
    world.settle()  # it comes back, and is equal
    assert world.counts["diverged"] == 1


def test_a_leader_that_differs_stops_and_another_leads() -> None:
    world = formed(2)
    wrong = leader_of(world)
    propose(world, wrong, 3, "before")
    world.nodes[wrong].machine.is_wrong_once = True
    propose(world, wrong, 15, "after")
    world.run_until(lambda: is_down(world, wrong), 5, "the one that differs stops")
    world.run_until(lambda: world.leader() is not None, 5, "another leads")
    world.settle()


def test_two_of_two_that_differ_apply_nothing_further_until_a_third_decides() -> None:
    world = formed(3)
    leader = leader_of(world)
    wrong, away = (name for name in world.names if name != leader)
    propose(world, leader, 3, "before")
    world.die(world.nodes[away], has_power=True)
    world.nodes[wrong].machine.is_wrong_once = True
    propose(world, leader, 15, "after")
    first = world.nodes[leader].server
    assert first is not None and first.engine.disputed and not first.engine.leads()
    follower = world.nodes[wrong].server
    assert follower is not None and follower.engine.disputed == first.engine.disputed, "whoever is asked can say it"
    before = [world.nodes[name].server.engine.applied for name in (leader, wrong)]  # type: ignore[union-attr]
    committed = world.counts["Committed"]
    propose(world, leader, 20, "refused")
    assert [world.nodes[name].server.engine.applied for name in (leader, wrong)] == before  # type: ignore[union-attr]
    assert world.counts["Committed"] == committed
    assert first.steering.hand_over()
    world.run(3)  # another leads, and begins its term with an entry that nobody may apply either
    assert first.engine.term > 1 and not first.engine.is_leader
    assert [world.nodes[name].server.engine.applied for name in (leader, wrong)] == before  # type: ignore[union-attr]
    world.revive(away)
    world.run_until(lambda: is_down(world, wrong), 10, "the one that differs from the two others stops")
    world.run_until(lambda: world.leader() is not None, 10, "the others go on")
    assert world.counts["Committed"] == committed + 1, "the one that was in the log when they differed"
    propose(world, leader_of(world), 5, "again")
    world.run_until(lambda: world.counts["Committed"] == committed + 6, 5, "the others commit again")
    world.settle()


def test_replicas_that_are_equal_never_stop_over_snapshots_restarts_and_elections() -> None:
    world = RaftWorld(4, settings=RaftSettings(checkpoint_entries=3, snapshot_entries=20, retain_entries=4))
    world.run_until(lambda: world.leader() is not None and len(world.voters()) == 3, 10, "three voters")
    for number in range(12):
        gone = world.names[number % 3]
        world.crash(gone, 0.2)
        for name in world.names:
            propose(world, name, 6, f"{number}{name}")
        world.run(1.0)
    world.settle()
    assert (world.counts["diverged"], world.counts["raft.states_differ"]) == (0, 0)
    leader = world.leader()
    assert leader is not None and leader.server is not None
    leading = leader.server.engine._elections.leading
    assert leading is not None and leading._comparison.agreed[0] > 20, "they were compared"
