"""Commands on the host, started by a spawner process. They are bounded and cleaned up after, not isolated.

Memory is RLIMIT_DATA: what each single process may make writable, not their sum. A limit on
a whole job needs a cgroup, which the sandbox backend has. The spawner (spawner.py) keeps
limits and leash; it is started when first needed and ends after a minute without work.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio
from msgspec import Struct

from meshd.backends.child import Child, Link
from meshd.backends.limits import file_bytes_max, refuse_strings
from meshd.backends.outcomes import outcome_of
from meshd.backends.spawner import kill_strays
from meshd.errors import TooLarge
from meshd.model import AttemptKey, BackendProbe, EndReason, JobId, Outcome
from meshd.ports import BackendSettings, Execution

log = structlog.get_logger()

IDLE_S = 60.0
"""A spawner takes 10 MB and starts in 40 ms."""

LATE_S = 15.0
"""How long after a deadline and the grace the spawner may take to say that it is over; it sweeps for 5 s at most."""

PROBE_S = 20.0


class _Spawner:
    """The spawner process, and who waits for what in it."""

    def __init__(self, child: Child, link: Link, token: str, nursery: trio.Nursery) -> None:
        self.child = child
        self._token = token
        self.is_alive = True
        self.used_at_s = trio.current_time()
        self.waiting: dict[int, _Waiter] = {}
        self._link = link
        self._nursery = nursery
        self._burying = trio.Lock()
        self._ids = 0

    @classmethod
    async def start(cls, token: str, term_grace_s: float, lock: int | None, nursery: trio.Nursery) -> _Spawner:
        """Raises OSError. Its reader runs in `nursery`."""
        ours, theirs = socket.socketpair()
        try:
            child = await Child.start("meshd.backends.spawner", [token, str(term_grace_s)], [theirs], lock)
        except BaseException:
            ours.close()
            raise
        spawner = cls(child, Link(ours), token, nursery)
        nursery.start_soon(spawner._read)
        log.info("process.spawner_started", pid=child.pid)
        return spawner

    async def run(self, execution: Execution, term_grace_s: float) -> Outcome:
        """When cancelled, nothing of the attempt is left."""
        self._ids += 1
        waiter = self.waiting[self._ids] = _Waiter(self._ids)
        leash = execution.leash

        def tell(deadline_s: float | None) -> None:
            self._post({"do": "leash", "id": waiter.id, "leash_s": deadline_s})

        leash.watchers.add(tell)
        try:
            self._post(_request(waiter.id, execution, leash.deadline_s))
            run_s = execution.limits.run_s
            with trio.move_on_after(math.inf if run_s is None else run_s + term_grace_s + LATE_S):
                return await waiter.wait()
            await self.end(is_now=True)
            return Outcome(EndReason.BACKEND, message="the spawner did not answer in time and was killed")
        except trio.Cancelled:
            self._post({"do": "cancel", "id": waiter.id})
            with trio.CancelScope(shield=True):
                with trio.move_on_after(term_grace_s + LATE_S):
                    await waiter.wait()
                if waiter.outcome is None:
                    await self.end(is_now=True)
            raise
        finally:
            leash.watchers.discard(tell)
            self.waiting.pop(waiter.id, None)
            self.used_at_s = trio.current_time()

    async def end(self, *, is_now: bool = False) -> None:
        """Gone, with all that it started, when this returns."""
        self._link.close()
        with trio.CancelScope(shield=True):
            if not is_now:
                with trio.move_on_after(LATE_S):
                    await self.child.wait()
            await self._bury()

    async def _read(self) -> None:
        while (frame := await self._link.receive()) is not None:
            try:
                spawned, outcome = _parse(frame)
            except ValueError as error:
                log.warning("process.spawner_broken", pid=self.child.pid, why=str(error))
                self.child.kill()
                break
            waiter = self.waiting.get(spawned)
            if waiter is not None:
                waiter.resolve(outcome)
        # It has died, or `end` has closed our socket: then it cleans up and exits.
        with trio.CancelScope(shield=True):
            with trio.move_on_after(LATE_S):
                await self.child.wait()
            await self._bury()

    async def _bury(self) -> None:
        async with self._burying:
            if not self.is_alive:
                return  # and there may be a successor, whose commands carry the same mark
            self.child.kill()
            await self.child.wait()
            if not self.child.has_exited_well:
                await trio.to_thread.run_sync(kill_strays, self._token)
            self._fail_all(self.child.describe_end())
            self._link.close()
            self.child.close()

    def _fail_all(self, why: str) -> None:
        self.is_alive = False
        for waiter in self.waiting.values():
            waiter.resolve(Outcome(EndReason.BACKEND, message=f"the spawner {why}"[:2048]))

    def _post(self, request: dict[str, Any]) -> None:
        """Raises TooLarge."""
        self._link.post(json.dumps(request).encode())
        if self._link.is_pending:
            self._nursery.start_soon(self._link.flush)


class _Waiter:
    def __init__(self, spawned: int) -> None:
        self.id = spawned
        self.outcome: Outcome | None = None
        self._ended = trio.Event()

    def resolve(self, outcome: Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._ended.set()

    async def wait(self) -> Outcome:
        await self._ended.wait()
        assert self.outcome is not None
        return self.outcome


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
        self._spawner: _Spawner | None = None
        self._starting = trio.Lock()

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
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    await trio.sleep(IDLE_S / 4)
                    await self._end_idle(trio.current_time() - IDLE_S)
        finally:
            self._nursery = None
            if self._spawner is not None:
                await self._spawner.end()

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

    async def _live_spawner(self, nursery: trio.Nursery) -> _Spawner:
        if self._spawner is not None and self._spawner.is_alive:
            return self._spawner
        async with self._starting:
            if self._spawner is None or not self._spawner.is_alive:
                self._spawner = await _Spawner.start(self._token, self._term_grace_s, self._lock, nursery)
            return self._spawner

    async def _end_idle(self, before_s: float) -> None:
        async with self._starting:
            spawner = self._spawner
            if spawner is not None and not spawner.waiting and spawner.used_at_s <= before_s:
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
                spawner = await _Spawner.start(self._token, self._term_grace_s, self._lock, nursery)
                try:
                    return await spawner.run(execution, self._term_grace_s)
                finally:
                    await spawner.end()


def _refuse(execution: Execution) -> str | None:
    if execution.module is not None:
        return "the process backend runs commands, not wasm modules"
    if not execution.args or not execution.args[0]:
        return "a process job needs a command"
    return refuse_strings(execution)


def _request(spawned: int, execution: Execution, leash_s: float | None) -> dict[str, Any]:
    limits = execution.limits
    return {
        "do": "run",
        "id": spawned,
        "args": execution.args,
        "env": execution.env,
        "workdir": str(execution.workdir),
        "stdin": str(execution.stdin) if execution.stdin is not None else None,
        "stdout": str(execution.stdout),
        "stderr": str(execution.stderr),
        "run_s": limits.run_s,
        "memory": limits.memory,
        "output_bytes_max": limits.output_bytes_max,
        "file_bytes_max": file_bytes_max(execution),
        "leash_s": leash_s,
    }


class _Answer(Struct):
    """As `spawned.describe` makes them."""

    id: int
    reason: str
    exit_code: int | None
    message: str
    run_ms: int


def _parse(frame: bytes) -> tuple[int, Outcome]:
    """Which command ended, and how. Raises ValueError."""
    try:
        answer = msgspec.json.decode(frame, type=_Answer)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"no answer: {error}") from error
    outcome = outcome_of(reason=answer.reason, exit_code=answer.exit_code, message=answer.message, run_ms=answer.run_ms)
    return answer.id, outcome
