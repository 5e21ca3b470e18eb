"""The attempts that a node holds: what may be obeyed, what may start, when each must stop by itself.

        notice           start              end               Report answered
      ──────────▶ HELD ─────────▶ RUNNING ─────────▶ ENDED ──────────────────▶ forgotten
                   │                 │ not its own any more
                   └▶ forgotten      └───────────▶ STRAY ───── seen dead ────▶ forgotten

An attempt is held from its notice until the Report of its end is answered; a stray is
not held (it is never listed), but as long as it lives nothing else starts. What was
seen once is remembered over all sessions of this process: an adopted attempt is leased
again under a new epoch, and a late notice of it must not start it a second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from meshd.model import AttemptKey, EndReason, JobSpec, OnLost, Outcome, Resources
from meshd.placement import amounts_of

SEEN_MAX = 100_000
"""Remembered fences. Past it the older half is forgotten and refused as a range instead, which is as safe."""

PROMISE_MARGIN_MS = 30_000
"""So long before the mesh may start a successor, a promised attempt is stopped (protocol.md 5): room for 12 s - 5 s
between the ends of view and session, for TERM and KILL, and for a machine that was frozen for a moment."""


class Phase(Enum):
    HELD = "held"
    RUNNING = "running"
    ENDED = "ended"
    STRAY = "stray"


@dataclass(slots=True)
class Attempt:
    key: AttemptKey
    spec: JobSpec
    phase: Phase = Phase.HELD
    started_ms: int = 0
    is_running_told: bool = False
    stopped_for: EndReason | None = None
    """It was told to stop, and why; it runs until it is seen dead."""
    outcome: Outcome | None = None


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
        self._held: dict[int, Attempt] = {}
        self._seen: set[int] = set()
        self._floor = 0

    def obey(self, key: AttemptKey, spec: JobSpec) -> bool:
        """Hold it, unless it was seen before or lies at or below the floor."""
        if key.fence <= self._floor or key.fence in self._seen:
            return False
        self.refuse(key)
        self._held[key.fence] = Attempt(key, spec)
        return True

    def refuse(self, key: AttemptKey) -> None:
        """Never obey a notice of it from now on."""
        self._seen.add(key.fence)
        if len(self._seen) > SEEN_MAX:
            fences = sorted(self._seen)
            self.raise_floor(fences[SEEN_MAX // 2])

    def raise_floor(self, fence: int) -> None:
        """From now on nothing with a fence up to this one is obeyed; what is held stays."""
        if fence > self._floor:
            self._floor = fence
            self._seen = {seen for seen in self._seen if seen > fence}

    def get(self, key: AttemptKey) -> Attempt | None:
        return self._held.get(key.fence)

    def forget(self, key: AttemptKey) -> None:
        self._held.pop(key.fence, None)

    def take_back(self, key: AttemptKey) -> None:
        """It was handed on to be run, and did not begin: it is held as before, unless it was to be stopped meanwhile."""
        attempt = self._held.get(key.fence)
        if attempt is None or attempt.phase is not Phase.RUNNING:
            self.forget(key)  # a stray that never lived
        elif attempt.stopped_for is None:
            attempt.phase = Phase.HELD
        else:
            attempt.phase = Phase.ENDED
            attempt.outcome = Outcome(attempt.stopped_for, message="stopped before it started")

    def listing(self) -> tuple[AttemptKey, ...]:
        """What the node says it holds: also what has ended and is not answered yet, never a stray."""
        return tuple(each.key for each in self.all() if each.phase is not Phase.STRAY)

    def all(self) -> list[Attempt]:
        """In fence order."""
        return [self._held[fence] for fence in sorted(self._held)]

    def in_phase(self, phase: Phase) -> list[Attempt]:
        """In fence order."""
        return [each for each in self.all() if each.phase is phase]

    @property
    def has_strays(self) -> bool:
        return any(each.phase is Phase.STRAY for each in self._held.values())

    def startable(self, total: Resources) -> list[Attempt]:
        """What fits beside what runs. Strictly in fence order, so that nothing small keeps something large waiting."""
        if self.has_strays:
            return []
        used = [each.spec.needs.resources for each in self._held.values() if each.phase is Phase.RUNNING]
        starting = []
        for each in self.in_phase(Phase.HELD):
            used.append(each.spec.needs.resources)
            if not fit(used, total):
                break
            starting.append(each)
        return starting


def fit(amounts: Iterable[Resources], total: Resources) -> bool:
    """Do these amounts fit into the total, together?"""
    wanted: Counter[str] = Counter()
    for amount in amounts:
        wanted.update(amounts_of(amount))
    has = amounts_of(total)
    return all(amount <= has.get(name, 0) for name, amount in wanted.items())
