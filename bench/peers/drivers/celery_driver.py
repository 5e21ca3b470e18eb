"""Celery with Redis over a local socket: one worker that forks a process for each core; Redis keeps all in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from base import RESULT_S, Driver, main

START_S = 30.0


class Celery(Driver):
    def start(self) -> str:
        socket = self.directory / "redis.sock"
        os.environ["BENCH_REDIS_SOCKET"] = str(socket)
        # Neither snapshots nor a journal: what Redis is told is lost with it.
        self._redis = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_S
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        import celery
        import celery_app
        from celery import group

        self._app, self._group = celery_app, group
        self._worker = subprocess.Popen(
            [
                sys.executable, "-m", "celery", "-A", "celery_app", "worker", "--loglevel", "error",
                "--pool", "prefork", "--concurrency", str(self.cores),
                "--without-gossip", "--without-mingle", "--without-heartbeat",
            ],
            cwd=self.directory, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "C_FORCE_ROOT": "1"},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.noop(10)
        return str(celery.__version__)

    def noop(self, count: int) -> dict[str, float]:
        began = time.perf_counter()
        result = self._group(self._app.noop.s() for _ in range(count)).apply_async()
        result.join_native(timeout=RESULT_S * 10)
        took = time.perf_counter() - began
        result.forget()
        return {"seconds": took}

    def sleep(self, count: int, task_s: float) -> float:
        began = time.perf_counter()
        self._group(self._app.nap.s(task_s) for _ in range(count)).apply_async().join_native(timeout=RESULT_S * 10)
        return time.perf_counter() - began

    def one(self) -> tuple[float, float]:
        began = time.perf_counter()
        result = self._app.noop.delay()
        submitted_s = time.perf_counter() - began
        result.get(timeout=RESULT_S)
        return submitted_s, time.perf_counter() - began

    def stop(self) -> None:
        for process in (self._worker, self._redis):
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main(Celery)
