"""A mesh that lost two of three servers for good goes on from the third; whoever was left behind is told, and joins again."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys

import pytest

from meshd.errors import StartRefused
from tests.cluster.conftest import Mesh, eventually

FENCE = {"run": {"args": ["sh", "-c", "echo $MESHD_FENCE"]}}


def meshd(mesh: Mesh, at: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The agent's own command on a directory whose agent is stopped."""
    command = [sys.executable, "-m", "meshd.main", *arguments, "--data-dir", str(mesh.home(at))]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=40)


def test_two_of_three_servers_gone_for_good_the_third_goes_on_and_a_discarded_one_joins_again(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    with mesh.client("node1") as client:
        invite = client.invite(roles=("worker",), uses=1)
        mesh.start("worker", "--join", invite)
        done = [client.submit(FENCE) for _ in range(10)]
        for job in done:
            assert client.wait(job, timeout_s=30).state.value == "done"
        # Nothing can run it, so that it is unfinished; it may not run twice.
        once = client.submit({"run": {"args": ["true"]}, "on_lost": "wait", "needs": {"labels": "has=it"}})
        fences = [int(client.output(job)) for job in done]
    victims = ["node2", "node3"]
    for name in ["node1", *victims]:
        mesh.kill(name)

    # With another voter there it is refused, and that one has not less: recover there, or force it.
    mesh.start("node2")
    refused = meshd(mesh, "node1", "recover", "--yes")
    assert refused.returncode == 6, refused
    assert "2 of 3 voters are there" in refused.stderr and "meshd up" in refused.stderr
    mesh.kill("node2")

    recovered = meshd(mesh, "node1", "recover", "--yes")
    assert recovered.returncode == 0, recovered
    assert "node2" in recovered.stdout and "no answer" in recovered.stdout and once in recovered.stdout
    mesh.start("node1")
    with mesh.client("node1") as client:
        eventually(lambda: client.cluster().leader, within_s=10)
        assert client.cluster().recovery.startswith("1-")
        for job in done:
            assert client.job(job).state.value == "done"
        view = client.job(once)
        assert view.state.value == "held" and f"mesh job release {once}" in view.reason
        eventually(lambda: client.node("worker").session == "live", within_s=20)
        again = client.submit({**FENCE, "needs": {"labels": "name=worker"}})
        assert client.wait(again, timeout_s=20).state.value == "done"
        assert int(client.output(again)) >= 1 << 48 > max(fences)
        assert mesh.cli("node1", "job", "release", once).returncode == 0
        assert client.job(once).state.value == "ready"

        mesh.start("node4", "--join", client.invite(uses=1))
        # A discarded server is told so by whoever it meets, every time that it is started.
        for _ in range(2):
            with pytest.raises(StartRefused, match="meshd rejoin"):
                mesh.start("node2")
        assert meshd(mesh, "node2", "rejoin").returncode == 0
        assert (mesh.home("node2") / "raft.old-1").is_dir()
        mesh.start("node2")
        mesh.wait_survives(1)
        assert client.wait(client.submit({"run": {"args": ["true"]}}), timeout_s=20).state.value == "done"
        with mesh.client("node2") as there:
            assert there.job(done[0]).state.value == "done"


def test_an_older_copy_of_a_servers_directory_is_refused_and_stays_refused_until_it_rejoins(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    mesh.kill("node3")
    shutil.copytree(
        mesh.home("node3"), mesh.directory / "backup", symlinks=True, ignore=shutil.ignore_patterns("*.sock")
    )
    mesh.start("node3")
    mesh.wait_survives(1)
    with mesh.client("node1") as client:
        job = client.submit(FENCE)
        assert client.wait(job, timeout_s=30).state.value == "done"
    mesh.kill("node3")
    shutil.rmtree(mesh.home("node3"))
    (mesh.directory / "backup").rename(mesh.home("node3"))

    # Ready or not: it ends as soon as it meets a peer that remembers, and after that at once.
    with contextlib.suppress(StartRefused):
        mesh.start("node3")
    eventually(lambda: mesh.agents["node3"].poll() is not None, within_s=15)
    assert mesh.agents["node3"].returncode == 1
    with pytest.raises(StartRefused, match=r"older copy(?s:.*)meshd rejoin"):
        mesh.start("node3")

    assert meshd(mesh, "node3", "rejoin").returncode == 0
    mesh.start("node3")
    with mesh.client("node3") as client:
        # The old incarnation has to be silent for 12 s before the new one takes its place.
        eventually(lambda: client.cluster().failures_survived == 1 and len(client.cluster().voters) == 3, within_s=40)
        assert client.job(job).state.value == "done"
