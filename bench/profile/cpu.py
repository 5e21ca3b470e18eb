"""What the kernel counts: CPU time of each process that takes part, by its role, and of the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.mesh import TICKS_A_SECOND, descendants

CLIENT, AGENT, RUNNERS, SPAWNERS, COMMANDS = "client", "agent", "runners", "spawners", "commands"

MODULES = {"meshd.backends.wasm_runner": RUNNERS, "meshd.backends.spawner": SPAWNERS}
"""Of an agent's helper processes, by the module that stands in their command line."""


@dataclass(frozen=True, slots=True)
class Cpu:
    user_s: float = 0.0
    system_s: float = 0.0

    @property
    def both_s(self) -> float:
        return self.user_s + self.system_s

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(self.user_s + other.user_s, self.system_s + other.system_s)

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.user_s - other.user_s, self.system_s - other.system_s)


@dataclass(frozen=True, slots=True)
class Clocks:
    """At one moment, since each process began."""

    own: Mapping[int, Cpu]
    children: Mapping[int, Cpu]
    """Of a process's children that have ended and were waited for."""
    waited_s: Mapping[int, float]
    """During which a thread of it could have run and had no core."""
    machine_s: float
    """Of all cores."""
    machine_idle_s: float


@dataclass(frozen=True, slots=True)
class Used:
    """Between two moments."""

    by_role: Mapping[str, Cpu]
    waited_s: Mapping[str, float]
    """By role, as in Clocks."""
    idle: float
    """Of all cores; between 0 and 1."""
    others: float
    """Who takes no part: other programs, and the sampler."""

    def waiting(self, role: str) -> float:
        """The part of its threads' time on a core or waiting for one that was waiting."""
        ready_s = self.by_role[role].both_s + self.waited_s[role]
        return self.waited_s[role] / ready_s if ready_s else 0.0


def participants(agents: Mapping[int, str]) -> dict[int, str]:
    """Roles by process: this one, the agents, and what they have started for tasks."""
    found = {os.getpid(): CLIENT, **agents}
    for agent in agents:
        for pid, command in descendants(agent):
            if role := next((MODULES[word] for word in command.split() if word in MODULES), None):
                found[pid] = role
    return found


def read_clocks(pids: Mapping[int, str]) -> Clocks:
    own, children, waited_s = {}, {}, {}
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):  # one that ended
            own[pid], children[pid] = parse_stat(Path(f"/proc/{pid}/stat").read_text())
            threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
            waited_s[pid] = sum(int(thread.read_text().split()[1]) for thread in threads) / 1e9
    return Clocks(own, children, waited_s, *parse_machine(Path("/proc/stat").read_text()))


def used(roles: Mapping[int, str], before: Clocks, after: Clocks) -> Used:
    """A process that was not there before has used all that it used in between."""
    by_role: dict[str, Cpu] = {}
    waited_s: dict[str, float] = {}
    for pid, role in roles.items():
        if pid not in after.own:
            continue
        by_role[role] = by_role.get(role, Cpu()) + after.own[pid] - before.own.get(pid, Cpu())
        waited_s[role] = waited_s.get(role, 0.0) + max(0.0, after.waited_s[pid] - before.waited_s.get(pid, 0.0))
        if role == SPAWNERS:
            commands = after.children[pid] - before.children.get(pid, Cpu())
            by_role[COMMANDS] = by_role.get(COMMANDS, Cpu()) + commands
    machine_s = after.machine_s - before.machine_s
    idle = (after.machine_idle_s - before.machine_idle_s) / machine_s
    ours = sum(cpu.both_s for cpu in by_role.values()) / machine_s
    return Used(by_role, waited_s, idle, max(0.0, 1 - idle - ours))


def parse_stat(stat: str) -> tuple[Cpu, Cpu]:
    """A process's own time and its children's, of /proc/PID/stat."""
    # The name of the command stands in parentheses and may hold spaces.
    fields = stat.rpartition(")")[2].split()
    user, system, children_user, children_system = (int(field) / TICKS_A_SECOND for field in fields[11:15])
    return Cpu(user, system), Cpu(children_user, children_system)


def parse_machine(stat: str) -> tuple[float, float]:
    """Seconds of all cores, and of those the idle ones, of /proc/stat."""
    ticks = [int(field) for field in stat.splitlines()[0].split()[1:9]]
    return sum(ticks) / TICKS_A_SECOND, (ticks[3] + ticks[4]) / TICKS_A_SECOND
