"""Voters that may have lost what they acknowledged: they mend themselves, and until then they do not count (protocol.md 9)."""

from __future__ import annotations

import errno

import pytest

from meshd.errors import Corrupt
from meshd.ports import Committed
from meshd.raft.leading import Leadership
from meshd.raft.pysyncobj_state import RaftState
from meshd.raft.settings import RaftSettings
from meshd.raft.storage.frames import BLOCK
from meshd.testing.raft_disk import MemoryDisk
from tests.sim.raft_world import Node, RaftWorld, Violation, power_cuts, rough_weather
from tests.sim.rotting import goes_rotting, rot
from tests.sim.test_raft_storms import TRIMMING, formed


def done(world: RaftWorld, command: bytes) -> bool:
    return any(isinstance(result, Committed) for body, result in world.outcomes.items() if command in body)


def write(world: RaftWorld, command: bytes, *, weight: int = 0) -> None:
    leader = world.leader()
    assert leader is not None
    world.propose(leader.name, command + bytes(weight))
    world.run_until(lambda: done(world, command), 5, f"{command!r} is acknowledged")


def others(world: RaftWorld, node: Node) -> list[Node]:
    return [other for other in world.nodes.values() if other is not node]


def lose_last_frame(node: Node) -> None:
    """What it wrote last is not what is there."""
    name = [name for name in node.disk.names() if name.startswith("journal-") and "." not in name][-1]
    last = (len(node.disk.read(name).rstrip(b"\0")) - 1) // BLOCK * BLOCK
    node.disk.flip(name, (last + 24) * 8)


def acknowledged_by_two_and_lost_at_one(seed: int) -> tuple[RaftWorld, Node, Node, Node]:
    """The leader and a follower have b"gone"; the follower loses it, and comes back when the leader is away."""
    world = formed(seed)
    leader = world.leader()
    assert leader is not None
    follower, away = others(world, leader)
    write(world, b"before")
    for node in (leader, follower):
        world.cut(node.name, away.name)
        world.cut(away.name, node.name)
    write(world, b"gone")
    world.die(follower, has_power=True)
    world.die(leader, has_power=True)
    lose_last_frame(follower)
    for node in (leader, follower):
        world.heal(node.name, away.name)
        world.heal(away.name, node.name)
    world.revive(follower.name)
    return world, leader, follower, away


def test_a_voter_in_doubt_elects_nobody_with_a_voter_that_never_had_what_it_lost() -> None:
    world, leader, follower, _ = acknowledged_by_two_and_lost_at_one(1)
    assert follower.server is not None and follower.server.engine.is_in_doubt
    world.run(20)
    assert world.leader() is None, "three voters, one in doubt and one dead: they stop until either is back"
    world.revive(leader.name)
    world.settle()
    assert not follower.server.engine.is_in_doubt
    assert not follower.journal.is_in_doubt and done(world, b"gone")


def test_the_check_sees_what_is_lost_when_votes_in_doubt_count(monkeypatch: pytest.MonkeyPatch) -> None:
    world, leader, _, _ = acknowledged_by_two_and_lost_at_one(1)
    monkeypatch.setattr(RaftState, "is_in_doubt", property(lambda raft: False))
    world.run(10)
    assert world.leader() is not None
    write(world, b"after")
    world.revive(leader.name)
    with pytest.raises((Violation, Corrupt)):
        world.settle()


def test_acknowledgements_in_doubt_do_not_count() -> None:
    """The leader and a follower in doubt are no quorum, however far that follower has come."""
    world, leader, follower, away = acknowledged_by_two_and_lost_at_one(2)
    world.revive(leader.name)
    world.run_until(lambda: world.leader() is leader or world.leader() is away, 10, "a leader")
    if world.leader() is away:
        return
    world.die(away, has_power=True)
    if follower.server is not None and follower.server.engine.is_in_doubt:
        world.propose(leader.name, b"by nobody")
        world.run(3)
        assert not done(world, b"by nobody")


