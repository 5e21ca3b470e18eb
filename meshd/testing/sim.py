"""One run of the simulated mesh from a seed: who submits what, what goes wrong, and what must be true at the end.

python -m meshd.testing.sim --seed 7 --trace
python -m meshd.testing.sim --seeds 2000 --jobs 2
python -m meshd.testing.sim --seeds 200 --without 'the floor' --find 'what starts is leased'
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from msgspec.structs import replace as changed

from meshd.errors import MeshError
from meshd.model import JobId, TaskState
from meshd.raft.state.commands import AnyAnswer, AnyCommand, Rejected, RemoveMember, SetDraining
from meshd.raft.state.history import Tail
from meshd.testing.archives import NotHere
from meshd.testing.attacks import Attacks
from meshd.testing.checks import Breach
from meshd.testing.epilogue import Epilogue
from meshd.testing.faults import CALM
from meshd.testing.load import Client, placed, unplaceable
from meshd.testing.nodes import SimNode
from meshd.testing.profiles import profile_of
from meshd.testing.world import World
from meshd.views import ListTasks
from meshd.work.worker import HandOver

TAIL = Tail(jobs=1, age_ms=20_000, batch=1, segment_jobs=3)
"""So that nearly everything goes through the history, in many small segments."""
HISTORY_ROTS = 3
OPERATIONS_MAX = 8
"""The power goes in the middle of one of the next disk operations …"""
CUT_WITHIN_MS = 1_000
"""… if they come within a second."""
CLOCKS_WRONG_MS = (3_000, 20_000, 3_600_000, 400 * 86_400_000)

ASKED_TWICE = 0.4

HISTORY_MS = 60_000
"""… and every voter has the whole history within this."""
SETTLE_MS = 900_000
"""After the last fault everything acknowledged must be finished within this."""


class Sim:
    def __init__(self, seed: int, *, has_history: bool = False) -> None:
        self.faults, self.load = profile_of(seed)
        self.world = World(seed, self.faults, TAIL if has_history else None)
        self.client = Client(self.world, rough=self.faults is not CALM)
        self.attacks = Attacks(self.world, self.client)
        self.lost: SimNode | None = None
        self.is_removed = False
        self._hopeless: tuple[JobId, str] | None = None
        self._leaves: SimNode | None = None
        self._dies: SimNode | None = None

    def run(self) -> Sim:
        """Raises Breach."""
        world = self.world
        if self.faults is CALM:
            world.checks.must_live = frozenset(world.nodes)
        random = world.heap.random
        world.found(servers=random.choice(self.faults.servers), workers=random.choice(self.faults.workers))
        for _ in range(random.randint(*self.load.jobs)):
            world.heap.after(random.uniform(0, max(self.faults.lasts_ms - 5_000, 10_000)), self._someone_submits)
        world.heap.after(random.uniform(0, 10_000), self._someone_submits_in_vain)
        self._plan_faults()
        if world.tail is not None:
            self._plan_faults_of_history()
        world.heap.run(world.began_ms + self.faults.lasts_ms + SETTLE_MS, is_over=self._is_over)
        self._check_end()
        Epilogue(world, self.lost, self._hopeless).run()
        return self

    def _someone_submits(self) -> None:
        heap = self.world.heap
        staying = [node.offer for node in self.world.nodes.values() if node not in (self._leaves, self._dies)]
        spec = placed(self.load.some_job(heap.random), staying, heap.random)
        finished = [key for key, task in self.world.checks.tasks.items() if task.has_succeeded]
        job = self.client.submit(changed(spec, inputs=self.load.some_input(finished, heap.random)))
        if heap.chance(0.15):
            heap.after(heap.between(0, 15_000), lambda: self.client.cancel(job))

    def _someone_submits_in_vain(self) -> None:
        spec, lack = unplaceable(self.world.heap.random)
        job = self.client.submit(spec)
        self.world.checks.unplaceable.add(job)
        self._hopeless = job, lack

    def _plan_faults(self) -> None:
        heap, faults = self.world.heap, self.faults
        nodes = list(self.world.nodes.values())

        def moment() -> float:
            return heap.between(1_500, max(faults.lasts_ms, 2_000))

        servers = [node for node in nodes if node.is_server]

        def plan(times: int, fault: Callable[[SimNode], None], among: list[SimNode]) -> None:
            for _ in range(times):
                node = heap.random.choice(among)
                heap.after(moment(), lambda node=node: fault(node))  # type: ignore[misc]

        plan(faults.crashes, self._crash, nodes)
        plan(faults.disk_hangs, self._hang_disk, servers)
        plan(faults.failed_syncs, self._fail_sync, servers)
        plan(faults.full_disks, self._fill_disk, servers)
        plan(faults.clock_jumps, self._set_clock, [heap.random.choice(servers)])
        plan(faults.rots, self.attacks.rot, servers)
        for _ in range(faults.power_cuts):
            heap.after(moment(), self.attacks.cut_power)
        for _ in range(faults.blinks):
            heap.after(moment(), self.attacks.blink)
        for _ in range(faults.hunts):
            heap.after(moment(), self.attacks.hunt)
        for _ in range(faults.blackouts):
            heap.after(moment(), self.attacks.black_out)
        for _ in range(faults.splits):
            heap.after(moment(), self._split)
        for _ in range(faults.grows):
            heap.after(moment(), lambda: self._grow(is_server=True))
        for _ in range(faults.guests):
            heap.after(moment(), lambda: self._grow(is_server=False))
        for _ in range(faults.copies):
            heap.after(moment(), lambda: self.attacks.copy(heap.random.choice(nodes)))
        for _ in range(faults.freezes):
            node = heap.random.choice(nodes)
            whole = heap.chance(0.5)
            for_ms = heap.between(1_000, 12_000 if whole else 40_000)
            heap.after(moment(), lambda node=node, whole=whole, ms=for_ms: self._freeze(node, ms, whole))  # type: ignore[misc]
        for _ in range(faults.cuts):
            node = heap.random.choice([node for node in nodes if faults.cuts_hit_servers or not node.is_server])
            for_ms, one_way = heap.between(*faults.cut_ms), heap.chance(0.25)
            heap.after(moment(), lambda n=node, ms=for_ms, o=one_way: self.world.network.cut_off(n, ms, one_way=o))  # type: ignore[misc]
        for _ in range(faults.freezes_then_cuts):
            heap.after(moment(), lambda: self._freeze_then_cut(heap.random.choice(nodes)))
        for _ in range(faults.transfers):
            heap.after(moment(), self._hand_over)
        for _ in range(faults.offers):
            heap.after(moment(), lambda: self._offer(heap.random.choice(nodes)))
        if heap.chance(faults.drains):
            leaves = self._leaves = heap.random.choice(nodes)
            heap.after(moment(), lambda: self._drain(leaves))
        if heap.chance(faults.dies_for_good):
            dies = self._dies = heap.random.choice(nodes)
            heap.after(moment(), lambda: self._die(dies))

    def _plan_faults_of_history(self) -> None:
        """Directories that are lost and files that rot, at one server and never elsewhere; disks that fill up, anywhere."""
        if self.faults is CALM:
            return
        heap = self.world.heap
        servers = [node for node in self.world.nodes.values() if node.is_server]
        unlucky = heap.random.choice(servers) if len(servers) > 2 else None
        for _ in range(HISTORY_ROTS):
            at_ms = heap.between(1_500, max(self.faults.lasts_ms, 2_000))
            if unlucky is not None:
                heap.after(at_ms, lambda: self.attacks.spoil_history(unlucky))
            full = heap.random.choice(servers)
            heap.after(heap.between(1_500, 20_000), full.segments.fill)
            heap.after(heap.between(20_000, 40_000), full.segments.drain)

    def _hand_over(self) -> None:
        """A requested transfer: whoever leads now gives up."""
        for node in self.world.nodes.values():
            if node.server is not None and node.is_awake:
                node.server.hand_over()

    def _crash(self, node: SimNode) -> None:
        if not node.is_alive or node is self.lost:
            return
        heap = self.world.heap
        loses_power = heap.chance(self.faults.power_loss)
        if loses_power and heap.chance(0.5):
            node.disk.cut_in(heap.random.randrange(OPERATIONS_MAX))
            heap.after(CUT_WITHIN_MS, lambda: node.disk.cut_in(None))
            return
        node.crash(loses_power=loses_power)
        node.comes_back(heap.random.choice(self.faults.restart_ms))

    def _hang_disk(self, node: SimNode) -> None:
        for_ms = self.world.heap.between(*self.faults.hang_ms)
        self.world.heap.note(f"{node.name}: its disk hangs for {int(for_ms)} ms")
        node.disk_hangs_until_ms = self.world.heap.now_ms + int(for_ms)

    def _fail_sync(self, node: SimNode) -> None:
        node.disk.fail_sync()

    def _fill_disk(self, node: SimNode) -> None:
        heap = self.world.heap
        for_ms = heap.between(*self.faults.full_ms)
        heap.note(f"{node.name}: its disk is full for {int(for_ms)} ms")
        node.disk.fill(leaving=heap.random.choice((0, 4096, 65_536)))
        heap.after(for_ms, node.disk.drain)

    def _set_clock(self, node: SimNode) -> None:
        heap = self.world.heap
        node.wall_offset_ms = heap.random.choice((-1, 1)) * heap.random.choice(CLOCKS_WRONG_MS)
        heap.note(f"{node.name}: its clock is wrong by {node.wall_offset_ms} ms")
        heap.after(heap.between(1_000, 30_000), lambda: setattr(node, "wall_offset_ms", 0))

    def _split(self) -> None:
        """Two halves, or two that share one node."""
        heap = self.world.heap
        nodes = [node for node in self.world.nodes.values() if node is not self.lost]
        heap.random.shuffle(nodes)
        if heap.chance(0.5) and len(nodes) > 2:
            nodes.pop()
        middle = heap.random.randint(1, len(nodes) - 1)
        self.world.network.split(nodes[:middle], nodes[middle:], heap.between(*self.faults.split_ms))

    def _grow(self, *, is_server: bool) -> None:
        """Somebody joins by the invite of the founding."""
        node = self.world.stranger(is_server=is_server)

        def joined(answer: AnyAnswer) -> None:
            if isinstance(answer, Rejected):
                self.world.checks.breach("a stranger with an invite may join", str(answer))
            if not node.starts:
                self.world.heap.note(f"{node.name}: joins")
                node.members = tuple(self.world.nodes)
                node.start()

        self._ask(self.world.join(node), joined)

    def _ask(self, command: AnyCommand, answered: Callable[[AnyAnswer], None]) -> None:
        """A server, and perhaps once more, by somebody who does not wait for the answer."""
        for _ in range(2 if self.world.heap.chance(ASKED_TWICE) else 1):
            self.client.send(command, answered, at_servers=True)

    def _freeze(self, node: SimNode, for_ms: float, whole: bool) -> None:
        if node.is_awake:
            node.freeze(for_ms, whole=whole)

    def _freeze_then_cut(self, node: SimNode) -> None:
        """It wakes to old answers in its mailbox, and to a network that is gone."""
        heap = self.world.heap
        asleep_ms, cut_ms = heap.between(500, 9_500), heap.between(10_000, 40_000)
        self._freeze(node, asleep_ms, whole=False)
        heap.after(asleep_ms - 2, lambda: self.world.network.cut_off(node, cut_ms, one_way=False))

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
            self.client.send(SetDraining(node.id, True), lambda answer: self._perhaps_take_back(node))
        if self.world.heap.chance(self.faults.hands_over):
            self.world.heap.after(self.world.heap.between(0, 3_000), lambda: node.handle(HandOver()))

    def _perhaps_take_back(self, node: SimNode) -> None:
        heap = self.world.heap

        def taken_back(answer: AnyAnswer) -> None:
            node.is_draining = False
            if node.is_alive:
                node.offers(node.slots)

        if heap.chance(self.faults.comes_back):
            heap.after(heap.between(0, 15_000), lambda: self.client.send(SetDraining(node.id, False), taken_back))

    def _die(self, node: SimNode) -> None:
        """For good. Somebody sees it a while later, and says so. Not the last of the log: that is for `meshd recover`."""
        if self.attacks.has_rotten or any(
            0 < each.voted_among < 3 for each in self.world.nodes.values() if not each.is_gone
        ):
            return
        if node.is_alive:
            node.crash(loses_power=self.world.heap.chance(self.faults.power_loss))
        self.lost = node
        node.is_gone = True
        self.world.heap.note(f"{node.name}: is gone for good")

        def removed(answer: AnyAnswer) -> None:
            if isinstance(answer, Rejected):
                self.world.checks.breach("a dead member can be removed", str(answer))
            self.is_removed = True

        self.world.heap.after(30_000, lambda: self._ask(RemoveMember(node.id), removed))

    def _is_over(self) -> bool:
        world = self.world
        return (
            world.heap.now_ms > world.began_ms + max(self.faults.lasts_ms, 15_000)
            and self.client.unanswered == 0
            and (self.lost is None or self.is_removed)
            and len(self.client.acknowledged) == len(world.checks.submitted)
            and world.checks.is_finished()
            and all(node.agent is None or node.agent.worker.attempts.is_empty for node in world.nodes.values())
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
        if world.tail is not None:
            self._check_history()
        if self.faults is CALM:
            checks.nothing_was_lost_without_a_fault()

    def _check_history(self) -> None:
        """Whatever has left the core can be read, as it was, at every voter that there is."""
        world = self.world
        for node in world.nodes.values():
            node.segments.drain()
        world.heap.run(world.heap.now_ms + HISTORY_MS, is_over=lambda: self._unread() is None, looks_often=False)
        if unread := self._unread():
            world.checks.breach("finished work can be read everywhere", unread)

    def _unread(self) -> str | None:
        checks = self.world.checks
        for node in self.world.nodes.values():
            server = node.server
            if server is None or server.archive is None or not node.has_replica or not node.is_awake:
                continue
            for job in self.client.acknowledged:
                try:
                    page = server.archive.answer(ListTasks(job, limit=1000))
                except (NotHere, MeshError) as error:
                    return f"job {job[-6:]} at {node.name}: {error!r}"
                if any(task != checks.view_of(job, task.task) for task in page.tasks):
                    return f"job {job[-6:]} at {node.name} is not what it was"
        return None


def main() -> int:
    from meshd.testing.campaign import cores, how_to_repeat, run_seeds

    parser = argparse.ArgumentParser(description="Run simulated meshes and check the protocol's rules.")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, default=20, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=cores(), help="processes; as many as there are cores by default")
    parser.add_argument("--without", help="take this rule out: see meshd.testing.ablations")
    parser.add_argument("--history", action="store_true", help="finished jobs leave the core for segments on disk")
    parser.add_argument("--find", metavar="CHECK", help="end with the first seed in which this check fails")
    parser.add_argument("--trace", action="store_true", help="print what happened in --seed")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return _run_one(arguments.seed, arguments.without, has_trace=arguments.trace, has_history=arguments.history)
    began, cpu_s, failed = time.monotonic(), 0.0, []
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    verdicts = run_seeds(seeds, jobs=arguments.jobs, rule=arguments.without, has_history=arguments.history)
    for verdict in verdicts:
        cpu_s += verdict.cpu_s
        if arguments.find is not None and verdict.check != arguments.find:
            continue
        if verdict.breach:
            failed.append(verdict)
            print(
                verdict,
                f"    {how_to_repeat(verdict, arguments.without, has_history=arguments.history)}",
                sep="\n",
                flush=True,
            )
        if verdict.breach and arguments.find is not None:
            verdicts.close()
            return 1
    took_s = time.monotonic() - began
    print(
        f"{len(seeds)} seeds from {arguments.first}: {len(failed)} failed; "
        f"{took_s:.0f} s on {arguments.jobs} cores, {cpu_s / len(seeds):.2f} s of CPU each"
    )
    return 1 if failed else 0


def _run_one(seed: int, rule: str | None, *, has_trace: bool, has_history: bool) -> int:
    from meshd.testing.ablations import without

    with without(rule):
        sim = Sim(seed, has_history=has_history)
        try:
            sim.run()
            verdict = "holds"
        except Breach as breach:
            verdict = str(breach)
    if has_trace:
        print(*sim.world.heap.history, sep="\n")
    print(f"seed {seed}: {verdict} ({sim.world.heap.now_ms / 1000:.0f} s, {sim.world.heap.digest()})")
    return 0 if verdict == "holds" else 1


if __name__ == "__main__":
    sys.exit(main())
