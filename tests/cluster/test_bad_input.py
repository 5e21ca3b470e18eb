"""Bad input of every kind: its own clear message and exit code, and the agents live on (the module's fixture checks that)."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from meshd.client import Client
from meshd.errors import MeshError
from meshd.net.identity_key import KeyPair
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
    code, said, out = run(mesh, *flags, "--name", f"bad-{what}", str(guest()), "--", what, *arguments)
    with mesh.client("node1") as client:
        outcome = client.task(f"bad-{what}").outcome
    return code, said, out, outcome


def test_a_file_that_is_no_wasm(mesh3, work):
    file = work / "not.wasm"
    file.write_bytes(b"\x7fELF not wasm at all")
    code, said, _ = run(mesh3, str(file))
    assert code not in (0, 1) and "wasm" in said


@pytest.mark.parametrize(
    ("what", "flags", "reason"),
    [
        ("trap", (), "trap"),
        ("loop", ("--timeout", "1s"), "timeout"),
        ("sleep", ("--timeout", "1s"), "timeout"),
        ("grow", ("--memory", "64Mi"), "memory_limit"),
    ],
)
def test_wasm_that_misbehaves_is_told_apart(mesh3, what, flags, reason):
    arguments = {"sleep": ("60",)}.get(what, ())
    code, said, _, outcome = wasm(mesh3, what, *arguments, flags=flags)
    assert code == 5, said
    assert outcome.reason.value == reason, outcome
    assert reason.replace("_", " ") in said.replace("_", " "), said


def test_wasm_that_writes_endless_output(mesh3):
    with mesh3.client("node1") as client:
        job = client.submit({"run": {"module": str(guest()), "args": ["flood"]}})
        view = client.wait(job, timeout_s=60)
        assert view.state.value == "failed" and client.task(job).outcome.reason.value == "output_limit"


def test_exit_codes_come_through(mesh3):
    assert run(mesh3, "--", "sh", "-c", "exit 200")[0] == 200
    assert run(mesh3, "--", "sh", "-c", "exit 3")[0] == 3
    code, said, _, outcome = wasm(mesh3, "exit", "200")
    assert code != 0 and "200" in (said + outcome.message), (code, said, outcome)


def test_a_command_that_is_not_there(mesh3):
    code, said, _ = run(mesh3, "--", "no-such-command-here")
    assert code == 5 and "no-such-command-here" in said


def test_a_job_that_no_node_can_run_is_explained(mesh3):
    done = mesh3.cli("node2", "submit", "--cpu", "512", "--need-label", "gpu=yes", "--", "true")
    job = done.stdout.decode().strip()
    explained = mesh3.cli("node3", "job", "explain", job)
    text = explained.stdout.decode()
    assert all(name in text for name in ("node1", "node2", "node3"))
    assert "cpu" in text and "gpu" in text
    assert explained.returncode == 4
    assert mesh3.cli("node1", "job", "cancel", job).returncode == 0


def test_a_spec_of_100_mb_is_refused_before_it_is_read(mesh3):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(mesh3.home("node1") / "api.sock"))
        connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 104857600\r\n\r\n{")
        connection.settimeout(10)
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


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
        try:
            connection.sendall(os.urandom(4096))
        except OSError:
            pass
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
    with Client([f"https://{address}"], token=f"{secret[:-4]}AAAA_{pin}") as wrong, pytest.raises(MeshError) as caught:
        wrong.cluster()
    assert caught.value.exit_code == 7
    stranger = KeyPair.generate().node_id
    assert stranger not in mesh.ids().values()
