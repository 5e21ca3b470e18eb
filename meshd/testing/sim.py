"""One run of the simulated mesh from a seed: who submits what, what goes wrong, and what must be true at the end.

python -m meshd.testing.sim --seed 7 --trace
python -m meshd.testing.sim --seeds 200
python -m meshd.testing.sim --without 'the floor' --seeds 200
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from meshd.model import Array, JobId, JobSpec, OnLost, Retry, Run, TaskState, Timeout
from meshd.raft.commands import AnyAnswer, AnyCommand, Cancel, Rejected, RemoveMember, SetDraining, Submit, Submitted
from meshd.testing.checks import Breach
from meshd.testing.world import CALM, Faults, SimNode, World
from meshd.worker import HandOver

SETTLE_MS = 900_000
"""After the last fault everything acknowledged must be finished within this."""


class Client:
    """Someone who submits, cancels and resends, at any node, with one id for one thing."""

    def __init__(self, world: World, rough: bool) -> None:
        self.world, self.rough = world, rough
        self.acknowledged: dict[JobId, JobSpec] = {}
        self.unanswered = 0

    def submit(self, spec: JobSpec) -> JobId:
        job = uuid7(self.world.wall_ms(), self.world.heap.random)
        self.world.heap.note(f"client: submits {job[-6:]} x{spec.array.count} {spec.on_lost} {spec.lost_after_ms}")

        def answered(answer: AnyAnswer) -> None:
            if not isinstance(answer, Submitted):
                raise Breach(f"a good job is taken: {answer} (seed {self.world.seed})")
            self.acknowledged[job] = spec

        self.send(Submit(job, spec), answered)
        if self.rough and self.world.heap.chance(0.4):
            delay_ms = self.world.heap.between(200, 30_000)
            self.world.heap.after(delay_ms, lambda: self.send(Submit(job, spec), answered))
        return job

    def cancel(self, job: JobId) -> None:
        self.world.heap.note(f"client: cancels {job[-6:]}")
        self.send(Cancel(job), lambda answer: None)

    def send(self, command: AnyCommand, answered: object) -> None:
        """Until it is answered: every second, anywhere."""
        self.unanswered += 1
        is_answered = False

        def done(answer: AnyAnswer | None) -> None:
            nonlocal is_answered
            if answer is not None and not is_answered:
                is_answered = True
                self.unanswered -= 1
                answered(answer)  # type: ignore[operator]

        def attempt() -> None:
            if is_answered:
                return
            alive = [node for node in self.world.nodes.values() if node.is_alive]
            if alive:
                self.world.log.propose(self.world.heap.random.choice(alive), command, done)
            self.world.heap.after(1_000, attempt)

        attempt()


def uuid7(wall_ms: int, random: Random) -> JobId:
    number = wall_ms << 80 | 7 << 76 | random.getrandbits(12) << 64 | 2 << 62 | random.getrandbits(62)
    digits = f"{number:032x}"
    return JobId("-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])))


@dataclass(frozen=True)
class Load:
    """What is submitted: how much, and what each job is drawn from."""

    jobs: tuple[int, int] = (4, 12)
    on_lost: tuple[OnLost, ...] = (OnLost.RERUN, OnLost.RERUN, OnLost.WAIT, OnLost.FAIL)
    lost_after_ms: tuple[int | None, ...] = (None, None, 0, 5_000, 30_000, 40_000)
    lengths_ms: tuple[int, ...] = (20, 300, 2_000, 8_000, 25_000)
    counts: tuple[int, ...] = (1, 1, 3, 6)

    def some_job(self, random: Random) -> JobSpec:
        on_lost = random.choice(self.on_lost)
        tries = 1 if on_lost is OnLost.FAIL else random.choice((1, 2, 3))
        length_ms, failures = random.choice(self.lengths_ms), random.choice((0, 0, 0, 1))
        return JobSpec(
            backend=("process",),
            run=Run(args=("work", str(length_ms), str(failures))),
            array=Array(count=random.choice(self.counts), at_once=random.choice((0, 0, 1))),
            retry=Retry(attempts=tries, backoff_min_ms=200, backoff_max_ms=2_000),
            timeout=Timeout(total_ms=90_000 if random.random() < 0.1 else 0),
            on_lost=on_lost,
            lost_after_ms=random.choice(self.lost_after_ms),
            priority=random.choice((50, 50, 80)),
        )


class Sim:
    def __init__(self, seed: int) -> None:
        self.faults, self.load = _profile(seed)
        self.world = World(seed, self.faults)
        self.client = Client(self.world, rough=self.faults is not CALM)
        self.lost: SimNode | None = None

    def run(self) -> Sim:
        """Raises Breach."""
        world = self.world
        world.found(servers=3, workers=world.heap.random.randint(0, 2))
        random = world.heap.random
        for _ in range(random.randint(*self.load.jobs)):
            world.heap.after(random.uniform(0, max(self.faults.lasts_ms - 5_000, 10_000)), self._someone_submits)
        self._plan_faults()
        world.heap.run(self.faults.lasts_ms + SETTLE_MS, is_over=self._is_over)
        self._check_end()
        return self

    def _someone_submits(self) -> None:
        heap = self.world.heap
        job = self.client.submit(self.load.some_job(heap.random))
        if heap.chance(0.15):
            heap.after(heap.between(0, 15_000), lambda: self.client.cancel(job))

    def _plan_faults(self) -> None:
        heap, faults = self.world.heap, self.faults
        nodes = list(self.world.nodes.values())

        def moment() -> float:
            return heap.between(1_500, max(faults.lasts_ms, 2_000))

        for _ in range(faults.crashes):
            node = heap.random.choice(nodes)
            heap.after(moment(), lambda node=node: self._crash(node))  # type: ignore[misc]
        for _ in range(faults.freezes):
            node = heap.random.choice(nodes)
            whole = heap.chance(0.5)
            for_ms = heap.between(1_000, 12_000 if whole else 40_000)
            heap.after(moment(), lambda node=node, whole=whole, ms=for_ms: self._freeze(node, ms, whole))  # type: ignore[misc]
        for _ in range(faults.cuts):
            node = heap.random.choice(nodes)
            for_ms, one_way = heap.between(*faults.cut_ms), heap.chance(0.25)
            heap.after(moment(), lambda n=node, ms=for_ms, o=one_way: self.world.cut_off(n, ms, one_way=o))  # type: ignore[misc]
        for _ in range(faults.freezes_then_cuts):
            heap.after(moment(), lambda: self._freeze_then_cut(heap.random.choice(nodes)))
        for _ in range(faults.transfers):
            heap.after(moment(), self.world.log.step_aside)
        for _ in range(faults.offers):
            heap.after(moment(), lambda: self._offer(heap.random.choice(nodes)))
        if heap.chance(faults.drains):
            heap.after(moment(), lambda: self._drain(heap.random.choice(nodes)))
        if heap.chance(faults.dies_for_good):
            heap.after(moment(), lambda: self._die(heap.random.choice(nodes)))

    def _crash(self, node: SimNode) -> None:
        if not node.is_alive or node is self.lost:
            return
        node.crash()
        heap = self.world.heap
        heap.after(heap.between(*heap.random.choice(self.faults.restart_ms)), lambda: self._restart(node))

    def _restart(self, node: SimNode) -> None:
        if not node.is_alive and node is not self.lost:
            node.start()

    def _freeze(self, node: SimNode, for_ms: float, whole: bool) -> None:
        if node.is_awake:
            node.freeze(for_ms, whole=whole)

    def _freeze_then_cut(self, node: SimNode) -> None:
        """It wakes to old answers in its mailbox, and to a network that is gone."""
        heap = self.world.heap
        asleep_ms, cut_ms = heap.between(500, 9_500), heap.between(10_000, 40_000)
        self._freeze(node, asleep_ms, whole=False)
        heap.after(asleep_ms - 2, lambda: self.world.cut_off(node, cut_ms, one_way=False))

    def _offer(self, node: SimNode) -> None:
        """Its owner changes his mind about how much it takes on."""
        heap = self.world.heap
        if not node.is_draining:
            node.offers(heap.random.randint(0, node.slots))
            heap.after(heap.between(500, 5_000), lambda: node.offers(0 if node.is_draining else node.slots))

    def _drain(self, node: SimNode) -> None:
        self.world.heap.note(f"client: drains {node.name}")
        node.is_draining = True
        node.offers(0)
        if self.world.heap.chance(0.5):
            self.client.send(SetDraining(node.id, True), lambda answer: None)
        if self.world.heap.chance(self.faults.hands_over):
            self.world.heap.after(self.world.heap.between(0, 3_000), lambda: node.handle(HandOver()))

    def _die(self, node: SimNode) -> None:
        """For good. Somebody sees it a while later, and says so."""
        if node.is_alive:
            node.crash()
        self.lost = node
        self.world.heap.note(f"{node.name}: is gone for good")

        def removed(answer: AnyAnswer) -> None:
            if isinstance(answer, Rejected):
                raise Breach(f"a dead member can be removed: {answer} (seed {self.world.seed})")

        self.world.heap.after(30_000, lambda: self.client.send(RemoveMember(node.id), removed))

    def _is_over(self) -> bool:
        world = self.world
        return (
            world.heap.now_ms > max(self.faults.lasts_ms, 15_000)
            and self.client.unanswered == 0
            and len(self.client.acknowledged) == len(world.checks.submitted)
            and world.checks.is_finished()
            and all(node.agent is None or not node.agent.worker.attempts.all() for node in world.nodes.values())
        )

    def _check_end(self) -> None:
        world, checks = self.world, self.world.checks
        if not self._is_over():
            held = [
                f"{node.name} holds {node.agent.worker.attempts.listing()}"
                for node in world.nodes.values()
                if node.agent
            ]
            checks.breach("everything finishes", f"{checks.unfinished()} {held}")
        for job in self.client.acknowledged:
            for task in checks.tasks_of(job):
                holders = task.outcome.holders if task.state is TaskState.DONE and task.outcome is not None else ()
                if holders and all(world.nodes[holder] is self.lost for holder in holders):
                    checks.breach("results outlive a machine", f"{job[-6:]}/{task.task}")
        if self.faults is CALM:
            checks.nothing_was_lost_without_a_fault()


def _profile(seed: int) -> tuple[Faults, Load]:
    """Half of the seeds get a bit of everything; the others press on one spot, where a general mix seldom hits."""
    match seed % 12:
        case 0:
            return CALM, Load()
        case 1:  # long absences from jobs that may run once at a time
            promised = Load(
                jobs=(2, 4), on_lost=(OnLost.RERUN,), lost_after_ms=(30_000, 35_000), lengths_ms=(90_000,), counts=(1,)
            )
            return Faults(cuts=4, cut_ms=(50_000, 100_000)), promised
        case 2:  # claims that change all the time, doubled and late
            return Faults(double=0.5, late=0.4, offers=40), Load(jobs=(15, 25), lengths_ms=(20, 300), counts=(3, 6))
        case 3:  # many leaders, each of which tells again what is leased; nodes come and go meanwhile
            careful = Load(
                jobs=(3, 6),
                on_lost=(OnLost.FAIL, OnLost.WAIT),
                lost_after_ms=(45_000,),
                lengths_ms=(25_000,),
                counts=(1, 3),
            )
            return Faults(
                late=0.4, late_ms=(1_000, 12_000), transfers=10, cuts=5, cut_ms=(11_000, 15_000), has_gossip=False
            ), careful
        case 4:  # nodes that leave and hand back what they have
            return Faults(drains=1, hands_over=1), Load(jobs=(10, 15), lengths_ms=(8_000, 25_000), counts=(3, 6))
        case 5:  # sleepers that wake to old answers, and nobody who says that they are gone
            return Faults(late=0.1, late_ms=(1_000, 5_000), freezes_then_cuts=3, has_gossip=False), Load()
        case 6:  # absences about as long as it takes to be called dead, and a slow log
            return Faults(cuts=14, cut_ms=(4_500, 6_500), slow_disk=1), Load()
        case 7:  # quick restarts, and reports of the life before that arrive in the next
            return Faults(late=0.4, late_ms=(1_000, 12_000), crashes=10, restart_ms=((100, 2_000),)), Load(
                jobs=(15, 25), lengths_ms=(300, 2_000), counts=(3, 6)
            )
        case _:
            return _mixed(Random(f"profile {seed}")), Load()  # noqa: S311 - a simulation


def _mixed(random: Random) -> Faults:
    return Faults(
        lose=random.choice((0, 0.02, 0.1)),
        double=random.choice((0, 0.05, 0.4)),
        late=random.choice((0, 0.05, 0.3)),
        late_ms=(100.0, random.choice((1_000.0, 4_000.0, 12_000.0))),
        crashes=random.randint(0, 4),
        freezes=random.randint(0, 2),
        cuts=random.randint(0, 3),
        transfers=random.randint(0, 3),
        offers=random.choice((0, 3, 15)),
        drains=0.3,
        freezes_then_cuts=random.randint(0, 2),
        has_gossip=random.random() < 0.5,
        dies_for_good=0.15,
    )


def _seeds(arguments: argparse.Namespace) -> Iterator[int]:
    yield from [arguments.seed] if arguments.seed is not None else range(arguments.seeds)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run simulated meshes and check the protocol's rules.")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--without", help="take this rule out: see meshd.testing.ablations")
    parser.add_argument("--trace", action="store_true", help="print what happened")
    arguments = parser.parse_args()
    from meshd.testing.ablations import without

    breaches = 0
    with without(arguments.without):
        for seed in _seeds(arguments):
            sim = Sim(seed)
            try:
                sim.run()
                verdict = "holds"
            except Breach as breach:
                breaches += 1
                verdict = str(breach)
            if arguments.trace:
                print(*sim.world.heap.history, sep="\n")
            print(f"seed {seed}: {verdict} ({sim.world.heap.now_ms / 1000:.0f} s, {sim.world.heap.digest()})")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
