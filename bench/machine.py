"""What the replicated queue costs: python -m bench.machine

One replica in one thread, without log and network: microseconds of `apply` for each
transition, a large array, and what a snapshot of many live jobs takes from the loop.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable

import msgspec

from meshd import codec
from meshd.model import Array as TaskArray
from meshd.model import (
    AttemptKey,
    BackendOffer,
    EndReason,
    Inline,
    JobId,
    JobSpec,
    Member,
    NodeId,
    Offer,
    Outcome,
    Resources,
    Role,
    Run,
)
from meshd.raft.state.commands import (
    Batch,
    Command,
    CreateInvite,
    Ended,
    Found,
    Join,
    OpenSession,
    Report,
    Stamped,
    Submit,
)
from meshd.raft.state.machine import Machine

NODES = 20
SLOTS = 16
JOBS = 20_000
ARRAY = 1_000_000
LIVE = 100_000
BATCH = 100
WALL_MS = 1_800_000_000_000
SECRET = "5" * 64


class Bench:
    def __init__(self, nodes: int) -> None:
        self.machine = Machine()
        self.index = 0
        self.seq = dict.fromkeys((NodeId(f"node-{n:03}") for n in range(nodes)), 0)
        self.jobs = 0
        first = next(iter(self.seq))
        roles = (Role.SERVER, Role.WORKER)
        self.apply((first, Found("m", Member(first, first, roles))), (first, CreateInvite(SECRET, roles, 1000, 10**9)))
        offer = Offer((BackendOffer("wasm"),), Resources(cpu_milli=64_000), (("zone", "eu"),))
        for node in self.seq:
            self.apply((first, Join(SECRET, Member(node, node, roles))), (node, OpenSession(1, (), SLOTS, offer)))

    def entry(self, *commands: tuple[NodeId, Command]) -> bytes:
        return codec.encode(
            Batch(1, WALL_MS, tuple(Stamped(origin, msgspec.Raw(codec.encode(it))) for origin, it in commands))
        )

    def apply(self, *commands: tuple[NodeId, Command]) -> None:
        self.play([self.entry(*commands)])

    def play(self, entries: list[bytes]) -> float:
        """Seconds for these entries, events taken as a server does."""
        started = time.perf_counter()
        for entry in entries:
            self.index += 1
            self.machine.apply(self.index, entry)
            self.machine.take_events()
        return time.perf_counter() - started

    def submits(self, count: int, spec: JobSpec) -> list[bytes]:
        entries = []
        node = next(iter(self.seq))
        for start in range(0, count, BATCH):
            commands = []
            for _ in range(min(BATCH, count - start)):
                self.jobs += 1
                commands.append((node, Submit(_job_id(self.jobs), spec)))
            entries.append(self.entry(*commands))
        return entries

    def report_all(self, outcome: Outcome) -> tuple[int, float]:
        """One entry in which every node reports all that it holds: (tasks, seconds)."""
        commands: list[tuple[NodeId, Command]] = []
        done = 0
        for node in self.seq:
            held: tuple[AttemptKey, ...] = self.machine.leases_of(node, 1)
            if held:
                self.seq[node] += 1
                commands.append((node, Report(1, self.seq[node], tuple(Ended(key, outcome) for key in held))))
                done += len(held)
        return done, self.play([self.entry(*commands)])


def _job_id(number: int) -> JobId:
    text = f"{(WALL_MS << 80) | (7 << 76) | (2 << 62) | number:032x}"
    return JobId("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))


def _drain(bench: Bench, outcome: Outcome, tasks: int) -> float:
    """Microseconds for one complete and, with it, the next lease."""
    done, took = 0, 0.0
    while done < tasks:
        ended, seconds = bench.report_all(outcome)
        if not ended:
            break
        done, took = done + ended, took + seconds
    return took / max(done, 1) * 1e6


def _timed(act: Callable[[], object]) -> tuple[object, float]:
    started = time.perf_counter()
    result = act()
    return result, time.perf_counter() - started


def _row(what: str, value: float, unit: str) -> None:
    print(f"{what:<58}{value:>12,.1f} {unit}")


def main() -> None:
    gc.disable()  # what the collector costs depends on the process around it
    spec = JobSpec(backend=("wasm",), run=Run(args=("work",)))
    bare = Outcome(reason=EndReason.EXIT, exit_code=0)
    told = Outcome(reason=EndReason.EXIT, exit_code=0, stdout=Inline(b"x" * 100), run_ms=12)

    bench = Bench(NODES)
    _row(f"submit, no slot free ({NODES} nodes), per job", bench.play(bench.submits(JOBS, spec)) / JOBS * 1e6, "us")
    _row("complete + lease, single-task jobs, with output", _drain(bench, told, JOBS), "us")

    bench = Bench(NODES)
    array = JobSpec(backend=("wasm",), run=Run(args=("work",)), array=TaskArray(count=ARRAY))
    entry = bench.submits(1, array)
    _row(f"submit an array of {ARRAY:,} and lease {NODES * SLOTS}", bench.play(entry) * 1e3, "ms")
    _row("complete + lease, array, nothing to keep", _drain(bench, bare, 50_000), "us")
    _row("complete + lease, array, with output", _drain(bench, told, 50_000), "us")

    bench = Bench(NODES)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bench.play(bench.submits(LIVE, spec))
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    _row(f"memory of a live job ({LIVE:,} of them)", grown_kb / LIVE * 1024, "bytes")
    pack, seconds = _timed(bench.machine.capture)
    _row(f"capture {LIVE:,} live jobs, in the loop", seconds * 1e3, "ms")
    data, seconds = _timed(pack)  # type: ignore[arg-type]
    assert isinstance(data, bytes)
    _row(f"pack them, in a thread ({len(data) >> 20} MiB)", seconds * 1e3, "ms")
    _, seconds = _timed(lambda: Machine().restore(data))
    _row("restore them", seconds * 1e3, "ms")


if __name__ == "__main__":
    main()
