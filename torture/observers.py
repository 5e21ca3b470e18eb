"""Clients as people have them: `meshd.client`, which knows all nodes and fails over by itself. None should see an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshd.client import Client
from meshd.errors import MeshError

PAUSE_S = 0.5
"""They are there to see errors; the load is made by others, and a mesh forgets finished jobs past 10,000."""


@dataclass(slots=True)
class Observers:
    """Each submits a job and looks at it, again and again, asking one of the nodes first."""

    sockets: Sequence[str]
    calls: int = 0
    slowest_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self._stop.clear()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(len(self.sockets))]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, first: int) -> None:
        nodes = [f"unix:{path}" for path in [*self.sockets[first:], *self.sockets[:first]]]
        with Client(nodes) as client:
            while not self._stop.is_set():
                begun_s = time.monotonic()
                try:
                    job = client.submit({"name": "observer", "run": {"args": ["true"]}})
                    client.job(job)
                except MeshError as error:
                    with self._lock:
                        self.errors.append(f"{time.monotonic():.3f} {error!r}")
                with self._lock:
                    self.calls += 2
                    self.slowest_s = max(self.slowest_s, time.monotonic() - begun_s)
                self._stop.wait(PAUSE_S)
