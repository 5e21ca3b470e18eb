"""The load: clients that submit small jobs, resend what they do not know, and read elsewhere what was acknowledged.

Every client makes the id of a job itself and resends with the same one, at another node each
time, until it is acknowledged. Some acknowledged jobs are sent once more, and some are read
at other nodes, at once and again later.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from meshd.ids import new_job_id
from torture.api import Answered, NodeApi, Silence
from torture.history import History, Op, Result

SHAPES = {"plain": 8, "rerun": 3, "array": 1, "wait": 2, "fail": 2}
"""What is submitted, and how often: `plain` does nothing; the others leave traces."""
ARRAY_TASKS = 5
RESEND_PAUSE_S = 0.05
READ_SHARE, LATER_SHARE, RESEND_SHARE = 0.4, 0.2, 0.1
REMEMBERED_MAX = 500
"""Acknowledged jobs that a client picks its later reads from."""


@dataclass(slots=True)
class Round:
    """What is submitted between two checks."""

    name: str
    traces: Path
    kinds: dict[str, str]
    """By job: its `on_lost`, "" when it leaves no traces. Set before the job is sent."""
    payload_bytes: int = 0
    """That a `plain` job carries besides."""

    def document(self, shape: str) -> dict[str, Any]:
        if shape == "plain":
            padding = ["x" * self.payload_bytes] if self.payload_bytes else []
            return {"name": self.name, "run": {"args": ["true", *padding]}}
        line = '"$MESHD_JOB $MESHD_TASK $MESHD_ATTEMPT $MESHD_FENCE'
        pause = {"rerun": "", "array": "", "wait": "sleep 0.5; ", "fail": "sleep 0.2; "}[shape]
        script = f'echo {line} begin" >> {self.traces}; {pause}echo {line} end" >> {self.traces}'
        document: dict[str, Any] = {"name": self.name, "run": {"args": ["sh", "-c", script]}}
        if shape == "array":
            document["array"] = {"range": f"1-{ARRAY_TASKS}"}
        if shape in ("wait", "fail"):
            document["on_lost"] = shape
        return document


ON_LOST = {"plain": "", "rerun": "rerun", "array": "rerun", "wait": "wait", "fail": "fail"}


class Load:
    """Clients as threads, between `start` and `stop`; `round` may be changed while they are stopped."""

    def __init__(
        self, sockets: Mapping[str, str], history: History, seed: int, *, clients: int, rate_s: float, shapes: tuple[str, ...]
    ) -> None:  # fmt: skip
        self._sockets = dict(sockets)
        self._history = history
        self._seed = seed
        self._clients = clients
        self._pause_s = clients / rate_s
        self._shapes = shapes
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._starts = 0
        self.round: Round

    def start(self) -> None:
        self._stop.clear()
        self._starts += 1
        self._threads = [
            threading.Thread(target=self._run, args=(client,), name=f"client{client}", daemon=True)
            for client in range(self._clients)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """What is under way is ended, as known or as unknown."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        rng = Random(f"{self._seed}/{self._starts}/{number}")  # noqa: S311
        client = _Client(number, self._sockets, self._history, rng, self._stop)
        remembered: list[str] = []
        weights = [SHAPES[shape] for shape in self._shapes]
        while not self._stop.is_set():
            begun_s = time.monotonic()
            shape = rng.choices(self._shapes, weights)[0]
            job = new_job_id(time.time_ns() // 1_000_000, os.urandom(10))
            self.round.kinds[job] = ON_LOST[shape]
            document = self.round.document(shape)
            if client.submit(job, document):
                remembered = [*remembered[-REMEMBERED_MAX:], job]
                if rng.random() < RESEND_SHARE:
                    client.submit(job, document)
                if rng.random() < READ_SHARE:
                    client.read(job)
                if rng.random() < LATER_SHARE:
                    client.read(rng.choice(remembered))
            self._stop.wait(max(0.0, begun_s + self._pause_s * rng.uniform(0.5, 1.5) - time.monotonic()))
        client.close()


class _Client:
    def __init__(
        self, number: int, sockets: Mapping[str, str], history: History, rng: Random, stop: threading.Event
    ) -> None:
        self._number = number
        self._apis = {name: NodeApi(path) for name, path in sockets.items()}
        self._history = history
        self._rng = rng
        self._stop = stop
        self._at = rng.choice(list(sockets))

    def submit(self, job: str, document: Mapping[str, Any]) -> bool:
        """Until it is acknowledged, refused, or the load stops."""
        while True:
            node, begun_s = self._at, time.monotonic()
            result: Result
            is_new, why = False, ""
            try:
                answer = self._apis[node].ask("POST", "/v1/jobs", {"id": job, "spec": document})
            except Silence as error:
                result, why = "unknown", str(error)
            except Answered as error:
                result, why = "unknown" if error.is_temporary else "refused", str(error)
            else:
                result, is_new = "ok", bool(answer["is_new"])
                if answer["id"] != job:
                    result, why = "refused", f"acknowledged as {answer['id']}"
            self._note("submit", node, job, begun_s, result, is_new=is_new, error=why)
            if result != "unknown":
                return result == "ok"
            self._at = self._other(node)
            if self._stop.wait(RESEND_PAUSE_S):
                return False

    def read(self, job: str) -> None:
        """Task 0 of it, at another node than the one that is written to."""
        node, begun_s = self._other(self._at), time.monotonic()
        try:
            task = self._apis[node].get(f"/v1/jobs/{job}/tasks/0")
        except Silence as error:
            self._note("read", node, job, begun_s, "unknown", error=str(error))
        except Answered as error:
            result: Result = "missing" if error.status == 404 else "unknown" if error.is_temporary else "refused"
            self._note("read", node, job, begun_s, result, error=str(error))
        else:
            seen = f"{task['state']}/{task['attempt']}/{task['fence']}"
            self._note("read", node, job, begun_s, "ok", seen=seen)

    def close(self) -> None:
        for api in self._apis.values():
            api.close()

    def _other(self, node: str) -> str:
        return self._rng.choice([name for name in self._apis if name != node])

    def _note(
        self, kind: Any, node: str, job: str, begun_s: float, result: Result, *, is_new: bool = False, seen: str = "", error: str = ""
    ) -> None:  # fmt: skip
        op = Op(self._number, kind, node, job, begun_s, time.monotonic(), result, is_new, seen, error)
        self._history.add(op)
