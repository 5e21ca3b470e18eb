"""meshd: one agent, or three on this machine, each a process; every command fsynced on a majority of them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from bench.mesh import cpu_s, resident_bytes, standing_mesh
from meshd.client import Client, MeshExecutor
from meshd.dev import DevMesh
from meshd.model import TaskState
from tests.guests import guest

from base import Driver, main, timed  # isort: skip

WAIT_S = 600.0
AGENT_FLAGS = ("--log-level", "warning")


class Meshd(Driver):
    """`kind`: wasm, process or function."""

    def start(self) -> str:
        self._stack = ExitStack()
        if self.options["nodes"] == 1:
            self._mesh = DevMesh(self.directory)
            self._stack.callback(self._mesh.stop)
            self._mesh.start("node1", *AGENT_FLAGS)
        else:
            self._mesh = self._stack.enter_context(standing_mesh())
        self._sockets = [self._mesh.socket(name) for name in self._mesh.agents]
        self._own = threading.local()
        self._client = self._connect()
        module = self._client.put_file(guest("noop"))
        sleeper = self._client.put_file(guest("guest"))
        self._noop, self._nap = _programs(f"blob:{module.hash}:{module.size}", f"blob:{sleeper.hash}:{sleeper.size}")[
            self.options["kind"]
        ]
        if self.options["kind"] == "function":
            self._executor = MeshExecutor(self._sockets)
            self._stack.callback(self._executor.shutdown)
        self.one()
        return version("meshd")

    def noop(self, count: int) -> dict[str, float]:
        before_s = self._agents_cpu_s()
        began = time.perf_counter()
        if self.options.get("chunksize"):
            list(self._executor.map(_noop, range(count), chunksize=self.options["chunksize"]))
        elif self.options["kind"] == "function":
            for future in [self._executor.submit(_noop, number) for number in range(count)]:
                future.result(WAIT_S)
        else:
            self._array(self._noop, count)
        return {"seconds": time.perf_counter() - began, "agents_cpu_s": self._agents_cpu_s() - before_s}

    def sleep(self, count: int, task_s: float) -> float:
        if self.options["kind"] == "function":
            return timed(lambda: list(self._executor.map(time.sleep, [task_s] * count, timeout=WAIT_S)))
        return timed(lambda: self._array(self._nap(task_s), count))

    def one(self) -> tuple[float, float]:
        began = time.perf_counter()
        if self.options["kind"] == "function":
            future = self._executor.submit(_noop, 0)
            submitted_s = time.perf_counter() - began
            future.result(WAIT_S)
            return submitted_s, time.perf_counter() - began
        if not hasattr(self._own, "client"):
            self._own.client = self._connect()
        job = self._own.client.submit(self._noop)
        submitted_s = time.perf_counter() - began
        view = self._own.client.wait(job, timeout_s=WAIT_S)
        assert view.state is TaskState.DONE, view
        return submitted_s, time.perf_counter() - began

    def new_code(self) -> float:
        if self.options["kind"] != "wasm":
            raise NotImplementedError
        name = os.urandom(16).hex().encode()
        custom = bytes([0, 1 + len(name), len(name)]) + name  # a section that nobody reads
        blob = self._client.put_bytes(guest("noop").read_bytes() + custom)
        document = {"run": {"module": f"blob:{blob.hash}:{blob.size}"}}
        return timed(lambda: self._array(document, 1))

    def many(self, count: int) -> dict[str, float]:
        if self.options["kind"] == "function":
            raise NotImplementedError
        agents = [agent.pid for agent in self._mesh.agents.values()]
        before = {pid: resident_bytes(pid) for pid in agents}
        looked: dict[str, float] = {}

        def look(name: str, act: Callable[[], object]) -> Any:
            began = time.perf_counter()
            found = act()
            looked[f"{name}_s"] = time.perf_counter() - began
            return found

        job = look("submit", lambda: self._client.submit({**self._noop, "array": {"range": count}}))
        look("status", lambda: self._client.job(job))
        look("list_jobs", lambda: list(self._client.jobs(limit=20)))
        look("list_1000_tasks", lambda: [next(tasks) for tasks in [self._client.tasks(job)] for _ in range(1000)])
        grown = max(resident_bytes(pid) - before[pid] for pid in agents)
        look("cancel", lambda: self._client.cancel(job))
        self._client.wait(job, timeout_s=WAIT_S)
        return {**looked, "memory_bytes": grown}

    def stop(self) -> None:
        self._stack.close()

    def _connect(self) -> Client:
        return Client(self._sockets)

    def _array(self, document: dict[str, Any], count: int) -> None:
        view = self._client.wait(self._client.submit({**document, "array": {"range": count}}), timeout_s=WAIT_S)
        assert view.state is TaskState.DONE, view

    def _agents_cpu_s(self) -> float:
        return sum(cpu_s(agent.pid) for agent in self._mesh.agents.values())


def _programs(noop: str, guest_module: str) -> dict[str, tuple[dict[str, Any], Callable[[float], dict[str, Any]]]]:
    return {
        "wasm": (
            {"run": {"module": noop}},
            lambda task_s: {"run": {"module": guest_module, "args": ["sleep", str(task_s)]}},
        ),
        "process": (
            {"run": {"args": ["/bin/true"]}},
            lambda task_s: {"run": {"args": ["/bin/sleep", str(task_s)]}},
        ),
        "function": ({}, lambda task_s: {}),
    }


def _noop(number: int) -> None:
    return None


if __name__ == "__main__":
    main(Meshd)
