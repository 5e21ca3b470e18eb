"""A server is removed, and with it a copy of the mesh's key: what was given out before goes on, the copy is worth nothing."""

from __future__ import annotations

import signal

import pytest

from meshd.client import Client
from meshd.errors import StartRefused
from tests.cluster.conftest import eventually


def test_after_a_server_was_removed_everybody_else_goes_on_under_another_key(make_mesh):
    mesh = make_mesh("node1", "node2", "node3", flags=("--api", "127.0.0.1:0"))
    with mesh.client("node1", "node2") as client:
        invite = client.invite(uses=2)
        mesh.start("away", "--join", client.invite(roles=["worker"]))
        token = client.create_token("laptop")
        api = client.node("node1").member.api_address
        mesh.kill("away", signal.SIGTERM)
        mesh.kill("node3")
        eventually(lambda: health(client, "node3") == "dead", within_s=10)
        removed = mesh.cli("node1", "node", "remove", "node3", "--yes")
        assert removed.returncode == 0, removed.stderr.decode()

        # Both servers that stay have the next key, and certificates by it.
        for name in ("node1", "node2"):
            eventually(lambda name=name: "mesh.certificate_renewed" in log_of(mesh, name), within_s=15)
        [key] = later_keys(mesh, "node1")
        assert later_keys(mesh, "node2") == [key] and later_keys(mesh, "node3") == []
        assert client.nodes().key_links[0].public_key.hex().startswith(key.removeprefix("mesh.key."))

        # Whoever was away follows; an invite and a token from before are good; a new server gets both keys.
        mesh.start("away")
        eventually(lambda: "mesh.certificate_renewed" in log_of(mesh, "away"), within_s=15)
        mesh.start("late", "--join", invite)
        eventually(lambda: later_keys(mesh, "late") == [key] and (mesh.home("late") / "mesh.key").exists(), within_s=15)
        assert later_keys(mesh, "away") == []
        with Client([api], token=token) as laptop:
            job = laptop.submit({"run": {"args": ["true"]}, "array": {"range": "1-8"}})
            assert laptop.wait(job, timeout_s=30).state.value == "done"

        # They recognise each other at a later start, and the removed server is told what it is.
        mesh.kill("node2", signal.SIGTERM)
        mesh.start("node2")
        eventually(lambda: client.cluster().failures_survived >= 1, within_s=30)
        eventually(lambda: {row.health for row in client.cluster().nodes} == {"alive"}, within_s=15)
        with pytest.raises(StartRefused, match="was removed"):
            mesh.start("node3")


def health(client, name):
    return next(node.health for node in client.cluster().nodes if node.name == name)


def log_of(mesh, name):
    return (mesh.home(name) / "agent.log").read_text()


def later_keys(mesh, name):
    return sorted(path.name for path in mesh.home(name).glob("mesh.key.*"))
