"""What every backend must do. Plug-in authors run it too:

    class TestMine(BackendSuite):
        factory = "my_package.backend:MyBackend"
        def program(self, *words: str) -> Program:
            return Program(args=("my-guest", *words))

`program` turns words into something the backend runs, for these verbs:

    exit N         ends with exit code N
    say OUT ERR    writes OUT to stdout and ERR to stderr
    args WORDS     writes each word on a line
    env NAME       writes the variable's value, or (unset)
    cat            copies stdin to stdout
    copy FROM TO   copies a file in the working directory; ends with 1 when it cannot
    sleep S        waits in the kernel, or wherever a guest waits
    spin           computes for ever
    flood          writes to stdout for ever
    grow           takes and touches memory for ever; ends with a code other than 0 when refused

Needs pytest and pytest-trio with `trio_mode`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import trio

from meshd.model import AttemptKey, EndReason, Inline, JobId, Outcome
from meshd.ports import Backend, BackendSettings, BatchBackend, Execution, Finished, Leash, Limits, Plan, Planned

JOB = JobId("00000000-0000-7000-8000-000000000000")

DEADLINE_S = 20.0
"""For what should take a second: the machine may be busy."""


@dataclass(frozen=True, slots=True)
class Program:
    args: tuple[str, ...]
    module: Path | None = None

    @property
    def module_hash(self) -> str:
        return self.module.name if self.module is not None else ""


class Bench:
    """A served backend, and attempts for it in a directory of its own."""

    def __init__(self, backend: Backend, directory: Path) -> None:
        self.backend = backend
        self._directory = directory
        self._attempts = 0

    def attempt(
        self,
        program: Program,
        *,
        limits: Limits | None = None,
        env: tuple[tuple[str, str], ...] = (),
        stdin: bytes | None = None,
        inputs: dict[str, bytes] | None = None,
        leash: Leash | None = None,
    ) -> Execution:
        self._attempts += 1
        return prepare(
            self._directory / f"attempt-{self._attempts}",
            program,
            limits=limits,
            env=env,
            stdin=stdin,
            inputs=inputs or {},
            leash=leash or Leash(),
        )

    async def run(self, execution: Execution) -> Outcome:
        with trio.fail_after(DEADLINE_S):
            return await self.backend.run(execution)

    def start(
        self,
        program: Program,
        items: Sequence[str],
        *,
        lanes: int = 1,
        limits: Limits | None = None,
        leash: Leash | None = None,
    ) -> Batch:
        """Tasks 0, 1, … with fences from 1, dealt out to the lanes. Skips the test where there are no batches."""
        if not isinstance(self.backend, BatchBackend):
            pytest.skip("takes no batches")
        spill = self._directory / "spill"
        spill.mkdir(exist_ok=True)
        plan = Plan(
            job=JOB,
            args=program.args,
            env=(("NAME", "value"),),
            spill=spill,
            module=program.module,
            module_hash=program.module_hash,
            limits=limits or Limits(),
            leash=leash or Leash(),
        )
        batch = Batch(plan)
        planned = [Planned(AttemptKey(JOB, task, 1, task + 1), item) for task, item in enumerate(items)]
        for lane in range(lanes):
            self.backend.start(plan, lane, planned[lane::lanes], batch.told)
        return batch

    def add(self, batch: Batch, first: int, items: Sequence[str]) -> None:
        """More tasks, from the number `first`, to the only lane of a batch."""
        assert isinstance(self.backend, BatchBackend)
        planned = [Planned(AttemptKey(JOB, task, 1, task + 1), item) for task, item in enumerate(items, start=first)]
        self.backend.start(batch.plan, 0, planned, batch.told)


class Batch:
    """Attempts that were started together, and how they ended, by task."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ends: dict[int, Finished] = {}
        self._told = trio.Event()

    def told(self, finished: Sequence[Finished]) -> None:
        for each in finished:
            assert each.key.task not in self.ends, "an attempt ended twice"
            self.ends[each.key.task] = each
        self._told.set()

    async def wait(self, number: int, *, within_s: float = DEADLINE_S) -> None:
        """Until so many have ended."""
        with trio.fail_after(within_s):
            while len(self.ends) < number:
                self._told = trio.Event()
                await self._told.wait()

    def outcome(self, task: int) -> Outcome:
        return self.ends[task].outcome

    def stdout(self, task: int) -> bytes:
        content = self.outcome(task).stdout
        return content.data if isinstance(content, Inline) else b""


