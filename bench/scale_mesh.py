"""A mesh of any size on virtual time, and whose CPU what it does would have cost.

Real are the voters' log (engine, journal, batches, frames), the replicated state at each of three voters, the leader's
keeper, every node's session, and the bytes of all they say to one another. Modelled are disk, network, clock and the
tasks, which take their time and end well with nothing to tell. Gossip is measured apart (bench.scale_gossip): a
thousand nodes of it in one process would need gigabytes.

All that happens at a node is timed on this thread and counted as that node's. The simulator's own part in it, a few
microseconds for each message, is counted too, so figures are a little too high for all sizes alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

from bench.replica import SECRET
from meshd.agent import Agent
from meshd.model import (
    AttemptKey,
    BackendOffer,
    EndReason,
    JobId,
    JobSpec,
    Member,
    NodeId,
    Offer,
    Outcome,
    Resources,
    Role,
)
from meshd.raft.settings import RaftSettings
from meshd.raft.state.commands import AnyAnswer, AnyCommand, CreateInvite, Found, Join, Submit, Submitted
from meshd.raft.state.machine import Machine
from meshd.raft.storage.segments import JournalSizes
from meshd.testing.checks import Breach, Checks
from meshd.testing.faults import CALM
from meshd.testing.gossiping import Reply
from meshd.testing.machines import Runner
from meshd.testing.nodes import SimNode
from meshd.testing.servers import MESH
from meshd.testing.world import World
from meshd.work.keeper import Keeper, KeeperEffect, KeeperEvent
from meshd.work.worker import AttemptsEnded, Worker, WorkerEffect, WorkerEvent

SERVERS = 3
CORES = 2
SYNC_MS = (1.0, 4.0)
"""Of a disk that is no bottleneck."""
FORM_MS = 60_000
GOOD = Outcome(EndReason.EXIT, exit_code=0)
OFFER = Offer(backends=(BackendOffer("wasm"),), resources=Resources(cpu_milli=1000 * CORES))
SETTINGS = RaftSettings(
    journal=JournalSizes(segment=8 << 20, step=1 << 20, reserve=1 << 20, reserves=2, release=1 << 20),
    disk_free_min=0,
)


class Nothing:
    """Checks that check nothing: here costs are looked for, not mistakes."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*_: object, **__: object) -> None:
    pass


class Meter(Nothing):
    """Hears what the log commits, and how long a replica takes to apply it."""

    def __init__(self) -> None:
        self.promises = Nothing()
        self.entries = self.bytes = 0
        self.apply_s: dict[int, float] = {}
        """By machine."""
        self._last = 0
        self._began_s = 0.0

    def committed(self, index: int, batch: bytes) -> None:
        if index > self._last:
            self._last = index
            self.entries += 1
            self.bytes += len(batch)
        self._began_s = time.thread_time()

    def replica_applied(self, index: int, answers: Sequence[bytes], machine: Machine) -> None:
        took_s = time.thread_time() - self._began_s
        self.apply_s[id(machine)] = self.apply_s.get(id(machine), 0.0) + took_s

    def breach(self, rule: str, what: str) -> NoReturn:
        raise Breach(f"{rule}: {what}")

    broken = breach


class TimedKeeper(Keeper):
    cpu_s = 0.0

    def handle(self, event: KeeperEvent, now_ms: int) -> list[KeeperEffect]:
        start = time.thread_time()
        effects = super().handle(event, now_ms)
        self.cpu_s += time.thread_time() - start
        return effects


class TimedWorker(Worker):
    cpu_s = 0.0

    def handle(self, event: WorkerEvent | None, now_ms: int) -> list[WorkerEffect]:
        start = time.thread_time()
        effects = super().handle(event, now_ms)
        self.cpu_s += time.thread_time() - start
        return effects


class Tasks(Runner):
    """Each takes its milliseconds, one after the other of a batch, and the batch is told of when it is through."""

    def __init__(self, node: ScaleNode) -> None:
        super().__init__(node)
        self._mesh = node.mesh
        self._over_ms: dict[int, float] = {}
        """When what a lane has is over."""

    def start(self, number: int, keys: Sequence[AttemptKey], spec: JobSpec, leash_ms: int | None) -> None:
        now_ms = self.node.world.heap.now_ms
        over_ms = max(now_ms, self._over_ms.get(number, now_ms)) + self._mesh.task_ms * len(keys)
        self._over_ms[number] = over_ms

        def end() -> None:
            if self._over_ms[number] == over_ms:
                del self._over_ms[number]
            self.node.handle(AttemptsEnded(tuple((key, GOOD) for key in keys)))

        self.node.after(over_ms - now_ms, end)

    def recall(self, keys: Sequence[AttemptKey]) -> tuple[AttemptKey, ...]:
        return ()


