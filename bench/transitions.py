"""What one step of the agreed state costs every voter: `python -m bench.transitions [--json FILE]`.

One replica, driven by entries as the log would, without log, network or disk. Of arrays whose tasks end well with
nothing to tell: how long `apply` takes for one lease and one end, when a node reports hundreds at a time and when it
reports each by itself, from 10³ to 10⁶ tasks and for one and more nodes. Then what a job of a million tasks costs as a
whole. Figures are also given in units of a fixed piece of pure Python that runs beside them, which is what a test
compares (tests/unit/test_transition_costs.py): that ratio is about the same on a fast machine and on a slow one.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from bench.mesh import load
from meshd import codec
from meshd.model import (
    Array,
    AttemptKey,
    AttemptRun,
    BackendOffer,
    EndReason,
    JobId,
    JobSpec,
    Member,
    NodeId,
    Offer,
    Outcome,
    Resources,
    Role,
    Run,
)
from meshd.raft.state.commands import (
    Batch,
    Cancel,
    Command,
    CreateInvite,
    Ended,
    Found,
    Join,
    Leased,
    OpenSession,
    Report,
    Stamped,
    Submit,
)
from meshd.raft.state.machine import Machine
from meshd.views import GetJob, ListJobs, ListTasks

SIZES = (1_000, 10_000, 100_000, 1_000_000)
NODES = (1, 3, 10)
REPORT = 250
"""Ends in one report."""
AHEAD = 1_000
SECRET = "5" * 64
WALL_MS = 1_800_000_000_000
GOOD = Outcome(EndReason.EXIT, exit_code=0)
OFFER = Offer(backends=(BackendOffer("wasm"),), resources=Resources(cpu_milli=2_000))


@dataclass(frozen=True, slots=True)
class Cost:
    step: str
    tasks: int
    nodes: int
    us: float
    """Of one of them."""
    units: float
    """The same in pieces of calibration."""


class Replica:
    """A machine and the nodes that work for it."""

    def __init__(self, nodes: int) -> None:
        self.machine = Machine()
        self.index = 0
        self.cpu_s = 0.0
        self.nodes = [NodeId(f"node-{number}") for number in range(nodes)]
        self.seqs = dict.fromkeys(self.nodes, 0)
        self.leased: dict[NodeId, list[AttemptRun]] = {node: [] for node in self.nodes}
        roles = (Role.SERVER, Role.WORKER)
        first = self.nodes[0]
        self.do(first, Found("mesh", Member(first, "a", roles)))
        self.do(first, CreateInvite(SECRET, roles, 1000, 3_600_000))
        for node in self.nodes[1:]:
            self.do(first, Join(SECRET, Member(node, str(node), roles)))
        for node in self.nodes:
            self.do(node, OpenSession(1, (), 8, OFFER))

    def do(self, origin: NodeId, command: Command) -> None:
        """One entry with one command; only `apply` is timed."""
        body = msgspec.Raw(codec.encode(command))
        entry = codec.encode(Batch(1, WALL_MS, (Stamped(origin, body),)))
        self.index += 1
        start = time.thread_time()
        self.machine.apply(self.index, entry)
        self.cpu_s += time.thread_time() - start
        for event in self.machine.take_events():
            if isinstance(event, Leased):
                self.leased[event.node].append(event.run)

    def report(self, node: NodeId, **what: object) -> None:
        self.seqs[node] += 1
        self.do(node, Report(1, self.seqs[node], **what))  # type: ignore[arg-type]

    def take(self, node: NodeId, count: int) -> list[AttemptRun]:
        """The oldest of what it holds."""
        taken: list[AttemptRun] = []
        held = self.leased[node]
        while held and count:
            run = held.pop(0)
            if run.count > count:
                held.insert(0, run.part(count, run.count))
                run = run.part(0, count)
            taken.append(run)
            count -= run.count
        return taken


def job_id(number: int, wall_ms: int = WALL_MS) -> JobId:
    text = f"{(wall_ms << 80) | (7 << 76) | (2 << 62) | number:032x}"
    return JobId("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))


def array(count: int) -> JobSpec:
    return JobSpec(backend=("wasm",), run=Run(args=("noop",)), array=Array(count=count))


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


def as_a_whole(tasks: int) -> list[tuple[str, float]]:
    """Submitting, asking for and cancelling one job, half of it leased and some of it done, in seconds."""
    replica = Replica(1)
    [node] = replica.nodes
    steps: list[tuple[str, float]] = []

    def timed(step: str, act: Callable[[], object]) -> None:
        start = time.thread_time()
        act()
        steps.append((step, time.thread_time() - start))

    timed("submit", lambda: replica.do(node, Submit(job_id(1), array(tasks))))
    replica.report(node, ahead=((job_id(1), AHEAD),))
    for _ in range(5):
        replica.report(node, done=tuple(replica.take(node, REPORT)))
    timed("status", lambda: replica.machine.answer(GetJob(job_id(1))))
    timed("list jobs", lambda: replica.machine.answer(ListJobs()))
    timed("list 100 tasks", lambda: replica.machine.answer(ListTasks(job_id(1), limit=100)))
    timed("cancel", lambda: replica.do(node, Cancel(job_id(1))))
    return steps


def measure(sizes: Sequence[int] = SIZES) -> list[Cost]:
    unit_s = calibrate()
    rows = []
    for nodes in NODES:
        for tasks in sizes:
            took_s = runs_to_the_end(tasks, nodes)
            rows.append(Cost("lease and end, in runs", tasks, nodes, took_s * 1e6, took_s / unit_s))
    for tasks in sizes[:3]:
        took_s = singles_to_the_end(tasks, 1)
        rows.append(Cost("lease and end, each with its outcome", tasks, 1, took_s * 1e6, took_s / unit_s))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step, took_s in as_a_whole(max(sizes)):
        rows.append(Cost(step, max(sizes), 1, took_s * 1e6, took_s / unit_s))
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    rows.append(Cost("memory of that job, KB", max(sizes), 1, float(grown_kb), 0.0))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    rows = measure()
    print(f"{'step':<40} {'tasks':>9} {'nodes':>6} {'µs':>10} {'units':>10}")
    for row in rows:
        print(f"{row.step:<40} {row.tasks:>9} {row.nodes:>6} {row.us:>10.2f} {row.units:>10.2f}")
    print(f"CPU of one replica's thread; a unit is {calibrate() * 1e6:.2f} µs; {load()}")
    if options.json:
        options.json.write_text(json.dumps({"load": load(), "costs": [asdict(row) for row in rows]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
