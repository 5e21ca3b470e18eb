"""WASI preview 1 modules, in runner processes of their own.

A runner is started when an attempt finds none idle, takes one attempt at a time, and
ends after a minute without work. Deadlines, leash and limits are kept by the runner
(wasm_runner.py); here is the pool, and the last resort: a runner that does not answer
is killed. A runner that dies takes one attempt with it, which ends as `backend`.
"""

from __future__ import annotations

import math
import socket
import tempfile
from importlib.metadata import version
from pathlib import Path

import structlog
import trio

from meshd import codec
from meshd.backends.child import Child, Link
from meshd.backends.limits import file_bytes_max, refuse_strings
from meshd.backends.outcomes import outcome_of
from meshd.backends.wasm_messages import Ended, Task
from meshd.errors import InvalidRequest, TooLarge
from meshd.model import AttemptKey, BackendProbe, EndReason, JobId, Outcome
from meshd.ports import BackendSettings, Execution

log = structlog.get_logger()

RUNNERS_MAX = 256
"""Some 12 MB of its own each. Attempts beyond wait for one; placement should not send so many."""

IDLE_S = 60.0
"""Starting costs 0.1 s; keeping one costs memory. A minute bridges the gaps of a busy queue."""

CANCEL_S = 0.8
"""A runner ends any guest within 0.25 s; together with the kill this keeps a cancel under a second."""

SILENCE_S = 130.0
"""Past the run limit: a runner may compile for 120 s first. Only a stopped or broken one gets here."""

PROBE_S = 20.0

WASMTIME_VERSION = version("wasmtime")

# (module (func (export "_start")))
_EMPTY_COMMAND = bytes.fromhex("0061736d0100000001040160000003020100070a01065f737461727400000a040102000b")


class RunnerLost(Exception):
    """The runner died or broke the protocol; the message says how."""


class _Runner:
    """One runner process, and the attempt in it."""

    def __init__(self, child: Child, link: Link, orders: socket.socket) -> None:
        orders.setblocking(False)
        self.child = child
        self.modules: set[str] = set()
        """What it has loaded, more or less: a hint for choosing, nothing more."""
        self.idle_since_s = math.inf
        self._link = link
        self._orders = orders
        self._ids = 0

    @classmethod
    async def start(cls, cache: Path, lock: int | None) -> _Runner:
        """Raises OSError."""
        ours, theirs = socket.socketpair()
        orders, orders_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            child = await Child.start(
                "meshd.backends.wasm_runner", [str(cache), WASMTIME_VERSION], [theirs, orders_theirs], lock
            )
        except BaseException:
            ours.close()
            orders.close()
            raise
        return cls(child, Link(ours), orders)

    async def run(self, execution: Execution) -> Outcome:
        """Raises RunnerLost. When cancelled, the guest is dead, and the runner with it if need be."""
        self._ids += 1
        task_id = self._ids
        leash = execution.leash

        def tell(deadline_s: float | None) -> None:
            self._order("leash", task_id, deadline_s)

        leash.watchers.add(tell)
        try:
            self._link.post(codec.pack([_task(task_id, execution, leash.deadline_s)]))
            limit_s = math.inf if execution.limits.run_s is None else execution.limits.run_s + SILENCE_S
            with trio.move_on_after(limit_s):
                return await self._answer(task_id)
            raise RunnerLost("the runner did not answer in time and was killed")
        except trio.Cancelled:
            self._order("cancel", task_id)
            with trio.CancelScope(shield=True), trio.move_on_after(CANCEL_S):
                try:
                    await self._answer(task_id)
                except RunnerLost:
                    await self.end()
                raise
            await self.end()
            raise
        except RunnerLost:
            await self.end()
            raise
        finally:
            leash.watchers.discard(tell)

    async def end(self) -> None:
        self.child.kill()
        with trio.CancelScope(shield=True):
            await self.child.wait()

    def close(self) -> None:
        self._link.close()
        self._orders.close()
        self.child.close()

    async def _answer(self, task_id: int) -> Outcome:
        await self._link.flush()
        frame = await self._link.receive()
        if frame is None:
            with trio.move_on_after(CANCEL_S):
                await self.child.wait()
            raise RunnerLost(f"the runner {self.child.describe_end()}")
        try:
            (fields,) = codec.unpack(frame)
            ended = Ended(*fields)
            outcome = outcome_of(
                reason=ended.reason, exit_code=ended.exit_code, message=ended.message, run_ms=ended.run_ms
            )
        except (InvalidRequest, ValueError, TypeError) as error:
            raise RunnerLost(f"the runner answered nonsense: {error}") from error
        if ended.id != task_id:
            raise RunnerLost(f"the runner answered task {ended.id} instead of {task_id}")
        if ended.is_last:
            await self.end()
        return outcome

    def _order(self, *order: object) -> None:
        try:
            self._orders.send(codec.pack(order))
        except OSError:
            # It is gone, or reads nothing any more. What cannot be told to stop must not run on.
            self.child.kill()


