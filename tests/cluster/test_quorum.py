"""What the mesh says and still does when voters are missing: refusals with names and numbers, and reads that go on."""

from __future__ import annotations

import threading
import time

import pytest

from meshd.errors import Unavailable
from tests.cluster.conftest import eventually


def test_drain_and_remove_refuse_to_break_the_quorum_and_stale_reads_outlive_it(make_mesh, monkeypatch):
    mesh = make_mesh("node1", "node2", "node3")
    ids = mesh.ids()
    with mesh.client("node1") as client:
        job = client.submit({"name": "kept", "run": {"args": ["echo", "kept"]}})
        assert client.wait(job, timeout_s=20).state.value == "done"
        mesh.kill("node3")
        eventually(lambda: health(client, "node3") == "dead", within_s=10)
        assert client.cluster().failures_survived == 0 and "node3" in client.cluster().advice

        # One of three is dead: the mesh lives on two, and cannot do without either.
        for verb in ("drain", "remove"):
            refused = mesh.cli("node1", "node", verb, "node2", *(["--yes"] if verb == "remove" else []))
            text = refused.stderr.decode()
            assert refused.returncode == 6, text
        drained = mesh.cli("node1", "node", "drain", "node2").stderr.decode()
        assert "1 is alive (node1) of the other 2 voters, and 2 are needed" in drained, drained
        assert "bring back node3 first" in drained and "mesh node remove" in drained, drained
        assert not client.node("node2").member.is_draining, "a refusal changes nothing"

        mesh.kill("node2")
        monkeypatch.setattr("meshd.client.http.PATIENCE_S", 0)
        failures: list[Unavailable] = []

        def read() -> None:
            with mesh.client("node1") as other, pytest.raises(Unavailable) as caught:
                other.job(job)
            failures.append(caught.value)

        began = time.monotonic()
        reader = threading.Thread(target=read)
        reader.start()
        stale = mesh.cli("node1", "job", "show", job, "--stale")
        assert stale.returncode == 0 and b"done" in stale.stdout and b"as of log position" in stale.stderr
        assert mesh.cli("node1", "ps", "--stale", "-q").stdout.decode().split() == [job]
        assert mesh.cli("node1", "job", "logs", job, "--stale").stdout == b"kept\n"
        assert time.monotonic() - began < 9, "a stale read waits for nobody"
        eventually(lambda: "1 is alive (node1) of 3 voters, and 2 are needed" in client.cluster().advice, within_s=10)
        assert {row.name for row in client.cluster().nodes} == set(ids), "from what it last knew"
        reader.join()
        assert time.monotonic() - began < 15
        assert "1 is alive (node1) of 3 voters" in failures[0].message and "--stale" in failures[0].hint


def health(client, name):
    return next(node.health for node in client.cluster().nodes if node.name == name)
