"""Who is compared, and with which settings: the ones that the page on performance writes down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    package: str
    """Its environment, and the driver's name."""
    unit: str
    """What one task is to it."""
    durable: str
    """What has happened when a submission is answered."""
    settings: str
    options: dict[str, Any] = field(default_factory=dict)
    tasks_max: int = 10**9
    """No question asks more of it: it would take too long to be worth the wait."""


FSYNC = "fsynced"
QUORUM = "fsynced by 2 of 3"
MEMORY = "in memory"


def _meshd(nodes: int, kind: str, unit: str) -> Contender:
    name = f"meshd {kind}, {nodes} node{'s' * (nodes > 1)}"
    if kind == "function":
        settings = "`MeshExecutor`, adaptive: short calls share a task" + (
            "; three agents share the cores" * (nodes > 1)
        )
        return Contender(name, "meshd", unit, FSYNC if nodes == 1 else QUORUM, settings, {"nodes": nodes, "kind": kind})
    settings = "defaults; slots and cores as the agent finds them" + ("; three agents share the cores" * (nodes > 1))
    return Contender(name, "meshd", unit, FSYNC if nodes == 1 else QUORUM, settings, {"nodes": nodes, "kind": kind})


CONTENDERS = (
    _meshd(1, "wasm", "wasm module"),
    _meshd(3, "wasm", "wasm module"),
    _meshd(1, "process", "process"),
    _meshd(3, "process", "process"),
    Contender(
        "HyperQueue", "hyperqueue", "process", MEMORY,
        "server and worker in one process (`LocalCluster`), no journal, output of tasks discarded, no progress bar; "
        "its Python `wait_for_jobs` looks once a second",
    ),
    _meshd(1, "function", "Python function"),
    _meshd(3, "function", "Python function"),
    Contender(
        "meshd function, alone", "meshd", "Python function", FSYNC, "one node; `map(…, chunksize=1)`: a task and a process for each call",
        {"nodes": 1, "kind": "function", "chunksize": 1}, 1_000,
    ),
    Contender(
        "Dask", "dask", "Python function", MEMORY,
        "`LocalCluster`: a worker process with one thread for each core, no dashboard, `worker-saturation: inf`, `client.map` "
        "and one `gather`",
    ),
    Contender(
        "Ray", "ray", "Python function", MEMORY,
        "`ray.init(num_cpus=cores)`, no dashboard, no usage statistics, one `ray.get` for all; 1,000 tasks to warm up",
    ),
    Contender(
        "Celery + Redis", "celery", "Python function", MEMORY,
        "prefork, a process for each core, prefetch 128, no gossip, mingle, heartbeat or events; Redis on a local socket, "
        "neither snapshots nor append-only file; one `group` and `join_native`",
    ),
)  # fmt: skip
"""In the order of the tables: by what a task is."""
