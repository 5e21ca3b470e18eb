"""What an agent costs that does nothing: `python -m bench.idle [--seconds S] [--json FILE]`.

Three agents as processes, a mesh that survives the loss of one; then nothing is asked of them.
Exits with 1 when an agent is over its bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.mesh import NODES, SETTLE_S, cpu_s, descendants, load, resident_bytes, roles, standing_mesh

RESIDENT_MB_MAX = 150.0
CPU_PERCENT_MAX = 3.0
SAMPLES = 20


@dataclass(frozen=True, slots=True)
class Idle:
    agent: str
    role: str
    resident_mb: float
    """The largest of the samples."""
    cpu_percent: float
    """Of one core."""
    children: tuple[tuple[str, float, float], ...]
    """(command, resident MB, CPU %) of the processes below it at the end."""

    @property
    def is_within_bounds(self) -> bool:
        return self.resident_mb < RESIDENT_MB_MAX and self.cpu_percent < CPU_PERCENT_MAX


def measure(seconds: float) -> list[Idle]:
    with standing_mesh() as mesh:
        leader = roles(mesh)["leader"]
        time.sleep(SETTLE_S)
        pids = {name: mesh.agents[name].pid for name in NODES}
        children = {name: descendants(pid) for name, pid in pids.items()}
        watched = [*pids.values(), *(child for each in children.values() for child, _ in each)]
        largest = dict.fromkeys(watched, 0)
        before, began = {pid: cpu_s(pid) for pid in watched}, time.monotonic()
        for _ in range(SAMPLES):
            time.sleep(seconds / SAMPLES)
            largest = {pid: max(seen, resident_bytes(pid)) for pid, seen in largest.items()}
        took_s = time.monotonic() - began
        percent = {pid: (cpu_s(pid) - before[pid]) / took_s * 100 for pid in watched}
        return [
            Idle(
                agent=name,
                role="leader" if name == leader else "follower",
                resident_mb=largest[pid] / 1e6,
                cpu_percent=percent[pid],
                children=tuple((command, largest[child] / 1e6, percent[child]) for child, command in children[name]),
            )
            for name, pid in pids.items()
        ]


def print_table(rows: list[Idle]) -> None:
    print(f"{'':<44} {'resident MB':>12} {'CPU %':>8}")
    for row in rows:
        print(f"{row.agent + ', ' + row.role:<44} {row.resident_mb:>12.1f} {row.cpu_percent:>8.2f}")
        for command, resident_mb, cpu_percent in row.children:
            print(f"    {command[:40]:<40} {resident_mb:>12.1f} {cpu_percent:>8.2f}")
    print(f"{'bound for each agent':<44} {RESIDENT_MB_MAX:>12.1f} {CPU_PERCENT_MAX:>8.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    rows = measure(options.seconds)
    print_table(rows)
    print(f"over {options.seconds:.0f} s; {load()}")
    if options.json:
        figures = {"seconds": options.seconds, "load": load(), "agents": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    over = [row.agent for row in rows if not row.is_within_bounds]
    if over:
        print(f"over the bounds: {', '.join(over)}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
