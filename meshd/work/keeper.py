"""The leader's side of sessions: who is granted a renewal, whose session is over, who must be told what.

Every server has a keeper, and it acts only while its server leads: then each event
carries the term, else None. A term begins clean: all live sessions count as granted
now, since the leader before may have granted until a moment ago, and every lease is
told again, since it may not have been. Grants are never in the log; they are promises
of 12 s that the leader keeps by not ending a session sooner, except when gossip and its
own connection agree that the node is dead.

Rules: protocol.md 4. Times are CLOCK_BOOTTIME milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, assert_never

from meshd import codec
from meshd.model import AttemptKey, AttemptRun, JobId, JobSpec, NodeId, runs_of
from meshd.raft.state.commands import AnyAnswer, EndSession, Event, Leased, SessionChanged, StopWanted
from meshd.work.session_messages import (
    NOTICE_LEASES_MAX,
    NOTICE_SPECS_BYTES_MAX,
    Granted,
    Notice,
    Refusal,
    Refused,
    Renew,
    RenewAnswer,
    digest_of,
)
from meshd.work.worker import Propose

GRANT_MS = 12_000
"""A session is ended so long after its last grant: the node's own view of 10 s ends before, on any sane clock."""

GONE_MS = 5_000
"""… and so long after it when gossip and the connection say that the node is dead."""

SWEEP_EVERY_MS = 500

NOTICE_AGAIN_MS = 1_000
"""Between a notice that did not arrive and the next try."""

DIFFERENT_MAX = 2
"""Digests in a row that differ before the list is asked for: one may differ because a notice or a report is on its way."""


class Leases(Protocol):
    """What the keeper reads of the replicated state; the Machine itself, as this server has applied it."""

    @property
    def fence(self) -> int: ...
    def sessions_live(self) -> Sequence[tuple[NodeId, int]]: ...
    def leases_of(self, node: NodeId, epoch: int) -> Sequence[AttemptKey]: ...
    def stops_of(self, node: NodeId, epoch: int) -> Sequence[AttemptKey]: ...
    def still_leased(self, node: NodeId, epoch: int, attempts: AttemptRun) -> Sequence[AttemptRun]: ...
    def spec_of(self, job: JobId) -> JobSpec | None: ...


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Applied:
    """What `Machine.take_events` gave after an apply, in order. `term`: as in `LeaderTick`."""

    events: Sequence[Event]
    term: int | None


@dataclass(frozen=True, slots=True)
class LeaderTick:
    """`term` is the term in which this server `leads(now)`, None when it does not. Also whenever that changes."""

    term: int | None


@dataclass(frozen=True, slots=True)
class RenewArrived:
    """A renewal reached this server; `call` names the caller's place in line. Answered at once by `AnswerRenew`."""

    call: int
    node: NodeId
    renew: Renew
    term: int | None


@dataclass(frozen=True, slots=True)
class NoticeEnded:
    """The one result of each `SendNotice`."""

    node: NodeId
    notice: Notice
    has_arrived: bool


@dataclass(frozen=True, slots=True)
class PeerGone:
    """Gossip calls the node dead and no connection to it is left, or (False) that is no longer so."""

    node: NodeId
    is_gone: bool


@dataclass(frozen=True, slots=True)
class EndProposed:
    """The one result of a proposed EndSession."""

    command: EndSession
    answer: AnyAnswer | None


KeeperEvent = Applied | LeaderTick | RenewArrived | NoticeEnded | PeerGone | EndProposed


# --- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AnswerRenew:
    call: int
    answer: RenewAnswer


@dataclass(frozen=True, slots=True)
class SendNotice:
    """To this node, with a bounded wait (2 s); report exactly one `NoticeEnded` with this very notice."""

    node: NodeId
    notice: Notice


KeeperEffect = AnswerRenew | SendNotice | Propose


