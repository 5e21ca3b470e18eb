"""A voter's own copy of the queue, open to questions: read barrier, long polls, recent events, calls from other nodes.

Every node that holds no replica asks one that does, by RPC: `log.propose`, `log.read`,
`log.wait`, `log.events`, `log.status`. The voter stamps who proposed (protocol.md 1),
so a body that claims another origin has nowhere to say so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import trio
from msgspec import Raw, Struct

from meshd import codec
from meshd.errors import Busy, Unavailable
from meshd.model import Count, JobId, NodeId
from meshd.ports import Committed, NotCommitted, ProposeResult, Rpc, Unknown
from meshd.raft.log import ServerLog
from meshd.raft.state.commands import (
    AnyCommand,
    Event,
    JobChanged,
    Leased,
    MembersChanged,
    Restored,
    SessionChanged,
    StopWanted,
)
from meshd.raft.state.machine import Machine
from meshd.views import AnyQuery, EventView, GetJob, JobView

EVENTS_KEPT = 10_000
"""Recent events that a reader who was away may still ask for."""
EVENTS_PER_ANSWER = 500
WAITERS_MAX = 10_000
"""Long polls standing at one voter."""
HISTORY_S = 5.0
"""A finished job is looked for in the history within this time."""
POLL_S_MAX = 30.0
"""The longest that one long poll stands; the asker polls again."""


class ProposeCall(Struct, frozen=True, array_like=True):
    command: Raw
    timeout_ms: Count


class ProposeReply(Struct, frozen=True, array_like=True):
    """`answer` None: not committed, or unknown when `is_unknown`."""

    answer: bytes | None
    position: int
    is_unknown: bool
    why: str
    code: str = ""
    hint: str = ""


class ReadCall(Struct, frozen=True, array_like=True):
    query: Raw
    timeout_ms: Count
    is_stale_ok: bool


class WaitCall(Struct, frozen=True, array_like=True):
    job: JobId
    after_version: int
    timeout_ms: Count


class EventsCall(Struct, frozen=True, array_like=True):
    """After this position; None is from now on."""

    after: int | None
    timeout_ms: Count


class EventsReply(Struct, frozen=True, array_like=True):
    events: tuple[EventView, ...]
    position: int
    """Ask on from here."""


class EventSink(Protocol):
    def __call__(self, events: Sequence[Event]) -> None: ...


class FinishedJobs(Protocol):
    """The core and the history, asked as one."""

    async def answer(self, query: AnyQuery, *, timeout_s: float, is_stale_ok: bool = False) -> Any:
        """As of the moment of the call. Raises the query's error, or Unavailable."""
        ...


