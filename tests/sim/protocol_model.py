"""Every order of events in a tiny mesh, with the real state machine at its centre.

Explores, breadth first, all states that two nodes, one or two tasks and a budget of faults
can reach, and looks in each one for a broken promise of protocol.md 4 and 5:

    a  a task is completed once                       e  fences only rise
    b  `wait` and promised `rerun`: never two at once g  never more leases, or running attempts, than slots
    c  `fail`: started at most once                   h  work that survives on a node that is up is not thrown away
    d  from every state, once faults end, every task ends and no node keeps anything

The log is perfect; everything else is a message in a bag: it may arrive at any time, in
any order, be lost, or come twice. Sessions end and views lapse at any moment, so no clock
is needed; only the expiry of `lost_after` moves the machine's time. The node's side below
is the shortest reading of the rules, on purpose apart from `meshd.work.worker`.

A rule can be taken out (`Rules`, or `break_machine`): then a promise must break, or the
rule is not needed, or the model cannot see it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from meshd import codec
from meshd.model import AttemptKey, EndReason, NodeId, OnLost, Outcome, Retry, TaskState
from meshd.raft.state.commands import (
    AnyAnswer,
    Batch,
    Command,
    Ended,
    EndSession,
    Leased,
    OpenSession,
    Reconcile,
    Reconciled,
    Report,
    Reported,
    SessionOpened,
    Stamped,
    Submit,
)
from meshd.raft.state.machine import Machine
from tests.scene import OFFER, WALL_MS, A, B, Scene, job_id, spec

IDS = (A, B)
JOBS = tuple(job_id(number) for number in range(1, 4))
FAIR_STEPS_MAX = 200

POLICIES = {
    "rerun": spec(on_lost=OnLost.RERUN, lost_after_ms=1, retry=Retry(crash_limit=1000, backoff_min_ms=0)),
    "promise": spec(on_lost=OnLost.RERUN, lost_after_ms=30_000, retry=Retry(crash_limit=1000, backoff_min_ms=0)),
    "wait": spec(on_lost=OnLost.WAIT, retry=Retry(crash_limit=1000, backoff_min_ms=0)),
    "fail": spec(on_lost=OnLost.FAIL, lost_after_ms=1, retry=Retry(crash_limit=1000, backoff_min_ms=0)),
}
NEVER_TWO_AT_ONCE = ("promise", "wait")

OUTCOMES = {
    "done": Outcome(reason=EndReason.EXIT, exit_code=0),
    "lost": Outcome(reason=EndReason.LOST),
}


class Rules(NamedTuple):
    """The node's side of the protocol; each may be taken out."""

    floor: bool = True
    """Having answered a list request at fence F, refuse every notice at or below F that is not held."""
    seen_over_epochs: bool = True
    """An attempt is started once, over all epochs."""
    lists_ended: bool = True
    """What has ended is held until its report is answered."""
    drops_unnamed: bool = True
    """What the answer to OpenSession does not name is dropped before anything starts."""
    keeps_stopped: bool = True
    """What the node stopped when cut off stays held, with the outcome `lost`."""
    view_from_sending: bool = True
    """The view counts from the sending, so an attempt cannot start after its session has long ended."""


class Faults(NamedTuple):
    crash: int = 0
    loss: int = 0
    twice: int = 0
    end: int = 0
    """Sessions ended early by the leader, or views that lapse at the node."""
    lists: int = 1
    """List requests, whether or not a digest differed."""


class Setup(NamedTuple):
    policies: tuple[str, ...]
    faults: Faults = Faults()
    nodes: int = 2
    slots: int = 1
    rules: Rules = Rules()
    break_machine: Callable[[Machine], None] | None = None
    bag: int = 5
    """Messages in flight; what would need more is not explored."""
    states: int = 8_000


class Held(NamedTuple):
    key: AttemptKey
    phase: str
    """runs | done | lost"""


