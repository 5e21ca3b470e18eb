"""One replica of the agreed state and the nodes that work for it, driven by entries as the log would: no log, network or disk."""

from __future__ import annotations

import time

import msgspec

from meshd import codec
from meshd.model import Array, AttemptRun, BackendOffer, JobId, JobSpec, Member, NodeId, Offer, Resources, Role, Run
from meshd.raft.state.commands import (
    Batch,
    Command,
    CreateInvite,
    Found,
    Join,
    Leased,
    OpenSession,
    Report,
    Stamped,
    Submit,
)
from meshd.raft.state.machine import Machine

SECRET = "5" * 64
WALL_MS = 1_800_000_000_000
SLOTS = 8
OFFER = Offer(backends=(BackendOffer("wasm"),), resources=Resources(cpu_milli=2_000))


class Replica:
    def __init__(self, nodes: int) -> None:
        self.machine = Machine()
        self.index = 0
        self.cpu_s = 0.0
        """Of this thread, in `apply`."""
        self.nodes = [NodeId(f"node-{number}") for number in range(nodes)]
        self.seqs = dict.fromkeys(self.nodes, 0)
        self.leased: dict[NodeId, list[AttemptRun]] = {node: [] for node in self.nodes}
        roles = (Role.SERVER, Role.WORKER)
        first = self.nodes[0]
        self.do(first, Found("mesh", Member(first, "a", roles)))
        self.do(first, CreateInvite(SECRET, roles, 1000, 3_600_000))
        for node in self.nodes[1:]:
            self.do(first, Join(SECRET, Member(node, str(node), roles)))
        for node in self.nodes:
            self.do(node, OpenSession(1, (), SLOTS, OFFER))

    def do(self, origin: NodeId, *commands: Command) -> None:
        """One entry; only `apply` is timed."""
        stamped = tuple([Stamped(origin, msgspec.Raw(codec.encode(command))) for command in commands])
        entry = codec.encode(Batch(1, WALL_MS, stamped))
        self.index += 1
        start = time.thread_time()
        self.machine.apply(self.index, entry)
        self.cpu_s += time.thread_time() - start
        for event in self.machine.take_events():
            if isinstance(event, Leased):
                self.leased[event.node].append(event.run)

    def submit(self, jobs: int, *, entry: int) -> None:
        """So many jobs of one task, so many in an entry."""
        for start in range(0, jobs, entry):
            numbers = range(start + 1, min(start + entry, jobs) + 1)
            self.do(self.nodes[0], *[Submit(job_id(number), array(1)) for number in numbers])

    def report(self, node: NodeId, **what: object) -> None:
        self.seqs[node] += 1
        self.do(node, Report(1, self.seqs[node], **what))  # type: ignore[arg-type]

    def take(self, node: NodeId, count: int) -> list[AttemptRun]:
        """The oldest of what it holds."""
        taken: list[AttemptRun] = []
        held = self.leased[node]
        while held and count:
            run = held.pop(0)
            if run.count > count:
                held.insert(0, run.part(count, run.count))
                run = run.part(0, count)
            taken.append(run)
            count -= run.count
        return taken


def job_id(number: int, wall_ms: int = WALL_MS) -> JobId:
    text = f"{(wall_ms << 80) | (7 << 76) | (2 << 62) | number:032x}"
    return JobId("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))


def array(count: int) -> JobSpec:
    return JobSpec(backend=("wasm",), run=Run(args=("noop",)), array=Array(count=count))
