"""What must hold in every run (architecture.md, invariants 2-5, and protocol.md 4-7). A breach is raised at once.

`committed` applies each entry to a replica of its own the moment it is committed, and
compares the queue before and after; `replica_applied` holds every other replica against
it; `started` and `stopped` are told what really runs on the machines, which no node knows.
What gossip owes the mesh once the faults are over is checked in epilogue.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshd import codec
from meshd.errors import MeshError
from meshd.gossip import membership
from meshd.model import FINAL_STATES, AttemptKey, JobId, JobSpec, NodeId, OnLost, Outcome, Resources, TaskState
from meshd.placement import Demand, permanent_lacks
from meshd.raft.messages import VoterId, node_of
from meshd.raft.stamp import AGREE_MS
from meshd.raft.state.commands import (
    AnyAnswer,
    AnyCommand,
    Batch,
    Claim,
    Drop,
    Ended,
    EndSession,
    JobChanged,
    OpenSession,
    Rejected,
    RemoveMember,
    Report,
    SessionOpened,
    Submitted,
)
from meshd.raft.state.machine import Machine
from meshd.testing.heap import Heap
from meshd.testing.history import History
from meshd.testing.machines import output_of
from meshd.testing.promises import Promises
from meshd.views import GetJob, ListTasks, TaskPage, TaskView
from meshd.work.attempts import fit
from meshd.work.keeper import GRANT_MS
from meshd.work.worker import State

if TYPE_CHECKING:
    from meshd.testing.nodes import SimNode
    from meshd.testing.servers import SimServer
    from meshd.testing.world import World


WALL_AHEAD_MS = AGREE_MS + 1_000
"""What clocks that agree may be apart, and what elapsed time runs ahead where clocks are fast."""
ELECTION_S = 2.0
"""Longer than a trial of votes lasts."""
FINGERPRINT_EVERY = 8
"""Entries; the hash over the state itself costs as much as applying several."""


class Breach(AssertionError):
    """A rule of the protocol was broken."""

    def __init__(self, check: str, what: str) -> None:
        super().__init__(f"{check}: {what}")
        self.check = check
        """What should have held, in a few words."""


@dataclass
class TaskHistory:
    starts: int = 0
    own_failures: int = 0
    has_succeeded: bool = False
    needs: Resources = Resources()
    running: dict[NodeId, AttemptKey] = field(default_factory=dict)


class Checks:
    def __init__(self, heap: Heap, world: World) -> None:
        self.heap, self.world = heap, world
        self.oracle = Machine()
        self.tasks: dict[tuple[JobId, int], TaskHistory] = {}
        self.submitted: set[JobId] = set()
        self.unplaceable: set[JobId] = set()
        """Jobs that no node fits: they wait for ever."""
        self.must_live: frozenset[NodeId] = frozenset()
        """Who cannot rightly be called dead now."""
        self.entries: dict[int, bytes] = {}
        """What was ever applied anywhere, by index."""
        self.last = 0
        """The newest of them."""
        self.leaders: dict[int, VoterId] = {}
        """By term."""
        self._first: Breach | None = None
        self._answers: dict[int, list[bytes]] = {}
        self._digests: dict[int, tuple[bytes, str]] = {}
        self.history = History(self.breach)
        self.promises = Promises(self.breach)
        self._views: dict[tuple[JobId, int], TaskView] = {}
        self._fence = 0
        self._ending: set[tuple[NodeId, int, int | None, NodeId, int]] = set()
        """(server, its process, its term, node, epoch)."""
        self._ended_early: set[tuple[NodeId, int]] = set()
        """Sessions whose end was proposed before their last grant had run out."""
        self._wall_ms = 0
        self._granted_ms: dict[tuple[NodeId, int], int] = {}
        """By session: when a leader granted it last; its opening counts as a grant."""
        self._claimed: dict[tuple[NodeId, int], tuple[int, int]] = {}
        self._ahead: dict[NodeId, Counter[JobId]] = defaultdict(Counter)
        """The most that a node has ever asked for ahead, by job: what it held so is still so in its next session."""
        """By session: the seq of its last claim, and the slots."""

    def breach(self, name: str, what: str) -> None:
        raise self.broken(name, what)

    def broken(self, name: str, what: str) -> Breach:
        """Whoever catches what it hears from below raises the first one again."""
        if self._first is None:
            self._first = Breach(name, f"{what} (seed {self.world.seed}, at {self.heap.now_ms / 1000:.3f} s)")
        return self._first

    # --- the state ----------------------------------------------------------------------------------------------------

    def committed(self, index: int, data: bytes) -> None:
        """A server applies this entry: the first that does shows that it is committed."""
        if (known := self.entries.get(index)) is not None:
            if known != data:
                self.breach("one entry at each index", f"entry {index} is two different ones")
            return
        if index <= self.last:
            self.breach("one entry at each index", f"entry {index} was nothing at another server")
        self.entries[index] = data
        self.last = index
        dropped = self.oracle.history.dropped
        try:
            answers = self.oracle.apply(index, data)
        except Exception as error:
            raise self.broken("apply is total", f"{error!r} at entry {index}") from error
        if self.oracle.faults:
            self.breach("apply is total", f"a command of entry {index} hit a bug: {codec.decode(data, Batch)}")
        self._answers[index] = answers
        self._digests[index] = _digest(index, self.oracle)
        batch = codec.decode(data, Batch)
        self._time_is_monotonic()
        jobs: dict[JobId, None] = {}
        for event in self.oracle.take_events():
            if isinstance(event, JobChanged):
                jobs[event.job] = None
        commands = [(each.origin, codec.decode(each.body, AnyCommand)) for each in batch.commands]
        for (origin, command), answer in zip(commands, answers, strict=True):
            self.heap.note(f"log: {index} {origin} {_short(command)} -> {_short(codec.decode(answer, AnyAnswer))}")
        if self.oracle.history.dropped != dropped:
            self._dropped_lies_on_a_quorum(commands)
        self._ids_never_double(commands, answers)
        self._sessions_outlive_views(commands)
        before = self._views.copy()
        given: set[int] = set()
        for job in jobs:
            self._job_moved(job, commands, given)
            if self.oracle.spec_of(job) is not None:
                self.history.changed(self.oracle.answer(GetJob(job)))
        self._who_comes_back_keeps_its_work(before, commands, answers)
        self._claims_are_obeyed(commands, answers, given)
        self._fence = max(given, default=self._fence)

    def replica_applied(self, index: int, answers: list[bytes], machine: Machine) -> None:
        if answers != self._answers[index] or _digest(index, machine) != self._digests[index]:
            self.breach("replicas agree", f"they differ at entry {index}")

    def replica_restored(self, machine: Machine) -> None:
        """From a snapshot, its own or a leader's."""
        if machine.position and _digest(machine.position, machine) != self._digests.get(machine.position):
            self.breach("replicas agree", f"a snapshot at entry {machine.position} is not what was applied")

    # --- servers ------------------------------------------------------------------------------------------------------

    def turned(self, server: SimServer) -> None:
        """One leader a term."""
        engine = server.engine
        self.promises.turned(server)
        if not engine.is_leader:
            return
        if engine.term not in self.leaders:
            self.world.elected(server.node)
        known = self.leaders.setdefault(engine.term, engine.me)
        if known != engine.me:
            self.breach("one leader a term", f"{known} and {engine.me} lead term {engine.term}")

    def campaigns(self, server: SimServer, silence_s: float) -> None:
        """It has raised its term: somebody must have said that it would vote."""
        if silence_s > ELECTION_S and len(server.engine.voters) > 1:
            self.breach(
                "a term rises when a majority would vote",
                f"{server.node.name} makes it {server.engine.term} after {silence_s:.1f} s of silence",
            )

    def cannot_start(self, node: SimNode, error: MeshError | OSError) -> None:
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            return  # the disk refuses, for now
        self.breach("what was written can be read", f"{node.name}: {error}")

    def replicas_are_equal(self) -> bool:
        """Every voter has applied everything: nothing that was ever acknowledged is missing anywhere."""
        servers = [node.server for node in self.world.nodes.values() if node.server is not None and node.has_replica]
        leading = [server for server in servers if server.leading_term() is not None]
        voters = {voter for server in leading for voter in server.engine.voters}
        replicas = [server for server in servers if server.voter in voters]
        return (
            bool(leading)
            and len(replicas) == len(voters)
            and all(server.machine.position == self.last for server in replicas)
            and {server.machine.digest() for server in replicas} == {self.oracle.digest()}
        )

    def _dropped_lies_on_a_quorum(self, commands: list[tuple[NodeId, AnyCommand]]) -> None:
        """Its bytes are safe from the power on more than half of those that vote; a disk that was spoiled has had them."""
        for _, command in commands:
            if not isinstance(command, Drop):
                continue
            segment = self.oracle.history.segments[command.segment]
            voters = [self.world.nodes[node_of(VoterId(voter))] for voter in command.voters]
            having = sum(node.has_lost_history or node.segments.is_durable(segment.hash) for node in voters)
            if 2 * having <= len(voters):
                self.breach("what is dropped lies on a quorum of disks", f"segment {command.segment} on {having}")

    def _time_is_monotonic(self) -> None:
        if self.oracle.wall_ms < self._wall_ms:
            self.breach("time is monotonic", f"{self.oracle.wall_ms} after {self._wall_ms}")
        self._wall_ms = self.oracle.wall_ms
        if self._wall_ms > self.world.wall_ms() + WALL_AHEAD_MS:
            self.breach("one wrong clock moves no date", f"{self._wall_ms - self.world.wall_ms()} ms ahead")

    def _ids_never_double(self, commands: list[tuple[NodeId, AnyCommand]], answers: list[bytes]) -> None:
        for data in answers:
            answer = codec.decode(data, AnyAnswer)
            if isinstance(answer, Submitted) and answer.is_new:
                if answer.job in self.submitted:
                    self.breach("a resend never doubles", f"job {answer.job[-6:]} was new twice")
                self.submitted.add(answer.job)

    def view_of(self, job: JobId, task: int) -> TaskView:
        """As the log has last made it."""
        return self._views[job, task]

    def tasks_of(self, job: JobId) -> tuple[TaskView, ...]:
        if self.oracle.spec_of(job) is None:  # it has left the core: what has ended stays as it was
            return tuple([view for (other, _), view in self._views.items() if other == job])
        page = self.oracle.answer(ListTasks(job, limit=1000))
        assert isinstance(page, TaskPage)
        return page.tasks

    def _job_moved(self, job: JobId, commands: list[tuple[NodeId, AnyCommand]], given: set[int]) -> None:
        """`given`: the fences of this entry; it may lease tasks of several jobs, in any order among them."""
        if self.oracle.spec_of(job) is None:
            return  # finished so long ago that it is forgotten
        for now in self.tasks_of(job):
            before = self._views.get((job, now.task))
            self._views[job, now.task] = now
            if before is None or before == now:
                continue
            name = f"task {job[-6:]}/{now.task}"
            if before.state in FINAL_STATES:  # so that none succeeds twice
                self.breach("finished never moves", f"{name} went from {before.state} to {now.state}")
            if now.attempt < before.attempt or now.fence < before.fence:
                self.breach("attempts and fences only rise", f"{name} from {before.fence} to {now.fence}")
            if now.fence > before.fence:
                if now.fence <= self._fence or now.fence in given:
                    self.breach("fences rise over all jobs", f"{name} got {now.fence} after {self._fence}")
                given.add(now.fence)
            if now.state is TaskState.DONE:
                self._done(name, before, now, commands)

    def _done(self, name: str, before: TaskView, now: TaskView, commands: list[tuple[NodeId, AnyCommand]]) -> None:
        self.task(now.job, now.task).has_succeeded = True
        for origin, command in commands:
            if isinstance(command, Report):
                for ended in command.ended:
                    key = ended.key
                    if (key.job, key.task, key.attempt, key.fence) == (now.job, now.task, now.attempt, now.fence):
                        if now.node is not None and origin != now.node:
                            self.breach("only the current lease finishes", f"{name} by {origin}")
                        self._lies_on_two_disks(name, ended.outcome, output_of(now.job, now.task).hash)
                        return
        self.breach("only the current lease finishes", f"{name} is done, but nobody reported attempt {now.attempt}")

    def _sessions_outlive_views(self, commands: list[tuple[NodeId, AnyCommand]]) -> None:
        """A session that is ended for silence is one that its node knows to be over.

        Not so one that was ended sooner because gossip and the connection called the node dead.
        """
        for _, command in commands:
            if not isinstance(command, EndSession) or (command.node, command.epoch) in self._ended_early:
                continue
            node = self.world.nodes[command.node]
            if node.agent is None:
                continue
            view = node.agent.worker
            is_believed = (
                view.state is State.OPEN and view.epoch == command.epoch and node.clock_ms() < view.view_end_ms
            )
            if is_believed:
                self.breach("a session outlives its views", f"{node.name} believes in epoch {view.epoch}")

    def _who_comes_back_keeps_its_work(
        self,
        before: dict[tuple[JobId, int], TaskView],
        commands: list[tuple[NodeId, AnyCommand]],
        answers: list[bytes],
    ) -> None:
        """What a node lists as it opens, and what was its own until then, is leased to its new epoch."""
        for (origin, command), data in zip(commands, answers, strict=True):
            answer = codec.decode(data, AnyAnswer)
            if not (isinstance(command, OpenSession) and isinstance(answer, SessionOpened)):
                continue
            if any(other != command and _may_move(other, of=origin, by=by) for by, other in commands):
                continue  # it may have been moved first, by the same entry
            for key in command.held:
                was, now = before.get((key.job, key.task)), self._views.get((key.job, key.task))
                if was is None or now is None or was.fence != key.fence or was.node != origin:
                    continue
                was_its_own = was.state in (TaskState.LEASED, TaskState.RUNNING)
                is_unwanted = now.state in (TaskState.CANCELLED, TaskState.TIMED_OUT)
                if was_its_own and not is_unwanted and key not in answer.leased:
                    self.breach("who comes back keeps its work", f"{origin} listed fence {key.fence}")

    def _claims_are_obeyed(
        self, commands: list[tuple[NodeId, AnyCommand]], answers: list[bytes], given: set[int]
    ) -> None:
        """No session is leased more than it claimed last, by the order in which it claimed."""
        before = (
            self._claimed.copy()
        )  # commands ahead of a smaller claim in the same entry may still fill the larger one
        for (origin, command), data in zip(commands, answers, strict=True):
            is_refused = isinstance(codec.decode(data, AnyAnswer), Rejected)
            if isinstance(command, OpenSession) and not is_refused:
                self._claimed.setdefault((origin, command.epoch), (0, command.slots))
                self._granted_ms.setdefault((origin, command.epoch), self.heap.now_ms)
            elif isinstance(command, Claim) and not is_refused:
                last = self._claimed.get((origin, command.epoch), (0, 0))
                self._claimed[origin, command.epoch] = max(last, (command.seq, command.slots))
            elif isinstance(command, Report) and command.ahead is not None and not is_refused:
                self._ahead[origin] |= Counter(dict(command.ahead))
        for node, epoch in self.oracle.sessions_live():
            leases = self.oracle.leases_of(node, epoch)
            standing, claimed = self.oracle._matching.nodes[node].slots, self._claimed[node, epoch][1]
            if standing != claimed:
                self.breach("leases fit the slots", f"{node} may hold {standing}, and claimed {claimed} last")
            slots = max(self._claimed[node, epoch][1], before.get((node, epoch), (0, 0))[1])
            ahead = self._ahead[node].copy()
            # The newest first: of a node that claims less than it holds, only what is ahead may be replaced.
            leases = tuple(key for key in reversed(leases) if not _takes_one(ahead, key.job))
            if len(leases) > slots and any(key.fence in given for key in leases):
                self.breach("leases fit the slots", f"{len(leases)} leases in {slots} slots of {node}")
            specs = [spec for key in leases if (spec := self.oracle.spec_of(key.job)) is not None]
            if not fit([spec.needs.resources for spec in specs], self.world.nodes[node].offer.resources):
                self.breach("leases fit the offer", f"{[spec.needs.resources for spec in specs]} on {node}")

    def _lies_on_two_disks(self, name: str, outcome: Outcome, blob: str) -> None:
        """Every simulated mesh has three machines or more."""
        holders = [node for node in outcome.holders if blob in self.world.nodes[node].blobs]
        if len(holders) < 2:
            self.breach("results lie on two disks", f"{name} is done, and its output only on {holders}")

    # --- the cores' decisions, as they are made ---

    def decided_to_start(self, node: SimNode, key: AttemptKey) -> None:
        """Only under a live view; and while the session lives, only what is leased to it."""
        assert node.agent is not None
        view = node.agent.worker
        if view.state is not State.OPEN or node.clock_ms() >= view.view_end_ms:
            self.breach("starts need a view", f"{node.name} starts fence {key.fence} in epoch {view.epoch}")
        if (node.id, view.epoch) in self.oracle.sessions_live() and key not in self.oracle.leases_of(
            node.id, view.epoch
        ):
            self.breach("what starts is leased", f"{node.name} starts fence {key.fence} in epoch {view.epoch}")

    def decided_to_end(self, server: SimNode, command: EndSession, *, is_early: bool) -> None:
        self._ending.add((server.id, server.process, server.leading_term(), command.node, command.epoch))
        if is_early:
            self._ended_early.add((command.node, command.epoch))

    def decided_to_grant(self, server: SimNode, node: NodeId, epoch: int) -> None:
        term = server.leading_term()
        if term is None:
            self.breach("only a leader grants", f"{server.name} grants {node} epoch {epoch}")
        if (server.id, server.process, term, node, epoch) in self._ending:
            self.breach("no grant after the end is proposed", f"{server.name} grants {node} epoch {epoch}")
        self._granted_ms[node, epoch] = self.heap.now_ms

    def view_moved(self, node: SimNode) -> None:
        """Whatever a leader may do, its session lives longer: a leader that hears nothing more ends it after `GRANT_MS`."""
        assert node.agent is not None
        view = node.agent.worker
        granted_ms = self._granted_ms.get((node.id, view.epoch))
        if view.state is not State.OPEN or granted_ms is None:
            return
        end_ms = self.heap.now_ms + node.until_ms(view.view_end_ms / 1000)
        if end_ms > granted_ms + GRANT_MS:
            late_ms = int(end_ms - granted_ms)
            self.breach("a session outlives its views", f"{node.name} has a view until {late_ms} ms after its grant")

    def liveness_changed(self, at: SimNode, node: NodeId, state: membership.State) -> None:
        """Where nothing is lost or late, and everybody awake, nobody is wronged."""
        if state is membership.State.DEAD and node in self.must_live:
            self.breach("the living are not called dead", f"{at.name} calls {node} dead")

    # --- the machines -------------------------------------------------------------------------------------------------

    def task(self, job: JobId, task: int) -> TaskHistory:
        return self.tasks.setdefault((job, task), TaskHistory())

    def started(self, node: NodeId, key: AttemptKey, spec: JobSpec) -> None:
        history = self.task(key.job, key.task)
        name = f"task {key.job[-6:]}/{key.task}"
        if node in history.running:
            self.breach("once per attempt", f"{name} twice on {node}")
        one_at_a_time = spec.on_lost is OnLost.WAIT or spec.promises_one_at_a_time
        if one_at_a_time and history.running:
            self.breach(
                "one at a time", f"{name} ({spec.on_lost}) starts on {node} and runs on {list(history.running)}"
            )
        machine = self.world.nodes[node]
        if lacks := permanent_lacks(Demand.of(spec), machine.offer):
            self.breach("what runs fits", f"{name} runs on {node}, which lacks {lacks}")
        history.needs = spec.needs.resources
        beside = [each.needs for each in self.tasks.values() if node in each.running]
        if not fit([*beside, history.needs], machine.room):
            self.breach("a machine runs what it has room for", f"{name} is one too many on {node} beside {beside}")
        history.starts += 1
        if spec.on_lost is OnLost.FAIL and history.starts > 1 + history.own_failures:
            self.breach("fail starts once", f"{name} starts again as attempt {key.attempt} on {node}")
        history.running[node] = key

    def stopped(self, node: NodeId, key: AttemptKey, outcome: Outcome | None) -> None:
        history = self.task(key.job, key.task)
        history.running.pop(node, None)
        if outcome is not None and not outcome.is_success and outcome.exit_code is not None:
            history.own_failures += 1

    # --- the end ------------------------------------------------------------------------------------------------------

    def is_finished(self) -> bool:
        """Every job that was acknowledged is final, and no session has a lease left."""
        return all(self._is_settled(job, view) for (job, _), view in self._views.items()) and not any(
            self.oracle.leases_of(node, epoch) for node, epoch in self.oracle.sessions_live()
        )

    def _is_settled(self, job: JobId, view: TaskView) -> bool:
        return view.state in FINAL_STATES or job in self.unplaceable

    def unfinished(self) -> list[str]:
        tasks = [
            f"{job[-6:]}/{task} {view.state} {view.reason} on {view.node}"
            for (job, task), view in self._views.items()
            if not self._is_settled(job, view)
        ]
        leases = [
            f"{key} leased to {node}"
            for node, epoch in self.oracle.sessions_live()
            for key in self.oracle.leases_of(node, epoch)
        ]
        return tasks + leases

    def nothing_was_lost_without_a_fault(self) -> None:
        for (job, task), view in self._views.items():
            if view.losses or (view.state is TaskState.DONE and view.attempt > view.tries):
                self.breach(
                    "no work is thrown away", f"{job[-6:]}/{task} took {view.attempt} attempts, {view.losses} lost"
                )


