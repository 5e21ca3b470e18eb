"""A server that was away comes back under load, over links that carry little more than the load itself, or less.

Bytes wait in line on such a link, so whatever is sent in vain delays what is not. The log
is trimmed every second: what is not pinned is gone before a snapshot has arrived.
"""

from __future__ import annotations

from itertools import count
from math import inf

import pytest

from meshd.raft.messages import Chunk
from meshd.raft.pinning import Pins
from meshd.raft.progress import Progress
from meshd.raft.settings import RaftSettings
from tests.sim.raft_world import RaftWorld

LOAD_BYTES_S = 40_000
COMMANDS_S = 20
BALLAST_BYTES = 400_000
RETAINED = 10
"""Whoever lacks no more than these needs neither snapshot nor pin."""
TRIMMING = RaftSettings(snapshot_entries=20, retain_entries=RETAINED)


class Rejoin:
    """Three voters; one is away until the log no longer reaches back to it, and returns over a link of `bandwidth` bytes/s."""

    def __init__(self, seed: int, *, bandwidth: float, settings: RaftSettings = TRIMMING) -> None:
        self.world = world = RaftWorld(seed, settings=settings, ballast_bytes=BALLAST_BYTES)
        world.run_until(lambda: world.leader() is not None and len(world.voters()) == 3, 10, "three voters")
        leader = world.leader()
        assert leader is not None
        self.leader = leader
        self.away = next(node for node in world.nodes.values() if node is not leader)
        self.is_loaded = True
        self._numbers = count()
        world.die(self.away, has_power=True)
        self._load()
        world.run(4)
        for pair in ((leader.name, self.away.name), (self.away.name, leader.name)):
            world.bandwidth[pair] = bandwidth
        world.revive(self.away.name)

    def _load(self) -> None:
        if self.is_loaded:
            self.world.propose(self.leader.name, b"%06d" % next(self._numbers) + bytes(LOAD_BYTES_S // COMMANDS_S))
        self.world.at(1 / COMMANDS_S, self._load)

    def lag(self) -> int:
        assert self.leader.server is not None
        applied = 0 if self.away.server is None else self.away.server.engine.applied
        return self.leader.server.engine.last - applied

    def progress(self) -> Progress:
        assert self.leader.server is not None
        return self.leader.server.engine.progress[self.away.id]

    def is_level(self) -> bool:
        return self.lag() <= RETAINED

    def seconds_until_level(self, at_most: float) -> float:
        since = self.world.now
        self.world.run_until(self.is_level, at_most, "level with the leader")
        assert self.leader.server is not None and self.leader.server.engine.term == 1, "nobody was deposed meanwhile"
        return self.world.now - since


@pytest.mark.parametrize("bandwidth", [1_000_000, 250_000, 120_000, 80_000])
def test_whoever_comes_back_under_load_is_level_soon(bandwidth: float) -> None:
    """The snapshot, and what was written meanwhile, and what was written while that was sent …"""
    once_s = (BALLAST_BYTES + 4 * LOAD_BYTES_S) / bandwidth
    ideal_s = once_s / (1 - LOAD_BYTES_S / bandwidth)
    assert Rejoin(1, bandwidth=bandwidth).seconds_until_level(3 + 3 * ideal_s) < 3 + 2 * ideal_s


@pytest.mark.parametrize("seed", range(2, 6))
def test_lost_frames_and_short_cuts_delay_it_only(seed: int) -> None:
    rejoin = Rejoin(seed, bandwidth=200_000)
    rejoin.world.loss = 0.03
    for k in range(4):
        rejoin.world.at(1 + 2 * k, lambda: rejoin.world.cut(rejoin.leader.name, rejoin.away.name))
        rejoin.world.at(1.3 + 2 * k, lambda: rejoin.world.heal(rejoin.leader.name, rejoin.away.name))
    rejoin.seconds_until_level(60)


def test_without_the_pin_it_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stock does: the log behind a snapshot is gone when it has arrived."""
    monkeypatch.setattr(Pins, "lowest", lambda self, peers: None)
    rejoin = Rejoin(1, bandwidth=80_000)
    rejoin.world.run(60)
    assert rejoin.lag() > 100 and rejoin.world.counts["raft.snapshot_received"] >= 3


def test_a_compaction_neither_restarts_a_transfer_nor_trims_behind_it() -> None:
    rejoin = Rejoin(1, bandwidth=100_000)
    saved = rejoin.world.counts["raft.snapshot_saved"]
    offsets = sent_chunks(rejoin)
    rejoin.seconds_until_level(30)
    assert rejoin.world.counts["raft.snapshot_saved"] - saved > 5
    assert rejoin.world.counts["raft.snapshot_received"] == 1
    assert offsets == sorted(set(offsets)), "each range was sent once"


def test_what_was_kept_for_a_peer_goes_when_it_is_level_though_nothing_is_written_any_more() -> None:
    rejoin = Rejoin(1, bandwidth=60_000)
    rejoin.world.run(6)
    rejoin.is_loaded = False
    assert rejoin.leader.server is not None
    engine = rejoin.leader.server.engine
    assert engine.last - engine.first > 100
    rejoin.seconds_until_level(30)
    rejoin.world.run(1)
    assert engine.last - engine.first <= TRIMMING.snapshot_entries + RETAINED


def test_a_transfer_goes_on_where_it_was_when_the_link_is_back() -> None:
    rejoin = Rejoin(1, bandwidth=100_000)
    rejoin.world.run(2.5)
    transfer = rejoin.progress().transfer
    assert transfer is not None and (had := transfer.acked) > 50_000
    rejoin.world.cut(rejoin.leader.name, rejoin.away.name)
    rejoin.world.run(20)
    offsets = sent_chunks(rejoin)
    rejoin.world.heal(rejoin.leader.name, rejoin.away.name)
    rejoin.world.run(1)
    assert rejoin.progress().transfer is transfer and offsets[0] >= had
    rejoin.seconds_until_level(40)


def test_a_peer_that_stands_still_is_let_go_after_a_minute() -> None:
    rejoin = Rejoin(1, bandwidth=100_000)
    rejoin.world.run(2.5)
    assert rejoin.progress().transfer is not None
    rejoin.world.cut(rejoin.leader.name, rejoin.away.name)
    rejoin.world.run(55)
    assert rejoin.leader.server is not None
    engine = rejoin.leader.server.engine
    assert engine.last - engine.first > 1000, "what it needs stays"
    rejoin.world.run(10)
    assert engine.last - engine.first < 100
    rejoin.world.heal(rejoin.leader.name, rejoin.away.name)
    rejoin.seconds_until_level(40)


def test_when_the_load_is_more_than_its_link_carries_submissions_are_slowed_until_it_is_level() -> None:
    bounded = RaftSettings(snapshot_entries=20, retain_entries=RETAINED, pinned_bytes=600_000)
    rejoin = Rejoin(1, bandwidth=30_000, settings=bounded)
    assert rejoin.leader.server is not None
    engine = rejoin.leader.server.engine
    longest, rates = 0, [inf]

    def look() -> None:
        nonlocal longest
        longest = max(longest, sum(len(entry[0]) for entry in engine.log[:]))
        if engine.write_rate() != rates[-1]:
            rates.append(engine.write_rate())
        rejoin.world.at(0.1, look)

    look()
    rejoin.seconds_until_level(90)
    rejoin.world.run(1)
    assert len(rates) == 3 and 10_000 < rates[1] < 15_000, "half of what the link carries, while it lasts"
    assert rates[2] == inf
    assert longest < 1_000_000, "the log never grew much beyond what may be pinned"


def sent_chunks(rejoin: Rejoin) -> list[int]:
    """The offsets of what the leader sends from now on, as it is sent."""
    offsets: list[int] = []
    engine = rejoin.leader.server.engine  # type: ignore[union-attr]
    send = engine.send

    def noted(peer: object, message: object) -> bool:
        is_taken = send(peer, message)  # type: ignore[arg-type]
        if is_taken and isinstance(message, Chunk) and message.data:
            offsets.append(message.offset)
        return is_taken

    engine.send = noted  # type: ignore[assignment]
    return offsets
