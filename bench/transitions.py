"""What the agreed state costs every voter, step by step: `python -m bench.transitions [--json FILE]`.

One replica (replica.py), one thread. How long `apply` takes for one lease and one end: of arrays whose tasks end well
with nothing to tell, reported hundreds at a time and each by itself, from 10³ to 10⁶ tasks and for one and more nodes;
and of jobs of one task that leave output. Then what a job of a million tasks costs as a whole, and what a snapshot of
many live jobs takes from the loop and from a thread. Figures are also given in units of a fixed piece of pure Python
that runs beside them, which is what a test compares (tests/unit/test_transition_costs.py): that ratio is about the
same on a fast machine and on a slow one.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.mesh import load
from bench.replica import Replica, array, job_id
from meshd.model import AttemptKey, EndReason, Inline, Outcome
from meshd.raft.state.commands import Cancel, Ended, Submit
from meshd.raft.state.machine import Machine
from meshd.views import GetJob, GetSummary, ListJobs, ListTasks

SIZES = (1_000, 10_000, 100_000, 1_000_000)
NODES = (1, 3, 10)
JOBS = 20_000
"""Of one task, submitted and run to the end."""
LIVE = 100_000
"""Jobs in a snapshot."""
SUBMITS = 100
"""In one entry."""
REPORT = 250
"""Ends in one report."""
AHEAD = 1_000
GOOD = Outcome(EndReason.EXIT, exit_code=0)
TOLD = Outcome(EndReason.EXIT, exit_code=0, stdout=Inline(b"x" * 100), run_ms=12)


@dataclass(frozen=True, slots=True)
class Cost:
    step: str
    tasks: int
    nodes: int
    us: float
    """Of one of them."""
    units: float
    """The same in pieces of calibration."""


@dataclass(frozen=True, slots=True)
class Memory:
    of: str
    bytes: int


def calibrate() -> float:
    """Seconds of a fixed piece of pure Python, about 1 µs on a machine of 2024: the shortest of some, all else is noise."""
    pieces, best = 20_000, float("inf")
    for _ in range(5):
        table: dict[int, tuple[int, str]] = {}
        start = time.thread_time()
        for number in range(pieces):
            key = (number * 7919) & 0x3FF
            old = table.get(key)
            table[key] = (number, "x") if old is None else (old[0] + number, old[1])
            if len(table) > 1000:
                table.clear()
        best = min(best, time.thread_time() - start)
    return best / pieces


def runs_to_the_end(tasks: int, nodes: int) -> float:
    """Seconds of `apply` for one task: its lease and its end, reported with hundreds of others."""
    replica = Replica(nodes)
    replica.do(replica.nodes[0], Submit(job_id(1), array(tasks)))
    for node in replica.nodes:
        replica.report(node, ahead=((job_id(1), AHEAD),))
    replica.cpu_s = 0.0
    while any(replica.leased.values()):
        for node in replica.nodes:
            if done := replica.take(node, REPORT):
                replica.report(node, done=tuple(done))
    view = replica.machine.answer(GetJob(job_id(1)))
    assert view.counts.done == tasks, view
    return replica.cpu_s / tasks


def singles_to_the_end(tasks: int, nodes: int) -> float:
    """The same, each end with its outcome and apart from its neighbours: what runs save nothing of."""
    replica = Replica(nodes)
    replica.do(replica.nodes[0], Submit(job_id(1), array(tasks)))
    for node in replica.nodes:
        replica.report(node, ahead=((job_id(1), AHEAD),))
    replica.cpu_s = 0.0
    while any(replica.leased.values()):
        for node in replica.nodes:
            keys: list[AttemptKey] = [key for run in replica.take(node, REPORT) for key in run.each()]
            for half in (keys[::2], keys[1::2]):
                if half:
                    replica.report(node, ended=tuple(Ended(key, GOOD) for key in half))
    assert replica.machine.answer(GetJob(job_id(1))).counts.done == tasks
    return replica.cpu_s / tasks


def jobs_to_the_end(jobs: int, nodes: int) -> tuple[float, float]:
    """Seconds of `apply` for one job of one task: its submission, nearly always with no slot free; its lease and its end."""
    replica = Replica(nodes)
    replica.cpu_s = 0.0
    replica.submit(jobs, entry=SUBMITS)
    submitted_s, replica.cpu_s = replica.cpu_s, 0.0
    while any(replica.leased.values()):
        for node in replica.nodes:
            if held := replica.take(node, REPORT):
                replica.report(node, ended=tuple(Ended(run.key(), TOLD) for run in held))
    assert not replica.machine.answer(GetSummary()).live_jobs
    return submitted_s / jobs, replica.cpu_s / jobs


def as_a_whole(tasks: int) -> list[tuple[str, float]]:
    """Submitting, asking for and cancelling one job, half of it leased and some of it done, in seconds."""
    replica = Replica(1)
    [node] = replica.nodes
    submit_s = seconds(lambda: replica.do(node, Submit(job_id(1), array(tasks))))
    replica.report(node, ahead=((job_id(1), AHEAD),))
    for _ in range(5):
        replica.report(node, done=tuple(replica.take(node, REPORT)))
    return [
        ("submit", submit_s),
        ("status", seconds(lambda: replica.machine.answer(GetJob(job_id(1))))),
        ("list jobs", seconds(lambda: replica.machine.answer(ListJobs()))),
        ("list 100 tasks", seconds(lambda: replica.machine.answer(ListTasks(job_id(1), limit=100)))),
        ("cancel", seconds(lambda: replica.do(node, Cancel(job_id(1))))),
    ]


def array_bytes(tasks: int) -> int:
    replica = Replica(1)
    return grown(lambda: replica.do(replica.nodes[0], Submit(job_id(1), array(tasks))))


def of_live_jobs(jobs: int) -> tuple[int, list[tuple[str, float]]]:
    """Bytes for one of them. Seconds of their snapshot: of the loop, then of any thread, there and where it is restored."""
    replica = Replica(1)
    held_bytes = grown(lambda: replica.submit(jobs, entry=SUBMITS)) // jobs
    packs: list[Callable[[], bytes]] = []
    packed: list[bytes] = []
    return held_bytes, [
        ("capture all live jobs, in the loop", seconds(lambda: packs.append(replica.machine.capture()))),
        ("pack them, in a thread", seconds(lambda: packed.append(packs[0]()))),
        ("restore them, in a thread", seconds(lambda: Machine().restore(packed[0]))),
    ]


def seconds(act: Callable[[], object]) -> float:
    """CPU of this thread."""
    start = time.thread_time()
    act()
    return time.thread_time() - start


def grown(fill: Callable[[], object]) -> int:
    """Bytes that Python has allocated and not freed meanwhile."""
    tracemalloc.start()
    fill()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held


def measure(sizes: Sequence[int] = SIZES, jobs: int = JOBS, live: int = LIVE) -> tuple[list[Cost], list[Memory]]:
    unit_s = calibrate()
    costs: list[Cost] = []

    def cost(step: str, tasks: int, nodes: int, took_s: float) -> None:
        costs.append(Cost(step, tasks, nodes, took_s * 1e6, took_s / unit_s))

    most = max(sizes)
    memory = [Memory(f"one job of {most:,} tasks", array_bytes(most))]
    job_bytes, snapshot = of_live_jobs(live)
    memory.append(Memory(f"each of {live:,} live jobs", job_bytes))
    for step, took_s in snapshot:
        cost(step, live, 1, took_s)
    for nodes in NODES:
        for tasks in sizes:
            cost("lease and end, in runs", tasks, nodes, runs_to_the_end(tasks, nodes))
    for tasks in sizes[:3]:
        cost("lease and end, each with its outcome", tasks, 1, singles_to_the_end(tasks, 1))
    submit_s, end_s = jobs_to_the_end(jobs, max(NODES))
    cost("submit a job of one task, no slot free", jobs, max(NODES), submit_s)
    cost("lease and end of that job, with output", jobs, max(NODES), end_s)
    for step, took_s in as_a_whole(most):
        cost(step, most, 1, took_s)
    return costs, memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    gc.disable()  # what the collector costs depends on the process around it
    costs, memory = measure()
    print(f"{'step':<40} {'tasks':>9} {'nodes':>6} {'µs':>12} {'units':>12}")
    for row in costs:
        print(f"{row.step:<40} {row.tasks:>9} {row.nodes:>6} {row.us:>12,.2f} {row.units:>12,.2f}")
    for held in memory:
        print(f"memory of {held.of}: {held.bytes:,} bytes")
    print(f"CPU of one replica's thread; a unit is {calibrate() * 1e6:.2f} µs; {load()}")
    if options.json:
        figures = {"load": load(), "costs": [asdict(row) for row in costs], "memory": [asdict(row) for row in memory]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
