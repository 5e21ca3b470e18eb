"""What every driver does: it starts its contender, does what a line of JSON on stdin asks, and answers with a line.

{"do": "start"} → {"version": …}      {"do": "noop", "count": 1000} → {"seconds": …}      … until stdin ends
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
RESULT_S = 60.0
"""For one task, when latency is asked: something is wrong after that."""


class Driver:
    """A contender. `cores` tasks run at a time."""

    def __init__(self, directory: Path, cores: int, options: dict[str, Any]) -> None:
        self.directory = directory
        self.cores = cores
        self.options = options

    def start(self) -> str:
        """Ready when it returns. The contender's version."""
        raise NotImplementedError

    def noop(self, count: int) -> dict[str, float]:
        """Submit so many tasks that do nothing and wait for all results: seconds."""
        raise NotImplementedError

    def sleep(self, count: int, task_s: float) -> float:
        """The same with tasks that sleep: seconds for all."""
        raise NotImplementedError

    def one(self) -> tuple[float, float]:
        """One task: seconds until it was submitted, seconds until its result was here. For several threads."""
        raise NotImplementedError

    def new_code(self) -> float:
        """Seconds for one task whose code was never seen before."""
        raise NotImplementedError

    def many(self, count: int) -> dict[str, float]:
        """Submit a large array, look at it, cancel it: seconds for each, and bytes of memory."""
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    # --- the same for all

    def latency(self, count: int, in_flight: int) -> dict[str, list[float]]:
        """Each of `in_flight` threads has one task under way, until `count` were."""
        left = count
        lock = threading.Lock()
        submits: list[float] = []
        results: list[float] = []
        errors: list[BaseException] = []

        def loop() -> None:
            nonlocal left
            while not errors:
                with lock:
                    left -= 1
                    if left < 0:
                        return
                try:
                    submitted_s, result_s = self.one()
                except BaseException as error:
                    errors.append(error)
                    return
                with lock:
                    submits.append(submitted_s)
                    results.append(result_s)

        if in_flight == 1:
            loop()
        else:
            threads = [threading.Thread(target=loop) for _ in range(in_flight)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return {"submit_s": submits, "result_s": results}

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "start":
                return {"version": self.start()}
            case "noop":
                return self.noop(request["count"])
            case "sleep":
                return {"seconds": self.sleep(request["count"], request["task_s"])}
            case "latency":
                return self.latency(request["count"], request["in_flight"])
            case "new_code":
                return {"seconds": self.new_code()}
            case "many":
                return self.many(request["count"])
            case other:
                raise ValueError(other)


def timed(act: Any) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main(kind: type[Driver]) -> None:
    # What a contender daemonises stays below this process, so that the harness can see and end it.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A harness that is killed cannot end what it started: then this ends it, also in the middle of a measurement.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # contenders print
    cores, options = int(sys.argv[2]), json.loads(sys.argv[3])
    with tempfile.TemporaryDirectory(dir=os.path.abspath(sys.argv[1]), ignore_cleanup_errors=True) as scratch:
        os.chdir(scratch)
        driver = kind(Path(scratch), cores, options)
        try:
            for line in sys.stdin:
                try:
                    answer = driver.do(json.loads(line))
                except NotImplementedError:
                    answer = {"missing": True}
                except Exception as error:
                    traceback.print_exc()
                    answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
                print(json.dumps(answer), file=answers, flush=True)
        finally:
            driver.stop()
