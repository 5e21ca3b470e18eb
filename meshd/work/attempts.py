"""The attempts that a node holds: what may be obeyed, what may start, when each must stop by itself.

        notice             start              end               Report answered
      ──────────▶ waiting ─────────▶ RUNNING ─────────▶ ENDED ──────────────────▶ forgotten
                   │    ▲  recalled    │ │ not its own any more
                   │    └──────────────┘ └──────────▶ STRAY ───── seen dead ────▶ forgotten
                   └▶ returned ── Report answered ──▶ forgotten

An attempt is held from its notice until the Report of its end is answered; a stray is
not held (it is never listed), but as long as it lives nothing else starts. What was
seen once is remembered over all sessions of this process: an adopted attempt is leased
again under a new epoch, and a late notice of it must not start it a second time.

What waits are runs, as they were leased; one attempt is a value of its own from its
start on. Attempts started together are a batch, which has the room of one.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from meshd.model import AttemptKey, AttemptRun, EndReason, JobId, JobSpec, OnLost, Outcome, Resources, runs_of
from meshd.placement import amounts_of
from meshd.raft.state.ranges import Ranges

SEEN_RANGES_MAX = 10_000
"""Remembered ranges of fences. Past it the older half is forgotten and refused as one range instead, which is as safe."""

PROMISE_MARGIN_MS = 30_000
"""So long before the mesh may start a successor, a promised attempt is stopped (protocol.md 5): room for 12 s - 5 s
between the ends of view and session, for TERM and KILL, and for a machine that was frozen for a moment."""


PLACES_MAX = 4096
"""At a time, of what needs nothing."""


class Phase(Enum):
    RUNNING = "running"
    ENDED = "ended"
    STRAY = "stray"


@dataclass(slots=True)
class Batch:
    """Attempts of one job that run one after the other in the room of one; more may be added while some are left."""

    job: JobId
    spec: JobSpec
    fence: int
    """Of its first."""
    since_ms: int
    """For so long it has run since `ran` was 0."""
    front_ms: int
    """Since when the first that is left runs, as far as is known here."""
    left: dict[int, Attempt] = field(default_factory=dict)
    """By fence, in their order."""
    ran: int = 0
    is_slow: bool = False
    """What is in front takes longer than it should."""
    slow_again_ms: int = 0
    """When that is to be looked at anew."""

    @property
    def front(self) -> Attempt:
        return next(iter(self.left.values()))

    def lap(self, now_ms: int) -> tuple[int, int]:
        """How many ran since it was asked last, and for how long."""
        if not (ran := self.ran):
            return 0, 0
        took_ms, self.since_ms, self.ran = now_ms - self.since_ms, now_ms, 0
        return ran, took_ms


@dataclass(slots=True)
class Attempt:
    key: AttemptKey
    batch: Batch
    phase: Phase = Phase.RUNNING
    is_running_told: bool = False
    stopped_for: EndReason | None = None
    """It was told to stop, and why; it runs until it is seen dead."""
    outcome: Outcome | None = None


@dataclass(slots=True)
class Waiting:
    """Held and not started; the fences of its run lie together."""

    run: AttemptRun
    spec: JobSpec


def cut_off_allowance_ms(spec: JobSpec) -> int | None:
    """How long an attempt may run on after the end of its node's view; None is for ever."""
    match spec.on_lost:
        case OnLost.WAIT:
            return None
        case OnLost.RERUN:
            # Without a stated time nothing was promised: it runs on, and its fence keeps it harmless.
            return max(0, spec.lost_after_ms - PROMISE_MARGIN_MS) if spec.lost_after_ms else None
        case OnLost.FAIL:
            return max(0, (spec.lost_after_ms or 0) - PROMISE_MARGIN_MS)


