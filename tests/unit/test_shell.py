"""The shell's own part in batches: whom it tells, and what a defect costs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import trio
import trio.testing

from meshd import codec
from meshd.errors import Busy
from meshd.model import AttemptKey, EndReason, JobId, JobSpec, NodeId, Offer, Outcome, Run
from meshd.ports import Committed
from meshd.raft.state.commands import OpenSession, Reason, Rejected
from meshd.shell import Shell
from meshd.work.worker import AttemptsEnded, Open, Proposed, Recall, Start, Stop

KEYS = tuple(AttemptKey(JobId("j"), task, 1, task) for task in (1, 2))
OK = Outcome(EndReason.EXIT, 0)
CANCELLED = Outcome(EndReason.CANCELLED)


class Cores:
    """Decides what it is told to decide, and remembers what it hears."""

    def __init__(self) -> None:
        self.effects: list[Any] = []
        self.heard: list[Any] = []

    def handle(self, event: Any, now_ms: int) -> list[Any]:
        self.heard.append(event)
        effects, self.effects = self.effects, []
        return effects

    def next_timer_ms(self) -> int | None:
        return None


class Planned:
    """Everything is taken; ends come when the test says so."""

    def __init__(self, *, is_broken: bool = False) -> None:
        self.is_broken = is_broken
        self.told: Any = None
        self.stopped: list[AttemptKey] = []

    def takes(self, spec: JobSpec) -> bool:
        return True

    def start(self, lane: int, keys: Any, spec: JobSpec, leash_s: float | None, ended: Any) -> None:
        if self.is_broken:
            raise KeyError("a defect")
        self.told = ended

    def stop(self, key: AttemptKey) -> None:
        self.stopped.append(key)


class World:
    def __init__(self, planned: Planned) -> None:
        self.planned = planned
        self.begun: list[AttemptKey] = []
        self.may_end: dict[AttemptKey, trio.Event] = defaultdict(trio.Event)

    async def run(self, key: AttemptKey, spec: JobSpec, leash: Any) -> Outcome:
        self.begun.append(key)
        await self.may_end[key].wait()
        return OK

    def register(self, method: str, handler: Any) -> None: ...

    def now_ms(self) -> int:
        return 0

    def leading_term(self) -> int | None:
        return None


async def hand_on(planned: Planned, nursery: trio.Nursery) -> tuple[Shell, Cores, World]:
    cores, world = Cores(), World(planned)
    given: Any = {"agent": cores, "rpc": world, "world": world, "runs": world, "propose": None, "save_epoch": None}
    shell = Shell(me=NodeId("me"), **given)
    await nursery.start(shell.serve)
    cores.effects = [Start(1, KEYS, JobSpec(backend=("x",), run=Run()), None)]
    shell.feed(AttemptsEnded(()))
    return shell, cores, world


def ends(cores: Cores) -> dict[int, Outcome]:
    return {
        key.task: outcome for event in cores.heard if isinstance(event, AttemptsEnded) for key, outcome in event.ended
    }


async def test_ends_of_a_batch_are_told_together_and_a_stopped_one_says_why(
    autojump_clock: trio.testing.MockClock,
) -> None:
    planned = Planned()
    async with trio.open_nursery() as nursery:
        shell, cores, _ = await hand_on(planned, nursery)
        assert shell.attempts_running == 2
        cores.effects = [Stop(KEYS[1], EndReason.LOST)]
        shell.feed(AttemptsEnded(()))
        await trio.testing.wait_all_tasks_blocked()
        assert planned.stopped == [KEYS[1]]
        planned.told([(KEYS[0], OK), (KEYS[1], CANCELLED)])
        assert shell.attempts_running == 0
        nursery.cancel_scope.cancel()
    assert ends(cores) == {1: OK, 2: Outcome(EndReason.LOST, message="stopped by its node")}


@pytest.mark.usefixtures("autojump_clock")
async def test_a_defect_costs_the_attempts_of_its_batch_and_not_the_node() -> None:
    async with trio.open_nursery() as nursery:
        shell, cores, _ = await hand_on(Planned(is_broken=True), nursery)
        await trio.testing.wait_all_tasks_blocked()
        assert shell.attempts_running == 0
        nursery.cancel_scope.cancel()
    assert {outcome.reason for outcome in ends(cores).values()} == {EndReason.BACKEND} and len(ends(cores)) == 2


@pytest.mark.usefixtures("autojump_clock")
async def test_when_the_shell_ends_what_it_handed_on_is_stopped_and_waited_for() -> None:
    planned = Planned()
    async with trio.open_nursery() as nursery:
        await hand_on(planned, nursery)
        nursery.cancel_scope.cancel()
    assert planned.stopped == list(KEYS)


class OneByOne(Planned):
    def takes(self, spec: JobSpec) -> bool:
        return False


async def test_what_is_added_where_attempts_run_one_by_one_waits_for_its_turn(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        shell, cores, world = await hand_on(OneByOne(), nursery)
        third = AttemptKey(JobId("j"), 3, 1, 3)
        cores.effects = [Start(1, (third,), JobSpec(backend=("x",), run=Run()), None)]
        shell.feed(AttemptsEnded(()))
        await trio.testing.wait_all_tasks_blocked()
        assert world.begun == [KEYS[0]]
        for key in (*KEYS, third):
            world.may_end[key].set()
        await trio.testing.wait_all_tasks_blocked()
        assert world.begun == [*KEYS, third] and shell.attempts_running == 0
        nursery.cancel_scope.cancel()


async def test_what_is_recalled_from_one_lane_and_started_in_another_waits_for_its_turn_there(
    autojump_clock: trio.testing.MockClock,
) -> None:
    first, second, other = *KEYS, AttemptKey(JobId("j"), 3, 1, 3)
    async with trio.open_nursery() as nursery:
        shell, cores, world = await hand_on(OneByOne(), nursery)
        cores.effects = [Recall((second,))]
        shell.feed(AttemptsEnded(()))
        await trio.testing.wait_all_tasks_blocked()
        cores.effects = [Start(3, (other, second), JobSpec(backend=("x",), run=Run()), None)]
        shell.feed(AttemptsEnded(()))
        await trio.testing.wait_all_tasks_blocked()
        assert world.begun == [first, other]

        world.may_end[first].set()
        await trio.testing.wait_all_tasks_blocked()
        assert world.begun == [first, other], "the lane that it was recalled from is over"

        for key in (other, second):
            world.may_end[key].set()
            await trio.testing.wait_all_tasks_blocked()
        assert world.begun == [first, other, second]
        assert sorted(ends(cores)) == [1, 2, 3] and shell.attempts_running == 0
        nursery.cancel_scope.cancel()


async def test_a_session_is_not_proposed_before_a_full_disk_has_its_epoch_and_ends_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    saved: list[int] = []
    proposed: list[Any] = []
    refused = Rejected(Reason.WRONG_EPOCH, "")
    is_full = [True, True]

    async def save_epoch(epoch: int) -> None:
        if is_full:
            is_full.pop()
            raise Busy("there is no room for counters.json: the disk is full")
        saved.append(epoch)

    async def propose(command: bytes) -> Any:
        proposed.append((codec.decode(command, OpenSession), list(saved)))
        return Committed(codec.encode(refused), 1)

    cores, world = Cores(), World(Planned())
    opening = OpenSession(7, (), 1, Offer(), "boot")
    given: Any = {"agent": cores, "rpc": world, "world": world, "runs": world}
    shell = Shell(me=NodeId("me"), propose=propose, save_epoch=save_epoch, **given)
    async with trio.open_nursery() as nursery:
        await nursery.start(shell.serve)
        for _ in range(3):
            cores.effects = [Open(7, opening)]
            shell.feed(AttemptsEnded(()))
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [event.answer for event in cores.heard if isinstance(event, Proposed)] == [None, None, refused]
    assert proposed == [(opening, [7])]