@pytest.mark.parametrize("settings", [RaftSettings(), TRIMMING], ids=["entries", "snapshot"])
def test_a_damaged_voter_mends_itself_in_seconds_from_entries_or_from_a_snapshot(settings: RaftSettings) -> None:
    world = formed(3, settings=settings)
    for number in range(60):
        write(world, b"%d" % number)
    leader = world.leader()
    assert leader is not None
    damaged = others(world, leader)[0]
    incarnation = damaged.id
    rot(world, damaged, flips=12)
    world.revive(damaged.name)
    assert damaged.journal.is_in_doubt
    world.run_until(lambda: not damaged.journal.is_in_doubt, 6, "it is mended")
    world.settle()
    assert damaged.id == incarnation


def test_after_a_power_cut_that_leaves_everybody_in_doubt_all_of_them_elect_the_newest() -> None:
    world = formed(4)
    write(world, b"kept")
    world.run(0.5)  # idle: the last frame is a witness, and nothing that is lost with it was acknowledged
    for node in world.nodes.values():
        world.die(node, has_power=True)
        lose_last_frame(node)
    for node in world.nodes.values():
        world.revive(node.name)
    assert all(node.server is not None and node.server.engine.is_in_doubt for node in world.nodes.values())
    world.run(2.9)
    assert world.leader() is None, "silent, until whoever may have their votes has given up"
    world.run_until(lambda: world.leader() is not None, 8, "a leader")
    write(world, b"more")
    world.settle()
    assert not any(node.server and node.server.engine.is_in_doubt for node in world.nodes.values())


def test_two_in_doubt_and_one_dead_stop_until_it_is_back() -> None:
    world = formed(5)
    write(world, b"kept")
    world.run(0.5)
    dead, *rest = world.nodes.values()
    world.die(dead, has_power=True)
    for node in rest:
        world.die(node, has_power=True)
        lose_last_frame(node)
        world.revive(node.name)
    world.run(15)
    assert world.leader() is None
    world.revive(dead.name)
    world.settle()


