"""The deciding half of a node: `handle(event, now_ms) -> effects`. Routes to the cores, holds no rule of its own.

    worker   this node's session, and the attempts it holds       events and effects: meshd.work.worker
    keeper   the sessions of all nodes, while this server leads   events and effects: meshd.work.keeper; servers only

The shell feeds events, performs effects as tasks, and sends `Tick` at `next_timer_ms()`
or any time later. `now_ms` is CLOCK_BOOTTIME in milliseconds. `Propose` comes from both;
its result is always `Proposed`. Nothing here waits, fails or reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshd.raft.state.commands import EndSession
from meshd.work.keeper import (
    Applied,
    EndProposed,
    Keeper,
    KeeperEffect,
    KeeperEvent,
    LeaderTick,
    NoticeEnded,
    PeerGone,
    RenewArrived,
)
from meshd.work.worker import Proposed, Worker, WorkerEffect, WorkerEvent


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. `term` is the term in which this server `leads(now)`, None when it does not or is no server."""

    term: int | None = None


AgentEvent = Tick | WorkerEvent | KeeperEvent
AgentEffect = WorkerEffect | KeeperEffect


class Agent:
    def __init__(self, worker: Worker, keeper: Keeper | None = None) -> None:
        self.worker = worker
        self.keeper = keeper

    def handle(self, event: AgentEvent, now_ms: int) -> list[AgentEffect]:
        match event:
            case Tick(term):
                return [*self.worker.handle(None, now_ms), *self._keep(LeaderTick(term), now_ms)]
            case Proposed(EndSession() as command, answer):
                return self._keep(EndProposed(command, answer), now_ms)
            case Applied() | LeaderTick() | RenewArrived() | NoticeEnded() | PeerGone() | EndProposed():
                return self._keep(event, now_ms)
            case _:
                return list(self.worker.handle(event, now_ms))

    def next_timer_ms(self) -> int | None:
        timers = [self.worker.next_timer_ms(), self.keeper.next_timer_ms() if self.keeper else None]
        return min((timer for timer in timers if timer is not None), default=None)

    def _keep(self, event: KeeperEvent, now_ms: int) -> list[AgentEffect]:
        return list(self.keeper.handle(event, now_ms)) if self.keeper is not None else []
