"""A small mesh's replicated state, driven by commands as the log would: for tests of the queue."""

from __future__ import annotations

from typing import Any

import msgspec

from meshd import codec
from meshd.model import (
    Array,
    AttemptKey,
    AttemptRun,
    BackendOffer,
    EndReason,
    JobId,
    JobSpec,
    Member,
    NodeId,
    Offer,
    OnLost,
    Outcome,
    Resources,
    Retry,
    Role,
    Run,
    TaskState,
)
from meshd.raft.state.commands import (
    AnyAnswer,
    Batch,
    Claim,
    Command,
    CreateInvite,
    Ended,
    EndSession,
    Event,
    Found,
    Join,
    Leased,
    OpenSession,
    Reconcile,
    Report,
    Stamped,
    StopWanted,
    Submit,
)
from meshd.raft.state.machine import Machine
from meshd.views import Explain, Explanation, GetJob, JobView, ListTasks, TaskView

A, B, C = NodeId("node-a"), NodeId("node-b"), NodeId("node-c")
WALL_MS = 1_800_000_000_000
SECRET = "5" * 64
OFFER = Offer(backends=(BackendOffer("wasm"),), resources=Resources(cpu_milli=64_000, memory=64 << 30))
GOOD = Outcome(reason=EndReason.EXIT, exit_code=0)
BAD = Outcome(reason=EndReason.EXIT, exit_code=1)


def job_id(number: int, wall_ms: int = WALL_MS) -> JobId:
    """The UUIDv7 number `number` of that moment."""
    text = f"{(wall_ms << 80) | (7 << 76) | (2 << 62) | number:032x}"
    return JobId("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))


def spec(*, count: int = 1, attempts: int = 1, on_lost: OnLost = OnLost.RERUN, **fields: Any) -> JobSpec:
    fields.setdefault("array", Array(count=count))
    fields.setdefault("retry", Retry(attempts=attempts, backoff_min_ms=0))
    return JobSpec(backend=fields.pop("backend", ("wasm",)), run=Run(args=("x",)), on_lost=on_lost, **fields)


class Scene:
    """One replica and whoever speaks to it. `do` applies one command and returns its answer."""

    def __init__(self, *nodes: NodeId, slots: int = 1, offer: Offer = OFFER) -> None:
        self.machine = Machine()
        self.index = 0
        self.events: list[Event] = []
        self.entries: list[bytes] = []
        self._seq: dict[NodeId, int] = {}
        self._jobs = 0
        if nodes:
            self.do(nodes[0], Found("mesh", Member(nodes[0], "a", (Role.SERVER, Role.WORKER))))
            self.do(nodes[0], CreateInvite(SECRET, (Role.SERVER, Role.WORKER), 1000, 3_600_000))
        for node in nodes[1:]:
            self.do(nodes[0], Join(SECRET, Member(node, str(node), (Role.SERVER, Role.WORKER))))
        for node in nodes if slots else ():
            self.open(node, 1, slots=slots, offer=offer)

    def do(self, origin: NodeId, command: Command) -> Any:
        [answer] = self.batch((origin, command))
        return answer

    def batch(self, *commands: tuple[NodeId, Command], elapsed_ms: int = 0, wall_ms: int = 0) -> list[AnyAnswer]:
        wall_ms = wall_ms or max(self.machine.wall_ms, WALL_MS) + elapsed_ms
        stamped = tuple(Stamped(origin, msgspec.Raw(codec.encode(command))) for origin, command in commands)
        self.entries.append(codec.encode(Batch(elapsed_ms, wall_ms, stamped)))
        self.index += 1
        answers = self.machine.apply(self.index, self.entries[-1])
        self.events += self.machine.take_events()
        assert self.machine.faults == 0, answers
        return [codec.decode(answer, AnyAnswer) for answer in answers]

    def tick(self, elapsed_ms: int) -> None:
        """Time passes, in entries of at most a minute."""
        while elapsed_ms > 0:
            self.batch(elapsed_ms=min(elapsed_ms, 60_000))
            elapsed_ms -= 60_000

    # --- jobs

    def submit(self, job_spec: JobSpec | None = None, *, origin: NodeId = A) -> JobId:
        self._jobs += 1
        name = job_id(self._jobs, max(self.machine.wall_ms, WALL_MS))
        answer = self.do(origin, Submit(name, job_spec or spec()))
        assert answer.is_new
        return name

    def job(self, selector: str) -> JobView:
        view: JobView = self.machine.answer(GetJob(selector))
        return view

    def task(self, job: JobId, task: int = 0) -> TaskView:
        [view] = self.machine.answer(ListTasks(job, start=task, stop=task + 1)).tasks
        assert isinstance(view, TaskView)
        return view

    def state(self, job: JobId, task: int = 0) -> TaskState:
        return self.task(job, task).state

    def explain(self, job: JobId) -> Explanation:
        view: Explanation = self.machine.answer(Explain(job))
        return view

    # --- nodes

    def open(
        self,
        node: NodeId,
        epoch: int,
        held: tuple[AttemptKey, ...] = (),
        *,
        slots: int = 1,
        offer: Offer = OFFER,
        boot: str = "",
    ) -> Any:
        self._seq[node] = 0
        return self.do(node, OpenSession(epoch, held, slots, offer, boot))

    def claim(self, node: NodeId, slots: int, *, epoch: int = 1, offer: Offer = OFFER) -> Any:
        return self.do(node, Claim(epoch, self._next(node), slots, offer))

    def report(
        self,
        node: NodeId,
        *ended: tuple[AttemptKey, Outcome],
        epoch: int = 1,
        running: tuple[AttemptKey, ...] = (),
    ) -> Any:
        reported = tuple(Ended(key, outcome) for key, outcome in ended)
        return self.do(node, Report(epoch, self._next(node), reported, running))

    def report_runs(
        self,
        node: NodeId,
        *,
        done: tuple[AttemptRun, ...] = (),
        returned: tuple[AttemptRun, ...] = (),
        ahead: tuple[tuple[JobId, int], ...] | None = None,
        epoch: int = 1,
    ) -> Any:
        return self.do(node, Report(epoch, self._next(node), (), (), done, returned, ahead))

    def finish(self, node: NodeId, outcome: Outcome = GOOD, *, epoch: int = 1) -> Any:
        """The node's oldest attempt ends."""
        return self.report(node, (self.leases(node, epoch)[0], outcome), epoch=epoch)

    def end(self, node: NodeId, epoch: int = 1, *, origin: NodeId = A) -> Any:
        return self.do(origin, EndSession(node, epoch))

    def reconcile(self, node: NodeId, *held: AttemptKey, fence: int | None = None, epoch: int = 1) -> Any:
        return self.do(node, Reconcile(epoch, self.machine.fence if fence is None else fence, held))

    def leases(self, node: NodeId, epoch: int = 1) -> tuple[AttemptKey, ...]:
        return self.machine.leases_of(node, epoch)

    def notices(self) -> list[AttemptKey]:
        """Lease notices since this was last asked."""
        found = [key for event in self.events if isinstance(event, Leased) for key in event.run.each()]
        self.events.clear()
        return found

    def stops(self) -> list[AttemptKey]:
        return [event.key for event in self.events if isinstance(event, StopWanted)]

    def _next(self, node: NodeId) -> int:
        self._seq[node] = self._seq.get(node, 0) + 1
        return self._seq[node]
