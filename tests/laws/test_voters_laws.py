"""The autopilot, step by step to its end, over servers that die, drain, lose journals and stand in zones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshd.model import NodeId
from meshd.raft.messages import VoterId, node_of
from meshd.raft.voters import Add, HandOver, Peer, Remove, View, decide, learners, voters_wanted

STEPS_MAX = 30
"""Seven seats, each replaced and spread, and what is between them: more would be churn."""
LED_MS = 60_000


@dataclass
class Mesh:
    """Servers as the leader sees them: who answers, who is level. A learner that is fed and answers is level one step later."""

    voters: tuple[VoterId, ...]
    me: VoterId
    servers: set[NodeId]
    alive: set[VoterId]
    """Processes that run; of one machine at most one."""
    draining: set[NodeId] = field(default_factory=set)
    zones: dict[NodeId, str] = field(default_factory=dict)
    level: set[VoterId] = field(default_factory=set)
    sizes: list[int] = field(default_factory=list)

    def view(self) -> View:
        known = {*self.alive, *self.voters} - {self.me}
        return View(
            me=self.me,
            voters=self.voters,
            peers={
                voter: Peer(
                    lag=0 if voter in self.level or voter in self.voters else 9999,
                    silent_ms=20 if voter in self.alive else 99_000,
                )
                for voter in sorted(known)
            },
            servers=sorted(self.servers),
            draining=sorted(self.draining),
            leading_ms=LED_MS,
            zones=self.zones,
        )

    def answering(self) -> int:
        return sum(voter in self.alive for voter in self.voters)

    def settle(self) -> list[Add | Remove | HandOver]:
        """Until nothing is decided, with everybody fed who is to be."""
        steps: list[Add | Remove | HandOver] = []
        for _ in range(3 * STEPS_MAX):
            view = self.view()
            decision = decide(view)
            fed = {voter for voter in learners(view) if voter in self.alive}
            if decision is None:
                if fed <= self.level:
                    return steps
                self.level |= fed
                continue
            steps.append(decision)
            match decision:
                case Add(voter):
                    assert voter in self.level and voter in self.alive, "only who has caught up"
                    self.voters = tuple(sorted({*self.voters, voter}))
                case Remove(voter):
                    assert voter != self.me
                    self.voters = tuple(other for other in self.voters if other != voter)
                case HandOver(to):
                    assert to in self.alive and to in self.voters
                    self.me = to
            assert self.answering() > len(self.voters) // 2, f"no majority answers after {decision}"
            assert len({node_of(voter) for voter in self.voters}) == len(self.voters), "one machine votes twice"
            self.sizes.append(len(self.voters))
            assert len(steps) <= STEPS_MAX, f"it does not stop: {steps[-6:]}"
        raise AssertionError("learners never became level")


names = st.sampled_from("abcdefghij")


@st.composite
def meshes(draw: st.DrawFn, *, is_sound: bool = False) -> Mesh:
    """Any mesh whose leader has a majority; unless it is sound some voters were removed, or came back without a journal."""
    servers = draw(st.sets(names, min_size=1, max_size=10))
    seatable = st.sampled_from(sorted(servers)) if is_sound else names
    seats = draw(st.lists(seatable, min_size=1, max_size=6, unique=True))
    if is_sound and len(seats) % 2 == 0:
        seats.pop()
    dead = draw(st.sets(names, max_size=5)) - set(draw(st.permutations(seats))[: len(seats) // 2 + 1])
    reborn = draw(st.sets(st.sampled_from(sorted(dead)), max_size=2)) if dead and not is_sound else set()
    voters = tuple(sorted(VoterId(f"{name}/1") for name in seats))
    alive = {VoterId(f"{name}/1") for name in {*servers, *seats} - dead}
    alive |= {VoterId(f"{name}/2") for name in reborn}
    return Mesh(
        voters=voters,
        me=draw(st.sampled_from(sorted(alive & set(voters)))),
        servers={NodeId(name) for name in servers},
        alive=alive,
        draining={NodeId(name) for name in draw(st.sets(names, max_size=3))},
        zones={NodeId(name): zone for name in "abcdefghij" if (zone := draw(st.sampled_from(["", "x", "y", "z"])))},
    )


@settings(max_examples=400, deadline=None)
@given(meshes())
def test_it_reaches_a_goal_through_safe_steps_and_stays_there(mesh: Mesh) -> None:
    mesh.settle()
    voters = mesh.voters
    assert mesh.settle() == [] and mesh.voters == voters
    mesh.me = max(voter for voter in mesh.voters if voter in mesh.alive)
    drained_leader = node_of(mesh.me) in mesh.draining or node_of(mesh.me) not in mesh.servers
    assert drained_leader or mesh.settle() == [], "another leader wants the same"


@settings(max_examples=400, deadline=None)
@given(meshes())
def test_at_the_goal_there_are_as_many_as_wanted_or_as_can_be(mesh: Mesh) -> None:
    mesh.settle()
    able = {node_of(voter) for voter in mesh.alive} & mesh.servers - mesh.draining
    target = voters_wanted(len(mesh.servers - mesh.draining))
    good = {node_of(voter) for voter in mesh.voters if voter in mesh.alive} & able
    if len(able) >= target and target:
        # Nobody is missing: exactly those that are wanted, and every one of them answers.
        assert len(mesh.voters) == target and len(good) == target, mesh
    if len(mesh.voters) > 2:
        assert len(mesh.voters) % 2, f"an even size stays: {mesh}"
    assert len(good) >= min(target, len(able)) or len(able) < target


@settings(max_examples=400, deadline=None)
@given(meshes())
def test_zones_are_as_even_as_the_servers_allow_and_nobody_moves_for_less(mesh: Mesh) -> None:
    mesh.settle()
    able = {node_of(voter) for voter in mesh.alive} & mesh.servers - mesh.draining
    seated = {node_of(voter) for voter in mesh.voters}
    assume(seated <= able and len(seated) == voters_wanted(len(mesh.servers - mesh.draining)))
    zone = {node: mesh.zones.get(node, f"own {node}") for node in able}
    load = Counter(zone[node] for node in seated)
    for node in able - seated:
        assert load[zone[node]] + 2 > max(load.values()), f"{node} stands by while its zone has fewer voters: {mesh}"


@settings(max_examples=200, deadline=None)
@given(meshes(is_sound=True))
def test_an_even_size_lasts_one_step_when_everybody_needed_is_level(mesh: Mesh) -> None:
    """From a whole odd set: growing, replacing, spreading, shrinking pass through an even size, and do not stop there."""
    mesh.level = set(mesh.alive)
    mesh.settle()
    sizes = [len(mesh.voters)] if not mesh.sizes else mesh.sizes
    for size, following in pairwise(sizes):
        assert size % 2 or following % 2 or following == size, f"{sizes}"


@settings(max_examples=100, deadline=None)
@given(meshes(is_sound=True))
def test_a_whole_set_without_zones_is_left_alone(mesh: Mesh) -> None:
    mesh.zones.clear()
    mesh.draining.clear()
    mesh.alive |= set(mesh.voters)
    mesh.settle()
    assert len(mesh.voters) == voters_wanted(len(mesh.servers)) or len(mesh.alive) < len(mesh.servers)
    assume(len(mesh.voters) == voters_wanted(len(mesh.servers)))
    grown = replace(mesh, servers={*mesh.servers}, alive={*mesh.alive})
    for name in "klm":
        if voters_wanted(len(grown.servers) + 1) == len(grown.voters):
            grown.servers.add(NodeId(name))
            grown.alive.add(VoterId(f"{name}/1"))
    assert grown.settle() == [], "newcomers move nobody"


def test_three_zones_are_spread_in_two_steps_for_each_seat() -> None:
    """All voters in one zone; two others have servers: two swaps, and the leader keeps its seat."""
    mesh = Mesh(
        voters=tuple(VoterId(f"{name}/1") for name in "abc"),
        me=VoterId("b/1"),
        servers={NodeId(name) for name in "abcdef"},
        alive={VoterId(f"{name}/1") for name in "abcdef"},
        zones={NodeId(name): zone for name, zone in zip("abcdef", "xxxyyz", strict=True)},
    )
    steps = mesh.settle()
    assert [type(step) for step in steps] == [Add, Remove, Add, Remove]
    assert mesh.me in mesh.voters and mesh.sizes == [4, 3, 4, 3]
    assert sorted(mesh.zones[node_of(voter)] for voter in mesh.voters) == ["x", "y", "z"]
