"""The hands of a node: feed what happened to the agent, perform what it decides. Decides nothing, names no adapter.

    world ── event ──▶ Agent.handle ── effects ──▶ a task each ── what came of it, as an event ──▶ …

`feed` never waits, so a slow peer, disk or job cannot hold up the next decision; whatever takes
time is a task that reports back. Attempts that need nothing laid out for them are handed on in batches (work/planned.py)
and cost no task. The others run under a scope each, which is how they are stopped; those that wait behind another in
their lane are known from the moment it is decided, so that a stop finds them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, assert_never

import structlog
import trio
from msgspec import Struct
from msgspec.structs import replace

from meshd import codec
from meshd.agent import Agent, AgentEffect, AgentEvent, Tick
from meshd.errors import Busy, MeshError, NotAllowed, Unavailable
from meshd.model import AttemptKey, EndReason, JobSpec, NodeId, Outcome
from meshd.ports import Committed, Leash, ProposeResult, Rpc
from meshd.raft.state.commands import AnyAnswer, AnyCommand
from meshd.work.keeper import AnswerRenew, NoticeEnded, RenewArrived, SendNotice
from meshd.work.session_messages import Notice, Refusal, Refused, Renew, RenewAnswer
from meshd.work.worker import (
    AttemptsEnded,
    MoveLeash,
    NoticeArrived,
    Open,
    Propose,
    Proposed,
    Recall,
    Recalled,
    RenewAnswered,
    SendRenew,
    Start,
    Stop,
)

PROPOSE_S = 5.0
RENEW_S = 2.0
NOTICE_S = 2.0
TICK_S_MAX = 0.5
"""Never asleep for longer: the boot clock runs on while a machine sleeps, and timers of the loop do not."""

STOP_S = 10.0
"""For what was handed on, when this node stops; longer than the grace of any backend."""

log = structlog.get_logger()

Ends = Sequence[tuple[AttemptKey, Outcome]]


class RenewCall(Struct, frozen=True, array_like=True):
    """`node` None: for the caller itself. A voter that does not lead passes a renewal on, naming whose it is."""

    renew: Renew
    node: NodeId | None = None


class Planned(Protocol):
    """Attempts in batches."""

    def takes(self, spec: JobSpec) -> bool: ...

    def start(
        self, lane: int, keys: Sequence[AttemptKey], spec: JobSpec, leash_s: float | None, ended: Callable[[Ends], None]
    ) -> None:
        """Never waits; each is told of once, and never before this returns."""
        ...

    def stop(self, key: AttemptKey) -> None: ...
    async def recall(self, keys: Sequence[AttemptKey]) -> Sequence[AttemptKey]: ...
    def move_leash(self, key: AttemptKey, deadline_s: float) -> None: ...


class Runs(Protocol):
    @property
    def planned(self) -> Planned: ...
    async def run(self, key: AttemptKey, spec: JobSpec, leash: Leash) -> Outcome: ...


class World(Protocol):
    """What the shell needs to know of the mesh around it."""

    def now_ms(self) -> int:
        """CLOCK_BOOTTIME."""
        ...

    def leading_term(self) -> int | None:
        """The term in which this server leads now; None when it does not, or is none."""
        ...

    def leader(self) -> NodeId | None:
        """Who leads, as far as this node knows."""
        ...

    def voters(self) -> Sequence[NodeId]:
        """Others that may pass a renewal on, best first."""
        ...

    def is_server(self, node: NodeId) -> bool: ...


class Shell:
    """`propose` tries once; `save_epoch` returns when the epoch is synced, and raises Busy on a full disk."""

    def __init__(
        self,
        *,
        me: NodeId,
        agent: Agent,
        rpc: Rpc,
        world: World,
        runs: Runs,
        propose: Callable[[bytes], Awaitable[ProposeResult]],
        save_epoch: Callable[[int], Awaitable[None]],
    ) -> None:
        self._me = me
        self._agent = agent
        self._rpc = rpc
        self._world = world
        self._runs = runs
        self._propose = propose
        self._save_epoch = save_epoch
        self._tasks: trio.Nursery | None = None
        self._stirred = trio.Event()
        self._fed = trio.Event()
        self._leashes: dict[int, Leash] = {}
        self._scopes: dict[int, tuple[trio.CancelScope, list[EndReason]]] = {}
        self._waiting: dict[int, int] = {}
        """In which lane, by fence."""
        self._handed_on: dict[int, AttemptKey] = {}
        """Attempts that run in batches."""
        self._stopped_for: dict[int, EndReason] = {}
        """Of those: why they were told to stop."""
        self._lanes: dict[int, deque[AttemptKey]] = {}
        """What waits where attempts run one by one, while something runs there."""
        self._calls = itertools.count(1)
        self._renewals: dict[int, RenewAnswer] = {}
        rpc.register("session.renew", self._on_renew)
        rpc.register("attempt.notice", self._on_notice)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then every attempt is stopped, and nothing of it runs when this ends."""
        async with trio.open_nursery() as self._tasks:
            try:
                task_status.started()
                await self._tick()
            finally:
                self._tasks = None
                with trio.CancelScope(shield=True):
                    await self._stop_handed_on()

    def feed(self, event: AgentEvent) -> None:
        """Decide now, act in tasks. Ignored while the shell does not serve."""
        if self._tasks is None:
            return
        for effect in self._agent.handle(event, self._world.now_ms()):
            if isinstance(effect, AnswerRenew):
                self._renewals[effect.call] = effect.answer
            else:
                if isinstance(effect, Start) and self._runs.planned.takes(effect.spec):
                    self._hand_on(effect)
                    continue
                if isinstance(effect, Start) and not self._accept(effect):
                    continue
                self._tasks.start_soon(self._perform, effect)
        self._stirred.set()
        self._fed.set()

    @property
    def attempts_running(self) -> int:
        return len(self._leashes) + len(self._handed_on)

    async def wait_empty(self) -> None:
        """Until nothing runs here and every end is answered."""
        while self.attempts_running or not self._agent.worker.attempts.is_empty:
            self._fed = trio.Event()
            await self._fed.wait()

    async def _tick(self) -> None:
        while True:
            self._stirred = trio.Event()
            timer_ms = self._agent.next_timer_ms()
            wait_s = TICK_S_MAX if timer_ms is None else (timer_ms - self._world.now_ms()) / 1000
            with trio.move_on_after(max(0.001, min(wait_s, TICK_S_MAX))):
                await self._stirred.wait()
                continue
            self.feed(Tick(self._world.leading_term()))

    async def _perform(self, effect: AgentEffect) -> None:
        match effect:
            case Open(epoch, command):
                if await self._is_saved(epoch):
                    await self._do_propose(command)
                else:
                    self.feed(Proposed(command, None))
            case Propose(command):
                await self._do_propose(command)
            case SendRenew():
                await self._send_renew(effect)
            case SendNotice():
                await self._send_notice(effect)
            case Start():
                await self._run(effect)
            case Recall(keys):
                await self._recall(keys)
            case Stop(key, reason):
                self._stop(key, reason)
            case MoveLeash(key, leash_ms):
                if key.fence in self._leashes:
                    self._leashes[key.fence].move(leash_ms / 1000)
                elif key.fence in self._handed_on:
                    self._runs.planned.move_leash(key, leash_ms / 1000)
            case AnswerRenew():
                pass  # taken by feed
            case _:
                assert_never(effect)

    # --- the log -----------------------------------------------------------------------------------------------------

    async def _is_saved(self, epoch: int) -> bool:
        try:
            await self._save_epoch(epoch)
        except Busy as error:
            # A full disk ends no node: the agent asks for it again, until there is room.
            log.warning("session.epoch_not_saved", epoch=epoch, error=str(error))
            return False
        return True

    async def _do_propose(self, command: AnyCommand) -> None:
        answer: AnyAnswer | None = None
        with trio.move_on_after(PROPOSE_S):
            try:
                result = await self._propose(codec.encode(command))
                if isinstance(result, Committed):
                    answer = codec.decode(result.answer, AnyAnswer)
            except MeshError as error:
                # Refused before it was proposed: the agent hears "not committed", as of any other failure.
                log.warning("proposal.refused", command=type(command).__name__, error=str(error))
        self.feed(Proposed(command, answer))

    # --- renewals ----------------------------------------------------------------------------------------------------

    async def _send_renew(self, effect: SendRenew) -> None:
        with trio.move_on_after(RENEW_S):
            try:
                answer = await self._renew(self._me, effect.renew)
            except MeshError as error:
                log.info("session.renewal_failed", epoch=effect.epoch, error=str(error))
                return
            self.feed(RenewAnswered(effect.epoch, effect.sent_ms, answer))

    async def _renew(self, node: NodeId, renew: Renew) -> RenewAnswer:
        """The leader's answer, whether that is this node, one that is known, or known to some voter."""
        if self._world.leading_term() is not None:
            return self._decide_renew(node, renew)
        leader = self._world.leader()
        asked = [] if leader is None or leader == self._me else [leader]
        asked += [voter for voter in self._world.voters() if voter not in (leader, self._me)]
        failure: MeshError = Unavailable("no voter is known")
        call = codec.encode(RenewCall(renew, None if node == self._me else node))
        for voter in asked:
            try:
                body = await self._rpc.call(voter, "session.renew", call, timeout_s=RENEW_S)
            except MeshError as error:
                failure = error
                continue
            answer: RenewAnswer = codec.decode(body, RenewAnswer)
            if answer != Refused(Refusal.NOT_LEADING):
                return answer
        raise failure

    def _decide_renew(self, node: NodeId, renew: Renew) -> RenewAnswer:
        call = next(self._calls)
        self.feed(RenewArrived(call, node, renew, self._world.leading_term()))
        return self._renewals.pop(call, Refused(Refusal.NOT_LEADING))

    async def _on_renew(self, peer: NodeId, body: bytes) -> bytes:
        call = codec.decode(body, RenewCall)
        if call.node is not None:
            if not self._world.is_server(peer):
                raise NotAllowed("only servers pass on the renewals of others")
            return codec.encode(self._decide_renew(call.node, call.renew))
        if self._world.leading_term() is not None:
            return codec.encode(self._decide_renew(peer, call.renew))
        leader = self._world.leader()
        if leader is None or leader == self._me:
            return codec.encode(Refused(Refusal.NOT_LEADING))
        passed_on = codec.encode(RenewCall(call.renew, peer))
        return await self._rpc.call(leader, "session.renew", passed_on, timeout_s=RENEW_S)

    # --- notices -----------------------------------------------------------------------------------------------------

    async def _send_notice(self, effect: SendNotice) -> None:
        has_arrived = True
        if effect.node == self._me:
            self.feed(NoticeArrived(effect.notice))
        else:
            try:
                await self._rpc.call(effect.node, "attempt.notice", codec.encode(effect.notice), timeout_s=NOTICE_S)
            except MeshError as error:
                has_arrived = False
                log.info("notice.failed", node=effect.node, error=str(error))
        self.feed(NoticeEnded(effect.node, effect.notice, has_arrived))

    async def _on_notice(self, peer: NodeId, body: bytes) -> bytes:
        if not self._world.is_server(peer):
            raise NotAllowed("only servers lease")
        self.feed(NoticeArrived(codec.decode(body, Notice)))
        return b""

    # --- attempts ----------------------------------------------------------------------------------------------------

    def _accept(self, effect: Start) -> bool:
        """Whether nobody works in its lane yet."""
        leash = Leash(None if effect.leash_ms is None else effect.leash_ms / 1000)
        for key in effect.keys:
            self._leashes[key.fence] = leash
            self._waiting[key.fence] = effect.lane
        lane = self._lanes.get(effect.lane)
        if lane is None:
            self._lanes[effect.lane] = deque(effect.keys)
        else:
            lane.extend(effect.keys)
        return lane is None

    def _withdraw(self, key: AttemptKey) -> bool:
        """Whether it still waited; then it never begins."""
        if self._waiting.pop(key.fence, None) is None:
            return False
        del self._leashes[key.fence]
        return True

    async def _run(self, effect: Start) -> None:
        lane = self._lanes[effect.lane]
        while lane:
            key = lane.popleft()
            # One that was recalled may wait in another lane by now.
            if self._waiting.get(key.fence) == effect.lane:
                del self._waiting[key.fence]
                outcome = await self._run_one(key, effect.spec, self._leashes[key.fence])
                self.feed(AttemptsEnded(((key, outcome),)))
        del self._lanes[effect.lane]

    async def _run_one(self, key: AttemptKey, spec: JobSpec, leash: Leash) -> Outcome:
        reasons: list[EndReason] = []
        outcome: Outcome | None = None
        log.info("attempt.started", job=key.job, task=key.task, attempt=key.attempt, fence=key.fence)
        try:
            with trio.CancelScope() as scope:
                self._scopes[key.fence] = (scope, reasons)
                outcome = await self._runs.run(key, spec, leash)
        except Exception as error:
            # A defect of ours must cost one attempt, not the node; it counts as a loss, so that it ends.
            log.exception("attempt.broke", job=key.job, task=key.task, fence=key.fence)
            outcome = Outcome(
                EndReason.BACKEND, message=f"the agent failed to run it: {type(error).__name__}: {error}"[:2000]
            )
        finally:
            del self._leashes[key.fence], self._scopes[key.fence]
        if outcome is None:
            outcome = Outcome(reasons[0] if reasons else EndReason.LOST, message="stopped by its node")
        log.info(
            "attempt.ended",
            job=key.job,
            task=key.task,
            fence=key.fence,
            reason=outcome.reason.value,
            code=outcome.exit_code,
        )
        return outcome

    def _stop(self, key: AttemptKey, reason: EndReason) -> None:
        if key.fence in self._handed_on:
            self._stopped_for[key.fence] = reason
            self._runs.planned.stop(key)
        elif self._withdraw(key):
            self.feed(AttemptsEnded(((key, Outcome(reason, message="stopped before it started")),)))
        elif key.fence in self._scopes:
            scope, reasons = self._scopes[key.fence]
            reasons.append(reason)
            scope.cancel()

    async def _recall(self, keys: Sequence[AttemptKey]) -> None:
        back = [key for key in keys if self._withdraw(key)]
        if handed_on := [key for key in keys if key.fence in self._handed_on]:
            for key in await self._runs.planned.recall(handed_on):
                del self._handed_on[key.fence]
                self._stopped_for.pop(key.fence, None)
                back.append(key)
        self.feed(Recalled(tuple(back)))

    # --- attempts in batches -----------------------------------------------------------------------------------------

    def _hand_on(self, effect: Start) -> None:
        self._handed_on.update((key.fence, key) for key in effect.keys)
        first = effect.keys[0]
        log.debug("attempts.started", job=first.job, attempts=len(effect.keys), fence=first.fence)
        leash_s = None if effect.leash_ms is None else effect.leash_ms / 1000
        try:
            self._runs.planned.start(effect.lane, effect.keys, effect.spec, leash_s, self._handed_on_ended)
        except Exception as error:
            # As for a single one: a defect costs these attempts, as a loss, and not the node.
            log.exception("attempts.broke", job=first.job, attempts=len(effect.keys), fence=first.fence)
            broke = f"the agent failed to run it: {type(error).__name__}: {error}"[:2000]
            assert self._tasks is not None, "effects are performed while it serves"
            self._tasks.start_soon(
                self._tell_broken, [(key, Outcome(EndReason.BACKEND, message=broke)) for key in effect.keys]
            )

    async def _tell_broken(self, ends: Ends) -> None:
        if left := [(key, outcome) for key, outcome in ends if key.fence in self._handed_on]:
            self._handed_on_ended(left)

    def _handed_on_ended(self, ends: Ends) -> None:
        told = []
        failed = 0
        for key, outcome in ends:
            if self._handed_on.pop(key.fence, None) is None:
                continue
            if self._stopped_for:
                reason = self._stopped_for.pop(key.fence, None)
                if reason is not None and outcome.reason is EndReason.CANCELLED:
                    outcome = replace(outcome, reason=reason, message="stopped by its node")
            failed += not outcome.is_success
            told.append((key, outcome))
        first = ends[0][0]
        # Two lines for each batch would be a tenth of what its attempts cost.
        say = log.info if failed else log.debug
        say("attempts.ended", job=first.job, attempts=len(told), failed=failed, fence=first.fence)
        self.feed(AttemptsEnded(tuple(told)))
        self._fed.set()

    async def _stop_handed_on(self) -> None:
        """Nothing of them runs when this ends, or the backends themselves are stuck."""
        for key in list(self._handed_on.values()):
            self._runs.planned.stop(key)
        with trio.move_on_after(STOP_S):
            while self._handed_on:
                self._fed = trio.Event()
                await self._fed.wait()
