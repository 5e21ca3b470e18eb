"""What holds up a server's loop: python -m bench.stalls [--jobs N] [--seconds S] [--json FILE]

Three servers as processes, each with the real queue of 100,000 live jobs, while jobs come and are cancelled: writing
snapshots, answering `mesh ps`, collecting garbage, installing a snapshot at a server that was away, replaying the log
at a start. For each phase the longest turn of every loop, by the clocks of bench/turns.py, and the task with the
longest step in it. Exits with 1 when a loop was away for over 50 ms, the wait for a core apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.raft import NODES, Contender, Server, free_port

TURN_MS_MAX = 50.0
AWAY_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Row:
    phase: str
    server: str
    wall_ms: float
    turn_ms: float
    cpu_ms: float
    late_ms: float
    collector_ms: float
    step_ms: float
    step: str

    @property
    def is_over(self) -> bool:
        return max(self.turn_ms, self.late_ms) > TURN_MS_MAX


FIGURES = ("wall_ms", "turn_ms", "cpu_ms", "late_ms", "collector_ms", "step_ms", "step")


class Bench:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ports = {name: free_port() for name in NODES}
        self.servers: dict[str, Server] = {}
        self.rows: list[Row] = []

    def start(self, name: str, *, jobs: int = 0, is_founding: bool = False) -> Server:
        contender = Contender(name, "bench.stalls_server", {"jobs": jobs, "is_founding": is_founding})
        self.servers[name] = Server(contender, name, self._ports, self._directory)
        return self.servers[name]

    def phase(self, title: str, act: Callable[[], object]) -> None:
        """Only what happens in it counts."""
        for server in self.servers.values():
            server.order("tell")
        act()
        for name, server in self.servers.items():
            self.note(title, name, server.order("tell"))

    def note(self, title: str, name: str, told: dict[str, Any]) -> None:
        figures = {key: told[key] for key in FIGURES}
        row = Row(title, f"{name}, {told['role']}", **figures)
        self.rows.append(row)
        over = "  <<<" if row.is_over else ""
        cells = "".join(f"{told[key]:>9.1f}" for key in FIGURES if key.endswith("_ms"))
        print(f"{row.phase:<30} {row.server:<12}{cells}  {row.step}{over}", flush=True)


def run(bench: Bench, jobs: int, seconds: float) -> None:
    heads = "".join(f"{head:>9}" for head in ("wall ms", "turn ms", "CPU ms", "late ms", "gc ms", "step ms"))
    print(f"{'':<30} {'':<12}{heads}  of")
    for name in NODES:
        bench.start(name, is_founding=name == NODES[0])
    for server in bench.servers.values():
        server.answer()
    leader = bench.servers[NODES[0]]
    assert leader.order("found")["role"] == "leader"

    def measured_at_leader(title: str, do: str, **what: Any) -> None:
        told: dict[str, Any] = {}
        bench.phase(title, lambda: told.update(leader.order(do, **what)))
        bench.note(title, NODES[0], told)

    measured_at_leader(f"filled to {jobs:,} jobs", "fill", jobs=jobs)
    leader.order("churn")
    bench.phase("jobs come and go, snapshots", lambda: time.sleep(seconds))
    for name in NODES[:2]:
        server = bench.servers[name]
        server.order("tell")
        bench.note("every query", name, server.order("ask"))
    for name in NODES[:2]:
        server = bench.servers[name]
        server.order("tell")
        bench.note("a full collection", name, server.order("collect"))

    away = NODES[2]
    last = bench.servers[away].order("tell")["last"]
    bench.servers.pop(away).kill()
    deadline = time.monotonic() + AWAY_S_MAX
    while leader.order("tell")["first"] <= last:
        assert time.monotonic() < deadline, "the leader's log was not trimmed"
        time.sleep(0.1)
    bench.note("started far behind", away, bench.start(away, jobs=jobs).answer())
    bench.phase("it installs a snapshot", lambda: _wait_first(bench.servers[away], last))

    bench.servers.pop(away).kill()
    bench.note("started again, log replayed", away, bench.start(away, jobs=jobs).answer())
    bench.phase("it catches up", lambda: time.sleep(seconds))
    leader.order("calm")


def _wait_first(server: Server, last: int) -> None:
    deadline = time.monotonic() + AWAY_S_MAX
    while server.order("look")["first"] <= last:
        assert time.monotonic() < deadline, "no snapshot was installed"
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="for the phases that have no end of their own")
    parser.add_argument("--directory", type=Path, help="where the journals lie; a temporary one otherwise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=options.directory, prefix="stalls-bench-"))
    bench = Bench(directory)
    try:
        run(bench, options.jobs, options.seconds)
    finally:
        for server in bench.servers.values():
            server.kill()
        shutil.rmtree(directory)
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(load)
    if options.json:
        figures = {"jobs": options.jobs, "load": load, "rows": [asdict(row) for row in bench.rows]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if any(row.is_over for row in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
