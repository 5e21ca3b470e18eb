"""A server restarts under heavy load while the log is trimmed all the time: it is level again within seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import trio

from meshd import codec
from meshd.raft.settings import RaftSettings
from tests.integration.test_raft_log import Machine, meshed, until

IN_FLIGHT = 256
TRIMMING = RaftSettings(
    election_min_s=0.8,
    election_max_s=1.6,
    heartbeat_s=0.1,
    snapshot_entries=25,
    retain_entries=5,
    checkpoint_entries=32,
)
UNPACK_S = 0.7
"""A large state: the log is trimmed several times while it is put in place."""
LAG = 20
"""Entries on their way to a follower that follows, with so many commands in flight."""


def newest_snapshot(directory: Path) -> str:
    return max(path.name for path in directory.glob("snapshot-*") if path.suffix != ".new")


async def test_who_restarts_under_load_is_level_within_seconds_however_often_the_log_is_trimmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack = Machine.unpack

    def unpack_slowly(machine: Machine, data: bytes) -> Callable[[], None]:
        time.sleep(UNPACK_S)
        return unpack(machine, data)

    monkeypatch.setattr(Machine, "unpack", unpack_slowly)
    async with meshed(tmp_path, "a", "b", "c", settings=TRIMMING) as mesh:
        leader = await mesh.formed(3)
        log = mesh.logs[leader]
        numbers, stopped = count(), trio.Event()

        async def load() -> None:
            while not stopped.is_set():
                await log.propose(leader, codec.encode(f"{next(numbers)} {'x' * 200}"), timeout_s=5)

        def lag(name: str) -> int:
            return log.status().last - mesh.logs[name].position  # type: ignore[index]

        async with trio.open_nursery() as nursery:
            for _ in range(IN_FLIGHT):
                nursery.start_soon(load)
            for away in [name for name in mesh.servers if name != leader]:
                had = mesh.logs[away].position
                await mesh.stop(away)
                await until(lambda had=had: log.status().first > had, "the log does not reach back to it")  # type: ignore[misc]
                before = newest_snapshot(tmp_path / leader)
                await mesh.start(away)
                await until(lambda away=away: lag(away) <= LAG, "it is level, under load")  # type: ignore[misc]
                assert newest_snapshot(tmp_path / leader) > before, (
                    "the state was saved, and the log would have been trimmed, meanwhile"
                )
            stopped.set()
        assert log.leads() and not mesh.diverged
        for name in mesh.servers:
            await mesh.logs[name].barrier(timeout_s=5)
            assert mesh.machines[name].seen == mesh.machines[leader].seen
