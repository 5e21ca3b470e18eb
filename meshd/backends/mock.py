"""A backend without programs: attempts are scripts of a few verbs, run on trio's clock. For tests and drills.

    exit N · say OUT ERR · args … · env NAME · cat · copy FROM TO      what a small program would do
    sleep S · spin                                                     takes time, or for ever
    flood · grow                                                       until a limit stops it; without one, spins
    die N                                                              ends by signal N
    fail TEXT                                                          the backend fails, not the job

Time is virtual under trio's test clocks, so a drill of hours takes no time. Deadlines, leash
and cancel behave as with the real ones. Not among the installed entry points.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import trio

from meshd.backends.limits import refuse_strings
from meshd.model import BackendProbe, EndReason, Outcome
from meshd.ports import BackendSettings, Execution

LEASH_CHECK_S = 0.05
"""The leash is on CLOCK_BOOTTIME, which a virtual clock does not move: waiting for it must not become a busy loop."""


class MockBackend:
    name = "mock"

    def __init__(self, settings: BackendSettings, *, failing: str = "") -> None:
        """`failing`: why the probe says that nothing works here."""
        self._failing = failing
        self.running = 0

    async def probe(self) -> BackendProbe:
        return BackendProbe(self.name, works=not self._failing, version="1", reason=self._failing)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    async def run(self, execution: Execution) -> Outcome:
        if not execution.args:
            return Outcome(EndReason.INVALID, message="a mock job needs a verb")
        if (refusal := refuse_strings(execution)) is not None:
            return Outcome(EndReason.INVALID, message=refusal)
        self.running += 1
        start = trio.current_time()
        try:
            outcome = await self._run(execution)
        finally:
            self.running -= 1
        return Outcome(
            outcome.reason, outcome.exit_code, outcome.message, run_ms=int((trio.current_time() - start) * 1000)
        )

    async def _run(self, execution: Execution) -> Outcome:
        ends: list[Outcome] = []
        async with trio.open_nursery() as nursery:

            async def first(outcome: Outcome) -> None:
                ends.append(outcome)
                nursery.cancel_scope.cancel()

            async def keep_leash() -> None:
                leash = execution.leash
                while (left_s := _left_s(leash.deadline_s)) > 0:
                    with trio.move_on_after(max(left_s, LEASH_CHECK_S)):
                        await leash.wait_moved()
                await first(Outcome(EndReason.LOST, message="stopped by its own node"))

            async def keep_time(run_s: float) -> None:
                await trio.sleep(run_s)
                await first(Outcome(EndReason.TIMEOUT, message=f"still running after {run_s:g} s, its limit"))

            async def perform() -> None:
                try:
                    outcome = await _perform(execution)
                except (OSError, ValueError) as error:  # what its script asks for cannot be done: that is its failure
                    _write(execution.stderr, f"{error}\n".encode())
                    outcome = Outcome(EndReason.EXIT, 1)
                await first(outcome)

            nursery.start_soon(keep_leash)
            if execution.limits.run_s is not None:
                nursery.start_soon(keep_time, execution.limits.run_s)
            nursery.start_soon(perform)
        return ends[0]


async def _perform(execution: Execution) -> Outcome:
    limits = execution.limits
    match execution.args:
        case ("exit", code):
            return Outcome(EndReason.EXIT, int(code))
        case ("say", out, err):
            _write(execution.stdout, out.encode())
            _write(execution.stderr, err.encode())
        case ("args", *words):
            _write(execution.stdout, "".join(f"{word}\n" for word in words).encode())
        case ("env", name):
            _write(execution.stdout, dict(execution.env).get(name, "(unset)").encode())
        case ("cat",):
            _write(execution.stdout, execution.stdin.read_bytes() if execution.stdin is not None else b"")
        case ("copy", source, target):
            (execution.workdir / target).write_bytes((execution.workdir / source).read_bytes())
        case ("sleep", seconds):
            await trio.sleep(float(seconds))
        case ("flood",):
            _write(execution.stdout, b"a" * limits.output_bytes_max)
            return Outcome(
                EndReason.OUTPUT_LIMIT, message=f"stdout grew past its limit of {limits.output_bytes_max} bytes"
            )
        case ("grow",) if limits.memory is not None:
            return Outcome(EndReason.MEMORY_LIMIT, message=f"it used all of its {limits.memory} bytes")
        case ("spin",) | ("grow",):
            await trio.sleep(math.inf)
        case ("die", number):
            return Outcome(EndReason.SIGNAL, 128 + int(number), f"killed by signal {number}")
        case ("fail", text):
            return Outcome(EndReason.BACKEND, message=text)
        case _:
            return Outcome(EndReason.INVALID, message=f"command not found: {execution.args[0]!r}")
    return Outcome(EndReason.EXIT, 0)


def _write(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def _left_s(deadline_s: float | None) -> float:
    return math.inf if deadline_s is None else deadline_s - time.clock_gettime(time.CLOCK_BOOTTIME)
