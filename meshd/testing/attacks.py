"""Attacks aimed at Raft: power lost at the worst moments, leaders hunted one after another, bits that rot on the disk."""

from __future__ import annotations

from meshd import codec
from meshd.model import JobId
from meshd.raft.messages import node_of
from meshd.raft.state.commands import OpenSession
from meshd.testing.load import Client
from meshd.testing.nodes import SimNode
from meshd.testing.world import World

COMMANDS = 12
"""On their way when the power goes, within about the time that they take."""
WITHIN_MS = 60.0
AGAIN_MS = 500.0
"""Power that goes while nobody leads shows little."""
BLACKOUT_MS = (50.0, 3_000.0)
FOLLOWER_BACK_MS = (100.0, 500.0)
LEADER_BACK_MS = (3_000.0, 5_000.0)
"""Longer than the others need to elect."""

BLINK_MS = (5.0, 50.0)
HANGS_MS = 700
"""Longer than the one that blinked needs to be connected again, and not so long that the leader steps down."""
KILLED_AFTER_SNAPSHOT = 0.4
KILLED_WITHIN_MS = (1.0, 1_000.0)

CHAIN = 0.6
"""How often the next leader is hit as well, and so on …"""
CHAIN_WITHIN_MS = 40.0
"""… before it has told anybody much."""
ASKED_MS = 1_600
"""A leader that was hit is asked for so long: it should know that it leads no more."""
ASKED_EVERY_MS = 40

COPY_ASKS_MS = 1_000

BLOCK = 4096
ROT_DOWN_MS = (100.0, 3_000.0)
FLIPS = (1, 1, 3)


