"""How fast the replicated log is: python -m bench.raft [--seconds S] [--rounds N] [--only NAME …] [--json FILE]

Three servers as processes that share this machine: ours on plain TCP and on libp2p's streams, every commit synced on
a majority of the disks, and in the same run stock PySyncObj 0.3.17, which syncs and writes nothing. Commands of 100
bytes, or of 100 items of 100 bytes, at the leader and at a follower. Exits with 1 when ours over libp2p, which is
what agents use, is over its bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NODES = ("a", "b", "c")
FORM_S = 30.0


@dataclass(frozen=True, slots=True)
class Contender:
    title: str
    module: str
    config: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        return self.module == "bench.raft_server"


CONTENDERS = {
    "tcp": Contender("ours, TCP", "bench.raft_server", {"carrier": "tcp"}),
    "libp2p": Contender("ours, libp2p", "bench.raft_server", {"carrier": "libp2p"}),
    "stock": Contender("stock", "bench.raft_stock", {"batched": True}),
    "stock-unbatched": Contender("stock, tuned", "bench.raft_stock", {"batched": False}),
}
"""Stock's defaults gather commands for 100 ms (`appendEntriesUseBatch`); tuned is without."""


@dataclass(frozen=True, slots=True)
class Load:
    title: str
    width: int
    items: int
    is_latency: bool


LOADS = (
    Load("one at a time", 1, 1, True),
    Load("256 in flight", 256, 1, False),
    Load("16 in flight, 100 items each", 16, 100, False),
)
ROLES = ("leader", "follower")

WORST = ("elections", "longest")
"""Of these rows the worst round counts, of others the median."""

BOUNDS: dict[str, tuple[str, float]] = {
    "one at a time, leader: p50 ms": ("<=", 3.0),
    "one at a time, follower: p50 ms": ("<=", 4.5),
    "256 in flight, leader: commands/s": (">=", 15_000),
    "16 in flight, 100 items each, leader: items/s": (">=", 120_000),
    "elections": ("<=", 0),
    "longest turn of a loop, less the wait for a core: ms": ("<=", 50),
    "longest wait for the interpreter: ms": ("<=", 50),
}


# --- processes -------------------------------------------------------------------------------------------------------


class Server:
    def __init__(self, contender: Contender, me: str, ports: dict[str, int], directory: Path) -> None:
        config = {**contender.config, "me": me, "ports": ports, "directory": str(directory / me)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", contender.module, json.dumps(config)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def order(self, do: str, **what: Any) -> dict[str, Any]:
        self.tell(do, **what)
        return self.answer()

    def tell(self, do: str, **what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a server died: exit code {self._process.wait()}")
        figures: dict[str, Any] = json.loads(line)
        return figures

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            self.tell("stop")
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def cluster(contender: Contender, scratch: Path | None) -> Iterator[list[Server]]:
    directory = Path(tempfile.mkdtemp(dir=scratch, prefix="raft-bench-"))
    ports = {name: free_port() for name in NODES}
    servers: list[Server] = []
    try:
        for name in NODES:
            servers.append(Server(contender, name, ports, directory))
        for server in servers:
            server.answer()  # it has found a leader
        yield servers
    finally:
        for server in servers:
            server.stop()
        shutil.rmtree(directory)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --- figures ---------------------------------------------------------------------------------------------------------


def measure(contender: Contender, seconds: float, scratch: Path | None) -> dict[str, float]:
    rows: dict[str, float] = {}
    with cluster(contender, scratch) as servers:
        began = [server.order("tell") for server in servers]
        by_role = {told["role"]: server for told, server in zip(began, servers, strict=True)}
        answers = []
        for load in LOADS:
            for role in ROLES:
                told = by_role[role].order("load", width=load.width, items=load.items, seconds=seconds)
                rows |= _rows_of(f"{load.title}, {role}", load, told)
                answers.append(told)
        answers += [server.order("tell") for server in servers]
        rows["elections"] = max(it["term"] for it in answers) - max(it["term"] for it in began)
        if not contender.is_ours:
            rows["applied entries cut from a log, times"] = sum(it["cuts"] for it in answers[-len(servers) :])
        if contender.is_ours:
            rows["longest turn of a loop, wall: ms"] = max(it["wall_ms"] for it in answers)
            rows["longest turn of a loop, less the wait for a core: ms"] = max(it["turn_ms"] for it in answers)
            rows["longest wait for the interpreter: ms"] = max(it["late_ms"] for it in answers)
            for role in ROLES:
                told = by_role[role].order("barrier", seconds=seconds)
                rows[f"read barrier, {role}: p50 ms"] = statistics.median(told["took_ms"])
            for server in servers:
                server.tell("idle", seconds=2 * seconds)
            rows["idle, all three: % of a core"] = sum(server.answer()["percent"] for server in servers)
    return rows


def _rows_of(title: str, load: Load, told: dict[str, Any]) -> dict[str, float]:
    took_ms = told["took_ms"]
    rows: dict[str, float] = {}
    if not took_ms:
        return rows
    if load.is_latency:
        rows[f"{title}: p50 ms"] = statistics.median(took_ms)
    else:
        rows[f"{title}: {'commands' if load.items == 1 else 'items'}/s"] = told["commands_s"] * load.items
    rows[f"{title}: p99 ms"] = sorted(took_ms)[int(len(took_ms) * 0.99)]
    if "loop_us" in told:
        rows[f"{title}: CPU us of its loop for a command"] = told["loop_us"]
        if load.is_latency:
            rows[f"{title}: turns of its loop for a command"] = told["turns"]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--rounds", type=int, default=1, help="all contenders in turn, so often; medians are printed")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--directory", type=Path, help="where the journals lie; a temporary one otherwise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures there too")
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            rounds[name].append(measure(CONTENDERS[name], options.seconds, options.directory))
    figures = {name: _summed_up(each) for name, each in rounds.items()}
    print_table(figures)
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{options.rounds} x {options.seconds:g} s for each figure; {load}")
    if options.json:
        told = {"seconds": options.seconds, "load": load, "rounds": rounds, "figures": figures}
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    missed = _missed(figures.get("libp2p", {}))
    for what in missed:
        print(f"over its bound: {what}", file=sys.stderr)
    return 1 if missed else 0


def _summed_up(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians; of what must never happen, the worst."""
    names = dict.fromkeys(name for each in rounds for name in each)
    of = {name: [each[name] for each in rounds if name in each] for name in names}
    return {name: max(values) if name.startswith(WORST) else statistics.median(values) for name, values in of.items()}


def _missed(figures: dict[str, float]) -> list[str]:
    return [
        f"{name} is {figures[name]:,.1f}, must be {sign} {bound:,g}"
        for name, (sign, bound) in BOUNDS.items()
        if name in figures and (figures[name] > bound if sign == "<=" else figures[name] < bound)
    ]


def print_table(figures: dict[str, dict[str, float]]) -> None:
    names = dict.fromkeys(name for each in figures.values() for name in each)
    print(f"{'':<64}" + "".join(f"{CONTENDERS[name].title:>15}" for name in figures))
    for name in names:
        cells = [
            f"{each[name]:>15,.{0 if each[name] >= 100 else 2}f}" if name in each else f"{'-':>15}"
            for each in figures.values()
        ]
        print(f"{name:<64}" + "".join(cells))


if __name__ == "__main__":
    sys.exit(main())