class WasmBackend:
    name = "wasm"

    def __init__(self, settings: BackendSettings) -> None:
        self._directory = settings.directory
        self._lock = settings.helpers_lock
        self._cache = settings.directory / "compiled"
        # 0700 whatever the umask: a runner refuses compiled code from a directory that others can write to.
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._room = trio.Semaphore(RUNNERS_MAX)
        self._idle: list[_Runner] = []
        self._all: set[_Runner] = set()
        self._nursery: trio.Nursery | None = None

    async def probe(self) -> BackendProbe:
        """Runs an empty module in a runner of its own, which ends afterwards."""
        try:
            with trio.fail_after(PROBE_S):
                outcome = await self._try_empty_command()
        except (OSError, RunnerLost, trio.TooSlowError) as error:
            return BackendProbe(self.name, works=False, reason=str(error) or f"no answer within {PROBE_S:.0f} s")
        return BackendProbe(
            self.name, works=outcome.is_success, version=f"wasmtime {WASMTIME_VERSION}", reason=outcome.message
        )

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    await trio.sleep(IDLE_S / 4)
                    self._end_idle(trio.current_time() - IDLE_S)
        finally:
            self._nursery = None
            self._idle.clear()
            for runner in self._all:
                runner.child.kill()
            with trio.CancelScope(shield=True):
                for runner in self._all:
                    await runner.child.wait()
                    runner.close()
            self._all.clear()

    async def run(self, execution: Execution) -> Outcome:
        if (refusal := refuse(execution)) is not None:
            return Outcome(EndReason.INVALID, message=refusal)
        try:
            self._room.acquire_nowait()
        except trio.WouldBlock:
            await self._room.acquire()
        try:
            runner = await self._take(execution.module_hash)
            try:
                outcome = await runner.run(execution)
            finally:
                self._give_back(runner, execution.module_hash)
        except (OSError, RunnerLost) as error:
            log.warning("wasm.runner_lost", job=execution.key.job, task=execution.key.task, why=str(error))
            return Outcome(EndReason.BACKEND, message=str(error)[:2048])
        except TooLarge as error:
            return Outcome(EndReason.INVALID, message=f"arguments and environment: {error}")
        finally:
            self._room.release()
        return outcome

    async def _take(self, module_hash: str) -> _Runner:
        """An idle runner, one that knows the module if possible, the most recently used otherwise; or a new one."""
        idle = [runner for runner in self._idle if runner.child.is_running]
        if not idle:
            return await self._start()
        runner = next((r for r in reversed(idle) if module_hash in r.modules), idle[-1])
        self._idle.remove(runner)
        return runner

    def _give_back(self, runner: _Runner, module_hash: str) -> None:
        if runner in self._all and runner.child.is_running:
            runner.modules.add(module_hash)
            runner.idle_since_s = trio.current_time()
            self._idle.append(runner)
        else:
            runner.close()

    async def _start(self) -> _Runner:
        assert self._nursery is not None, "serve() owns the runners: it must be running"
        runner = await _Runner.start(self._cache, self._lock)
        if self._nursery is None:  # it stopped while this one was starting
            await runner.end()
            runner.close()
            raise RunnerLost("the wasm backend is stopping")
        self._all.add(runner)
        self._nursery.start_soon(self._bury, runner)
        log.info("wasm.runner_started", pid=runner.child.pid, runners=len(self._all))
        return runner

    async def _bury(self, runner: _Runner) -> None:
        """Reap it when it dies, idle or not. One that was running an attempt is closed by that attempt."""
        await runner.child.wait()
        self._all.discard(runner)
        if runner in self._idle:
            self._idle.remove(runner)
            runner.close()

    def _end_idle(self, before_s: float) -> None:
        for runner in self._idle:
            if runner.idle_since_s <= before_s:
                runner.child.kill()  # idle: there is nothing to lose

    async def _try_empty_command(self) -> Outcome:
        runner = await _Runner.start(self._cache, self._lock)
        try:
            with tempfile.TemporaryDirectory(dir=self._directory) as name:
                scratch = Path(name)
                (scratch / "module").write_bytes(_EMPTY_COMMAND)
                return await runner.run(
                    Execution(
                        key=AttemptKey(job=JobId("probe"), task=0, attempt=1, fence=0),
                        args=(),
                        env=(),
                        workdir=scratch,
                        stdout=scratch / "stdout",
                        stderr=scratch / "stderr",
                        module=scratch / "module",
                    )
                )
        finally:
            await runner.end()
            runner.close()


def refuse(execution: Execution) -> str | None:
    """Why this can never run, or None."""
    if execution.module is None:
        return "a wasm job needs a module"
    return refuse_strings(execution)


def _task(task_id: int, execution: Execution, leash_s: float | None) -> Task:
    limits = execution.limits
    return Task(
        id=task_id,
        module=str(execution.module),
        module_hash=execution.module_hash,
        # The program's own name comes first, as everywhere; nothing better than this is known.
        args=("module.wasm", *execution.args),
        env=execution.env,
        workdir=str(execution.workdir),
        stdin=str(execution.stdin) if execution.stdin is not None else None,
        stdout=str(execution.stdout),
        stderr=str(execution.stderr),
        run_s=limits.run_s,
        memory=limits.memory,
        fuel=limits.fuel,
        output_bytes_max=limits.output_bytes_max,
        file_bytes_max=file_bytes_max(execution),
        leash_s=leash_s,
    )
