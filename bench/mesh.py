"""A real mesh to measure: three agents, each its own process, on loopback, gone when the block ends."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from meshd.client import Client
from meshd.dev import DevMesh
from meshd.errors import Unavailable

SCRATCH = Path(__file__).parents[1] / "build"
"""On a disk: where the directory for temporary files lies in memory, a sync costs nothing."""
NODES = ("node1", "node2", "node3")
FORM_S = 30.0
SETTLE_S = 5.0
"""After the mesh stands: greetings, anti-entropy and the spread of the mesh's key have come to rest by then."""

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@contextmanager
def standing_mesh(environment: Mapping[str, str] | None = None) -> Generator[DevMesh, None, None]:
    """One that says it survives the loss of a node. `environment` is what its agents have besides our own."""
    SCRATCH.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="mesh-", dir=SCRATCH))
    mesh = DevMesh(directory, environment=dict(environment or {}))
    try:
        mesh.start(NODES[0])
        with client_of(mesh, NODES[0]) as client:
            invite = client.invite(uses=len(NODES) - 1)
        for name in NODES[1:]:
            mesh.start(name, "--join", invite)
        with client_of(mesh, NODES[0]) as client:
            deadline = time.monotonic() + FORM_S
            while (status := client.cluster()).failures_survived < 1:
                if time.monotonic() > deadline:
                    raise Unavailable(f"the mesh survives no failure after {FORM_S:.0f} s: {status.advice}")
                time.sleep(0.05)
        yield mesh
    finally:
        mesh.stop()
        shutil.rmtree(directory)


def client_of(mesh: DevMesh, name: str) -> Client:
    return Client([mesh.socket(name)])


def roles(mesh: DevMesh) -> dict[str, str]:
    """Node names by what they are to the log: one `leader`, one `follower`."""
    with client_of(mesh, NODES[0]) as client:
        names = {row.member.node: row.member.name for row in client.nodes().members}
        status = client.cluster()
    assert status.leader is not None
    followers = [names[voter] for voter in status.voters if voter != status.leader]
    return {"leader": names[status.leader], "follower": followers[0]}


# --- processes --------------------------------------------------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0  # a process that has ended has none


def cpu_s(pid: int) -> float:
    """User and system time of all its threads until now."""
    # The name of the command stands in parentheses and may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND


def descendants(pid: int) -> list[tuple[int, str]]:
    """(process, its command line), children before their own."""
    found: list[tuple[int, str]] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # of one that ends meanwhile, what was seen
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found += [(child, command.strip()), *descendants(child)]
    return found


def load() -> str:
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
