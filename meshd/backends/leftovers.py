"""Helpers of an earlier agent of this directory: a new one speaks for its attempts only when all of them are gone.

The spawner and the runners inherit a lock from their agent. It is held for as long as any of
them lives, whatever killed the agent, so whoever gets it knows that nothing is started any more
and that every runner's guest is dead. What a killed spawner left is found by its mark
(spawner.py). Without that a quick restart would tell the mesh that it holds nothing, while the
attempts of the agent before still run, and `on_lost: wait` would be started twice.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import trio

from meshd.errors import StartRefused

WAIT_S = 30.0
"""A spawner whose agent is gone needs 5 s at most to kill what is left, a runner less than one."""
LOOK_EVERY_S = 0.02

LOCK_FILE = "helpers.lock"


async def take_over(directory: Path) -> int:
    """The lock of the helpers below this directory, as a descriptor for them to inherit. Raises StartRefused."""
    path = directory / LOCK_FILE
    os.makedirs(directory, mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with trio.move_on_after(WAIT_S):
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                await trio.sleep(LOOK_EVERY_S)
    os.close(descriptor)
    pids = ", ".join(str(pid) for pid in await trio.to_thread.run_sync(lambda: sorted(_holders(path))))
    raise StartRefused(
        f"helpers of an earlier agent of {directory.parent} still run (pid {pids or 'unknown'})",
        hint="they may be stopped or stuck: `kill -9` them, then start again",
    )


def _holders(path: Path) -> Iterator[int]:
    """Processes of ours that have the file open."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            names = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        if str(path) in names:
            yield int(pid)
