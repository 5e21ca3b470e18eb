"""WASI preview 1 modules, in runner processes of their own.

A runner is started when a lane finds none idle, works for one lane at a time, and ends after a
minute without work. It is given a lane's attempts all at once, so that it never waits for the
agent; deadlines, leash and limits are kept by the runner (wasm_runner.py). Here is the pool, and
the last resort: a runner that does not answer is killed. A runner that dies takes the attempt
with it that ran, which ends as `backend`; those behind it run in another (wasm_runners.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import structlog
import trio

from meshd.backends.limits import TOO_LARGE, refuse_strings
from meshd.backends.remains import remove
from meshd.backends.wasm_runners import CANCEL_S, Lane, Runner, RunnerLost, lane_for
from meshd.errors import TooLarge
from meshd.model import AttemptKey, BackendProbe, EndReason, JobId, Outcome
from meshd.ports import BackendSettings, Execution, Finished, Plan, Planned

log = structlog.get_logger()

RUNNERS_MAX = 256
"""Some 12 MB of its own each. Lanes beyond wait for one; placement should not send so many."""

IDLE_S = 60.0
"""Starting costs 0.1 s; keeping one costs memory. A minute bridges the gaps of a busy queue."""

SILENCE_S = 130.0
"""Past the run limit: a runner may compile for 120 s first. Only a stopped or broken one gets here."""

PROBE_S = 20.0

WASMTIME_VERSION = version("wasmtime")

# (module (func (export "_start")))
_EMPTY_COMMAND = bytes.fromhex("0061736d0100000001040160000003020100070a01065f737461727400000a040102000b")


class WasmBackend:
    name = "wasm"

    def __init__(self, settings: BackendSettings) -> None:
        self._directory = settings.directory
        self._lock = settings.helpers_lock
        self._cache = settings.directory / "compiled"
        # 0700 whatever the umask: a runner refuses compiled code from a directory that others can write to.
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._idle: list[Runner] = []
        self._all: set[Runner] = set()
        self._lanes: dict[int, Lane] = {}
        self._own_lanes = 0
        self._queue: list[Lane] = []
        """Lanes for which there was no room."""
        self._alive = 0
        self._scratches = 0
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
        await trio.to_thread.run_sync(self._sweep)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    await trio.sleep(IDLE_S / 4)
                    self._end_idle(trio.current_time() - IDLE_S)
                    self._end_silent(trio.current_time() - SILENCE_S)
        finally:
            self._nursery = None
            self._idle.clear()
            for runner in self._all:
                runner.kill()
            with trio.CancelScope(shield=True):
                for runner in self._all:
                    await runner.child.wait()
                    runner.close()
                await trio.to_thread.run_sync(self._sweep)
            self._all.clear()
            self._fail_all("the wasm backend is stopping")

    # --- attempts ----------------------------------------------------------------------------------------------------

    async def run(self, execution: Execution) -> Outcome:
        if (refusal := refuse(execution)) is not None:
            return Outcome(EndReason.INVALID, message=refusal)
        outcomes: list[Outcome] = []
        ended = trio.Event()

        def end(finished: Sequence[Finished]) -> None:
            outcomes.extend(each.outcome for each in finished)
            ended.set()

        # Numbers of its own, below those of the caller's lanes.
        self._own_lanes -= 1
        lane = self._lanes[self._own_lanes] = lane_for(execution, end)
        lane.waiting.append(Planned(execution.key, ""))
        self._proceed(lane)
        try:
            await ended.wait()
        except trio.Cancelled:
            self._stop_in(lane, execution.key.fence)
            with trio.CancelScope(shield=True):
                await ended.wait()
            raise
        return outcomes[0]

    def start(
        self, plan: Plan, lane: int, attempts: Sequence[Planned], ended: Callable[[Sequence[Finished]], None]
    ) -> None:
        assert self._nursery is not None, "serve() owns the runners: it must be running"
        found = self._lanes.get(lane)
        if found is None:
            found = self._lanes[lane] = lane_for(plan, ended)
        found.waiting.extend(attempts)
        if (refusal := refuse(plan)) is not None:
            self._fail(found, Outcome(EndReason.INVALID, message=refusal))
        self._proceed(found)

    def stop(self, fence: int) -> None:
        for lane in list(self._lanes.values()):
            if self._stop_in(lane, fence):
                return

    async def recall(self, fences: Sequence[int]) -> Sequence[int]:
        wanted = set(fences)
        back: list[int] = []
        for lane in list(self._lanes.values()):
            kept = [each for each in lane.waiting if each.key.fence not in wanted]
            back += [each.key.fence for each in lane.waiting if each.key.fence in wanted]
            lane.waiting.clear()
            lane.waiting.extend(kept)
            if (runner := lane.runner) is not None:
                for numbers in _runs(number for number, each in runner.given.items() if each.key.fence in wanted):
                    back += [each.key.fence for each in await runner.give_back(numbers)]
                self._release(runner)
        return back

    async def read_output(self, fence: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        for runner in self._all:
            for number, attempt in runner.given.items():
                if attempt.key.fence == fence:
                    return await runner.read_output(number, stream, offset, bytes_max)
        return None

    # --- lanes -------------------------------------------------------------------------------------------------------

    def _proceed(self, lane: Lane) -> None:
        """Give what waits to a runner, or get one."""
        if not lane.waiting or lane.is_hiring:
            return
        runner = lane.runner
        if runner is None:
            runner = self._take_idle(lane.plan.module_hash)
            if runner is None:
                self._hire(lane)
                return
            try:
                runner.work_for(lane)
            except TooLarge:
                self._fail(lane, TOO_LARGE)
                self._give_idle(runner)
                return
        too_large = runner.give(list(lane.waiting))
        lane.waiting.clear()
        if not runner.is_flushed and self._nursery is not None:
            self._nursery.start_soon(runner.flush)
        if too_large:
            self._later(lane, [Finished(each.key, TOO_LARGE) for each in too_large])
            self._release(runner)  # it may have been given nothing

    def _take_idle(self, module_hash: str) -> Runner | None:
        """One that knows the module if possible, the most recently used otherwise."""
        idle = [runner for runner in self._idle if runner.is_usable]
        if not idle:
            return None
        runner = next((r for r in reversed(idle) if module_hash in r.modules), idle[-1])
        self._idle.remove(runner)
        return runner

    def _hire(self, lane: Lane) -> None:
        assert self._nursery is not None, "serve() owns the runners: it must be running"
        lane.is_hiring = True
        if self._alive >= RUNNERS_MAX:
            self._queue.append(lane)
            return
        self._alive += 1
        self._nursery.start_soon(self._start_for, lane)

    async def _start_for(self, lane: Lane) -> None:
        assert self._nursery is not None
        self._scratches += 1
        scratch = self._directory / "scratch" / str(self._scratches)
        try:
            runner = await Runner.start(self._cache, WASMTIME_VERSION, scratch, self._lock)
        except OSError as error:
            self._alive -= 1
            lane.is_hiring = False
            log.warning("wasm.runner_failed", why=str(error))
            self._fail(lane, Outcome(EndReason.BACKEND, message=f"a runner cannot be started: {error}"[:2048]))
            return
        self._all.add(runner)
        if self._nursery is None:  # it stopped while this one was starting
            return
        self._nursery.start_soon(self._hear, runner)
        self._nursery.start_soon(self._hear_replies, runner)
        log.info("wasm.runner_started", pid=runner.child.pid, runners=len(self._all))
        self._give_idle(runner)
        lane.is_hiring = False
        self._proceed(lane)
        self._forget_if_over(lane)

    def _give_idle(self, runner: Runner) -> None:
        runner.idle_since_s = trio.current_time()
        self._idle.append(runner)
        if self._queue:
            lane = self._queue.pop(0)
            lane.is_hiring = False
            self._proceed(lane)
            self._forget_if_over(lane)

    def _release(self, runner: Runner) -> None:
        """It is idle when it has nothing left to do."""
        if runner.given or (lane := runner.lane) is None:
            return
        runner.leave()
        self._forget_if_over(lane)
        if runner in self._all and runner.is_usable:
            self._give_idle(runner)

    def _forget_if_over(self, lane: Lane) -> None:
        if lane.runner is None and not lane.waiting and not lane.is_hiring:
            for number, each in self._lanes.items():
                if each is lane:
                    del self._lanes[number]
                    return

    def _fail(self, lane: Lane, outcome: Outcome) -> None:
        """All that waits in it."""
        failed = [Finished(each.key, outcome) for each in lane.waiting]
        lane.waiting.clear()
        self._forget_if_over(lane)
        if failed:
            # Not at once: whoever has just started them does not expect their end yet.
            self._later(lane, failed)

    def _fail_all(self, why: str) -> None:
        for lane in list(self._lanes.values()):
            left = [*(lane.runner.given.values() if lane.runner is not None else ()), *lane.waiting]
            lane.waiting.clear()
            if left:
                lane.ended([Finished(each.key, Outcome(EndReason.BACKEND, message=why)) for each in left])
        self._lanes.clear()
        self._queue.clear()

    def _stop_in(self, lane: Lane, fence: int) -> bool:
        for each in lane.waiting:
            if each.key.fence == fence:
                lane.waiting.remove(each)
                self._later(
                    lane, [Finished(each.key, Outcome(EndReason.CANCELLED, message="stopped before it started"))]
                )
                self._forget_if_over(lane)
                return True
        if (runner := lane.runner) is not None:
            for number, each in runner.given.items():
                if each.key.fence == fence:
                    runner.cancel(number)
                    if self._nursery is not None:
                        self._nursery.start_soon(self._see_it_end, runner, number)
                    return True
        return False

    def _later(self, lane: Lane, finished: list[Finished]) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(_tell, lane.ended, finished)

    # --- runners -----------------------------------------------------------------------------------------------------

    async def _hear(self, runner: Runner) -> None:
        try:
            while True:
                finished = await runner.hear()
                self._tell(runner, finished)
                pause_s = runner.gathering.pause_s(len(finished), len(runner.given), trio.current_time())
                if pause_s:
                    await trio.sleep(pause_s)
        except RunnerLost as lost:
            await self._bury(runner, str(lost))

    async def _hear_replies(self, runner: Runner) -> None:
        try:
            while True:
                self._tell(runner, await runner.hear_replies())
        except RunnerLost:
            runner.kill()  # `_hear` sees it die

    def _tell(self, runner: Runner, finished: Sequence[Finished]) -> None:
        lane = runner.lane
        if lane is not None and finished:
            lane.ended(finished)
            self._release(runner)

    async def _bury(self, runner: Runner, why: str) -> None:
        """What it had not begun goes to another."""
        with trio.move_on_after(CANCEL_S):
            await runner.child.wait()
        why = why if runner.child.is_running else runner.child.describe_end()
        await runner.end()
        self._all.discard(runner)
        if runner in self._idle:
            self._idle.remove(runner)
        lane = runner.lane
        if lane is not None:
            finished, left = runner.die(why)
            runner.leave()
            lane.waiting.extendleft(reversed(left))
            log.warning("wasm.runner_lost", pid=runner.child.pid, why=why, run_elsewhere=len(left))
            if finished:
                lane.ended(finished)
            self._proceed(lane)
            self._forget_if_over(lane)
        runner.close()
        await trio.to_thread.run_sync(remove, runner.scratch)
        self._alive -= 1
        if self._queue:
            lane = self._queue.pop(0)
            lane.is_hiring = False
            self._proceed(lane)

    async def _see_it_end(self, runner: Runner, number: int) -> None:
        await trio.sleep(CANCEL_S)
        if number in runner.given:
            runner.kill()

    def _end_idle(self, before_s: float) -> None:
        for runner in self._idle:
            if runner.idle_since_s <= before_s:
                runner.kill()  # idle: there is nothing to lose

    def _end_silent(self, before_s: float) -> None:
        for runner in self._all:
            lane = runner.lane
            if lane is not None and lane.plan.run_s is not None and runner.heard_s + lane.plan.run_s <= before_s:
                log.warning("wasm.runner_silent", pid=runner.child.pid)
                runner.kill()

    def _sweep(self) -> None:
        remove(self._directory / "scratch")

    async def _try_empty_command(self) -> Outcome:
        """In a pool of its own when this one does not serve."""
        with tempfile.TemporaryDirectory(dir=self._directory) as name:
            scratch = Path(name)
            (scratch / "module").write_bytes(_EMPTY_COMMAND)
            execution = Execution(
                key=AttemptKey(job=JobId("probe"), task=0, attempt=1, fence=0),
                args=(),
                env=(),
                workdir=scratch,
                stdout=scratch / "stdout",
                stderr=scratch / "stderr",
                module=scratch / "module",
            )
            runner = await Runner.start(self._cache, WASMTIME_VERSION, scratch / "work", self._lock)
            try:
                runner.work_for(lane_for(execution, _ignore))
                runner.give([Planned(execution.key, "")])
                await runner.flush()
                (finished,) = await runner.hear()
                return finished.outcome
            finally:
                await runner.end()
                runner.close()


def refuse(source: Execution | Plan) -> str | None:
    """Why this can never run, or None."""
    if source.module is None:
        return "a wasm job needs a module"
    return refuse_strings(source)


def _runs(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Split where a number does not follow the one before."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    if run:
        yield run


async def _tell(ended: Callable[[Sequence[Finished]], None], finished: Sequence[Finished]) -> None:
    ended(finished)


def _ignore(finished: Sequence[Finished]) -> None: ...