class BackendSuite:
    factory: ClassVar[str]
    """`module:attribute`; called with BackendSettings."""

    def program(self, *words: str) -> Program:
        raise NotImplementedError

    def missing(self) -> Program:
        """Something that cannot be found, or is nothing that could run."""
        raise NotImplementedError

    @asynccontextmanager
    async def serving(self, directory: Path) -> AsyncIterator[Bench]:
        backend = build(self.factory, directory / "backend")
        async with trio.open_nursery() as nursery:
            await nursery.start(backend.serve)
            yield Bench(backend, directory)
            nursery.cancel_scope.cancel()

    # --- what it says of itself --------------------------------------------------------------------------------------

    async def test_the_probe_says_that_it_works_and_leaves_nothing_running(self, tmp_path: Path) -> None:
        probe = await build(self.factory, tmp_path / "backend").probe()
        assert probe.works, probe.reason
        assert probe.version
        assert probe.reason == ""
        await nothing_left(tmp_path)

    async def test_an_idle_backend_runs_nothing(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path):
            assert processes_of(tmp_path) == []

    # --- what a program is given, and what it gives ------------------------------------------------------------------

    @pytest.mark.parametrize("code", [0, 1, 7, 125, 126, 200, 255])
    async def test_the_exit_code_is_the_programs(self, tmp_path: Path, code: int) -> None:
        async with self.serving(tmp_path) as bench:
            outcome = await bench.run(bench.attempt(self.program("exit", str(code))))
            assert (outcome.reason, outcome.exit_code) == (EndReason.EXIT, code)
            assert outcome.is_success == (code == 0)

    async def test_stdout_and_stderr_are_kept_apart(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            attempt = bench.attempt(self.program("say", "to out", "to err"))
            assert (await bench.run(attempt)).is_success
            assert attempt.stdout.read_bytes() == b"to out"
            assert attempt.stderr.read_bytes() == b"to err"

    async def test_arguments_arrive_as_they_are(self, tmp_path: Path) -> None:
        words = ("two words", "", "$HOME `id` ; *", "ünï", "--flag", "'\"\\")
        async with self.serving(tmp_path) as bench:
            attempt = bench.attempt(self.program("args", *words))
            assert (await bench.run(attempt)).is_success
            assert attempt.stdout.read_text() == "".join(f"{word}\n" for word in words)

    async def test_the_environment_is_what_was_given_and_nothing_of_the_agents(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AGENT_SECRET", "token")
        async with self.serving(tmp_path) as bench:
            given = bench.attempt(self.program("env", "NAME"), env=(("NAME", "välue = 1"),))
            secret = bench.attempt(self.program("env", "AGENT_SECRET"))
            assert (await bench.run(given)).is_success
            assert (await bench.run(secret)).is_success
            assert given.stdout.read_text() == "välue = 1"
            assert secret.stdout.read_text() == "(unset)"

    async def test_stdin_is_the_file_or_empty(self, tmp_path: Path) -> None:
        data = bytes(range(256)) * 1000
        async with self.serving(tmp_path) as bench:
            given = bench.attempt(self.program("cat"), stdin=data)
            none = bench.attempt(self.program("cat"))
            assert (await bench.run(given)).is_success
            assert (await bench.run(none)).is_success
            assert given.stdout.read_bytes() == data
            assert none.stdout.read_bytes() == b""

    async def test_files_go_in_and_out_through_the_working_directory(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            attempt = bench.attempt(self.program("copy", "in/a.txt", "b.txt"), inputs={"in/a.txt": b"content"})
            assert (await bench.run(attempt)).is_success
            assert (attempt.workdir / "b.txt").read_bytes() == b"content"

    async def test_a_missing_file_is_the_programs_failure(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            attempt = bench.attempt(self.program("copy", "nowhere", "b.txt"))
            outcome = await bench.run(attempt)
            assert (outcome.reason, outcome.exit_code) == (EndReason.EXIT, 1)
            assert attempt.stderr.read_bytes() != b""

    async def test_what_can_never_run_is_invalid_and_says_why(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            outcome = await bench.run(bench.attempt(self.missing()))
            assert outcome.reason is EndReason.INVALID
            assert outcome.message

    async def test_a_nul_is_refused_instead_of_cut_off(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            outcome = await bench.run(bench.attempt(self.program("args", "a\0b")))
            assert outcome.reason is EndReason.INVALID
            assert "NUL" in outcome.message

    # --- limits ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("words", [("spin",), ("sleep", "60")], ids=["computing", "sleeping"])
    async def test_the_run_limit_ends_it(self, tmp_path: Path, words: tuple[str, ...]) -> None:
        async with self.serving(tmp_path) as bench:
            start = time.monotonic()
            outcome = await bench.run(bench.attempt(self.program(*words), limits=Limits(run_s=0.5)))
            assert outcome.reason is EndReason.TIMEOUT
            assert "0.5 s" in outcome.message
            assert outcome.run_ms >= 450
            assert time.monotonic() - start < 5
            # And the backend is as good as before.
            assert (await bench.run(bench.attempt(self.program("exit", "0")))).is_success

    async def test_a_flood_stops_at_the_output_limit(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            attempt = bench.attempt(self.program("flood"), limits=Limits(output_bytes_max=1 << 20))
            outcome = await bench.run(attempt)
            assert outcome.reason is EndReason.OUTPUT_LIMIT
            assert "stdout" in outcome.message
            assert attempt.stdout.stat().st_size == 1 << 20

    async def test_output_at_the_limit_is_no_flood(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            attempt = bench.attempt(self.program("say", "1234", "5678"), limits=Limits(output_bytes_max=4))
            assert (await bench.run(attempt)).is_success

    async def test_endless_memory_ends_at_the_memory_limit(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            outcome = await bench.run(bench.attempt(self.program("grow"), limits=Limits(memory=96 << 20)))
            assert outcome.reason is EndReason.MEMORY_LIMIT, outcome

    # --- being stopped -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("words", [("spin",), ("sleep", "60")], ids=["computing", "sleeping"])
    async def test_cancelling_leaves_nothing_of_it(self, tmp_path: Path, words: tuple[str, ...]) -> None:
        async with self.serving(tmp_path) as bench:
            attempt = bench.attempt(self.program(*words))
            with trio.fail_after(DEADLINE_S), trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(bench.backend.run, attempt)
                    await trio.sleep(0.3)
                    cancelled_at = time.monotonic()
                    scope.cancel()
            assert time.monotonic() - cancelled_at < 1.5
            assert processes_of(attempt.workdir) == []
            assert (await bench.run(bench.attempt(self.program("exit", "0")))).is_success

    @pytest.mark.parametrize("words", [("spin",), ("sleep", "60")], ids=["computing", "sleeping"])
    async def test_an_expired_leash_ends_it_as_lost(self, tmp_path: Path, words: tuple[str, ...]) -> None:
        async with self.serving(tmp_path) as bench:
            leash = Leash(boottime() + 0.5)
            outcome = await bench.run(bench.attempt(self.program(*words), leash=leash))
            assert outcome.reason is EndReason.LOST

    async def test_a_leash_that_moves_on_ends_nothing(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            leash = Leash(boottime() + 0.5)
            attempt = bench.attempt(self.program("sleep", "1"), leash=leash)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_move_until, leash, boottime() + 1.0)
                outcome = await bench.run(attempt)
                nursery.cancel_scope.cancel()
            assert outcome.is_success, outcome

    async def test_when_the_backend_stops_its_attempts_stop(self, tmp_path: Path) -> None:
        async with trio.open_nursery() as nursery:
            async with self.serving(tmp_path) as bench:
                nursery.start_soon(bench.run, bench.attempt(self.program("sleep", "60")))
                await trio.sleep(0.3)
            nursery.cancel_scope.cancel()
        await nothing_left(tmp_path)

    @pytest.mark.parametrize("words", [("spin",), ("sleep", "60")], ids=["computing", "sleeping"])
    def test_when_the_agent_is_killed_its_attempts_die(self, tmp_path: Path, words: tuple[str, ...]) -> None:
        with self.owner(tmp_path, words) as owner:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
            poll(lambda: processes_of(tmp_path) == [], "an attempt outlived its agent")

    def test_a_stopped_agent_keeps_nothing_alive_past_the_leash(self, tmp_path: Path) -> None:
        with self.owner(tmp_path, ("spin",), leash_s=1.0) as owner:
            workdir = tmp_path / "attempt"
            owner.send_signal(signal.SIGSTOP)
            is_outside = bool(processes_of(workdir, but=owner.pid))
            # A guest inside a runner has no process of its own: then the runner must be idle.
            poll(lambda: processes_of(workdir, but=owner.pid) == [], "a stopped agent kept its attempt alive")
            poll(lambda: is_outside or is_idle(tmp_path, but=owner.pid), "a stopped agent kept its guest computing")
            owner.send_signal(signal.SIGKILL)

    # --- many --------------------------------------------------------------------------------------------------------

    async def test_fifty_at_once_all_end_as_they_should(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            attempts = [bench.attempt(self.program("say", f"out {k}", f"err {k}")) for k in range(50)]
            outcomes: list[Outcome] = []

            async def run(attempt: Execution) -> None:
                outcomes.append(await bench.backend.run(attempt))

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for attempt in attempts:
                        nursery.start_soon(run, attempt)
            assert [outcome for outcome in outcomes if not outcome.is_success] == []
            assert [attempt.stdout.read_text() for attempt in attempts] == [f"out {k}" for k in range(50)]

    async def test_attempts_leak_no_descriptors_processes_or_files(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            for _ in range(3):
                await bench.run(bench.attempt(self.program("exit", "0")))
            before = open_descriptors(), len(processes_of(tmp_path))
            for _ in range(20):
                attempt = bench.attempt(self.program("exit", "0"))
                await bench.run(attempt)
                assert list(attempt.workdir.iterdir()) == []
                assert attempt.leash.watchers == set()
            assert (open_descriptors(), len(processes_of(tmp_path))) == before
        await nothing_left(tmp_path)

    # --- in batches --------------------------------------------------------------------------------------------------

    async def test_each_attempt_of_a_batch_ends_once_with_what_is_its_own(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program("args", "{item}", "as {item}"), [f"i{k}" for k in range(60)], lanes=3)
            await batch.wait(60)
            assert [batch.stdout(task) for task in range(60)] == [b"i%d\nas i%d\n" % (k, k) for k in range(60)]
            assert {end.outcome.reason for end in batch.ends.values()} == {EndReason.EXIT}
            assert os.listdir(batch.plan.spill) == []
            assert batch.plan.leash.watchers == set()

    @pytest.mark.parametrize(
        ("name", "value"),
        [("NAME", "value"), ("MESHD_TASK", "2"), ("MESHD_ATTEMPT", "1"), ("MESHD_FENCE", "3"), ("MESHD_ITEM", "ünï c")],
    )
    async def test_an_attempt_of_a_batch_knows_who_it_is(self, tmp_path: Path, name: str, value: str) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program("env", name), ["a", "b", "ünï c"])
            await batch.wait(3)
            assert batch.stdout(2).decode() == value

    async def test_a_batch_has_every_exit_code_and_refusal(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            codes = bench.start(self.program("exit", "{item}"), ["0", "7", "255", "0"])
            await codes.wait(4)
            assert [codes.outcome(task).exit_code for task in range(4)] == [0, 7, 255, 0]
            missing = bench.start(self.missing(), ["a", "b"])
            await missing.wait(2)
            assert {end.outcome.reason for end in missing.ends.values()} == {EndReason.INVALID}

    async def test_output_travels_up_to_its_limit_and_is_a_file_beyond(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            sizes = (1, 1024, 1025, 5000, 3)
            batch = bench.start(self.program("say", "{item}", "e"), ["x" * size for size in sizes])
            await batch.wait(len(sizes))
            for task, size in enumerate(sizes):
                end = batch.ends[task]
                assert end.outcome.is_success and end.outcome.stderr == Inline(b"e") and end.stderr is None
                if size <= 1024:
                    assert end.outcome.stdout == Inline(b"x" * size) and end.stdout is None
                else:
                    assert end.outcome.stdout is None and end.stdout is not None
                    assert end.stdout.read_bytes() == b"x" * size

    async def test_output_over_what_a_task_of_its_job_may_tell_is_a_file(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            limits = Limits(inline_bytes_max=100)
            batch = bench.start(self.program("say", "{item}", "e"), ["x" * 100, "x" * 101], limits=limits)
            await batch.wait(2)
            told, left = batch.ends[0], batch.ends[1]
            assert told.outcome.stdout == Inline(b"x" * 100) and told.stdout is None
            assert left.outcome.stdout is None and left.outcome.stderr == Inline(b"e")
            assert left.stdout is not None and left.stdout.read_bytes() == b"x" * 101

    async def test_a_flood_in_a_batch_stops_at_the_limit_and_the_next_runs(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program("flood"), ["a", "b"], limits=Limits(output_bytes_max=1 << 20))
            await batch.wait(2)
            for end in batch.ends.values():
                assert end.outcome.reason is EndReason.OUTPUT_LIMIT
                assert end.stdout is not None and end.stdout.stat().st_size == 1 << 20

    @pytest.mark.parametrize("words", [("spin",), ("sleep", "60")], ids=["computing", "sleeping"])
    async def test_the_run_limit_of_a_batch_counts_for_each(self, tmp_path: Path, words: tuple[str, ...]) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program(*words), ["a", "b"], limits=Limits(run_s=0.4))
            await batch.wait(2)
            assert [batch.outcome(task).reason for task in (0, 1)] == [EndReason.TIMEOUT] * 2
            assert all(350 <= batch.outcome(task).run_ms < 5000 for task in (0, 1))

    @pytest.mark.parametrize("words", [("spin",), ("sleep", "60")], ids=["computing", "sleeping"])
    async def test_an_expired_leash_ends_a_whole_batch(self, tmp_path: Path, words: tuple[str, ...]) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program(*words), ["a", "b", "c"], leash=Leash(boottime() + 30))
            await trio.sleep(0.3)
            batch.plan.leash.move(boottime())
            await batch.wait(3)
            assert {end.outcome.reason for end in batch.ends.values()} == {EndReason.LOST}

    async def test_nothing_of_a_batch_begins_past_its_leash(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program("exit", "0"), ["a"] * 50, leash=Leash(boottime() - 1))
            await batch.wait(50)
            assert {end.outcome.reason for end in batch.ends.values()} == {EndReason.LOST}

    @pytest.mark.parametrize("words", [("spin",), ("sleep", "60")], ids=["computing", "sleeping"])
    async def test_one_of_a_batch_is_stopped_whether_it_runs_or_waits(
        self, tmp_path: Path, words: tuple[str, ...]
    ) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program(*words), ["a", "b", "c"])
            assert isinstance(bench.backend, BatchBackend)
            await trio.sleep(0.5)
            bench.backend.stop(2)
            await batch.wait(1)
            assert list(batch.ends) == [1], "the first one still runs"
            bench.backend.stop(1)
            await batch.wait(2)
            bench.backend.stop(3)
            await batch.wait(3)
            assert {end.outcome.reason for end in batch.ends.values()} == {EndReason.CANCELLED}

    async def test_what_has_not_begun_is_given_back_and_never_runs(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program("sleep", "{item}"), ["0", "2", "0", "0"])
            assert isinstance(bench.backend, BatchBackend)
            await batch.wait(1)
            await trio.sleep(0.2)
            assert sorted(await bench.backend.recall([2, 3, 4])) == [3, 4]
            assert await bench.backend.recall([3, 4, 99]) == []
            await batch.wait(2)
            await trio.sleep(0.2)
            assert sorted(batch.ends) == [0, 1]

    async def test_what_is_added_to_a_lane_comes_after_what_it_has_and_runs_when_it_is_empty(
        self, tmp_path: Path
    ) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program("sleep", "{item}"), ["0.5"])
            bench.add(batch, 1, ["0", "0.1"])
            await trio.sleep(0.2)
            bench.add(batch, 3, ["0"])
            await batch.wait(4)
            assert list(batch.ends) == [0, 1, 2, 3]
            bench.add(batch, 4, ["0"])
            await batch.wait(5)
            assert {end.outcome.reason for end in batch.ends.values()} == {EndReason.EXIT}
            assert batch.plan.leash.watchers == set()

    async def test_a_batch_may_be_larger_than_one_message(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program("exit", "0"), ["x" * 100_000] * 50)
            await batch.wait(50)
            assert {end.outcome.reason for end in batch.ends.values()} == {EndReason.EXIT}
            assert list(batch.ends) == list(range(50))

    async def test_of_a_batch_only_the_item_that_no_message_can_hold_is_refused(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program("exit", "0"), ["a", "b", "x" * (5 << 20), "d"])
            await batch.wait(4)
            # An end that is told twice would come before those of a second batch in the same lane.
            bench.add(batch, 4, ["e"])
            await batch.wait(5)
            assert [batch.outcome(task).reason for task in range(5)] == [
                EndReason.EXIT, EndReason.EXIT, EndReason.INVALID, EndReason.EXIT, EndReason.EXIT
            ]  # fmt: skip
            assert batch.outcome(2).message

    async def test_what_a_running_attempt_of_a_batch_has_written_can_be_read(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            batch = bench.start(self.program("flood"), ["a", "b"], limits=Limits(output_bytes_max=1 << 40, run_s=2))
            assert isinstance(bench.backend, BatchBackend)
            with trio.fail_after(DEADLINE_S):
                while not (  # noqa: ASYNC110 - output is looked at, nobody tells of it
                    data := await bench.backend.read_output(1, "stdout", 10, 100)
                ):
                    await trio.sleep(0.01)
            assert len(data) == 100
            assert await bench.backend.read_output(2, "stdout", 0, 100) is None
            assert await bench.backend.read_output(99, "stdout", 0, 100) is None
            assert batch.ends == {}
            for fence in (2, 1):
                bench.backend.stop(fence)
            await batch.wait(2)

    async def test_when_the_backend_stops_a_batch_stops(self, tmp_path: Path) -> None:
        async with self.serving(tmp_path) as bench:
            bench.start(self.program("sleep", "60"), ["a", "b"])
            await trio.sleep(0.3)
        await nothing_left(tmp_path)

    # --- an agent in another process ---------------------------------------------------------------------------------

    @contextmanager
    def owner(
        self, directory: Path, words: tuple[str, ...], *, leash_s: float | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process that serves the backend and has one attempt running."""
        program = self.program(*words)
        order = {
            "factory": self.factory,
            "directory": str(directory),
            "args": program.args,
            "module": str(program.module) if program.module is not None else None,
            "leash_s": leash_s,
        }
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "meshd.testing.backend_owner", json.dumps(order)], env=environment
        )
        try:
            poll(lambda: (directory / "running").exists(), "the owner did not start")
            yield process
        finally:
            process.kill()
            process.wait()


def build(factory: str, directory: Path) -> Backend:
    module, _, attribute = factory.partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)(BackendSettings(directory, term_grace_s=0.5))
    return backend


def prepare(
    directory: Path,
    program: Program,
    *,
    limits: Limits | None = None,
    env: tuple[tuple[str, str], ...] = (),
    stdin: bytes | None = None,
    inputs: dict[str, bytes] | None = None,
    leash: Leash | None = None,
) -> Execution:
    workdir = directory / "work"
    workdir.mkdir(parents=True)
    for name in ("stdout", "stderr"):
        (directory / name).touch()
    if stdin is not None:
        (directory / "stdin").write_bytes(stdin)
    for path, data in (inputs or {}).items():
        (workdir / path).parent.mkdir(parents=True, exist_ok=True)
        (workdir / path).write_bytes(data)
    return Execution(
        key=AttemptKey(JOB, 0, 1, 1),
        args=program.args,
        env=env,
        workdir=workdir,
        stdout=directory / "stdout",
        stderr=directory / "stderr",
        stdin=directory / "stdin" if stdin is not None else None,
        module=program.module,
        module_hash=program.module_hash,
        limits=limits or Limits(),
        leash=leash or Leash(),
    )


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def processes_of(directory: Path, *, but: int = 0) -> list[int]:
    """Processes that work for this directory: named in their arguments, environment or working directory."""
    mark = os.fsencode(directory)
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (os.getpid(), but) and mark in _describe(name):
            found.append(int(name))
    return found


async def nothing_left(directory: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        while processes_of(directory):  # noqa: ASYNC110 - the kernel does not say when a stranger's child is gone
            await trio.sleep(0.02)


def poll(is_so: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_idle(directory: Path, *, but: int) -> bool:
    """Whether none of its processes gets any processor time for a while."""
    before = _cpu_ticks(directory, but)
    time.sleep(0.2)
    return _cpu_ticks(directory, but) - before <= 1


def _cpu_ticks(directory: Path, but: int) -> int:
    return sum(sum(int(field) for field in _stat(pid)[11:13]) for pid in processes_of(directory, but=but))


def _stat(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return []


def _describe(pid: str) -> bytes:
    try:
        parts = [Path("/proc", pid, name).read_bytes() for name in ("cmdline", "environ")]
        return b"\0".join([*parts, os.fsencode(os.readlink(f"/proc/{pid}/cwd"))])
    except OSError:
        return b""  # it ended meanwhile, is a zombie, or is somebody else's


async def _move_until(leash: Leash, end_s: float) -> None:
    while boottime() < end_s:
        leash.move(boottime() + 0.5)
        await trio.sleep(0.1)
    leash.move(None)