def test_a_voter_in_doubt_is_not_replaced_by_its_own_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its incarnation, also when it is damaged and restarted again and again."""
    world = formed(6)
    leader = world.leader()
    assert leader is not None
    damaged = others(world, leader)[0]
    name = damaged.id
    for number in range(5):
        write(world, b"%d" % number)
        rot(world, damaged, flips=4)
        world.revive(damaged.name)
        world.run(1.0 + number)
    world.settle()
    assert damaged.id == name


def bad_sectors(disk: MemoryDisk, unreadable: str) -> None:
    """The disk cannot give this file back."""
    read = disk.read

    def fail_or_read(name: str) -> bytes:
        if name == unreadable:
            raise OSError(errno.EIO, "Input/output error")
        return read(name)

    disk.read = fail_or_read  # type: ignore[method-assign]


@pytest.mark.parametrize("is_readable", [True, False])
def test_a_leader_whose_snapshot_has_rotted_writes_another_before_it_sends_it(is_readable: bool) -> None:
    world = formed(12, settings=TRIMMING)
    leader = world.leader()
    assert leader is not None
    away = others(world, leader)[0]
    world.die(away, has_power=True)
    for number in range(70):
        write(world, b"%d" % number)
    newest = [name for name in leader.disk.names() if name.startswith("snapshot-")][-1]
    if is_readable:
        leader.disk.flip(newest, 900)
    else:
        bad_sectors(leader.disk, newest)
    world.revive(away.name)
    world.settle()
    assert world.counts["raft.snapshot_damaged"] == 1 and world.leader() is leader
    assert f"{newest}.bad-1" in leader.disk.names()


@pytest.mark.parametrize("seed", range(400, 415))
def test_bits_that_turn_over_at_one_voter_at_a_time_lose_nothing(seed: int) -> None:
    world = formed(seed, settings=TRIMMING if seed % 2 else None)
    goes_rotting(world, 20)
    rough_weather(world, 20)
    world.settle()
    assert world.counts["rot"]


def test_power_cuts_in_the_middle_of_large_frames_lose_nothing() -> None:
    doubts = 0
    for seed in (1, 2, 3):
        world = formed(seed, delay_s=(0.0005, 0.003), payload=40_000)
        power_cuts(world, 12)
        world.settle()
        doubts += world.counts["raft.in_doubt"]
    assert doubts, "such a frame cannot be told from damage"


def alone(seed: int) -> tuple[RaftWorld, Node]:
    world = RaftWorld(seed, 2)
    world.run_until(lambda: world.leader() is not None, 5, "a leader")
    leader = world.leader()
    assert leader is not None and len(world.voters()) == 1
    world.run(1)
    return world, leader


def test_a_sole_voter_gets_its_last_frame_back_from_the_server_beside_it() -> None:
    world, voter = alone(7)
    write(world, b"kept")
    world.die(voter, has_power=True)
    lose_last_frame(voter)
    world.revive(voter.name)
    world.run_until(lambda: world.leader() is not None, 5, "it goes on")
    world.settle()


def test_a_sole_voter_that_nobody_answers_goes_on_after_half_a_minute_and_says_so() -> None:
    world, voter = alone(8)
    write(world, b"kept")
    (beside,) = others(world, voter)
    world.die(beside, has_power=True)
    world.die(voter, has_power=True)
    lose_last_frame(voter)
    world.revive(voter.name)
    world.run(29)
    assert world.leader() is None
    world.run(3)
    assert world.leader() is voter
    assert world.counts["raft.in_doubt_no_more"] and not voter.journal.is_in_doubt


def test_a_sole_voter_that_has_lost_more_than_a_last_frame_stops_and_changes_nothing() -> None:
    world, voter = alone(9)
    for number in range(20):
        write(world, b"%d" % number)
    world.die(voter, has_power=True)
    name = [name for name in voter.disk.names() if name.startswith("journal-")][-1]
    voter.disk.flip(name, (5 * BLOCK + 26) * 8)
    before = {name: voter.disk.read(name) for name in voter.disk.names()}
    for _ in range(2):
        with pytest.raises(Corrupt, match=rf"{name} at byte {5 * BLOCK}.*meshd recover"):
            voter.start()
    assert {name: voter.disk.read(name) for name in voter.disk.names()} == before


def brought_half_way(seed: int) -> tuple[RaftWorld, Node, Node]:
    """A follower lost more than one message can bring back; the leader dies in the moment when its doubt has ended."""
    world = formed(seed)
    leader = world.leader()
    assert leader is not None
    follower, away = others(world, leader)
    write(world, b"before")
    name = [name for name in follower.disk.names() if name.startswith("journal-")][-1]
    lost = len(follower.disk.read(name).rstrip(b"\0")) // BLOCK + 1
    for node in (leader, follower):
        world.cut(node.name, away.name)
        world.cut(away.name, node.name)
    for number in range(12):
        write(world, b"gone %02d" % number, weight=60_000)
    world.die(follower, has_power=True)
    follower.disk.flip(name, (lost * BLOCK + 24) * 8)
    world.revive(follower.name)
    assert follower.journal.is_in_doubt
    for node in (leader, follower):
        world.heal(node.name, away.name)
        world.heal(away.name, node.name)
    # The third has none of it, and stays away for a while: without it there is no quorum but with the follower.
    world.die(away, has_power=False)
    world.at(6.0, lambda: world.revive(away.name))
    return world, leader, follower


def ended_by_a_leader_that_dies(world: RaftWorld, leader: Node, follower: Node) -> None:
    while follower.journal.is_in_doubt:
        world.run(0.0005)
    world.die(leader, has_power=True)
    world.run(8)
    world.revive(leader.name)
    world.settle()


@pytest.mark.parametrize("seed", range(11, 17))
def test_doubt_ends_when_all_that_is_committed_is_there(seed: int) -> None:
    ended_by_a_leader_that_dies(*brought_half_way(seed))


def test_the_check_sees_what_is_lost_when_doubt_ends_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leadership, "_may_end_doubt", lambda leading, peer, progress: True)
    losses = 0
    for seed in range(11, 17):
        try:
            ended_by_a_leader_that_dies(*brought_half_way(seed))
        except (Violation, Corrupt):
            losses += 1
    assert losses
