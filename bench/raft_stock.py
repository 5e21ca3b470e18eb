"""Stock PySyncObj 0.3.17 under the load of bench/raft.py: a process of its own, since meshd.raft changes PySyncObj's globals.

As fast as it can be had: no journal at all, so nothing is synced or even written; its own thread, sockets and pickle;
the next command is submitted from the callback of the last one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from typing import Any

from pysyncobj import SyncObj, SyncObjConf, replicated

ITEM_BYTES = 100
WARM_S = 0.3


class Counter(SyncObj):  # type: ignore[misc]
    def __init__(self, me: str, others: list[str], conf: SyncObjConf) -> None:
        super().__init__(me, others, conf)
        self.items = 0

    @replicated  # type: ignore[untyped-decorator]
    def put(self, items: list[str]) -> int:
        self.items += len(items)
        return self.items


class CutsBelowApplied(logging.Handler):
    """Counts stock's own warning that its log lost entries which it had already applied (hole F1)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += "truncating already-applied" in record.msg


def load(counter: Counter, width: int, items: int, seconds: float) -> dict[str, Any]:
    command = [os.urandom(ITEM_BYTES // 2).hex() for _ in range(items)]
    took_ms: list[float] = []
    counts_from = time.perf_counter() + WARM_S
    until = counts_from + seconds
    flying, landed = [width], threading.Event()

    def submit() -> None:
        began = time.perf_counter()

        def done(_: Any, failure: int) -> None:
            now = time.perf_counter()
            if failure == 0 and now >= counts_from and now <= until:
                took_ms.append((now - began) * 1e3)
            if now < until:
                submit()
                return
            flying[0] -= 1
            if not flying[0]:
                landed.set()

        counter.put(command, callback=done)

    for _ in range(width):
        submit()
    landed.wait(seconds + 10)
    return {"took_ms": took_ms, "commands_s": len(took_ms) / seconds}


def main() -> None:
    config = json.loads(sys.argv[1])
    me, ports = config["me"], config["ports"]
    addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    others = [address for name, address in addresses.items() if name != me]
    conf = SyncObjConf(appendEntriesUseBatch=config["batched"])
    cuts = CutsBelowApplied()
    logging.getLogger().addHandler(cuts)
    counter = Counter(addresses[me], others, conf)
    while not (counter.isReady() and counter._getLeader() is not None):
        time.sleep(0.01)

    def say(figures: dict[str, Any]) -> None:
        is_leader = counter._isLeader()
        role = "leader" if is_leader else "follower"
        print(json.dumps({"role": role, "term": counter.raftCurrentTerm, "cuts": cuts.seen, **figures}), flush=True)

    say({})
    for line in sys.stdin:
        order = json.loads(line)
        match order["do"]:
            case "load":
                say(load(counter, order["width"], order["items"], order["seconds"]))
            case "tell":
                say({})
            case _:
                os._exit(0)


if __name__ == "__main__":
    main()
