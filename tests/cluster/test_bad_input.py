"""Bad input of every kind: its own clear message and exit code, and the agents live on (the module's fixture checks that)."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from meshd.client import Client
from meshd.errors import MeshError
from tests.cluster.conftest import eventually
from tests.guests import guest


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def run(mesh, *arguments, **options):
    done = mesh.cli("node2", "run", *arguments, **options)
    return done.returncode, done.stderr.decode(), done.stdout


def wasm(mesh, what, *arguments, flags=()):
    """Run a guest through `mesh run`; its exit code, what was said, and the task's outcome."""
    code, said, out = run(mesh, *flags, "--name", f"bad-{what}", str(guest()), what, *arguments)
    with mesh.client("node1") as client:
        outcome = client.task(f"bad-{what}").outcome
    return code, said, out, outcome


def test_a_file_that_is_no_wasm(mesh3, work):
    file = work / "not.wasm"
    file.write_bytes(b"\x7fELF not wasm at all")
    code, said, _ = run(mesh3, str(file))
    assert code == 2 and "is not a WebAssembly module" in said and "--backend process" in said
    # It begins like one, so only the node that compiles it can tell.
    file.write_bytes(b"\0asm\1\0\0\0 and then garbage")
    code, said, _ = run(mesh3, str(file))
    assert code == 5 and "not a valid WebAssembly module" in said and "try: mesh job show" in said


@pytest.mark.parametrize(
    ("what", "flags", "reason", "words"),
    [
        ("trap", (), "trap", "trap unreachable: wasm `unreachable` instruction executed"),
        ("recurse", (), "trap", "trap stack_overflow: call stack exhausted"),
        ("spin", ("--timeout", "1s"), "timeout", "still running after 1 s, its limit"),
        ("sleep", ("--timeout", "1s"), "timeout", "still running after 1 s, its limit"),
        ("spin", ("--fuel", "100000"), "fuel_limit", "used all of its 100000 units of fuel"),
        ("grow", ("--memory", "64Mi"), "memory_limit", "its memory reached"),
        ("flood", ("--output-max", "1Mi"), "output_limit", "stdout grew past its limit of 1048576 bytes"),
    ],
)
def test_wasm_that_misbehaves_is_told_apart(mesh3, what, flags, reason, words):
    arguments = {"sleep": ("60",)}.get(what, ())
    code, said, _, outcome = wasm(mesh3, what, *arguments, flags=flags)
    assert code == 5, said
    assert outcome.reason.value == reason, outcome
    assert words in said and "try: mesh job show" in said


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("sh", "-c", "while :; do :; done"), "timeout"),
        (("sleep", "60"), "timeout"),
        (("cat", "/dev/zero"), "output_limit"),
    ],
)
def test_a_command_that_misbehaves_is_stopped(mesh3, command, reason):
    with mesh3.client("node1") as client:
        job = client.submit({"run": {"args": list(command)}, "timeout": {"run": "2s"}, "output_max": "64Mi"})
        assert client.wait(job, timeout_s=30).state.value in ("failed", "timed_out")
        outcome = client.task(job).outcome
        assert outcome.reason.value == reason and outcome.message


def test_exit_codes_come_through(mesh3):
    assert run(mesh3, "--", "sh", "-c", "exit 200")[0] == 200
    assert run(mesh3, "--", "sh", "-c", "exit 3")[0] == 3
    code, said, _, outcome = wasm(mesh3, "exit", "200")
    assert code == 200 and outcome.reason.value == "exit" and outcome.exit_code == 200, said
    assert run(mesh3, "--", "sh", "-c", "kill -9 $$")[0] == 137


def test_a_command_that_is_not_there(mesh3):
    code, said, _ = run(mesh3, "--", "no-such-command-here")
    assert code == 5 and "command not found: 'no-such-command-here'" in said


def test_a_job_that_no_node_can_run_is_explained(mesh3):
    done = mesh3.cli("node2", "submit", "--cpu", "512", "--need-label", "gpu=yes", "--", "true")
    job = done.stdout.decode().strip()
    explained = mesh3.cli("node3", "job", "explain", job)
    text = explained.stdout.decode()
    assert all(name in text for name in ("node1", "node2", "node3"))
    assert text.count("cpu 512") == 3 and "gpu" in text and "waiting will not help" in text
    assert explained.returncode == 4
    assert mesh3.cli("node1", "job", "cancel", job).returncode == 0


