"""A real agent on a small disk: it fills up, says so, ends what it has begun, and heals when there is room."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from meshd.errors import Busy
from tests.cluster.conftest import Mesh, eventually

MIB = 1 << 20
FLAGS = ("--disk-free", "16Mi")


@pytest.fixture
def small_disk(tmp_path):
    """128 MiB, of which nodes keep 16 free."""
    directory = tmp_path / "disk-small"
    directory.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "meshd-test", directory], capture_output=True)
    if done.returncode:
        pytest.skip("only who may mount can give an agent a small disk")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def fill(path, *, leaving: int) -> None:
    """Somebody else's file takes the rest."""
    status = os.statvfs(path.parent)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(descriptor, 0, max(1, status.f_bavail * status.f_frsize - leaving))
    os.close(descriptor)


def test_a_full_disk_refuses_new_work_ends_what_runs_and_heals_by_itself(small_disk, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(b"x" * MIB)
    mesh = Mesh(small_disk)
    other = small_disk / "of-somebody-else"
    try:
        mesh.start("node1", *FLAGS)
        with mesh.client("node1") as client:
            first = client.submit({"run": {"args": ["echo", "before"]}})
            assert client.wait(first, timeout_s=30).state.value == "done"
            running = client.submit({"run": {"args": ["sh", "-c", "sleep 6; echo ended"]}})
            eventually(lambda: client.job(running).counts.running, within_s=10)

            fill(other, leaving=8 * MIB)
            eventually(lambda: any("disk full" in text for text in client.cluster().warnings), within_s=5)
            began = time.monotonic()
            with pytest.raises(Busy, match="busy: disk full"):
                client.submit({"run": {"args": ["true"]}})
            assert time.monotonic() - began < 3, "an error at once, not after twenty seconds of trying"
            refused = mesh.cli("node1", "run", "--", "true")
            said = refused.stderr.decode()
            assert refused.returncode == 8 and "disk full" in said and "make room" in said, said
            with pytest.raises(Busy, match="disk full"):
                client.put_file(large)
            assert client.wait(running, timeout_s=30).state.value == "done", "completions go on"

            # Not a byte is left: the journal lives on what it has reserved, and so does a start.
            other.unlink()
            fill(other, leaving=0)
            eventually(lambda: any("disk full" in text for text in client.cluster().warnings), within_s=5)
            mesh.kill("node1")
            mesh.start("node1", *FLAGS)
            assert client.job(running).state.value == "done"

            other.unlink()
            eventually(lambda: not any("disk full" in text for text in client.cluster().warnings), within_s=5)
            after = client.submit({"run": {"args": ["echo", "after"]}})
            assert client.wait(after, timeout_s=30).state.value == "done"
    finally:
        mesh.stop()
