"""What really runs on a simulated machine: fetching, running, ending, being stopped, outputs on two disks.

A job's args say how it behaves: `work MS FAILURES`: each attempt takes about MS
milliseconds, and the first FAILURES of a task exit with 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshd.model import AttemptKey, EndReason, Inline, JobSpec, NodeId, Outcome
from meshd.worker import AttemptEnded

if TYPE_CHECKING:
    from meshd.testing.world import SimNode

FETCH_MS = (0.0, 300.0)
STOP_MS = (1.0, 5_000.0)
"""TERM, grace, KILL."""
REPLICATE_EVERY_MS = 300


@dataclass(slots=True, eq=False)
class Run:
    key: AttemptKey
    spec: JobSpec
    leash_ms: int | None
    is_running: bool = False
    is_stopping: bool = False
    is_over: bool = False


class Runner:
    def __init__(self, node: SimNode) -> None:
        self.node = node
        self._runs: dict[int, Run] = {}

    @property
    def is_busy(self) -> bool:
        return any(run.is_running and not run.is_over for run in self._runs.values())

    def start(self, key: AttemptKey, spec: JobSpec, leash_ms: int | None) -> None:
        run = self._runs[key.fence] = Run(key, spec, leash_ms)
        self._watch_leash(run)
        self.node.after(self.node.world.heap.between(*FETCH_MS), lambda: self._begin(run), of_machine=True)

    def stop(self, key: AttemptKey, reason: EndReason) -> None:
        run = self._runs.get(key.fence)
        if run is None or run.is_over or run.is_stopping:
            return
        run.is_stopping = True
        heap = self.node.world.heap
        delay_ms = heap.between(*STOP_MS) if run.is_running else 0
        self.node.after(delay_ms, lambda: self._end(run, Outcome(reason)), of_machine=True)

    def move_leash(self, key: AttemptKey, leash_ms: int) -> None:
        run = self._runs.get(key.fence)
        if run is not None and not run.is_over:
            run.leash_ms = leash_ms
            self._watch_leash(run)

    def killed(self) -> None:
        """The agent died; so did all that it ran."""
        for run in self._runs.values():
            if run.is_running:
                self.node.world.checks.stopped(self.node.id, run.key, None)
        self._runs.clear()

    def _watch_leash(self, run: Run) -> None:
        """The runner holds the deadline itself, so that a stopped agent keeps nothing alive."""
        if run.leash_ms is None:
            return

        def check() -> None:
            if run.leash_ms is not None and self.node.clock_ms() >= run.leash_ms:
                self.stop(run.key, EndReason.LOST)

        self.node.after(run.leash_ms - self.node.clock_ms() + 20, check, of_machine=True)

    def _begin(self, run: Run) -> None:
        if run.is_over or run.is_stopping:
            return
        run.is_running = True
        heap, checks = self.node.world.heap, self.node.world.checks
        checks.started(self.node.id, run.key, run.spec)
        heap.note(f"{self.node.name}: runs {_name(run.key)}")
        _, length_ms, failures = run.spec.run.args
        fails = checks.history(run.key.job, run.key.task).own_failures < int(failures)
        outcome = Outcome(EndReason.EXIT, exit_code=1 if fails else 0)
        self.node.after(int(length_ms) * heap.between(0.7, 1.3), lambda: self._end(run, outcome), of_machine=True)

    def _end(self, run: Run, outcome: Outcome) -> None:
        if run.is_over:
            return
        run.is_over = True
        self.node.world.heap.note(f"{self.node.name}: {_name(run.key)} ends {outcome.reason} {outcome.exit_code}")
        if run.is_running:
            self.node.world.checks.stopped(self.node.id, run.key, outcome)
        self._replicate(run, outcome)

    def _replicate(self, run: Run, outcome: Outcome) -> None:
        """A success has an output, which lies on a second disk before anybody hears of it (protocol.md 6)."""
        holders: tuple[NodeId, ...] = ()
        if outcome.is_success:
            second = self.node.world.some_peer(self.node)
            if second is None:
                self.node.after(REPLICATE_EVERY_MS, lambda: self._replicate(run, outcome))
                return
            holders = (self.node.id, second.id)
        told = Outcome(outcome.reason, exit_code=outcome.exit_code, stdout=Inline(b"out"), holders=holders)
        self._runs.pop(run.key.fence, None)
        self.node.after(0, lambda: self.node.handle(AttemptEnded(run.key, told)))


def _name(key: AttemptKey) -> str:
    return f"{key.job[-6:]}/{key.task} attempt {key.attempt} fence {key.fence}"
