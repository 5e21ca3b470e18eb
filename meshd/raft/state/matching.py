"""Which waiting job meets which free slot, found without looking at all jobs times all nodes.

Jobs that ask for the same are one `Kind`; each kind has its jobs in line by priority,
then age. Nodes with a free slot stand in one list, the one that was leased to longest
ago first. Between two commands it always holds that *no waiting kind fits any node with
a free slot*. So after a command only two things need a look: nodes that gained room
(against all kinds) and kinds whose line was empty before (against the free nodes).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from meshd.model import NodeId, Offer
from meshd.placement import Demand, amounts_of, rank
from meshd.raft.state.agenda import Agenda
from meshd.raft.state.jobs import Job

KINDS_MAX = 10_000
"""Different demands among live jobs; a freed slot is compared with each kind in line (0.3 µs each)."""

PRIORITY_MAX = 100


@dataclass(slots=True, eq=False)
class Node:
    """A member's session and what is leased to it."""

    id: NodeId
    may_work: bool
    """Has the worker role and does not drain."""
    epoch: int = 0
    """The largest ever opened."""
    is_live: bool = False
    seq: int = 0
    answer: bytes = b""
    """To the command with that seq."""
    slots: int = 0
    offer: Offer | None = None
    leases: dict[int, tuple[Job, int]] = field(default_factory=dict)
    """By fence: the job and the task."""
    held: dict[int, tuple[Job, int]] = field(default_factory=dict)
    """Leases of an ended session whose tasks may still be adopted, by fence."""
    total: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    last_fence: int = 0
    boot: str = ""
    """Of the machine, as its newest session said."""
    ended_ms: int = 0
    """When its last session ended, on the state's clock."""
    idle_key: tuple[int, NodeId] | None = None
    """Its place among the nodes with a free slot."""

    @property
    def has_room(self) -> bool:
        return self.is_live and self.may_work and len(self.leases) < self.slots


@dataclass(slots=True, eq=False)
class Kind:
    demand: Demand
    line: Agenda[int] = field(default_factory=lambda: Agenda[int]())
    """Numbers of jobs that could be leased from now, by priority."""
    ranks: dict[NodeId, int | None] = field(default_factory=dict)
    """What `placement.rank` said, by node; of live nodes only."""
    best: int | None = None
    """The first backend alternative that some working node offers; only asked of kinds with several."""
    is_best_known: bool = False
    jobs: int = 0
    """Live jobs of this kind."""


