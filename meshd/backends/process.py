"""Commands on the host, started by spawner processes. They are bounded and cleaned up after, not isolated.

Memory is RLIMIT_DATA: what each single process may make writable, not their sum. A limit on
a whole job needs a cgroup, which the sandbox backend has. A spawner (spawner.py) keeps limits
and leash; commands wait in it, so that it never waits for the agent. There are several, since
one is a single thread that starts some 1,500 commands a second and waits for each to be executed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
import trio

from meshd.backends.limits import refuse_strings
from meshd.backends.remains import remove
from meshd.backends.spawner import kill_strays
from meshd.backends.spawner_supervisor import Spawning, Start, Supervisor, tell
from meshd.model import AttemptKey, BackendProbe, EndReason, JobId, Outcome
from meshd.ports import BackendSettings, Execution, Finished, Plan, Planned

log = structlog.get_logger()

SPAWNERS_MAX = 4
"""… and as many as there are cores at most: they are there to keep those busy."""

IDLE_S = 60.0
"""A spawner takes 10 MB and starts in 40 ms."""

REMAINS_MAX = 1024
"""Directories that wait to be removed; what comes when there are more is left for the next start."""

PROBE_S = 20.0


class ProcessBackend:
    name = "process"

    def __init__(self, settings: BackendSettings) -> None:
        self._directory = settings.directory.absolute()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Names this agent among all on the machine: processes that outlived a killed spawner are known by it.
        self._token = hashlib.sha256(str(settings.directory.resolve()).encode()).hexdigest()[:32]
        self._scratch = self._directory / "scratch"
        self._remains, self._removable = trio.open_memory_channel[str](REMAINS_MAX)
        self._spawning = Spawning(self._scratch, settings.term_grace_s, settings.helpers_lock, self._remove)
        self._nursery: trio.Nursery | None = None
        self._supervisors: list[Supervisor] = []

    async def probe(self) -> BackendProbe:
        """Runs a command that does nothing."""
        try:
            with trio.fail_after(PROBE_S):
                outcome = await self._try_command()
        except (OSError, trio.TooSlowError) as error:
            return BackendProbe(self.name, works=False, reason=str(error) or f"no answer within {PROBE_S:.0f} s")
        version = f"{platform.system()} {platform.release()}"
        return BackendProbe(self.name, works=outcome.is_success, version=version, reason=outcome.message)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ends what any spawner of an earlier agent left before anything is started."""
        # Its token is the beginning of all of theirs, however many cores there were.
        await trio.to_thread.run_sync(kill_strays, self._token)
        await trio.to_thread.run_sync(remove, self._scratch)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._supervisors = [
                    Supervisor(f"{self._token}:{place}", self._spawning, nursery) for place in range(_spawners())
                ]
                nursery.start_soon(self._tidy)
                task_status.started()
                while True:
                    await trio.sleep(IDLE_S / 4)
                    async with trio.open_nursery() as tending:
                        for supervisor in self._supervisors:
                            tending.start_soon(supervisor.tend, IDLE_S)
        finally:
            self._nursery = None
            supervisors, self._supervisors = self._supervisors, []
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as ending:
                    for supervisor in supervisors:
                        ending.start_soon(supervisor.end)
                await trio.to_thread.run_sync(remove, self._scratch)

    async def run(self, execution: Execution) -> Outcome:
        if (refusal := _refuse(execution)) is not None:
            return Outcome(EndReason.INVALID, message=refusal)
        return await self._choose().run(execution)

    def start(
        self, plan: Plan, lane: int, attempts: Sequence[Planned], ended: Callable[[Sequence[Finished]], None]
    ) -> None:
        assert self._nursery is not None, "serve() owns the spawners: it must be running"
        start = Start(lane, plan, list(attempts), ended)
        if (refusal := _refuse(plan)) is not None:
            self._nursery.start_soon(tell, start, Outcome(EndReason.INVALID, message=refusal))
        else:
            self._choose(lane).start(start)

    def stop(self, fence: int) -> None:
        for supervisor in self._supervisors:
            if supervisor.stop(fence):
                return

    async def recall(self, fences: Sequence[int]) -> Sequence[int]:
        wanted = frozenset(fences)
        back: list[int] = []

        async def recall(supervisor: Supervisor) -> None:
            back.extend(await supervisor.recall(wanted))

        # One may be slow to answer: meanwhile the others must not begin more.
        async with trio.open_nursery() as nursery:
            for supervisor in self._supervisors:
                nursery.start_soon(recall, supervisor)
        return back

    async def read_output(self, fence: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        for supervisor in self._supervisors:
            if (data := await supervisor.read_output(fence, stream, offset, bytes_max)) is not None:
                return data
        return None

    # --- spawners ----------------------------------------------------------------------------------------------------

    def _choose(self, lane: int | None = None) -> Supervisor:
        """The one that has the lane, or else the one with the least to do."""
        assert self._supervisors, "serve() owns the spawners: it must be running"
        if lane is not None:
            for supervisor in self._supervisors:
                if supervisor.has_lane(lane):
                    return supervisor
        return min(self._supervisors, key=lambda supervisor: supervisor.load)

    def _remove(self, directory: str) -> None:
        try:
            self._remains.send_nowait(directory)
        except trio.WouldBlock:
            log.warning("process.remains_left", directory=directory)

    async def _tidy(self) -> None:
        async for directory in self._removable:
            path = Path(directory)
            # As a spawner of ours says.
            if self._scratch in path.parents and ".." not in path.relative_to(self._scratch).parts:
                await trio.to_thread.run_sync(remove, directory)

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
                supervisor = Supervisor(self._token, self._spawning, nursery)
                try:
                    return await supervisor.run(execution)
                finally:
                    await supervisor.end()


def _spawners() -> int:
    return min(SPAWNERS_MAX, len(os.sched_getaffinity(0)))


def _refuse(source: Execution | Plan) -> str | None:
    if source.module is not None:
        return "the process backend runs commands, not wasm modules"
    if not source.args or not source.args[0]:
        return "a process job needs a command"
    return refuse_strings(source)