def _digest(index: int, machine: Machine) -> tuple[bytes, str]:
    """What every entry did, and now and then also the state that is there."""
    return machine._digest, "" if index % FINGERPRINT_EVERY else machine.digest()


def _may_move(command: AnyCommand, *, of: NodeId, by: NodeId) -> bool:
    """Could this take a task from that node, other than by the job's own rules?"""
    return by == of or (isinstance(command, EndSession | RemoveMember) and command.node == of)


def _takes_one(ahead: Counter[JobId], job: JobId) -> bool:
    """Whether one lease of the job is accounted for by what was asked for ahead."""
    ahead[job] -= 1
    return ahead[job] >= 0


def _short(value: AnyCommand | AnyAnswer) -> str:
    """For the trace: who did what to which fences."""
    fences = {
        name: ",".join(str(each.key.fence if isinstance(each, Ended) else each.fence) for each in getattr(value, name))
        for name in ("held", "leased", "ended", "running", "stop", "stale")
        if hasattr(value, name)
    }
    plain = {
        name: getattr(value, name)
        for name in ("node", "epoch", "seq", "slots", "fence", "reason")
        if hasattr(value, name)
    }
    job = str(getattr(value, "id", None) or getattr(value, "job", ""))[-6:]
    return " ".join([type(value).__name__, job, *(f"{k}={v}" for k, v in {**plain, **fences}.items())]).replace(
        "  ", " "
    )
