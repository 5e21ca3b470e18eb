"""A whole mesh in one heap: real agents, real gossip, real Raft; modelled disks, network, clocks, machines and clients.

A seed is a complete description of a run. While `faults` lasts, machines crash and come
back (also within two seconds), freeze, lose their network; messages are lost, doubled
and late; then everything heals, and whatever was acknowledged must finish. One machine
may be gone for good; an operator removes it then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from meshd.model import Member, NodeId, Role
from meshd.raft.messages import node_of
from meshd.raft.settings import RaftSettings
from meshd.raft.state.commands import AnyCommand, CreateInvite, Found, Join
from meshd.raft.state.history import Tail
from meshd.raft.storage.segments import JournalSizes
from meshd.raft.voters import voters_wanted
from meshd.testing.checks import Checks
from meshd.testing.faults import Faults
from meshd.testing.heap import Heap
from meshd.testing.network import Network
from meshd.testing.nodes import SimNode
from meshd.testing.servers import MESH

WALL_START_MS = 1_790_000_000_000
SECRET = "a" * 64
FOUNDING_MS = 10_000
"""For each step."""


SETTINGS = RaftSettings(
    retain_entries=8,
    apply_slice_s=0.0,
    checkpoint_entries=16,
    journal=JournalSizes(segment=256 << 10, step=64 << 10, reserve=64 << 10, reserves=4, release=64 << 10),
)
"""Small, so that a run takes many snapshots and segments, and a server that was away needs a snapshot."""


class World:
    def __init__(self, seed: int, faults: Faults, tail: Tail | None = None) -> None:
        """`tail`: what stays in the core of finished jobs; None: all of them, and there is no history."""
        self.seed, self.faults, self.tail = seed, faults, tail
        self.heap = Heap(seed)
        self.began_ms = 0
        self.nodes: dict[NodeId, SimNode] = {}
        self.network = Network(self.heap, faults, self.nodes)
        self.checks = Checks(self.heap, self)
        self.settings = replace(SETTINGS, append_entries=faults.entries_at_once)
        self.elected: Callable[[SimNode], None] = lambda node: None
        """Told of every new leader, in the turn in which it has become one."""
        self.got_snapshot: Callable[[SimNode], None] = lambda node: None
        """Told of every server that goes on from a leader's snapshot."""

    def wall_ms(self) -> int:
        return WALL_START_MS + self.heap.now_ms

    # --- founding -----------------------------------------------------------------------------------------------------

    def found(self, *, servers: int, workers: int) -> None:
        """One founds, all others are invited, and as many vote as shall; joining itself has its own tests."""
        rng = self.heap.random
        for k in range(servers + workers):
            node = SimNode(self, f"n{k}", is_server=k < servers, slots=rng.randint(1, 4), is_founder=k == 0)
            self.nodes[node.id] = node
        first, *others = self.nodes.values()
        first.start()
        self._until(lambda: first.leading_term() is not None, "the founder leads")
        commands: list[AnyCommand] = [
            Found(MESH, _member(first)),
            CreateInvite(SECRET, (Role.SERVER, Role.WORKER), 100, 86_400_000),
            *(self.join(other) for other in others),
        ]
        for command in commands:
            first.propose(command, lambda answer, position: None)
        self._until(lambda: first.machine is not None and len(first.machine.members()) == len(self.nodes), "all joined")
        for node in self.nodes.values():
            node.members = tuple(self.nodes)
        for node in others:
            node.start()
        self._until(lambda: len(self.voters()) == voters_wanted(servers), "enough vote")
        self.began_ms = self.network.began_ms = self.heap.now_ms
        self.heap.note("founded")

    def stranger(self, *, is_server: bool) -> SimNode:
        """Who is no member yet."""
        name = f"n{len(self.nodes)}"
        node = self.nodes[NodeId(f"node-{name}")] = SimNode(
            self, name, is_server=is_server, slots=self.heap.random.randint(1, 4)
        )
        return node

    def join(self, node: SimNode) -> Join:
        return Join(SECRET, _member(node))

    def voters(self) -> list[NodeId]:
        """As the newest leader has it."""
        leading = [
            node.server.engine for node in self.nodes.values() if node.server is not None and node.leading_term()
        ]
        newest = max(leading, key=lambda engine: engine.term, default=None)
        return [] if newest is None else [node_of(voter) for voter in newest.voters]

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        self.heap.run(self.heap.now_ms + FOUNDING_MS, is_over=condition, looks_often=True)
        if not condition():
            self.checks.breach("a mesh forms", f"not within {FOUNDING_MS} ms: {what}")


def _member(node: SimNode) -> Member:
    roles = (Role.SERVER, Role.WORKER) if node.is_server else (Role.WORKER,)
    return Member(node.id, node.name, roles)