class ScaleNode(SimNode):
    def __init__(self, mesh: ScaleMesh, name: str, *, is_server: bool, is_founder: bool) -> None:
        super().__init__(mesh, name, is_server=is_server, slots=CORES + 1, is_founder=is_founder)
        self.mesh = mesh
        self.offer = OFFER
        self.runner = Tasks(self)
        self.cpu_s = 0.0

    def after(self, delay_ms: float, action: Callable[[], None], *, of_machine: bool = False) -> None:
        def timed() -> None:
            start = time.thread_time()
            action()
            self.cpu_s += time.thread_time() - start

        super().after(delay_ms, timed, of_machine=of_machine)

    def start(self) -> None:
        self.is_alive = True
        self.process += 1
        self.count_start()
        if self.is_server and not self._start_server():
            raise Breach(f"{self.name} does not start")
        keeper = TimedKeeper(self.machine) if self.machine is not None else None
        self.agent = Agent(TimedWorker(epoch=self.saved_epoch), keeper)
        self.offers(self.slots)

    def sync_ms(self) -> float:
        return self.world.heap.between(*SYNC_MS)

    def some_voter(self) -> SimNode:
        """The leader, as a node does that gossip has told who leads."""
        return self.mesh.leader() or self.world.heap.random.choice(self.mesh.servers)

    def answer(self, method: str, peer: NodeId, body: bytes, reply: Reply) -> None:
        assert method == "log.propose"
        self._answer_propose(peer, body, reply)

    @property
    def control_s(self) -> float:
        """All but its own work on tasks."""
        return self.cpu_s - self.worker_s

    @property
    def keeper_s(self) -> float:
        keeper = None if self.agent is None else self.agent.keeper
        return keeper.cpu_s if isinstance(keeper, TimedKeeper) else 0.0

    @property
    def worker_s(self) -> float:
        worker = None if self.agent is None else self.agent.worker
        return worker.cpu_s if isinstance(worker, TimedWorker) else 0.0


class ScaleMesh(World):
    """`nodes` of them, three with the log, all at work; formed when this returns."""

    def __init__(self, nodes: int, *, task_ms: float) -> None:
        super().__init__(1, CALM)
        self.task_ms = task_ms
        self.settings = SETTINGS
        self.meter = Meter()
        self.checks = cast(Checks, self.meter)
        members = [
            ScaleNode(self, f"n{number}", is_server=number < SERVERS, is_founder=number == 0) for number in range(nodes)
        ]
        self.nodes.update((node.id, node) for node in members)
        self.all = members
        self.servers = members[:SERVERS]
        self._form()

    def leader(self) -> ScaleNode | None:
        for node in self.servers:
            if node.server is not None and node.server.engine.is_leader:
                return node
        return None

    @property
    def machine(self) -> Machine:
        """The leader's."""
        leader = self.leader()
        assert leader is not None and leader.machine is not None
        return leader.machine

    def run(self, for_ms: int) -> None:
        until_ms = self.heap.now_ms + for_ms
        self.heap.run(until_ms, is_over=lambda: False)
        self.heap.now_ms = until_ms

    def do(self, command: AnyCommand) -> AnyAnswer:
        """By a client at the leader."""
        answers: list[Any] = []
        leader = self.leader()
        assert leader is not None
        leader.propose(command, lambda answer, position: answers.append(answer))
        self._until(lambda: bool(answers), "a command is answered")
        return cast(AnyAnswer, answers[0])

    def submit(self, job: JobId, spec: JobSpec) -> None:
        answer = self.do(Submit(job, spec))
        assert isinstance(answer, Submitted), answer

    def _form(self) -> None:
        first, *others = self.all
        first.start()
        self._until(lambda: first.leading_term() is not None, "the founder leads")
        both = (Role.SERVER, Role.WORKER)
        self.do(Found(MESH, Member(first.id, first.name, both)))
        self.do(CreateInvite(SECRET, both, 1_000_000, 86_400_000))
        for node in others:
            roles = both if node.is_server else (Role.WORKER,)
            first.propose(Join(SECRET, Member(node.id, node.name, roles)), _nothing)
        self._until(lambda: len(self.machine.members()) == len(self.all), "all joined")
        for node in self.servers[1:]:
            node.start()
        self._until(lambda: len(self.voters()) == SERVERS, "three vote")
        for node in others:
            if not node.is_server:
                node.start()
        self._until(lambda: len(self.machine.sessions_live()) == len(self.all), "all have a session")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        until_ms = self.heap.now_ms + FORM_MS
        while not condition():
            self.run(10)
            if self.heap.now_ms >= until_ms:
                raise Breach(f"not within {FORM_MS} ms: {what}")
