"""After the faults: does the mesh know all again, see a death in time, and become whole when the dead one is back?

healed ── 10 s ──▶ replicas equal, everybody knows the same ── one dies ── 5 s ──▶ seen by all ── comes back ── 5 s ──▶ whole ──▶ replicas equal

A machine that was started anew may be a copy of one that still runs: its session waits for that (protocol.md 4).
"""

from __future__ import annotations

from meshd.errors import MeshError
from meshd.gossip.membership import State
from meshd.model import JobId, NodeId
from meshd.neighbours import ADDRESS_FACT, OFFER_FACT
from meshd.testing.nodes import SimNode
from meshd.testing.world import World
from meshd.views import Explain, Explanation
from meshd.work.worker import State as SessionState

CONVERGED_MS = 10_000
"""After the last fault: the longest time between two tries of one that was called dead, and to regain trust in oneself."""

SPACES = (ADDRESS_FACT, OFFER_FACT, "blob/")
SEEN_MS = 5_000
WHOLE_MS = 5_000
LET_IN_MS = 25_000
"""A new leader ends the old session after 12 s, 7 s later it is let in, and an open that was refused is tried again after 2 s."""
LEVEL_MS = 15_000
"""Somebody who was far behind gets a snapshot, and what was added meanwhile."""
SLACK_MS = 250
"""Clocks that run 0.2 % slow, and the rounding of timers."""


class Epilogue:
    def __init__(self, world: World, lost: SimNode | None, hopeless: tuple[JobId, str] | None) -> None:
        self.world, self.lost, self._hopeless = world, lost, hopeless

    def run(self) -> None:
        """Raises Breach."""
        world, random = self.world, self.world.heap.random
        self._heal()
        self._pass(CONVERGED_MS)
        self._every_voter_has_everything()
        self._everybody_knows_the_same("facts converge")
        self._everybody_is_let_in(LET_IN_MS - CONVERGED_MS)
        self._explains_who_lacks_what()
        victim = random.choice(self._living())
        world.checks.must_live -= {victim.id}
        loses_power = world.heap.chance(0.5)
        victim.crash(loses_power=loses_power)
        self._pass(SEEN_MS)
        for node in self._living():
            if not node.thinks_dead(victim.id):
                world.checks.breach(
                    "a death is seen within 5 s", f"{node.name} does not see that {victim.name} is dead"
                )
        victim.start()
        world.checks.must_live |= {victim.id}
        self._pass(WHOLE_MS)
        self._everybody_knows_the_same("who comes back is whole within 5 s")
        self._everybody_is_let_in(LET_IN_MS if loses_power else 0)
        self._every_voter_has_everything()

    def _every_voter_has_everything(self) -> None:
        """Whatever goes on meanwhile: there are moments when all have applied the same."""
        world = self.world
        world.heap.run(world.heap.now_ms + LEVEL_MS, is_over=world.checks.replicas_are_equal, looks_often=True)
        if not world.checks.replicas_are_equal():
            world.checks.breach("every voter has everything", f"not within {LEVEL_MS} ms")

    def _living(self) -> list[SimNode]:
        return [node for node in self.world.nodes.values() if node.is_alive]

    def _pass(self, for_ms: int) -> None:
        self.world.heap.run(self.world.heap.now_ms + for_ms + SLACK_MS, is_over=lambda: False)

    def _heal(self) -> None:
        world = self.world
        world.heap.note("epilogue: all faults are over")
        world.network.heal()
        for node in world.nodes.values():
            node.heal()
            if not node.is_alive and not node.is_gone:
                node.start()
        frozen_ms = max(node.agent_frozen_until_ms for node in world.nodes.values()) - world.heap.now_ms
        self._pass(max(0, frozen_ms))
        world.checks.must_live = frozenset()

    def _everybody_knows_the_same(self, name: str) -> None:
        world, living = self.world, self._living()
        world.checks.must_live = frozenset(node.id for node in living)
        said: dict[tuple[NodeId, str], bytes] = {}
        for node in living:
            said |= {(node.id, key): value for key, value in node.said().items()}
        for node in living:
            assert node.gossip is not None
            core = node.gossip.core
            for other in living:
                health = core.health(other.id)
                if health is None or health.state is not State.ALIVE:
                    world.checks.breach(name, f"{node.name} calls {other.name} {health and health.state}")
            if self.lost is not None and core.health(self.lost.id) is not None:
                world.checks.breach(name, f"{node.name} still counts {self.lost.name}, which was removed")
            known = {key: value for space in SPACES for key, value in core.facts.facts(space).items()}
            if known != said:
                wrong = {key for key in known.keys() | said.keys() if known.get(key) != said.get(key)}
                world.checks.breach(name, f"{node.name} is wrong about {sorted(wrong)[:4]}")
        if len({node.gossip.core.root for node in living if node.gossip is not None}) > 1:
            world.checks.breach(name, "the roots differ")

    def _everybody_is_let_in(self, within_ms: int) -> None:
        def outside() -> list[str]:
            agents = [(node.name, node.agent) for node in self._living()]
            return [name for name, agent in agents if agent is None or agent.worker.state is not SessionState.OPEN]

        world = self.world
        world.heap.run(world.heap.now_ms + within_ms, is_over=lambda: not outside(), looks_often=True)
        if names := outside():
            world.checks.breach("everybody is let in", f"{names} have no session")

    def _explains_who_lacks_what(self) -> None:
        """At every replica, for the job that fits nowhere."""
        if self._hopeless is None:
            return
        job, lack = self._hopeless
        for node in self._living():
            if node.machine is None or not node.has_replica:
                continue
            try:
                told = node.machine.answer(Explain(job))
            except MeshError as error:
                self.world.checks.breach("explain says what each node lacks", f"{node.name} says {error}")
            assert isinstance(told, Explanation)
            unexplained = [each for each in told.nodes if not any(line.startswith(lack) for line in each.lacks)]
            names = {each.node for each in told.nodes}
            if told.can_ever_run or unexplained or names != {each.id for each in self._living()}:
                self.world.checks.breach("explain says what each node lacks", f"{node.name} says {told}")