def test_a_spec_of_100_mb_is_refused_before_it_is_read(mesh3, work):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(mesh3.home("node1") / "api.sock"))
        connection.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 104857600\r\n\r\n{"
        )
        connection.settimeout(10)
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]
    file = work / "vast.yaml"
    with file.open("wb") as vast:
        vast.write(b"run: {args: [echo]}\n#")
        vast.truncate(100 << 20)
    code, said, _ = run(mesh3, "--file", str(file))
    assert code == 2 and "is over 1048576 bytes" in said and "each_line" in said


@pytest.mark.parametrize("path", ["../out", "/etc/passwd", "a/../../b", "nul\x00l"])
def test_a_path_that_leaves_the_working_directory(mesh3, path):
    with mesh3.client("node1") as client, pytest.raises(MeshError) as caught:
        client.submit({"run": {"args": ["true"]}, "inputs": {path: {"text": "x"}}})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("run",), 2),
        (("run", "--cpuu", "1", "--", "true"), 2),
        (("job", "show", "0000dead"), 3),
        (("job", "logs", "no-such-name"), 3),
        (("blob", "get", "f" * 64), 3),
        (("node", "show", "nobody"), 3),
        (("submit", "--memory", "lots", "--", "true"), 2),
        (("submit", "--input", "a=/no/such/file", "--", "true"), 3),
        (("submit", "--input", "../a=/etc/hostname", "--", "true"), 2),
        (("submit", "--output", "/etc/passwd", "--", "true"), 2),
        (("frobnicate",), 2),
    ],
)
def test_a_wrong_command_line_has_its_exit_code_and_says_what_to_try(mesh3, arguments, code):
    done = mesh3.cli("node1", *arguments)
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr and done.stderr.strip()


def test_an_unreachable_mesh_is_exit_code_8(mesh3, work):
    done = mesh3.cli("node1", "--node", f"unix:{work}/nobody.sock", "ps")
    assert done.returncode == 8 and b"try" in done.stderr


# --- the wire --------------------------------------------------------------------------------------------------------


def peer_port(mesh, name):
    with mesh.client(name) as client:
        [address] = [a for a in client.node(name).member.addresses if "127.0.0.1" in a]
    return int(address.rsplit("/", 1)[1])


def works(mesh):
    with mesh.client("node3", "node2") as client:
        assert client.wait(client.submit({"run": {"args": ["true"]}}), timeout_s=30).state.value == "done"


def test_random_bytes_and_half_open_connections_on_every_port(mesh3):
    ports = [peer_port(mesh3, name) for name in ("node1", "node2", "node3")]
    open_ones = []
    for number in range(300):
        connection = socket.create_connection(("127.0.0.1", ports[number % 3]), timeout=5)
        if number % 3 == 0:
            open_ones.append(connection)  # says nothing, stays
            continue
        with suppress(OSError):
            connection.sendall(os.urandom(4096))
        (open_ones.append if number % 2 else lambda c: c.close())(connection)
    for name in ("node1", "node2", "node3"):
        for _ in range(30):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(mesh3.home(name) / "api.sock"))
            connection.sendall(os.urandom(512))
            open_ones.append(connection)
    works(mesh3)
    for connection in open_ones:
        connection.close()


def test_1000_connects_and_disconnects_leave_nothing_and_refuse_nobody(mesh3):
    pid, port = mesh3.agents["node3"].pid, peer_port(mesh3, "node3")
    works(mesh3)
    files, memory = open_files(pid), resident(pid)
    for _ in range(1000):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(mesh3.home("node3") / "api.sock"))
    eventually(lambda: open_files(pid) <= files + 3, within_s=30)
    assert resident(pid) - memory < 20 << 20
    works(mesh3)


