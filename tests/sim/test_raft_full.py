"""Full disks: new work waits, what ends work goes on, nothing is lost, and it heals by itself (protocol.md 9)."""

from __future__ import annotations

from random import Random

import pytest

from meshd import codec
from meshd.ports import Committed, NotCommitted
from meshd.raft.settings import RaftSettings
from tests.sim.raft_world import RaftWorld, rough_weather
from tests.sim.test_raft_storms import formed

DISK = 4 << 20
MARK = 1 << 20
SETTINGS = RaftSettings(disk_free_min=MARK, snapshot_entries=25, retain_entries=5)


def small(seed: int, servers: int = 3) -> RaftWorld:
    """Servers on disks of 4 MiB that keep one free; commands that begin with "new" are new work."""
    return formed(seed, servers, settings=SETTINGS, disk_bytes=DISK)


def outcome(world: RaftWorld, command: bytes) -> object:
    leader = world.leader()
    assert leader is not None
    world.propose(leader.name, command)
    body = codec.encode(command)
    world.run_until(lambda: world.outcomes[body] is not None, 8, f"{command!r} is answered")
    return world.outcomes[body]


def test_a_full_leader_with_room_elsewhere_hands_over_and_work_goes_on() -> None:
    world = small(1)
    leader = world.leader()
    assert leader is not None
    leader.disk.fill(leaving=MARK // 2)
    for number in range(12):
        world.run(0.2)
        if world.leader() is not None:
            assert isinstance(outcome(world, b"new %d" % number), Committed), "nothing is refused meanwhile"
    assert world.leader() not in (None, leader)
    leader.disk.drain()
    world.settle()


def test_where_a_quorum_is_full_new_work_is_refused_by_name_and_the_rest_goes_on() -> None:
    world = small(2)
    for node in world.nodes.values():
        node.disk.fill(leaving=MARK // 2)
    world.run(2)
    refused = outcome(world, b"new 1")
    assert isinstance(refused, NotCommitted) and refused.code == "busy" and "disk full at n0, n1, n2" in refused.why
    assert isinstance(outcome(world, b"completion"), Committed)
    for node in world.nodes.values():
        node.disk.drain()
    world.run(2)
    assert isinstance(outcome(world, b"new 2"), Committed)
    world.settle()


def test_two_full_followers_are_no_quorum_for_new_work_although_the_leader_has_room() -> None:
    world = small(3)
    leader = world.leader()
    for node in world.nodes.values():
        if node is not leader:
            node.disk.fill(leaving=MARK // 2)
    world.run(2)
    assert isinstance(outcome(world, b"new"), NotCommitted)
    assert isinstance(outcome(world, b"completion"), Committed)


def test_completions_are_served_from_the_reserve_when_not_a_byte_is_free_and_a_start_too() -> None:
    world = small(4)
    for node in world.nodes.values():
        node.disk.fill()
    world.run(2)
    for number in range(8):
        assert isinstance(outcome(world, b"completion %d" % number), Committed)
    follower = next(node for node in world.nodes.values() if node is not world.leader())
    world.die(follower, has_power=False)
    world.revive(follower.name)
    assert isinstance(outcome(world, b"after"), Committed)
    world.settle()


def test_a_reserve_that_is_used_up_stops_commands_and_no_server_and_heals() -> None:
    world = small(5)
    for node in world.nodes.values():
        node.disk.fill()
    world.run(2)
    numbers, until = iter(range(10_000)), world.now + 32

    def load() -> None:
        if world.now > until:
            return
        if (leader := world.leader()) is not None:
            world.propose(leader.name, b"completion %d" % next(numbers))
        world.at(0.02, load)

    load()
    world.run(20)
    assert all(node.server is not None for node in world.nodes.values())
    applied = {node.server.engine.applied for node in world.nodes.values() if node.server}
    world.run(5)
    assert {node.server.engine.applied for node in world.nodes.values() if node.server} == applied, "it has stopped"
    for node in world.nodes.values():
        node.disk.drain()
    world.run(5)
    assert min(node.server.engine.applied for node in world.nodes.values() if node.server) > max(applied)
    world.settle()


@pytest.mark.parametrize("seed", range(500, 512))
def test_disks_that_fill_up_and_get_room_again_in_rough_weather_lose_nothing(seed: int) -> None:
    world = small(seed)
    random = Random(seed)

    def fill() -> None:
        node = world.nodes[random.choice(world.names)]
        node.disk.fill(leaving=random.choice([0, 0, 100 << 10, MARK // 2]))
        world.at(random.uniform(0.5, 6), node.disk.drain)
        world.at(random.uniform(1, 3), fill)

    world.at(1.0, fill)
    rough_weather(world, 20)
    for node in world.nodes.values():
        node.disk.drain()
    world.settle()
