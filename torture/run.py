"""A run: cycles of faults under load, and after each round of them a check of everything that was acknowledged in it.

found ─▶ load ─▶ weather · kill · restart ─▶ … ─▶ faults end ─▶ all back, all finished ─▶ judge ─▶ next round
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random

from torture import after, plan, report
from torture.api import NodeApi
from torture.checker import Listed, Task, Verdict, judge
from torture.clients import Load, Round
from torture.disks import Disks
from torture.faults import Faults
from torture.history import History
from torture.membership import Undecided
from torture.mesh import Meshd
from torture.network import Network
from torture.observers import Observers
from torture.processes import Engine, NeverReady, Processes, wait_until
from torture.stock_mesh import Stock

COME_BACK_S = 120.0
"""A node that was started and is not ready by then, faults being over, never came back."""
WHOLE_S = 120.0
"""Far over what it takes (10 s), because machines that run this are often busy with more than this."""
FINISH_S = 120.0
"""For what is left when the faults stop; a session of a lost node ends after 12 s, its tasks are held at most as long."""
ROUND_ACKNOWLEDGED_MAX = 4_000
"""A mesh forgets finished jobs past 10,000, observers' and unacknowledged ones too: a check has to come long before."""
POLL_S = 0.02
WATCH_EVERY_S = 0.25
STATUS_EVERY_S = 0.5
"""A status costs each node some milliseconds: asked in a tight loop it is a load of its own."""
STEADY_S, STEADY_SHARE = 2.0, 0.5
"""Before a drill strikes: so long, at least so much of the load that was asked for."""
RESTART_S = 1.0
"""After a node ended by itself it is started again, as a service manager would."""

Say = Callable[[str], None]
ENGINES: dict[str, Callable[[Network, Path], Engine]] = {"meshd": Meshd, "stock": Stock}


@dataclass(frozen=True, slots=True)
class Options:
    cycles: int
    nodes: int
    seed: int
    engine: str
    home: Path
    faults: tuple[str, ...] = plan.DEFAULT_FAULTS
    clients: int = 4
    rate_s: float = 15.0
    check_every: int = 50
    keep_going: bool = False
    payload_bytes: int = 0
    drill: str = ""