class Attempts:
    def __init__(self) -> None:
        self.waiting: list[Waiting] = []
        """In fence order."""
        self.waiting_of: dict[JobId, int] = {}
        """How many of each job wait."""
        self.batches: dict[int, Batch] = {}
        """Those that something is left of, by the fence of their first."""
        self.over: list[Batch] = []
        """Those that nothing is left of, until they are looked at."""
        self.ended: dict[int, Attempt] = {}
        """In the order in which they ended."""
        self.returned: dict[int, AttemptRun] = {}
        """Never started, and others may have them as soon as the log says so; by first fence."""
        self._started: dict[int, Attempt] = {}
        """Running or stray."""
        self._strays = 0
        self._seen = Ranges()
        self._floor = 0

    def take_over(self) -> list[Batch]:
        over, self.over = self.over, []
        return over

    # --- what may be obeyed

    def obey(self, run: AttemptRun, spec: JobSpec) -> None:
        """Hold those that were not seen before and lie above the floor."""
        start, stop = max(run.fence, self._floor + 1), run.fence + run.count
        if start >= stop:
            return
        fresh = Ranges.of([(start, stop)])
        for low, high in self._seen.within(start, stop):
            fresh.remove(low, high)
        for low, high in fresh:
            self._wait(Waiting(run.part(low - run.fence, high - run.fence), spec))
        self._see(start, stop)

    def refuse(self, key: AttemptKey) -> None:
        """Never obey a notice of it from now on."""
        self._see(key.fence, key.fence + 1)

    def raise_floor(self, fence: int) -> None:
        """From now on nothing with a fence up to this one is obeyed; what is held stays."""
        if fence > self._floor:
            self._floor = fence
            self._seen.remove(0, fence + 1)

    def _see(self, start: int, stop: int) -> None:
        self._seen.add(start, stop)
        if self._seen.range_count > SEEN_RANGES_MAX:
            ranges = list(self._seen)
            self.raise_floor(ranges[SEEN_RANGES_MAX // 2][1] - 1)

    # --- what is held

    def get(self, key: AttemptKey) -> Attempt | None:
        """What was started and is not forgotten."""
        return self._started.get(key.fence) or self.ended.get(key.fence)

    def listing(self) -> tuple[AttemptKey, ...]:
        """What the node says it holds, by fence: also what has ended and is not answered yet, never a stray."""
        keys = [each.key for each in self._started.values() if each.phase is not Phase.STRAY]
        keys += [each.key for each in self.ended.values()]
        for run in [each.run for each in self.waiting] + list(self.returned.values()):
            keys += run.each()
        return tuple(sorted(keys, key=_fence))

    @property
    def is_empty(self) -> bool:
        return not (self._started or self.ended or self.waiting or self.returned)

    @property
    def has_strays(self) -> bool:
        return self._strays > 0

    def running(self) -> Iterator[Attempt]:
        return (each for each in self._started.values() if each.phase is Phase.RUNNING)

    # --- how they move

    def withdraw(self, key: AttemptKey) -> JobSpec | None:
        """If it waits: it does so no more, and never starts. Its spec then."""
        at = bisect_right(self.waiting, key.fence, key=_first_fence) - 1
        if at < 0:
            return None
        run, spec = self.waiting[at].run, self.waiting[at].spec
        place = key.fence - run.fence
        if place >= run.count:
            return None
        parts = [run.part(start, stop) for start, stop in ((0, place), (place + 1, run.count)) if start < stop]
        self.waiting[at : at + 1] = [Waiting(part, spec) for part in parts]
        self._count(run.job, -1)
        return spec

    def take_waiting(self, at: int) -> Waiting:
        """One run of those that wait: they do so no more."""
        taken = self.waiting.pop(at)
        self._count(taken.run.job, -taken.run.count)
        return taken

    def start(self, count: int, now_ms: int) -> Batch:
        """So many, from the first that waits on, of its job, or as many as there are."""
        first = self.waiting[0]
        batch = Batch(first.run.job, first.spec, first.run.fence, now_ms, now_ms)
        self.batches[batch.fence] = batch
        self.extend(batch, count)
        return batch

    def extend(self, batch: Batch, count: int) -> tuple[AttemptKey, ...]:
        """So many more of those that wait, while the first of them is of its job."""
        added: list[AttemptKey] = []
        while count and self.waiting and self.waiting[0].run.job == batch.job:
            run = self.waiting[0].run
            part = run if run.count <= count else run.part(0, count)
            if part is run:
                del self.waiting[0]
            else:
                self.waiting[0].run = run.part(count, run.count)
            count -= part.count
            self._count(batch.job, -part.count)
            for key in part.each():
                batch.left[key.fence] = self._started[key.fence] = Attempt(key, batch)
                added.append(key)
        return tuple(added)

    def take_back(self, attempts: Sequence[Attempt]) -> None:
        """They were handed on to be run, and did not begin: they wait as before."""
        for attempt in attempts:
            self._leave(attempt)
        specs = {attempt.key.job: attempt.batch.spec for attempt in attempts}
        for run in runs_of(attempt.key for attempt in attempts):
            self._wait(Waiting(run, specs[run.job]))

    def end(self, attempt: Attempt, outcome: Outcome) -> None:
        """A stray is forgotten."""
        was_stray = attempt.phase is Phase.STRAY
        self._leave(attempt)
        attempt.batch.ran += 1
        if not was_stray:
            attempt.phase = Phase.ENDED
            attempt.outcome = outcome
            self.ended[attempt.key.fence] = attempt

    def end_unstarted(self, key: AttemptKey, spec: JobSpec, outcome: Outcome) -> None:
        """It did not wait to be started, and does not have to be seen dead."""
        batch = Batch(key.job, spec, key.fence, 0, 0)
        self.ended[key.fence] = Attempt(key, batch, Phase.ENDED, outcome=outcome)

    def stray(self, attempt: Attempt) -> None:
        attempt.phase = Phase.STRAY
        self._strays += 1

    def give_back(self, job: JobId, keep: int) -> None:
        """Of what waits of the job only the oldest so many stay."""
        for at in range(len(self.waiting) - 1, -1, -1):
            surplus = self.waiting_of.get(job, 0) - keep
            if surplus <= 0:
                return
            run, spec = self.waiting[at].run, self.waiting[at].spec
            if run.job != job:
                continue
            self.take_waiting(at)
            if surplus < run.count:
                self._wait(Waiting(run.part(0, run.count - surplus), spec))
                run = run.part(run.count - surplus, run.count)
            self.returned[run.fence] = run

    def _wait(self, waiting: Waiting) -> None:
        insort(self.waiting, waiting, key=_first_fence)
        self._count(waiting.run.job, waiting.run.count)

    def _count(self, job: JobId, change: int) -> None:
        count = self.waiting_of.get(job, 0) + change
        if count:
            self.waiting_of[job] = count
        else:
            self.waiting_of.pop(job, None)

    def _leave(self, attempt: Attempt) -> None:
        fence, batch = attempt.key.fence, attempt.batch
        self._started.pop(fence, None)
        batch.left.pop(fence, None)
        if not batch.left:
            del self.batches[batch.fence]
            self.over.append(batch)
        if attempt.phase is Phase.STRAY:
            self._strays -= 1


def fit(amounts: Iterable[Resources], total: Resources) -> bool:
    """Do these amounts fit into the total, together?"""
    wanted: Counter[str] = Counter()
    for amount in amounts:
        wanted.update(amounts_of(amount))
    has = amounts_of(total)
    return all(amount <= has.get(name, 0) for name, amount in wanted.items())


def places(need: Resources, taken: Iterable[Resources], total: Resources) -> int:
    """How many more of this amount fit beside what is taken; a very large number of nothing."""
    used: Counter[str] = Counter()
    for amount in taken:
        used.update(amounts_of(amount))
    has = amounts_of(total)
    wanted = [(name, amount) for name, amount in amounts_of(need).items() if amount]
    return max(0, min(((has.get(name, 0) - used[name]) // amount for name, amount in wanted), default=PLACES_MAX))


def _first_fence(waiting: Waiting) -> int:
    return waiting.run.fence


def _fence(key: AttemptKey) -> int:
    return key.fence
