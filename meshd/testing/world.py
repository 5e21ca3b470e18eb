"""A whole mesh in one heap: real agents, real replicated queue, a modelled log, network, machines and clients.

A seed is a complete description of a run. While `faults` lasts, machines crash and come
back (also within two seconds), freeze, lose their network; messages are lost, doubled
and late; then everything heals, and whatever was acknowledged must finish. One machine
may be gone for good; an operator removes it then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshd import codec
from meshd.agent import Agent, AgentEffect, AgentEvent, Tick
from meshd.keeper import (
    GRANT_MS,
    AnswerRenew,
    Applied,
    Keeper,
    LeaderTick,
    NoticeEnded,
    PeerGone,
    RenewArrived,
    SendNotice,
)
from meshd.model import BackendOffer, Member, NodeId, Offer, Resources, Role
from meshd.raft.commands import AnyCommand, CreateInvite, EndSession, Found, Join
from meshd.raft.machine import Machine
from meshd.session_messages import Granted, Notice, Renew, RenewAnswer
from meshd.testing.checks import Checks
from meshd.testing.heap import Heap
from meshd.testing.machines import Runner
from meshd.testing.modelled_log import ModelledLog
from meshd.worker import (
    MoveLeash,
    NoticeArrived,
    Offering,
    Open,
    Propose,
    Proposed,
    RenewAnswered,
    SendRenew,
    Start,
    Stop,
    Worker,
)

WALL_START_MS = 1_790_000_000_000
RENEW_TIMEOUT_MS = 2_000
NOTICE_TIMEOUT_MS = 2_000
GONE_AFTER_MS = 4_000
"""Gossip calls a silent node dead within 5 s."""
CLOCK_DRIFT = 0.002
"""Clocks that run this much too fast or slow; real ones are a hundred times better."""


@dataclass(frozen=True)
class Faults:
    """How rough the world is. Probabilities per message, counts per run, times in milliseconds."""

    lasts_ms: int = 40_000
    lose: float = 0
    double: float = 0
    latency_ms: tuple[float, float] = (0.5, 8.0)
    late: float = 0
    late_ms: tuple[float, float] = (100.0, 4_000.0)
    slow_disk: float = 0.1
    """How often a commit takes up to 300 ms instead of 30."""
    crashes: int = 0
    restart_ms: tuple[tuple[float, float], ...] = ((100.0, 2_000.0), (2_000.0, 9_000.0), (9_000.0, 30_000.0))
    """Each crash draws one of these."""
    freezes: int = 0
    cuts: int = 0
    cut_ms: tuple[float, float] = (2_000.0, 40_000.0)
    transfers: int = 0
    offers: int = 0
    drains: float = 0
    hands_over: float = 0.5
    freezes_then_cuts: int = 0
    has_gossip: bool = True
    dies_for_good: float = 0


CALM = Faults(lasts_ms=0)


class SimNode:
    """One machine: its disk outlives the process, its clock is its own, its agent is the real one."""

    def __init__(self, world: World, name: str, *, is_server: bool, slots: int) -> None:
        self.world, self.name, self.id = world, name, NodeId(f"node-{name}")
        self.is_server, self.slots = is_server, slots
        self.offer = Offer(backends=(BackendOffer("process"),), resources=Resources(cpu_milli=1000 * slots))
        self.cores = max(1, slots - 1)
        """The last slot is claimed ahead: what is leased to it waits for a core."""
        self.saved_epoch = 0
        self.is_alive = False
        self.is_draining = False
        self.agent_frozen_until_ms = 0
        self.machine_frozen_until_ms = 0
        self.process = 0
        self.agent: Agent | None = None
        self.machine: Machine | None = None
        self.applied = 0
        self.runner = Runner(self)
        self._clock_offset_ms = int(world.heap.between(0, 10_000_000))
        self._clock_rate = 1 + world.heap.between(-CLOCK_DRIFT, CLOCK_DRIFT)
        self._timer_ms: int | None = None
        self._calls: dict[int, Callable[[RenewAnswer], None]] = {}

    @property
    def is_awake(self) -> bool:
        return self.is_alive and self.world.heap.now_ms >= self.agent_frozen_until_ms

    def clock_ms(self) -> int:
        return self._clock_offset_ms + int(self.world.heap.now_ms * self._clock_rate)

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        world = self.world
        self.is_alive = True
        self.agent_frozen_until_ms = self.machine_frozen_until_ms = 0
        self.process += 1
        self._timer_ms = None
        self._calls = {}
        keeper = None
        if self.is_server:
            self.machine = world.log.replica_for(self)
            keeper = Keeper(self.machine)
        self.agent = Agent(Worker(epoch=self.saved_epoch), keeper)
        world.heap.note(f"{self.name}: starts, saved epoch {self.saved_epoch}")
        self.offers(0 if self.is_draining else self.slots)

    def offers(self, slots: int) -> None:
        self.handle(Offering(slots, self.offer, Resources(cpu_milli=1000 * self.cores)))

    def crash(self) -> None:
        self.world.heap.note(f"{self.name}: crashes")
        self.is_alive = False
        self.agent = self.machine = None
        self.runner.killed()
        self.world.log.depose(self.id)

    def freeze(self, for_ms: float, *, whole: bool) -> None:
        """The agent alone (stopped, swapped out), or the whole machine with its jobs (a suspended VM)."""
        self.agent_frozen_until_ms = self.world.heap.now_ms + int(for_ms)
        if whole:
            self.machine_frozen_until_ms = self.agent_frozen_until_ms
        self.world.heap.note(f"{self.name}: {'machine' if whole else 'agent'} frozen for {int(for_ms)} ms")

    def after(self, delay_ms: float, action: Callable[[], None], *, of_machine: bool = False) -> None:
        """In this process: never once it has crashed, later when it is frozen. `of_machine`: what goes on without the agent."""
        process = self.process

        def run() -> None:
            if not self.is_alive or self.process != process:
                return
            until_ms = self.machine_frozen_until_ms if of_machine else self.agent_frozen_until_ms
            if self.world.heap.now_ms < until_ms:
                self.world.heap.after(until_ms - self.world.heap.now_ms, run)
            else:
                action()

        self.world.heap.after(delay_ms, run)

    # --- the shell ----------------------------------------------------------------------------------------------------

    def handle(self, event: AgentEvent) -> None:
        if self.agent is None:
            return
        for effect in self.agent.handle(event, self.clock_ms()):
            self._perform(effect)
        timer_ms = self.agent.next_timer_ms()
        if timer_ms is not None and (self._timer_ms is None or timer_ms < self._timer_ms):
            self._timer_ms = timer_ms
            self.after((timer_ms - self.clock_ms()) / self._clock_rate + 1, lambda: self._timer(timer_ms))

    def _timer(self, timer_ms: int) -> None:
        if self._timer_ms == timer_ms:
            self._timer_ms = None
            self.handle(Tick(self.world.log.leads(self.id)))

    def leadership_changed(self) -> None:
        self.handle(LeaderTick(self.world.log.leads(self.id)))

    def applied_events(self, term: int | None) -> None:
        assert self.machine is not None
        events = self.machine.take_events()
        if events:
            self.handle(Applied(events, term))

    def save_epoch(self, epoch: int) -> None:
        """On its disk, synced."""
        self.saved_epoch = max(self.saved_epoch, epoch)

    def _perform(self, effect: AgentEffect) -> None:
        world = self.world
        match effect:
            case Open(epoch, command):
                world.heap.note(f"{self.name}: opens {epoch}, holds {_fences(command.held)}")

                def saved() -> None:
                    self.save_epoch(epoch)
                    self._propose(command)

                self.after(world.heap.between(0, 15), saved)
            case Propose(command):
                if isinstance(command, EndSession):
                    assert self.agent is not None and self.agent.keeper is not None
                    granted_ms = self.agent.keeper.granted_ms(command.node)
                    is_early = granted_ms is not None and self.clock_ms() - granted_ms < GRANT_MS
                    world.checks.decided_to_end(self, command, is_early=is_early)
                self._propose(command)
            case SendRenew(epoch, sent_ms, renew):
                self._send_renew(epoch, sent_ms, renew)
            case Start(key, spec, leash_ms):
                world.checks.decided_to_start(self, key)
                self.runner.start(key, spec, leash_ms)
            case Stop(key, reason):
                self.runner.stop(key, reason)
            case MoveLeash(key, leash_ms):
                self.runner.move_leash(key, leash_ms)
            case AnswerRenew(call, answer):
                self._calls.pop(call)(answer)
            case SendNotice(node, notice):
                self._send_notice(node, notice)

    def _propose(self, command: object) -> None:
        via = self.id if isinstance(command, EndSession) else None
        self.world.log.propose(self, command, lambda answer: self.handle(Proposed(command, answer)), via=via)  # type: ignore[arg-type]

    def _send_renew(self, epoch: int, sent_ms: int, renew: Renew) -> None:
        body = codec.encode(renew)
        servers = [node for node in self.world.nodes.values() if node.is_server]
        voter = self.world.heap.random.choice(servers)

        def answered(answer: RenewAnswer) -> None:
            data = codec.encode(answer)
            self.world.send(
                voter, self, lambda: self.handle(RenewAnswered(epoch, sent_ms, codec.decode(data, RenewAnswer)))
            )

        def at_voter() -> None:
            leader = self.world.log.voters[voter.id].leader
            if leader is not None:
                node = self.world.nodes[leader]
                self.world.send(voter, node, lambda: node.renew_arrived(self.id, body, answered))

        self.world.send(self, voter, at_voter)

    def renew_arrived(self, origin: NodeId, body: bytes, answered: Callable[[RenewAnswer], None]) -> None:
        renew = codec.decode(body, Renew)

        def checked(answer: RenewAnswer) -> None:
            if isinstance(answer, Granted):
                self.world.checks.decided_to_grant(self, origin, renew.epoch)
            answered(answer)

        call = len(self._calls) + self.world.heap.now_ms * 1000
        self._calls[call] = checked
        self.handle(RenewArrived(call, origin, renew, self.world.log.leads(self.id)))

    def _send_notice(self, to: NodeId, notice: Notice) -> None:
        body = codec.encode(notice)
        target = self.world.nodes[to]
        is_over = False

        def over(has_arrived: bool) -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                self.handle(NoticeEnded(to, notice, has_arrived))

        def arrived() -> None:
            target.handle(NoticeArrived(codec.decode(body, Notice)))
            self.world.send(target, self, lambda: over(True))

        self.world.send(self, target, arrived)
        self.after(NOTICE_TIMEOUT_MS, lambda: over(False))


class World:
    def __init__(self, seed: int, faults: Faults) -> None:
        self.seed, self.faults = seed, faults
        self.heap = Heap(seed)
        self.nodes: dict[NodeId, SimNode] = {}
        self.checks = Checks(self.heap, self)
        self.log = ModelledLog(self.heap, self, self.checks)
        self._cut: set[tuple[NodeId, NodeId]] = set()
        self._silent_since: dict[tuple[NodeId, NodeId], int] = {}

    def wall_ms(self) -> int:
        return WALL_START_MS + self.heap.now_ms

    # --- founding -----------------------------------------------------------------------------------------------------

    def found(self, *, servers: int, workers: int) -> None:
        """Members are already in the log when the run begins; joining has its own tests."""
        rng = self.heap.random
        for k in range(servers + workers):
            node = SimNode(self, f"n{k}", is_server=k < servers, slots=rng.randint(1, 3))
            self.nodes[node.id] = node
            if node.is_server:
                self.log.add_voter(node)
        first, *others = self.nodes.values()
        secret = "a" * 64
        commands: list[tuple[NodeId, AnyCommand]] = [
            (first.id, Found("mesh", _member(first))),
            (first.id, CreateInvite(secret, (Role.SERVER, Role.WORKER), 100, 86_400_000)),
        ]
        commands += [(first.id, Join(secret, _member(other))) for other in others]
        self.log.seed_entry(commands)
        for node in self.nodes.values():
            node.start()
        if self.faults.has_gossip:
            self.heap.after(500, self._liveness)

    # --- the network --------------------------------------------------------------------------------------------------

    def hears(self, sender: NodeId, receiver: NodeId) -> bool:
        return (sender, receiver) not in self._cut

    def send(self, sender: SimNode, receiver: SimNode, deliver: Callable[[], None]) -> None:
        """Lost, late, doubled, cut; delivered into the process that lives there then, when it is awake."""
        if not sender.is_alive:
            return
        if sender is receiver:
            receiver.after(0, deliver)
            return
        rough = self.faults if self.heap.now_ms < self.faults.lasts_ms else CALM
        for _ in range(2 if self.heap.chance(rough.double) else 1):
            if self.heap.chance(rough.lose):
                continue
            delay_ms = self.heap.between(*rough.latency_ms)
            if self.heap.chance(rough.late):
                delay_ms += self.heap.between(*rough.late_ms)

            def arrive() -> None:
                if receiver.is_alive and self.hears(sender.id, receiver.id):
                    receiver.after(0, deliver)

            self.heap.after(delay_ms, arrive)

    def some_peer(self, node: SimNode) -> SimNode | None:
        """Another machine that could take a copy now."""
        peers = [
            other
            for other in self.nodes.values()
            if other is not node and other.is_awake and self.hears(node.id, other.id) and self.hears(other.id, node.id)
        ]
        return self.heap.random.choice(peers) if peers else None

    def cut_off(self, node: SimNode, for_ms: float, *, one_way: bool) -> None:
        others = [other for other in self.nodes.values() if other is not node]
        lost = {(node.id, other.id) for other in others}
        if not one_way:
            lost |= {(other.id, node.id) for other in others}
        self._cut |= lost
        self.heap.note(f"{node.name}: cut off for {int(for_ms)} ms{' one way' if one_way else ''}")
        self.heap.after(for_ms, lambda: self._cut.difference_update(lost))

    def _liveness(self) -> None:
        """What gossip and connections would tell each server: who has been silent for 4 s."""
        self.heap.after(500, self._liveness)
        for server in self.nodes.values():
            if not (server.is_server and server.is_awake):
                continue
            for node in self.nodes.values():
                pair = (server.id, node.id)
                if node.is_awake and self.hears(node.id, server.id) and self.hears(server.id, node.id):
                    if self._silent_since.pop(pair, self.heap.now_ms) <= self.heap.now_ms - GONE_AFTER_MS:
                        server.handle(PeerGone(node.id, False))
                else:
                    since = self._silent_since.setdefault(pair, self.heap.now_ms)
                    if self.heap.now_ms - since >= GONE_AFTER_MS:
                        server.handle(PeerGone(node.id, True))


def _member(node: SimNode) -> Member:
    roles = (Role.SERVER, Role.WORKER) if node.is_server else (Role.WORKER,)
    return Member(node.id, node.name, roles)


def _fences(keys: tuple) -> str:  # type: ignore[type-arg]
    return ",".join(str(key.fence) for key in keys) or "nothing"