class Matching:
    def __init__(self) -> None:
        self.nodes: dict[NodeId, Node] = {}
        self._kinds: dict[Demand, Kind] = {}
        self._idle: list[tuple[int, NodeId]] = []
        self._gained: dict[NodeId, Node] = {}
        self._woken: dict[Demand, Kind] = {}

    # --- kinds and their jobs

    @property
    def is_full(self) -> bool:
        return len(self._kinds) >= KINDS_MAX

    def knows(self, demand: Demand) -> bool:
        return demand in self._kinds

    def enrol(self, job: Job) -> None:
        """A live job: remember what it asks for."""
        demand = Demand.of(job.spec)
        kind = self._kinds.get(demand)
        if kind is None:
            kind = self._kinds[demand] = Kind(demand)
        kind.jobs += 1
        job.kind = kind

    def retire(self, job: Job) -> None:
        """The job has ended."""
        kind = job.kind
        assert kind is not None
        kind.line.drop(job.number)
        kind.jobs -= 1
        job.kind = None
        if not kind.jobs:
            del self._kinds[kind.demand]
            self._woken.pop(kind.demand, None)

    def line_up(self, job: Job) -> None:
        """Put the job in line, or take it out, as it now stands."""
        kind = job.kind
        assert kind is not None
        if not job.may_lease:
            kind.line.drop(job.number)
        elif job.number not in kind.line:
            if not kind.line:
                self._woken[kind.demand] = kind
            kind.line.put(job.number, PRIORITY_MAX - job.spec.priority)

    # --- nodes

    def changed(self, node: Node) -> None:
        """Its slots, offer, session or right to work changed: look at it again."""
        for kind in self._kinds.values():
            kind.ranks.pop(node.id, None)
            if len(kind.demand.backends) > 1:
                kind.is_best_known = False
                if kind.line:
                    self._woken[kind.demand] = kind
        node.total = {} if node.offer is None else amounts_of(node.offer.resources)
        self._place(node)
        if node.has_room:
            self._gained[node.id] = node

    def removed(self, node: Node) -> None:
        node.is_live = False
        self.changed(node)
        self._gained.pop(node.id, None)
        del self.nodes[node.id]

    def take(self, node: Node, fence: int, job: Job, task: int) -> None:
        """The node holds this attempt from now."""
        assert job.kind is not None
        node.leases[fence] = (job, task)
        for name, amount in job.kind.demand.amounts:
            node.used[name] = node.used.get(name, 0) + amount
        node.last_fence = max(node.last_fence, fence)
        self._place(node)

    def give_back(self, node: Node, fence: int) -> None:
        job, _ = node.leases.pop(fence)
        assert job.kind is not None
        for name, amount in job.kind.demand.amounts:
            node.used[name] -= amount
            if not node.used[name]:
                del node.used[name]
        self._place(node)
        if node.has_room:
            self._gained[node.id] = node

    def fits_now(self, node: Node, kind: Kind) -> bool:
        """Could the node take one more of this kind? Slots apart."""
        total, used = node.total, node.used
        return self._suits(node, kind) and all(
            total.get(name, 0) - used.get(name, 0) >= amount for name, amount in kind.demand.amounts
        )

    def settle(self) -> None:
        """After a restore: nothing that was captured fits anywhere, so only the indexes are to be made."""
        for node in self.nodes.values():
            self.changed(node)
        self._gained.clear()
        self._woken.clear()

    def take_apart(self) -> None:
        """Free what stands in line, one job's number after the other."""
        for kind in self._kinds.values():
            kind.line.take_apart()

    # --- pairs

    def next_pair(self) -> tuple[int, Node] | None:
        """A job's number and the node to lease its next task to; None when no waiting job fits any free slot."""
        while self._gained:
            node = next(iter(self._gained.values()))
            number = self._best_for(node) if node.has_room else None
            if number is not None:
                return number, node
            del self._gained[node.id]
        while self._woken:
            heads = [(head, kind) for kind in self._woken.values() if (head := kind.line.first()) is not None]
            if not heads:
                self._woken.clear()
                break
            head, kind = min(heads, key=lambda pair: pair[0])
            free = self._first_for(kind)
            if free is not None:
                return head[1], free
            del self._woken[kind.demand]
        return None

    def _best_for(self, node: Node) -> int | None:
        best: tuple[int, int] | None = None
        for kind in self._kinds.values():
            head = kind.line.first()
            if head is not None and (best is None or head < best) and self.fits_now(node, kind):
                best = head
        return None if best is None else best[1]

    def _first_for(self, kind: Kind) -> Node | None:
        for _, node_id in self._idle:
            node = self.nodes[node_id]
            if self.fits_now(node, kind):
                return node
        return None

    def _suits(self, node: Node, kind: Kind) -> bool:
        mine = self._rank(node, kind)
        if mine is None or len(kind.demand.backends) == 1:
            return mine is not None
        if not kind.is_best_known:
            kind.best = self.best_rank(kind.demand)
            kind.is_best_known = True
        return mine == kind.best

    def best_rank(self, demand: Demand) -> int | None:
        """The first backend alternative that a working node has, by position. Looks at every node."""
        ranks = [
            self.rank_of(node, demand) for node in self.nodes.values() if node.is_live and node.may_work and node.slots
        ]
        return min((rank for rank in ranks if rank is not None), default=None)

    @staticmethod
    def rank_of(node: Node, demand: Demand) -> int | None:
        return None if node.offer is None else rank(demand, node.offer)

    def _rank(self, node: Node, kind: Kind) -> int | None:
        try:
            return kind.ranks[node.id]
        except KeyError:
            found = kind.ranks[node.id] = self.rank_of(node, kind.demand)
            return found

    def _place(self, node: Node) -> None:
        """Keep the node's place among those with a free slot, which is by its newest lease."""
        key = (node.last_fence, node.id) if node.has_room else None
        if key == node.idle_key:
            return
        if node.idle_key is not None:
            del self._idle[bisect_left(self._idle, node.idle_key)]
        if key is not None:
            insort(self._idle, key)
        node.idle_key = key
