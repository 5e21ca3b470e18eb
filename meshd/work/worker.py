"""A node's own side of its session: when it may act for the mesh, what it holds, what it reports.

                       answer within 10 s of the first sending
    CLOSED ──▶ OPENING ────────────────────────────────────────▶ OPEN
                ▲   │ no answer in time: the next epoch            │ view ended · session over · rejected
                └───┴──────────────────────────────────────────────┘

The view is the node's proof that its session still lives: 10 s from the *sending* of
the last renewal that was granted. Whatever happened while this process slept, an ended
view is noticed before the next event is looked at, and it never revives: the next epoch
is opened with the list of all that is held, and the answer says what is still its own.
Notices are obeyed and attempts started only in a live view, once per attempt, and not
before everything that is no longer its own has been seen dead.

One command of a session is unanswered at a time. No answer, and "not committed", are
the same here: it is sent again unchanged, and its epoch and seq make that harmless.

Rules: protocol.md 4 and 5. Times are CLOCK_BOOTTIME milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from meshd import codec
from meshd.errors import InvalidRequest
from meshd.model import AttemptKey, AttemptRun, EndReason, JobId, JobSpec, Offer, Outcome, Resources, runs_of
from meshd.raft.state.commands import (
    AHEAD_JOBS_MAX,
    AnyAnswer,
    AnyCommand,
    Claim,
    Ended,
    OpenSession,
    Reason,
    Reconcile,
    Reconciled,
    Rejected,
    Report,
    Reported,
    SessionOpened,
)
from meshd.raft.state.jobs import bounded
from meshd.work.attempts import Attempt, Attempts, Batch, Phase, cut_off_allowance_ms, fit, places
from meshd.work.pace import AHEAD_MAX, Pace, may_batch
from meshd.work.session_messages import Granted, Notice, Refusal, Refused, Renew, RenewAnswer, digest_of

VIEW_MS = 10_000
"""A session's view, from the sending of what was granted. The leader ends a session 12 s after its last grant."""

RENEW_EVERY_MS = 2_000

RESEND_AFTER_MS = 250
"""Between an unanswered command and its next copy: an election takes about a second."""

REFUSED_AGAIN_MS = 2_000
"""… and after an open that was refused for what this node is (not a member yet, or not any more)."""

RUNNING_AFTER_MS = 500
"""An attempt that ends within this is reported once, as ended; most are, and it halves their log entries."""

REPORT_EVERY_MS = 20
"""Between two reports, while there is work to go on with: a commit costs the same for one end and for hundreds."""

REPORT_ENDED_MAX = 500
REPORT_DONE_MAX = 4_000
"""Ends with nothing to tell: a few runs, when they ended in order, and 40 bytes each when they did not."""
REPORT_BYTES_MAX = 256 << 10
"""Of outcomes in one report: half of the largest command."""

SLOTS_MAX = 4096
"""More attempts at a time than this are not claimed: the list of them must fit one command."""

EARLY_NOTICES_MAX = 64
"""Notices kept while the session is opening. One that is dropped comes back as a new lease, after a Reconcile."""

EPOCH_STEP_MAX = 1 << 20
"""Steps between refused epochs double up to this, so that a restored, old counter is soon ahead again."""


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offering:
    """How many attempts this node wants to hold in all, and what it can run. The first one opens the session; slots 0 drain."""

    slots: int
    offer: Offer
    room: Resources | None = None
    """What may really run at a time, when that is less than the offer: the rest is claimed ahead. None is the offer's."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """The one result of each `Open` and `Propose`: the same command, and its answer; None is "not committed" or "unknown"."""

    command: AnyCommand
    answer: AnyAnswer | None


@dataclass(frozen=True, slots=True)
class RenewAnswered:
    """What came back for a `SendRenew`; nothing needs to be said of a lost one."""

    epoch: int
    sent_ms: int
    answer: RenewAnswer


@dataclass(frozen=True, slots=True)
class NoticeArrived:
    """From a server of this mesh, by an authenticated stream."""

    notice: Notice


@dataclass(frozen=True, slots=True)
class AttemptsEnded:
    """They run no more, nothing of them is left, and what the outcomes name is durable on enough nodes (protocol.md 6)."""

    ended: tuple[tuple[AttemptKey, Outcome], ...]


@dataclass(frozen=True, slots=True)
class Recalled:
    """The one result of each `Recall`: those of its attempts that had not begun, and now never will by their `Start`."""

    keys: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class HandOver:
    """The drain's deadline: stop what runs as lost and give back what was not started."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """This node has followed its mesh to a new recovery epoch: its session was in the log that is lost."""