class Node(NamedTuple):
    state: str
    """down | opening | open"""
    epoch: int
    seq: int = 0
    held: tuple[Held, ...] = ()
    pending: Message | None = None
    seen: frozenset[int] = frozenset()
    """Fences of attempts that were started."""
    floor: int = 0

    def listing(self, rules: Rules) -> tuple[AttemptKey, ...]:
        return tuple(it.key for it in self.held if rules.lists_ended or it.phase == "runs")


class Message(NamedTuple):
    """One that travels. `command` goes to the log; else it is for the node."""

    kind: str
    """command | opened | answer | notice | stop"""
    node: int
    epoch: int
    seq: int = 0
    command: Command | None = None
    keys: tuple[AttemptKey, ...] = ()
    is_refused: bool = False


class World(NamedTuple):
    machine: int
    """Number of the machine's state; see `Core`."""
    nodes: tuple[Node, ...]
    bag: tuple[Message, ...]
    faults: Faults
    starts: tuple[int, ...]
    completed: tuple[int, ...]
    """By task: the fence of the attempt that completed it, 0 for none."""


class Broken(Exception):
    """A promise was."""


class TaskNow(NamedTuple):
    state: TaskState
    fence: int
    node: NodeId | None
    epoch: int
    due_ms: int | None


class Look(NamedTuple):
    """What the checks see of one machine state."""

    tasks: tuple[TaskNow | None, ...]
    sessions: tuple[tuple[int, bool], ...]
    leases: tuple[tuple[AttemptKey, ...], ...]
    fence: int
    next_timer_ms: int | None


