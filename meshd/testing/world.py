"""A whole mesh in one heap: real agents, real gossip, real replicated queue; a modelled log, network, machines and clients.

A seed is a complete description of a run. While `faults` lasts, machines crash and come
back (also within two seconds), freeze, lose their network; messages are lost, doubled
and late; then everything heals, and whatever was acknowledged must finish. One machine
may be gone for good; an operator removes it then.
"""

from __future__ import annotations

from meshd.model import Member, NodeId, Role
from meshd.raft.commands import AnyCommand, CreateInvite, Found, Join
from meshd.testing.checks import Checks
from meshd.testing.faults import Faults
from meshd.testing.heap import Heap
from meshd.testing.modelled_log import ModelledLog
from meshd.testing.network import Network
from meshd.testing.nodes import SimNode

WALL_START_MS = 1_790_000_000_000


class World:
    def __init__(self, seed: int, faults: Faults) -> None:
        self.seed, self.faults = seed, faults
        self.heap = Heap(seed)
        self.nodes: dict[NodeId, SimNode] = {}
        self.network = Network(self.heap, faults, self.nodes)
        self.checks = Checks(self.heap, self)
        self.log = ModelledLog(self.heap, self, self.checks)

    def wall_ms(self) -> int:
        return WALL_START_MS + self.heap.now_ms

    # --- founding -----------------------------------------------------------------------------------------------------

    def found(self, *, servers: int, workers: int) -> None:
        """Members are already in the log when the run begins; joining has its own tests."""
        rng = self.heap.random
        for k in range(servers + workers):
            node = SimNode(self, f"n{k}", is_server=k < servers, slots=rng.randint(1, 4))
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
            node.members = tuple(self.nodes)
            node.start()


def _member(node: SimNode) -> Member:
    roles = (Role.SERVER, Role.WORKER) if node.is_server else (Role.WORKER,)
    return Member(node.id, node.name, roles)
