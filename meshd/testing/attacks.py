"""Attacks aimed at Raft: power lost at the worst moments, leaders hunted one after another, bits that rot on the disk."""

from __future__ import annotations

from meshd.model import JobId
from meshd.testing.load import Client
from meshd.testing.nodes import SimNode
from meshd.testing.world import World

COMMANDS = 12
"""On their way when the power goes, within about the time that they take."""
WITHIN_MS = 60.0
FOLLOWER_BACK_MS = (100.0, 500.0)
LEADER_BACK_MS = (3_000.0, 5_000.0)
"""Longer than the others need to elect."""

CHAIN = 0.6
"""How often the next leader is hit as well, and so on …"""
CHAIN_WITHIN_MS = 40.0
"""… before it has told anybody much."""
ASKED_MS = 1_600
"""A leader that was hit is asked for so long: it should know that it leads no more."""
ASKED_EVERY_MS = 40

BLOCK = 4096
ROT_DOWN_MS = (100.0, 3_000.0)
FLIPS = (1, 1, 3)


class Attacks:
    def __init__(self, world: World, client: Client) -> None:
        self.world, self._client = world, client
        self._is_hunting = False
        self._rotten: SimNode | None = None
        world.elected = self._elected

    def _leader(self) -> SimNode | None:
        leading = [node for node in self.world.nodes.values() if node.leading_term() is not None]
        return max(leading, key=lambda node: node.leading_term() or 0, default=None)

    # --- power --------------------------------------------------------------------------------------------------------

    def cut_power(self) -> None:
        """Each follower is off in the middle of a write, the leader right after; then the followers go on without it."""
        heap, leader = self.world.heap, self._leader()
        if leader is None:
            return
        heap.note(f"power: goes at all servers, {leader.name} leads")
        for _ in range(COMMANDS):
            heap.after(heap.between(0, WITHIN_MS), lambda: self._client.pokes(leader))
        for node in self.world.nodes.values():
            if node.is_server and node.is_alive:
                at_ms = heap.between(WITHIN_MS / 2, WITHIN_MS)
                back_ms = LEADER_BACK_MS if node is leader else FOLLOWER_BACK_MS
                node.after(at_ms, lambda node=node, back_ms=back_ms: self._off(node, back_ms))  # type: ignore[misc]

    def _off(self, node: SimNode, back_ms: tuple[float, float]) -> None:
        node.crash(loses_power=True)
        node.comes_back(back_ms)

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
                self._off(leader, FOLLOWER_BACK_MS)
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

    # --- rot ----------------------------------------------------------------------------------------------------------

    def rot(self, node: SimNode) -> None:
        """A server is killed, and bits of what it has written turn over: of one at a time, and never of a sole voter."""
        if self._rotten is not None and not self._is_whole(self._rotten):
            return
        if not node.is_alive or node.is_gone or self._voters() < 3:
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

    @staticmethod
    def _is_whole(node: SimNode) -> bool:
        return node.server is not None and not node.server.engine.is_in_doubt

    def _voters(self) -> int:
        leader = self._leader()
        return 0 if leader is None or leader.server is None else len(leader.server.engine.voters)
