"""What really runs on a simulated machine: fetching, running, ending, being stopped, outputs on two disks.

A job's args say how it behaves: `work MS FAILURES`: each attempt takes about MS
milliseconds, and the first FAILURES of a task exit with 1. Who has an input, and who may
take a copy of an output, is asked of this node's gossip, as the daemon does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING

from msgspec.structs import replace

from meshd.model import AttemptKey, BlobRef, EndReason, JobId, JobSpec, Outcome
from meshd.neighbours import takers_of
from meshd.work.worker import AttemptsEnded

if TYPE_CHECKING:
    from meshd.testing.nodes import SimNode

FETCH_MS = (0.0, 300.0)
STOP_MS = (1.0, 5_000.0)
"""TERM, grace, KILL."""
PAUSE_MS = 500
"""Before everybody is asked again."""
CALL_TIMEOUT_MS = 2_000
OUTPUT_BYTES = 10_000
YES, NO = b"yes", b"no"


@dataclass(slots=True, eq=False)
class Lane:
    number: int
    waiting: list[Run]


@dataclass(slots=True, eq=False)
class Run:
    key: AttemptKey
    spec: JobSpec
    leash_ms: int | None
    lane: Lane
    has_begun: bool = False
    is_running: bool = False
    is_stopping: bool = False
    is_over: bool = False


class Runner:
    def __init__(self, node: SimNode) -> None:
        self.node = node
        self._runs: dict[int, Run] = {}
        self._lanes: dict[int, Lane] = {}
        """Those in which something runs."""

    @property
    def is_busy(self) -> bool:
        return any(run.is_running and not run.is_over for run in self._runs.values())

    def start(self, number: int, keys: Sequence[AttemptKey], spec: JobSpec, leash_ms: int | None) -> None:
        """One after the other, after what is left in that lane."""
        is_new = number not in self._lanes
        lane = self._lanes.setdefault(number, Lane(number, []))
        for key in keys:
            run = self._runs[key.fence] = Run(key, spec, leash_ms, lane)
            self._watch_leash(run)
            lane.waiting.append(run)
        if is_new:
            self._next(lane)

    def recall(self, keys: Sequence[AttemptKey]) -> tuple[AttemptKey, ...]:
        """Those that have not begun: they never will."""
        recalled = []
        for key in keys:
            run = self._runs.get(key.fence)
            if run is not None and not (run.has_begun or run.is_over or run.is_stopping):
                run.is_over = True
                del self._runs[key.fence]
                recalled.append(key)
        return tuple(recalled)

    def _next(self, lane: Lane) -> None:
        while lane.waiting:
            run = lane.waiting.pop(0)
            if not (run.is_over or run.is_stopping):
                run.has_begun = True
                self.node.after(self.node.world.heap.between(*FETCH_MS), partial(self._fetch, run), of_machine=True)
                return
        del self._lanes[lane.number]

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
            run.lane.waiting.clear()
            if run.is_running:
                self.node.world.checks.stopped(self.node.id, run.key, None)
        self._runs.clear()
        self._lanes.clear()

    def _watch_leash(self, run: Run) -> None:
        """The runner holds the deadline itself, so that a stopped agent keeps nothing alive."""
        if run.leash_ms is None:
            return

        def check() -> None:
            if run.leash_ms is not None and self.node.clock_ms() >= run.leash_ms:
                self.stop(run.key, EndReason.LOST)

        self.node.after(run.leash_ms - self.node.clock_ms() + 20, check, of_machine=True)

    # --- blobs --------------------------------------------------------------------------------------------------------

    def answer(self, method: str, body: bytes) -> bytes:
        blob = body.decode()
        if method == "blob.take":
            self.keep(blob)
        return YES if blob in self.node.blobs else NO

    def keep(self, blob: str) -> None:
        """On this disk, synced; and told to everybody."""
        self.node.blobs[blob] = None
        if self.node.gossip is not None:
            self.node.gossip.publish(f"blob/{blob}", b"")

    def _fetch(self, run: Run) -> None:
        """Its inputs, from whoever gossip says has them; as often as it takes."""
        if run.is_over or run.is_stopping:
            return
        gossip = self.node.gossip
        assert gossip is not None
        blobs = [each.source.hash for each in run.spec.inputs if isinstance(each.source, BlobRef)]
        missing = next((blob for blob in blobs if blob not in self.node.blobs), None)
        if missing is None:
            self._begin(run)
            return
        holders = sorted(holder for holder in gossip.core.holders(missing) if holder != self.node.id)

        def answered(answer: bytes | None, _is_silent: bool) -> None:
            if answer == YES:
                self.keep(missing)
            self.node.after(0 if answer == YES else PAUSE_MS, lambda: self._fetch(run))

        if holders:
            holder = self.node.world.heap.random.choice(holders)
            self.node.call(holder, "blob.get", missing.encode(), CALL_TIMEOUT_MS, answered)
        else:
            self.node.after(PAUSE_MS, lambda: self._fetch(run))

    def _replicate(self, run: Run, outcome: Outcome) -> None:
        """A success has an output, which lies on a second disk before anybody hears of it (protocol.md 6)."""
        if not outcome.is_success:
            self._tell(run, outcome)
            return
        output = output_of(run.key.job, run.key.task)
        self.keep(output.hash)
        others = [node for node in self.node.members if node != self.node.id]
        peers = takers_of(others, self.node.thinks_dead, holds_log_alone=False)
        if not peers:
            self._tell(run, replace(outcome, stdout=output, holders=(self.node.id,)))
            return
        peer = self.node.world.heap.random.choice(peers)

        def answered(answer: bytes | None, _is_silent: bool) -> None:
            if answer == YES:
                self._tell(run, replace(outcome, stdout=output, holders=(self.node.id, peer)))
            else:
                self.node.after(PAUSE_MS, lambda: self._replicate(run, outcome))

        self.node.call(peer, "blob.take", output.hash.encode(), CALL_TIMEOUT_MS, answered)

    def _tell(self, run: Run, outcome: Outcome) -> None:
        self._runs.pop(run.key.fence, None)
        self.node.handle(AttemptsEnded(((run.key, outcome),)))

    # --- the process --------------------------------------------------------------------------------------------------

    def _begin(self, run: Run) -> None:
        run.is_running = True
        heap, checks = self.node.world.heap, self.node.world.checks
        checks.started(self.node.id, run.key, run.spec)
        heap.note(f"{self.node.name}: runs {_name(run.key)}")
        _, length_ms, failures = run.spec.run.args
        fails = checks.task(run.key.job, run.key.task).own_failures < int(failures)
        outcome = Outcome(EndReason.EXIT, exit_code=1 if fails else 0)
        self.node.after(int(length_ms) * heap.between(0.7, 1.3), lambda: self._end(run, outcome), of_machine=True)

    def _end(self, run: Run, outcome: Outcome) -> None:
        if run.is_over:
            return
        run.is_over = True
        self.node.world.heap.note(f"{self.node.name}: {_name(run.key)} ends {outcome.reason} {outcome.exit_code}")
        if run.is_running:
            self.node.world.checks.stopped(self.node.id, run.key, outcome)
        if run.has_begun:
            self._next(run.lane)
        self.node.after(0, lambda: self._replicate(run, outcome))


def output_of(job: JobId, task: int) -> BlobRef:
    return BlobRef(blake2b(f"{job} {task}".encode(), digest_size=32).hexdigest(), OUTPUT_BYTES)


def _name(key: AttemptKey) -> str:
    return f"{key.job[-6:]}/{key.task} attempt {key.attempt} fence {key.fence}"