WorkerEvent = Offering | Proposed | RenewAnswered | NoticeArrived | AttemptsEnded | Recalled | HandOver | Recovered


# --- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Open:
    """Save the epoch, synced, and only then propose the command. Sent again for the same command after a failure."""

    epoch: int
    command: OpenSession


@dataclass(frozen=True, slots=True)
class Propose:
    """Propose as this node; bound the time (5 s), and report exactly one `Proposed` with this very command."""

    command: AnyCommand


@dataclass(frozen=True, slots=True)
class SendRenew:
    """To the leader, through any voter."""

    epoch: int
    sent_ms: int
    renew: Renew


@dataclass(frozen=True, slots=True)
class Start:
    """Attempts of one job, one after the other in the room of one: fetch, run, make durable.

    They come after what is left of what `lane` was started with before. Each is told of once, by an `AttemptsEnded` or a `Recalled`: soon after it ended, alone or together with others,
    before or after its neighbours. `leash_ms`: all must be dead soon after, None is never.
    """

    lane: int
    keys: tuple[AttemptKey, ...]
    spec: JobSpec
    leash_ms: int | None


@dataclass(frozen=True, slots=True)
class Recall:
    """Give back which of these has not begun, at once: what runs before it takes long, and others have room for it."""

    keys: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """End it; its `AttemptsEnded` carries this reason, unless it ended by itself before. It may never have run yet."""

    key: AttemptKey
    reason: EndReason


@dataclass(frozen=True, slots=True)
class MoveLeash:
    """A new deadline for whatever really holds the attempt; only for attempts that were started with one."""

    key: AttemptKey
    leash_ms: int


WorkerEffect = Open | Propose | SendRenew | Start | Recall | Stop | MoveLeash


class State(Enum):
    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"


