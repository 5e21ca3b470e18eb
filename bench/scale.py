"""How the cost of control grows with the mesh: `python -m bench.scale [--nodes 3 10 100 1000] [--tasks 100000] [--json F]`.

One simulated mesh for each size (bench/scale_mesh.py says what in it is real), in which every node works on the same
arrays of short tasks. CPU is that of this thread, so that a busy machine makes it larger and does not make it another
figure: compare within one run. `--profile N` prints where the time goes with N nodes, of all nodes together.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import sys
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.mesh import load
from bench.replica import array, job_id
from bench.scale_mesh import SERVERS, ScaleMesh
from bench.transitions import calibrate
from meshd.raft.state.machine import Machine
from meshd.views import GetJob

NODES = (3, 10, 100, 1_000)
TASKS = 100_000
ARRAYS = 10
TASK_MS = 10.0
IDLE_MS = 6_000
STEP_MS = 50
TIMES_MAX = 2.0
"""The leader's CPU for a task with the most nodes, against that with ten."""


@dataclass(frozen=True, slots=True)
class Growth:
    nodes: int
    tasks: int
    seconds: float
    """Of virtual time, from the first submission to the last end."""
    leader_us: float
    """CPU for one task, all that the leader does, without its own work on tasks …"""
    leader_units: float
    """… in pieces of calibration (bench/transitions.py), taken before and after …"""
    apply_us: float
    keeper_us: float
    """… and of that: `apply` with the matching, and the keeper; the rest is log, frames, answers and the simulator."""
    follower_us: float
    worker_us: float
    """CPU of a node without the log for one of its tasks."""
    leader_idle_ms: float
    """CPU in a second in which no task is there."""
    follower_idle_ms: float
    worker_idle_ms: float
    entries_per_task: float
    bytes_per_task: float
    snapshot_kb: float
    """With half of the tasks done."""
    state_kb: float
    """The same in memory."""


def grow(nodes: int, tasks: int, *, arrays: int = ARRAYS, task_ms: float = TASK_MS) -> Growth:
    unit_s = calibrate()
    mesh = ScaleMesh(nodes, task_ms=task_ms)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        return _measured(mesh, tasks, arrays, unit_s)
    finally:
        gc.enable()
        gc.unfreeze()


def _measured(mesh: ScaleMesh, tasks: int, arrays: int, unit_s: float) -> Growth:
    leader = mesh.leader()
    assert leader is not None
    followers = [node for node in mesh.servers if node is not leader]
    workers = mesh.all[len(mesh.servers) :]
    everybody = [leader, *followers, *workers]

    before = [node.control_s for node in everybody]
    mesh.run(IDLE_MS)
    idle_ms = [1e6 * (node.control_s - was) / IDLE_MS for node, was in zip(everybody, before, strict=True)]

    meter, machine = mesh.meter, mesh.machine
    entries, size, began_ms = meter.entries, meter.bytes, mesh.heap.now_ms
    before = [node.control_s for node in everybody]
    worked_s = sum(node.cpu_s for node in workers)
    apply_s, keeper_s = meter.apply_s.get(id(machine), 0.0), leader.keeper_s
    jobs = [job_id(number, mesh.wall_ms()) for number in range(arrays)]
    for job in jobs:
        mesh.submit(job, array(tasks // arrays))
    snapshot = b""
    while (done := sum(machine.answer(GetJob(job)).counts.done for job in jobs)) < tasks // arrays * arrays:
        if not snapshot and done >= tasks // 2:
            snapshot = machine.capture()()
        mesh.run(STEP_MS)
        assert mesh.leader() is leader, "the leader changed"
    took = [node.control_s - was for node, was in zip(everybody, before, strict=True)]
    unit_s = (unit_s + calibrate()) / 2
    return Growth(
        nodes=len(everybody),
        tasks=tasks,
        seconds=(mesh.heap.now_ms - began_ms) / 1000,
        leader_us=1e6 * took[0] / tasks,
        leader_units=took[0] / tasks / unit_s,
        apply_us=1e6 * (meter.apply_s[id(machine)] - apply_s) / tasks,
        keeper_us=1e6 * (leader.keeper_s - keeper_s) / tasks,
        follower_us=1e6 * sum(took[1:3]) / 2 / tasks,
        worker_us=1e6
        * (sum(node.cpu_s for node in workers) - worked_s)
        / tasks
        / max(len(workers), 1)
        * len(everybody),
        leader_idle_ms=idle_ms[0],
        follower_idle_ms=sum(idle_ms[1:3]) / 2,
        worker_idle_ms=sum(idle_ms[3:]) / max(len(workers), 1),
        entries_per_task=(meter.entries - entries) / tasks,
        bytes_per_task=(meter.bytes - size) / tasks,
        snapshot_kb=len(snapshot) / 1024,
        state_kb=_memory_of(snapshot) / 1024,
    )


def _memory_of(snapshot: bytes) -> int:
    """Of the state that is restored from it."""
    if not snapshot:
        return 0
    tracemalloc.start()
    machine = Machine()
    machine.restore(snapshot)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used


def profile(nodes: int, tasks: int) -> None:
    profiler = cProfile.Profile()
    mesh = ScaleMesh(nodes, task_ms=TASK_MS)
    profiler.enable()
    _measured(mesh, tasks, ARRAYS, calibrate())
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


COLUMNS = {
    "nodes": "nodes", "seconds": "virtual s", "leader_us": "leader us/task", "leader_units": "units",
    "apply_us": "apply", "keeper_us": "keeper", "follower_us": "follower us/task", "worker_us": "worker us/own task",
    "leader_idle_ms": "idle: leader ms/s", "follower_idle_ms": "follower", "worker_idle_ms": "worker",
    "entries_per_task": "entries/task", "bytes_per_task": "bytes/task", "snapshot_kb": "snapshot KB",
    "state_kb": "state KB",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--task-ms", type=float, default=TASK_MS, help="how long each takes")
    parser.add_argument("--profile", type=int, metavar="N", help="where the time goes with N nodes, instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if min(*options.nodes, options.profile or SERVERS) < SERVERS or options.tasks < 1:
        parser.error(f"a mesh has at least {SERVERS} nodes here, and a task")
    if options.profile:
        profile(options.profile, options.tasks)
        return 0
    rows: list[Growth] = []
    print("  ".join(COLUMNS.values()), flush=True)
    for nodes in options.nodes:
        rows.append(grow(nodes, options.tasks, task_ms=options.task_ms))
        figures = asdict(rows[-1])
        print("  ".join(f"{figures[name]:>{len(title)}.4g}" for name, title in COLUMNS.items()), flush=True)
    print(f"CPU of one thread; {load()}")
    if options.json:
        costs = [asdict(row) for row in rows]
        options.json.write_text(json.dumps({"load": load(), "growth": costs}, indent=2) + "\n")
    ten = next((row.leader_units for row in rows if row.nodes == 10), None)
    too_much = [row.nodes for row in rows if ten is not None and row.nodes > 10 and row.leader_units > TIMES_MAX * ten]
    if too_much:
        print(
            f"over {TIMES_MAX:g} times the leader's CPU per task of ten nodes: with {too_much} nodes", file=sys.stderr
        )
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
