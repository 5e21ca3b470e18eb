"""One of the three servers that bench/stalls.py watches: the real log and the real queue, frames on libp2p's streams."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import structlog
import trio

from bench.raft_server import transport_of
from bench.replica import SECRET
from bench.turns import Steps
from meshd import codec, interpreter
from meshd.errors import Unavailable
from meshd.ids import new_job_id
from meshd.model import JobId, JobSpec, Member, Needs, Resources, Role, Run, TaskState
from meshd.ports import Committed
from meshd.raft.clocks import wall_clock_ms
from meshd.raft.log import ServerLog
from meshd.raft.replica import Replica
from meshd.raft.settings import RaftSettings
from meshd.raft.state.commands import (
    AnyAnswer,
    Cancel,
    Command,
    CreateInvite,
    Drop,
    Found,
    Join,
    Rejected,
    Seal,
    Stored,
    Submit,
)
from meshd.raft.state.machine import Machine
from meshd.views import PAGE_MAX, AnyQuery, Explain, GetMembers, GetSummary, ListJobs

SNAPSHOT_ENTRIES = 300
"""An entry is a batch of what came while the one before was being synced: some twenty commands here."""
RETAIN_ENTRIES = 20
CHURN_WIDTH = 32
PUT_AWAY_S = 0.1
SEGMENT_HASH = "0" * 64


class Server:
    def __init__(self, config: dict[str, Any]) -> None:
        transport, self._nodes = transport_of("libp2p", config["me"], config["ports"])
        self.transport = transport
        self.me = self._nodes[config["me"]]
        self.machine = Machine()
        self.log = ServerLog(
            directory=Path(config["directory"]),
            mesh="bench",
            me=self.me,
            machine=self.machine,
            transport=transport,
            servers=lambda: list(self._nodes.values()),
            founding=config["is_founding"],
            settings=RaftSettings(snapshot_entries=SNAPSHOT_ENTRIES, retain_entries=RETAIN_ENTRIES),
            on_applied=lambda index: self.replica.applied(index),
            on_leadership=lambda leads: None,
        )
        self.replica = Replica(self.log, self.machine, lambda events: None)
        self._numbers = count(1)
        self._churning: trio.CancelScope | None = None

    async def has_formed(self, jobs: int) -> None:
        """Three voters, and so many live jobs here."""
        while len(self.log.voters) < len(self._nodes) or self.log.leader is None or self.live_jobs < jobs:  # noqa: ASYNC110
            await trio.sleep(0.005)

    @property
    def live_jobs(self) -> int:
        return int(self.machine.answer(GetSummary()).live_jobs)

    async def perform(self, command: Command) -> None:
        result = await self.log.propose(self.me, codec.encode(command), timeout_s=30)
        assert isinstance(result, Committed), result
        answer = codec.decode(result.answer, AnyAnswer)
        assert not isinstance(answer, Rejected), answer

    async def found(self) -> None:
        roles = (Role.SERVER, Role.WORKER)
        await self.perform(Found("bench", Member(self.me, self.me, roles)))
        await self.perform(CreateInvite(SECRET, roles, 1000, 10**9))
        for node in self._nodes.values():
            await self.perform(Join(SECRET, Member(node, node, roles)))

    async def fill(self, jobs: int) -> None:
        await self._often(self._submit, CHURN_WIDTH * 8, jobs)

    async def churn(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.CancelScope() as self._churning:
            task_status.started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._put_away)
                for _ in range(CHURN_WIDTH):
                    nursery.start_soon(self._churn)

    async def _churn(self) -> None:
        while True:
            await self.perform(Cancel(await self._submit()))

    async def _put_away(self) -> None:
        """Finished jobs leave as they do, but for no file: with too many of them submissions would wait."""
        voter, incarnation = f"{self.me}/bench", "bench"
        while True:
            if jobs := self.machine.history.due():
                number = self.machine.history.last + 1
                await self.perform(Seal(number, SEGMENT_HASH, 0, len(jobs), jobs[-1].id))
                await self.perform(Stored(incarnation, number))
                await self.perform(Drop(number, (voter,)))
            await trio.sleep(PUT_AWAY_S)

    def calm(self) -> None:
        if self._churning is not None:
            self._churning.cancel()

    async def _submit(self) -> JobId:
        """As jobs are: a name, a label, its own argument; no node has what it needs."""
        number = next(self._numbers)
        spec = JobSpec(
            backend=("wasm",),
            run=Run(args=("work", str(number))),
            name=f"render-{number}",
            labels=(("team", "film"),),
            needs=Needs(resources=Resources(cpu_milli=2000)),
        )
        job = new_job_id(wall_clock_ms(), os.urandom(10))
        await self.perform(Submit(job, spec))
        return job

    async def _often(self, do: Callable[[], Awaitable[object]], width: int, times: int) -> None:
        turns = iter(range(times))

        async def worker() -> None:
            for _ in turns:
                await do()

        async with trio.open_nursery() as nursery:
            for _ in range(width):
                nursery.start_soon(worker)

    async def ask_everything(self) -> None:
        """`mesh ps` over all jobs, page by page, with and without a filter that nothing matches, and the rest."""
        for states in ((), (TaskState.RUNNING,)):
            before: JobId | None = None
            while True:
                page = await self._ask(ListJobs(states=states, limit=PAGE_MAX, before=before))
                before = page.next
                if before is None:
                    break
        await self._ask(GetSummary())
        await self._ask(GetMembers())
        await self._ask(Explain("last"))

    async def _ask(self, query: AnyQuery) -> Any:
        view = await self.replica.answer(query, timeout_s=10)
        codec.encode(view)
        await trio.lowlevel.checkpoint()
        return view


async def serve(config: dict[str, Any], turns: Steps) -> None:
    server = Server(config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.pulse)
        await nursery.start(server.transport.serve)
        await nursery.start(server.log.serve)
        with suppress(Unavailable):
            await server.has_formed(config["jobs"])
        interpreter.settle()  # as the agent does when it is ready

        def say(*, is_look: bool = False) -> None:
            role = "leader" if server.log.leader == server.me else "follower"
            status = server.log.status()
            told = {"role": role, "term": server.log.term, "jobs": server.live_jobs, "first": status.first}
            longest = {} if is_look else asdict(turns.taken())
            print(json.dumps({**told, "last": status.last, **longest}), flush=True)

        say()
        async for line in trio.wrap_file(sys.stdin):
            order = json.loads(line)
            match order["do"]:
                case "found":
                    await server.found()
                case "fill":
                    await server.fill(order["jobs"])
                case "churn":
                    await nursery.start(server.churn)
                case "calm":
                    server.calm()
                case "ask":
                    await server.ask_everything()
                case "collect":
                    gc.collect()
                    await trio.lowlevel.checkpoint()
                case "tell":
                    pass
                case "look":
                    say(is_look=True)
                    continue
                case _:
                    nursery.cancel_scope.cancel()
                    return
            say()
            await trio.lowlevel.checkpoint()
            turns.taken()  # what telling took is not the log's


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    interpreter.prepare()  # as the agent does
    turns = Steps()
    trio.run(serve, json.loads(sys.argv[1]), turns, instruments=[turns])


if __name__ == "__main__":
    main()
