"""Joining a running mesh by one address, leaving it with nothing lost, and every way in which a start is refused."""

from __future__ import annotations

import shutil
import signal
import socket
import time

import pytest

from meshd.errors import StartRefused
from tests.cluster.conftest import eventually


def test_a_node_joins_by_one_address_and_runs_a_job_within_10_s(make_mesh):
    mesh = make_mesh("node1")
    with mesh.client("node1") as client:
        invite = client.invite(uses=1)
        began = time.monotonic()
        mesh.start("late", "--join", invite, "--label", "place=here", "--label", "zone=east")
        job = client.submit({"run": {"args": ["sh", "-c", "echo $MESHD_NODE"]}, "needs": {"labels": "place=here"}})
        assert client.wait(job, timeout_s=20).state.value == "done"
        assert time.monotonic() - began < 10
        assert client.output(job).decode().strip() == mesh.ids()["late"]
        assert client.node("late").member.zone == "east"
        mesh.kill("late", signal.SIGTERM)
        mesh.start("late", "--label", "zone=west")
        eventually(lambda: client.node("late").member.zone == "west", within_s=10)


def test_a_node_leaves_by_drain_and_remove_with_nothing_lost(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    with mesh.client("node2", "node3") as client:
        job = client.submit(
            {
                "run": {"args": ["sh", "-c", "sleep 1; head -c 9000 /dev/zero > o"]},
                "array": {"range": "1-9"},
                "outputs": ["o"],
            }
        )
        eventually(lambda: client.node("node1").leased, within_s=20)
        drained = mesh.cli("node2", "node", "drain", "node1", timeout_s=90)
        assert drained.returncode == 0, drained.stderr.decode()
        assert b"safe" in drained.stdout + drained.stderr
        assert not client.node("node1").leased and client.node("node1").member.is_draining
        removed = mesh.cli("node2", "node", "remove", "node1", "--yes")
        assert removed.returncode == 0, removed.stderr.decode()
        again = mesh.cli("node3", "node", "remove", mesh_id_of(mesh, "node1"), "--yes")
        assert again.returncode == 0, "removing is idempotent"
        eventually(lambda: mesh.agents["node1"].poll() is not None, within_s=20)
        assert "removed from its mesh" in (mesh.home("node1") / "agent.log").read_text()
        assert client.wait(job, timeout_s=60).state.value == "done"
        assert all(task.attempt == 1 for task in client.tasks(job)), "a drain lets what runs finish"
        assert client.get_directory(client.outputs(job).blob.hash, mesh.directory / "o") == 9
        text, code = refused(mesh, "node1")
        assert "was removed" in text and code == 7


def mesh_id_of(mesh, name):
    from meshd.net.identity_key import KeyPair

    return KeyPair.load(mesh.home(name) / "identity.key").node_id


def test_a_member_comes_back_without_an_invite_when_every_address_has_changed(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    before = mesh.ids()
    for name in ("node3", "node2"):
        mesh.kill(name, signal.SIGTERM)
    for name in ("node2", "node3"):
        mesh.start(name, "--listen", "127.0.0.1:0")
    mesh.wait_survives(1)
    assert mesh.ids() == before


def test_a_worker_only_node_never_holds_the_log(make_mesh):
    mesh = make_mesh("node1")
    with mesh.client("node1") as client:
        invite = client.invite(roles=["worker"], uses=3)
        for name in ("w1", "w2", "w3"):
            mesh.start(name, "--join", invite)
        assert client.cluster().voters == (mesh.ids()["node1"],)
        assert not (mesh.home("w1") / "mesh.key").exists()
        with mesh.client("w1") as worker:
            job = worker.submit({"run": {"args": ["echo", "via a worker"]}})
            assert worker.wait(job, timeout_s=20).state.value == "done"
            assert worker.output(job) == b"via a worker\n"


# --- refused ---------------------------------------------------------------------------------------------------------


def refused(mesh, name, *flags):
    with pytest.raises(StartRefused) as caught:
        mesh.start(name, *flags)
    text = str(caught.value)
    assert "Traceback" not in text, text
    assert "try: " in text, "an error names the next step"
    return text, mesh.agents[name].returncode


def test_every_wrong_start_has_its_own_words_and_the_mesh_lives_on(make_mesh):
    mesh = make_mesh("node1")
    other = make_mesh("elsewhere")
    with mesh.client("node1") as client, other.client("elsewhere") as foreign:
        spent = client.invite(uses=1)
        mesh.start("first", "--join", spent)
        text, code = refused(mesh, "second", "--join", spent)
        assert "used up" in text and code == 7
        short = client.invite(uses=1, lifetime_ms=1)
        eventually(lambda: client.submit({"run": {"args": ["true"]}}), within_s=5)  # the state's clock moves on
        text, code = refused(mesh, "third", "--join", short)
        assert "expired" in text and code == 7
        text, code = refused(mesh, "fourth", "--join", "meshd1-nonsense")
        assert "damaged" in text and code == 2
        # An invite whose mesh was changed: the member that it names belongs to another one.
        from msgspec.structs import replace

        from meshd.admission import invites

        real = invites.parse(foreign.invite(uses=1))
        text, code = refused(mesh, "fifth", "--join", str(replace(real, mesh="0" * 20)))
        assert "belongs to" in text and code == 7
        text, code = refused(mesh, "first2", "--join", str(replace(invites.parse(client.invite()), secret=b"x" * 18)))
        assert code == 7, text
        # A member of one mesh cannot join another from the same directory.
        mesh.kill("first", signal.SIGTERM)
        text, code = refused(mesh, "first", "--join", foreign.invite())
        assert "belongs to mesh" in text
        assert client.wait(client.submit({"run": {"args": ["true"]}}), timeout_s=20).state.value == "done"


def test_a_port_in_use_a_locked_and_an_unreadable_directory_are_refused(make_mesh, tmp_path):
    mesh = make_mesh("node1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        text, code = refused(mesh, "p", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        assert "in use" in text and code == 1
    running = mesh.agents["node1"]
    text, code = refused(mesh, "node1")
    assert f"pid {running.pid}" in text and code == 1
    mesh.agents["node1"] = running
    mesh.home("bad").mkdir()
    (mesh.home("bad") / "identity.key").write_bytes(b"not a key")
    (mesh.home("bad") / "identity.key").chmod(0o600)
    text, code = refused(mesh, "bad")
    assert "identity.key" in text and code == 1


def test_an_identity_without_its_journal_is_refused(make_mesh):
    mesh = make_mesh("node1")
    mesh.kill("node1", signal.SIGTERM)
    shutil.rmtree(mesh.home("node1") / "raft")
    text, code = refused(mesh, "node1")
    assert "journal" in text and code == 1


def test_a_copied_directory_is_refused_while_the_original_runs(make_mesh):
    mesh = make_mesh("node1", "node2")
    shutil.copytree(mesh.home("node2"), mesh.home("copy"), ignore=shutil.ignore_patterns("lock", "api.sock"))
    text, code = refused(mesh, "copy")
    assert "running twice" in text and code == 1
    with mesh.client("node2") as client:
        assert client.wait(client.submit({"run": {"args": ["true"]}}), timeout_s=20).state.value == "done"


def test_the_sole_voter_drains_by_handing_over_to_the_other_server(make_mesh):
    mesh = make_mesh("node1", "node2")
    with mesh.client("node2") as client:
        assert client.cluster().voters == (mesh.ids()["node1"],)
        job = client.submit({"run": {"args": ["true"]}})
        drained = mesh.cli("node2", "node", "drain", "node1", timeout_s=60)
        assert drained.returncode == 0, drained.stderr.decode()
        assert mesh.agents["node1"].poll() is None, "the agent that is drained lives on until it is stopped"
        mesh.kill("node1", signal.SIGTERM)
        assert client.cluster().voters == (mesh.ids()["node2"],)
        assert client.wait(job, timeout_s=20).state.value == "done"
        assert client.wait(client.submit({"run": {"args": ["true"]}}), timeout_s=20).state.value == "done"


def test_every_server_lets_every_other_speak_raft_however_the_joins_fell(make_mesh):
    """Three servers that joined one after the other, with commands in between: any one of them may be lost."""
    mesh = make_mesh("node1")
    with mesh.client("node1") as client:
        invite = client.invite(uses=2)
        for name in ("node2", "node3"):
            client.submit({"run": {"args": ["true"]}})
            mesh.start(name, "--join", invite)
    mesh.wait_survives(1)
    mesh.kill("node1")
    with mesh.client("node2", "node3") as client:
        assert client.wait(client.submit({"run": {"args": ["true"]}}), timeout_s=20).state.value == "done"
        for name in ("node2", "node3"):
            # Before it is ready a stream may come to a part of it that has not started yet; it is dialled again.
            _, _, since_ready = (mesh.home(name) / "agent.log").read_text().partition("\nready\n")
            assert since_ready and "streams_refused" not in since_ready
