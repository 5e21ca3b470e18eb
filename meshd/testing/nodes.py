"""One simulated machine: its disk, its clock, its process with the real agent and the real gossip, and the shell between.

What daemon.py and shell.py do with sockets and threads is done here on virtual time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec.structs import replace

from meshd import codec
from meshd.agent import Agent, AgentEffect, AgentEvent, Tick
from meshd.errors import MeshError, NotFound
from meshd.gossip.membership import State
from meshd.model import BackendOffer, NodeId, Offer, Resources
from meshd.neighbours import ADDRESS_FACT, LEADER_FACT, MEMBERS_FACT, OFFER_FACT
from meshd.ports import Committed, ProposeResult
from meshd.raft.replica import ProposeReply
from meshd.raft.state.commands import AnyAnswer, AnyCommand, EndSession, MembersChanged, Restored
from meshd.raft.state.machine import Machine
from meshd.testing.gossiping import Done, Gossiping, Reply
from meshd.testing.machines import Runner
from meshd.testing.network import KEEP_ALIVE_MS, Connections
from meshd.testing.raft_disk import MemoryDisk, PowerCut
from meshd.testing.servers import SYNC_MS, SimServer
from meshd.views import AnyQuery, GetMembers, MembersView
from meshd.work.keeper import (
    GRANT_MS,
    AnswerRenew,
    Applied,
    Keeper,
    NoticeEnded,
    PeerGone,
    RenewArrived,
    SendNotice,
)
from meshd.work.session_messages import Granted, Notice, Renew, RenewAnswer
from meshd.work.worker import (
    MoveLeash,
    NoticeArrived,
    Offering,
    Open,
    Propose,
    Proposed,
    Recall,
    Recalled,
    RenewAnswered,
    SendRenew,
    Start,
    Stop,
    Worker,
)

if TYPE_CHECKING:
    from meshd.testing.world import World

V = TypeVar("V")

NOTICE_TIMEOUT_MS = 2_000
PROPOSE_TIMEOUT_MS = 5_000
READ_TIMEOUT_MS = 5_000
SUPERVISOR_MS = (500.0, 4_000.0)
"""Between the end of an agent and its next start, when nobody planned either."""
WRITES_MAX = 3
"""The power goes in the middle of one of the next operations of the disk …"""
WRITES_WITHIN_MS = 100.0
"""… or after so long, if there are none."""
MEMBERS_EVERY_MS = 2_000
"""How often a node without a replica looks whether gossip announces a change of members."""
CLOCK_DRIFT = 0.002
"""Clocks that run this much too fast or slow; real ones are a hundred times better."""


class SimNode:
    """One machine: its disk outlives the process, its clock is its own, its agent is the real one."""

    def __init__(self, world: World, name: str, *, is_server: bool, slots: int, is_founder: bool = False) -> None:
        self.world, self.name, self.id = world, name, NodeId(f"node-{name}")
        self._heap = world.heap
        self.is_server, self.is_founder, self.slots = is_server, is_founder, slots
        self.offer = some_offer(world.heap.random, name, slots)
        self.cores = max(1, slots - 1)
        """The last slot is claimed ahead: what is leased to it waits for a core."""
        self.disk = MemoryDisk()
        self.segments = MemoryDisk()
        """Those of the history."""
        self.has_lost_history = False
        """At some time; it got it again from others."""
        self.has_rotted = False
        """Bits on its disk have turned over at some time."""
        self.saved_epoch = 0
        self.starts = 0
        self.boots = 1
        """Of its kernel."""
        self.blobs: dict[str, None] = {}
        self.members: tuple[NodeId, ...] = ()
        self.is_alive = self.is_gone = False
        """`is_gone`: for good."""
        self.has_power = True
        self.is_draining = False
        self.disk_hangs_until_ms = 0
        self.agent_frozen_until_ms = 0
        self.machine_frozen_until_ms = 0
        self._back_ms = SUPERVISOR_MS
        self.process = 0
        self.agent: Agent | None = None
        self.gossip: Gossiping | None = None
        self.connections = Connections(self)
        self.server: SimServer | None = None
        self._voted_among = 0
        self.runner = Runner(self)
        self._clock_offset_ms = int(world.heap.between(0, 10_000_000))
        self._clock_rate = 1 + world.heap.between(-CLOCK_DRIFT, CLOCK_DRIFT)
        self.wall_offset_ms = 0
        """How wrong its wall clock is."""
        self._timer_ms: int | None = None
        self._calls: dict[int, Callable[[RenewAnswer], None]] = {}
        self._members_position = self._announced = 0

    @property
    def is_awake(self) -> bool:
        return self.is_alive and self._heap.now_ms >= self.agent_frozen_until_ms

    def clock_ms(self) -> int:
        return self._clock_offset_ms + int(self._heap.now_ms * self._clock_rate)

    def clock_s(self) -> float:
        return self.clock_ms() / 1000

    def until_ms(self, clock_s: float) -> float:
        """How long until this clock shows that; 0 when it does already."""
        left_s = clock_s - self.clock_s()
        return 0 if left_s <= 0 else 1000 * left_s / self._clock_rate + 1

    def wall_ms(self) -> int:
        return self.world.wall_ms() + self.wall_offset_ms

    def sync_ms(self) -> float:
        """How long the disk takes for one sync."""
        heap, weather = self.world.heap, self.world.network.weather
        hangs_ms = max(0, self.disk_hangs_until_ms - heap.now_ms)
        return hangs_ms + heap.between(
            *SYNC_MS if not heap.chance(weather.slow_disk) else (SYNC_MS[1], weather.slow_ms)
        )

    @property
    def machine(self) -> Machine | None:
        return None if self.server is None else self.server.machine

    @property
    def has_replica(self) -> bool:
        """It votes, so it answers from its own copy of the queue."""
        return self.server is not None and self.server.engine.is_voter

    @property
    def room(self) -> Resources:
        return replace(self.offer.resources, cpu_milli=1000 * self.cores)

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        world = self.world
        self.is_alive = self.has_power = True
        self.agent_frozen_until_ms = self.machine_frozen_until_ms = 0
        self._back_ms = SUPERVISOR_MS
        self.process += 1
        self._timer_ms = None
        self._announced = 0
        self._calls = {}
        self.connections = Connections(self)
        self.count_start()
        world.heap.note(f"{self.name}: starts, saved epoch {self.saved_epoch}")
        if self.is_server and not self._start_server():
            return
        self.gossip = Gossiping(self, self.id, self.starts, Random(f"{world.seed} {self.name} {self.process}"))  # noqa: S311
        self.agent = Agent(
            Worker(epoch=self.saved_epoch, boot=f"{self.name} {self.boots}"),
            Keeper(self.machine) if self.machine is not None else None,
        )
        for key, value in self.said().items():
            self.gossip.publish(key, value)
        self.gossip.set_members(self.members)
        if self.machine is not None:
            self._members_known(self.machine.answer(GetMembers()))
        self.after(world.heap.between(0, MEMBERS_EVERY_MS), self._keep_members_fresh)
        self.after(world.heap.between(0, KEEP_ALIVE_MS), self.connections.keep_alive)
        self.offers(0 if self.is_draining else self.slots)

    def _start_server(self) -> bool:
        """False when the disk, or the power, does not allow it now."""
        try:
            self.server = SimServer(self)
        except PowerCut:
            self.crash(loses_power=True)
            self.comes_back()
        except (MeshError, OSError) as error:
            self.world.checks.cannot_start(self, error)
            self.fails(str(error))
        return self.server is not None

    def count_start(self) -> None:
        """On its disk, synced before anybody hears of it."""
        self.starts += 1

    def said(self) -> dict[str, bytes]:
        """What this node tells of itself, whatever happens to its role."""
        told = {ADDRESS_FACT: f"{self.name}:{self.process}", OFFER_FACT: self.offer}
        return {key: codec.encode(value) for key, value in told.items()} | {f"blob/{blob}": b"" for blob in self.blobs}

    def offers(self, slots: int) -> None:
        self.handle(Offering(slots, self.offer, self.room))

    @property
    def voted_among(self) -> int:
        """How many voters its server's configuration has, or had when it stopped; 0: it is no voter itself."""
        if self.server is None:
            return self._voted_among
        engine = self.server.engine
        return len(engine.voters) if engine.is_voter else 0

    def crash(self, *, loses_power: bool = False) -> None:
        """The process is killed and its connections break, or its machine is gone without a word."""
        self.world.heap.note(f"{self.name}: {'loses power' if loses_power else 'crashes'}")
        self.is_alive = False
        self.has_power = not loses_power
        self.boots += loses_power
        if self.server is not None:
            self._voted_among = self.voted_among
        server, self.server = self.server, None
        self.agent = self.gossip = None
        if self.has_power:
            self.world.network.break_connections(self)
        self.runner.killed()
        if server is not None:
            server.die()
        if loses_power:
            self.disk.lose_power(self.world.heap.random)
            if self.world.tail is not None:
                self.segments.lose_power(self.world.heap.random)
        else:
            self.disk.be_killed()

    def fails(self, why: str) -> None:
        """The agent ends by itself, and whatever looks after it starts it again."""
        self.world.heap.note(f"{self.name}: stops, {why}")
        self.crash()
        self.comes_back()

    def loses_power_in_a_write(self, back_ms: tuple[float, float]) -> None:
        """In one of the next, that is: what was written and not synced may be torn then."""
        self._back_ms = back_ms
        self.disk.cut_in(self.world.heap.random.randrange(WRITES_MAX))

        def goes_anyway() -> None:
            self.crash(loses_power=True)
            self.comes_back()

        self.after(WRITES_WITHIN_MS, goes_anyway, of_machine=True)

    def comes_back(self, within_ms: tuple[float, float] | None = None) -> None:
        process, within_ms = self.process, within_ms or self._back_ms

        def start() -> None:
            if not self.is_alive and self.process == process and not self.is_gone:
                self.start()

        self.world.heap.after(self.world.heap.between(*within_ms), start)

    def heal(self) -> None:
        """Its disk and its clock are as they should be."""
        self.disk.cut_in(None)
        self.disk.take_sync_failure()
        self.disk.drain()
        self.segments.drain()
        self.disk_hangs_until_ms = 0
        self.wall_offset_ms = 0

    def freeze(self, for_ms: float, *, whole: bool) -> None:
        """The agent alone (stopped, swapped out), or the whole machine with its jobs (a suspended VM)."""
        self.agent_frozen_until_ms = self.world.heap.now_ms + int(for_ms)
        if whole:
            self.machine_frozen_until_ms = self.agent_frozen_until_ms
        self.world.heap.note(f"{self.name}: {'machine' if whole else 'agent'} frozen for {int(for_ms)} ms")

    def after(self, delay_ms: float, action: Callable[[], None], *, of_machine: bool = False) -> None:
        """In this process: never once it has crashed, later when it is frozen. `of_machine`: what goes on without the agent."""
        self._heap.after(delay_ms, partial(self._run, self.process, action, of_machine))

    def _run(self, process: int, action: Callable[[], None], of_machine: bool) -> None:
        # A method, not a closure that names itself: 30,000 of those a run were a third of its time to the collector.
        if not self.is_alive or self.process != process:
            return
        until_ms = self.machine_frozen_until_ms if of_machine else self.agent_frozen_until_ms
        if self._heap.now_ms < until_ms:
            self._heap.after(until_ms - self._heap.now_ms, partial(self._run, process, action, of_machine))
        else:
            action()

    # --- the shell ----------------------------------------------------------------------------------------------------

    def handle(self, event: AgentEvent) -> None:
        if self.agent is None:
            return
        view_end_ms = self.agent.worker.view_end_ms
        effects = self.agent.handle(event, self.clock_ms())
        if self.agent.worker.view_end_ms != view_end_ms:
            self.world.checks.view_moved(self)
        for effect in effects:
            self._perform(effect)
        timer_ms = self.agent.next_timer_ms()
        if timer_ms is not None and (self._timer_ms is None or timer_ms < self._timer_ms):
            self._timer_ms = timer_ms
            self.after((timer_ms - self.clock_ms()) / self._clock_rate + 1, lambda: self._timer(timer_ms))

    def _timer(self, timer_ms: int) -> None:
        if self._timer_ms == timer_ms:
            self._timer_ms = None
            self.handle(Tick(self.leading_term()))

    def leading_term(self) -> int | None:
        return None if self.server is None else self.server.leading_term()

    def leadership_changed(self, term: int | None) -> None:
        if term is not None and self.gossip is not None:
            self.gossip.publish(LEADER_FACT, codec.encode(term))
        self.handle(Tick(term))

    def applied_events(self, term: int | None) -> None:
        assert self.machine is not None
        events = self.machine.take_events()
        if events:
            self.handle(Applied(events, term))
        if any(isinstance(event, MembersChanged | Restored) for event in events):
            self._members_known(self.machine.answer(GetMembers()))

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
            case Start(lane, keys, spec, leash_ms):
                for key in keys:
                    world.checks.decided_to_start(self, key)
                self.runner.start(lane, keys, spec, leash_ms)
            case Recall(keys):
                recalled = self.runner.recall(keys)
                self.after(0, lambda: self.handle(Recalled(recalled)))
            case Stop(key, reason):
                self.runner.stop(key, reason)
            case MoveLeash(key, leash_ms):
                self.runner.move_leash(key, leash_ms)
            case AnswerRenew(call, answer):
                self._calls.pop(call)(answer)
            case SendNotice(node, notice):
                self._send_notice(node, notice)

    def _propose(self, command: AnyCommand) -> None:
        self.propose(command, lambda answer, _: self.handle(Proposed(command, answer)))

    def propose(self, command: AnyCommand, done: Callable[[AnyAnswer | None, int], None]) -> None:
        """At its own replica or by way of a voter. `done` is called once, at most 5 s later, with the answer and its
        position; None is "not committed" or "unknown"."""
        body = codec.encode(command)

        def answered(answer: bytes | None, _is_silent: bool = False) -> None:
            reply = None if answer is None else codec.decode(answer, ProposeReply)
            if reply is None or reply.answer is None:
                done(None, 0)
            else:
                done(codec.decode(reply.answer, AnyAnswer), reply.position)

        if self.has_replica:
            self._answer_propose(self.id, body, answered)
        else:
            self.call(self.some_voter().id, "log.propose", body, PROPOSE_TIMEOUT_MS, answered)

    def _answer_propose(self, origin: NodeId, body: bytes, reply: Reply) -> None:
        def resolved(result: ProposeResult) -> None:
            if isinstance(result, Committed):
                reply(codec.encode(ProposeReply(result.answer, result.position, False, "")))
            else:
                reply(None)

        if self.server is None or not self.has_replica:
            reply(None)
        else:
            self.server.propose(origin, body, resolved, timeout_ms=PROPOSE_TIMEOUT_MS)

    def query(self, query: AnyQuery, kind: type[V], done: Callable[[V | None, int], None]) -> None:
        """Linearizable. `done` comes with the view, or None for NotFound, and the position; never when nobody answers."""

        def answered(answer: bytes | None, _is_silent: bool = False) -> None:
            if answer is not None:
                view, position = codec.decode(answer, tuple[bytes, int])
                done(codec.decode(view, kind) if view else None, position)

        body = codec.encode(query)
        if self.has_replica:
            self._answer_read(body, answered)
        else:
            self.call(self.some_voter().id, "log.read", body, READ_TIMEOUT_MS, answered)

    def _answer_read(self, body: bytes, reply: Reply) -> None:
        def told(view: Any, position: int) -> None:
            reply(codec.encode((b"" if isinstance(view, NotFound) else codec.encode(view), position)))

        if self.server is None or not self.has_replica:
            reply(None)
        else:
            self.server.read(codec.decode(body, AnyQuery), told, timeout_ms=READ_TIMEOUT_MS)

    def _send_renew(self, epoch: int, sent_ms: int, renew: Renew) -> None:
        body = codec.encode(renew)
        voter = self.some_voter()

        def answered(answer: RenewAnswer) -> None:
            data = codec.encode(answer)
            self.world.network.send(
                voter, self, lambda: self.handle(RenewAnswered(epoch, sent_ms, codec.decode(data, RenewAnswer)))
            )

        def at_voter() -> None:
            leader = voter.server.leader if voter.server is not None else None
            if leader is not None:
                node = self.world.nodes[leader]
                self.world.network.send(voter, node, lambda: node.renew_arrived(self.id, body, answered))

        self.world.network.send(self, voter, at_voter)

    def renew_arrived(self, origin: NodeId, body: bytes, answered: Callable[[RenewAnswer], None]) -> None:
        renew = codec.decode(body, Renew)

        def checked(answer: RenewAnswer) -> None:
            if isinstance(answer, Granted):
                self.world.checks.decided_to_grant(self, origin, renew.epoch)
            answered(answer)

        call = len(self._calls) + self.world.heap.now_ms * 1000
        self._calls[call] = checked
        self.handle(RenewArrived(call, origin, renew, self.leading_term()))

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
            self.world.network.send(target, self, lambda: over(True))

        self.world.network.send(self, target, arrived)
        self.after(NOTICE_TIMEOUT_MS, lambda: over(False))

    # --- gossip -------------------------------------------------------------------------------------------------------

    def wake_at(self, clock_ms: int, action: Callable[[], None]) -> None:
        self.after((clock_ms - self.clock_ms()) / self._clock_rate + 1, action)

    def liveness_changed(self, node: NodeId, state: State) -> None:
        self.world.heap.note(f"{self.name}: calls {self.world.nodes[node].name} {state}")
        self.world.checks.liveness_changed(self, node, state)
        self.tell_gone(node)

    def tell_gone(self, node: NodeId) -> None:
        """Gossip and the own connection have to agree, whichever of them changed last."""
        self.handle(PeerGone(node, self.thinks_dead(node) and node not in self.connections))

    def thinks_dead(self, node: NodeId) -> bool:
        assert self.gossip is not None
        health = self.gossip.core.health(node)
        return health is not None and health.state is State.DEAD

    def call(self, peer: NodeId, method: str, body: bytes, timeout_ms: int, done: Done) -> None:
        target, process, is_over = self.world.nodes[peer], self.process, False

        def end(answer: bytes | None, is_silent: bool) -> None:
            nonlocal is_over
            if not is_over and self.process == process:
                is_over = True
                done(answer, is_silent)

        def reply(answer: bytes | None) -> None:
            self.world.network.send(target, self, lambda: end(answer, False))

        self.world.network.send(
            self,
            target,
            lambda: target.answer(method, self.id, body, reply),
            refused=lambda: end(None, False),
        )
        self.after(timeout_ms, lambda: end(None, True))

    def answer(self, method: str, peer: NodeId, body: bytes, reply: Reply) -> None:
        assert self.gossip is not None
        if method.startswith("gossip."):
            self.gossip.answer(method, peer, body, reply)
        elif method == "log.propose":
            self._answer_propose(peer, body, reply)
        elif method == "log.read":
            self._answer_read(body, reply)
        elif method == "history.get":
            archive = None if self.server is None else self.server.archive
            reply(None if archive is None else archive.give(body.decode()))
        else:
            reply(self.runner.answer(method, body))

    def some_voter(self) -> SimNode:
        """The likely leader, or any other that is not known to be dead, as far as gossip has told."""
        assert self.gossip is not None
        told = {node: codec.decode(term, int) for (node, _), term in self.gossip.core.facts.facts(LEADER_FACT).items()}
        servers = [node for node in self.world.nodes.values() if node.is_server and node.id in self.members]
        servers.sort(key=lambda node: (self.thinks_dead(node.id), -told.get(node.id, -1)))
        living = [node for node in servers if not self.thinks_dead(node.id)] or servers
        return living[0] if self.world.heap.chance(0.5) else self.world.heap.random.choice(living)

    def _members_known(self, view: MembersView) -> None:
        if not view.members or self.gossip is None or view.position < self._members_position:
            return
        self.members = tuple(row.member.node for row in view.members)
        self._members_position = view.position
        self.gossip.set_members(self.members)
        self._announce_members()

    def _announce_members(self) -> None:
        if self.gossip is not None and self.has_replica and self._announced != self._members_position:
            self._announced = self._members_position
            self.gossip.publish(MEMBERS_FACT, codec.encode(self._announced))

    def _keep_members_fresh(self) -> None:
        """Voters announce by gossip that members have changed; who has no replica asks one of them then."""
        assert self.gossip is not None
        self.after(MEMBERS_EVERY_MS, self._keep_members_fresh)
        self._announce_members()
        told = self.gossip.core.facts.facts(MEMBERS_FACT).values()
        newest = max((codec.decode(position, int) for position in told), default=0)
        if newest > self._members_position and not self.has_replica:
            self.query(GetMembers(), MembersView, lambda view, _: None if view is None else self._members_known(view))


def some_offer(random: Random, name: str, slots: int) -> Offer:
    """Machines differ in what they run, where they stand and what they have."""
    has_wasm = random.random() < 0.5
    labels = {"name": name, "zone": random.choice(("a", "b"))}
    if random.random() < 0.5:
        labels["ssd"] = ""
    return Offer(
        backends=(BackendOffer("process"), BackendOffer("wasm")) if has_wasm else (BackendOffer("process"),),
        resources=Resources(
            cpu_milli=1000 * slots,
            memory=random.choice((1, 2, 4)) << 30,
            custom=(("licence", 1),) if random.random() < 0.5 else (),
        ),
        labels=tuple(sorted(labels.items())),
        missing=() if has_wasm else (("wasm", "no engine here"),),
    )


def _fences(keys: tuple) -> str:  # type: ignore[type-arg]
    return ",".join(str(key.fence) for key in keys) or "nothing"
