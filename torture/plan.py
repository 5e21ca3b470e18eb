"""What is done to the mesh, and when: every choice of a run follows from its seed.

A cycle kills -9: the leader, a follower, any node, a minority or all at once. Some cycles
have weather besides, a fault of the network, of a process or of a clock, which begins before
the kill; the kill falls into it or comes after it. So the number of cycles is that of kill
cycles. A drill is one kind of fault again and again, each time on a mesh that is whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Kill(StrEnum):
    LEADER = "kill-leader"
    FOLLOWER = "kill-follower"
    NODE = "kill-node"
    MINORITY = "kill-minority"
    ALL = "kill-all"


class Weather(StrEnum):
    PARTITION = "partition"
    """One side, at most half of the nodes, hears nothing of the other and is not heard."""
    ONE_WAY = "one-way"
    """One node is heard and hears nothing, or hears and is not heard."""
    BRIDGE = "bridge"
    """Two sides that do not hear each other, and one node that hears both."""
    SLOW = "slow"
    LOSSY = "lossy"
    PAUSE = "pause"
    """SIGSTOP, then SIGCONT."""
    PAUSE_LEADER = "pause-leader"
    CLOCK = "clock"
    """One node's wall clock jumps."""
    DRAIN = "drain"
    """A node is drained, gives up its seat, and is taken back."""
    REPLACE = "replace"
    """A node is removed for good, and a new one joins in its place."""
    DISK_FULL = "disk-full"
    """Of the one node whose disk is small."""
    DISKS_FULL = "disks-full"
    """Of all nodes at once; then all disks are small, and lie in memory, where a sync costs nothing."""
    BIT_FLIP = "bit-flip"
    """One bit of a journal or snapshot, while its node is down and all others are whole."""


PARTITIONS = frozenset({Weather.PARTITION, Weather.ONE_WAY, Weather.BRIDGE})
FAULTS: tuple[str, ...] = (*(each.value for each in Kill), *(each.value for each in Weather))
DEFAULT_FAULTS = tuple(fault for fault in FAULTS if fault != Weather.DISKS_FULL)

KILL_WEIGHTS = {Kill.LEADER: 4, Kill.FOLLOWER: 1, Kill.NODE: 3, Kill.MINORITY: 1, Kill.ALL: 1}
WEATHER_WEIGHTS = {
    Weather.PARTITION: 4, Weather.ONE_WAY: 4, Weather.BRIDGE: 4,
    Weather.SLOW: 2, Weather.LOSSY: 2, Weather.PAUSE: 1, Weather.PAUSE_LEADER: 1, Weather.CLOCK: 1,
    Weather.DRAIN: 1, Weather.REPLACE: 1, Weather.DISK_FULL: 1, Weather.DISKS_FULL: 1,
    Weather.BIT_FLIP: 1,
}  # fmt: skip
WEATHER_SHARE = 0.4
"""Of the cycles; with the weights above a fifth and more of all cycles cut the network."""
DOWN_S = (0.0, 0.0, 0.2, 0.5, 1.0, 3.0)
"""Between a kill and the restart: mostly short, because a quick return meets more that is unfinished."""
WEATHER_S = (0.5, 6.0)
"""From less than an election takes to several of them."""
PAUSE_S = (1.0, 2.0, 3.0, 5.0, 12.0, 20.0)
"""SIGSTOP: under and over every timeout of the protocol (1 s contact, 10 s view, 12 s session)."""

DRILLS = ("leader-kills", "follower-kills", "leader-pauses")
DRILL_DOWN_S = 2.0
"""Longer than an election: the mesh has to go on without the victim, not with its return."""
DRILL_PAUSE_S = 10.0


@dataclass(frozen=True, slots=True)
class Cycle:
    number: int
    kill: Kill | None
    down_s: float
    weather: Weather | None
    weather_s: float
    is_killed_within: bool
    """In the weather, else after it."""
    picks: int
    """Seed of the choices that need to know the mesh as it is then: which nodes."""

    @property
    def faults(self) -> tuple[str, ...]:
        return tuple(fault.value for fault in (self.kill, self.weather) if fault is not None)


def cycles(seed: int, count: int, faults: Collection[str] = DEFAULT_FAULTS) -> Iterator[Cycle]:
    """The first `count` cycles of this seed that use only these faults."""
    rng = Random(seed)  # noqa: S311 - it has to be the same again
    kills = [kill for kill in Kill if kill.value in faults] or [Kill.NODE]
    weathers = [weather for weather in Weather if weather.value in faults]
    for number in range(1, count + 1):
        kill = rng.choices(kills, [KILL_WEIGHTS[each] for each in kills])[0]
        weather = None
        if weathers and rng.random() < WEATHER_SHARE:
            weather = rng.choices(weathers, [WEATHER_WEIGHTS[each] for each in weathers])[0]
        seconds = rng.choice(PAUSE_S) if weather in (Weather.PAUSE, Weather.PAUSE_LEADER) else rng.uniform(*WEATHER_S)
        yield Cycle(number, kill, rng.choice(DOWN_S), weather, seconds, rng.random() < 0.5, rng.getrandbits(32))


def drill(name: str, count: int) -> Iterator[Cycle]:
    for number in range(1, count + 1):
        match name:
            case "leader-kills":
                yield Cycle(number, Kill.LEADER, DRILL_DOWN_S, None, 0.0, False, number)
            case "follower-kills":
                yield Cycle(number, Kill.FOLLOWER, DRILL_DOWN_S, None, 0.0, False, number)
            case "leader-pauses":
                yield Cycle(number, None, 0.0, Weather.PAUSE_LEADER, DRILL_PAUSE_S, False, number)
            case _:
                raise ValueError(name)


def victims(cycle: Cycle, nodes: list[str], leader: str | None) -> list[str]:
    """Whom this cycle kills."""
    rng = Random(cycle.picks)  # noqa: S311
    match cycle.kill:
        case Kill.LEADER:
            return [leader or rng.choice(nodes)]
        case Kill.FOLLOWER:
            return [rng.choice([node for node in nodes if node != leader])]
        case Kill.NODE:
            return [rng.choice(nodes)]
        case Kill.MINORITY:
            return rng.sample(nodes, (len(nodes) - 1) // 2)
        case Kill.ALL:
            return rng.sample(nodes, len(nodes))
        case None:
            return []


def cuts(cycle: Cycle, nodes: list[str], leader: str | None) -> set[tuple[str, str]]:
    """(from, to): what the first sends does not reach the second."""
    rng = Random(cycle.picks + 1)  # noqa: S311
    # Every second time around the leader: what is cut off there matters most.
    centre = leader if leader is not None and rng.random() < 0.5 else rng.choice(nodes)
    others = [node for node in nodes if node != centre]
    rng.shuffle(others)
    match cycle.weather:
        case Weather.PARTITION:
            side = {centre, *others[: rng.randrange(max(1, len(nodes) // 2))]}
            return both_ways(side, set(nodes) - side)
        case Weather.ONE_WAY:
            far = set(others[: rng.randint(1, len(others))])
            return {(centre, to) for to in far} if rng.random() < 0.5 else {(of, centre) for of in far}
        case Weather.BRIDGE:
            # The first of the others is the bridge.
            half = len(others) // 2
            return both_ways({centre, *others[half + 1 :]}, set(others[1 : half + 1]))
        case _:
            return set()


def both_ways(one: set[str], other: set[str]) -> set[tuple[str, str]]:
    return {pair for a in one for b in other for pair in ((a, b), (b, a))}
