"""Servers of one log in one process: virtual time, a seeded heap of events, disks that lose power, links that lose frames.

Every server turns the real `Server` on the real journal and snapshots. What is checked:
one command for each index, one leader for each term, what was acknowledged is there, what
was refused is not, each command is applied once, replicas are equal, all of it converges.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Collection
from itertools import count
from random import Random

from blake3 import blake3

from meshd import codec
from meshd.errors import Busy, Corrupt, StartRefused
from meshd.model import NodeId
from meshd.ports import Committed, NotCommitted, ProposeResult
from meshd.raft.agreement import Diverged
from meshd.raft.messages import AnyMessage, VoterId, node_of
from meshd.raft.server import Server
from meshd.raft.settings import RaftSettings
from meshd.raft.state.commands import Batch
from meshd.raft.state.lineage import Lineage
from meshd.raft.storage.opening import open_log
from meshd.raft.storage.recovery import Kept, batch_in, begin_epoch
from meshd.raft.storage.segments import JournalSizes
from meshd.raft.surroundings import Clocks, Down, Incident, Mail, Up
from meshd.raft.turn import Turns
from meshd.raft.wire import BUFFER_BYTES_MAX
from meshd.testing.raft_disk import BYTES_TOTAL, MemoryDisk, PowerCut

SIZES = JournalSizes(segment=256 << 10, step=16 << 10, reserve=32 << 10, reserves=4, release=16 << 10)
REMEMBERED_BYTES = 32
"""Of each command; the rest of a long one is weight on the links."""
CREEP_S = 2e-6
"""Time goes on a little with each look at the clock, as it does outside."""


class Violation(AssertionError):
    pass


class Machine:
    """Remembers every command in order; a twin is a bug that it shows."""

    def __init__(self, world: RaftWorld, node: NodeId) -> None:
        self.wall_ms = 0
        self.elapsed_ms = 0
        self.seen: list[bytes] = []
        self.is_wrong_once = False
        """The next entry leads to another state here than elsewhere."""
        self._world = world
        self._node = node

    def apply(self, index: int, batch: bytes) -> list[bytes]:
        entry = codec.decode(batch, Batch)
        if entry.wall_ms < self.wall_ms:
            raise Violation(f"time went back at {index}")
        self.wall_ms = entry.wall_ms
        self.elapsed_ms += entry.elapsed_ms + self.is_wrong_once
        self.is_wrong_once = False
        self._world.applied(self._node, index, batch)
        answers = []
        for command in entry.commands:
            self.seen.append(bytes(command.body)[:REMEMBERED_BYTES])
            answers.append(codec.encode(len(self.seen)))
        return answers

    def digest(self) -> str:
        return blake3(codec.encode((self.wall_ms, self.elapsed_ms, self.seen))).hexdigest()

    def capture(self) -> Callable[[], bytes]:
        state = (self.wall_ms, self.elapsed_ms, tuple(self.seen), bytes(self._world.ballast_bytes))
        return lambda: codec.encode(state)

    def unpack(self, data: bytes) -> Callable[[], None]:
        wall_ms, elapsed_ms, seen, _ = codec.decode(data, tuple[int, int, list[bytes], bytes], bytes_max=1 << 30)
        return lambda: self.__dict__.update(wall_ms=wall_ms, elapsed_ms=elapsed_ms, seen=seen)

    def next_timer_ms(self) -> int | None:
        return None


class Node:
    """One server: a process that dies and starts again on the same disk."""

    def __init__(self, world: RaftWorld, name: NodeId) -> None:
        self.world = world
        self.name = name
        self.disk = MemoryDisk(bytes_total=world.disk_bytes)
        self.life = 0
        self.server: Server | None = None
        self.machine: Machine
        self.inbox: deque[Incident] = deque()
        self.staged: list[tuple[VoterId, AnyMessage]] = []
        self.is_paused = False
        self.due_at = float("inf")
        self.reached: set[NodeId] = set()

    # --- Links

    def send(self, peer: VoterId, message: AnyMessage) -> bool:
        if peer not in self.world.linked(self.name) or self.world.is_full(self.name, node_of(peer)):
            return False
        self.staged.append((peer, message))
        return True

    def take(self) -> Incident | None:
        return self.inbox.popleft() if self.inbox else None

    def connected(self) -> list[VoterId]:
        return self.world.linked(self.name)

    def reach(self, peers: Collection[NodeId]) -> None:
        self.reached = set(peers)

    # --- life

    @property
    def id(self) -> VoterId:
        assert self.server is not None
        return self.server.engine.me

    def start(self) -> None:
        world = self.world
        self.life += 1
        random = f"{world.random.getrandbits(64):016x}"
        self.journal, image = open_log(
            self.disk,
            mesh="m",
            lineage=world.lineage,
            me=self.name,
            is_founding=self.life == 1 and self.name == world.founder,
            random=random,
            incarnation=f"{world.random.getrandbits(32):08x}",
            sizes=SIZES,
        )
        self.machine = Machine(world, self.name)
        if image is not None:
            self.machine.unpack(image.state)()
        self.inbox.clear()
        self.staged.clear()
        self.server = Server(
            node=self.name,
            journal=self.journal,
            image=image,
            machine=self.machine,
            links=self,
            servers=lambda: world.servers,
            draining=lambda: world.draining,
            zones=lambda: world.zones,
            settings=world.settings,
            clocks=Clocks(world.creeping_now, lambda: int(world.now * 1000) + 10**12, lambda: False),
            random=world.random,
            packed=lambda: self.turns.packed(),
            report=world.report,
            adds_work=lambda command: codec.unpack(command)[:3] == b"new",
        )
        self.turns = Turns(self.server, self.journal, self.disk, "m", self.machine, self.flush)
        world.connect(self)
        world.at(0.001, lambda: self.turn(self.life))

    def turn(self, life: int) -> None:
        if self.server is None or life != self.life:
            return
        if self.is_paused:
            self.world.at(0.05, lambda: self.turn(life))
            return
        try:
            self._turn()
        except PowerCut:
            self.world.die(self, has_power=False)
        except Busy:
            self.world.counts["stopped for a full disk"] += 1
            self.world.die(self, has_power=True)
            self.world.at(1.0, lambda: self.world.revive(self.name))
        except Diverged:
            self.world.counts["diverged"] += 1
            self.world.die(self, has_power=True)

    def _turn(self) -> None:
        for work in self.turns.turn():
            work()
        if (beside := self.turns.beside()) is not None:
            beside()
        self.world.check(self)
        self.schedule()

    def flush(self) -> None:
        staged, self.staged = self.staged, []
        for peer, message in staged:
            self.world.carry(self, peer, message)

    def schedule(self) -> None:
        """The next turn: at once when there is something to do, else when the next timer is due."""
        assert self.server is not None
        if self.server.has_work or self.inbox or self.turns.has_finished:
            due = self.world.now + 0.0005
        else:
            due = self.server.next_due_s() or float("inf")
        self.due_at = due
        if due != float("inf"):
            life = self.life
            self.world.at(max(0.0, due - self.world.now), lambda: self.turn_if_due(life, due))

    def turn_if_due(self, life: int, due: float) -> None:
        if self.due_at == due:
            self.turn(life)

    def receive(self, incident: Incident) -> None:
        self.inbox.append(incident)
        due = self.world.now + 0.0002
        if self.due_at > due:
            self.due_at = due
            life = self.life
            self.world.at(0.0002, lambda: self.turn_if_due(life, due))


class RaftWorld:
    def __init__(
        self,
        seed: int,
        servers: int = 3,
        *,
        delay_s: tuple[float, float] = (0.001, 0.03),
        loss: float = 0.0,
        settings: RaftSettings | None = None,
        payload: int = 0,
        ballast_bytes: int = 0,
        disk_bytes: int = BYTES_TOTAL,
    ) -> None:
        """`payload` bytes are added to every command under load, `ballast_bytes` to every snapshot."""
        self.disk_bytes = disk_bytes
        self.payload = bytes(k % 251 + 1 for k in range(payload))
        self.ballast_bytes = ballast_bytes
        self.random = Random(seed)
        self.now = 1000.0
        self.delay_s = delay_s
        self.loss = loss
        self.settings = settings or RaftSettings()
        self.founder = NodeId("n0")
        self.lineage: Lineage = ()
        self.discarded: set[NodeId] = set()
        self.names = [NodeId(f"n{k}") for k in range(servers)]
        self.servers = list(self.names)
        self.draining: list[NodeId] = []
        self.zones: dict[NodeId, str] = {}
        self.nodes = {name: Node(self, name) for name in self.names}
        self.cuts: set[tuple[NodeId, NodeId]] = set()
        self.history: dict[int, bytes] = {}
        self.leaders: dict[int, VoterId] = {}
        self.outcomes: dict[bytes, ProposeResult | None] = {}
        self.counts: Counter[str] = Counter()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self.bandwidth: dict[tuple[NodeId, NodeId], float] = {}
        """Bytes a second from one to the other, where that is bounded; frames wait in line for it."""
        self._free_at: dict[tuple[NodeId, NodeId], float] = {}
        self._arrival: dict[tuple[NodeId, NodeId], float] = {}
        self._streams: Counter[tuple[NodeId, NodeId]] = Counter()
        for node in self.nodes.values():
            node.start()

    # --- time

    def creeping_now(self) -> float:
        self.now += CREEP_S
        return self.now

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), action))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._heap and self._heap[0][0] <= until:
            at, _, action = heapq.heappop(self._heap)
            self.now = max(self.now, at)
            action()
        self.now = max(self.now, until)

    def run_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        until = self.now + seconds
        while not condition():
            if self.now > until:
                raise Violation(f"not within {seconds} s: {what}\n{self.picture()}")
            self.run(0.1)

    # --- links

    def is_linked(self, one: NodeId, other: NodeId) -> bool:
        """A stream from one to the other; a cut may be one-way."""
        return (
            (one, other) not in self.cuts
            and self.nodes[one].server is not None
            and self.nodes[other].server is not None
        )

    def linked(self, name: NodeId) -> list[VoterId]:
        return [self.nodes[other].id for other in self.nodes if other != name and self.is_linked(name, other)]

    def connect(self, node: Node) -> None:
        for other in self.nodes.values():
            if other is not node and other.server is not None:
                self._announce(node.name, other.name)
                self._announce(other.name, node.name)

    def _announce(self, one: NodeId, other: NodeId) -> None:
        self._streams[one, other] += 1
        if self.is_linked(one, other):
            self.nodes[one].receive(Up(self.nodes[other].id))

    def cut(self, one: NodeId, other: NodeId) -> None:
        if (one, other) not in self.cuts:
            was_linked = self.is_linked(one, other)
            self.cuts.add((one, other))
            self._streams[one, other] += 1
            if was_linked:
                self.nodes[one].receive(Down(self.nodes[other].id))

    def heal(self, one: NodeId, other: NodeId) -> None:
        if (one, other) in self.cuts:
            self.cuts.discard((one, other))
            self._announce(one, other)

    def is_full(self, one: NodeId, other: NodeId) -> bool:
        """The wire's buffer to a slow peer takes no more."""
        bandwidth = self.bandwidth.get((one, other))
        return bandwidth is not None and (self._free_at.get((one, other), 0) - self.now) * bandwidth > BUFFER_BYTES_MAX

    def carry(self, sender: Node, peer: VoterId, message: AnyMessage) -> None:
        """As bytes, first in first out in each direction, unless it is lost on the way."""
        target = node_of(peer)
        if not self.is_linked(sender.name, target) or self.nodes[target].id != peer:
            return
        self.counts[type(message).__name__] += 1
        if self.random.random() < self.loss:
            return
        pair = (sender.name, target)
        body = codec.encode(message)
        leaves = self.now
        if (bandwidth := self.bandwidth.get(pair)) is not None:
            leaves = self._free_at[pair] = max(self.now, self._free_at.get(pair, 0.0)) + len(body) / bandwidth
        arrival = max(leaves + self.random.uniform(*self.delay_s), self._arrival.get(pair, 0.0) + 1e-6)
        self._arrival[pair] = arrival
        stream, me = self._streams[pair], sender.id
        self.at(arrival - self.now, lambda: self._arrive(pair, stream, Mail(me, codec.decode(body, AnyMessage))))

    def _arrive(self, pair: tuple[NodeId, NodeId], stream: int, mail: Mail) -> None:
        if self._streams[pair] == stream and self.nodes[pair[1]].server is not None:
            self.nodes[pair[1]].receive(mail)

    # --- faults

    def die(self, node: Node, *, has_power: bool) -> None:
        assert node.server is not None
        gone = node.id
        for other in self.nodes.values():
            if other is not node and other.server is not None:
                if self.is_linked(other.name, node.name):
                    other.receive(Down(gone))
                self._streams[other.name, node.name] += 1
                # What its kernel has taken may still arrive after its death.
                if self.random.random() < 0.3:
                    self._streams[node.name, other.name] += 1
        node.server = None
        node.life += 1
        node.due_at = float("inf")
        if has_power:
            node.disk.be_killed()
        else:
            node.disk.lose_power(self.random)
        self.counts["deaths"] += 1

    def crash(self, name: NodeId, down_s: float) -> None:
        """kill -9, or the power goes now or within the next few disk operations."""
        node = self.nodes[name]
        if node.server is None:
            return
        match self.random.randrange(3):
            case 0:
                self.die(node, has_power=True)
            case 1:
                self.die(node, has_power=False)
            case _:
                node.disk.cut_in(self.random.randrange(6))
                life = node.life
                self.at(0.5, lambda: node.life == life and node.server and self.die(node, has_power=False))
        self.at(down_s + 0.5, lambda: self.revive(name))

    def blackout(self) -> None:
        """The power of the whole room goes, at each machine in the middle of what it was doing."""
        for name, node in self.nodes.items():
            if node.server is not None:
                node.disk.cut_in(self.random.randrange(3))
                life = node.life
                self.at(0.05, lambda n=node, life=life: n.life == life and n.server and self.die(n, has_power=False))
                self.at(0.1 + self.random.uniform(0, 1), lambda name=name: self.revive(name))

    def revive(self, name: NodeId) -> None:
        node = self.nodes[name]
        if name in self.discarded:
            return
        if node.server is None:
            try:
                node.start()
            except PowerCut:
                node.server = None
                node.disk.lose_power(self.random)
                self.at(0.5, lambda: self.revive(name))
            except StartRefused:
                self.counts["refused for a full disk"] += 1
                self.at(1.0, lambda: self.revive(name))

    def add_server(self) -> NodeId:
        name = NodeId(f"n{len(self.names)}")
        self.names.append(name)
        self.servers.append(name)
        self.nodes[name] = Node(self, name)
        self.nodes[name].start()
        return name

    def recover(self, name: NodeId) -> int:
        """All servers are dead, and but for this one gone for good; returns where its log ends. What came after it may be lost."""
        assert all(node.server is None for node in self.nodes.values())
        journal, image = open_log(
            self.nodes[name].disk, mesh="m", lineage=self.lineage, me=name, is_founding=False, random="recover",
            incarnation="", sizes=SIZES, is_recovery=True,
        )  # fmt: skip
        machine = Machine(self, name)
        if image is not None:
            machine.unpack(image.state)()
        for command, index, _ in journal[1:]:
            if (batch := batch_in(command)) is not None:
                machine.apply(index, batch)
        kept = Kept(journal, machine, ())  # type: ignore[arg-type]
        _, end = kept.newest
        self.lineage = begin_epoch(kept, me=name, random=f"r{len(self.lineage)}", wall_ms=0)
        self.discarded = {*self.names} - {name}
        self.servers, self.leaders = [name], {}
        self.history = {index: batch for index, batch in self.history.items() if index <= end}
        for command, outcome in list(self.outcomes.items()):
            if isinstance(outcome, Committed) and outcome.position > end:
                del self.outcomes[command]
        self.revive(name)
        return end

    # --- load

    def propose(self, name: NodeId, command: bytes) -> None:
        server = self.nodes[name].server
        if server is None:
            return
        body = codec.encode(command)
        kept = body[:REMEMBERED_BYTES]
        self.outcomes[kept] = None

        def resolve(result: ProposeResult) -> None:
            self.outcomes[kept] = result
            self.counts[type(result).__name__] += 1

        if server.submit(name, body, resolve) is None:
            resolve(NotCommitted("no server leads"))
        else:
            node = self.nodes[name]
            if node.due_at > self.now:
                node.due_at = self.now
                life = node.life
                self.at(0.0, lambda: node.turn_if_due(life, node.due_at))

    # --- checks

    def report(self, event: str, fields: dict[str, object]) -> None:
        self.counts[event] += 1
        if event == "raft.bug":
            raise Violation(f"{event} {fields}")

    def applied(self, name: NodeId, index: int, batch: bytes) -> None:
        if self.history.setdefault(index, batch) != batch:
            raise Violation(f"{name} applied another command at index {index}")

    def check(self, node: Node) -> None:
        assert node.server is not None
        engine = node.server.engine
        if engine.is_leader and self.leaders.setdefault(engine.term, engine.me) != engine.me:
            raise Violation(f"two leaders in term {engine.term}: {self.leaders[engine.term]} and {engine.me}")

    def leader(self) -> Node | None:
        leading = [node for node in self.nodes.values() if node.server is not None and node.server.engine.leads()]
        return max(leading, key=lambda node: node.server.engine.term, default=None)  # type: ignore[union-attr]

    def voters(self) -> list[NodeId]:
        leader = self.leader()
        assert leader is not None and leader.server is not None
        return [node_of(voter) for voter in leader.server.engine.voters]

    def settle(self, seconds: float = 60.0) -> None:
        """Faults are over: everybody comes back, one leads, the voters are equal. Then the last checks."""
        self.loss = 0.0
        for one, other in list(self.cuts):
            self.heal(one, other)
        for node in self.nodes.values():
            node.is_paused = False
            node.disk.cut_in(None)
            if node.name in self.servers:
                self.revive(node.name)

        def is_equal() -> bool:
            leader = self.leader()
            if leader is None or leader.server is None:
                return False
            engine = leader.server.engine
            voters = [self.nodes[node_of(voter)] for voter in engine.voters]
            return engine.applied == engine.last and all(
                voter.server is not None
                and voter.server.engine.applied == engine.last
                and not voter.server.engine.is_in_doubt
                for voter in voters
            )

        self.run_until(is_equal, seconds, "replicas equal after the faults are over")
        self.finish()

    def finish(self) -> None:
        replicas = [self.nodes[name].machine for name in self.voters()]
        seen = replicas[0].seen
        if any((replica.seen, replica.wall_ms) != (seen, replicas[0].wall_ms) for replica in replicas):
            raise Violation("replicas differ")
        times = Counter(seen)
        for command, outcome in self.outcomes.items():
            if isinstance(outcome, Committed) and times[command] != 1:
                raise Violation(f"acknowledged {command!r} is there {times[command]} times")
            if isinstance(outcome, NotCommitted) and times[command]:
                raise Violation(f"refused {command!r} is there")
            if times[command] > 1:
                raise Violation(f"{command!r} was applied twice")

    def picture(self) -> str:
        lines = []
        for node in self.nodes.values():
            if node.server is None:
                lines.append(f"{node.name} down")
                continue
            engine = node.server.engine
            lines.append(
                f"{engine.me} term {engine.term} leader {engine.leader} state {engine.role} first {engine.first}"
                f" applied {engine.applied} commit {engine.commit} last {engine.last} voters {engine.voters}"
                f" leads {engine.leads()} progress {engine.progress}"
            )
        return "\n".join([*lines, f"cuts {self.cuts}", f"{dict(self.counts)}"])


