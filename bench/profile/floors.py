"""What one task cannot cost less on this machine: a bare command, a bare guest, a bare sync. No mesh takes part."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wasmtime import _ffi as ffi

from bench.mesh import SCRATCH
from bench.profile import commands_floor
from bench.profile.cpu import Cpu
from bench.sync import round_ms
from meshd.backends.output import Capture
from meshd.backends.wasm_guest import Guests
from meshd.backends.wasm_messages import Plan, Task
from meshd.backends.wasm_modules import Modules
from tests.guests import guest

COMMANDS = 3000
GUESTS = 20_000
SYNC_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Floors:
    command: Cpu
    """Of the process that starts it, for one."""
    command_itself: Cpu
    """From the fork to its end, for one; a shell's `true` would be nothing, /bin/true is a program that loads its libraries."""
    commands_a_s: float
    """As many at a time as there are cores."""
    guest: Cpu
    """wasmtime through its C interface, one guest after the other on one core."""
    guests_a_s: float
    """On all cores, if they did not disturb each other."""
    sync_p50_ms: float
    """A frame in reserved room of an open file, as the journal writes it."""


def measure() -> Floors:
    cores = os.cpu_count() or 1
    SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        wall_s, own, commands = _commands(cores)
        guest_wall_s, of_guest = _guests(Path(scratch))
        synced_ms = [ms for _ in range(SYNC_ROUNDS) for ms in round_ms(Path(scratch, "sync"), "reserved")]
    return Floors(own, commands, 1 / wall_s, of_guest, cores / guest_wall_s, statistics.median(synced_ms))


def _commands(cores: int) -> tuple[float, Cpu, Cpu]:
    """For one: wall seconds, CPU of who starts them, CPU of theirs."""
    program = [sys.executable, "-I", "-S", commands_floor.__file__, str(COMMANDS), str(cores)]
    told = json.loads(subprocess.run(program, check=True, capture_output=True).stdout)
    own, commands = (Cpu(*(seconds / COMMANDS for seconds in told[whose])) for whose in ("own", "commands"))
    return told["wall_s"] / COMMANDS, own, commands


def _guests(scratch: Path) -> tuple[float, Cpu]:
    """For one: wall seconds, CPU."""
    linked = Modules(scratch / "compiled", wasmtime_version=version("wasmtime")).get(
        str(guest("noop")), "", with_fuel=False
    )
    workdir = scratch / "work"
    workdir.mkdir()
    capture = Capture(str(scratch))
    stdout, stderr = (f"/proc/self/fd/{file}" for file in (capture.stdout, capture.stderr))
    plan = Plan(0, str(guest("noop")), "", (), (), None, str(scratch), None, None, None, 1 << 20, 1 << 10, None, None)
    guests = Guests(linked, plan, workdir=str(workdir), stdin=None, stdout=stdout, stderr=stderr)
    task = Task(0, 0, 1, 1, "0")

    def begin(context: Any) -> bool:
        ffi.wasmtime_context_set_epoch_deadline(context, 1)  # as a runner does: without it none may run
        return True

    for _ in range(GUESTS // 10):
        guests.run(task, begin)
    before, began = os.times(), time.perf_counter()
    for _ in range(GUESTS):
        ended = guests.run(task, begin)
        assert ended == (None, 0, 0), ended
    took, after = time.perf_counter() - began, os.times()
    capture.close()
    return took / GUESTS, Cpu((after.user - before.user) / GUESTS, (after.system - before.system) / GUESTS)