@dataclass(slots=True)
class Session:
    epoch: int
    granted_ms: int
    differing: int = 0
    is_ending: bool = False
    """An EndSession was proposed: it may be committed at any time, so nothing is granted any more."""
    end_is_proposed: bool = False


@dataclass(slots=True)
class Outbox:
    """What one node must still be told, by fence. One notice is on its way at a time."""

    epoch: int
    leases: dict[int, AttemptRun] = field(default_factory=dict)
    stops: dict[int, AttemptKey] = field(default_factory=dict)
    on_its_way: Notice | None = None
    again_ms: int = 0


class Keeper:
    def __init__(self, state: Leases) -> None:
        self._state = state
        self._term: int | None = None
        self._sessions: dict[NodeId, Session] = {}
        self._outboxes: dict[NodeId, Outbox] = {}
        self._unposted: dict[NodeId, None] = {}
        """Whose outbox has nothing on its way. Few: in a large mesh that works, nearly all wait for their notice to arrive."""
        self._gone: set[NodeId] = set()
        self._sweep_ms = 0
        self._effects: list[KeeperEffect] = []

    def handle(self, event: KeeperEvent, now_ms: int) -> list[KeeperEffect]:
        """What to do now. Send `LeaderTick` at `next_timer_ms`, or any time later."""
        self._effects = []
        knows_term = True
        match event:
            case LeaderTick(term):
                self._lead(term, now_ms)
            case Applied(events, term):
                # A term that begins here starts from the state, which has these events in it already.
                if not self._lead(term, now_ms) and self._term is not None:
                    for each in events:
                        self._applied(each, now_ms)
            case RenewArrived(call, node, renew, term):
                self._lead(term, now_ms)
                self._effects.append(AnswerRenew(call, self._renew(node, renew, now_ms)))
            case NoticeEnded():
                knows_term = False
                self._notice_ended(event, now_ms)
            case PeerGone(node, is_gone):
                knows_term = False
                (self._gone.add if is_gone else self._gone.discard)(node)
            case EndProposed(command, answer):
                knows_term = False
                session = self._sessions.get(command.node)
                if answer is None and session is not None and session.epoch == command.epoch:
                    session.end_is_proposed = False
            case _:
                assert_never(event)
        if self._term is not None:
            # A leader that was paused wakes to such news of old, when it has long been replaced: it ends nothing by them.
            if knows_term and now_ms >= self._sweep_ms:
                self._sweep(now_ms)
            self._post(now_ms)
        return self._effects

    def next_timer_ms(self) -> int | None:
        return None if self._term is None else self._sweep_ms

    def granted_ms(self, node: NodeId) -> int | None:
        """When the node's live session was granted last, as this leader counts; None when it has none or does not lead."""
        session = self._sessions.get(node)
        return None if session is None else session.granted_ms

    # --- the term -----------------------------------------------------------------------------------------------------

    def _lead(self, term: int | None, now_ms: int) -> bool:
        """Begin or end a term; was there a change?"""
        if term == self._term:
            return False
        self._term = term
        self._sessions.clear()
        self._outboxes.clear()
        self._unposted.clear()
        if term is None:
            return True
        self._sweep_ms = now_ms + SWEEP_EVERY_MS
        for node, epoch in self._state.sessions_live():
            self._sessions[node] = Session(epoch, granted_ms=now_ms)
            box = self._outbox(node, epoch)
            box.leases = {run.fence: run for run in runs_of(self._state.leases_of(node, epoch))}
            box.stops = {key.fence: key for key in self._state.stops_of(node, epoch)}
        return True

    def _applied(self, event: Event, now_ms: int) -> None:
        match event:
            case SessionChanged(node, epoch, True):
                # The node counts its first view from a moment before this, the leader from here.
                self._sessions[node] = Session(epoch, granted_ms=now_ms)
            case SessionChanged(node, epoch, False):
                session = self._sessions.get(node)
                if session is not None and session.epoch == epoch:
                    del self._sessions[node]
                    self._outboxes.pop(node, None)
                    self._unposted.pop(node, None)
            case Leased(node, epoch, run):
                self._outbox(node, epoch).leases[run.fence] = run
            case StopWanted(node, epoch, key):
                self._outbox(node, epoch).stops[key.fence] = key
            case _:
                pass

    # --- renewals -----------------------------------------------------------------------------------------------------

    def _renew(self, node: NodeId, renew: Renew, now_ms: int) -> RenewAnswer:
        if self._term is None:
            return Refused(Refusal.NOT_LEADING)
        session = self._sessions.get(node)
        if session is None or session.epoch != renew.epoch or session.is_ending:
            return Refused(Refusal.OVER)
        session.granted_ms = now_ms
        if renew.digest == digest_of(self._state.leases_of(node, renew.epoch)):
            session.differing = 0
            return Granted()
        session.differing += 1
        if session.differing < DIFFERENT_MAX:
            return Granted()
        session.differing = 0
        return Granted(list_fence=self._state.fence)

    def _sweep(self, now_ms: int) -> None:
        self._sweep_ms = now_ms + SWEEP_EVERY_MS
        for node, session in self._sessions.items():
            silent_ms = now_ms - session.granted_ms
            if silent_ms >= (GONE_MS if node in self._gone else GRANT_MS):
                session.is_ending = True
            if session.is_ending and not session.end_is_proposed:
                session.end_is_proposed = True
                self._effects.append(Propose(EndSession(node, session.epoch)))

    # --- notices ------------------------------------------------------------------------------------------------------

    def _outbox(self, node: NodeId, epoch: int) -> Outbox:
        box = self._outboxes.get(node)
        if box is None or box.epoch != epoch:
            box = self._outboxes[node] = Outbox(epoch)
        if box.on_its_way is None:
            self._unposted[node] = None
        return box

    def _post(self, now_ms: int) -> None:
        for node in list(self._unposted):
            box = self._outboxes[node]
            if now_ms < box.again_ms:
                continue
            del self._unposted[node]
            notice = self._notice(node, box)
            if notice.leases or notice.stops:
                box.on_its_way = notice
                self._effects.append(SendNotice(node, notice))
            else:
                del self._outboxes[node]

    def _notice(self, node: NodeId, box: Outbox) -> Notice:
        """The oldest of what is still true, as much as fits."""
        told = [run for each in box.leases.values() for run in self._state.still_leased(node, box.epoch, each)]
        box.leases = {run.fence: run for run in told}
        if box.stops:
            wanted = {key.fence for key in self._state.stops_of(node, box.epoch)}
            box.stops = {fence: key for fence, key in box.stops.items() if fence in wanted}
        leases: list[AttemptRun] = []
        specs: dict[JobId, JobSpec] = {}
        size = 0
        for run in told[:NOTICE_LEASES_MAX]:
            spec = self._state.spec_of(run.job)
            if spec is None:
                del box.leases[run.fence]
                continue
            if run.job not in specs:
                size += len(codec.encode(spec))
                if specs and size > NOTICE_SPECS_BYTES_MAX:
                    break
                specs[run.job] = spec
            leases.append(run)
        stops = tuple(box.stops.values())[:NOTICE_LEASES_MAX]
        return Notice(box.epoch, tuple(leases), tuple(specs.items()), stops)

    def _notice_ended(self, event: NoticeEnded, now_ms: int) -> None:
        box = self._outboxes.get(event.node)
        if box is None or box.on_its_way is not event.notice:
            return
        box.on_its_way = None
        self._unposted[event.node] = None
        if not event.has_arrived:
            box.again_ms = now_ms + NOTICE_AGAIN_MS
            return
        for run in event.notice.leases:
            box.leases.pop(run.fence, None)
        for key in event.notice.stops:
            box.stops.pop(key.fence, None)
