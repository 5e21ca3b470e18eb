"""Who submits what in a simulated mesh: clients that resend, jobs that differ in all that placement looks at."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from msgspec.structs import replace as changed

from meshd.model import (
    Array,
    Inline,
    Input,
    JobId,
    JobSpec,
    Needs,
    Offer,
    OnLost,
    Resources,
    Retry,
    Run,
    Timeout,
)
from meshd.placement import Demand, permanent_lacks
from meshd.raft.state.commands import AnyAnswer, AnyCommand, Cancel, Rejected, Submit, Submitted
from meshd.testing.machines import output_of
from meshd.testing.nodes import SimNode
from meshd.testing.world import World
from meshd.views import GetJob, JobPage, JobView, ListJobs

READS = 4
"""Of each job, once it is acknowledged: one soon, each of the others within ten times as long as the one before."""
READ_AFTER_MS = 30.0
READ_LATER = 10
JOBS_LISTED = 200
POKED_RANGES = (0, 0, 150, 600)
"""Some of the small commands are of several sectors, so that their frame can be torn."""

PROCESS = ("process",)
ONE_CORE = Needs()
WISHES = (
    (PROCESS, ONE_CORE),
    (PROCESS, ONE_CORE),
    (PROCESS, Needs(Resources(cpu_milli=500))),
    (PROCESS, Needs(Resources(cpu_milli=1000, memory=2 << 30))),
    (PROCESS, Needs(Resources(cpu_milli=500, custom=(("licence", 1),)))),
    (PROCESS, Needs(labels="zone=a")),
    (PROCESS, Needs(labels="zone in (b, c), ssd")),
    (PROCESS, Needs(labels="!ssd")),
    (("wasm",), ONE_CORE),
    (("wasm", "process"), Needs(Resources(cpu_milli=500))),
)
HOPELESS = (
    (PROCESS, Needs(labels="zone=nowhere"), "label zone=nowhere"),
    (PROCESS, Needs(Resources(cpu_milli=64_000)), "cpu 64 (has cpu "),
    (PROCESS, Needs(Resources(custom=(("quantum", 1),))), "quantum 1 (has quantum 0)"),
    (("fortran", "cobol"), ONE_CORE, "backend fortran"),
)


class Client:
    """Someone who submits, cancels and resends, at any node, with one id for one thing."""

    def __init__(self, world: World, rough: bool) -> None:
        self.world, self.rough = world, rough
        self.acknowledged: dict[JobId, JobSpec] = {}
        self.unanswered = 0

    def submit(self, spec: JobSpec) -> JobId:
        job = uuid7(self.world.wall_ms(), self.world.heap.random)
        self.world.heap.note(f"client: submits {job[-6:]} x{spec.array.count} {spec.on_lost} {spec.lost_after_ms}")

        def answered(answer: AnyAnswer) -> None:
            if not isinstance(answer, Submitted):
                raise self.world.checks.broken("a good job is taken", str(answer))
            if answer.job != job:
                self.world.checks.breach("an answer is to what was asked", f"to submit {job}: {answer}")
            self.acknowledged[job] = spec
            self.reads(job, READ_AFTER_MS)

        self.send(Submit(job, spec), answered)
        if self.rough and self.world.heap.chance(0.4):
            delay_ms = self.world.heap.between(200, 30_000)
            self.world.heap.after(delay_ms, lambda: self.send(Submit(job, spec), answered))
        return job

    def reads(self, job: JobId, within_ms: float) -> None:
        """Somebody looks at it, at some node, by its id or in the list."""
        heap = self.world.heap

        def look() -> None:
            alive = [node for node in self.world.nodes.values() if node.is_alive]
            if alive:
                self.reads_at(heap.random.choice(alive), job)

        for _ in range(READS):
            heap.after(heap.between(0, within_ms), look)
            within_ms *= READ_LATER

    def reads_at(self, node: SimNode, job: JobId) -> None:
        if not node.is_alive:
            return
        history = self.world.checks.history
        operation = history.begins(f"reading {job[-6:]} at {node.name}")

        def in_list(page: JobPage | None, position: int) -> None:
            assert page is not None
            history.read(operation, job, next((view for view in page.jobs if view.id == job), None), position)

        if self.world.heap.chance(0.5):
            node.query(ListJobs(limit=JOBS_LISTED), JobPage, in_list)
        else:
            node.query(GetJob(job), JobView, lambda view, at: history.read(operation, job, view, at))

    def pokes(self, first: SimNode | None = None) -> None:
        """A small command that changes nothing, for the sake of its answer: cancels what nobody has submitted."""
        job = uuid7(self.world.wall_ms(), self.world.heap.random)
        tasks = ((0, 1),) * self.world.heap.random.choice(POKED_RANGES)

        def answered(answer: AnyAnswer) -> None:
            if not isinstance(answer, Rejected) or job not in answer.message:
                self.world.checks.breach("an answer is to what was asked", f"to cancel {job}: {answer}")

        self.send(Cancel(job, tasks or None), answered, first=first)

    def cancel(self, job: JobId) -> None:
        self.world.heap.note(f"client: cancels {job[-6:]}")
        self.send(Cancel(job), lambda answer: None)

    def send(
        self, command: AnyCommand, answered: object, *, at_servers: bool = False, first: SimNode | None = None
    ) -> None:
        """Until it is answered: every second, anywhere, and to `first` at first."""
        self.unanswered += 1
        is_answered = False
        operation = self.world.checks.history.begins(f"{type(command).__name__} by a client")

        def done(answer: AnyAnswer | None, position: int) -> None:
            nonlocal is_answered
            if answer is not None and not is_answered:
                is_answered = True
                self.unanswered -= 1
                self.world.checks.history.written(operation, position)
                answered(answer)  # type: ignore[operator]

        def attempt() -> None:
            if is_answered:
                return
            alive = [node for node in self.world.nodes.values() if node.is_alive and (node.is_server or not at_servers)]
            if alive:
                self.world.heap.random.choice(alive).propose(command, done)
            self.world.heap.after(1_000, attempt)

        if first is not None and first.is_alive:
            first.propose(command, done)
            self.world.heap.after(1_000, attempt)
        else:
            attempt()


def uuid7(wall_ms: int, random: Random) -> JobId:
    number = wall_ms << 80 | 7 << 76 | random.getrandbits(12) << 64 | 2 << 62 | random.getrandbits(62)
    digits = f"{number:032x}"
    return JobId("-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])))


@dataclass(frozen=True)
class Load:
    """What is submitted: how much, and what each job is drawn from."""

    jobs: tuple[int, int] = (4, 9)
    on_lost: tuple[OnLost, ...] = (OnLost.RERUN, OnLost.RERUN, OnLost.WAIT, OnLost.FAIL)
    lost_after_ms: tuple[int | None, ...] = (None, None, 0, 5_000, 30_000, 40_000)
    lengths_ms: tuple[int, ...] = (20, 300, 2_000, 8_000, 25_000)
    counts: tuple[int, ...] = (1, 1, 2, 4)
    stdin_bytes: tuple[int, ...] = (0,)
    """A frame of many sectors can be torn."""

    def some_job(self, random: Random) -> JobSpec:
        on_lost = random.choice(self.on_lost)
        tries = 1 if on_lost is OnLost.FAIL else random.choice((1, 2, 3))
        length_ms, failures = random.choice(self.lengths_ms), random.choice((0, 0, 0, 1))
        return JobSpec(
            backend=("process",),
            run=Run(args=("work", str(length_ms), str(failures)), stdin=self._some_stdin(random)),
            array=Array(count=random.choice(self.counts), at_once=random.choice((0, 0, 1))),
            retry=Retry(attempts=tries, backoff_min_ms=200, backoff_max_ms=2_000),
            timeout=Timeout(total_ms=90_000 if random.random() < 0.1 else 0),
            on_lost=on_lost,
            lost_after_ms=random.choice(self.lost_after_ms),
            priority=random.choice((50, 50, 80)),
        )

    def _some_stdin(self, random: Random) -> Inline | None:
        size = random.choice(self.stdin_bytes)
        return Inline(b"x" * size) if size else None

    def some_input(self, finished: list[tuple[JobId, int]], random: Random) -> tuple[Input, ...]:
        """What an earlier task has put out, for some."""
        if not finished or random.random() < 0.5:
            return ()
        return (Input("in", output_of(*random.choice(finished))),)


def placed(spec: JobSpec, offers: list[Offer], random: Random) -> JobSpec:
    """The same job with a wish where it runs, which at least one of these offers fits."""
    backend, needs = random.choice(WISHES)
    wish = changed(spec, backend=backend, needs=needs)
    return wish if any(not permanent_lacks(Demand.of(wish), offer) for offer in offers) else spec


def unplaceable(random: Random) -> tuple[JobSpec, str]:
    """A job that no node fits, and how each node's lack of it begins."""
    backend, needs, lack = random.choice(HOPELESS)
    return JobSpec(backend=backend, run=Run(args=("work", "20", "0")), needs=needs), lack
