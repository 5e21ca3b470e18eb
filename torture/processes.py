"""The nodes as processes on their namespaces: start, kill, pause, and whether each has come back.

Started by the main thread only: the kernel kills what a thread started when that thread ends
(PR_SET_PDEATHSIG), so that nothing outlives a harness that is itself killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torture.network import Network


class Engine(Protocol):
    """What is tortured: how a node of it is started, and who leads."""

    name: str
    shapes: tuple[str, ...]
    cannot: frozenset[str]
    """Faults that mean nothing to it."""
    reigns: dict[int, set[str]]
    """By term, who was said to lead in it."""
    invites: dict[str, str]

    def command(self, node: str) -> Sequence[str]: ...
    def found(self, processes: Processes) -> None: ...
    def leader(self, nodes: Sequence[str]) -> str | None: ...
    def socket(self, node: str) -> str: ...
    def behind(self, nodes: Sequence[str]) -> dict[str, str]: ...


class NeverReady(Exception):
    """A process ended by itself, or did not say in time that it is ready."""


class Processes:
    def __init__(self, network: Network, home: Path, environment: Mapping[str, str]) -> None:
        self._network = network
        self._home = home
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._begins: dict[str, int] = {}
        self._since_s: dict[str, float] = {}
        self._ready: set[str] = set()
        self.paused: set[str] = set()
        self._environment = dict(environment)
        self.more_environment: Callable[[str], Mapping[str, str]] = lambda node: {}

    @property
    def nodes(self) -> list[str]:
        return self._network.nodes

    def output(self, node: str) -> Path:
        return self._home / f"{node}.log"

    def start(self, node: str, command: Sequence[str]) -> None:
        """Returns at once; `is_ready` tells."""
        output = self.output(node)
        with output.open("ab") as file:
            self._begins[node] = output.stat().st_size
            self._running[node] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self._network.inside(node), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**self._environment, **self.more_environment(node)},
                start_new_session=True,
            )
        self._since_s[node] = time.monotonic()
        self._ready.discard(node)

    def is_ready(self, node: str) -> bool:
        """Raises NeverReady when the process has ended by itself."""
        if node in self._ready:
            return True
        said = self._said(node)
        if "ready\n" in said:
            self._ready.add(node)
            return True
        process = self._running[node]
        if process.poll() is not None:
            raise NeverReady(f"{node} ended before it was ready, {self.last_words(node)}")
        return False

    def is_running(self, node: str) -> bool:
        return node in self._running and self._running[node].poll() is None

    def is_answering(self, node: str) -> bool:
        return node in self._ready and self.is_running(node) and node not in self.paused

    def state(self, node: str) -> str:
        if not self.is_running(node):
            return "ended"
        return f"{'ready' if node in self._ready else 'starting'} since {self.age_s(node):.0f} s"

    def last_words(self, node: str) -> str:
        said = self._said(node)
        return f"code {self._running[node].returncode}: {said.strip()[-500:]}"

    def _said(self, node: str) -> str:
        """Since its last start."""
        with self.output(node).open("rb") as file:
            file.seek(self._begins[node])
            return file.read().decode(errors="replace")

    def pid(self, node: str) -> int:
        return self._running[node].pid

    def age_s(self, node: str) -> float:
        return time.monotonic() - self._since_s[node]

    def kill(self, nodes: Sequence[str]) -> None:
        """All at once."""
        for node in nodes:
            if self.is_running(node):
                os.kill(self.pid(node), signal.SIGKILL)
            self.paused.discard(node)
        for node in nodes:
            self._running[node].wait()

    def pause(self, node: str) -> None:
        if self.is_running(node):
            os.kill(self.pid(node), signal.SIGSTOP)
            self.paused.add(node)

    def resume(self) -> None:
        for node in sorted(self.paused):
            if self.is_running(node):
                os.kill(self.pid(node), signal.SIGCONT)
        self.paused.clear()

    def stop(self) -> None:
        self.resume()
        self.kill([node for node in self.nodes if node in self._running])


def wait_until(check: Callable[[], bool], within_s: float, otherwise: str, *, every_s: float = 0.05) -> None:
    """Raises NeverReady."""
    deadline = time.monotonic() + within_s
    while not check():
        if time.monotonic() > deadline:
            raise NeverReady(f"{otherwise} after {within_s:.0f} s")
        time.sleep(every_s)
