"""What the agent makes of a helper that dies: who ran, who never began, and who was told to stop."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from meshd.backends.child import Gathering, Link
from meshd.backends.spawned import Spawned
from meshd.backends.spawners import Lane, Spawner
from meshd.backends.wasm_runners import Runner, lane_for
from meshd.model import AttemptKey, EndReason, JobId
from meshd.ports import Finished, Plan, Planned

JOB = JobId("j")
PLAN = Plan(JOB, ("true",), (), Path("spill"), module=Path("module"))
THREE = [Planned(AttemptKey(JOB, task, 1, task), "") for task in (1, 2, 3)]


class DeadChild:
    pid = 0
    is_running = False
    has_exited_well = True

    def kill(self) -> None: ...

    def close(self) -> None: ...

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()

    def describe_end(self) -> str:
        return "was killed by SIGKILL"


class Owner:
    def __init__(self) -> None:
        self.left: list[int] = []
        self.happened: list[str] = []

    def remove(self, directory: str) -> None: ...

    def run_elsewhere(self, lane: Lane, attempts: Sequence[Planned]) -> None:
        self.left += [attempt.key.task for attempt in attempts]
        self.happened.append(f"lane {lane.number} elsewhere")


def reasons(finished: list[Finished]) -> dict[int, EndReason]:
    return {each.key.task: each.outcome.reason for each in finished}


def runner() -> tuple[Runner, socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    orders, orders_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = Runner(DeadChild(), Link(ours), orders, Path("scratch"))  # type: ignore[arg-type]
    made.work_for(lane_for(PLAN, lambda _: None))
    made.give(THREE)
    return made, theirs, orders_theirs


async def test_the_first_without_an_answer_died_with_its_runner_and_the_others_never_began() -> None:
    dead, _tasks, _orders = runner()
    finished, left = dead.die("was killed")
    assert reasons(finished) == {1: EndReason.BACKEND}
    assert [attempt.key.task for attempt in left] == [2, 3]


async def test_what_was_told_to_stop_does_not_run_elsewhere() -> None:
    dead, _tasks, _orders = runner()
    dead.cancel(1)
    dead.cancel(3)
    finished, left = dead.die("was killed")
    assert reasons(finished) == {1: EndReason.CANCELLED, 3: EndReason.CANCELLED}
    assert [attempt.key.task for attempt in left] == [2]


async def test_of_each_lane_the_first_died_with_its_spawner_and_what_was_told_to_stop_runs_nowhere() -> None:
    ours, theirs = socket.socketpair()
    ended: list[Finished] = []
    async with trio.open_nursery() as nursery:
        owner = Owner()
        spawner = Spawner(DeadChild(), Link(ours), "token", "scratch", nursery, owner)  # type: ignore[arg-type]
        spawner.give(1, PLAN, THREE, ended.extend)
        spawner.give(2, PLAN, [Planned(AttemptKey(JOB, 4, 1, 4), "")], ended.extend)
        number = spawner.find(3)
        assert number is not None
        spawner.stop(number, 0.0)
        await trio.testing.wait_all_tasks_blocked()
        theirs.close()
        await spawner.read()
        nursery.cancel_scope.cancel()
    assert reasons(ended) == {1: EndReason.BACKEND, 3: EndReason.CANCELLED, 4: EndReason.BACKEND}
    assert owner.left == [2]


async def test_what_a_spawner_said_before_it_was_killed_is_heard() -> None:
    ours, theirs = socket.socketpair()
    ended: list[Finished] = []
    async with trio.open_nursery() as nursery:
        owner = Owner()
        spawner = Spawner(DeadChild(), Link(ours), "token", "scratch", nursery, owner)  # type: ignore[arg-type]
        spawner.give(1, PLAN, THREE, ended.extend)
        for task in (1, 2):
            frame = b'{"ended": [[%d, "exit", 0, "", 1, "", "", ""]]}' % task
            theirs.send(len(frame).to_bytes(4, "little") + frame)
        await spawner.end(is_now=True)
        nursery.cancel_scope.cancel()
    assert reasons(ended) == {1: EndReason.EXIT, 2: EndReason.EXIT, 3: EndReason.BACKEND}
    assert owner.left == []


async def test_what_is_left_of_all_lanes_is_placed_before_anybody_hears_of_an_end_and_gives_more() -> None:
    ours, theirs = socket.socketpair()
    async with trio.open_nursery() as nursery:
        owner = Owner()
        spawner = Spawner(DeadChild(), Link(ours), "token", "scratch", nursery, owner)  # type: ignore[arg-type]
        for lane in (1, 2):
            spawner.give(lane, PLAN, THREE, lambda finished: owner.happened.append("an end"))
        theirs.close()
        await spawner.read()
        nursery.cancel_scope.cancel()
    assert owner.happened == ["lane 1 elsewhere", "lane 2 elsewhere", "an end", "an end"]


def test_a_group_that_was_seen_gone_is_not_killed_again_for_its_number_may_be_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    limits = dict.fromkeys(("run_s", "memory", "file_bytes_max", "leash_s", "stdin"))
    files = {"workdir": "/", "stdout": str(tmp_path / "out"), "stderr": str(tmp_path / "err")}
    spawned = Spawned({"id": 1, "args": ["true"], "env": [], "output_bytes_max": 1, **limits, **files}, "token", 1.0)
    _, status, usage = os.wait4(spawned.pid, 0)
    spawned.main_ended(status, usage.ru_maxrss, time.monotonic())
    killed: list[int] = []

    def no_such_group(group: int, number: int) -> None:
        killed.append(group)
        raise ProcessLookupError

    monkeypatch.setattr(os, "killpg", no_such_group)
    assert [spawned.kill_remains() for _ in range(3)] == [False] * 3
    assert killed == [spawned.pid]


def test_a_helper_is_left_alone_only_while_it_answers_often_and_has_enough_to_do() -> None:
    gathering = Gathering(0.003)
    assert gathering.pause_s(heard=1, left=100, now_s=1.0) == 0.0, "nothing is known yet"
    assert gathering.pause_s(heard=10, left=100, now_s=1.001) == 0.003
    assert round(gathering.pause_s(heard=10, left=5, now_s=1.002), 6) == 0.00025, "until half of that is done"
    assert gathering.pause_s(heard=1, left=100, now_s=1.012) == 0.0, "its answers are few"