class Torture:
    def __init__(self, options: Options, network: Network, disks: Disks, say: Say) -> None:
        self._options = options
        self._network = network
        self._say = say
        root = Path(__file__).parents[1]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MESH_", "MESHD_"))}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # agents start in a third of the time with compiled modules
        environment["PYTHONPATH"] = f"{root}:{root / 'cli'}"
        self._processes = Processes(network, options.home, environment)
        self._engine: Engine = ENGINES[options.engine](network, options.home)
        faults = () if options.drill else options.faults
        self._planned_faults = [fault for fault in faults if fault not in self._engine.cannot]
        are_clocks_moved = plan.Weather.CLOCK.value in self._planned_faults
        self._faults = Faults(
            network, self._processes, self._engine, disks, options.home, are_clocks_moved=are_clocks_moved
        )
        self._history = History(options.home / "history.jsonl")
        self._load = Load(
            {node: self._engine.socket(node) for node in network.nodes},
            self._history,
            options.seed,
            clients=options.clients,
            rate_s=options.rate_s,
            shapes=self._engine.shapes,
        )
        self.observers = Observers([self._engine.socket(node) for node in network.nodes])
        self._rounds = 0
        self._troubles: list[str] = []
        """Of this round: what is stuck already before the check."""
        self.verdict = Verdict()
        self.done: list[report.Done] = []
        self.ended: list[str] = []
        self.is_stopping = False

    def run(self) -> None:
        """Until all cycles are done, a check fails or `is_stopping` is set; always ends with a check."""
        try:
            self._engine.found(self._processes)
            self._say(f"a mesh of {len(self._network.nodes)} stands")
            self._begin_round()
            since_check = 0
            for cycle in self._planned():
                if self.is_stopping or (self._troubles and not self._options.keep_going):
                    break
                self._perform(cycle)
                since_check += 1
                is_full = self._history.acknowledged() >= ROUND_ACKNOWLEDGED_MAX
                if since_check >= self._options.check_every or is_full:
                    self._end_round()
                    since_check = 0
                    if not self.verdict.is_good and not self._options.keep_going:
                        return
                    self._begin_round()
            self._end_round()
        finally:
            self._load.stop()
            self.observers.stop()
            self._history.close()
            self._processes.stop()

    def _planned(self) -> Iterable[plan.Cycle]:
        if self._options.drill:
            return plan.drill(self._options.drill, self._options.cycles)
        return plan.cycles(self._options.seed, self._options.cycles, self._planned_faults)

    # --- a cycle ------------------------------------------------------------------------------------------------------

    def _perform(self, cycle: plan.Cycle) -> None:
        nodes = self._network.nodes
        begun_s = time.monotonic()
        if self._options.drill:
            self._wait(self._is_steady, WHOLE_S, "the mesh is not whole", every_s=STATUS_EVERY_S)
        rng = Random(cycle.picks + 3)  # noqa: S311
        hit_s = time.monotonic()
        if cycle.weather is plan.Weather.BIT_FLIP:
            self._wait_whole()
        what = self._begin(cycle)
        if cycle.weather:
            self._watch_until(hit_s + cycle.weather_s * (rng.random() if cycle.is_killed_within else 1.0))
            if not cycle.is_killed_within:
                self._end_faults()
            if cycle.weather is plan.Weather.BIT_FLIP:
                self._wait_whole()  # two damaged disks at a time are more than is promised
        victims = plan.victims(cycle, nodes, self._engine.leader(nodes) if cycle.kill else None)
        if victims:
            hit_s = time.monotonic()
            self._processes.kill(victims)
            self._watch_until(hit_s + cycle.down_s)
            for node in victims:
                self._start(node)
        if cycle.weather and cycle.is_killed_within:
            self._watch_until(begun_s + cycle.weather_s)
            self._end_faults()
        self._wait(lambda: self._all_ready() and bool(self._history.acknowledged_s(hit_s)), COME_BACK_S, "not all are back and writing")  # fmt: skip
        times = [hit_s, *self._history.acknowledged_s(hit_s)]
        silence_s = max((b - a for a, b in itertools.pairwise(times)), default=time.monotonic() - hit_s)
        done = report.Done.of(cycle, victims, what, silence_s, time.monotonic() - begun_s)
        self.done.append(done)
        self._say(
            f"{cycle.number:5} {done.seconds:5.1f} s  {' '.join(done.faults)} {','.join(victims)} "
            f"down {cycle.down_s:.1f} s, silence {silence_s:.2f} s {what}"
        )

    def _begin(self, cycle: plan.Cycle) -> str:
        try:
            return self._faults.begin(cycle, self._engine.leader(self._network.nodes) if cycle.weather else None)
        except Undecided as error:
            self._troubles.append(str(error))
            return str(error)

    def _end_faults(self) -> None:
        try:
            self._faults.end()
        except Undecided as error:
            self._troubles.append(str(error))
            self._say(f"      {error}")

    def _wait_whole(self) -> None:
        self._wait(
            lambda: self._all_ready() and not self._engine.behind(self._network.nodes),
            WHOLE_S,
            "not whole",
            every_s=STATUS_EVERY_S,
        )

    def _is_steady(self) -> bool:
        """Whole, and writing without a break."""
        return (
            not self._engine.behind(self._network.nodes)
            and len(self._history.acknowledged_s(time.monotonic() - STEADY_S))
            > STEADY_S * self._options.rate_s * STEADY_SHARE
        )

    def _watch_until(self, ends_s: float) -> None:
        """Who leads is looked at meanwhile, so that two leaders in one term are seen."""
        while (left_s := ends_s - time.monotonic()) > 0:
            time.sleep(min(left_s, WATCH_EVERY_S))
            if ends_s - time.monotonic() > 0.1:
                self._engine.leader([node for node in self._network.nodes if self._processes.is_answering(node)])

    def _start(self, node: str) -> None:
        self._processes.start(node, self._engine.command(node))

    def _all_ready(self) -> bool:
        return not [node for node in self._network.nodes if not self._is_ready(node)]

    def _is_ready(self, node: str) -> bool:
        try:
            is_ready = self._processes.is_ready(node)
        except NeverReady as error:
            is_ready = False
            why = str(error)
        else:
            why = ""
            if is_ready and not self._processes.is_running(node):
                is_ready, why = False, f"{node} ended while it ran: {self._processes.last_words(node)}"
        if why and self._processes.age_s(node) > RESTART_S:
            self.ended.append(why)
            self._say(f"      {why}")
            self._start(node)
        return is_ready

    def _wait(self, check: Callable[[], bool], within_s: float, otherwise: str, *, every_s: float = POLL_S) -> None:
        try:
            wait_until(check, within_s, otherwise, every_s=every_s)
        except NeverReady as error:
            states = {node: self._processes.state(node) for node in self._network.nodes}
            self._troubles.append(f"{error}: {states}")
            self._say(f"      {error}: {states}")

    # --- a round ------------------------------------------------------------------------------------------------------

    def _begin_round(self) -> None:
        self._rounds += 1
        name = f"round{self._rounds}"
        self._load.round = Round(name, self._options.home / f"{name}.traces", {}, self._options.payload_bytes)
        self._load.start()
        if self._options.drill and self._options.engine == "meshd":
            self.observers.start()

    def _end_round(self) -> None:
        """Faults end, everybody comes back, everything finishes; then it is judged."""
        begun_s = time.monotonic()
        nodes = self._network.nodes
        self._load.stop()
        self.observers.stop()
        self._end_faults()
        self._wait(self._all_ready, COME_BACK_S, "not all are back")
        with suppress(NeverReady):
            wait_until(lambda: not self._engine.behind(nodes), WHOLE_S, "the mesh is not whole", every_s=STATUS_EVERY_S)
        behind = self._engine.behind(nodes)
        self._troubles += [f"{node} {why} {WHOLE_S:.0f} s after the faults" for node, why in behind.items()]
        round_ = self._load.round
        ops = self._history.take()
        listed: dict[str, list[Listed]] = {}
        tasks: list[Task] = []
        # Who is behind is stuck, and not asked what it has.
        if sockets := {node: self._engine.socket(node) for node in nodes if node not in behind}:
            try:
                after.wait_finished(NodeApi(next(iter(sockets.values()))), round_.name, FINISH_S)
                traced = [job for job, kind in round_.kinds.items() if kind]
                listed, tasks = after.gather(sockets, round_.name, traced)
            except after.Unanswered as error:
                self._troubles.append(f"after the faults: {error}")
        verdict = judge(
            ops, listed=listed, tasks=tasks, traces=after.read_traces(round_.traces), kinds=round_.kinds, absent=self._troubles, reigns=self._engine.reigns
        )  # fmt: skip
        self._troubles = []
        self._engine.reigns.clear()
        self.verdict.add(verdict)
        self._say(
            f"{round_.name}: {len(self.done)} cycles, {verdict.acknowledged} acknowledged, lost {len(verdict.lost)}, "
            f"doubled {len(verdict.doubled)}, stuck {len(verdict.stuck)}; checked in {time.monotonic() - begun_s:.1f} s"
        )


