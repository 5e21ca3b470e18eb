"""Dask distributed: scheduler in this process, one worker process for each core with one thread."""

from __future__ import annotations

import time

import dask
import distributed
from base import RESULT_S, Driver, main


def noop(number: int) -> None:
    return None


def nap(number: int, task_s: float) -> None:
    time.sleep(task_s)


class Dask(Driver):
    def start(self) -> str:
        dask.config.set({"distributed.scheduler.worker-saturation": "inf", "distributed.admin.tick.limit": "60s"})
        self._cluster = distributed.LocalCluster(
            n_workers=self.cores, threads_per_worker=1, dashboard_address=None, silence_logs=40
        )
        self._client = distributed.Client(self._cluster)
        self.noop(10)
        return distributed.__version__

    def noop(self, count: int) -> dict[str, float]:
        began = time.perf_counter()
        self._client.gather(self._client.map(noop, range(count), pure=False))
        return {"seconds": time.perf_counter() - began}

    def sleep(self, count: int, task_s: float) -> float:
        began = time.perf_counter()
        self._client.gather(self._client.map(nap, range(count), task_s=task_s, pure=False))
        return time.perf_counter() - began

    def one(self) -> tuple[float, float]:
        began = time.perf_counter()
        future = self._client.submit(noop, 0, pure=False)
        submitted_s = time.perf_counter() - began
        future.result(timeout=RESULT_S)
        return submitted_s, time.perf_counter() - began

    def stop(self) -> None:
        self._client.close()
        self._cluster.close()


if __name__ == "__main__":
    main(Dask)
