"""The tables of docs/performance.md's "Where the time goes", from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.profile.benchmarks import FOLLOWERS, LEADER, JobByJob, Profile
from bench.profile.cpu import AGENT, CLIENT, COMMANDS, RUNNERS, SPAWNERS, Cpu
from bench.profile.floors import Floors
from bench.profile.layers import shares
from bench.profile.syncs import Span, Synced, synced

ROLES = (AGENT, LEADER, FOLLOWERS, RUNNERS, SPAWNERS, COMMANDS, CLIENT)
SMALL = 0.01
"""A layer that takes less than this of a benchmark's CPU has no row of its own."""
REST = "the rest"


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(
            [f"{self.title}:", "", *("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)]
        )

    def as_text(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.head))]
        return "\n".join([self.title, *(_aligned(line, widths) for line in lines)])


def by_process(profiles: Mapping[str, Profile]) -> Table:
    roles = [role for role in ROLES if any(_cpu(profile, role).both_s for profile in profiles.values())]
    rows = [["done a second", *(f"{each.tasks / each.wall_s:,.0f}" for each in profiles.values())]]
    for role in roles:
        rows.append([f"{role}: CPU us a task", *(_both(_cpu(each, role), each.tasks) for each in profiles.values())])
    rows.append(["all: CPU us a task", *(_both(_all(each), each.tasks) for each in profiles.values())])
    waited_us = [sum(each.used.waited_s.values()) / each.tasks * 1e6 for each in profiles.values()]
    rows.append(["threads that could run waited for a core: us a task", *map(_us, waited_us)])
    rows.append(["cores: idle, %", *(f"{each.used.idle * 100:.0f}" for each in profiles.values())])
    rows.append(["cores: others', %", *(f"{each.used.others * 100:.0f}" for each in profiles.values())])
    return Table("CPU by process, and in parentheses what of it is the kernel's", ["", *profiles], rows)


def by_layer(name: str, profile: Profile) -> Table:
    """CPU microseconds of a task, in each process."""
    us: dict[str, dict[str, float]] = {}
    roles = []
    for role in ROLES:
        of_a_task = _cpu(profile, role).both_s / profile.tasks * 1e6
        found = shares(profile.sampled.get(role, ()), profile.waiting.get(role, 0.0))
        if found and of_a_task:
            roles.append(role)
            for layer, share in found.items():
                us.setdefault(layer, {})[role] = share * of_a_task
    total = sum(sum(row.values()) for row in us.values())
    rest: dict[str, float] = {}
    rows = []
    for layer, row in sorted(us.items(), key=lambda item: -sum(item[1].values())):
        if sum(row.values()) >= SMALL * total:
            rows.append([layer, *(_us(row.get(role, 0.0)) for role in roles)])
        else:
            rest = {role: rest.get(role, 0.0) + row.get(role, 0.0) for role in roles}
    if rest:
        rows.append([REST, *(_us(rest[role]) for role in roles)])
    seen = sum(stack.samples for stacks in profile.sampled.values() for stack in stacks)
    return Table(f"{name}: CPU us a task by layer, from {seen:,} samples", ["", *roles], rows)


def by_sync(measured: JobByJob, disk_p50_ms: float) -> Table:
    rows = []
    for label, spans in (("submission", measured.submissions), ("submission to the end of the wait", measured.jobs)):
        leader, followers = (synced(spans, measured.syncs[role]) for role in (LEADER, FOLLOWERS))
        either = synced(spans, sorted([*measured.syncs[LEADER], *measured.syncs[FOLLOWERS]]))
        p50_ms = _p50_ms(spans)
        rows.append(
            [
                label,
                f"{p50_ms:.2f}",
                f"{leader.a_job:.1f}",
                _of(leader, p50_ms),
                f"{followers.a_job / 2:.1f}",
                f"{leader.p50_ms:.2f} / {leader.p99_ms:.2f}",
                _of(either, p50_ms),
            ]
        )
    head = ["", "p50 ms", "syncs at the leader", "… ran for ms", "syncs at a follower", "one sync, p50 / p99 ms"]
    title = f"One job at a time: waiting for disks (a frame and its sync without a mesh: {disk_p50_ms:.2f} ms)"
    return Table(title, [*head, "any sync ran for ms"], rows)


def against_floors(profiles: Mapping[str, Profile], floors: Floors) -> Table:
    rows = []
    for name, profile in profiles.items():
        if SPAWNERS in profile.used.by_role and _cpu(profile, COMMANDS).both_s:
            floor_us, rate = (floors.command + floors.command_itself).both_s * 1e6, floors.commands_a_s
            what = f"posix_spawn and wait of /bin/true ({floors.command.both_s * 1e6:.0f} + its own)"
        elif AGENT in profile.used.by_role:
            floor_us, rate, what = floors.guest.both_s * 1e6, floors.guests_a_s, "an instance and its call"
        else:
            continue
        ours_us = _all(profile).both_s / profile.tasks * 1e6
        of_rate = profile.tasks / profile.wall_s / rate
        rows.append(
            [
                name,
                what,
                f"{floor_us:.0f}",
                f"{rate:,.0f}",
                f"{ours_us:,.0f}",
                f"{floor_us / ours_us * 100:.0f}",
                f"{of_rate * 100:.0f}",
            ]
        )
    head = ["", "the floor", "CPU us", "a second on all cores", "meshd: CPU us a task", "the floor's part of it, %"]
    return Table("What cannot be cheaper", [*head, "meshd's rate, % of the floor's"], rows)


def _cpu(profile: Profile, role: str) -> Cpu:
    return profile.used.by_role.get(role, Cpu())


def _all(profile: Profile) -> Cpu:
    return sum(profile.used.by_role.values(), Cpu())


def _both(cpu: Cpu, tasks: int) -> str:
    if not cpu.both_s:
        return ""
    return f"{_us(cpu.both_s / tasks * 1e6)} ({_us(cpu.system_s / tasks * 1e6) or '0'})"


def _us(us: float) -> str:
    """Nothing where there is nothing to see."""
    return f"{us:,.0f}" if us >= 10 else f"{us:.1f}" if us >= 0.05 else ""


def _p50_ms(spans: Sequence[Span]) -> float:
    return statistics.median(end - began for began, end in spans) * 1000


def _of(syncs: Synced, p50_ms: float) -> str:
    return f"{syncs.covered_p50_ms:.2f} ({syncs.covered_p50_ms / p50_ms * 100:.0f} %)"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        f"{cell:<{width}}" if not at else f"{cell:>{width}}"
        for at, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
