"""An agent that has one attempt running, and nothing else: for tests that kill or stop the agent.

Run as `python -m meshd.testing.backend_owner ORDER`; the file DIRECTORY/running appears once the attempt runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trio

from meshd.ports import Leash
from meshd.testing.backend_suite import Program, boottime, build, prepare

SETTLE_S = 0.5
"""From asking a backend to run something to its really running: there is nothing to ask."""


async def own(factory: str, directory: str, args: list[str], module: str | None, leash_s: float | None) -> None:
    backend = build(factory, Path(directory, "backend"))
    program = Program(tuple(args), Path(module) if module is not None else None)
    async with trio.open_nursery() as nursery:
        await nursery.start(backend.serve)
        leash = Leash(boottime() + leash_s if leash_s is not None else None)
        nursery.start_soon(backend.run, prepare(Path(directory, "attempt"), program, leash=leash))
        await trio.sleep(SETTLE_S)
        await trio.Path(directory, "running").touch()


if __name__ == "__main__":
    trio.run(lambda: own(**json.loads(sys.argv[1])))
