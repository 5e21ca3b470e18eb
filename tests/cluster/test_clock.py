"""The mesh's own time, led astray and set right by an operator, on a real agent."""

from __future__ import annotations

import signal

import pytest

from meshd.errors import InvalidRequest


def test_an_operator_sets_the_meshs_time_right_and_nothing_runs_twice(make_mesh):
    mesh = make_mesh("node1")
    with mesh.client("node1") as client:
        before = client.submit({"run": {"args": ["true"]}})
        assert client.wait(before, timeout_s=20).state.value == "done"
        assert b"forward by" in mesh.cli("node1", "cluster", "set-clock", "--to", "2036-01-01T00:00:00Z").stdout

        status = mesh.cli("node1", "cluster", "status").stdout.decode()
        assert "clock: forward by" in status and "set by an operator at node1" in status, status
        assert "ahead of the clock of node1" in status and "mesh cluster set-clock" in status, status
        with pytest.raises(InvalidRequest, match="behind the mesh's clock") as refused:
            client.submit({"run": {"args": ["true"]}})
        assert "mesh cluster status" in refused.value.hint

        mesh.kill("node1", signal.SIGTERM)
        mesh.start("node1")  # what was set is in the log
        assert "ahead of the clock of node1" in " ".join(client.cluster().warnings)
        assert b"back by" in mesh.cli("node1", "cluster", "set-clock").stdout
        assert not client.cluster().warnings
        after = client.submit({"run": {"args": ["true"]}})
        assert client.wait(after, timeout_s=20).state.value == "done"
        assert client.submit({"run": {"args": ["true"]}}, job_id=before) == before
        assert client.task(before).attempt == 1