class Attacks:
    def __init__(self, world: World, client: Client) -> None:
        self.world, self._client = world, client
        self._is_hunting = False
        self._rotten: SimNode | None = None
        world.elected = self._elected
        world.got_snapshot = self._got_snapshot

    def _leader(self) -> SimNode | None:
        leading = [node for node in self.world.nodes.values() if node.leading_term() is not None]
        return max(leading, key=lambda node: node.leading_term() or 0, default=None)

    # --- power --------------------------------------------------------------------------------------------------------

    def cut_power(self) -> None:
        """Each follower is off in the middle of a write, the leader right after; then the followers go on without it."""
        heap, leader = self.world.heap, self._leader()
        if leader is None:
            heap.after(AGAIN_MS, self._cut_power_while_rough)
            return
        heap.note(f"power: goes at all servers, {leader.name} leads")
        self._pokes(leader)
        for node in self.world.nodes.values():
            if node.is_server and node.is_alive:
                at_ms = heap.between(WITHIN_MS / 2, WITHIN_MS)
                back_ms = LEADER_BACK_MS if node is leader else FOLLOWER_BACK_MS
                node.after(at_ms, lambda node=node, back_ms=back_ms: node.loses_power_in_a_write(back_ms))  # type: ignore[misc]

    def _cut_power_while_rough(self) -> None:
        if self.world.network.is_rough:
            self.cut_power()

    def black_out(self) -> None:
        """The power of the whole room goes."""
        heap, leader = self.world.heap, self._leader()
        heap.note("blackout")
        if leader is not None:
            self._pokes(leader)
        for node in self.world.nodes.values():
            if node.is_alive:
                node.after(WITHIN_MS / 2, lambda node=node: node.loses_power_in_a_write(BLACKOUT_MS))  # type: ignore[misc]

    def _pokes(self, leader: SimNode) -> None:
        for _ in range(COMMANDS):
            self.world.heap.after(self.world.heap.between(0, WITHIN_MS), lambda: self._client.pokes(leader))

    # --- leaders ------------------------------------------------------------------------------------------------------

    def hunt(self) -> None:
        leader = self._leader()
        if leader is not None:
            self._hit(leader)

    def _elected(self, node: SimNode) -> None:
        """One that has only just become leader."""
        heap = self.world.heap
        if self._is_hunting:
            self._is_hunting = False
            node.after(heap.between(0, CHAIN_WITHIN_MS), lambda: self._hit(node))

    def _hit(self, leader: SimNode) -> None:
        heap = self.world.heap
        if not leader.is_awake or leader.server is None:
            return
        self._is_hunting = heap.chance(CHAIN)
        self._asks(leader)
        for _ in range(COMMANDS // 2):
            heap.after(heap.between(100, ASKED_MS), self._client.pokes)
        if heap.chance(0.4):  # its successor need not wait for its silence, and it does not hear of it
            leader.server.hand_over()
            self.world.network.deafen(leader, heap.between(1_000, 3_000))
            return
        for _ in range(COMMANDS // 2):
            heap.after(heap.between(0, WITHIN_MS), lambda: self._client.pokes(leader))
        heap.after(heap.between(0, WITHIN_MS), lambda: self._strike(leader))

    def _strike(self, leader: SimNode) -> None:
        heap = self.world.heap
        if not leader.is_awake:
            return
        match heap.random.randrange(4):
            case 0:
                self._cut(leader)
            case 1:
                leader.freeze(heap.between(1_000, 3_000), whole=False)
            case 2:
                leader.loses_power_in_a_write(FOLLOWER_BACK_MS)
            case _:
                leader.crash()
                leader.comes_back(FOLLOWER_BACK_MS)

    def _cut(self, node: SimNode) -> None:
        self.world.network.cut_off(node, self.world.heap.between(1_000, 5_000), one_way=self.world.heap.chance(0.2))

    def _asks(self, leader: SimNode) -> None:
        """Whoever is connected to it does not know that another leads by now."""
        heap = self.world.heap
        jobs: list[JobId] = list(self._client.acknowledged)
        if jobs:
            for at_ms in range(0, ASKED_MS, ASKED_EVERY_MS):
                heap.after(at_ms, lambda: self._client.reads_at(leader, heap.random.choice(jobs)))

    # --- quick restarts -----------------------------------------------------------------------------------------------

    def blink(self) -> None:
        """A follower is killed with commands on their way, and is back before these are answered: followers' disks hang."""
        heap, leader = self.world.heap, self._leader()
        servers = [node for node in self.world.nodes.values() if node.has_replica and node is not leader]
        if leader is None or not servers:
            return
        for node in servers:
            node.disk_hangs_until_ms = heap.now_ms + HANGS_MS
        blinks = heap.random.choice(servers)
        self._pokes(blinks)
        blinks.after(WITHIN_MS, lambda: self._blink(blinks))

    def _blink(self, node: SimNode) -> None:
        heap = self.world.heap
        node.crash()
        node.comes_back(BLINK_MS)
        for _ in range(COMMANDS):
            heap.after(heap.between(BLINK_MS[1], HANGS_MS), lambda: self._client.pokes(node))

    def _got_snapshot(self, node: SimNode) -> None:
        """What it got must be on its disk."""
        heap = self.world.heap
        if self.world.network.is_rough and heap.chance(KILLED_AFTER_SNAPSHOT):
            node.after(heap.between(*KILLED_WITHIN_MS), lambda: self._killed(node))

    def _killed(self, node: SimNode) -> None:
        node.crash(loses_power=self.world.heap.chance(0.5))
        node.comes_back(FOLLOWER_BACK_MS)

    # --- copies -------------------------------------------------------------------------------------------------------

    def copy(self, node: SimNode) -> None:
        """A copy of its machine asks to be let in: from another boot, with nothing that runs there, and to be drained."""
        leader = self._leader()
        if leader is None or leader.server is None or node.agent is None:
            return
        epoch = node.agent.worker.epoch
        if (node.id, epoch) not in self.world.checks.oracle.sessions_live():
            return  # who has been gone for long enough is taken for its copy: protocol.md 4 cannot tell them apart
        self.world.heap.note(f"{node.name}: a copy of it asks to be let in")
        command = OpenSession(epoch + 1, (), 0, node.offer, boot=f"{node.name} elsewhere")
        leader.server.propose(node.id, codec.encode(command), lambda _: None, timeout_ms=COPY_ASKS_MS)

    # --- rot ----------------------------------------------------------------------------------------------------------

    def rot(self, node: SimNode) -> None:
        """A server is killed, and bits of what it has written turn over: of one at a time, and never of a sole voter.

        Nor while a voter is gone for good: three, of which one is dead and one in doubt, stop (protocol.md 9).
        """
        voters = self._voters()
        if self.has_rotten or not node.is_alive or len(voters) < 3 or any(voter.is_gone for voter in voters):
            return
        heap = self.world.heap
        self._rotten = node
        node.has_rotted = True
        node.crash(loses_power=heap.chance(0.5))
        names = [name for name in node.disk.names() if name.startswith(("journal-", "snapshot-")) and "." not in name]
        newest = max((name for name in names if name.startswith("journal-")), key=lambda name: (len(name), name))
        for _ in range(heap.random.choice(FLIPS)):
            name = heap.random.choice(names)
            # Without any header that can be read a server has no name and does not start again.
            begins = BLOCK if name == newest else 0
            # Most of a block is room that no frame needs: there it would not matter.
            places = [place for place, byte in enumerate(node.disk.read(name)) if byte and place >= begins]
            if places:
                node.disk.flip(name, heap.random.choice(places) * 8 + heap.random.randrange(8))
        heap.note(f"{node.name}: its disk rots")
        node.comes_back(ROT_DOWN_MS)

    def spoil_history(self, node: SimNode) -> None:
        """Segments are gone after a restart, or bits of one turn over while it runs."""
        heap, names = self.world.heap, node.segments.names()
        if not names or node.is_gone:
            return
        node.has_lost_history = True
        if heap.chance(0.5) and node.is_alive:
            node.crash()
            for name in node.segments.names():
                node.segments.remove(name)
            node.segments.sync_directory()
            heap.note(f"{node.name}: loses its history")
            node.comes_back(ROT_DOWN_MS)
            return
        name = heap.random.choice(names)
        node.segments.flip(name, heap.random.randrange(max(1, 8 * len(node.segments.read(name)))))
        heap.note(f"{node.name}: a bit of segment {name[:8]} turns over")

    @property
    def has_rotten(self) -> bool:
        """There is one that is not whole again."""
        node = self._rotten
        return node is not None and (node.server is None or node.server.engine.is_in_doubt)

    def _voters(self) -> list[SimNode]:
        leader = self._leader()
        if leader is None or leader.server is None:
            return []
        return [self.world.nodes[node_of(voter)] for voter in leader.server.engine.voters]
