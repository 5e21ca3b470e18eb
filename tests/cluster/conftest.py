"""Real agents as processes on loopback. Slow; `make cluster`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshd.client import Client
from meshd.dev import DevMesh

START_S = 60.0
REPO = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.cluster)


def eventually(check: Callable[[], object], *, within_s: float, every_s: float = 0.1) -> object:
    """The first true answer of `check`; fails with its last answer or error when there is none in time."""
    deadline = time.monotonic() + within_s
    answer: object = None
    while True:
        try:
            if answer := check():
                return answer
        except Exception as error:
            answer = error
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s:.0f} s: {answer!r}")
        time.sleep(every_s)


class Mesh(DevMesh):
    """A mesh under test: its agents, clients of them, and the `mesh` command."""

    def client(self, *names: str) -> Client:
        return Client([self.socket(name) for name in names or sorted(self.agents)])

    def form(self, *names: str, flags: tuple[str, ...] = ()) -> None:
        """Found with the first, join the rest; returns when the mesh survives what its size allows."""
        self.start(names[0], *flags)
        with self.client(names[0]) as client:
            invite = client.invite(uses=9)
        for name in names[1:]:
            self.start(name, "--join", invite, *flags)
        self.wait_survives((len(names) - 1) // 2 if len(names) < 7 else 2)

    def wait_survives(self, failures: int, *, within_s: float = START_S) -> None:
        """Not time, but the mesh itself says when it stands."""
        with self.client(*[name for name, agent in self.agents.items() if agent.poll() is None]) as client:
            eventually(lambda: client.cluster().failures_survived >= min(failures, 1), within_s=within_s)

    def ids(self) -> dict[str, str]:
        with self.client() as client:
            return {row.member.name: row.member.node for row in client.nodes().members}

    def leader(self) -> str:
        """The name of the agent that leads."""
        names = {node: name for name, node in self.ids().items()}
        with self.client() as client:
            return names[str(eventually(lambda: client.cluster().leader, within_s=20))]

    def cli(
        self, at: str, *arguments: str, stdin: bytes = b"", timeout_s: float = 60, token: str = ""
    ) -> subprocess.CompletedProcess[bytes]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MESH_", "MESHD_"))}
        environment |= {"MESH_NODE": self.socket(at), "NO_COLOR": "1", "MESH_TOKEN": token}
        return subprocess.run(
            [sys.executable, "-m", "mesh_cli.main", *arguments],
            input=stdin,
            capture_output=True,
            env=environment,
            timeout=timeout_s,
            cwd=self.directory,
        )

    def cli_json(self, at: str, *arguments: str) -> object:
        done = self.cli(at, *arguments, "-o", "json")
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)


@pytest.fixture
def make_mesh(tmp_path: Path) -> Iterator[Callable[..., Mesh]]:
    made: list[Mesh] = []

    def make(*names: str, flags: tuple[str, ...] = ()) -> Mesh:
        mesh = Mesh(tmp_path / f"mesh{len(made)}")
        made.append(mesh)
        if names:
            mesh.form(*names, flags=flags)
        return mesh

    yield make
    for mesh in made:
        mesh.stop()


@pytest.fixture(scope="module")
def mesh3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Three agents that the tests of a module share; none of them may be killed."""
    mesh = Mesh(tmp_path_factory.mktemp("mesh3"))
    mesh.form("node1", "node2", "node3")
    yield mesh
    alive = {name: agent.poll() for name, agent in mesh.agents.items()}
    mesh.stop()
    assert set(alive.values()) == {None}, f"an agent died: {alive}"
