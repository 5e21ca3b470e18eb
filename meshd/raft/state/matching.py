"""Which waiting job meets which free slot, found without looking at all jobs times all nodes.

Jobs that ask for the same are one `Kind`; each kind has its jobs in line by priority,
then age. Nodes with a free slot stand in one list, the one that was leased to longest
ago first. Between two commands it always holds that *no waiting kind fits any node with
a free slot*. So after a command only two things need a look: nodes that gained room
(against all kinds) and kinds whose line was empty before (against the free nodes).

A node that gets through a job's tasks faster than the log can bring new ones asks for
some *ahead*: so many of that job beyond what it has room for. They wait there and take
nothing of its resources here, so that whatever comes first in line still gets the room.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from meshd.model import JobId, NodeId, Offer
from meshd.placement import Demand, amounts_of, rank
from meshd.raft.state.agenda import Agenda
from meshd.raft.state.jobs import Job
from meshd.raft.state.ranges import Ranges
from meshd.raft.state.runs import Run

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
    """By fence: the job and the task. Of what has a row; the rest is in `runs`."""
    runs: dict[JobId, tuple[Job, Ranges]] = field(default_factory=dict)
    """The tasks that are leased to this session in runs of the job."""
    taken: int = 0
    """Slots: leases of both sorts that are not ahead."""
    ahead: dict[JobId, int] = field(default_factory=dict)
    """What it asked for beyond its room, by job."""
    ahead_held: dict[JobId, int] = field(default_factory=dict)
    """… and has."""
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
        return self.is_live and self.may_work and self.taken < self.slots

    @property
    def held_in_all(self) -> int:
        return len(self.leases) + sum([len(tasks) for _, tasks in self.runs.values()])

    def each_run(self) -> list[tuple[Job, Run]]:
        return [
            (job, run)
            for job, tasks in self.runs.values()
            for start, stop in tasks
            for run in job.runs.within(start, stop)
        ]


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


Heads = list[tuple[tuple[int, int], int, Kind]]
"""A heap of lines by what comes first in each: they are compared once for many leases in a row."""


class Matching:
    def __init__(self) -> None:
        self.nodes: dict[NodeId, Node] = {}
        self._kinds: dict[Demand, Kind] = {}
        self._idle: list[tuple[int, NodeId]] = []
        self._gained: dict[NodeId, Node] = {}
        self._woken: dict[Demand, Kind] = {}
        self._offered: set[str] | None = None
        """Names of all backends of working nodes; None: not known."""
        self._hungry: dict[NodeId, Node] = {}
        """Nodes that may have less ahead than they asked for."""
        self._asked_ahead: dict[JobId, list[NodeId]] = {}
        """By whom, sorted: the order must follow from the state."""
        self._front: tuple[Node, Heads] | None = None
        """The lines that fit the gained node being looked at."""
        self._woken_heads: Heads | None = None
        """The lines that woke."""

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
            self.stir(job)

    def stir(self, job: Job) -> None:
        """More of it can be held ahead."""
        for node in self._asked_ahead.get(job.id, ()):
            self._hungry[node] = self.nodes[node]

    # --- nodes

    def ask_ahead(self, node: Node, wanted: Iterable[tuple[JobId, int]]) -> None:
        """Of these jobs the node wants so many beyond its room, until it says otherwise or its session ends."""
        for job in node.ahead:
            asked = self._asked_ahead[job]
            del asked[bisect_left(asked, node.id)]
            if not asked:
                del self._asked_ahead[job]
        node.ahead = {job: count for job, count in wanted if count}
        for job in node.ahead:
            insort(self._asked_ahead.setdefault(job, []), node.id)
        if node.ahead:
            self._hungry[node.id] = node

    def changed(self, node: Node) -> None:
        """Its slots, offer, session or right to work changed: look at it again."""
        self._front = self._offered = None
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
        if node.ahead:
            self._hungry[node.id] = node

    def removed(self, node: Node) -> None:
        node.is_live = False
        self.changed(node)
        self.ask_ahead(node, ())
        self._gained.pop(node.id, None)
        self._hungry.pop(node.id, None)
        del self.nodes[node.id]

    def take(self, node: Node, fence: int, job: Job, task: int, *, is_ahead: bool) -> None:
        """The node holds this attempt, which has a row, from now."""
        node.leases[fence] = (job, task)
        self._use(node, job, 1, is_ahead=is_ahead)
        self._leased(node, fence)

    def take_run(self, node: Node, job: Job, run: Run) -> None:
        if job.id not in node.runs:
            node.runs[job.id] = (job, Ranges())
        node.runs[job.id][1].add(run.start, run.stop)
        self._use(node, job, len(run), is_ahead=run.is_ahead)
        self._leased(node, run.fence_of(run.stop - 1))

    def lay_out(self, node: Node, fence: int, job: Job, task: int) -> None:
        """One attempt of a run has a row from now: nothing else changes."""
        self._shorten(node, job, task, task + 1)
        node.leases[fence] = (job, task)

    def give_back(self, node: Node, fence: int, *, is_ahead: bool) -> None:
        job, _ = node.leases.pop(fence)
        self._unuse(node, job, 1, is_ahead=is_ahead)

    def give_back_run(self, node: Node, job: Job, run: Run) -> None:
        self._shorten(node, job, run.start, run.stop)
        self._unuse(node, job, len(run), is_ahead=run.is_ahead)

    def _shorten(self, node: Node, job: Job, start: int, stop: int) -> None:
        tasks = node.runs[job.id][1]
        tasks.remove(start, stop)
        if not tasks:
            del node.runs[job.id]

    def _use(self, node: Node, job: Job, count: int, *, is_ahead: bool) -> None:
        if is_ahead:
            node.ahead_held[job.id] = node.ahead_held.get(job.id, 0) + count
            return
        assert job.kind is not None
        node.taken += count
        for name, amount in job.kind.demand.amounts:
            node.used[name] = node.used.get(name, 0) + amount * count

    def _unuse(self, node: Node, job: Job, count: int, *, is_ahead: bool) -> None:
        if is_ahead:
            node.ahead_held[job.id] -= count
            if not node.ahead_held[job.id]:
                del node.ahead_held[job.id]
            if job.id in node.ahead:
                self._hungry[node.id] = node
            return
        assert job.kind is not None
        node.taken -= count
        for name, amount in job.kind.demand.amounts:
            node.used[name] -= amount * count
            if not node.used[name]:
                del node.used[name]
        self._place(node)
        if node.has_room:
            self._gained[node.id] = node

    def _leased(self, node: Node, fence: int) -> None:
        node.last_fence = max(node.last_fence, fence)
        self._place(node)

    def fits_now(self, node: Node, kind: Kind) -> bool:
        """Could the node take one more of this kind? Slots apart."""
        total, used = node.total, node.used
        return self.suits(node, kind) and all(
            total.get(name, 0) - used.get(name, 0) >= amount for name, amount in kind.demand.amounts
        )

    def room_for(self, node: Node, job: Job) -> int:
        """How many more of the job's attempts fit the node, by slots and resources."""
        assert job.kind is not None
        room = node.slots - node.taken
        for name, amount in job.kind.demand.amounts:
            if amount:
                room = min(room, (node.total.get(name, 0) - node.used.get(name, 0)) // amount)
        return room

    @property
    def places(self) -> int:
        """Nodes with a free slot."""
        return len(self._idle)

    def settle(self, gained: Iterable[NodeId], woken: Iterable[Job], hungry: Iterable[NodeId]) -> None:
        """After a restore: make the indexes, and look again only at what was still to be looked at when it was captured."""
        for node in self.nodes.values():
            self.changed(node)
        self._gained = {node: self.nodes[node] for node in gained}
        self._hungry = {node: self.nodes[node] for node in hungry}
        self._woken = {job.kind.demand: job.kind for job in woken if job.kind is not None}

    def tidy(self) -> None:
        """Where an entry had to stop: what woke and has nothing in line any more need not be looked at."""
        self._woken = {demand: kind for demand, kind in self._woken.items() if kind.line.first() is not None}

    @property
    def has_more(self) -> bool:
        """Whether something is still to be looked at."""
        return bool(self._gained or self._woken or self._hungry)

    def unsettled(self) -> tuple[list[NodeId], list[int], list[NodeId]]:
        """For `settle`, elsewhere: nodes that gained room, the first job of each kind that woke, hungry nodes.

        Kinds are known in the order in which their first job came, here, and the first that still lives, where the
        state was restored: so the jobs are sorted, as `next_pair` takes them.
        """
        heads = sorted([head for kind in self._woken.values() if (head := kind.line.first()) is not None])
        return list(self._gained), [number for _, number in heads], list(self._hungry)

    def take_apart(self) -> None:
        """Free what stands in line, one job's number after the other."""
        for kind in self._kinds.values():
            kind.line.take_apart()

    # --- pairs

    def begin(self) -> None:
        """Before a row of `next_pair` with nothing but leases in between."""
        self._front = self._woken_heads = None

    def next_pair(self) -> tuple[int, Node] | None:
        """A job's number and the node to lease its next task to; None when no waiting job fits any free slot."""
        while self._gained:
            node = next(iter(self._gained.values()))
            number = self._best_for(node) if node.has_room else None
            if number is not None:
                return number, node
            del self._gained[node.id]
        if self._woken_heads is None:
            self._woken_heads = _heads_of(self._woken.values())
        while (first := _foremost(self._woken_heads)) is not None:
            number, kind = first
            free = self._first_for(kind)
            if free is not None:
                return number, free
            heappop(self._woken_heads)
            del self._woken[kind.demand]
        self._woken.clear()
        return None

    def next_hungry(self) -> Node | None:
        """A node that may have less ahead than it asked for. Call `fed` when it has, or there is nothing to be had."""
        while self._hungry:
            node = next(iter(self._hungry.values()))
            if node.is_live and node.may_work and node.slots:
                return node
            self.fed(node)
        return None

    def fed(self, node: Node) -> None:
        self._hungry.pop(node.id, None)

    def _best_for(self, node: Node) -> int | None:
        """The lines are compared once for all that is leased to the node in a row: its room only shrinks meanwhile."""
        if self._front is None or self._front[0] is not node:
            self._front = (
                node,
                _heads_of(kind for kind in self._kinds.values() if kind.line and self.fits_now(node, kind)),
            )
        heads = self._front[1]
        while (first := _foremost(heads)) is not None:
            if self.fits_now(node, first[1]):
                return first[0]
            heappop(heads)
        return None

    def _first_for(self, kind: Kind) -> Node | None:
        for _, node_id in self._idle:
            node = self.nodes[node_id]
            if self.fits_now(node, kind):
                return node
        return None

    def suits(self, node: Node, kind: Kind) -> bool:
        """Could the node take one of this kind, if it had nothing else to do?"""
        mine = self._rank(node, kind)
        if mine is None or len(kind.demand.backends) == 1:
            return mine is not None
        return mine == self._best(kind)

    def best_rank(self, demand: Demand) -> int | None:
        """The first backend alternative that a working node has, by position."""
        return self._best(self._kinds.get(demand) or Kind(demand))

    def _best(self, kind: Kind) -> int | None:
        """Where it is not known, nodes are looked at until one has the first that is to be had at all."""
        if not kind.is_best_known:
            if self._offered is None:
                offers = [node.offer for node in self.nodes.values() if _works(node) and node.offer is not None]
                self._offered = {backend.name for offer in offers for backend in offer.backends}
            backends = enumerate(kind.demand.backends)
            least = next((at for at, name in backends if name in self._offered), None)
            kind.best, kind.is_best_known = None, True
            for node in self.nodes.values() if least is not None else ():
                mine = self._rank(node, kind) if _works(node) else None
                if mine is not None and (kind.best is None or mine < kind.best):
                    kind.best = mine
                if mine == least:
                    break
        return kind.best

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


def _works(node: Node) -> bool:
    return node.is_live and node.may_work and bool(node.slots)


def _heads_of(kinds: Iterable[Kind]) -> Heads:
    heads = [(head, at, kind) for at, kind in enumerate(kinds) if (head := kind.line.first()) is not None]
    heapify(heads)
    return heads


def _foremost(heads: Heads) -> tuple[int, Kind] | None:
    """The job that comes first as the lines now stand: since they were compared each can only have moved on."""
    while heads:
        was, at, kind = heads[0]
        head = kind.line.first()
        if head is None:
            heappop(heads)
        elif head != was:
            heapreplace(heads, (head, at, kind))
        else:
            return head[1], kind
    return None