def rough_weather(world: RaftWorld, seconds: float, *, does_change_servers: bool = False) -> None:
    """Load at every server and, once a second or so, a crash, a cut, an isolation or a pause."""
    random, end, numbers = world.random, world.now + seconds, count()

    def load() -> None:
        if world.now < end:
            for _ in range(random.choice([1, 1, 1, 4, 12])):
                world.propose(random.choice(world.servers), b"c%06d" % next(numbers) + world.payload)
            world.at(random.expovariate(20), load)

    def fault() -> None:
        if world.now >= end:
            return
        name = random.choice(world.servers)
        leader = world.leader()
        if leader is not None and random.random() < 0.4:
            name = leader.name
        others = [other for other in world.nodes if other != name]
        match random.randrange(7):
            case 0:  # one way only
                other = random.choice(others)
                world.cut(name, other)
                world.at(random.uniform(0.05, 3), lambda: world.heal(name, other))
            case 1:
                pairs = [pair for other in others for pair in ((name, other), (other, name))]
                for pair in pairs:
                    world.cut(*pair)
                world.at(random.uniform(0.3, 6), lambda: [world.heal(*pair) for pair in pairs])
            case 2 | 3:
                world.crash(name, random.uniform(0.0, 4))
            case 4:
                node = world.nodes[name]
                node.is_paused = True
                world.at(random.uniform(0.1, 2.5), lambda: setattr(node, "is_paused", False))
            case 5:
                world.blackout()
            case _:
                world.loss = random.choice([0.0, 0.02, 0.1])
        world.at(random.expovariate(1.0), fault)

    def change() -> None:
        if world.now >= end:
            return
        if len(world.servers) < 5 or (len(world.servers) < 8 and random.random() < 0.6):
            world.zones[world.add_server()] = "xyz"[len(world.names) % 3]
        else:
            leader = world.leader()
            gone = random.choice([name for name in world.servers if leader is None or name != leader.name])
            world.servers.remove(gone)
        world.at(random.uniform(1, 5), change)

    load()
    world.at(1.0, fault)
    if does_change_servers:
        world.at(1.0, change)
    world.run(seconds)


def power_cuts(world: RaftWorld, seconds: float) -> None:
    """Followers lose power in the middle of a write, the leader a moment later; it is away while they are back."""
    random, end, numbers = world.random, world.now + seconds, count()

    def load() -> None:
        if world.now < end:
            world.propose(random.choice(world.servers), b"p%06d" % next(numbers) + world.payload)
            world.at(random.expovariate(200), load)

    def cut() -> None:
        leader = world.leader()
        if world.now < end and leader is not None:
            for name, node in world.nodes.items():
                if node is leader:
                    world.at(0.04, lambda: leader.server and world.die(leader, has_power=False))
                    world.at(4.0, lambda: world.revive(leader.name))
                elif node.server is not None:
                    node.disk.cut_in(random.randrange(4))
                    world.at(0.3, lambda name=name: world.revive(name))
        if world.now < end:
            world.at(random.uniform(4.5, 6), cut)

    load()
    world.at(1.0, cut)
    world.run(seconds)


__all__ = ["Corrupt", "RaftWorld", "Violation", "power_cuts", "rough_weather"]
