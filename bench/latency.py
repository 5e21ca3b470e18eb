"""How long a job takes that does nothing: `python -m bench.latency [--jobs N] [--json FILE]`.

Three agents as processes, every commit synced on a majority of them. One job at a time through the client, at the
node that leads and at one that follows: submit, wait for its end, read its output. Exits with 1 when the median of
the wasm jobs is over its bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.mesh import NODES, client_of, cpu_s, load, roles, standing_mesh
from meshd.client import Client
from meshd.dev import DevMesh
from meshd.model import TaskState
from tests.guests import guest

P50_MS_MAX = 50.0
WARM_UP = 10
STEPS = ("submit", "wait", "output", "all")


@dataclass(frozen=True, slots=True)
class Latency:
    job: str
    at: str
    step: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cpu_ms: float
    """Of all three agents for one job, without what runs it; the same for every step of it."""


def measure(jobs: int) -> list[Latency]:
    module = guest("noop")
    rows: list[Latency] = []
    with standing_mesh() as mesh:
        with client_of(mesh, NODES[0]) as client:
            blob = client.put_file(module)
        documents = {
            "wasm": {"run": {"module": f"blob:{blob.hash}:{blob.size}"}},
            "process": {"run": {"args": ["/bin/true"]}},
        }
        for role, name in roles(mesh).items():
            with client_of(mesh, name) as client:
                for kind, document in documents.items():
                    rows += _one_at_a_time(mesh, client, kind, role, document, jobs)
    return rows


def _one_at_a_time(
    mesh: DevMesh, client: Client, kind: str, role: str, document: Mapping[str, Any], jobs: int
) -> list[Latency]:
    for _ in range(WARM_UP):
        _run(client, document)
    before_s = sum(cpu_s(agent.pid) for agent in mesh.agents.values())
    took_ms: dict[str, list[float]] = {step: [] for step in STEPS}
    for _ in range(jobs):
        for step, ms in zip(STEPS, _run(client, document), strict=True):
            took_ms[step].append(ms)
    cpu_ms = (sum(cpu_s(agent.pid) for agent in mesh.agents.values()) - before_s) / jobs * 1000
    rows = []
    for step, each in took_ms.items():
        hundredths = statistics.quantiles(each, n=100)
        rows.append(Latency(kind, role, step, hundredths[49], hundredths[89], hundredths[98], cpu_ms))
    return rows


def _run(client: Client, document: Mapping[str, Any]) -> tuple[float, ...]:
    """Milliseconds of each step."""
    moments = [time.perf_counter()]
    job = client.submit(document)
    moments.append(time.perf_counter())
    view = client.wait(job, timeout_s=60)
    moments.append(time.perf_counter())
    client.output(job)
    moments.append(time.perf_counter())
    assert view.state is TaskState.DONE, view
    steps = [(after - before) * 1000 for before, after in pairwise(moments)]
    return (*steps, sum(steps))


def print_table(rows: list[Latency]) -> None:
    print(f"{'job':<10} {'at':<10} {'step':<8} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8} {'CPU ms':>8}")
    for row in rows:
        cpu = f"{row.cpu_ms:>8.1f}" if row.step == "all" else ""
        print(
            f"{row.job:<10} {row.at:<10} {row.step:<8} {row.p50_ms:>8.1f} {row.p90_ms:>8.1f} {row.p99_ms:>8.1f} {cpu}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200, help="of each kind, at each node")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    rows = measure(options.jobs)
    print_table(rows)
    print(f"{options.jobs} jobs each, one at a time; {load()}")
    if options.json:
        figures = {"jobs": options.jobs, "load": load(), "steps": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    slow = [row for row in rows if row.job == "wasm" and row.step == "all" and row.p50_ms >= P50_MS_MAX]
    for row in slow:
        print(f"a wasm job at the {row.at} takes {row.p50_ms:.1f} ms, its bound is {P50_MS_MAX:.0f}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
