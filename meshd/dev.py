"""`meshd dev`: a whole mesh on loopback, one process per agent, gone when it is stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from meshd.errors import MeshError, StartRefused, Unavailable

START_S = 30.0
STOP_S = 10.0
PEERS_LINE = re.compile(r"^peers .*/ip4/127\.0\.0\.1/tcp/(\d+)", re.MULTILINE)


class DevMesh:
    """Agents as child processes under one directory. `start` founds the first and joins the rest through an invite."""

    def __init__(self, directory: Path, *, environment: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self._listening: dict[str, str] = {}
        self._environment = {**os.environ, **(environment or {})}
        # What configures the agent of whoever runs this must not configure these.
        for key in [key for key in self._environment if key.startswith("MESHD_") and key not in (environment or {})]:
            del self._environment[key]

    def home(self, name: str) -> Path:
        return self.directory / name

    def socket(self, name: str) -> str:
        return f"unix:{self.home(name) / 'api.sock'}"

    def start(self, name: str, *flags: str) -> None:
        """Start, or start again, the agent of this name; returns when it is ready. Raises StartRefused with its words."""
        self.home(name).mkdir(mode=0o700, parents=True, exist_ok=True)
        output = self.home(name) / "agent.log"
        command = [sys.executable, "-m", "meshd.main", "up", "--data-dir", str(self.home(name)), "--name", name]
        if "--listen" not in flags:
            # The same port again: a mesh whose members all moved at once could not find itself.
            command += ["--listen", self._listening.get(name, "127.0.0.1:0")]
        begin = output.stat().st_size if output.exists() else 0
        with output.open("ab") as file:
            self.agents[name] = subprocess.Popen(
                [*command, *flags],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self._environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            said = output.read_bytes()[begin:].decode(errors="replace")
            if "\nready\n" in said:
                if found := PEERS_LINE.search(said):
                    self._listening[name] = f"127.0.0.1:{found[1]}"
                return
            if self.agents[name].poll() is not None:
                raise StartRefused(f"agent {name} ended with code {self.agents[name].returncode}:\n{said.strip()}")
            time.sleep(0.02)
        raise Unavailable(f"agent {name} was not ready within {START_S:.0f} s", hint=f"see {output}")

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> None:
        self.agents[name].send_signal(signal_number)
        if signal_number in (signal.SIGKILL, signal.SIGTERM):
            self.agents[name].wait(timeout=STOP_S + 10)

    def stop(self) -> None:
        """All agents, politely first."""
        running = [agent for agent in self.agents.values() if agent.poll() is None]
        for agent in running:
            agent.send_signal(signal.SIGCONT)
            agent.terminate()
        deadline = time.monotonic() + STOP_S
        for agent in running:
            try:
                agent.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()


def run_dev(nodes: int, data_dir: Path | None) -> None:
    from meshd.client import Client

    directory = data_dir.absolute() if data_dir else Path(tempfile.mkdtemp(prefix="meshd-dev-"))
    mesh = DevMesh(directory)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started it in the background
    is_kept = True  # what went wrong can be read there
    try:
        mesh.start("node1")
        for number in range(2, nodes + 1):
            name = f"node{number}"
            if (mesh.home(name) / "mesh.json").exists():
                mesh.start(name)
            else:
                invite = Client([mesh.socket("node1")]).invite(uses=1)
                mesh.start(name, "--join", invite)
        click.echo(f"a mesh of {nodes} in {directory}; ctrl-c stops it" + ("" if data_dir else " and removes it"))
        for number in range(1, nodes + 1):
            click.echo(f"  node{number}  mesh --node {mesh.socket(f'node{number}')} ps")
        click.echo(f"\n  export MESH_NODE={mesh.socket('node1')}\n  mesh run -- echo hello\n")
        sys.stdout.flush()
        while not (ended := [name for name, agent in mesh.agents.items() if agent.poll() is not None]):
            time.sleep(0.5)
        code = mesh.agents[ended[0]].returncode
        raise MeshError(f"agent {ended[0]} ended with code {code}", hint=f"see {directory / ended[0]}/agent.log")
    except KeyboardInterrupt:
        click.echo("stopping")
        is_kept = data_dir is not None
    finally:
        mesh.stop()
        if not is_kept:
            shutil.rmtree(directory, ignore_errors=True)
