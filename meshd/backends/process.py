"""Commands on the host, started by a spawner process. They are bounded and cleaned up after, not isolated.

Memory is RLIMIT_DATA: what each single process may make writable, not their sum. A limit on
a whole job needs a cgroup, which the sandbox backend has. The spawner (spawner.py) keeps
limits and leash; it is started when first needed and ends after a minute without work. Commands
wait in it, so that it never waits for the agent; what had not begun when it dies runs in the next.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog
import trio

from meshd.backends import spawners
from meshd.backends.limits import refuse_strings
from meshd.backends.remains import remove
from meshd.backends.spawners import Lane, Spawner
from meshd.errors import TooLarge
from meshd.model import AttemptKey, BackendProbe, EndReason, JobId, Outcome
from meshd.ports import BackendSettings, Execution, Finished, Plan, Planned

log = structlog.get_logger()

IDLE_S = 60.0
"""A spawner takes 10 MB and starts in 40 ms."""

REMAINS_MAX = 1024
"""Directories that wait to be removed; what comes when there are more is left for the next start."""

PROBE_S = 20.0


class Start(NamedTuple):
    """What `ProcessBackend.start` was asked for, while there is no spawner."""

    lane: int
    plan: Plan
    attempts: list[Planned]
    ended: Callable[[Sequence[Finished]], None]


class ProcessBackend:
    name = "process"

    def __init__(self, settings: BackendSettings) -> None:
        self._directory = settings.directory
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._term_grace_s = settings.term_grace_s
        self._lock = settings.helpers_lock
        # Names this agent among all on the machine: processes that outlived a killed spawner are known by it.
        self._token = hashlib.sha256(str(settings.directory.resolve()).encode()).hexdigest()[:32]
        self._nursery: trio.Nursery | None = None
        self._spawner: Spawner | None = None
        self._starting = trio.Lock()
        self._scratch = self._directory / "scratch"
        self._pending: list[Start] = []
        self._remains, self._removable = trio.open_memory_channel[str](REMAINS_MAX)

    async def probe(self) -> BackendProbe:
        """Runs a command that does nothing. Before `serve`, this also ends what an earlier agent left behind."""
        try:
            with trio.fail_after(PROBE_S):
                outcome = await self._try_command()
        except (OSError, trio.TooSlowError) as error:
            return BackendProbe(self.name, works=False, reason=str(error) or f"no answer within {PROBE_S:.0f} s")
        version = f"{platform.system()} {platform.release()}"
        return BackendProbe(self.name, works=outcome.is_success, version=version, reason=outcome.message)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await trio.to_thread.run_sync(remove, self._scratch)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._tidy)
                task_status.started()
                while True:
                    await trio.sleep(IDLE_S / 4)
                    now_s = trio.current_time()
                    await self._end_idle(now_s - IDLE_S)
                    await self._end_silent(now_s - self._term_grace_s - spawners.LATE_S)
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                if self._spawner is not None:
                    await self._spawner.end()
                stopping = Outcome(EndReason.BACKEND, message="the process backend is stopping")
                for start in self._pending:
                    await _tell(start, stopping)
                self._pending.clear()
                await trio.to_thread.run_sync(remove, self._scratch)

    async def run(self, execution: Execution) -> Outcome:
        if (refusal := _refuse(execution)) is not None:
            return Outcome(EndReason.INVALID, message=refusal)
        assert self._nursery is not None, "serve() owns the spawner: it must be running"
        try:
            spawner = await self._live_spawner(self._nursery)
            return await spawner.run(execution, self._term_grace_s)
        except OSError as error:
            return Outcome(EndReason.BACKEND, message=f"the spawner cannot be started: {error}")
        except TooLarge as error:
            return Outcome(EndReason.INVALID, message=f"arguments and environment: {error}")

    def start(
        self, plan: Plan, lane: int, attempts: Sequence[Planned], ended: Callable[[Sequence[Finished]], None]
    ) -> None:
        assert self._nursery is not None, "serve() owns the spawner: it must be running"
        start = Start(lane, plan, list(attempts), ended)
        if (refusal := _refuse(plan)) is not None:
            self._nursery.start_soon(_tell, start, Outcome(EndReason.INVALID, message=refusal))
        elif self._spawner is not None and self._spawner.is_alive and not self._pending:
            self._give(self._spawner, start)
        else:
            self._pending.append(start)
            if len(self._pending) == 1:
                self._nursery.start_soon(self._give_pending)

    def stop(self, fence: int) -> None:
        assert self._nursery is not None
        for start in self._pending:
            for attempt in start.attempts:
                if attempt.key.fence == fence:
                    start.attempts.remove(attempt)
                    stopped = Outcome(EndReason.CANCELLED, message="stopped before it started")
                    self._nursery.start_soon(_tell, start._replace(attempts=[attempt]), stopped)
                    return
        if self._spawner is not None and (number := self._spawner.find(fence)) is not None:
            self._nursery.start_soon(self._spawner.stop, number, self._term_grace_s)

    async def recall(self, fences: Sequence[int]) -> Sequence[int]:
        wanted = set(fences)
        back: list[int] = []
        for start in self._pending:
            back += [each.key.fence for each in start.attempts if each.key.fence in wanted]
            start.attempts[:] = [each for each in start.attempts if each.key.fence not in wanted]
        if (spawner := self._spawner) is not None:
            numbers = [
                number
                for lane in spawner.lanes.values()
                for number, each in lane.given.items()
                if each.key.fence in wanted
            ]
            if numbers:
                back += [each.key.fence for each in await spawner.give_back(numbers)]
        return back

    async def read_output(self, fence: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        if self._spawner is None or (number := self._spawner.find(fence)) is None:
            return None
        return await self._spawner.read_output(number, stream, offset, bytes_max)

    # --- the spawner -------------------------------------------------------------------------------------------------

    def _give(self, spawner: Spawner, start: Start) -> None:
        assert self._nursery is not None
        try:
            spawner.give(start.lane, start.plan, start.attempts, start.ended)
        except TooLarge as error:
            refusal = Outcome(EndReason.INVALID, message=f"arguments and environment: {error}")
            self._nursery.start_soon(_tell, start, refusal)

    async def _give_pending(self) -> None:
        assert self._nursery is not None
        try:
            spawner = await self._live_spawner(self._nursery)
        except OSError as error:
            pending, self._pending = self._pending, []
            for start in pending:
                await _tell(start, Outcome(EndReason.BACKEND, message=f"the spawner cannot be started: {error}"[:2048]))
            return
        pending, self._pending = self._pending, []
        for start in pending:
            if start.attempts:
                self._give(spawner, start)

    async def _live_spawner(self, nursery: trio.Nursery) -> Spawner:
        if self._spawner is not None and self._spawner.is_alive:
            return self._spawner
        async with self._starting:
            if self._spawner is None or not self._spawner.is_alive:
                self._spawner = await self._start_spawner(nursery)
            return self._spawner

    async def _start_spawner(self, nursery: trio.Nursery) -> Spawner:
        return await Spawner.start(self._token, self._term_grace_s, str(self._scratch), self._lock, nursery, self)

    def run_elsewhere(self, lane: Lane, attempts: Sequence[Planned]) -> None:
        if self._nursery is None:
            stopping = Outcome(EndReason.BACKEND, message="the process backend is stopping")
            lane.ended([Finished(each.key, stopping) for each in attempts])
            return
        log.info("process.run_elsewhere", job=lane.plan.job, attempts=len(attempts))
        self.start(lane.plan, lane.number, attempts, lane.ended)

    async def _end_silent(self, before_s: float) -> None:
        if self._spawner is not None and self._spawner.is_alive and self._spawner.silent_since(before_s):
            log.warning("process.spawner_silent", pid=self._spawner.child.pid)
            await self._spawner.end(is_now=True)

    def remove(self, directory: str) -> None:
        try:
            self._remains.send_nowait(directory)
        except trio.WouldBlock:
            log.warning("process.remains_left", directory=directory)

    async def _tidy(self) -> None:
        async for directory in self._removable:
            if Path(directory).parent == self._scratch:  # as a spawner of ours says
                await trio.to_thread.run_sync(remove, directory)

    async def _end_idle(self, before_s: float) -> None:
        async with self._starting:
            spawner = self._spawner
            if spawner is not None and spawner.is_idle and spawner.used_at_s <= before_s:
                self._spawner = None
                await spawner.end()

    async def _try_command(self) -> Outcome:
        with tempfile.TemporaryDirectory(dir=self._directory) as name:
            scratch = Path(name)
            for part in ("stdout", "stderr"):
                (scratch / part).touch()
            execution = Execution(
                key=AttemptKey(job=JobId("probe"), task=0, attempt=1, fence=0),
                args=(sys.executable, "-I", "-S", "-c", ""),
                env=(),
                workdir=scratch,
                stdout=scratch / "stdout",
                stderr=scratch / "stderr",
            )
            if self._nursery is not None:
                return await self.run(execution)
            async with trio.open_nursery() as nursery:
                spawner = await self._start_spawner(nursery)
                try:
                    return await spawner.run(execution, self._term_grace_s)
                finally:
                    await spawner.end()


def _refuse(source: Execution | Plan) -> str | None:
    if source.module is not None:
        return "the process backend runs commands, not wasm modules"
    if not source.args or not source.args[0]:
        return "a process job needs a command"
    return refuse_strings(source)


async def _tell(start: Start, outcome: Outcome) -> None:
    if start.attempts:
        start.ended([Finished(each.key, outcome) for each in start.attempts])
