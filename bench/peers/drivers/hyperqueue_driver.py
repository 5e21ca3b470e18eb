"""HyperQueue: server and worker in this process, through its Python interface (the package has no command).

Its `wait_for_jobs` looks once a second. So up to a second of a run with many tasks is that; what one task takes is
measured by a file that it makes.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from itertools import count as numbers

import hyperqueue
from base import RESULT_S, Driver, main
from hyperqueue.cluster import LocalCluster, WorkerConfig

LOOK_S = 0.0005

# Waiting shows a progress bar, which costs time.
hyperqueue.client.create_progress_callback = lambda: lambda jobs: None


class HyperQueue(Driver):
    def start(self) -> str:
        self._cluster = LocalCluster(str(self.directory), WorkerConfig(cores=self.cores))
        self._client = self._cluster.client()
        self._numbers = numbers()
        self.noop(10)
        return version("hyperqueue")

    def noop(self, count: int) -> dict[str, float]:
        return {"seconds": self._run(["/bin/true"], count)}

    def sleep(self, count: int, task_s: float) -> float:
        return self._run(["/bin/sleep", str(task_s)], count)

    def one(self) -> tuple[float, float]:
        path = str(self.directory / f"made-{next(self._numbers)}")
        began = time.perf_counter()
        self._client.submit(_job(["/bin/touch", path], 1))
        submitted_s = time.perf_counter() - began
        while not os.path.exists(path):
            if time.perf_counter() - began > RESULT_S:
                raise TimeoutError(f"no {path}")
            time.sleep(LOOK_S)
        return submitted_s, time.perf_counter() - began

    def many(self, count: int) -> dict[str, float]:
        # Its Python interface makes one object for each task; arrays are of its command, which the package lacks.
        began = time.perf_counter()
        job = _job(["/bin/true"], count)
        built_s = time.perf_counter() - began
        began = time.perf_counter()
        self._client.submit(job)
        return {"build_s": built_s, "submit_s": time.perf_counter() - began}

    def stop(self) -> None:
        self._cluster.stop()

    def _run(self, args: list[str], count: int) -> float:
        began = time.perf_counter()
        submitted = self._client.submit(_job(args, count))
        assert self._client.wait_for_jobs([submitted])
        took = time.perf_counter() - began
        self._client.forget(submitted)
        return took


def _job(args: list[str], count: int) -> hyperqueue.Job:
    job = hyperqueue.Job()
    for _ in range(count):
        job.program(args, stdout=None, stderr=None)
    return job


if __name__ == "__main__":
    main(HyperQueue)
