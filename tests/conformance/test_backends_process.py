"""What is particular to processes: stubborn ones, daemons, commands that cannot start, a spawner that is killed."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from meshd.backends import process, spawners
from meshd.backends.spawned import FILES_OPEN
from meshd.backends.spawner import kill_strays
from meshd.model import AttemptKey, EndReason, Inline, Resources
from meshd.ports import Backend, BatchBackend, Leash, Limits, Planned
from meshd.testing.backend_suite import JOB, BackendSuite, Program, boottime, build, nothing_left, poll
from tests.conformance.test_backends_suite import GUEST


class _Process(BackendSuite):
    factory = "meshd.backends.process:ProcessBackend"

    def program(self, *words: str) -> Program:
        return Program((sys.executable, "-I", "-S", str(GUEST), *words))


suite = _Process()
serving, program = suite.serving, suite.program


def spawners_of(agent: int) -> list[int]:
    """Those that this process started, in whichever of its threads, oldest first."""
    lists = [path.read_text().split() for path in Path(f"/proc/{agent}/task").glob("*/children")]
    return sorted(
        int(pid)
        for pid in (pid for pids in lists for pid in pids)
        if b"meshd.backends.spawner" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def spawner_of(agent: int) -> int:
    (found,) = spawners_of(agent)
    return found


async def wait_ready(stdout: Path) -> None:
    with trio.fail_after(10):
        while stdout.read_bytes() != b"ready\n":
            await trio.sleep(0.01)


def sleepers(seconds: str) -> list[int]:
    """Daemons of guests, also those that cleared their environment: the number of seconds tells which test's."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if Path("/proc", name, "cmdline").read_bytes() == f"sleep\0{seconds}\0".encode():
                    found.append(int(name))
            except OSError:
                continue
    return found


# --- the environment -------------------------------------------------------------------------------------------------


