"""Stock PySyncObj under torture: all nodes know each other from the start, and nothing is run, only kept."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torture.api import Answered, NodeApi, Silence
from torture.disks import data_dir
from torture.mesh import ASK_S, FORM_S
from torture.network import Network
from torture.processes import Processes, wait_until


class Stock:
    name = "stock"
    cannot = frozenset({"clock", "drain", "replace", "disk-full", "disks-full", "bit-flip"})
    shapes: tuple[str, ...] = ("plain",)

    def __init__(self, network: Network, home: Path) -> None:
        self._network = network
        self._home = home
        self._apis = {node: NodeApi(self.socket(node)) for node in network.nodes}
        self.invites: dict[str, str] = {}
        self.reigns: dict[int, set[str]] = {}
        self._names = {network.address(node): node for node in network.nodes}

    def socket(self, node: str) -> str:
        return str(data_dir(self._home, node) / "api.sock")

    def command(self, node: str) -> list[str]:
        others = [self._network.address(other) for other in self._network.nodes if other != node]
        return [
            sys.executable,
            "-m",
            "torture.stock",
            str(data_dir(self._home, node)),
            self._network.address(node),
            *others,
        ]

    def found(self, processes: Processes) -> None:
        for node in self._network.nodes:
            processes.start(node, self.command(node))
        wait_until(lambda: not self.behind(self._network.nodes), FORM_S, "not all are ready")

    def leader(self, nodes: Sequence[str]) -> str | None:
        answers = [answer for node in nodes if (answer := self._status(node)) is not None and answer["leader"]]
        return self._names[max(answers, key=lambda answer: int(answer["term"]))["leader"]] if answers else None

    def behind(self, nodes: Sequence[str]) -> dict[str, str]:
        said = {node: self._status(node) for node in nodes}
        newest = max((int(status["applied"]) for status in said.values() if status is not None), default=0)
        return {
            node: "does not answer" if status is None else f"applied {status['applied']} of {newest}: {status}"
            for node, status in said.items()
            if status is None or not status["is_ready"] or status["leader"] is None or status["applied"] < newest
        }

    def _status(self, node: str) -> Mapping[str, Any] | None:
        try:
            found: Mapping[str, Any] = self._apis[node].get("/v1/cluster", timeout_s=ASK_S)
        except (Silence, Answered):
            return None
        if found["leader"]:
            self.reigns.setdefault(int(found["term"]), set()).add(found["leader"])
        return found
