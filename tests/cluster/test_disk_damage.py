"""Bits that turn over in the journals of real agents that were killed: mended, gone on over, or refused, and always said."""

from __future__ import annotations

import pytest

from meshd.errors import StartRefused
from tests.cluster.conftest import eventually

BLOCK = 4096


def frames(home):
    """(newest segment, where its last frame begins)."""
    newest = sorted(path for path in (home / "raft").glob("journal-*") if ".bad" not in path.name)[-1]
    written = newest.read_bytes().rstrip(b"\0")
    return newest, (len(written) - 1) // BLOCK * BLOCK


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(bytes(content))


def test_a_sole_voter_goes_on_over_a_bad_last_frame_with_higher_fences_and_says_so(make_mesh):
    mesh = make_mesh()
    mesh.start("node1")
    with mesh.client("node1") as client:
        job = client.submit({"run": {"args": ["true"]}})
        assert client.wait(job, timeout_s=30).state.value == "done"
        mesh.kill("node1")
        path, last = frames(mesh.home("node1"))
        flip(path, last + 24)
        mesh.start("node1")
        eventually(lambda: any("may have been acknowledged" in text for text in client.cluster().warnings), within_s=10)
        # Its end may have been in that frame: then the node tells it again, or it runs again.
        assert client.wait(job, timeout_s=60).state.value == "done"
        after = client.submit({"run": {"args": ["sh", "-c", "echo $MESHD_FENCE"]}})
        assert client.wait(after, timeout_s=30).state.value == "done"
        assert int(mesh.cli("node1", "job", "logs", after).stdout) > 1 << 32


def test_a_sole_voter_that_has_lost_more_stops_names_the_place_and_changes_nothing(make_mesh):
    mesh = make_mesh()
    mesh.start("node1")
    with mesh.client("node1") as client:
        for _ in range(3):
            client.wait(client.submit({"run": {"args": ["true"]}}), timeout_s=30)
    mesh.kill("node1")
    path, last = frames(mesh.home("node1"))
    flip(path, last // BLOCK // 2 * BLOCK + 24)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(StartRefused, match=r"lost what it acknowledged(.|\n)*at byte(.|\n)*meshd recover"):
            mesh.start("node1")
    assert path.read_bytes() == before


def test_a_damaged_voter_of_three_mends_itself(make_mesh):
    mesh = make_mesh("node1", "node2", "node3")
    damaged = next(name for name in ("node1", "node2", "node3") if name != mesh.leader())
    others = [name for name in ("node1", "node2", "node3") if name != damaged]
    with mesh.client(*others) as client:
        job = client.submit({"run": {"args": ["true"]}})
        assert client.wait(job, timeout_s=30).state.value == "done"
        mesh.kill(damaged)
        path, last = frames(mesh.home(damaged))
        flip(path, last // BLOCK // 2 * BLOCK + 24)
        mesh.start(damaged)
        assert path.with_name(f"{path.name}.bad-1").exists()
        log = mesh.home(damaged) / "agent.log"
        eventually(lambda: "raft.in_doubt_no_more" in log.read_text(), within_s=20)
        mesh.wait_survives(1)
        assert not [text for text in client.cluster().warnings if "lost" in text]
    with mesh.client(damaged) as client:
        assert client.job(job).state.value == "done"
