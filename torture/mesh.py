"""meshd under torture: agents of a mesh that the first of them founds."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torture.api import Answered, NodeApi, Silence
from torture.disks import data_dir
from torture.network import Network
from torture.processes import Processes, wait_until

FORM_S = 90.0
ASK_S = 1.0
STATUS_S = 10.0
CPU_OFFERED = 8
"""More than the machine has: the jobs only wait, and the kills should find several of them at once."""


class Meshd:
    name = "meshd"
    cannot: frozenset[str] = frozenset()
    shapes: tuple[str, ...] = ("plain", "rerun", "array", "wait", "fail")

    def __init__(self, network: Network, home: Path) -> None:
        self._network = network
        self._home = home
        self._apis = {node: NodeApi(self.socket(node)) for node in network.nodes}
        self.invites: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self.reigns: dict[int, set[str]] = {}

    def socket(self, node: str) -> str:
        return str(data_dir(self._home, node) / "api.sock")

    def command(self, node: str) -> list[str]:
        """As a service unit would start it: it never founds, and joins by its invite for as long as it has not joined."""
        command = [
            sys.executable, "-m", "meshd.main", "up", "--data-dir", str(data_dir(self._home, node)), "--name", node,
            "--listen", self._network.address(node), "--backend", "process", "--cpu", str(CPU_OFFERED),
        ]  # fmt: skip
        if node in self.invites:
            command += ["--resume", "--join", self.invites[node]]
        return command

    def found(self, processes: Processes) -> None:
        first, *rest = self._network.nodes
        processes.start(first, self.command(first))
        wait_until(lambda: processes.is_ready(first), FORM_S, f"{first} is not ready")
        body = {"roles": ["server", "worker"], "uses": len(self._network.nodes), "lifetime_ms": 3_600_000}
        invite = self._apis[first].ask("POST", "/v1/invites", body, timeout_s=10)["invite"]
        self.invites = dict.fromkeys(self._network.nodes, invite)
        for node in rest:
            processes.start(node, self.command(node))
            wait_until(lambda node=node: processes.is_ready(node), FORM_S, f"{node} is not ready")  # type: ignore[misc]
        wait_until(lambda: not self.behind(self._network.nodes), FORM_S, "the mesh is not whole")

    def leader(self, nodes: Sequence[str]) -> str | None:
        """By the newest term that any of these knows."""
        answers = [answer for node in nodes if (answer := self.status(node)) is not None and answer["leader"]]
        if not answers:
            return None
        newest = max(answers, key=lambda answer: int(answer["term"]))
        self._names.update({row["node"]: row["name"] for row in newest["nodes"]})
        return self._names.get(newest["leader"])

    def behind(self, nodes: Sequence[str]) -> dict[str, str]:
        """Who is not yet as before the faults, and why; empty when the mesh is whole."""
        said = {node: self.status(node, timeout_s=STATUS_S) for node in nodes}
        agreed = Counter((each["leader"], each["term"]) for each in said.values() if each and each["leader"])
        most = agreed.most_common(1)[0][0] if agreed else None
        found = {}
        for node, status in said.items():
            if status is None:
                found[node] = "does not answer"
            elif (status["leader"], status["term"]) != most:
                found[node] = f"follows {status['leader']} in term {status['term']}"
            elif status["failures_survived"] < 1:
                found[node] = f"says that no failure is survived: {status['advice']} {status['warnings']}"
            elif away := [row["name"] for row in status["nodes"] if row["health"] != "alive"]:
                found[node] = f"does not see alive: {', '.join(away)}"
        return found

    def status(self, node: str, *, timeout_s: float = ASK_S) -> Mapping[str, Any] | None:
        try:
            found: Mapping[str, Any] = self._apis[node].get("/v1/cluster", timeout_s=timeout_s)
        except (Silence, Answered):
            return None
        if found["leader"]:
            self.reigns.setdefault(int(found["term"]), set()).add(found["leader"])
        return found
