"""What control costs does not grow with the nodes that take part (python -m bench.scale; docs/performance.md, How it grows).

Ratios of CPU time of this thread, both sides in the same test: how fast the machine is and what else it does cancels out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from bench.scale import grow
from meshd.directory import Directory
from meshd.gossip.service import GossipService
from meshd.model import (
    AttemptKey,
    AttemptRun,
    BackendOffer,
    JobId,
    JobSpec,
    Member,
    Needs,
    NodeId,
    Offer,
    Resources,
    Role,
    Run,
)
from meshd.neighbours import Neighbours
from meshd.raft.state import matching
from meshd.raft.state.agenda import Agenda
from meshd.raft.state.commands import Leased
from meshd.raft.state.matching import Matching, Node
from meshd.views import MembersView, MemberView
from meshd.work.keeper import Applied, Keeper, NoticeEnded, SendNotice
from tests.scene import OFFER, A, B, Scene, spec

JOB = JobId("018f0000-0000-7000-8000-000000000001")
SPEC = JobSpec(backend=("process",), run=Run(args=("true",)))
ROUNDS = 2_000
TASKS = 4_000


class Leases:
    """Every lease stands, whoever has it."""

    fence = 1

    def __init__(self, nodes: int) -> None:
        self._nodes = [NodeId(f"node-{number}") for number in range(nodes)]

    def sessions_live(self) -> list[tuple[NodeId, int]]:
        return [(node, 1) for node in self._nodes]

    def leases_of(self, node: NodeId, epoch: int) -> list[AttemptKey]:
        return []

    def stops_of(self, node: NodeId, epoch: int) -> list[AttemptKey]:
        return []

    def still_leased(self, node: NodeId, epoch: int, attempts: AttemptRun) -> tuple[AttemptRun, ...]:
        return (attempts,)

    def spec_of(self, job: JobId) -> JobSpec | None:
        return SPEC


def lease(keeper: Keeper, number: int, fence: int) -> SendNotice:
    leased = Leased(NodeId(f"node-{number}"), 1, AttemptRun(JOB, fence, 1, fence))
    [notice] = keeper.handle(Applied([leased], term=1), 0)
    assert isinstance(notice, SendNotice)
    return notice


def best_s(act: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.thread_time()
        act()
        best = min(best, time.thread_time() - start)
    return best


def notices_s(waiting: int) -> float:
    """Of telling one node of leases, one by one, while so many others have a notice on its way."""
    keeper = Keeper(Leases(waiting + 1))
    keeper.handle(Applied([], term=1), 0)
    for number in range(1, waiting + 1):
        lease(keeper, number, number)

    def tell() -> None:
        for fence in range(waiting + 1, waiting + 1 + ROUNDS):
            sent = lease(keeper, 0, fence)
            keeper.handle(NoticeEnded(sent.node, sent.notice, has_arrived=True), 0)

    return best_s(tell)


def asking_ahead_s(others: int) -> float:
    """Of a node that asks for more of a job, and for less, among so many that ask for it too."""
    matching = Matching()
    nodes = [Node(NodeId(f"node-{number:06d}"), may_work=True) for number in range(others + 1)]
    for node in nodes:
        matching.nodes[node.id] = node
        matching.ask_ahead(node, [(JOB, 8)])

    def ask() -> None:
        for count in range(ROUNDS):
            matching.ask_ahead(nodes[-1], [(JOB, 8 + count % 2)])

    return best_s(ask)


def finding_voters_s(workers: int) -> float:
    """Of a worker's calls by way of a voter, before each."""
    me, servers = NodeId("me"), [NodeId(f"server-{number}") for number in range(3)]
    ids = [*servers, *(NodeId(f"worker-{number}") for number in range(workers))]
    directory = Directory(me, "mesh", b"", lambda key, payload, signature: True, ())
    rows = [member_row(node, is_server=node in servers) for node in ids]
    directory.learn_members(MembersView("mesh", tuple(rows), (), position=1, wall_ms=0))
    neighbours = Neighbours(me, directory, cast(GossipService, Silence()))
    assert set(neighbours.voters()) == set(servers)
    return best_s(lambda: [neighbours.voters() for _ in range(ROUNDS)])


