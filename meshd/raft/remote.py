"""The log as any node sees it: its own replica when it is a voter, else a voter that answers, one after another.

A command is resent until its outcome is known, with the same bytes: submissions carry ids,
sessions carry sequence numbers, the rest is idempotent, so a resend never does it twice
(protocol.md 4, 7). Reads fail over silently.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import trio
from msgspec import Raw

from meshd import codec
from meshd.errors import MeshError, PeerFault, Unavailable, UnknownOutcome, from_code
from meshd.model import JobId, NodeId
from meshd.ports import Committed, NotCommitted, ProposeResult, Rpc, Unknown
from meshd.raft.log import RaftStatus
from meshd.raft.replica import (
    EventsCall,
    EventsReply,
    ProposeCall,
    ProposeReply,
    ReadCall,
    Replica,
    WaitCall,
)
from meshd.raft.state.commands import AnyAnswer, AnyCommand, Reason, Rejected
from meshd.views import AnyQuery, JobView

ATTEMPT_S = 5.0
"""How long one voter is given before the next is asked."""
PAUSE_S_MAX = 0.5
"""Between rounds over all voters; an election takes about that long."""
STALE_S = 2.0
"""How long a server without a seat looks for a voter before it answers a stale read from its own copy."""
NO_MAJORITY_HINT = "`mesh cluster status` says what is missing; reads with --stale go on"

V = TypeVar("V")
T = TypeVar("T")


class MeshLog:
    """`candidates` names other nodes that may hold a replica, best first; `why_stopped` says why none of them decides."""

    def __init__(
        self,
        me: NodeId,
        rpc: Rpc,
        candidates: Callable[[], Sequence[NodeId]],
        replica: Replica | None = None,
        why_stopped: Callable[[], str] = str,
    ) -> None:
        self._me = me
        self._rpc = rpc
        self._candidates = candidates
        self._replica = replica
        self._why_stopped = why_stopped
        self._last_good: NodeId | None = None

    @property
    def local(self) -> Replica | None:
        """This node's replica while it is a voter."""
        return self._replica if self._replica is not None and self._replica.log.is_voter else None

    # --- commands ----------------------------------------------------------------------------------------------------

    async def propose(self, command: AnyCommand, *, timeout_s: float) -> AnyAnswer:
        """Resent until answered. Raises the rejection's error, UnknownOutcome, Busy or Unavailable (certainly not done)."""
        body = codec.encode(command)
        deadline = trio.current_time() + timeout_s
        is_unknown = False
        why, pause_s = "no voter was reached", 0.02
        while (left_s := deadline - trio.current_time()) > 0:
            match await self.propose_once(body, timeout_s=min(left_s, ATTEMPT_S)):
                case Committed(answer, _):
                    return _accepted(codec.decode(answer, AnyAnswer))
                case NotCommitted(why, code, hint):
                    if code:
                        raise from_code(code, why, hint)
                case Unknown(why):
                    is_unknown = True
            await trio.sleep(min(pause_s * random.uniform(0.5, 1.5), max(0.0, deadline - trio.current_time())))  # noqa: S311
            pause_s = min(pause_s * 2, PAUSE_S_MAX)
        if is_unknown:
            raise UnknownOutcome(f"no answer within {timeout_s:.0f} s: {why}", hint="resend with the same id, or ask")
        raise Unavailable(
            f"the mesh took no decision within {timeout_s:.0f} s: {self._why_stopped() or why}", hint=NO_MAJORITY_HINT
        )

    async def propose_once(self, command: bytes, *, timeout_s: float) -> ProposeResult:
        """One try at one voter. Never raises for what voters answer or fail to."""
        if (local := self.local) is not None:
            return await local.propose(self._me, command, timeout_s=timeout_s)
        call = codec.encode(ProposeCall(Raw(command), int(timeout_s * 1000)))
        why = "no voter is known"
        for peer in self._order():
            try:
                reply = codec.decode(await self._rpc.call(peer, "log.propose", call, timeout_s=timeout_s), ProposeReply)
            except UnknownOutcome as error:
                return Unknown(str(error))
            except (Unavailable, PeerFault) as error:
                why = str(error)
                continue
            except MeshError as error:
                return NotCommitted(str(error))
            self._last_good = peer
            if reply.answer is not None:
                return Committed(reply.answer, reply.position)
            return Unknown(reply.why) if reply.is_unknown else NotCommitted(reply.why, reply.code, reply.hint)
        return NotCommitted(why)

    # --- reads -------------------------------------------------------------------------------------------------------

    async def query(self, query: AnyQuery, kind: type[V], *, timeout_s: float, is_stale_ok: bool = False) -> V:
        body = codec.encode(query)

        async def here(replica: Replica, left_s: float) -> Any:
            return await replica.answer(query, timeout_s=left_s, is_stale_ok=is_stale_ok)

        async def there(peer: NodeId, left_s: float) -> Any:
            call = codec.encode(ReadCall(Raw(body), int(left_s * 1000), is_stale_ok))
            return codec.decode(await self._rpc.call(peer, "log.read", call, timeout_s=left_s), kind)

        copy = self._replica if is_stale_ok and self._replica is not None and self._replica.log.position else None
        if copy is None:
            return await self._somewhere(here, there, timeout_s=timeout_s, attempt_s=ATTEMPT_S)
        try:
            return await self._somewhere(here, there, timeout_s=min(timeout_s, STALE_S), attempt_s=ATTEMPT_S)
        except Unavailable:
            old: V = await here(copy, 0)
            return old

    async def wait_job(self, job: JobId, after_version: int, *, timeout_s: float) -> JobView:
        async def here(replica: Replica, left_s: float) -> JobView:
            return await replica.wait_job(job, after_version, timeout_s=left_s)

        async def there(peer: NodeId, left_s: float) -> JobView:
            call = codec.encode(WaitCall(job, after_version, int(left_s * 1000)))
            return codec.decode(await self._rpc.call(peer, "log.wait", call, timeout_s=left_s + 2), JobView)

        return await self._somewhere(here, there, timeout_s=timeout_s + ATTEMPT_S, attempt_s=timeout_s)

    async def events(self, after: int | None, *, timeout_s: float) -> EventsReply:
        async def here(replica: Replica, left_s: float) -> EventsReply:
            return await replica.events(after, timeout_s=left_s)

        async def there(peer: NodeId, left_s: float) -> EventsReply:
            call = codec.encode(EventsCall(after, int(left_s * 1000)))
            return codec.decode(await self._rpc.call(peer, "log.events", call, timeout_s=left_s + 2), EventsReply)

        return await self._somewhere(here, there, timeout_s=timeout_s + ATTEMPT_S, attempt_s=timeout_s)

    async def status(self, *, timeout_s: float) -> RaftStatus:
        """Of the leader where it answers, since only it knows how far the others are; else of any voter."""

        async def here(replica: Replica, left_s: float) -> RaftStatus:
            return replica.log.status()

        async def there(peer: NodeId, left_s: float) -> RaftStatus:
            return codec.decode(await self._rpc.call(peer, "log.status", b"", timeout_s=left_s), RaftStatus)

        found = await self._somewhere(here, there, timeout_s=timeout_s, attempt_s=2.0)
        if found.leader is None or found.leader == found.me:
            return found
        try:
            return await there(found.leader, 1.0)
        except MeshError:
            return found

    async def _somewhere(
        self,
        here: Callable[[Replica, float], Awaitable[T]],
        there: Callable[[NodeId, float], Awaitable[T]],
        *,
        timeout_s: float,
        attempt_s: float,
    ) -> T:
        """At the own replica, else at one voter after another until the time is up."""
        deadline = trio.current_time() + timeout_s
        failure: MeshError = Unavailable("no voter is known", hint="is any server of this mesh running?")
        pause_s = 0.02
        while (left_s := deadline - trio.current_time()) > 0:
            try:
                if (local := self.local) is not None:
                    return await here(local, min(left_s, attempt_s))
            except Unavailable as error:
                failure = error
            for peer in self._order():
                if (left_s := deadline - trio.current_time()) <= 0:
                    break
                try:
                    answer = await there(peer, min(left_s, attempt_s))
                except (Unavailable, PeerFault) as error:
                    failure = error
                    continue
                self._last_good = peer
                return answer
            await trio.sleep(min(pause_s, max(0.0, deadline - trio.current_time())))
            pause_s = min(pause_s * 2, PAUSE_S_MAX)
        why = self._why_stopped() or str(failure)
        raise Unavailable(f"no voter answered within {timeout_s:.0f} s: {why}", hint=NO_MAJORITY_HINT)

    def _order(self) -> list[NodeId]:
        peers = list(self._candidates())
        if self._last_good in peers:
            peers.remove(self._last_good)
            peers.insert(0, self._last_good)
        return peers


_FOR_NODES = frozenset({Reason.WRONG_EPOCH, Reason.GAP, Reason.OLD})


def _accepted(answer: AnyAnswer) -> AnyAnswer:
    if isinstance(answer, Rejected) and answer.reason not in _FOR_NODES:
        raise from_code(answer.reason.value, answer.message, answer.hint)
    return answer
