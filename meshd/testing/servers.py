"""One server's log in a simulated machine: the real Server, Engine, Journal and snapshots, on a modelled disk and streams.

What meshd/raft/log.py does under trio and with threads is done here on virtual time: turns
when something happened or is due, each piece of disk work after a while, proposals and
reads that are tried again until their time is up. The order within a turn is turn.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from meshd import codec
from meshd.errors import Corrupt, MeshError
from meshd.history.keeping import lags_behind
from meshd.model import NodeId
from meshd.ports import NotCommitted, ProposeResult, Unknown
from meshd.raft.log import RETRY_S
from meshd.raft.messages import VoterId, node_of
from meshd.raft.proposals import Proposal
from meshd.raft.pysyncobj_state import CANDIDATE
from meshd.raft.server import Server
from meshd.raft.state.commands import RaiseFences, adds_work
from meshd.raft.state.machine import Machine
from meshd.raft.state.recovery import FENCES_LOST_MAX
from meshd.raft.storage.opening import open_log
from meshd.raft.surroundings import Clocks
from meshd.raft.turn import Turns, Work
from meshd.testing.archives import Archive, NotHere
from meshd.testing.checks import Checks
from meshd.testing.raft_disk import PowerCut
from meshd.testing.streams import Streams
from meshd.views import AnyQuery

if TYPE_CHECKING:
    from meshd.testing.nodes import SimNode

MESH = "mesh"
RETRY_MS = RETRY_S * 1000
SYNC_MS = (0.0, 6.0)
BESIDE_MS = (5.0, 100.0)
"""Writing or reading a snapshot."""
DYING_OPERATIONS = 4
"""A process that dies while the disk works has done up to so many operations of that."""

Answer = Callable[[ProposeResult], None]
Told = Callable[[Any, int], None]
"""(the view, or the query's MeshError; how far was applied when it was read)"""


class CheckedMachine(Machine):
    """A replica that shows the checks each entry, and what came of it."""

    def __init__(self, checks: Checks, server: SimServer) -> None:
        super().__init__()
        self._checks, self._server = checks, server

    def apply(self, index: int, batch: bytes) -> list[bytes]:
        self._checks.promises.applies(self._server, index)
        self._checks.committed(index, batch)
        answers = super().apply(index, batch)
        self._checks.replica_applied(index, answers, self)
        return answers

    def unpack(self, data: bytes) -> Callable[[], Callable[[], None]]:
        checks, server, replace = self._checks, self._server, super().unpack(data)

        def restored() -> Callable[[], None]:
            take_apart = replace()
            self._checks, self._server = checks, server
            checks.replica_restored(self)
            if server.node.server is server:  # else it is only starting
                checks.promises.restored(server)
            return take_apart

        return restored


class _Reader:
    def __init__(self, query: AnyQuery, told: Told) -> None:
        self.query, self.told = query, told
        self.position = 0
        """How far it must be applied here; 0 while no leader has confirmed that it leads."""
        self.is_over = False


class SimServer:
    def __init__(self, node: SimNode) -> None:
        """Opens the journal. Raises PowerCut when the power goes meanwhile, a MeshError when it cannot start."""
        world = node.world
        self.node = node
        random = Random(f"{world.seed} {node.name} {node.process} raft")  # noqa: S311 - a simulation
        self.machine = CheckedMachine(world.checks, self)
        self.journal, image = open_log(
            node.disk,
            mesh=MESH,
            lineage=(),
            me=node.id,
            is_founding=node.is_founder and node.starts == 1,
            random=f"{random.getrandbits(64):016x}",
            incarnation=f"{random.getrandbits(32):08x}",
            sizes=world.settings.journal,
        )
        if image is not None:
            self.machine.unpack(image.state)()
        self.streams = Streams(self)
        self.server = Server(
            node=node.id,
            journal=self.journal,
            image=image,
            machine=self.machine,
            links=self.streams,
            servers=self.machine.server_ids,
            draining=lambda: [each for each in self.machine.server_ids() if self.machine.is_draining(each)],
            zones=self.machine.zones,
            settings=replace(world.settings, snapshot_entries=random.choice(world.faults.snapshot_entries)),
            clocks=Clocks(node.clock_s, node.wall_ms, lambda: False),
            random=random,
            packed=lambda: self.turns.packed(),
            report=self._report,
            after_doubt=lambda: codec.encode(RaiseFences(self.machine.fence + FENCES_LOST_MAX)),
            adds_work=adds_work,
            lacks_history=lambda voter: lags_behind(self.machine.history, voter, self.voter),
        )
        self.turns: Turns = Turns(self.server, self.journal, node.disk, MESH, self.machine, self.streams.flush)
        self.engine = self.server.engine
        self.voter: VoterId = self.engine.me
        self.archive = None if world.tail is None else Archive(self, world.tail)
        self._is_busy = self._is_woken = False
        self._works: list[Work] = []
        """What the disk is at."""
        self._timer_ms: float | None = None
        self._turn_began_s = 0.0
        self._campaign = 0
        self._told: tuple[int, bool, VoterId | None] = (self.engine.applied, False, None)
        self._retries: list[Callable[[], None]] = []
        self._readers: list[_Reader] = []
        world.checks.promises.started(self)
        self.wake()

    # --- what the node asks -------------------------------------------------------------------------------------------

    def leading_term(self) -> int | None:
        return self.engine.term if self.engine.leads() else None

    @property
    def leader(self) -> NodeId | None:
        return None if self.engine.leader is None else node_of(self.engine.leader)

    def hand_over(self) -> None:
        if self.engine.is_leader and self.server.steering.hand_over():
            self.wake()

    def propose(self, origin: NodeId, command: bytes, answer: Answer, *, timeout_ms: int) -> None:
        """As ServerLog.propose: tried again while it is certainly not done; `answer` comes once."""
        last: list[Proposal] = []
        is_over = False

        def end(result: ProposeResult) -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                answer(result)

        def attempt() -> None:
            if is_over:
                return
            proposal = self.server.submit(origin, command, resolved)
            if proposal is None:
                self._retry(attempt)
            else:
                last[:] = [proposal]
                self.wake()

        def resolved(result: ProposeResult) -> None:
            if isinstance(result, NotCommitted) and not result.code:
                self._retry(attempt)
            else:
                end(result)

        def too_late() -> None:
            for proposal in last:
                self.server.forget(proposal)
            is_unknown = any(proposal.is_batched for proposal in last)
            end(Unknown("no answer in time") if is_unknown else NotCommitted("the leader was too busy"))

        attempt()
        self.node.after(timeout_ms, too_late)

    def read(self, query: AnyQuery, told: Told, *, timeout_ms: int) -> None:
        """After the barrier (protocol.md 2); nothing is told when no leader confirms in time."""
        reader = _Reader(query, told)

        def attempt() -> None:
            if not reader.is_over:
                self.server.reads.ask(answered)
                self.wake()

        def answered(position: int) -> None:
            reader.position = position
            if position:
                self._readers.append(reader)
                self.wake()
            else:
                self._retry(attempt)

        def too_late() -> None:
            reader.is_over = True

        attempt()
        self.node.after(timeout_ms, too_late)

    def _retry(self, attempt: Callable[[], None]) -> None:
        """When something changes, and after a while in any case."""
        if not self._retries:
            self.node.after(RETRY_MS, self._try_again)
        self._retries.append(attempt)

    def _try_again(self) -> None:
        retries, self._retries = self._retries, []
        for attempt in retries:
            attempt()

    # --- turns --------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something happened; what happens in the same millisecond makes one turn."""
        self._is_woken = True
        if not self._is_busy:
            self._wake_at(self.node.world.heap.now_ms)

    def _wake_at(self, at_ms: float) -> None:
        if self._timer_ms is None or at_ms < self._timer_ms:
            self._timer_ms = at_ms
            self.node.after(at_ms - self.node.world.heap.now_ms, lambda: self._timer(at_ms))

    def _timer(self, at_ms: float) -> None:
        if self._timer_ms == at_ms:
            self._timer_ms = None
            if self._is_busy:
                return
            if self._left_ms() == 0:
                self._turn()
            else:
                self._sleep()

    def _sleep(self) -> None:
        left_ms = self._left_ms()
        if left_ms is not None:
            self._wake_at(self.node.world.heap.now_ms + left_ms)

    def _left_ms(self) -> float | None:
        """Until the next turn; None: until something happens."""
        server = self.server
        if self._is_woken or self.streams.inbox or server.has_work or self.turns.has_finished:
            return 0
        due_s = server.next_due_s()
        return None if due_s is None else self.node.until_ms(due_s)

    def _turn(self) -> None:
        self._is_busy, self._is_woken = True, False
        self._turn_began_s = self.node.clock_s()
        self._go_on(self.turns.turn())

    def _go_on(self, steps: Iterator[Work]) -> None:
        try:
            work = next(steps, None)
        except Corrupt as error:
            raise self.node.world.checks.broken(
                "no server contradicts another", f"{self.node.name}: {error}"
            ) from error
        if work is not None:
            self._works.append(work)
            self.node.after(self.node.sync_ms(), lambda: self._done(steps, work))
            return
        self._is_busy = False
        if (beside := self.turns.beside()) is not None:
            self._works.append(beside)
            self.node.after(self.node.world.heap.between(*BESIDE_MS), lambda: self._did_beside(beside))
        self._tell()
        if self.node.server is self:
            self._sleep()

    def _done(self, steps: Iterator[Work], work: Work) -> None:
        if self._do(work):
            self._go_on(steps)

    def _did_beside(self, work: Work) -> None:
        if self._do(work):
            self.wake()

    def _do(self, work: Work) -> bool:
        """False when the disk, or the power, failed: then this process is no more."""
        self._works.remove(work)
        try:
            work()
        except PowerCut:
            self.node.crash(loses_power=True)
            self.node.comes_back()
            return False
        except MeshError as error:
            self.node.fails(str(error))
            return False
        return True

    def die(self) -> None:
        """In the middle of whatever the disk is at."""
        disk, random = self.node.disk, self.node.world.heap.random
        for work in self._works:
            disk.cut_in(random.randrange(DYING_OPERATIONS))
            try:
                work()
            except (PowerCut, MeshError):
                break
        self._works.clear()

    def _tell(self) -> None:
        """The node learns what changed; who waits looks again."""
        engine, node = self.engine, self.node
        node.world.checks.turned(self)
        if engine.role == CANDIDATE and engine.term != self._campaign:
            self._campaign = engine.term
            node.world.checks.campaigns(self, self._turn_began_s - self.streams.heard_s)
        applied, did_lead, _ = before = self._told
        leads = engine.leads()
        self._told = (engine.applied, leads, engine.leader)
        if engine.applied != applied:
            node.applied_events(self.leading_term())
        if leads != did_lead:
            node.world.heap.note(f"raft: {node.name} {'leads' if leads else 'leads no more'}, term {engine.term}")
            node.leadership_changed(self.leading_term())
        if self._readers:
            self._answer_readers()
        if self._told != before and self._retries:
            self._try_again()

    def _answer_readers(self) -> None:
        ready = [reader for reader in self._readers if reader.position <= self.engine.applied or reader.is_over]
        for reader in ready:
            self._readers.remove(reader)
            if not reader.is_over:
                try:
                    view = self._answer(reader.query)
                except NotHere:
                    self._readers.append(reader)
                    continue
                except MeshError as error:
                    view = error
                reader.is_over = True
                reader.told(view, self.engine.applied)

    def _answer(self, query: AnyQuery) -> Any:
        return self.machine.answer(query) if self.archive is None else self.archive.answer(query)

    def _report(self, event: str, fields: dict[str, object]) -> None:
        checks = self.node.world.checks
        if event == "raft.bug":
            checks.breach("nothing raises while entries are applied", f"{self.node.name}: {fields}")
        if event == "raft.bad_message":
            checks.breach("servers speak as agreed", f"{self.node.name}: {fields}")
        if event == "raft.snapshot_received":
            index = fields["index"]
            assert isinstance(index, int)
            checks.promises.gets_snapshot(self, index)
            self.node.world.got_snapshot(self.node)
        self.node.world.heap.note(f"raft: {self.node.name} {event.removeprefix('raft.')} {_short(fields)}")


def _short(fields: dict[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())