def member_row(node: NodeId, *, is_server: bool) -> MemberView:
    member = Member(node, node, (Role.SERVER,) if is_server else (Role.WORKER,))
    return MemberView(member, session="live", epoch=1, slots=1, offer=None, used=Resources(), leased=())


class Silence:
    """A gossip in which nobody says anything."""

    def health(self, node: NodeId) -> None:
        return None

    def fact(self, node: NodeId, key: str) -> None:
        return None


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[None]:
    """As long as there were calls of it."""
    calls: list[None] = []
    original = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        calls.append(None)
        return original(*arguments)

    monkeypatch.setattr(owner, name, call)
    return calls


def test_telling_a_node_of_a_lease_costs_the_same_while_a_thousand_others_are_being_told() -> None:
    assert notices_s(1_000) < 2 * notices_s(10)


def test_asking_for_more_ahead_costs_the_same_among_a_thousand_that_ask() -> None:
    assert asking_ahead_s(1_000) < 2 * asking_ahead_s(10)


def test_a_claim_in_a_full_mesh_looks_at_each_kind_that_waits_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at all of them once more for each that fits nowhere. The kinds have two backends: a claim may change which is best."""
    offer = Offer((BackendOffer("wasm"), BackendOffer("process")), OFFER.resources)
    scene = Scene(A, B, slots=0)
    scene.open(A, 1, slots=1, offer=offer)
    kinds = 200
    for number in range(kinds):
        scene.submit(spec(backend=("wasm", "process"), needs=Needs(Resources(memory=number + 1))))
    scene.open(B, 1, slots=0, offer=offer)
    looks = counted(monkeypatch, Agenda, "first")
    scene.claim(B, 0, offer=offer)
    assert len(looks) < 4 * kinds


def test_a_claim_looks_at_few_nodes_for_each_kind_that_names_several_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is nowhere: as soon as one has the second, there is none better."""
    nodes = [A, *(NodeId(f"node-{number}") for number in range(100))]
    scene = Scene(*nodes)
    kinds = 50
    for number in range(len(nodes) + kinds):
        needs = Needs(Resources(memory=max(number - len(nodes), 0)))
        scene.submit(spec(backend=("process", "wasm"), needs=needs))
    calls = counted(monkeypatch, matching, "rank")
    scene.claim(A, 2, offer=OFFER)
    assert len(calls) < 4 * kinds


def test_explaining_looks_at_each_node_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at all of them once more for each, to see whether another has a backend that the job prefers."""
    nodes = [A, *(NodeId(f"node-{number}") for number in range(100))]
    scene = Scene(*nodes)
    jobs = [scene.submit(spec(backend=("process", "wasm"))) for _ in range(len(nodes) + 1)]
    scene.finish(A)
    calls = counted(monkeypatch, matching, "rank")
    for job in jobs[0], jobs[-1]:
        scene.explain(job)
    assert len(calls) < 8 * len(nodes)


def test_a_worker_finds_the_voters_among_a_thousand_members_as_among_ten() -> None:
    assert finding_voters_s(1_000) < 2 * finding_voters_s(10)


def test_a_task_costs_the_leader_and_the_log_no_more_among_100_nodes_than_among_ten() -> None:
    ten, hundred = (grow(nodes, TASKS, arrays=4) for nodes in (10, 100))

    assert hundred.leader_us < 2 * ten.leader_us
    assert hundred.apply_us < 2 * ten.apply_us
    assert hundred.entries_per_task < 2 * ten.entries_per_task
    assert hundred.bytes_per_task < 2 * ten.bytes_per_task