class Replica:
    """`history` answers for jobs that the core has no more. `on_events` hears, in order, what was applied here; called from the loop, must not wait."""

    def __init__(
        self, log: ServerLog, machine: Machine, on_events: EventSink, history: FinishedJobs | None = None
    ) -> None:
        self.log = log
        self.machine = machine
        self._history = history
        self._on_events = on_events
        self._recent: deque[EventView] = deque(maxlen=EVENTS_KEPT)
        self._news = trio.Event()
        self._job_waits: dict[JobId, trio.Event] = {}
        self._waiting = 0

    def register(self, rpc: Rpc) -> None:
        rpc.register("log.propose", self._on_propose)
        rpc.register("log.read", self._on_read)
        rpc.register("log.wait", self._on_wait)
        rpc.register("log.events", self._on_events_call)
        rpc.register("log.status", self._on_status)
        rpc.register("log.newest", self._on_newest)

    def applied(self, position: int) -> None:
        """The log applied up to `position`: wake who waits for what it changed."""
        events = self.machine.take_events()
        if not events:
            return
        for ordinal, event in enumerate(events):
            if isinstance(event, JobChanged) and event.job in self._job_waits:
                self._job_waits.pop(event.job).set()
            elif isinstance(event, Restored):
                waits, self._job_waits = self._job_waits, {}
                for wait in waits.values():
                    wait.set()
            if (view := self._view(event, (position << 16) | min(ordinal, 0xFFFF))) is not None:
                self._recent.append(view)
        self._news.set()
        self._news = trio.Event()
        self._on_events(events)

    # --- asked here ---------------------------------------------------------------------------------------------------

    async def propose(self, origin: NodeId, command: bytes, *, timeout_s: float) -> ProposeResult:
        return await self.log.propose(origin, command, timeout_s=timeout_s)

    async def answer(self, query: AnyQuery, *, timeout_s: float, is_stale_ok: bool = False) -> Any:
        """The view as of a moment after this was asked. Raises the query's error, or Unavailable."""
        if not is_stale_ok:
            await self.log.barrier(timeout_s=timeout_s)
        return await self._answer_now(query, timeout_s=timeout_s, is_stale_ok=is_stale_ok)

    async def _answer_now(self, query: AnyQuery, *, timeout_s: float, is_stale_ok: bool = False) -> Any:
        if self._history is None:
            return self.machine.answer(query)
        return await self._history.answer(query, timeout_s=timeout_s, is_stale_ok=is_stale_ok)

    async def wait_job(self, job: JobId, after_version: int, *, timeout_s: float) -> JobView:
        await self.log.barrier(timeout_s=min(timeout_s, 5.0) if timeout_s else 5.0)
        view = await self._job(job)
        with self._place(), trio.move_on_after(timeout_s):
            while True:
                # By its id, and unless it has ended, it is in the core: nothing can come between this look and the wait.
                view = await self._job(view.id)
                if view.version > after_version or view.is_final:
                    return view
                await self._job_waits.setdefault(view.id, trio.Event()).wait()
        return await self._job(view.id)

    async def events(self, after: int | None, *, timeout_s: float) -> EventsReply:
        """What came after `after`, at once if there is something; else as soon as there is, or nothing at the timeout."""
        last = self._recent[-1].position if self._recent else self.log.position << 16
        start = last if after is None else after
        with self._place(), trio.move_on_after(timeout_s):
            while not self._recent or self._recent[-1].position <= start:
                await self._news.wait()
        found: list[EventView] = []
        for event in reversed(self._recent):
            if event.position <= start:
                break
            found.append(event)
        found.reverse()
        page = tuple(found[:EVENTS_PER_ANSWER])
        return EventsReply(page, page[-1].position if page else start)

    @contextmanager
    def _place(self):  # type: ignore[no-untyped-def]
        if self._waiting >= WAITERS_MAX:
            raise Busy(f"{WAITERS_MAX} requests already wait at this node", hint="try again later, or at another node")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def _job(self, job: JobId) -> JobView:
        view = await self._answer_now(GetJob(job), timeout_s=HISTORY_S)
        assert isinstance(view, JobView)
        return view

    def _view(self, event: Event, position: int) -> EventView | None:
        wall_ms = self.machine.wall_ms
        match event:
            case JobChanged():
                if (state := self.machine.state_of(event.job)) is None:
                    return None  # forgotten by retention within the same entry
                kind = "job.ended" if event.is_final else "job.changed"
                return EventView(position, kind, wall_ms, job=event.job, state=state)
            case SessionChanged():
                kind = "session.opened" if event.is_live else "session.ended"
                return EventView(position, kind, wall_ms, node=event.node)
            case MembersChanged():
                return EventView(position, "node.changed", wall_ms)
            case Leased() | StopWanted() | Restored():
                return None

    # --- asked by other nodes -----------------------------------------------------------------------------------------

    def _check(self) -> None:
        if not self.log.is_voter:
            raise Unavailable("this node holds no replica of the queue")

    async def _on_propose(self, peer: NodeId, body: bytes) -> bytes:
        self._check()
        call = codec.decode(body, ProposeCall)
        command = bytes(call.command)
        codec.decode(command, AnyCommand, bytes_max=codec.COMMAND_BYTES_MAX)
        result = await self.propose(peer, command, timeout_s=min(call.timeout_ms / 1000, POLL_S_MAX))
        match result:
            case Committed(answer, position):
                return codec.encode(ProposeReply(answer, position, False, ""))
            case NotCommitted(why, code, hint):
                return codec.encode(ProposeReply(None, 0, False, why, code, hint))
            case Unknown(why):
                return codec.encode(ProposeReply(None, 0, True, why))

    async def _on_read(self, peer: NodeId, body: bytes) -> bytes:
        self._check()
        call = codec.decode(body, ReadCall)
        query = codec.decode(bytes(call.query), AnyQuery)
        timeout_s = min(call.timeout_ms / 1000, POLL_S_MAX)
        return codec.encode(await self.answer(query, timeout_s=timeout_s, is_stale_ok=call.is_stale_ok))

    async def _on_wait(self, peer: NodeId, body: bytes) -> bytes:
        self._check()
        call = codec.decode(body, WaitCall)
        timeout_s = min(call.timeout_ms / 1000, POLL_S_MAX)
        return codec.encode(await self.wait_job(call.job, call.after_version, timeout_s=timeout_s))

    async def _on_events_call(self, peer: NodeId, body: bytes) -> bytes:
        self._check()
        call = codec.decode(body, EventsCall)
        return codec.encode(await self.events(call.after, timeout_s=min(call.timeout_ms / 1000, POLL_S_MAX)))

    async def _on_status(self, peer: NodeId, body: bytes) -> bytes:
        self._check()
        return codec.encode(self.log.status())

    async def _on_newest(self, peer: NodeId, body: bytes) -> bytes:
        """Asked by `meshd recover`, when nobody leads; also of a server that does not vote."""
        return codec.encode(self.log.newest())