async def test_a_command_gets_a_clean_environment_and_its_own_home(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(program("environ"), env=(("LANG", "C"), ("MESHD_SPAWN", "forged")))
        await bench.run(attempt)
        environment = dict(line.split("=", 1) for line in attempt.stdout.read_text().splitlines())
        assert environment.pop("MESHD_SPAWN") != "forged"
        assert environment.pop("PATH").endswith("/usr/bin:/sbin:/bin")
        environment.pop("LC_CTYPE", None)  # Python's own doing under LANG=C
        assert environment == {"HOME": str(attempt.workdir), "LANG": "C"}


async def test_a_command_inherits_no_descriptor(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(Program(("ls", "/proc/self/fd")))
        await bench.run(attempt)
        assert attempt.stdout.read_text().split() == ["0", "1", "2", "3"]  # 3 is the directory that ls reads


async def test_a_command_begins_with_no_signal_ignored_or_blocked_and_leads_a_group(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(Program(("cat", "/proc/self/status", "/proc/self/stat")))
        await bench.run(attempt)
        *status, stat = attempt.stdout.read_text().splitlines()
        masks = dict(line.split(":", 1) for line in status if line.startswith(("SigIgn", "SigBlk")))
        c_library = 0b11 << 31  # signals 32 and 33
        assert {int(mask, 16) & ~c_library for mask in masks.values()} == {0} and len(masks) == 2
        pid, group = stat.split()[0], stat.split()[4]
        assert group == pid


async def test_the_limits_of_a_command(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(Program(("cat", "/proc/self/limits")), limits=Limits(memory=64 << 20))
        await bench.run(replace(attempt, needs=Resources(disk=100 << 20)))
        soft = {line[:26].strip(): line[26:].split()[0] for line in attempt.stdout.read_text().splitlines()}
        assert soft["Max core file size"] == "0"
        assert soft["Max open files"] == "1024"
        assert soft["Max data size"] == str(64 << 20)
        assert soft["Max file size"] == str(100 << 20)
        assert soft["Max address space"] == "unlimited"


async def test_a_command_is_found_by_the_jobs_own_path_and_below_the_working_directory(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        script = b"#!/bin/sh\necho found\n"
        for args, env in ((("./tool",), ()), (("tool",), (("PATH", "."),))):
            attempt = bench.attempt(Program(args), env=env, inputs={"tool": script})
            (attempt.workdir / "tool").chmod(0o755)
            outcome = await bench.run(attempt)
            assert (outcome.exit_code, attempt.stdout.read_bytes()) == (0, b"found\n"), outcome


# --- what cannot start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("no-such-command",), "command not found: 'no-such-command'"),
        (("./missing",), "command not found: './missing'"),
        (("./plain",), "not executable: './plain'"),
        (("./no-shebang",), "needs a #! line"),
        (("./no-interpreter",), "interpreter"),
        (("./directory",), "not executable"),
        (("./plain/below",), "Not a directory"),
        (("",), "needs a command"),
        ((), "needs a command"),
        (("true", "x" * (1 << 20)), "larger than this machine allows"),
    ],
)
async def test_what_cannot_start_is_invalid_with_the_reason(tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    async with serving(tmp_path) as bench:
        inputs = {"plain": b"x", "no-shebang": b"echo", "no-interpreter": b"#!/no/such\n", "directory/x": b""}
        attempt = bench.attempt(Program(args), inputs=inputs)
        for name in ("no-shebang", "no-interpreter"):
            (attempt.workdir / name).chmod(0o755)
        outcome = await bench.run(attempt)
        assert outcome.reason is EndReason.INVALID
        assert words in outcome.message


async def test_a_missing_working_directory_is_invalid(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        attempt = replace(bench.attempt(Program(("true",))), workdir=tmp_path / "nowhere")
        outcome = await bench.run(attempt)
        assert outcome.reason is EndReason.INVALID
        assert "working directory" in outcome.message


async def test_files_that_the_agent_did_not_provide_are_the_backends_failure(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        attempt = replace(bench.attempt(Program(("true",))), stdin=tmp_path / "nowhere")
        assert (await bench.run(attempt)).reason is EndReason.BACKEND


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM])
async def test_a_signal_is_named_and_has_a_shells_exit_code(tmp_path: Path, number: signal.Signals) -> None:
    async with serving(tmp_path) as bench:
        outcome = await bench.run(bench.attempt(program("die", str(int(number)))))
        assert (outcome.reason, outcome.exit_code) == (EndReason.SIGNAL, 128 + number)
        assert number.name in outcome.message


async def test_a_file_past_the_disk_that_the_job_asked_for_ends_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        big = Program(("head", "-c", "3000000", "/dev/zero"))
        attempt = bench.attempt(big, limits=Limits(output_bytes_max=1000))
        outcome = await bench.run(replace(attempt, needs=Resources(disk=2000)))
        assert outcome.reason is EndReason.OUTPUT_LIMIT


async def test_one_that_ignores_term_is_killed_after_the_grace(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        outcome = await bench.run(bench.attempt(program("stubborn"), limits=Limits(run_s=0.5)))
        assert outcome.reason is EndReason.TIMEOUT
        assert outcome.run_ms >= 1000  # the limit and the suite's half a second of grace


@pytest.mark.parametrize("kind", ["leave", "wiped"])
async def test_a_daemon_does_not_outlive_its_job(tmp_path: Path, kind: str) -> None:
    seconds = f"61.{os.getpid()}{kind == 'wiped':d}"
    async with serving(tmp_path) as bench:
        assert (await bench.run(bench.attempt(program("daemon", kind, seconds)))).is_success
        assert sleepers(seconds) == []


async def test_a_daemon_of_a_cancelled_job_dies_with_it(tmp_path: Path) -> None:
    seconds = f"62.{os.getpid()}"
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(program("daemon", "stay", seconds))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bench.run, attempt)
                await wait_ready(attempt.stdout)
                scope.cancel()
        assert sleepers(seconds) == []


async def test_the_daemon_of_a_running_neighbour_is_left_alone(tmp_path: Path) -> None:
    seconds = f"63.{os.getpid()}"
    async with serving(tmp_path) as bench, trio.open_nursery() as nursery:
        neighbour = bench.attempt(program("daemon", "stay", seconds))
        nursery.start_soon(bench.backend.run, neighbour)
        await wait_ready(neighbour.stdout)
        for _ in range(3):
            assert (await bench.run(bench.attempt(program("exit", "0")))).is_success
        assert len(sleepers(seconds)) == 1
        nursery.cancel_scope.cancel()
    assert sleepers(seconds) == []


# --- the spawner -----------------------------------------------------------------------------------------------------


async def test_a_killed_spawner_takes_everything_with_it_and_the_next_attempt_gets_a_new_one(tmp_path: Path) -> None:
    seconds = f"64.{os.getpid()}"
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(program("daemon", "stay", seconds))
        outcomes = []

        async def run() -> None:
            outcomes.append(await bench.run(attempt))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await wait_ready(attempt.stdout)
            os.kill(spawner_of(os.getpid()), signal.SIGKILL)
        assert [outcome.reason for outcome in outcomes] == [EndReason.BACKEND]
        assert "SIGKILL" in outcomes[0].message
        await nothing_left(attempt.workdir)
        assert sleepers(seconds) == []
        assert (await bench.run(bench.attempt(program("exit", "0")))).is_success


async def test_what_waited_in_a_killed_spawner_runs_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SPAWNERS_MAX", 1)
    async with serving(tmp_path) as bench:
        batch = bench.start(Program(("sleep", "{item}")), ["0", "0", "60", "60", *["0"] * 10], lanes=2)
        await batch.wait(2)
        await trio.sleep(0.2)
        os.kill(spawner_of(os.getpid()), signal.SIGKILL)
        await batch.wait(14)
        assert sorted(task for task, end in batch.ends.items() if not end.outcome.is_success) == [2, 3]
        assert {batch.outcome(task).reason for task in (2, 3)} == {EndReason.BACKEND}


async def test_what_is_started_while_a_killed_spawner_is_buried_runs_in_the_next_behind_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SPAWNERS_MAX", 1)
    burying, may_go_on = threading.Event(), threading.Event()

    def kill_strays_slowly(token: str) -> None:
        burying.set()
        assert may_go_on.wait(10)
        kill_strays(token)

    began = tmp_path / "began"
    async with serving(tmp_path) as bench:
        monkeypatch.setattr(spawners, "kill_strays", kill_strays_slowly)
        shell = Program(("sh", "-c", f"echo $MESHD_TASK >> {began}; {{item}}"))
        batch = bench.start(shell, ["sleep 60", "true", "true"])
        with trio.fail_after(10):
            while not began.exists():
                await trio.sleep(0.01)
        os.kill(spawner_of(os.getpid()), signal.SIGKILL)
        assert await trio.to_thread.run_sync(burying.wait, 10)
        bench.add(batch, 3, ["true"])
        assert isinstance(bench.backend, BatchBackend)
        of_a_new_lane = Planned(AttemptKey(JOB, 4, 1, 5), "true")
        bench.backend.start(batch.plan, 1, [of_a_new_lane], batch.told)
        may_go_on.set()
        await batch.wait(5)
        assert [batch.outcome(task).is_success for task in range(5)] == [False, True, True, True, True]
        assert [task for task in began.read_text().split() if task != "4"] == ["0", "1", "2", "3"]


async def test_what_is_started_in_the_moment_of_a_spawners_death_runs_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SPAWNERS_MAX", 1)
    async with serving(tmp_path) as bench:
        await bench.run(bench.attempt(program("exit", "0")))
        spawner = spawner_of(os.getpid())
        os.kill(spawner, signal.SIGKILL)
        poll(lambda: Path(f"/proc/{spawner}/stat").read_text().split()[2] == "Z", "it did not die")
        batch = bench.start(program("exit", "0"), [""])
        assert (await bench.run(bench.attempt(program("exit", "0")))).is_success
        await batch.wait(1)
        assert batch.outcome(0).is_success


async def test_commands_are_dealt_out_to_spawners_and_each_dies_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_spawners", lambda: 2)
    seconds = f"68.{os.getpid()}"
    async with serving(tmp_path) as bench:
        batch = bench.start(Program(("sh", "-c", "$MESHD_ITEM")), [f"sleep {seconds}"] * 2 + ["true"] * 2, lanes=2)
        with trio.fail_after(10):
            while len(sleepers(seconds)) < 2:
                await trio.sleep(0.01)
        first, second = spawners_of(os.getpid())
        os.kill(first, signal.SIGKILL)
        await batch.wait(2)
        assert sorted(end.outcome.reason for end in batch.ends.values()) == [EndReason.BACKEND, EndReason.EXIT]
        assert len(sleepers(seconds)) == 1, "the other's still runs"
        os.kill(second, signal.SIGKILL)
        await batch.wait(4)
        assert sleepers(seconds) == []


@pytest.mark.parametrize(
    "leave", ["true", "mkdir -p a/b; echo x > a/b/c; chmod $MESHD_ITEM a"], ids=["rights", "files"]
)
async def test_a_command_of_a_batch_finds_nothing_of_the_one_before_not_even_rights(tmp_path: Path, leave: str) -> None:
    async with serving(tmp_path) as bench:
        shell = Program(("sh", "-c", f"ls -A; stat -c %a .; {leave}; chmod $MESHD_ITEM ."))
        batch = bench.start(shell, ["000", "755", "700", "777"])
        await batch.wait(4)
        assert [batch.stdout(task) for task in range(4)] == [b"700\n"] * 4
        with trio.fail_after(10):
            while len(list((tmp_path / "backend" / "scratch").glob("*/*"))) > 1:
                await trio.sleep(0.01)


async def test_commands_of_a_batch_that_leave_nothing_share_a_directory(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        batch = bench.start(Program(("sh", "-c", "pwd; touch x; rm x")), [""] * 5)
        await batch.wait(5)
        assert len({batch.stdout(task) for task in range(5)}) == 1


async def test_not_even_the_quickest_command_of_a_batch_begins_past_its_leash(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        batch = bench.start(Program(("true",)), ["a"] * 50, leash=Leash(boottime() - 1))
        await batch.wait(50)
        assert {end.outcome.reason for end in batch.ends.values()} == {EndReason.LOST}


async def test_a_daemon_of_a_batch_does_not_outlive_its_command(tmp_path: Path) -> None:
    seconds = f"67.{os.getpid()}"
    async with serving(tmp_path) as bench:
        batch = bench.start(program("daemon", "leave", seconds), ["a", "b"])
        await batch.wait(2)
        assert sleepers(seconds) == []
        assert all(end.outcome.is_success for end in batch.ends.values())


async def test_a_spawner_that_does_not_answer_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawners, "LATE_S", 0.5)
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(program("daemon", "stay", "65"))
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                await wait_ready(attempt.stdout)
                os.kill(spawner_of(os.getpid()), signal.SIGSTOP)

            nursery.start_soon(stop)
            start = time.monotonic()
            outcome = await bench.run(replace(attempt, limits=Limits(run_s=1.0)))
        assert outcome.reason is EndReason.BACKEND
        assert time.monotonic() - start < 5
        await nothing_left(attempt.workdir)
        assert (await bench.run(bench.attempt(program("exit", "0")))).is_success


async def test_an_agent_that_stood_still_hears_what_ended_meanwhile_and_runs_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SPAWNERS_MAX", 1)
    monkeypatch.setattr(spawners, "LATE_S", 0.2)
    began = tmp_path / "began"
    shell = Program(("sh", "-c", f"echo $MESHD_FENCE >> {began}; $MESHD_ITEM"))
    async with serving(tmp_path) as bench:
        spawner = 0
        for attempts in range(1, 3):  # who is first as the agent wakes is a matter of luck
            began.write_text("")
            batch = bench.start(shell, ["sleep 60", *["sleep 0.1"] * 3, "sleep 60", *["sleep 0.1"] * 3], lanes=4)
            with trio.fail_after(10):
                while began.read_text().count("\n") < 4:
                    await trio.sleep(0.01)
            spawner = spawner or spawner_of(os.getpid())
            for fence in (5, 1):
                bench.backend.stop(fence)  # type: ignore[attr-defined]
            await trio.sleep(0)
            time.sleep(1.0)  # past the grace and the spawner's allowance
            await batch.wait(8)
            assert sorted(began.read_text().split()) == ["1", "2", "3", "4", "6", "7", "8"], attempts
            assert {task for task, end in batch.ends.items() if not end.outcome.is_success} == {0, 4}
            assert spawner_of(os.getpid()) == spawner


def test_what_outlived_a_killed_agent_and_spawner_is_ended_as_the_next_agent_starts(tmp_path: Path) -> None:
    seconds = f"66.{os.getpid()}"
    with suite.owner(tmp_path, ("daemon", "stay", seconds)) as owner:
        poll(lambda: len(sleepers(seconds)) == 1, "the daemon did not start")
        spawner = spawner_of(owner.pid)
        owner.send_signal(signal.SIGSTOP)
        os.kill(spawner, signal.SIGKILL)
        owner.kill()
        owner.wait()
        assert len(sleepers(seconds)) == 1
        trio.run(start_and_stop, build(suite.factory, tmp_path / "backend"))
        assert sleepers(seconds) == []


async def start_and_stop(backend: Backend) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(backend.serve)
        nursery.cancel_scope.cancel()


def test_an_agent_ends_what_any_spawner_of_the_one_before_left_however_many_there_were(tmp_path: Path) -> None:
    backend = build(suite.factory, tmp_path / "backend")
    assert isinstance(backend, process.ProcessBackend)
    own, other = backend._token, "0" * 32
    left = [
        subprocess.Popen(["/bin/sleep", "60"], env={"MESHD_SPAWN": mark})
        for mark in (f"{own}:0:5", f"{own}:3:9", f"{own}:7", f"{other}:0:5")
    ]
    trio.run(start_and_stop, backend)
    *ours, theirs = left
    try:
        assert [each.wait(5) for each in ours] == [-signal.SIGKILL] * 3
        assert theirs.poll() is None, "of another agent"
    finally:
        for each in left:
            each.kill()
            each.wait()


async def test_files_may_be_named_from_where_the_agent_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with serving(Path("here")) as bench:
        for _ in range(2):
            attempt = bench.attempt(Program(("pwd",)))
            outcome = await bench.run(attempt)
            assert outcome.is_success, outcome
            assert attempt.stdout.read_text() == f"{tmp_path / attempt.workdir}\n"


async def test_a_working_directory_that_is_not_there_costs_the_spawner_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        await bench.run(bench.attempt(program("exit", "0")))
        held = Path(f"/proc/{spawner_of(os.getpid())}/fd")
        before = len(os.listdir(held))
        for _ in range(3):
            outcome = await bench.run(replace(bench.attempt(program("exit", "0")), workdir=tmp_path / "gone"))
            assert outcome.reason is EndReason.INVALID and "cannot be entered" in outcome.message
        assert len(os.listdir(held)) == before


@pytest.mark.parametrize("spare", range(5))
async def test_a_spawner_without_a_free_descriptor_refuses_commands_and_lives(tmp_path: Path, spare: int) -> None:
    async with serving(tmp_path) as bench:
        await bench.run(bench.attempt(program("exit", "0")))
        spawner = spawner_of(os.getpid())
        held = set(map(int, os.listdir(f"/proc/{spawner}/fd")))
        limit = [number for number in range(1000) if number not in held][spare]
        before = resource.prlimit(spawner, resource.RLIMIT_NOFILE)
        resource.prlimit(spawner, resource.RLIMIT_NOFILE, (limit, before[1]))
        outcome = await bench.run(bench.attempt(program("exit", "0")))
        batch = bench.start(program("exit", "0"), ["a"])
        await batch.wait(1)
        for each in (outcome, batch.outcome(0)):
            assert each.is_success or (each.reason is EndReason.BACKEND and "Too many open files" in each.message), each
        assert spawner_of(os.getpid()) == spawner
        resource.prlimit(spawner, resource.RLIMIT_NOFILE, before)
        assert (await bench.run(bench.attempt(program("exit", "0")))).is_success


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2048, reason="this machine allows no more")
async def test_a_spawner_holds_more_files_than_a_command_may_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SPAWNERS_MAX", 1)
    many = FILES_OPEN // 2
    async with serving(tmp_path) as bench:
        says = "ulimit -Sn; cat; echo said >&2; echo more"
        batch = bench.start(Program(("sh", "-c", "{item}")), [*["exec sleep 60"] * many, says], lanes=many + 1)
        await batch.wait(1)
        assert batch.ends.keys() == {many} and batch.outcome(many).is_success, batch.ends
        assert batch.stdout(many) == b"%d\nmore\n" % FILES_OPEN
        assert batch.outcome(many).stderr == Inline(b"said\n")


def test_a_spawner_may_be_started_where_it_may_not_enter(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()

    def shut_out() -> None:
        os.chdir(here)
        here.chmod(0)
        for capability in (1, 2):  # that root may enter anything, DAC_OVERRIDE and DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP

    ours, theirs = socket.socketpair()
    command = [
        sys.executable,
        "-S",
        "-s",
        "-P",
        "-m",
        "meshd.backends.spawner",
        str(theirs.fileno()),
        "token",
        "1",
        "/",
    ]
    root = str(Path(__file__).parents[2])
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], env={"PYTHONPATH": root}, preexec_fn=shut_out) as spawner:  # fmt: skip
        theirs.close()
        limits = dict.fromkeys(("run_s", "memory", "file_bytes_max", "leash_s", "stdin"))
        files = {"workdir": str(tmp_path), "stdout": str(tmp_path / "out"), "stderr": str(tmp_path / "err")}
        request = {"do": "run", "id": 1, "args": ["pwd"], "env": [], "output_bytes_max": 1000, **limits, **files}
        payload = json.dumps(request).encode()
        ours.sendall(struct.pack("<I", len(payload)) + payload)
        assert json.loads(ours.recv(1000)[4:])["ended"][0][1:3] == ["exit", 0]
        ours.close()
        assert spawner.wait(10) == 0
    assert (tmp_path / "out").read_text() == f"{tmp_path}\n"


@pytest.mark.parametrize("name", ["TSTP", "TTIN", "TTOU"])
async def test_a_command_that_stops_itself_as_if_at_a_terminal_goes_on(tmp_path: Path, name: str) -> None:
    async with serving(tmp_path) as bench:
        attempt = bench.attempt(Program(("sh", "-c", f"kill -{name} $$; echo on")))
        assert (await bench.run(attempt)).is_success
        assert attempt.stdout.read_bytes() == b"on\n"


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
async def test_a_recall_waits_for_a_spawner_that_is_slow_and_takes_nothing_from_the_others_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: signal.Signals
) -> None:
    monkeypatch.setattr(process, "SPAWNERS_MAX", 1)
    monkeypatch.setattr(spawners, "REPLY_S", 0.1)
    began = tmp_path / "began"
    go_on = tmp_path / "go-on"
    waits = f"touch {began}; while [ ! -e {go_on} ]; do sleep 0.01; done"
    back: list[int] = []
    async with serving(tmp_path) as bench:
        batch = bench.start(Program(("sh", "-c", "{item}")), [waits, "true", "true"])
        assert isinstance(bench.backend, BatchBackend)
        with trio.fail_after(10):
            while not began.exists():
                await trio.sleep(0.01)
        spawner = spawner_of(os.getpid())
        os.kill(spawner, signal.SIGSTOP)

        async def recall() -> None:
            with trio.fail_after(10):
                back.extend(await bench.backend.recall([2, 3]))  # type: ignore[attr-defined]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(recall)
            await trio.sleep(0.6)  # several times as long as other answers may take
            assert spawner_of(os.getpid()) == spawner and not back and not batch.ends
            os.kill(spawner, end)
        go_on.touch()
        if end is signal.SIGCONT:
            assert sorted(back) == [2, 3]
            await batch.wait(1)
            assert batch.outcome(0).is_success and batch.ends.keys() == {0}
        else:
            assert back == [], "nobody can know what it would have said: they run in the next"
            await batch.wait(3)
            assert [batch.outcome(task).is_success for task in range(3)] == [False, True, True]


async def test_an_idle_spawner_ends_and_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "IDLE_S", 0.2)
    scratch = tmp_path / "backend" / "scratch"
    async with serving(tmp_path) as bench:
        batch = bench.start(program("exit", "0"), [""])
        await batch.wait(1)
        spawner = spawner_of(os.getpid())
        assert os.listdir(scratch)
        with trio.fail_after(10):
            while Path(f"/proc/{spawner}").exists() or os.listdir(scratch):
                await trio.sleep(0.02)
        assert (await bench.run(bench.attempt(program("exit", "0")))).is_success


async def test_nothing_that_commands_of_a_killed_spawner_wrote_stays(tmp_path: Path) -> None:
    scratch = tmp_path / "backend" / "scratch"
    async with serving(tmp_path) as bench:
        batch = bench.start(Program(("sh", "-c", "mkdir a; echo x > a/b; chmod 0 a; {item}")), ["sleep 60"])
        with trio.fail_after(10):
            while not list(scratch.rglob("b")):
                await trio.sleep(0.01)
        os.kill(spawner_of(os.getpid()), signal.SIGKILL)
        await batch.wait(1)
        with trio.fail_after(10):
            while os.listdir(scratch):
                await trio.sleep(0.02)


def test_the_spawner_needs_nothing_but_the_standard_library() -> None:
    code = "import sys; import meshd.backends.spawner; print(*sys.modules)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    ours = {
        "meshd",
        "meshd.backends",
        "meshd.backends.output",
        "meshd.backends.spawned",
        "meshd.backends.spawner",
        "meshd.backends.spawner_lanes",
    }
    foreign = {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign - {"__main__"} == ours