def open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_paused_member_is_seen_dropped_and_taken_back(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    leader = mesh.leader()
    paused = next(name for name in mesh.agents if name != leader)
    rest = [name for name in mesh.agents if name != paused]
    with mesh.client(*rest) as client:
        health = lambda: next(node.health for node in client.cluster().nodes if node.name == paused)  # noqa: E731
        eventually(lambda: health() == "alive", within_s=20)
        os.kill(mesh.agents[paused].pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            eventually(lambda: health() == "dead", within_s=15)
            eventually(lambda: client.node(paused).session == "ended", within_s=20)
            assert client.wait(client.submit({"run": {"args": ["true"]}}), timeout_s=20).state.value == "done"
            eventually(lambda: time.monotonic() - began >= 20, within_s=25)
        finally:
            os.kill(mesh.agents[paused].pid, signal.SIGCONT)
        eventually(lambda: health() == "alive", within_s=10)
        eventually(lambda: client.node(paused).session == "live", within_s=10)
    mesh.wait_survives(1)
    with mesh.client(paused) as back:
        assert back.wait(back.submit({"run": {"args": ["true"]}}), timeout_s=30).state.value == "done"


def test_a_wrong_token_over_tls_is_not_allowed_and_a_right_one_is(make_mesh):
    mesh = make_mesh()
    mesh.form("node1", flags=("--api", "127.0.0.1:0"))
    with mesh.client("node1") as client:
        token = client.create_token("ci", "operator")
        address = eventually(lambda: client.node("node1").member.api_address, within_s=20)
    with Client([f"https://{address}"], token=token) as over_tls:
        job = over_tls.submit({"run": {"args": ["echo", "over tls"]}})
        assert over_tls.wait(job, timeout_s=20).state.value == "done"
    secret, _, pin = token.rpartition("_")
    for wrong, code in ((f"{secret[:-4]}AAAA_{pin}", 7), ("mesh_x_" + "0" * 64, 7), ("nonsense", 7), ("", 7)):
        done = mesh.cli("node1", "--node", address, "ps", token=wrong)
        assert done.returncode == code and done.stderr.startswith(b"error: ") and b"try: " in done.stderr, done
    with mesh.client("node1") as client:
        viewer = client.create_token("eyes", "viewer")
    done = mesh.cli("node1", "--node", address, "run", "--", "true", token=viewer)
    assert done.returncode == 7, done
    assert mesh.cli("node1", "--node", address, "ps", token=viewer).returncode == 0

    # Its port is a port like any other: bytes that are no TLS, a handshake never finished, a request never ended.
    host, _, port = address.rpartition(":")
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    standing = []
    for number in range(150):
        connection = socket.create_connection((host, int(port)), timeout=5)
        standing.append(connection)
        if number % 3 == 0:
            with suppress(OSError):
                connection.sendall(os.urandom(2000))
        elif number % 30 == 1:
            connection = unverified.wrap_socket(connection)
            connection.sendall(b"GET /v1/jobs HTTP/1.1\r\nAuthorization: Bearer ")
            standing.append(connection)
    with Client([f"https://{address}"], token=token) as over_tls:
        assert over_tls.wait(over_tls.submit({"run": {"args": ["true"]}}), timeout_s=20).state.value == "done"
    for connection in standing:
        connection.close()
    assert mesh.agents["node1"].poll() is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--cpu", "nan"), "error: --cpu: 'nan'"),
        (("--slots", "-3"), "error: --slots: '-3'"),
        (("--backend", "docker"), "error: --backend: there is no backend 'docker'\ntry:   there are: process, wasm"),
        (("--api", "127.0.0.1:bad"), "error: --api: '127.0.0.1:bad' is not HOST:PORT"),
        (("--resource", "gpu"), "error: --resource: 'gpu' is not key=value"),
    ],
)
def test_up_refuses_what_makes_no_sense_before_it_founds_anything(tmp_path, flags, words):
    command = [sys.executable, "-m", "meshd.main", "up", "--data-dir", str(tmp_path / "d"), "--listen", "127.0.0.1:0"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(words) and not (tmp_path / "d").exists()


def test_a_founder_that_comes_back_alone_says_how_others_join(make_mesh):
    mesh = make_mesh("node1")
    said = lambda: (mesh.home("node1") / "agent.log").read_text()  # noqa: E731
    assert "meshd up --join meshd1-" in said() and "nobody else" not in said()
    mesh.kill("node1", signal.SIGTERM)
    mesh.start("node1")
    assert "nobody else is in this mesh yet: `mesh node invite`" in said()
    with mesh.client("node1") as client:
        mesh.start("node2", "--join", client.invite())
    mesh.kill("node1", signal.SIGTERM)
    mesh.start("node1")
    assert said().count("nobody else") == 1
