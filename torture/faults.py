"""Weather: a fault begins, lasts, and ends, whatever became of the nodes meanwhile."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import assert_never

from torture.disks import Disks
from torture.membership import Membership
from torture.network import Network
from torture.plan import Cycle, Weather, cuts
from torture.processes import Engine, Processes

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
"""Debian's `faketime`; without it no clock can be moved."""
LOSS_PERCENT = (2, 10, 30)
RATES_KBIT_S = (256, 1000, 4000)
"""The Raft traffic of an idle mesh takes about 100."""
LEFT_BYTES = (0, 1 << 20, 64 << 20)
"""Nothing at all; less than a segment of the journal; enough, but under the mark where new work is refused."""
JUMPS_S = (-86_400, -600, -3, 3, 20, 600, 86_400, 20 * 365 * 86_400)
"""Within and over what clocks may differ (5 s), and over what an id's date may (1 h back, 5 min ahead)."""


class Faults:
    def __init__(
        self,
        network: Network,
        processes: Processes,
        engine: Engine,
        disks: Disks,
        home: Path,
        *,
        are_clocks_moved: bool,
    ) -> None:
        self._network = network
        self._processes = processes
        self._engine = engine
        self._home = home
        self._disks = disks
        self._membership = Membership(network.nodes, home, engine)
        self._moved: set[str] = set()
        if are_clocks_moved:
            processes.more_environment = self._clock_environment

    def begin(self, cycle: Cycle, leader: str | None) -> str:
        """Returns what it is, for people. Raises Undecided."""
        nodes = self._network.nodes
        rng = Random(cycle.picks + 2)  # noqa: S311
        one = leader if leader is not None and rng.random() < 0.5 else rng.choice(nodes)
        match cycle.weather:
            case None:
                return ""
            case Weather.PARTITION | Weather.ONE_WAY | Weather.BRIDGE:
                pairs = cuts(cycle, nodes, leader)
                self._network.cut(pairs)
                return " ".join(f"{source}-/->{target}" for source, target in sorted(pairs))
            case Weather.SLOW:
                rate = rng.choice(RATES_KBIT_S)
                self._network.slow(one, rate)
                return f"{one} sends at {rate} kbit/s"
            case Weather.LOSSY:
                percent = rng.choice(LOSS_PERCENT)
                for node in nodes:
                    self._network.lose(node, percent)
                return f"{percent} % of all packets dropped"
            case Weather.PAUSE | Weather.PAUSE_LEADER:
                target = leader if leader is not None and cycle.weather is Weather.PAUSE_LEADER else one
                self._processes.pause(target)
                return f"{target} is stopped for {cycle.weather_s:.0f} s"
            case Weather.CLOCK:
                jump_s = rng.choice(JUMPS_S)
                self._set_clock(one, jump_s)
                return f"the clock of {one} jumps by {jump_s} s"
            case Weather.DRAIN:
                self._membership.drain(one)
                return f"{one} is drained"
            case Weather.REPLACE:
                self._membership.replace(one, self._processes)
                return f"{one} is removed, and another joins"
            case Weather.DISK_FULL | Weather.DISKS_FULL:
                left = rng.choice(LEFT_BYTES)
                small = self._disks.small if cycle.weather is Weather.DISKS_FULL else self._disks.small[:1]
                for node in small:
                    self._disks.fill(node, left)
                return f"{','.join(small)} has {left >> 20} MiB of disk left"
            case Weather.BIT_FLIP:
                self._processes.kill([one])
                what = self._disks.flip(one, rng)
                self._processes.start(one, self._engine.command(one))
                return f"{one}: {what}"
            case _:
                assert_never(cycle.weather)

    def end(self) -> None:
        """Raises Undecided."""
        self._network.heal()
        self._processes.resume()
        self._disks.free()
        for node in sorted(self._moved):
            self._set_clock(node, 0)
        self._moved.clear()
        self._membership.take_back()

    def _clock_environment(self, node: str) -> dict[str, str]:
        """Of an agent whose wall clock can be moved while it runs. Its other clocks are the machine's."""
        if not self._clock(node).exists():
            self._set_clock(node, 0)
        return {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self._clock(node)),
            "FAKETIME_CACHE_DURATION": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
            "FAKETIME_DISABLE_SHM": "1",
            # Else its cure for an old glibc spins: every new thread costs 50 ms of CPU time.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }

    def _set_clock(self, node: str, offset_s: int) -> None:
        beside = self._clock(node).with_suffix(".new")
        beside.write_text(f"{offset_s:+d}\n")
        beside.rename(self._clock(node))
        self._moved.add(node)

    def _clock(self, node: str) -> Path:
        return self._home / f"{node}.clock"
