"""What is particular to wasm: guests that break out, trap, or want what is not offered; runners that die; compiled code."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from meshd.backends import wasm
from meshd.backends.wasm_modules import Linked, Modules, Refused
from meshd.model import EndReason, Resources
from meshd.ports import Leash, Limits
from meshd.testing.backend_suite import BackendSuite, Program, boottime, poll, processes_of
from tests.guests import guest


class _Wasm(BackendSuite):
    factory = "meshd.backends.wasm:WasmBackend"

    def program(self, *words: str) -> Program:
        return Program(words, guest())


suite = _Wasm()
serving, program = suite.serving, suite.program


def runners(directory: Path) -> list[int]:
    return processes_of(directory / "backend")


# --- confinement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "in/../../secret", "link", "absolute", "../stdout", "/proc/self/environ"]
)
async def test_a_guest_reads_nothing_outside_its_working_directory(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(program("copy", path, "got"), inputs={"in/a": b""})
        (attempt.workdir.parent / "secret").write_bytes(b"secret")
        (attempt.workdir / "link").symlink_to("../secret")
        (attempt.workdir / "absolute").symlink_to("/etc/passwd")
        outcome = await bench.run(attempt)
        assert outcome.exit_code == 1
        assert not (attempt.workdir / "got").exists()


async def test_a_guest_writes_nothing_outside_not_even_through_a_link_of_its_own(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        for words in (("copy", "a", "../out"), ("copy", "a", "/tmp/meshd-escape"), ("symlink", "/tmp", "way")):
            attempt = bench.attempt(program(*words), inputs={"a": b"data"})
            assert (await bench.run(attempt)).exit_code == 1
            assert sorted(os.listdir(attempt.workdir.parent)) == ["stderr", "stdout", "work"]
        assert not Path("/tmp/meshd-escape").exists()


async def test_a_guest_sees_its_files_and_its_own_variables_only(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        listing = bench.attempt(program("ls", "."), inputs={"a": b""})
        environment = bench.attempt(program("environ"), env=(("A", "1"), ("B", "")))
        await bench.run(listing)
        await bench.run(environment)
        assert sorted(listing.stdout.read_text().split()) == [".", "..", "a"]
        assert environment.stdout.read_text() == "A=1\nB=\n"


# --- ends ------------------------------------------------------------------------------------------------------------


async def test_a_negative_exit_code_is_kept(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        outcome = await bench.run(bench.attempt(program("exit", "-1")))
        assert (outcome.reason, outcome.exit_code) == (EndReason.EXIT, -1)


@pytest.mark.parametrize(("verb", "code"), [("trap", "unreachable"), ("recurse", "stack_overflow")])
async def test_a_trap_is_named(tmp_path: Path, verb: str, code: str) -> None:
    async with serving(tmp_path) as bench:
        outcome = await bench.run(bench.attempt(program(verb)))
        assert outcome.reason is EndReason.TRAP
        assert outcome.exit_code is None
        assert f"trap {code}" in outcome.message


async def test_fuel_ends_a_guest_and_enough_of_it_does_not(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        outcome = await bench.run(bench.attempt(program("spin"), limits=Limits(fuel=10_000_000)))
        assert outcome.reason is EndReason.FUEL_LIMIT
        assert "10000000" in outcome.message
        assert (await bench.run(bench.attempt(program("exit", "0"), limits=Limits(fuel=10_000_000)))).is_success


async def test_a_flood_on_stderr_is_a_flood_too(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(program("flood", "stderr"), limits=Limits(output_bytes_max=1000))
        outcome = await bench.run(attempt)
        assert (outcome.reason, attempt.stderr.stat().st_size) == (EndReason.OUTPUT_LIMIT, 1000)
        assert "stderr" in outcome.message


async def test_the_output_limit_does_not_bound_the_jobs_own_files(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(program("write", "big", "3000000"), limits=Limits(output_bytes_max=1000))
        assert (await bench.run(attempt)).is_success
        assert (attempt.workdir / "big").stat().st_size == 3_000_000


async def test_a_file_cannot_outgrow_the_disk_that_the_job_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(program("write", "big", "3000000"), limits=Limits(output_bytes_max=1000))
        assert (await bench.run(replace(attempt, needs=Resources(disk=1_000_000)))).exit_code == 1
        assert (attempt.workdir / "big").stat().st_size == 1_000_000
        # The next guest of this runner is not bound by it.
        attempt = bench.attempt(program("write", "big", "3000000"))
        assert (await bench.run(attempt)).is_success
        assert len(runners(tmp_path)) == 1


async def test_a_module_that_begins_above_its_memory_limit_is_at_its_limit(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        outcome = await bench.run(bench.attempt(program("exit", "0"), limits=Limits(memory=1 << 16)))
        assert outcome.reason is EndReason.MEMORY_LIMIT


async def test_a_failure_far_from_the_memory_limit_is_the_programs(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        outcome = await bench.run(bench.attempt(program("exit", "3"), limits=Limits(memory=64 << 20)))
        assert (outcome.reason, outcome.exit_code) == (EndReason.EXIT, 3)


# --- what can never run ----------------------------------------------------------------------------------------------

HEADER = b"\0asm\x01\0\0\0"


@pytest.mark.parametrize(
    ("binary", "words"),
    [
        (b"", "not a WebAssembly module"),
        (b"#!/bin/sh\n", "not a WebAssembly module"),
        (HEADER + b"\xff garbage", "not a valid WebAssembly module"),
        (b"\0asm\x0d\0\x01\0", "component"),
        (HEADER, "no function _start"),
    ],
)
async def test_what_is_no_command_is_refused_with_the_reason(tmp_path: Path, binary: bytes, words: str) -> None:
    module = tmp_path / "module"
    module.write_bytes(binary)
    async with serving(tmp_path) as bench:
        outcome = await bench.run(bench.attempt(Program((), module)))
        assert outcome.reason is EndReason.INVALID
        assert words in outcome.message


async def test_a_missing_import_is_named(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        outcome = await bench.run(bench.attempt(Program((), guest("foreign_import"))))
        assert outcome.reason is EndReason.INVALID
        assert "env.launch" in outcome.message


async def test_without_a_module_there_is_nothing_to_run(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        assert (await bench.run(bench.attempt(Program(("ls",))))).reason is EndReason.INVALID


async def test_more_arguments_than_a_message_holds_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        outcome = await bench.run(bench.attempt(program("args", "x" * (5 << 20))))
        assert outcome.reason is EndReason.INVALID
        assert "limit" in outcome.message


# --- runners ---------------------------------------------------------------------------------------------------------


async def test_attempts_one_after_the_other_share_a_runner(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        for code in range(5):
            await bench.run(bench.attempt(program("exit", str(code))))
        assert len(runners(tmp_path)) == 1


async def test_a_runner_that_dies_costs_its_attempt_only(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench, trio.open_nursery() as nursery:

        async def kill_when_busy() -> None:
            await wait_busy(tmp_path)
            os.kill(runners(tmp_path)[0], signal.SIGKILL)

        nursery.start_soon(kill_when_busy)
        outcome = await bench.run(bench.attempt(program("spin")))
        assert outcome.reason is EndReason.BACKEND
        assert "SIGKILL" in outcome.message
        assert (await bench.run(bench.attempt(program("exit", "0")))).is_success


async def test_what_waited_behind_an_attempt_that_took_its_runner_down_runs_elsewhere(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        batch = bench.start(program("sleep", "{item}"), ["0", "0", "60", *["0"] * 20])
        await batch.wait(2)
        await trio.sleep(0.2)
        os.kill(runners(tmp_path)[0], signal.SIGKILL)
        await batch.wait(23)
        assert [task for task, end in batch.ends.items() if not end.outcome.is_success] == [2]
        assert batch.outcome(2).reason is EndReason.BACKEND
        assert "SIGKILL" in batch.outcome(2).message


async def test_what_was_given_back_or_stopped_in_a_runner_is_not_run_by_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        batch = bench.start(program("sleep", "{item}"), ["1", "0", "0", "0"])
        assert isinstance(bench.backend, wasm.WasmBackend)
        await wait_started(bench.backend)
        assert sorted(await bench.backend.recall([2, 3])) == [2, 3]
        bench.backend.stop(4)
        await batch.wait(2)
        before = runners(tmp_path)
        await bench.start(program("exit", "0"), [""]).wait(1)
        # An answer about a task that it does not have would have cost the runner.
        assert runners(tmp_path) == before
        assert sorted(batch.ends) == [0, 3]


async def test_what_waited_behind_a_guest_that_cannot_be_interrupted_runs_elsewhere(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        batch = bench.start(program("sleep", "{item}"), ["60", "0", "0"], limits=Limits(run_s=0.3))
        await batch.wait(3)
        assert [batch.outcome(task).reason for task in range(3)] == [EndReason.TIMEOUT, EndReason.EXIT, EndReason.EXIT]


async def test_a_guest_of_a_batch_finds_nothing_of_the_one_before(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        batch = bench.start(program("write", "{item}", "10"), ["a", "b"])
        await batch.wait(2)
        listing = bench.start(program("ls", "."), ["x"])
        await listing.wait(1)
        assert sorted(listing.stdout(0).split()) == [b".", b".."]
        assert len(runners(tmp_path)) == 1


@pytest.mark.parametrize(("words", "item"), [((), "x" * (5 << 20)), (("x" * (5 << 20),), "")], ids=["item", "plan"])
async def test_what_no_message_can_hold_costs_no_runner(tmp_path: Path, words: tuple[str, ...], item: str) -> None:
    async with serving(tmp_path) as bench:
        backend = bench.backend
        assert isinstance(backend, wasm.WasmBackend)
        for _ in range(3):
            batch = bench.start(program("exit", "0", *words), [item, item], lanes=2)
            await batch.wait(2)
            assert {batch.outcome(task).reason for task in range(2)} == {EndReason.INVALID}
            assert batch.plan.leash.watchers == set()
        assert (backend._lanes, len(backend._idle)) == ({}, backend._alive)
        assert backend._alive <= 2


async def test_a_runner_that_died_idle_is_not_used(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        await bench.run(bench.attempt(program("exit", "0")))
        os.kill(runners(tmp_path)[0], signal.SIGKILL)
        outcome = await bench.run(bench.attempt(program("exit", "0")))
        # It may be chosen before the kernel has told of its death; then it counts as a failure of the backend.
        assert outcome.is_success or outcome.reason is EndReason.BACKEND
        assert (await bench.run(bench.attempt(program("exit", "0")))).is_success


async def test_a_runner_that_does_not_answer_a_cancel_is_killed_within_a_second(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bench.run, bench.attempt(program("spin")))
                await wait_busy(tmp_path)
                os.kill(runners(tmp_path)[0], signal.SIGSTOP)
                start = time.monotonic()
                scope.cancel()
        assert time.monotonic() - start < 1.2
        assert runners(tmp_path) == []


async def test_a_cancelled_computing_guest_leaves_its_runner_for_the_next(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bench.run, bench.attempt(program("spin")))
                await wait_busy(tmp_path)
                before = runners(tmp_path)
                scope.cancel()
        assert (await bench.run(bench.attempt(program("exit", "0")))).is_success
        assert runners(tmp_path) == before


async def test_a_leash_put_on_a_running_guest_holds(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench, trio.open_nursery() as nursery:
        leash = Leash()

        async def cut_off() -> None:
            await wait_busy(tmp_path)
            leash.move(boottime() + 0.1)

        nursery.start_soon(cut_off)
        assert (await bench.run(bench.attempt(program("spin"), leash=leash))).reason is EndReason.LOST


def test_a_stopped_agent_does_not_keep_a_sleeping_guest_past_its_leash(tmp_path: Path) -> None:
    with suite.owner(tmp_path, ("sleep", "60"), leash_s=1.0) as owner:
        owner.send_signal(signal.SIGSTOP)
        (runner,) = processes_of(tmp_path / "backend", but=owner.pid)
        # A zombie until the agent, which cannot, reaps it.
        poll(lambda: _is_dead(runner), "the guest slept on")


async def test_idle_runners_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasm, "IDLE_S", 0.2)
    async with serving(tmp_path) as bench:
        await bench.run(bench.attempt(program("exit", "0")))
        assert len(runners(tmp_path)) == 1
        with trio.fail_after(10):
            while runners(tmp_path):
                await trio.sleep(0.02)
        assert (await bench.run(bench.attempt(program("exit", "0")))).is_success


async def wait_busy(directory: Path) -> None:
    """Until a runner computes."""
    with trio.fail_after(10):
        while True:
            found = runners(directory)
            if found and _cpu_ticks(found[0]) > 30:  # starting takes some 15 ticks of 10 ms
                return
            await trio.sleep(0.02)


async def wait_started(backend: wasm.WasmBackend) -> None:
    """Until an attempt has begun: its output can be read."""
    with trio.fail_after(10):
        while await backend.read_output(1, "stdout", 0, 1) is None:
            await trio.sleep(0.01)


def _is_dead(pid: int) -> bool:
    return b") Z" in Path(f"/proc/{pid}/stat").read_bytes()


def _cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


# --- compiled code ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    directory = tmp_path / "compiled"
    directory.mkdir(mode=0o700)
    return directory


def load(cache: Path, *, name: str = "hash", version: str = "1", with_fuel: bool = False) -> Linked:
    return Modules(cache, wasmtime_version=version).get(str(guest()), name, with_fuel=with_fuel)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.bin"))


def test_a_module_is_compiled_once(cache: Path) -> None:
    load(cache)
    (entry,) = entries(cache)
    inode = entry.stat().st_ino
    load(cache)
    assert [file.stat().st_ino for file in entries(cache)] == [inode]
    assert entry.stat().st_mode & 0o077 == 0 or cache.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other format"])
def test_a_damaged_entry_is_a_miss_and_is_replaced(cache: Path, damage: str) -> None:
    load(cache)
    (entry,) = entries(cache)
    good = entry.read_bytes()
    bad = {
        "flip": good[:5000] + bytes([good[5000] ^ 1]) + good[5001:],
        "cut": good[:5000],
        "empty": b"",
        "other format": b"older" + good,
    }[damage]
    entry.write_bytes(bad)
    load(cache)
    assert entry.read_bytes() == good


def test_another_wasmtime_other_settings_or_another_module_do_not_share_an_entry(cache: Path) -> None:
    load(cache)
    load(cache, version="2")
    load(cache, with_fuel=True)
    load(cache, name="other")
    assert len(entries(cache)) == 4


def test_a_directory_that_others_can_write_to_is_not_used(cache: Path) -> None:
    cache.chmod(0o777)
    load(cache)
    assert list(cache.iterdir()) == []


def test_a_module_of_unknown_hash_is_not_kept(cache: Path) -> None:
    load(cache, name="")
    assert entries(cache) == []


def test_the_cache_drops_what_was_unused_for_longest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(cache, name="one")
    (one,) = entries(cache)
    os.utime(one, (1, 1))
    monkeypatch.setattr("meshd.backends.wasm_modules.CACHE_BYTES_MAX", one.stat().st_size + 1000)
    load(cache, name="two")
    assert len(entries(cache)) == 1
    assert not one.exists()


def test_a_module_over_the_size_limit_is_not_even_read(tmp_path: Path, cache: Path) -> None:
    huge = tmp_path / "huge"
    with open(huge, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Refused, match="limit"):
        Modules(cache, wasmtime_version="1").get(str(huge), "huge", with_fuel=False)


async def test_the_agent_itself_never_loads_wasmtime(tmp_path: Path) -> None:
    code = "import sys, meshd.backends.wasm, meshd.backends.process; print('wasmtime' in sys.modules)"
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
    assert done.stdout == b"False\n"
