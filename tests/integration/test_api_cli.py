"""`mesh` as people use it: what it prints where, and how it exits. Most calls run in this process; a few are real ones."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from mesh_cli import main

from meshd.client import Client
from meshd.client import client as client_module
from meshd.client.client import LogStream
from tests.integration.api_server import Served, served

ROOT = Path(__file__).parents[2]
WASM = b"\0asm\x01\0\0\0"


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Mesh = Callable[..., Said]


@pytest.fixture(scope="module")
def api() -> Iterator[Served]:
    with served(is_remote=True) as server:
        yield server


@pytest.fixture
def mesh(api: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Mesh:
    monkeypatch.setenv("MESH_NODE", api.node)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> Said:
        code = main.run(list(args))
        sys.stdout.flush()
        captured = capfd.readouterr()
        return Said(code, captured.out, captured.err)

    return call


def as_process(api: Served, *args: str, stdin: object = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "MESH_NODE": api.node, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
    return subprocess.Popen(
        [sys.executable, "-m", "mesh_cli.main", *args],
        env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Tests that run in the background of a script ignore it, and so would who they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # type: ignore[call-overload, no-any-return]  # fmt: skip


# --- run and submit -----------------------------------------------------------------------------------------------------


def test_run_prints_what_the_job_prints_and_nothing_else(mesh: Mesh) -> None:
    assert mesh("run", "--", "echo", "hello") == Said(0, "hello\n", "")
    assert mesh("run", "echo", "-n", "--cpu") == Said(0, "-n --cpu\n", "")


def test_run_exits_as_the_job_did(mesh: Mesh) -> None:
    assert mesh("run", "--", "fail", "200", "oops") == Said(200, "", "oops")


def test_a_command_that_is_not_found_is_a_failed_job(mesh: Mesh) -> None:
    said = mesh("run", "--", "nosuchcommand")
    assert said.code == 5 and "command not found: nosuchcommand" in said.err and "try: mesh job show" in said.err


def test_a_wasm_file_is_told_by_its_content(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "real.wasm").write_bytes(WASM)
    (tmp_path / "renamed").write_bytes(WASM)
    (tmp_path / "fake.wasm").write_bytes(b"#!/bin/sh\n")
    assert mesh("run", "real.wasm", "arg") == mesh("run", "./renamed") == Said(0, "ran\n", "")
    said = mesh("run", "fake.wasm")
    assert said.code == 2 and said.err.startswith("error: fake.wasm is not a WebAssembly module\ntry: ")
    assert mesh("run", "missing.wasm").code == 3


def test_a_job_no_node_can_run_says_what_each_lacks(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_cli.run.UNPLACED_S", 0.1)
    monkeypatch.setattr("mesh_cli.run.STARTED_POLL_S", 0.1)
    said = mesh("run", "--gpu", "8", "--name", "hungry", "--", "echo")
    assert said.code == 4 and "fake: gpu 8 (has gpu 0)" in said.err and "mesh job cancel" in said.err
    assert mesh("job", "explain", "hungry").code == 4
    assert mesh("job", "cancel", "hungry").out.endswith("cancelled\n")


def test_flags_and_a_job_file_say_the_same(mesh: Mesh, api: Served, tmp_path: Path) -> None:
    flags = "--name a --cpu 0.5 --memory 256Mi --array 1-10:3%2 --env A=1 --label t=x --need-label arch=x86_64 --need license=1 --retries 4 --backoff 1s..2s --timeout 10m --on-lost wait --lost-after 5m --priority 9 --replicas 1 --output out/ --max-fails 2"  # fmt: skip
    written = {
        "name": "a",
        "run": {"args": ["echo", "x"], "env": {"A": 1}},
        "needs": {"cpu": 0.5, "memory": "256Mi", "labels": "arch=x86_64", "license": 1},
        "array": {"range": "1-10:3", "at_once": 2, "max_fails": 2},
        "labels": {"t": "x"},
        "retry": {"attempts": 5, "backoff": "1s..2s"},
        "timeout": {"run": "10m"},
        "on_lost": "wait",
        "lost_after": "5m",
        "priority": 9,
        "replicas": 1,
        "outputs": ["out/"],
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(written))
    by_flags = mesh("submit", *flags.split(), "--", "echo", "x").out.strip()
    by_file = mesh("submit", "--file", "job.yaml").out.strip()
    with Client([api.node]) as client:
        assert client.job(by_flags).spec == client.job(by_file).spec
    for job in (by_flags, by_file):
        mesh("job", "cancel", job)


def test_a_date_in_a_job_file_is_text(mesh: Mesh, api: Served, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "run: {args: [echo, 2024-01-01], env: {AT: 2024-01-01T10:00:00Z}}\nlabels: {day: 2024-01-01}\n"
    )
    job = mesh("submit", "--file", "job.yaml").out.strip()
    with Client([api.node]) as client:
        spec = client.job(job).spec
    assert spec.labels == (("day", "2024-01-01"),) and spec.run.args == ("echo", "2024-01-01")
    assert spec.run.env == (("AT", "2024-01-01T10:00:00Z"),)


@pytest.mark.parametrize("value", ["!!binary aGk=", "!!set {a, b}", "!!timestamp 2024-01-01", "&a [*a]", "[" * 900 + "]" * 900])  # fmt: skip
def test_what_json_cannot_say_is_refused_in_a_job_file(mesh: Mesh, tmp_path: Path, value: str) -> None:
    (tmp_path / "job.yaml").write_text(f"run: {{args: [echo]}}\nlabels: {{a: {value}}}\n")
    said = mesh("submit", "--file", "job.yaml")
    assert said.code == 2 and said.err.startswith("error: "), said


def test_a_program_that_lies_here_and_is_not_sent_is_spoken_of(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("tool", "bin/tool"):
        (tmp_path / name).write_text("#!/bin/sh")
    unsent = "is not on the nodes unless you send it: add --input"
    assert f"./tool {unsent} tool=./tool -- ./tool" in mesh("submit", "--", "./tool").err
    assert f"bin/tool {unsent} bin/tool=bin/tool -- ./bin/tool" in mesh("submit", "--", "bin/tool").err
    for line in (
        "--input tool=tool -- ./tool",
        "--input bin=bin -- bin/tool",
        "--input ./=. -- ./tool",
        "-- tool",
        "-- ./other",
        "-- /bin/sh",
    ):
        assert mesh("submit", *line.split()).err == "", line


def test_inputs_and_arrays_from_files(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("a\nb\nc\n")
    (tmp_path / "many").mkdir()
    for number in range(5):
        (tmp_path / f"many/{number}").write_text("x")
    job = mesh("submit", "--each-line", "lines", "--input", "i/=many", "--wait", "--", "echo", "x").out.strip()
    assert mesh("job", "ls", "-q", "--limit", "1").out.strip() == job
    assert json.loads(mesh("job", "show", job, "-o", "json").out)["tasks"] == 3
    job = mesh("submit", "--each-file", "many", "--per-task", "2", "--", "echo", "x").out.strip()
    assert json.loads(mesh("job", "show", job, "-o", "json").out)["tasks"] == 3


def test_an_id_of_ones_own_makes_repeating_safe(mesh: Mesh) -> None:
    job_id = str(Client.new_id())
    first = mesh("submit", "--id", job_id, "--", "echo", "x")
    assert first == mesh("submit", "--id", job_id, "--", "echo", "x") == Said(0, f"{job_id}\n", "")


def test_a_file_on_stdin_reaches_the_job(api: Served, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"in the beginning" * 1000)
    with (tmp_path / "book.txt").open("rb") as book:
        out, err = as_process(api, "run", "cat", stdin=book).communicate(timeout=30)
    assert (out, err) == (b"in the beginning" * 1000, b"")
    out, _ = as_process(api, "run", "-i", "cat", stdin=subprocess.PIPE).communicate(b"piped", timeout=30)
    assert out == b"piped"


def test_an_interrupt_leaves_the_job_running_and_says_how_to_come_back(api: Served) -> None:
    process = as_process(api, "run", "--name", "long", "--", "hang")
    with Client([api.node]) as client:
        deadline = time.monotonic() + 20
        while not any(job.name == "long" for job in client.jobs(limit=1)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # The job is agreed before the command knows; it is following once it has asked for the log.
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert process.returncode == 130 and out == b""
        job = client.job("long")
        assert f"mesh job logs -f {job.id}" in err.decode() and not job.is_final
        client.cancel(job.id)


def test_an_array_prints_each_tasks_output_in_order(mesh: Mesh) -> None:
    assert mesh("run", "--array", "3", "--", "echo", "hi") == Said(0, "hi\nhi\nhi\n", "")
    said = mesh("run", "--array", "3", "--", "fail", "1")
    assert said.code == 5 and "3 of 3 tasks failed" in said.err


# --- jobs ---------------------------------------------------------------------------------------------------------------


def test_a_list_in_every_form(mesh: Mesh) -> None:
    job = mesh("submit", "--label", "form=x", "--", "echo", "x").out.strip()
    ask = ("ps", "-l", "form=x")
    table = mesh(*ask).out.splitlines()
    assert table[0].split()[:3] == ["ID", "NAME", "STATE"] and table[1].startswith(job[:18])
    assert job in mesh(*ask, "-o", "wide").out
    assert json.loads(mesh(*ask, "-o", "json").out)[0]["id"] == job
    assert json.loads(mesh(*ask, "-o", "jsonl").out)["id"] == job
    assert yaml.safe_load(mesh(*ask, "-o", "yaml").out)[0]["id"] == job
    assert mesh(*ask, "-q").out == mesh(*ask, "-o", "name").out == f"{job}\n"


@pytest.mark.parametrize(
    "line",
    ["ps", "job ls", "job show {}", "job tasks {}", "job logs {}", "job explain {}", "job result {}", "node ls", "node show self"],
)  # fmt: skip
def test_a_stale_read_needs_no_majority_and_others_say_what_is_missing(
    mesh: Mesh, api: Served, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    job = mesh("run", "--name", "stale", "--", "echo", "x") and mesh("ps", "-q", "--name", "stale").out.split()[0]
    monkeypatch.setattr("meshd.client.http.PATIENCE_S", 0)
    monkeypatch.setattr(api.face, "is_down", True)
    asked = line.format(job).split()
    assert mesh(*asked).code == 8
    said = mesh(*asked, "--stale")
    assert said.code == 0 and said.out, said
    if line in ("ps", "job show {}"):
        assert "as of log position" in said.err


def test_waiting_tells_good_from_bad_from_not_yet(mesh: Mesh) -> None:
    good, bad, long = (mesh("submit", "--", *command).out.strip() for command in (["echo"], ["fail", "1"], ["hang"]))
    assert mesh("job", "wait", good).code == 0
    assert mesh("job", "wait", good, bad).code == 5
    said = mesh("job", "wait", long, "--timeout", "100ms")
    assert said.code == 124 and said.err.startswith(f"error: job {long} is still")
    assert mesh("job", "result", long).code == 6
    mesh("job", "cancel", long)


def test_a_cancelled_array_says_what_was_done_and_what_was_not(mesh: Mesh) -> None:
    job = mesh("submit", "--name", "cut", "--array", "1-10", "--at-once", "4", "--", "hang").out.strip()
    assert mesh("job", "cancel", f"{job}:5-9") == Said(0, f"{job} running; those tasks are being cancelled\n", "")
    assert mesh("job", "cancel", job).out in (f"{job} is being cancelled\n", f"{job} cancelled\n")
    assert mesh("job", "wait", job) == Said(5, "", f"job {job}: cancelled: 10 cancelled\ntry: mesh job show {job}\n")


def test_one_name_that_is_wrong_keeps_nobody_from_the_others(mesh: Mesh) -> None:
    job = mesh("submit", "--", "hang").out.strip()
    said = mesh("job", "cancel", "nosuch", job, "nobody")
    assert said.code == 3 and job in said.out
    assert "error: no job nosuch" in said.err and "error: no job nobody" in said.err
    assert mesh("job", "wait", job).code == 5
    said = mesh("job", "retry", "nosuch", job)
    assert said.code == 3 and len(said.out.splitlines()) == 1
    mesh("job", "cancel", said.out.strip())


def test_a_node_is_called_by_its_name_wherever_a_task_is_shown(mesh: Mesh, api: Served) -> None:
    job = mesh("submit", "--", "echo", "x").out.strip()
    mesh("job", "wait", job)
    for line in (f"job show {job}", f"job show {job}:0", f"job result {job}", f"job result {job}:0"):
        assert "fake" in mesh(*line.split()).out, line
        assert api.face.me not in mesh(*line.split()).out
    header, row = mesh("job", "tasks", job).out.splitlines()
    assert row[header.index("NODE") :].split()[0] == "fake"
    assert json.loads(mesh("job", "tasks", job, "-o", "json").out)[0]["node"] == api.face.me
    assert api.face.me in mesh("job", "tasks", job, "-o", "wide").out


def test_logs_result_and_retry(mesh: Mesh, tmp_path: Path) -> None:
    job = mesh("submit", "--array", "1-3", "--output", "out.txt", "--", "files").out.strip()
    assert mesh("job", "result", job, "--save", "all").code == 0
    assert (tmp_path / "all/2/out.txt").read_text() == "task 2\n"
    assert mesh("job", "result", f"{job}:1", "--save", "one").code == 0
    assert (tmp_path / "one/out.txt").read_text() == "task 1\n"
    assert len(mesh("job", "tasks", f"{job}:0-1").out.splitlines()) == 3
    bad = mesh("submit", "--", "fail", "9", "why").out.strip()
    assert mesh("job", "logs", "-f", bad) == Said(0, "", "why")
    assert "exit 9" in mesh("job", "show", bad).out
    again = mesh("job", "retry", bad).out.strip()
    assert again != bad and bad in mesh("job", "show", again).out


def test_a_retry_by_label_makes_each_bad_job_once_and_leaves_good_ones(mesh: Mesh) -> None:
    bad, good, worse = (
        mesh("submit", "-l", "again=x", "--", *command).out.strip() for command in (["hang"], ["echo"], ["hang"])
    )
    assert sorted(mesh("job", "cancel", "-q", "-l", "again=x").out.split()) == [bad, worse], (
        "what is over is left alone"
    )
    first = mesh("job", "retry", "-l", "again=x")
    assert (first.code, len(first.out.split())) == (0, 2), first
    second = mesh("job", "retry", "-l", "again=x")
    assert (second.code, second.out) == (0, "") and "nothing to do" in second.err
    mesh("job", "cancel", "-l", "again=x")
    assert "nothing to do" in mesh("job", "cancel", "-l", "again=x").err
    assert len(mesh("job", "retry", "-l", "again=x").out.split()) == 2, "their retries, not they once more"
    mesh("job", "cancel", "-l", "again=x")
    assert mesh("job", "retry", "-l", "again=y").code == 3
    named = mesh("job", "retry", good, bad)
    assert named.code == 6 and f"error: job {good} has no failed" in named.err and len(named.out.split()) == 1
    mesh("job", "cancel", named.out.strip())


def test_a_label_with_more_jobs_than_are_looked_at_is_spoken_of(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_cli.selectors.JOBS_MAX", 2)
    newest = [mesh("submit", "-l", "many=x", "--", "fail", "1").out.strip() for _ in range(3)][1:]
    said = mesh("job", "retry", "-l", "many=x", "-o", "json")
    assert all(job in said.out for job in newest) and said.out.count("retry_of") == 2
    assert "only the newest 2 jobs" in said.err


HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202e\x9b31m"


def hostile(value: Any) -> Any:
    """The same, with a hostile text in place of every other that a worker, a joiner or a submitter may have written."""
    match value:
        case StrEnum() | bytes() | int() | float() | None:
            return value
        case str():
            return HOSTILE
        case tuple():
            return tuple(hostile(item) for item in value)
        case dict():
            return {key: hostile(item) for key, item in value.items()}
        case _:
            # Ids are checked by the nodes; with others nothing could be asked further.
            names = [name for name in value.__struct_fields__ if name not in ("id", "job")]
            return msgspec.structs.replace(value, **{name: hostile(getattr(value, name)) for name in names})


@pytest.mark.parametrize(
    "line",
    ["job show JOB", "job show ARRAY", "job show ARRAY:1", "job result JOB", "job result ARRAY", "job explain JOB",
     "job tasks JOB", "job ls", "job ls -o wide", "cluster status", "node ls", "node ls -o wide", "node show self"],
)  # fmt: skip
def test_nothing_that_others_wrote_steers_the_terminal(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    jobs = {
        "JOB": mesh("submit", "--wait", "--output", "out.txt", "--", "fail", "1", "why").out.strip(),
        "ARRAY": mesh("submit", "--wait", "--array", "2", "--label", "a=b", "--", "fail", "1").out.strip(),
    }
    plain_answer = client_module._decode
    monkeypatch.setattr("meshd.client.client._decode", lambda data, kind: hostile(plain_answer(data, kind)))
    for name, job in jobs.items():
        line = line.replace(name, job)
    said = mesh(*line.split())
    assert r"\x1b[2J" in said.out and all(char.isprintable() or char == "\n" for char in said.out), said


def test_logs_asks_only_for_what_the_list_of_tasks_does_not_say(
    mesh: Mesh, api: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    output_chunks = Client.output_chunks

    def counted(client: Client, job: str, task: int = 0, stream: LogStream = "stdout") -> Iterator[bytes]:
        asked.append(task)
        return output_chunks(client, job, task, stream)

    monkeypatch.setattr(Client, "output_chunks", counted)
    small = mesh("submit", "--array", "1-1500", "--", "echo", "hi").out.strip()
    assert mesh("job", "logs", small) == Said(0, "hi\n" * 1500, "")
    assert mesh("job", "logs", "-f", f"{small}:0-9") == Said(0, "hi\n" * 10, "") and asked == []
    large = mesh("submit", "--array", "2", "--", "echo", "x" * 5000).out.strip()
    assert mesh("job", "logs", large).out == ("x" * 5000 + "\n") * 2 and asked == [0, 1]
    asked.clear()
    cut = mesh("submit", "--array", "1-2000", "--at-once", "3", "--", "hang").out.strip()
    assert mesh("job", "logs", cut) == Said(0, "", "") and asked == [0, 0, 1, 1, 2, 2]
    mesh("job", "cancel", cut)
    assert mesh("job", "logs", cut) == Said(0, "", "") and asked == [0, 0, 1, 1, 2, 2]
    assert mesh("job", "logs", f"{cut}:2000").code == 3


# --- everything else ----------------------------------------------------------------------------------------------------


def test_blobs_there_and_back(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"some bytes")
    name = mesh("blob", "put", "a").out.strip()
    digest = name.split(":")[1]
    assert mesh("blob", "get", name).out == "some bytes"
    assert mesh("blob", "get", digest[:10], "b").code == 0 and (tmp_path / "b").read_bytes() == b"some bytes"
    assert digest in mesh("blob", "ls", "-q").out and "fake" in mesh("blob", "where", name).out
    assert mesh("blob", "rm", name).code == 0
    assert mesh("blob", "get", name, "c").code == 3 and not (tmp_path / "c").exists()
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").write_text("x")
    tree = mesh("blob", "put", "d").out.strip()
    assert mesh("blob", "get", tree, "back").code == 0 and (tmp_path / "back/x").read_text() == "x"


def test_nodes_cluster_and_version(mesh: Mesh) -> None:
    assert mesh("node", "ls").out.splitlines()[1].split()[0] == "fake"
    assert "no docker: no engine answers" in mesh("node", "show", "fake").out
    assert mesh("node", "invite", "--role", "worker", "--uses", "3", "--expires", "2h").out.startswith("meshd1-")
    assert mesh("node", "drain", "self") == Said(0, "", "draining: waiting for running work\nsafe: safe to stop\n")
    assert mesh("node", "drain", "--cancel", "self").code == 0
    assert "survives  0 failures" in mesh("cluster", "status").out
    assert "node 0.0.0" in mesh("version").out


def test_the_meshs_clock_is_set_by_an_operator_and_the_status_tells_of_it(mesh: Mesh) -> None:
    said = mesh("cluster", "set-clock", "--to", "tomorrow")
    assert said.code == 2 and "2027-01-31T12:00:00Z" in said.err
    assert mesh("cluster", "set-clock", "--to", "1980-01-01T00:00:00Z").code == 2
    later = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 1230))
    assert mesh("cluster", "set-clock", "--to", later).out.startswith("forward by 20m")
    back = mesh("cluster", "set-clock").out
    assert back.startswith("back by ") and "set by an operator at" in back


def test_a_saved_context_needs_neither_node_nor_token(mesh: Mesh, api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    token = mesh("token", "create", "laptop").out.strip()
    monkeypatch.delenv("MESH_NODE")
    monkeypatch.setenv("MESH_TOKEN", token)
    assert mesh("context", "add", "lab", f"127.0.0.1:{api.port}").code == 0
    monkeypatch.delenv("MESH_TOKEN")
    assert mesh("run", "--", "echo", "from afar") == Said(0, "from afar\n", "")
    assert mesh("context", "ls").out == f"* lab  127.0.0.1:{api.port}\n"
    saved = Path(os.environ["XDG_CONFIG_HOME"]) / "meshd/contexts.json"
    assert saved.stat().st_mode & 0o777 == 0o600
    assert mesh("token", "ls").code == 7
    assert mesh("--context", "nowhere", "ps").code == 3
    monkeypatch.setenv("MESH_NODE", "unix:/nowhere/api.sock")
    assert mesh("ps").code == 8
    assert mesh("--context", "lab", "ps").code == mesh("ps", "-c", "lab").code == 0, "a flag wins"
    both = mesh("-c", "lab", "ps", "--node", api.node)
    assert both.code == 2 and "give one of them" in both.err
    monkeypatch.delenv("MESH_NODE")
    assert mesh("context", "rm", "lab").code == 0


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("jbo ls", 2, "error: there is no command 'jbo'; did you mean `mesh job`?"),
        ("rum -- true", 2, "error: there is no command 'rum'; did you mean `mesh run`?"),
        ("logs last", 2, "error: there is no command 'logs'; did you mean `mesh job logs`?"),
        ("rm last", 2, "error: there is no command 'rm'; did you mean `mesh job cancel`?"),
        ("describe last", 2, "error: there is no command 'describe'; did you mean `mesh job show`?"),
        ("nodes", 2, "error: there is no command 'nodes'; did you mean `mesh node ls`?"),
        ("drain self", 2, "error: there is no command 'drain'; did you mean `mesh node drain`?"),
        ("explian last", 2, "error: there is no command 'explian'; did you mean `mesh job explain`?"),
        ("xyzzy", 2, "error: there is no command 'xyzzy'\ntry: mesh --help"),
        ("run --cpuu 3 -- x", 2, "error: no such option '--cpuu'"),
        ("run", 2, "error: nothing to run\ntry: mesh run -- COMMAND"),
        ("run --cpu lots -- x", 2, "error: needs.cpu: 'lots' is not a number of cores"),
        ("run --timeout soon -- x", 2, "error: timeout.run: 'soon' is not a duration"),
        ("run --on-lost maybe -- x", 2, "error: on_lost: 'maybe' is not one of rerun, wait, fail"),
        ("run --array 9-1 -- x", 2, "error: array.range: '9-1' is not a range"),
        ("run --input ../up=job.py -- x", 3, "error: inputs.../up: there is no file"),
        ("run --file nothing.yaml", 3, "error: there is no job file nothing.yaml"),
        ("run --each-line nothing -- x", 3, "error: array.each_line: there is no file"),
        ("job show nowhere", 3, "error: "),
        ("job show a/b", 2, "error: 'a/b' does not name a job"),
        ("job wait", 2, "error: which job?"),
        ("job ls -s done,finished", 2, "error: there is no state 'finished'\ntry: there are: waiting, ready"),
        ("run --backend wasm some.txt", 2, "error: some.txt is not a WebAssembly module"),
        ("run --backend wasm nothing.txt", 3, "error: there is no module nothing.txt"),
        (f"run --name {'x' * 5000} -- x", 2, "error: name: 5000 characters; at most 128\n"),
        ("run --name last -- x", 2, "error: name: 'last' is what the newest job is called"),
        ("run --retries -1 -- x", 2, "error: invalid value for '--retries': -1 is not in the range"),
        ("run --each-line empty.txt -- x", 2, "error: array.each_line: {here}/empty.txt is empty"),
        ("run --each-file nothing -- x", 3, "error: array.files: there is no directory {here}/nothing"),
        ("run --each-file nobody -- x", 2, "error: array.files: there is no file below {here}/nobody"),
        (
            "run --array 1-99999999999999999999 -- x",
            2,
            "error: array.range: '1-99999999999999999999' has too many tasks",
        ),
        ("run --array 99999999999999999999 -- x", 2, "error: array.range: '99999999999999999999' has too many tasks"),
        ("run --array 1-10:0 -- x", 2, "error: array.range: '1-10:0' has a step of 0"),
        ("run --array 1-3%0 -- x", 2, "error: array.at_once: '0' is not between 1 and 10000000"),
        ("run --array 1-3 --at-once 0 -- x", 2, "error: array.at_once: '0' is not between 1 and 10000000"),
        ("node show nowhere", 3, "error: this mesh has no node 'nowhere'\ntry: mesh node ls"),
        ("node invite --role king", 2, "error: --role 'king' is not server, worker or server,worker"),
        ("blob get zz", 2, "error: 'zz' is not the name of a blob"),
        ("--node nowhere ps", 2, "error: 'nowhere' is not an address"),
        ("--node unix:/nowhere/api.sock ps", 8, "error: no agent on this machine"),
        ("--node 127.0.0.1:1 ps", 7, "error: a node over the network needs a token"),
    ],
)
def test_what_is_wrong_is_said_on_stderr_with_its_exit_code(
    mesh: Mesh, tmp_path: Path, line: str, code: int, message: str
) -> None:
    (tmp_path / "some.txt").write_text("words")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nobody").mkdir()
    said = mesh(*line.split())
    assert (said.code, said.out) == (code, "") and said.err.startswith(message.replace("{here}", str(tmp_path)))


@pytest.mark.parametrize("text", ["[1, 2]", "{", "run: {args: [x]}\nrun2: 3", "a: &a [*a]", "x" * 2_000_000, "\0"])
def test_a_job_file_that_is_none_is_a_usage_error(mesh: Mesh, tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    said = mesh("submit", "--file", "job.yaml")
    assert said.code == 2 and said.err.startswith("error: ") and "Traceback" not in said.err


def test_colour_is_only_for_terminals(mesh: Mesh) -> None:
    assert "\x1b" not in mesh("ps").out + mesh("job", "show", "nowhere").err


def test_a_reader_that_leaves_is_no_error(api: Served) -> None:
    process = as_process(api, "job", "ls", "-o", "jsonl")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait(10)


def test_every_flag_has_an_environment_variable(mesh: Mesh, api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_SUBMIT_PRIORITY", "77")
    job = mesh("submit", "--", "echo", "x").out.strip()
    with Client([api.node]) as client:
        assert client.job(job).spec.priority == 77


def test_completion_knows_live_jobs(mesh: Mesh, api: Served) -> None:
    job = mesh("submit", "--", "echo", "x").out.strip()
    environment = {**os.environ, "_MESH_COMPLETE": "bash_complete", "COMP_WORDS": f"mesh job show {job[:20]}", "COMP_CWORD": "3", "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "mesh_cli.main"], env=environment, capture_output=True, timeout=30)
    assert job in done.stdout.decode()
    assert "_MESH_COMPLETE" in mesh("completion", "zsh").out


def test_the_command_starts_quickly_and_without_the_agents_libraries(api: Served) -> None:
    """CPU seconds of `mesh ps`, the best of three: 0.10-0.17 measured; 0.4 leaves room for a slow machine."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert as_process(api, "ps").wait(30) == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.4
    code = "import sys; from mesh_cli import main; main.run(['ps']); print(*sys.modules)"
    environment = {**os.environ, "MESH_NODE": api.node, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=30).stdout.decode().split()  # fmt: skip
    assert not {"trio", "libp2p", "cryptography", "rich", "yaml", "starlette", "blake3", "pysyncobj"} & set(loaded)
