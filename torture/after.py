"""The mesh after a round of faults: everybody back, everything finished, and what each node then knows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torture.api import Answered, NodeApi, Silence
from torture.checker import Listed, Task, Trace

PAGE = 1000
ASK_S = 10.0
PATIENCE_S = 30.0
"""For one question: the faults are over."""


class Unanswered(Exception):
    """A node that is there does not answer."""


def list_jobs(api: NodeApi, name: str) -> list[Listed]:
    """All of a round, as this node has them."""
    found: list[Listed] = []
    before = ""
    while True:
        page = _get(api, f"/v1/jobs?name={name}&limit={PAGE}" + (f"&before={before}" if before else ""))
        found += [Listed(job["id"], job["state"], job["is_final"]) for job in page["jobs"]]
        if page["next"] is None:
            return found
        before = page["next"]


def list_tasks(api: NodeApi, job: str) -> list[Task]:
    found: list[Task] = []
    start: int | None = 0
    while start is not None:
        page = _get(api, f"/v1/jobs/{job}/tasks?limit={PAGE}&start={start}")
        found += [Task(job, row["task"], row["state"], row["attempt"], row["fence"]) for row in page["tasks"]]
        start = page["next"]
    return found


def wait_finished(api: NodeApi, name: str, within_s: float) -> bool:
    """Whether all jobs of a round end within this time."""
    deadline = time.monotonic() + within_s
    unfinished = "waiting,ready,leased,running,held"
    while _get(api, f"/v1/jobs?name={name}&limit=1&state={unfinished}")["jobs"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def read_traces(path: Path) -> list[Trace]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        job, task, attempt, fence, word = line.split()
        found.append(Trace(job, int(task), int(attempt), int(fence), word))
    return found


def gather(sockets: Mapping[str, str], name: str, traced: Sequence[str]) -> tuple[dict[str, list[Listed]], list[Task]]:
    """(what each node lists, the tasks of these jobs as one of the nodes has them)."""
    apis = {node: NodeApi(path) for node, path in sockets.items()}
    try:
        listed = {node: list_jobs(api, name) for node, api in apis.items()}
        there = {job.id for jobs in listed.values() for job in jobs}
        any_node = next(iter(apis.values()))
        tasks = [task for job in traced if job in there for task in list_tasks(any_node, job)]
    finally:
        for api in apis.values():
            api.close()
    return listed, tasks


def _get(api: NodeApi, path: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return api.get(path, timeout_s=ASK_S)
        except (Silence, Answered) as error:
            if time.monotonic() > deadline or (isinstance(error, Answered) and not error.is_temporary):
                raise Unanswered(f"{path}: {error}") from error
            time.sleep(0.1)