class Worker:
    def __init__(self, *, epoch: int, boot: str = "") -> None:
        """`epoch` is the last one saved on this disk, 0 on a new one; `boot` names the start of this machine's kernel.

        Whatever an older process of this boot had started must be dead: what is not listed here is said not to run.
        """
        self.epoch = epoch
        self._boot = boot
        self.state = State.CLOSED
        self.attempts = Attempts()
        self.view_end_ms = 0
        """End of the last view it had; in OPENING that is in the past, and says since when it is cut off."""
        self._slots = 0
        self._is_leaving = False
        self._offer = Offer()
        self._room = Resources()
        self._told: tuple[int, Offer] | None = None
        self._opening: OpenSession | None = None
        self._opened_ms = 0
        self._epoch_step = 1
        self._seq = 0
        self._pending: Claim | Report | None = None
        self._reconcile: Reconcile | None = None
        self._resend_ms: int | None = None
        self._renew_ms = 0
        self._early: list[Notice] = []
        self._paces: dict[JobId, Pace] = {}
        """Of the arrays worked on last, oldest first."""
        self._reported_ms = 0
        self._effects: list[WorkerEffect] = []

    def handle(self, event: WorkerEvent | None, now_ms: int) -> list[WorkerEffect]:
        """What to do now. None is the tick: call it at `next_timer_ms`, or any time later."""
        self._effects = []
        self._expire(now_ms)
        match event:
            case None:
                pass
            case Offering(slots, offer, room):
                self._slots, self._offer = min(slots, SLOTS_MAX), offer
                self._room = offer.resources if room is None else room
                self._is_leaving = self._is_leaving and not self._slots
                if self.state is State.CLOSED:
                    self._open_next(now_ms)
            case Proposed(command, answer):
                self._answered(command, answer, now_ms)
            case RenewAnswered():
                self._renewed(event, now_ms)
            case NoticeArrived(notice):
                self._noticed(notice)
            case AttemptsEnded(ended):
                self._ended(ended, now_ms)
            case Recalled(keys):
                self._recalled(keys)
            case HandOver():
                self._hand_over()
            case Recovered():
                if self.state is not State.CLOSED:
                    self._open_next(now_ms)
            case _:
                assert_never(event)
        self._proceed(now_ms)
        return self._effects

    def next_timer_ms(self) -> int | None:
        if self.state is State.CLOSED:
            return None
        times = [self._opened_ms + VIEW_MS] if self.state is State.OPENING else [self.view_end_ms, self._renew_ms]
        if self._resend_ms is not None:
            times.append(self._resend_ms)
        for batch in self.attempts.batches.values():
            times += self._batch_times(batch)
        if self.state is State.OPEN and self._pending is None and self.attempts.ended:
            times.append(self._reported_ms + REPORT_EVERY_MS)
        return min(times)

    def _batch_times(self, batch: Batch) -> Iterator[int]:
        deadline = self._leash_ms(batch.spec)
        if self.state is State.OPENING:
            if deadline is not None and any(map(_is_left_alone, batch.left.values())):
                yield deadline
            return
        if self._pending is None and _is_news(batch.front):
            yield batch.front_ms + RUNNING_AFTER_MS
        if (pace := self._paces.get(batch.job)) is not None and not self.attempts.has_strays:
            yield _slow_at_ms(batch, pace)

    # --- the session --------------------------------------------------------------------------------------------------

    def _expire(self, now_ms: int) -> None:
        """What has run out by now. Comes before any event, so that waking late is the same as having waited awake."""
        if self.state is State.OPEN and now_ms >= self.view_end_ms:
            self._open_next(now_ms)
        elif self.state is State.OPENING and now_ms >= self._opened_ms + VIEW_MS:
            # A later answer would open a session whose view is over before it began.
            self._open_next(now_ms)
        for batch in self.attempts.batches.values():
            deadline = self._leash_ms(batch.spec)
            if deadline is not None and now_ms >= deadline:
                for attempt in batch.left.values():
                    self._stop(attempt, EndReason.LOST)

    def _open_next(self, now_ms: int) -> None:
        self.epoch += self._epoch_step
        self.state = State.OPENING
        self._seq = 0
        self._pending = self._reconcile = self._resend_ms = self._told = None
        self._early.clear()
        for attempt in self.attempts.running():
            attempt.is_running_told = False  # the report may have been lost with the session; the state may forget it
        for pace in self._paces.values():
            pace.told = 0
        # From here on nothing of the older epoch is obeyed; only then is the list made.
        self._opening = OpenSession(self.epoch, self.attempts.listing(), self._slots, self._offer, self._boot)
        self._opened_ms = now_ms
        self._effects.append(Open(self.epoch, self._opening))

    def _answered(self, command: AnyCommand, answer: AnyAnswer | None, now_ms: int) -> None:
        if command is self._reconcile:
            self._reconcile = None
            if isinstance(answer, Reconciled):
                self._drop(answer.stop)
        elif command is not self._opening and command is not self._pending:
            return  # of an epoch that is over
        elif answer is None:
            self._resend_ms = now_ms + RESEND_AFTER_MS
        elif command is self._opening:
            self._opened(answer, now_ms)
        elif isinstance(answer, Rejected):
            # Not only another epoch: with one command unanswered at a time, a gap says that the log has lost one.
            self._open_next(now_ms)
        else:
            if isinstance(command, Report):
                self._forget(command)
            self._pending = None
            if isinstance(answer, Reported):
                self._drop(answer.stale)
                for run in answer.stale_runs:
                    self._drop(run.each())

    def _opened(self, answer: AnyAnswer, now_ms: int) -> None:
        assert self._opening is not None
        if not isinstance(answer, SessionOpened):
            if isinstance(answer, Rejected) and answer.reason is Reason.WRONG_EPOCH:
                self._epoch_step = min(2 * self._epoch_step, EPOCH_STEP_MAX)
                self._open_next(now_ms)
            else:
                self._resend_ms = now_ms + REFUSED_AGAIN_MS
            return
        self.state = State.OPEN
        self._epoch_step = 1
        self._told = (self._opening.slots, self._opening.offer)
        self._opening = None
        self._renew_ms = self._opened_ms + RENEW_EVERY_MS
        leased = {key.fence for key in answer.leased}
        self._drop(tuple(key for key in self.attempts.listing() if key.fence not in leased))
        self._move_view(self._opened_ms + VIEW_MS)

    def _renewed(self, event: RenewAnswered, now_ms: int) -> None:
        if self.state is not State.OPEN or event.epoch != self.epoch:
            return
        match event.answer:
            case Granted(list_fence):
                self._move_view(event.sent_ms + VIEW_MS)
                if list_fence is not None and self._reconcile is None:
                    self._list(list_fence)
            case Refused(Refusal.OVER):
                self._open_next(now_ms)
            case Refused(Refusal.NOT_LEADING):
                pass

    def _move_view(self, end_ms: int) -> None:
        if end_ms <= self.view_end_ms:
            return
        self.view_end_ms = end_ms
        for batch in self.attempts.batches.values():
            deadline = self._leash_ms(batch.spec)
            if deadline is not None:
                moved = [each.key for each in batch.left.values() if _is_left_alone(each)]
                self._effects += [MoveLeash(key, deadline) for key in moved]

    def _list(self, fence: int) -> None:
        """Say what is held as of that fence, and take no lease up to it any more: the list may free those."""
        self.attempts.raise_floor(fence)
        self._reconcile = Reconcile(self.epoch, fence, self.attempts.listing())
        self._effects.append(Propose(self._reconcile))

    # --- attempts -----------------------------------------------------------------------------------------------------

    def _noticed(self, notice: Notice) -> None:
        if notice.epoch != self.epoch or self.state is State.CLOSED:
            # Closed, the epoch is that of the process before this one: what was leased to it may have been started.
            return
        if self.state is State.OPENING or self.attempts.has_strays:
            # Often ahead of the answer to the open, by another way.
            if len(self._early) < EARLY_NOTICES_MAX:
                self._early.append(notice)
            return
        specs = dict(notice.specs)
        for run in notice.leases:
            if run.job in specs:
                self.attempts.obey(run, specs[run.job])
        for key in notice.stops:
            self._cancel(key)

    def _cancel(self, key: AttemptKey) -> None:
        attempts = self.attempts
        if (spec := attempts.withdraw(key)) is not None:
            attempts.end_unstarted(key, spec, _unstarted(EndReason.CANCELLED))
        elif (attempt := attempts.get(key)) is not None:
            self._stop(attempt, EndReason.CANCELLED)
        else:
            # Its lease notice was lost, or comes later: nobody wants it any more. Reconcile will free it.
            attempts.refuse(key)

    def _stop(self, attempt: Attempt, reason: EndReason) -> None:
        """End it, with this outcome unless it has ended otherwise before."""
        if _is_left_alone(attempt):
            attempt.stopped_for = reason
            self._effects.append(Stop(attempt.key, reason))

    def _drop(self, keys: Iterable[AttemptKey]) -> None:
        """These are not its own any more: nobody waits for their outcome, but what runs must be seen dead."""
        for key in keys:
            if self.attempts.withdraw(key) is not None:
                continue
            attempt = self.attempts.get(key)
            if attempt is None or attempt.phase is Phase.STRAY:
                continue
            if attempt.phase is Phase.RUNNING:
                if attempt.stopped_for is None:
                    self._effects.append(Stop(key, EndReason.LOST))
                self.attempts.stray(attempt)
            else:
                del self.attempts.ended[key.fence]

    def _ended(self, ended: Iterable[tuple[AttemptKey, Outcome]], now_ms: int) -> None:
        for key, outcome in ended:
            attempt = self.attempts.get(key)
            if attempt is not None and attempt.phase is not Phase.ENDED:
                attempt.batch.front_ms = now_ms
                attempt.batch.is_slow = False
                self.attempts.end(attempt, outcome if outcome.is_bare else _checked(attempt.batch.spec, outcome))

    def _recalled(self, keys: tuple[AttemptKey, ...]) -> None:
        again: list[Attempt] = []
        for key in keys:
            attempt = self.attempts.get(key)
            if attempt is None or attempt.phase is Phase.ENDED:
                continue
            if attempt.phase is Phase.RUNNING and attempt.stopped_for is None:
                again.append(attempt)
            else:
                self.attempts.end(attempt, _unstarted(attempt.stopped_for or EndReason.LOST))
        self.attempts.take_back(again)

    def _hand_over(self) -> None:
        """What waits behind what runs is asked for; it is given back when it has come, as is what comes anew (`_proceed`)."""
        self._is_leaving = True
        for batch in self.attempts.batches.values():
            if behind := tuple(each.key for each in batch.left.values())[1:]:
                self._effects.append(Recall(behind))

    def _leash_ms(self, spec: JobSpec) -> int | None:
        allowance = cut_off_allowance_ms(spec)
        return None if allowance is None else self.view_end_ms + allowance

    def _forget(self, report: Report) -> None:
        """The log has it."""
        for ended in report.ended:
            self.attempts.ended.pop(ended.key.fence, None)
        for run in report.done:
            for fence in range(run.fence, run.fence + run.count):
                self.attempts.ended.pop(fence, None)
        for run in report.returned:
            self.attempts.returned.pop(run.fence, None)

    # --- what follows -------------------------------------------------------------------------------------------------

    def _proceed(self, now_ms: int) -> None:
        if self.state is State.OPEN and not self.attempts.has_strays:
            early, self._early = self._early, []
            for notice in early:
                self._noticed(notice)
        if self._is_leaving:
            self._leave()
        for batch in self.attempts.take_over():
            if (pace := self._paces.get(batch.job)) is not None:
                pace.learn(*batch.lap(now_ms))
        if self._resend_ms is not None and now_ms >= self._resend_ms:
            self._resend_ms = None
            if self._opening is not None:
                self._effects.append(Open(self.epoch, self._opening))
            elif self._pending is not None:
                self._effects.append(Propose(self._pending))
        if self.state is not State.OPEN:
            return
        if not self.attempts.has_strays:
            self._look_for_slow(now_ms)
            self._start(now_ms)
        if self._pending is None:
            self._next_command(now_ms)
        if now_ms >= self._renew_ms:
            self._renew_ms = now_ms + RENEW_EVERY_MS
            renew = Renew(self.epoch, digest_of(self.attempts.listing()))
            self._effects.append(SendRenew(self.epoch, now_ms, renew))

    def _leave(self) -> None:
        """What runs is stopped, whatever comes to be in front of its lane too; what waits is given back, uncounted."""
        for batch in self.attempts.batches.values():
            self._stop(batch.front, EndReason.LOST)
        for job in list(self.attempts.waiting_of):
            self.attempts.give_back(job, keep=0)

    def _start(self, now_ms: int) -> None:
        """Strictly in fence order, so that nothing small keeps something large waiting."""
        attempts = self.attempts
        while attempts.waiting and not attempts.has_strays:
            first = attempts.waiting[0]
            need = first.spec.needs.resources
            if not fit([need], self._room):
                for key in attempts.take_waiting(0).run.each():
                    message = "this node no longer offers what the job needs"
                    attempts.end_unstarted(key, first.spec, Outcome(EndReason.BACKEND, message=message))
                continue
            free = places(need, self._taken(), self._room)
            if not free:
                self._add_behind(first.run.job, now_ms)
                return
            size = 1
            if (pace := self._pace(first.run.job, first.spec)) is not None:
                # What is left of an array is shared by all places.
                size = max(1, min(pace.size, -(-attempts.waiting_of[first.run.job] // free)))
            batch = attempts.start(size, now_ms)
            keys = tuple(each.key for each in batch.left.values())
            self._effects.append(Start(batch.fence, keys, batch.spec, self._leash_ms(batch.spec)))

    def _add_behind(self, job: JobId, now_ms: int) -> None:
        """There is no room for the first that waits: let it wait where tasks of its job are about to end."""
        if (pace := self._paces.get(job)) is None or not self._slots:
            return
        batches = [batch for batch in self.attempts.batches.values() if batch.job == job and not batch.is_slow]
        for batch in sorted(batches, key=lambda batch: len(batch.left)):
            waiting = self.attempts.waiting_of.get(job, 0)
            if waiting < len(batches):
                return  # the place that is free first is to have them
            size = min(pace.next_in_place(len(batch.left)), -(-waiting // len(batches)))
            if size and (keys := self.attempts.extend(batch, size)):
                pace.learn(*batch.lap(now_ms))
                self._effects.append(Start(batch.fence, keys, batch.spec, self._leash_ms(batch.spec)))

    def _taken(self) -> list[Resources]:
        """What runs has the room of one each. Strays have none of their own: while one lives, nothing starts."""
        batches = self.attempts.batches.values()
        return [batch.spec.needs.resources for batch in batches if batch.front.phase is not Phase.STRAY]

    def _pace(self, job: JobId, spec: JobSpec) -> Pace | None:
        if not may_batch(spec):
            return None
        pace = self._paces.pop(job, None) or Pace(spec.needs.resources)
        self._paces[job] = pace
        while len(self._paces) > AHEAD_JOBS_MAX:
            del self._paces[next(iter(self._paces))]
        return pace

    def _look_for_slow(self, now_ms: int) -> None:
        """What waits behind a task that takes long is given to other places here, then to other nodes."""
        for batch in self.attempts.batches.values():
            runs_ms = now_ms - batch.front_ms
            pace = self._paces.get(batch.job)
            if pace is None or now_ms < _slow_at_ms(batch, pace):
                continue
            pace.size = 1
            batch.slow_again_ms = now_ms + runs_ms
            if not batch.is_slow and len(batch.left) > 1:
                self._effects.append(Recall(tuple(each.key for each in batch.left.values())[1:]))
            batch.is_slow = True

    def _next_command(self, now_ms: int) -> None:
        if self._told != (self._slots, self._offer):
            self._told = (self._slots, self._offer)
            self._send(Claim(self.epoch, self._seq + 1, self._slots, self._offer))
            return
        ahead = self._ahead(now_ms)
        running = [
            batch.front
            for batch in self.attempts.batches.values()
            if now_ms >= batch.front_ms + RUNNING_AFTER_MS and _is_news(batch.front)
        ]
        returned = tuple(self.attempts.returned.values())
        is_urgent = running or returned or ahead is not None or not self.attempts.waiting
        if not is_urgent and now_ms < self._reported_ms + REPORT_EVERY_MS:
            return
        ended, done = self._report_ended()
        if ended or done or running or returned or ahead is not None:
            for attempt in running:
                attempt.is_running_told = True
            keys = tuple(each.key for each in running)
            self._reported_ms = now_ms
            self._send(Report(self.epoch, self._seq + 1, ended, keys, done, returned, ahead))

    def _ahead(self, now_ms: int) -> tuple[tuple[JobId, int], ...] | None:
        """What to hold ahead of each job, if that is not what was told last. What is too much now is given back."""
        has_changed = False
        taken = self._taken()
        left = AHEAD_MAX
        for job, pace in reversed(self._paces.items()):
            runs_ms = [now_ms - batch.front_ms for batch in self.attempts.batches.values() if batch.job == job]
            free = places(pace.need, taken, self._room)
            all_places = len(runs_ms) + free
            stuck_ms = 0 if free else min(runs_ms, default=0)
            wanted = min(pace.ahead(all_places, stuck_ms), left) if self._slots else 0
            left -= wanted
            most = max(wanted, pace.most_waiting(all_places, stuck_ms)) if self._slots else 0
            if self.attempts.waiting_of.get(job, 0) > most + self._slots:
                self.attempts.give_back(job, wanted + self._slots)
            has_changed = has_changed or wanted != pace.told
            pace.told = wanted
        return tuple((job, pace.told) for job, pace in self._paces.items() if pace.told) if has_changed else None

    def _report_ended(self) -> tuple[tuple[Ended, ...], tuple[AttemptRun, ...]]:
        """The oldest ends that fit one command: those with something to tell, and the others as runs."""
        chosen: list[Ended] = []
        bare: list[AttemptKey] = []
        size = 0
        for attempt in self.attempts.ended.values():
            outcome = attempt.outcome
            assert outcome is not None
            if outcome.is_bare:
                bare.append(attempt.key)
            else:
                size += len(codec.encode(outcome))
                if chosen and size > REPORT_BYTES_MAX:
                    break
                chosen.append(Ended(attempt.key, outcome))
            if len(chosen) >= REPORT_ENDED_MAX or len(bare) >= REPORT_DONE_MAX:
                break
        return tuple(chosen), runs_of(bare)

    def _send(self, command: Claim | Report) -> None:
        self._seq = command.seq
        self._pending = command
        self._effects.append(Propose(command))


def _is_left_alone(attempt: Attempt) -> bool:
    """It runs, and nobody has told it to stop."""
    return attempt.phase is Phase.RUNNING and attempt.stopped_for is None


def _slow_at_ms(batch: Batch, pace: Pace) -> int:
    """When to look whether what is in front takes too long; what is known of the job's pace changes."""
    return batch.slow_again_ms if batch.is_slow else batch.front_ms + pace.slow_after_ms


def _is_news(attempt: Attempt) -> bool:
    return attempt.phase is Phase.RUNNING and not attempt.is_running_told


def _unstarted(reason: EndReason) -> Outcome:
    return Outcome(reason, message="stopped before it started")


def _checked(spec: JobSpec, outcome: Outcome) -> Outcome:
    """The outcome as the log will take it. A backend's mistake must not become a report that is refused for ever."""
    try:
        return bounded(spec, codec.decode(codec.encode(outcome), Outcome, bytes_max=REPORT_BYTES_MAX))
    except InvalidRequest as error:
        return Outcome(EndReason.BACKEND, message=f"the backend's outcome breaks a limit: {error.message}"[:2048])