def torture(options: Options, say: Say, on_begun: Callable[[Torture], None]) -> report.Report:
    """Raises NeverReady when not even the mesh comes to stand."""
    started, begun_s = datetime.now(UTC), time.monotonic()
    nodes = [f"node{number}" for number in range(1, options.nodes + 1)]
    small = _small(nodes, options.faults)
    with Network(nodes) as network, Disks(options.home, nodes, small=small) as disks:
        run = Torture(options, network, disks, say)
        on_begun(run)
        run.run()
    return report.make(
        run.verdict,
        run.done,
        engine=options.engine,
        nodes=options.nodes,
        seed=options.seed,
        command=_command(sys.argv),
        date=started.isoformat(timespec="seconds"),
        load="load average {:.1f} {:.1f} {:.1f}".format(*os.getloadavg()) + f" on {os.cpu_count()} cores",
        seconds=time.monotonic() - begun_s,
        ended=run.ended,
        client_calls=run.observers.calls,
        client_errors=run.observers.errors,
        client_slowest_s=run.observers.slowest_s,
    )


def _small(nodes: list[str], faults: Sequence[str]) -> list[str]:
    """Whose disks are to be filled."""
    if plan.Weather.DISKS_FULL in faults:
        return nodes
    return nodes[:1] if plan.Weather.DISK_FULL in faults else []


def _command(argv: Sequence[str]) -> str:
    return " ".join(["python -m torture", *argv[1:]])
