"""What helpers say that run jobs beside the agent: a runner of wasm modules, the spawner of commands. A guest may have broken out.

May be raised: RunnerLost, after which the helper is killed and its attempt ends as the backend's fault. Outcomes fit the log.
The first byte: 0 and 1 frames of a wasm runner (1: its length is right), 2 and 3 the same of the spawner.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from fuzz import world
from fuzz.inputs import join, split
from meshd import codec
from meshd.backends.child import Link
from meshd.backends.spawners import Lane, Spawner, Waiter
from meshd.backends.wasm_messages import BACK, ENDED, Ended
from meshd.backends.wasm_runners import Runner, RunnerLost, lane_for
from meshd.model import AttemptKey, JobId, Outcome
from meshd.ports import Finished, Plan, Planned

FRAMED = True


def fuzz(data: bytes) -> None:
    frames = [frame for frame in split(data) if frame]
    if frames:
        kind = frames[0][0] % 4
        stream = b"".join(
            len(frame[1:]).to_bytes(4, "little") + frame[1:] if kind % 2 else frame[1:] for frame in frames
        )
        world.run(lambda: (_hear_runner if kind < 2 else _hear_spawner)(stream))


class _Child:
    """A helper that has said all it had to say and is gone."""

    pid = 0
    is_running = False
    has_exited_well = True

    def kill(self) -> None: ...

    def close(self) -> None: ...

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()

    def describe_end(self) -> str:
        return "exited with 0"


def _link(stream: bytes) -> Link:
    ours, theirs = socket.socketpair()
    theirs.sendall(stream[: 64 << 10])
    theirs.close()
    return Link(ours)


async def _hear_runner(stream: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    runner = Runner(_Child(), _link(stream), ours, Path("scratch"))  # type: ignore[arg-type]
    plan = Plan(JobId("job"), (), (), Path("spill"), module=Path("module"))
    runner.work_for(lane_for(plan, lambda _: None))
    attempts = [Planned(AttemptKey(JobId("job"), task, 1, task), "") for task in range(1, 8)]
    runner.give(attempts)
    ended = []
    try:
        while True:
            ended += await runner.hear()
    except RunnerLost as lost:
        finished, left = runner.die(str(lost))
    ended += finished
    for each in ended:
        _fits_log(each.outcome)
    assert sorted([*(each.key for each in ended), *(each.key for each in left)]) == [each.key for each in attempts]
    runner.leave()
    runner.close()


class _Owner:
    def __init__(self) -> None:
        self.left: list[AttemptKey] = []

    def remove(self, directory: str) -> None: ...

    def run_elsewhere(self, lane: Lane, attempts: Sequence[Planned]) -> None:
        self.left += [attempt.key for attempt in attempts]


async def _hear_spawner(stream: bytes) -> None:
    async with trio.open_nursery() as nursery:
        owner = _Owner()
        spawner = Spawner(_Child(), _link(stream), "token", "scratch", nursery, owner)  # type: ignore[arg-type]
        waiters = [Waiter(number) for number in range(1, 4)]
        spawner.waiting = {waiter.id: waiter for waiter in waiters}
        spawner._ids = 3
        attempts = [Planned(AttemptKey(JobId("job"), task, 1, task), "") for task in range(4, 8)]
        ended: list[Finished] = []
        spawner.give(1, Plan(JobId("job"), ("true",), (), Path("spill")), attempts, ended.extend)
        await spawner.read()
        assert spawner.buried.is_set()
        for waiter in waiters:
            assert waiter.outcome is not None
            _fits_log(waiter.outcome)
        for each in ended:
            _fits_log(each.outcome)
        assert sorted([*(each.key for each in ended), *owner.left]) == [attempt.key for attempt in attempts]


def _fits_log(outcome: Outcome) -> None:
    codec.decode(codec.encode(outcome), Outcome)


def seeds() -> Iterator[bytes]:
    def runner(ended: Ended) -> bytes:
        return b"\1" + codec.pack((ENDED, *ended))

    good = Ended(1, "exit", 0, "", 5, b"", b"")
    yield join(
        [
            runner(good),
            runner(Ended(2, "trap", None, "m" * 2048, 2**40, b"out", None)),
            runner(Ended(3, "exit", 2**64 - 1, "", 0, None, None, True)),
        ]
    )
    yield join([runner(Ended(1, "exit", 0, "m" * 5000, -5, b"", b""))])
    yield join([runner(Ended(1, "exit", 0, "", -5, b"", b""))])
    yield join([runner(Ended(1, "exit", 0, "", 2**63, b"", b"x" * 9000))])
    yield join([runner(Ended(1, "no such", 0, "", 0, b"", b""))])
    yield join([runner(Ended(9, "exit", 0, "", 0, b"", b""))])
    yield join([runner(Ended(1, "exit", "0", 5, "x", b"", 7))])  # type: ignore[arg-type]
    yield join([runner(good), runner(good)])
    yield join([b"\1" + codec.pack((BACK, 1, (1, 2)))])
    yield join([b"\1" + codec.pack((BACK, [], {}))])
    yield join([b"\0\xff\xff\xff\xff"])
    yield join([b"\1\xc1"])
    yield join([b"\1" + b"\x91" * 1500])

    def spawner(answer: object) -> bytes:
        return b"\3" + (answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    nonsense: object
    end = [1, "exit", 0, "", 5, "", "", ""]
    yield join([spawner({"ended": [end, [4, "signal", None, "", 1, "out", None, "desk"]]}), spawner({"call": 1})])
    for place, nonsense in enumerate(([1], "x", 10**30, "m" * 9000, -1, "\u0100", "x" * 2000, 5)):
        for number in (2, 5):
            bad: list[object] = [number, *end[1:]]
            bad[place] = nonsense
            yield join([spawner({"ended": [end, bad]})])
    others: tuple[object, ...] = ([], 5, {"ended": [[]]}, {"ended": [end, end]}, {"call": []}, b"\xff", b"{", b"[" * 3000, b'{"call":' + b"9" * 5000 + b"}")  # fmt: skip
    for other in others:
        yield join([spawner({"ended": [end]}), spawner(other)])
    yield join([b"\2\xff\xff\xff\xff"])
