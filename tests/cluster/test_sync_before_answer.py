"""What is acknowledged has been fsynced, seen from outside: strace looks at a real agent, or holds its fsyncs up."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.conftest import eventually

HELD_UP_S = 0.4
"""Longer than a submission takes on a busy machine, shorter than an election timeout."""


@pytest.fixture(autouse=True, scope="module")
def can_be_traced() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    done = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no process can be traced here: {done.stderr.strip()}")


@contextmanager
def traced(pid: int, output: Path, *arguments: str) -> Iterator[None]:
    """All threads of the process, from when strace is attached until the end of the block."""
    command = ["strace", "-f", "-ttt", "-s", "65536", "-o", str(output), *arguments, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None and "attached" in tracer.stderr.readline()
        yield
    finally:
        tracer.terminate()
        tracer.communicate(timeout=20)


def happened(trace: str) -> list[tuple[str, str]]:
    """(system call, its line), in the order of their ends: a traced thread goes on only when strace has noted it."""
    found, begun = [], {}
    for line in trace.splitlines():
        thread, _, rest = line.split(maxsplit=2)  # short process ids are padded
        if match := re.match(r"(\w+)\((.*) <unfinished \.\.\.>$", rest):
            begun[thread] = rest
        elif match := re.match(r"<\.\.\. (\w+) resumed>(.*)", rest):
            found.append((match[1], begun.pop(thread, "") + match[2]))
        elif match := re.match(r"(\w+)\(", rest):
            found.append((match[1], rest))
    return found


def first(calls: list[tuple[str, str]], wanted: Callable[[str, str], bool], after: int = -1) -> int:
    return next(index for index, call in enumerate(calls) if index > after and wanted(*call))


def test_a_sole_voter_answers_after_its_fdatasync_has_ended(make_mesh, tmp_path):
    mesh = make_mesh()
    mesh.start("node1")
    trace = tmp_path / "trace"
    with mesh.client() as client:
        client.submit({"run": {"args": ["true"]}})
        calls = "trace=pwrite64,pwritev,write,writev,fdatasync,fsync,sendto,sendmsg"
        with traced(mesh.agents["node1"].pid, trace, "-e", calls):
            job = client.submit({"run": {"args": ["true"]}})
    calls = happened(trace.read_text())
    written = first(calls, lambda name, line: name.startswith("pwrite") and job in line)
    journal = re.match(r"\w+\((\d+)", calls[written][1])[1]
    synced = first(calls, lambda name, line: name == "fdatasync" and f"({journal}" in line, after=written)
    assert calls[synced][1].endswith("= 0")
    answered = first(calls, lambda name, line: name.startswith("send") and job in line and "is_new" in line)
    assert written < synced < answered
    assert not [line for name, line in calls[:synced] if name in ("sendto", "sendmsg", "write") and job in line]


def test_a_submission_waits_for_the_fdatasync_of_a_second_voter(make_mesh, tmp_path):
    mesh = make_mesh("node1", "node2", "node3")
    leader = mesh.leader()
    followers = [name for name in mesh.agents if name != leader]
    hold_up = ("-e", "trace=fdatasync", "-e", f"inject=fdatasync:delay_enter={int(HELD_UP_S * 1e6)}")

    def submit_s() -> float:
        begun_s = time.monotonic()
        client.submit({"run": {"args": ["true"]}})
        return time.monotonic() - begun_s

    with mesh.client(leader) as client:
        eventually(lambda: submit_s() < HELD_UP_S / 2, within_s=20)
        with traced(mesh.agents[followers[0]].pid, tmp_path / "one", *hold_up):
            eventually(lambda: submit_s() < HELD_UP_S, within_s=20)
            with traced(mesh.agents[followers[1]].pid, tmp_path / "other", *hold_up):
                # Whatever is in flight from before was not held up.
                submit_s()
                assert min(submit_s() for _ in range(3)) >= HELD_UP_S
    assert "fdatasync" in (tmp_path / "other").read_text()


def test_an_agent_whose_fdatasync_fails_stops_and_the_others_go_on(make_mesh, tmp_path):
    mesh = make_mesh("node1", "node2", "node3")
    leader = mesh.leader()
    rest = [name for name in mesh.agents if name != leader]
    fail = ("-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=1")
    with mesh.client(leader, *rest) as client:
        with traced(mesh.agents[leader].pid, tmp_path / "trace", *fail):
            job = client.submit({"run": {"args": ["true"]}})
            eventually(lambda: mesh.agents[leader].poll() is not None, within_s=20)
        assert mesh.agents[leader].returncode != 0
        assert "Input/output error" in (mesh.home(leader) / "agent.log").read_text()
        assert client.wait(job, timeout_s=60).state.value == "done"
    mesh.start(leader)
    with mesh.client(leader) as client:
        assert client.job(job).state.value == "done"
