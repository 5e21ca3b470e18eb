"""The three benchmarks, each twice: once alone, for what it costs, and once sampled, for where that goes.

The sampler takes cores of its own and slows what it looks at, so no rate or time comes from the second pass.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.mesh import NODES, SCRATCH, client_of, roles, standing_mesh
from bench.profile.cpu import AGENT, Used, participants, read_clocks, used
from bench.profile.layers import Stack
from bench.profile.sampling import sampled
from bench.profile.syncs import Span, environment, syncs_of
from meshd.client import Client
from meshd.dev import DevMesh
from meshd.model import TaskState
from tests.guests import guest

WAIT_S = 600.0
WARM_UP_TASKS = 1000
WARM_UP_JOBS = 20
LEADER, FOLLOWERS = "leader", "followers"


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one benchmark."""

    tasks: int
    wall_s: float
    used: Used
    sampled: Mapping[str, list[Stack]]
    """By role, in the second pass."""
    waiting: Mapping[str, float]
    """By role, what part of its time on a core or waiting for one was waiting, in the second pass."""


@dataclass(frozen=True, slots=True)
class JobByJob:
    profile: Profile
    jobs: list[Span]
    """Submission to the end of the wait."""
    submissions: list[Span]
    syncs: Mapping[str, list[Span]]
    """Of the leader, and of both followers."""


def wasm_array(tasks: int, nodes: int) -> Profile:
    with _mesh(nodes) as (mesh, agents), client_of(mesh, NODES[0]) as client:
        return _array_twice(client, agents, _noop(client), tasks)


def process_array(tasks: int) -> Profile:
    with _mesh(1) as (mesh, agents), client_of(mesh, NODES[0]) as client:
        return _array_twice(client, agents, {"run": {"args": ["/bin/true"]}}, tasks)


def job_by_job(jobs: int) -> JobByJob:
    """Wasm, on three agents, asked at the leader."""
    with tempfile.TemporaryDirectory() as directory:
        with _mesh(3, environment(Path(directory))) as (mesh, agents):
            leader = next(name for name, pid in _pids(mesh).items() if agents[pid] == LEADER)
            spans: list[tuple[Span, Span]] = []
            with client_of(mesh, leader) as client:
                document = _noop(client)
                _run_jobs(client, document, WARM_UP_JOBS)
                profile = _twice(agents, lambda: spans.extend(_run_jobs(client, document, jobs)), jobs)
        syncs: dict[str, list[Span]] = {LEADER: [], FOLLOWERS: []}
        for pid, role in agents.items():
            syncs[role] += syncs_of(Path(directory), pid)
    unsampled = spans[:jobs]
    return JobByJob(profile, [whole for _, whole in unsampled], [submission for submission, _ in unsampled], syncs)


@contextmanager
def _mesh(
    nodes: int, environment: Mapping[str, str] | None = None
) -> Generator[tuple[DevMesh, dict[int, str]], None, None]:
    """One agent, or three; and what each is, by its process."""
    if nodes == 1:
        SCRATCH.mkdir(exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="profile-", dir=SCRATCH))
        mesh = DevMesh(directory)
        try:
            mesh.start(NODES[0])
            yield mesh, dict.fromkeys(_pids(mesh).values(), AGENT)
        finally:
            mesh.stop()
            shutil.rmtree(directory)
    else:
        with standing_mesh(environment) as mesh:
            leader = roles(mesh)["leader"]
            yield mesh, {pid: LEADER if name == leader else FOLLOWERS for name, pid in _pids(mesh).items()}


def _pids(mesh: DevMesh) -> dict[str, int]:
    return {name: agent.pid for name, agent in mesh.agents.items()}


def _noop(client: Client) -> dict[str, Any]:
    blob = client.put_file(guest("noop"))
    return {"run": {"module": f"blob:{blob.hash}:{blob.size}"}}


def _array_twice(client: Client, agents: Mapping[int, str], document: Mapping[str, Any], tasks: int) -> Profile:
    def run(count: int) -> None:
        view = client.wait(client.submit({**document, "array": {"range": count}}), timeout_s=WAIT_S)
        assert view.state is TaskState.DONE, view

    run(WARM_UP_TASKS)
    return _twice(agents, lambda: run(tasks), tasks)


def _run_jobs(client: Client, document: Mapping[str, Any], count: int) -> list[tuple[Span, Span]]:
    """Of each its submission, and all of it."""
    spans = []
    for _ in range(count):
        began = time.monotonic()
        job = client.submit(document)
        submitted = time.monotonic()
        view = client.wait(job, timeout_s=WAIT_S)
        assert view.state is TaskState.DONE, view
        spans.append(((began, submitted), (began, time.monotonic())))
    return spans


def _twice(agents: Mapping[int, str], run: Callable[[], object], tasks: int) -> Profile:
    wall_s, costs = _measured(agents, run)
    processes = participants(agents)
    with sampled(processes) as seen:
        _, when_sampled = _measured(agents, run)
    stacks: dict[str, list[Stack]] = {}
    for pid, role in processes.items():
        stacks.setdefault(role, []).extend(seen[pid])
    return Profile(tasks, wall_s, costs, stacks, {role: when_sampled.waiting(role) for role in stacks})


def _measured(agents: Mapping[int, str], run: Callable[[], object]) -> tuple[float, Used]:
    there: Mapping[int, str] = participants(agents)
    before = read_clocks(there)
    began = time.monotonic()
    run()
    wall_s = time.monotonic() - began
    there = {**there, **participants(agents)}
    return wall_s, used(there, before, read_clocks(there))
