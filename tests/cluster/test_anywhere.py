"""A job goes in at any node and comes out at any node, by the command line and by HTTP."""

from __future__ import annotations

import http.client
import json
import socket

import pytest

NAMES = ("node1", "node2", "node3")


@pytest.mark.parametrize("submitted_at", NAMES)
def test_submit_at_each_node_read_at_each_node_by_command_line(mesh3, submitted_at):
    done = mesh3.cli(submitted_at, "submit", "--", "echo", f"hello from {submitted_at}")
    assert done.returncode == 0, done.stderr.decode()
    job = done.stdout.decode().strip()
    for read_at in NAMES:
        assert mesh3.cli(read_at, "job", "wait", job).returncode == 0
        assert mesh3.cli(read_at, "job", "logs", job).stdout == f"hello from {submitted_at}\n".encode()
        assert mesh3.cli_json(read_at, "job", "show", job)["state"] == "done"
        assert job in mesh3.cli(read_at, "ps", "-q").stdout.decode().split()


@pytest.mark.parametrize("submitted_at", NAMES)
def test_submit_at_each_node_read_at_each_node_by_http(mesh3, submitted_at):
    spec = {"run": {"args": ["sh", "-c", "echo out; echo err >&2"]}}
    job = request(mesh3, submitted_at, "POST", "/v1/jobs", {"spec": spec})["id"]
    for read_at in NAMES:
        version = 0
        while not (view := request(mesh3, read_at, "GET", f"/v1/jobs/{job}/wait?after={version}&timeout=10"))[
            "is_final"
        ]:
            version = view["version"]
        assert view["state"] == "done" and view["counts"]["done"] == 1
        for stream in ("stdout", "stderr"):
            assert raw(mesh3, read_at, f"/v1/jobs/{job}/tasks/0/logs?stream={stream}") == f"{stream[3:]}\n".encode()


def test_a_read_right_after_a_submission_at_another_node_always_sees_it(mesh3):
    """Two hundred times, over every pair of nodes: a read that skipped the barrier misses some of them."""
    spec = {"run": {"args": ["true"]}, "needs": {"labels": "name=nobody"}, "labels": {"read": "at-once"}}
    clients = [mesh3.client(name) for name in NAMES]
    for turn in range(200):
        submitter, reader = clients[turn % 3], clients[(turn + 1 + turn // 3 % 2) % 3]
        job = submitter.submit(spec)
        match turn % 4:
            case 0:
                assert reader.job(job).id == job
            case 1:
                assert [view.id for view in reader.jobs(limit=1)] == [job]
            case 2:
                assert [task.task for task in reader.tasks(job)] == [0]
            case _:
                assert reader.explain(job).state.value == "ready"
        submitter.cancel(job)
        assert reader.job(job).is_final, "and a cancellation as well"
    for client in clients:
        client.close()


def test_every_node_tells_the_same_story_of_the_mesh(mesh3):
    told = [mesh3.cli_json(name, "cluster", "status") for name in NAMES]
    assert {each["leader"] for each in told} == {told[0]["leader"]}
    assert all(each["failures_survived"] == 1 and len(each["voters"]) == 3 for each in told)
    for name in NAMES:
        assert mesh3.cli(name, "node", "ls").stdout.decode().count("alive") == 3


def test_output_is_followed_live_at_another_node(mesh3):
    with mesh3.client("node1") as one, mesh3.client("node2") as two:
        job = one.submit(
            {"run": {"args": ["sh", "-c", "echo first; sleep 30; echo second"]}, "timeout": {"run": "60s"}}
        )
        pieces = two.follow(job, streams=["stdout"])
        assert next(pieces).data == b"first\n", "seen while the job still runs"
        two.cancel(job)
        assert two.wait(job, timeout_s=20).state.value == "cancelled"


def test_openapi_names_every_path_that_is_used(mesh3):
    document = request(mesh3, "node2", "GET", "/openapi.json")
    assert document["openapi"].startswith("3.1") and "/v1/jobs" in document["paths"]


# --- plain HTTP, as any program would ---------------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("meshd", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self._path)


def ask(mesh, at, method, path, body=None):
    connection = UnixConnection(str(mesh.home(at) / "api.sock"))
    payload = None if body is None else json.dumps(body).encode()
    connection.request(method, path, payload, {"content-type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    assert answer.status < 300, data
    return data


def request(mesh, at, method, path, body=None):
    return json.loads(ask(mesh, at, method, path, body))


def raw(mesh, at, path):
    return ask(mesh, at, "GET", path)