class Core:
    """The real machine as a pure function of numbered states, remembered: many orders lead to the same step."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._snapshots: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._steps: dict[tuple[int, NodeId | None, bytes, int], tuple[int, Any, tuple[Leased, ...]]] = {}
        self._looks: dict[int, Look] = {}

    def first(self) -> int:
        return self._number(Scene(*IDS[: self.setup.nodes], slots=self.setup.slots).machine)

    def step(
        self, state: int, origin: NodeId | None, command: Command | None, elapsed_ms: int = 0
    ) -> tuple[int, Any, tuple[Leased, ...]]:
        """(next state, answer, lease notices) of one entry."""
        body = b"" if command is None else codec.encode(command)
        key = (state, origin, body, elapsed_ms)
        if key not in self._steps:
            machine = self._machine(state)
            stamped = (Stamped(origin or A, msgspec.Raw(body)),) if body else ()
            answers = machine.apply(1, codec.encode(Batch(elapsed_ms, WALL_MS, stamped)))
            assert not machine.faults
            answer = codec.decode(answers[0], AnyAnswer) if answers else None
            notices = tuple(event for event in machine.take_events() if isinstance(event, Leased))
            self._steps[key] = (self._number(machine), answer, notices)
        return self._steps[key]

    def look(self, state: int) -> Look:
        if state not in self._looks:
            machine = self._machine(state)
            jobs = [machine._queue.jobs.get(job) for job in JOBS[: len(self.setup.policies)]]
            tasks: list[TaskNow | None] = []
            for job in jobs:
                row = None if job is None else job.row(0)
                if job is None:
                    tasks.append(None)
                elif row is None:
                    tasks.append(TaskNow(job.state_of(0), 0, None, 0, None))
                else:
                    tasks.append(TaskNow(row.state, row.fence, row.node, row.epoch, row.due_ms))
            nodes = [machine._matching.nodes[node] for node in IDS[: self.setup.nodes]]
            self._looks[state] = Look(
                tasks=tuple(tasks),
                sessions=tuple((node.epoch, node.is_live) for node in nodes),
                leases=tuple(machine.leases_of(node.id, node.epoch) for node in nodes),
                fence=machine.fence,
                next_timer_ms=machine.next_timer_ms(),
            )
        return self._looks[state]

    def _machine(self, state: int) -> Machine:
        machine = Machine()
        machine.restore(self._snapshots[state])
        if self.setup.break_machine is not None:
            self.setup.break_machine(machine)
        return machine

    def _number(self, machine: Machine) -> int:
        # Where in the log this happened does not matter here; the digest is a history, so it goes.
        machine._digest, machine._moment.position = b"", 1
        data = machine.capture()()
        if data not in self._numbers:
            self._numbers[data] = len(self._snapshots)
            self._snapshots.append(data)
        return self._numbers[data]


@dataclass
class Found:
    """What an exploration came to."""

    broken: str
    """Empty when nothing broke."""
    trace: list[str]
    states: int
    is_complete: bool


class Model:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.rules = setup.rules
        self.core = Core(setup)
        self._ends_well: set[World] = set()

    def explore(self) -> Found:
        setup = self.setup
        tasks = len(setup.policies)
        first = World(self.core.first(), (Node("open", 1),) * setup.nodes, (), setup.faults, (0,) * tasks, (0,) * tasks)
        came_from: dict[World, tuple[World, str] | None] = {first: None}
        queue = deque([first])
        while queue and len(came_from) < setup.states:
            world = queue.popleft()
            step = ""
            try:
                for step, after in self._moves(world):
                    if len(after.bag) > setup.bag or after in came_from:
                        continue
                    came_from[after] = (world, step)
                    self._check(after)
                    self._check_ends_well(after)
                    queue.append(after)
            except Broken as broken:
                trace = [step]
                at: tuple[World, str] | None = came_from[world]
                while at is not None:
                    trace.append(at[1])
                    at = came_from[at[0]]
                return Found(str(broken), trace[::-1], len(came_from), is_complete=False)
        return Found("", [], len(came_from), is_complete=not queue)

    # --- what can happen

    def _moves(self, world: World) -> Iterator[tuple[str, World]]:
        yield from self._log_moves(world)
        for at, message in enumerate(world.bag):
            if at and world.bag[at - 1] == message:
                continue
            rest = world._replace(bag=world.bag[:at] + world.bag[at + 1 :])
            yield f"deliver {_show(message)}", self._deliver(rest, message)
            if world.faults.loss:
                yield f"LOSE {_show(message)}", rest._replace(faults=_spend(world.faults, "loss"))
            if world.faults.twice:
                spent = world._replace(faults=_spend(world.faults, "twice"))
                yield f"deliver, and KEEP {_show(message)}", self._deliver(spent, message)
        for n, node in enumerate(world.nodes):
            yield from self._node_moves(world, n, node)

    def _log_moves(self, world: World) -> Iterator[tuple[str, World]]:
        look = self.core.look(world.machine)
        for task, now in enumerate(look.tasks):
            if now is None:
                yield f"submit {task}", self._submit(world, task)
                break
        if self._may_expire(world, look):
            yield "lost_after EXPIRES", self._apply(world, None, None, elapsed_ms=look.next_timer_ms or 0)
        for n, (epoch, is_live) in enumerate(look.sessions):
            end = Message("command", n, epoch, command=EndSession(IDS[n], epoch))
            if is_live and end not in world.bag and (world.faults.end or world.nodes[n].state == "down"):
                faults = world.faults if world.nodes[n].state == "down" else _spend(world.faults, "end")
                yield f"the leader proposes END {n}", _send(world._replace(faults=faults), end)

    def _node_moves(self, world: World, n: int, node: Node) -> Iterator[tuple[str, World]]:
        faults = world.faults
        if node.state == "down":
            yield f"start {n}", self._reopen(world, n)
            return
        if faults.crash:
            down = Node("down", node.epoch)
            yield f"CRASH {n}", _with(world._replace(faults=_spend(faults, "crash")), n, down)
        if faults.end:
            yield f"{n}'s view LAPSES", self._reopen(world._replace(faults=_spend(faults, "end")), n)
        if faults.lists:
            yield f"list request to {n}", self._list(world._replace(faults=_spend(faults, "lists")), n)
        if node.pending is not None and self._may_resend(world, node.pending):
            yield f"resend {_show(node.pending)}", _send(world, node.pending)
        for held in node.held:
            if held.phase == "runs":
                yield f"{_key(held.key)} ends", self._end_attempt(world, n, held, "done")
                if node.state == "opening" and self._policy(held.key) in ("promise", "fail"):
                    yield f"cut off, {n} stops {_key(held.key)}", self._stop_itself(world, n, held)
            elif node.state == "open" and node.pending is None:
                yield f"report {_key(held.key)}", self._report(world, n, held)

    # --- the node's side

    def _reopen(self, world: World, n: int) -> World:
        node = world.nodes[n]
        epoch = node.epoch + 1
        opening = Message(
            "command", n, epoch, command=OpenSession(epoch, node.listing(self.rules), self.setup.slots, OFFER)
        )
        seen = node.seen if self.rules.seen_over_epochs else frozenset()
        return _send(_with(world, n, Node("opening", epoch, 0, node.held, opening, seen)), opening)

    def _list(self, world: World, n: int) -> World:
        node = world.nodes[n]
        fence = self.core.look(world.machine).fence
        if self.rules.floor:
            world = _with(world, n, node._replace(floor=max(node.floor, fence)))
        command = Reconcile(node.epoch, fence, node.listing(self.rules))
        return _send(world, Message("command", n, node.epoch, command=command))

    def _report(self, world: World, n: int, held: Held) -> World:
        node = world.nodes[n]
        command = Report(node.epoch, node.seq + 1, (Ended(held.key, OUTCOMES[held.phase]),))
        message = Message("command", n, node.epoch, node.seq + 1, command)
        return _send(_with(world, n, node._replace(seq=node.seq + 1, pending=message)), message)

    def _end_attempt(self, world: World, n: int, held: Held, phase: str) -> World:
        node = world.nodes[n]
        return _with(
            world, n, node._replace(held=tuple(it._replace(phase=phase) if it == held else it for it in node.held))
        )

    def _stop_itself(self, world: World, n: int, held: Held) -> World:
        if self.rules.keeps_stopped:
            return self._end_attempt(world, n, held, "lost")
        node = world.nodes[n]
        return _with(world, n, node._replace(held=tuple(it for it in node.held if it != held)))

    def _may_resend(self, world: World, message: Message) -> bool:
        answered = "opened" if isinstance(message.command, OpenSession) else "answer"
        return message not in world.bag and not any(it.kind == answered and it[1:4] == message[1:4] for it in world.bag)

    def _deliver(self, world: World, message: Message) -> World:
        n = message.node
        if message.kind == "command":
            return self._apply(world, IDS[n], message.command)
        node = world.nodes[n]
        if node.state == "down" or message.epoch != node.epoch:
            return world
        match message.kind:
            case "opened" if node.state == "opening":
                if message.is_refused:
                    return self._reopen(world, n)
                kept = tuple(it for it in node.held if not self.rules.drops_unnamed or it.key in message.keys)
                return _with(world, n, node._replace(state="open", held=kept, pending=None))
            case "answer" if node.state == "open" and node.pending and node.pending.seq == message.seq:
                if message.is_refused:
                    return self._reopen(world, n)
                done = {ended.key for ended in node.pending.command.ended}  # type: ignore[union-attr]
                return _with(
                    world, n, node._replace(pending=None, held=tuple(it for it in node.held if it.key not in done))
                )
            case "notice" if node.state == "open":
                return self._notice(world, n, node, message.keys[0])
            case "stop":
                reported = node.pending.command if node.pending else None
                busy = {ended.key for ended in reported.ended} if isinstance(reported, Report) else set()
                return _with(
                    world,
                    n,
                    node._replace(held=tuple(it for it in node.held if it.key not in message.keys or it.key in busy)),
                )
        return world

    def _notice(self, world: World, n: int, node: Node, key: AttemptKey) -> World:
        if key.fence in node.seen or (self.rules.floor and key.fence <= node.floor):
            return world
        node = node._replace(held=tuple(sorted((*node.held, Held(key, "runs")))), seen=node.seen | {key.fence})
        task = JOBS.index(key.job)
        starts = tuple(count + (at == task) for at, count in enumerate(world.starts))
        return _with(world._replace(starts=starts), n, node)

    # --- the log's side

    def _submit(self, world: World, task: int) -> World:
        return self._apply(world, A, Submit(JOBS[task], POLICIES[self.setup.policies[task]]))

    def _apply(self, world: World, origin: NodeId | None, command: Command | None, elapsed_ms: int = 0) -> World:
        look = self.core.look(world.machine)
        state, answer, notices = self.core.step(world.machine, origin, command, elapsed_ms)
        world = self._completed(world._replace(machine=state), look, self.core.look(state), command)
        for leased in notices:
            if leased.run.fence <= look.fence:
                raise Broken(f"(e) fence {leased.run.fence} came after {look.fence}")
            keys = tuple(leased.run.each())
            world = _send(world, Message("notice", IDS.index(leased.node), leased.epoch, keys=keys))
        n = IDS.index(origin) if origin else 0
        match command:
            case OpenSession(epoch):
                is_open = isinstance(answer, SessionOpened)
                keys = answer.leased if is_open else ()
                return _send(world, Message("opened", n, epoch, keys=keys, is_refused=not is_open))
            case Report(epoch, seq):
                return _send(world, Message("answer", n, epoch, seq, is_refused=not isinstance(answer, Reported)))
            case Reconcile(epoch) if isinstance(answer, Reconciled) and answer.stop:
                stop = Message("stop", n, epoch, keys=answer.stop)
                return world if stop in world.bag else _send(world, stop)
        return world

    def _completed(self, world: World, before: Look, after: Look, command: Command | None) -> World:
        """Who completed what: only a task's current lease may, and a finished task never moves."""
        completed = list(world.completed)
        for task, (was, now) in enumerate(zip(before.tasks, after.tasks, strict=True)):
            if was is None or now is None or was.state is now.state:
                continue
            if was.state.is_final:
                raise Broken(f"(a) task {task} moved from {was.state} to {now.state}")
            if now.state is TaskState.DONE:
                assert isinstance(command, Report)
                [fence] = [ended.key.fence for ended in command.ended if ended.key.job == JOBS[task]]
                if fence != was.fence:
                    raise Broken(f"(a) task {task} was completed by fence {fence}, leased to {was.fence}")
                completed[task] = fence
        return world._replace(completed=tuple(completed))

    def _may_expire(self, world: World, look: Look) -> bool:
        """`lost_after` may be over at any moment; a promised one only when its node has stopped the attempt.

        That the node has, by then, and can start nothing more under that epoch, is arithmetic of clocks.
        """
        if look.next_timer_ms is None:
            return False
        for task, now in enumerate(look.tasks):
            if now is None or now.due_ms is None or self.setup.policies[task] != "promise":
                continue
            node = world.nodes[IDS.index(now.node)]  # type: ignore[arg-type]
            if any(it.key.fence == now.fence and it.phase == "runs" for it in node.held):
                return False
            could_start = ("open", "opening") if self.rules.view_from_sending else ("open",)
            if node.epoch == now.epoch and node.state in could_start:
                return False
        return True

    def _policy(self, key: AttemptKey) -> str:
        return self.setup.policies[JOBS.index(key.job)]

    # --- the promises

    def _check(self, world: World) -> None:
        look = self.core.look(world.machine)
        runs = [[(n, it.key) for it in node.held if it.phase == "runs"] for n, node in enumerate(world.nodes)]
        for n, running in enumerate(runs):
            if len(running) > self.setup.slots:
                raise Broken(f"(g) node {n} runs {len(running)} attempts in {self.setup.slots} slots")
            if len(look.leases[n]) > self.setup.slots:
                raise Broken(f"(g) node {n} has {len(look.leases[n])} leases for {self.setup.slots} slots")
        for task, policy in enumerate(self.setup.policies):
            at = [n for running in runs for n, key in running if key.job == JOBS[task]]
            if policy in NEVER_TWO_AT_ONCE and len(at) > 1:
                raise Broken(f"(b) task {task} ({policy}) runs at {at}")
            if policy == "fail" and world.starts[task] > 1:
                raise Broken(f"(c) task {task} (fail) was started {world.starts[task]} times")

    def _survivors(self, world: World) -> list[AttemptKey]:
        """Attempts that are their task's current one, alive or done on a node that is up."""
        tasks = self.core.look(world.machine).tasks
        held = [it for node in world.nodes if node.state != "down" for it in node.held if it.phase != "lost"]
        return [
            it.key
            for it in held
            if (now := tasks[JOBS.index(it.key.job)]) is not None
            and now.state in (TaskState.LEASED, TaskState.RUNNING, TaskState.HELD)
            and now.fence == it.key.fence
        ]

    def _check_ends_well(self, world: World) -> None:
        """(d) and (h): the fair continuation without faults."""
        path: list[World] = []
        survivors = self._survivors(world)
        now = world._replace(faults=Faults(lists=0))
        for _ in range(FAIR_STEPS_MAX):
            if not path and now in self._ends_well and not survivors:
                return
            after = self._fair_step(now)
            path.append(now)
            if after is None:
                break
            now = after
            self._check(now)
        else:
            raise Broken(f"(d) no end after {FAIR_STEPS_MAX} fair steps")
        tasks = self.core.look(now.machine).tasks
        if any(task is None or not task.state.is_final for task in tasks):
            raise Broken(f"(d) stuck: {[task.state.value for task in tasks if task]}")
        if any(node.held for node in now.nodes):
            raise Broken("(d) a node keeps attempts for ever")
        for key in survivors:
            if now.completed[JOBS.index(key.job)] != key.fence:
                raise Broken(f"(h) the work of {_key(key)} was thrown away")
        self._ends_well.update(path)

    def _fair_step(self, world: World) -> World | None:
        """One step of a kind world: everything arrives, in order; digests are compared when all is quiet."""
        look = self.core.look(world.machine)
        for task, now in enumerate(look.tasks):
            if now is None:
                return self._submit(world, task)
        if world.bag:
            return self._deliver(world._replace(bag=world.bag[1:]), world.bag[0])
        for n, node in enumerate(world.nodes):
            if node.state == "down":
                return self._reopen(world, n)
            if node.pending is not None:
                return _send(world, node.pending)
            if look.sessions[n] != (node.epoch, True):
                return self._reopen(world, n)
            for held in node.held:
                if held.phase != "runs":
                    return self._report(world, n, held)
            if {it.key for it in node.held} != set(look.leases[n]):
                return self._list(world, n)
        for n, node in enumerate(world.nodes):
            for held in node.held:
                return self._end_attempt(world, n, held, "done")
        return None


def _send(world: World, message: Message) -> World:
    return world._replace(bag=tuple(sorted((*world.bag, message), key=repr)))


def _with(world: World, n: int, node: Node) -> World:
    return world._replace(nodes=(*world.nodes[:n], node, *world.nodes[n + 1 :]))


def _spend(faults: Faults, name: str) -> Faults:
    return faults._replace(**{name: getattr(faults, name) - 1})


def _key(key: AttemptKey) -> str:
    return f"task {JOBS.index(key.job)} attempt {key.attempt}"


def _show(message: Message) -> str:
    keys = ", ".join(map(_key, message.keys))
    what = type(message.command).__name__ if message.command is not None else message.kind
    refused = " refused" if message.is_refused else ""
    return f"{what}{refused} [node {message.node}, epoch {message.epoch}{', ' + keys if keys else ''}]"
