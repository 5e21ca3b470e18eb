"""Stacks of running processes, by py-spy, which has a virtual environment of its own under build/peers.

Only samples on a core count: a thread that waits, for a socket, the interpreter's lock or a disk, is none. py-spy
reads without stopping anyone: stopped five hundred times a second, a process is slower by half, and its waiting
threads, woken each time, look as if they worked. About one sample in twenty is torn by that, and left out.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from bench.peers.setup import prepare
from bench.profile.layers import Stack, parse
from meshd.errors import Unavailable

RATE = 400
"""A second. Not more: at 1,000 the sampler needs a tenth of a core for each process."""
STOP_S = 30.0


def sampler() -> Path:
    """Its command; installed from PyPI the first time."""
    return prepare("profiler").with_name("py-spy")


@contextmanager
def sampled(pids: Iterable[int]) -> Generator[dict[int, list[Stack]], None, None]:
    """Each process for as long as the block lasts. What was seen is there when it ended."""
    command = sampler()
    seen: dict[int, list[Stack]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        running: dict[int, subprocess.Popen[str]] = {}
        try:
            for pid in pids:
                options = ["--nonblocking", "--function", "--format", "raw", "--rate", str(RATE)]
                running[pid] = subprocess.Popen(
                    [command, "record", *options, "--pid", str(pid), "--output", str(Path(scratch, str(pid)))],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            for pid, process in running.items():
                _wait_until_it_samples(pid, process)
            yield seen
        finally:
            for process in running.values():
                process.send_signal(signal.SIGINT)
            for process in running.values():
                process.communicate(timeout=STOP_S)
        for pid in running:
            file = Path(scratch, str(pid))
            seen[pid] = parse(file.read_text()) if file.exists() else []  # of one that was never on a core, none


def _wait_until_it_samples(pid: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "Sampling process" in line:
            return
    raise Unavailable(f"process {pid} cannot be sampled: {said.strip()}", hint="sampling needs root, or ptrace_scope 0")
