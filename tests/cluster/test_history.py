"""Finished jobs leave the core: real agents, a server that loses its segments, one that joins later."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

from tests.cluster.conftest import Mesh, eventually

JOBS = 1_550
"""The newest thousand stay in the core; five hundred more make a segment."""


def indexed(mesh: Mesh, name: str) -> int:
    path = mesh.directory / name / "history" / "index.sqlite"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        return int(connection.execute("SELECT count(*) FROM jobs").fetchone()[0])


def spoil(directory: Path) -> None:
    shutil.rmtree(directory / "history")
    shutil.rmtree(directory / "blobs")


def test_finished_jobs_are_read_anywhere_also_where_the_disk_was_lost(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    with mesh.client() as client:
        ids = [
            client.submit(
                {"name": f"n{number % 7}", "labels": {"k": str(number % 3)}, "run": {"args": ["echo", str(number)]}}
            )
            for number in range(JOBS)
        ]
        for job in ids[:3] + ids[-3:]:
            assert client.wait(job, timeout_s=120).state.value == "done"
        eventually(lambda: all(indexed(mesh, name) >= 500 for name in mesh.agents), within_s=60)
        assert client.submit({"run": {"args": ["echo", "other"]}}, job_id=ids[0]) == ids[0], "a resend is the same job"
        assert client.cancel(ids[1]).state.value == "done"

    def reads_all(name: str) -> bool:
        with mesh.client(name) as client:
            found = [job.id for job in client.jobs(labels={"k": "0"}, limit=JOBS)]
            assert found == sorted(ids[::3], reverse=True)
            assert client.output(ids[4]) == b"4\n"
            return client.job(ids[4]).state.value == "done"

    for name in sorted(mesh.agents):
        assert reads_all(name)
    victim = next(name for name in sorted(mesh.agents) if name != mesh.leader())
    mesh.kill(victim)
    spoil(mesh.directory / victim)
    mesh.start(victim)
    eventually(lambda: indexed(mesh, victim) >= 500, within_s=60)
    eventually(lambda: reads_all(victim), within_s=30)
    with mesh.client(mesh.leader()) as client:
        invite = client.invite(uses=1)
    mesh.start("node4", "--join", invite)
    eventually(lambda: indexed(mesh, "node4") >= 500, within_s=60)
    assert reads_all("node4")
