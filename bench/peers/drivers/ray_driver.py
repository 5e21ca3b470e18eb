"""Ray: one local node with as many CPUs as cores, without dashboard and usage statistics."""

from __future__ import annotations

import os
import time

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from base import RESULT_S, Driver, main


@ray.remote
def noop() -> None:
    return None


@ray.remote
def nap(task_s: float) -> None:
    time.sleep(task_s)


class Ray(Driver):
    def start(self) -> str:
        ray.init(num_cpus=self.cores, include_dashboard=False, log_to_driver=False, logging_level="error")
        self.noop(1000)
        return ray.__version__

    def noop(self, count: int) -> dict[str, float]:
        began = time.perf_counter()
        ray.get([noop.remote() for _ in range(count)])
        return {"seconds": time.perf_counter() - began}

    def sleep(self, count: int, task_s: float) -> float:
        began = time.perf_counter()
        ray.get([nap.remote(task_s) for _ in range(count)])
        return time.perf_counter() - began

    def one(self) -> tuple[float, float]:
        began = time.perf_counter()
        reference = noop.remote()
        submitted_s = time.perf_counter() - began
        ray.get(reference, timeout=RESULT_S)
        return submitted_s, time.perf_counter() - began

    def stop(self) -> None:
        ray.shutdown()


if __name__ == "__main__":
    main(Ray)
