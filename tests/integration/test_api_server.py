"""What an unfriendly client can do to the API's server: nothing to anybody else."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from meshd.api import http1, server, trees
from meshd.api.app import ENDPOINTS
from meshd.api.server import serve
from meshd.client import Client
from meshd.errors import StartRefused
from meshd.testing.face import FakeFace
from tests.integration.api_server import Served, make_tls, served, short_directory

GET_ME = b"GET /v1/me HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def api() -> Iterator[Served]:
    with served() as it:
        yield it


def connect(api: Served) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(api.socket))
    return client


def is_well(api: Served) -> bool:
    with Client([api.node]) as client:
        return client.me().name == "fake"


def read_all(client: socket.socket) -> bytes:
    data = b""
    try:
        while piece := client.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_requests_of_one_connection_are_answered_in_turn(api: Served) -> None:
    client = connect(api)
    client.sendall(GET_ME * 3)
    data = b""
    while data.count(b'"role":"admin"') < 3:
        data += client.recv(65536)
    assert data.count(b"HTTP/1.1 200") == 3


def test_noise_is_answered_and_cut_off(api: Served) -> None:
    noise = random.Random(7)
    for size in (1, 100, 10_000, 200_000):
        client = connect(api)
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(noise.randbytes(size) + b"\r\n\r\n")
        answer = read_all(client)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert is_well(api)


def test_a_head_without_end_is_refused_by_its_size(api: Served) -> None:
    client = connect(api)
    client.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * (64 << 10))
    assert read_all(client).startswith(b"HTTP/1.1 431")


def test_a_large_body_is_refused_before_it_is_sent(api: Served) -> None:
    client = connect(api)
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
    client.sendall(head)
    answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413") and b'"too_large"' in answer + client.recv(65536)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_large_header_in_a_tar_is_refused_before_it_is_sent(api: Served, kind: bytes) -> None:
    header = tarfile.TarInfo("large")
    header.type, header.size = kind, 1 << 30
    client = connect(api)
    client.sendall(b"POST /v1/trees HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (2 << 30))
    client.sendall(header.tobuf(tarfile.GNU_FORMAT) + bytes(64 << 10))
    assert client.recv(65536).startswith(b"HTTP/1.1 413")


def test_slow_uploads_do_not_make_the_next_one_wait_for_them(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "PLACE_S", 0.1)
    slow = [connect(api) for _ in range(trees.UPLOADS_AT_ONCE)]
    for client in slow:
        client.sendall(b"POST /v1/trees HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nslow")
    deadline = time.monotonic() + 10
    while not (answer := post_tar(api)).startswith(b"HTTP/1.1 429") and time.monotonic() < deadline:
        pass
    assert b'"busy"' in answer
    for client in slow:
        client.close()
    while not (answer := post_tar(api)).startswith(b"HTTP/1.1 201") and time.monotonic() < deadline:
        pass
    assert answer.startswith(b"HTTP/1.1 201")


def test_who_sends_half_a_request_is_dropped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "HEAD_S", 0.3)
    monkeypatch.setattr(http1, "STALL_S", 0.3)
    with served() as api:
        head, body = connect(api), connect(api)
        head.sendall(b"GET /v1/me HT")
        body.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert is_well(api)
        assert read_all(head) == b"" and b"ended before its body did" in read_all(body)
        assert is_well(api)


def test_who_does_not_read_is_dropped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "STALL_S", 0.3)
    with served() as api:
        blob = api.face.put(bytes(20 << 20))
        client = connect(api)
        client.sendall(f"GET /v1/blobs/{blob.hash} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert is_well(api)
        deadline = time.monotonic() + 10
        while open_connections(api) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert open_connections(api) == 0
        assert len(read_all(client)) < 20 << 20


def test_a_stuck_reader_does_not_hold_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STOP_S", 0.3)
    with served() as api:
        blob = api.face.put(bytes(20 << 20))
        stuck, idle = connect(api), connect(api)
        stuck.sendall(f"GET /v1/blobs/{blob.hash} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        idle.sendall(GET_ME)
        assert stuck.recv(1) and idle.recv(1)
        begun = time.monotonic()
    assert time.monotonic() - begun < 3
    assert not api.socket.exists()


def test_a_kept_connection_that_is_idle_does_not_hold_the_stop() -> None:
    with served() as api:
        idle = connect(api)
        idle.sendall(GET_ME)
        assert idle.recv(1)
        begun = time.monotonic()
    assert time.monotonic() - begun < server.STOP_S / 2


def test_an_answer_that_is_under_way_is_finished_at_the_stop() -> None:
    with served() as api:
        client = connect(api)
        client.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 44\r\n\r\n")
        # Whoever asks for the body has begun with the request.
        assert client.recv(1024).startswith(b"HTTP/1.1 100")
        client.sendall(b'{"spec":{"run":')
        api.do(api._scope.cancel)
        client.sendall(b'{"args":["echo","hello"]}}  }')
        assert b"HTTP/1.1 201" in read_all(client)


def test_a_thousand_connects_and_disconnects_leave_nothing_behind(api: Served) -> None:
    assert is_well(api)
    before = len(os.listdir("/proc/self/fd"))
    for turn in range(1000):
        client = connect(api)
        if turn % 3 == 0:
            client.sendall(GET_ME[: turn % len(GET_ME)])
        client.close()
    assert is_well(api)
    deadline = time.monotonic() + 10
    while open_connections(api) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert open_connections(api) == 0
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_more_connections_than_there_is_room_for_wait_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 4)
    monkeypatch.setattr(http1, "HEAD_S", 0.3)
    with served() as api:
        silent = [connect(api) for _ in range(20)]
        assert is_well(api)
        assert all(read_all(client) == b"" for client in silent)


def test_a_follower_that_leaves_ends_its_stream(api: Served) -> None:
    with Client([api.node]) as client:
        job = client.submit({"run": {"args": ["hang"]}})
    follower = connect(api)
    follower.sendall(f"GET /v1/jobs/{job}/tasks/0/logs?follow=true HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n".encode())  # fmt: skip
    assert follower.recv(10)
    watcher = connect(api)
    watcher.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
    assert watcher.recv(10)
    follower.close()
    watcher.close()
    deadline = time.monotonic() + 10
    while open_connections(api) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert open_connections(api) == 0


@pytest.mark.parametrize("more", [b"", GET_ME])
def test_followers_that_leave_before_the_first_byte_leave_nothing_behind(api: Served, more: bytes) -> None:
    """Also those that have sent their next request already."""
    with Client([api.node]) as client:
        job = client.submit({"run": {"args": ["hang"]}})
    before = tasks_living(api)
    followers = [connect(api) for _ in range(20)]
    for follower in followers:
        follower.sendall(f"GET /v1/jobs/{job}/tasks/0/logs?follow=true HTTP/1.1\r\nHost: x\r\n\r\n".encode() + more)
    deadline = time.monotonic() + 10
    while tasks_living(api) < before + 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert open_connections(api) >= 20
    for follower in followers:
        follower.close()
    while tasks_living(api) > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tasks_living(api) <= before and open_connections(api) == 0


def test_an_answer_that_has_not_begun_can_still_be_an_error(api: Served) -> None:
    client = connect(api)
    client.sendall(b"GET /v1/jobs/" + b"0" * 26 + b"/tasks/0/logs?follow=true HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 404")
    client.sendall(GET_ME)
    assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_the_socket_is_the_owners_alone(api: Served) -> None:
    assert stat.S_IMODE(api.socket.stat().st_mode) == 0o600
    assert sorted(path.name for path in api.directory.iterdir()) == ["api.sock"]


def test_whoever_is_not_the_owner_needs_a_token_on_the_socket_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_trusted_user", lambda accepted: "")
    with served() as api:
        client = connect(api)
        client.sendall(GET_ME)
        assert client.recv(65536).startswith(b"HTTP/1.1 403")


def test_guessing_tokens_is_slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_trusted_user", lambda accepted: "")
    with served() as api:
        client = connect(api)
        statuses = []
        for guess in range(25):
            client.sendall(GET_ME.replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer mesh_{guess}_x\r\n\r\n".encode()))
            statuses.append(client.recv(65536)[9:12])
        assert statuses[:20] == [b"403"] * 20 and statuses[20:] == [b"429"] * 5


async def test_a_socket_that_a_killed_agent_left_is_replaced() -> None:
    with short_directory() as directory:
        path = directory / "api.sock"
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(path))
        dead.close()
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, FakeFace(), socket_path=path))
            async with await trio.open_unix_socket(str(path)) as client:
                await client.send_all(GET_ME)
                assert (await client.receive_some()).startswith(b"HTTP/1.1 200")
            nursery.cancel_scope.cancel()


async def test_a_port_in_use_and_a_path_too_long_are_clear_errors() -> None:
    with short_directory() as directory, socket.create_server(("127.0.0.1", 0)) as taken:
        _, context = make_tls(directory)
        port = taken.getsockname()[1]
        with pytest.raises(StartRefused, match=f"cannot serve the API on 127.0.0.1:{port}"):
            await serve(FakeFace(), socket_path=directory / "api.sock", tcp=("127.0.0.1", port), tls=context)
        with pytest.raises(StartRefused, match="cannot open the API socket"):
            await serve(FakeFace(), socket_path=directory / ("d" * 120))


def test_half_a_tls_handshake_and_plain_http_on_the_tls_port_hurt_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.3)
    with served(is_remote=True) as api:
        silent, plain = (socket.create_connection(("127.0.0.1", api.port), timeout=10) for _ in range(2))
        plain.sendall(GET_ME)
        assert read_all(silent) == b"" and b"HTTP" not in read_all(plain)
        assert is_well(api)


def test_the_openapi_document_is_complete_and_its_references_resolve(api: Served) -> None:
    client = connect(api)
    client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    document = json.loads(read_all(client).partition(b"\r\n\r\n")[2])
    described = {(method.upper(), path) for path, rows in document["paths"].items() for method in rows}
    assert document["openapi"] == "3.1.0" and described == {(row.method, row.path) for row in ENDPOINTS}
    ids = [row["operationId"] for rows in document["paths"].values() for row in rows.values()]
    assert len(set(ids)) == len(ids)
    for reference in references(document):
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        assert found
    assert {"JobView", "JobSpec", "TaskView", "EventView", "DrainView", "ClusterStatus"} <= set(document["components"]["schemas"])  # fmt: skip


def test_what_does_not_exist_is_said_as_json(api: Served) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("POST", "/v1/me", 405), ("GET", "/v1/jobs?limt=3", 400)):
        client = connect(api)
        client.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = read_all(client)
        assert answer.startswith(f"HTTP/1.1 {status}".encode())
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_bug_is_answered_and_hurts_no_other_request(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(api.face, "cluster_status", broken)
    client = connect(api)
    client.sendall(b"GET /v1/cluster HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert read_all(client).startswith(b"HTTP/1.1 500")
    assert is_well(api)


def post_tar(api: Served) -> bytes:
    tar = tarfile.TarInfo("file").tobuf() + bytes(1024)
    client = connect(api)
    client.sendall(
        b"POST /v1/trees HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(tar) + tar
    )
    return read_all(client)


def tasks_living(api: Served) -> int:
    counted = api.do(lambda: trio.lowlevel.current_statistics().tasks_living)
    assert isinstance(counted, int)
    return counted


def open_connections(api: Served) -> int:
    """Accepted unix connections of this process's server, as the kernel counts them."""
    rows = Path("/proc/net/unix").read_text().splitlines()
    # Flag 00010000 is the listener; connected ones carry the listener's path on the server's side.
    return sum(1 for row in rows if row.endswith(f"/{_bound_name(api)}") and " 00010000 " not in row)


def _bound_name(api: Served) -> str:
    """The kernel remembers the name it was bound under, before it was renamed."""
    return f"{api.directory.name}/.{api.socket.name}"


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)
