"""The replicated log at a server: one task that turns it, and what the rest of the node asks of it.

The task sleeps until something happens or a timer is due; then it takes a turn (turn.py),
with the disk in a thread. What was proposed while the last batch was being committed
becomes the next one, so an idle log answers at once and a busy one writes large entries.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from pathlib import Path
from random import Random

import structlog
import trio
from msgspec import Struct

from meshd import codec
from meshd.errors import InvalidRequest, MeshError, StartRefused, TooLarge, Unavailable
from meshd.model import NodeId
from meshd.ports import NotCommitted, ProposeResult, Transport, Unknown
from meshd.raft.acquaintances import load_acquaintances, save_acquaintances
from meshd.raft.clocks import CLOCKS
from meshd.raft.disk_thread import DiskThread
from meshd.raft.messages import VoterId, node_of
from meshd.raft.proposals import is_readable
from meshd.raft.server import Server
from meshd.raft.settings import RaftSettings
from meshd.raft.state.lineage import Lineage
from meshd.raft.storage.disk import DirectoryDisk, Disk
from meshd.raft.storage.journal import Journal
from meshd.raft.storage.opening import open_log
from meshd.raft.storage.snapshot import Image
from meshd.raft.surroundings import Clocks, Mail, StateMachine
from meshd.raft.turn import Turns, Work
from meshd.raft.wire import Greeting, Wire

RETRY_S = 0.05
"""Between tries while nobody leads, unless something changes sooner."""
HAND_OVER_S = 3.0
PULSE_S = 0.1
"""A turn that waits longer for its disk is spoken for: less than a heartbeat."""
REMEMBER_S = 2.0
"""What is remembered of other servers is written down no more often: they start and elect rarely."""

log = structlog.get_logger()


class VoterStatus(Struct, frozen=True):
    node: NodeId
    incarnation: str
    is_voter: bool
    match: int
    """Known to be on its disk; only the leader knows of others."""
    lag: int
    silent_ms: int | None
    """Since it last answered the leader; None: never, or this is not the leader."""
    is_in_doubt: bool = False
    """It may have lost what it acknowledged, and counts for nothing until it is brought up to date."""


class RaftStatus(Struct, frozen=True):
    me: NodeId
    term: int
    leader: NodeId | None
    leads: bool
    """Of this server, in contact with a quorum now."""
    servers: tuple[VoterStatus, ...]
    """Voters, then learners."""
    failures_survived: int
    """How many more voters may fail now; the leader knows, others estimate by their streams."""
    commit: int
    applied: int
    first: int
    last: int
    journal_bytes: int
    is_clock_refused: bool
    """This sole voter's clock jumped; the mesh's dates go on by elapsed time until an operator sets it."""
    disputed: int = 0
    """The entry at which the voters' states differ, none with a majority: nothing more is applied."""
    doubt: str = ""
    """Why this server is in doubt, or went on alone although its last frame may be lost."""
    full: tuple[NodeId, ...] = ()
    """Voters whose disks are full; others than itself only the leader knows."""
    clock_ahead_ms: int = 0
    """The mesh's time, had an entry been written now, less this server's clock."""

    @property
    def voters(self) -> tuple[NodeId, ...]:
        return tuple(server.node for server in self.servers if server.is_voter)


class Newest(Struct, frozen=True, array_like=True):
    """How far a server's log goes, whatever of it is committed."""

    term: int
    index: int
    is_voter: bool
    leads: bool

    @property
    def end(self) -> tuple[int, int]:
        return self.term, self.index


class ServerLog:
    """Build it, then own it with `serve`."""

    def __init__(
        self,
        *,
        directory: Path | Disk,
        mesh: str,
        me: NodeId,
        machine: StateMachine,
        transport: Transport,
        servers: Callable[[], Sequence[NodeId]],
        founding: bool,
        settings: RaftSettings | None = None,
        on_applied: Callable[[int], None],
        on_leadership: Callable[[bool], None],
        draining: Callable[[], Collection[NodeId]] = tuple,
        zones: Callable[[], Mapping[NodeId, str]] = dict,
        clocks: Clocks = CLOCKS,
        random: Random | None = None,
        lineage: Lineage = (),
        after_doubt: Callable[[], bytes] | None = None,
        adds_work: Callable[[bytes], bool] = lambda command: False,
        lacks_history: Callable[[VoterId], bool] = lambda voter: False,
    ) -> None:
        """`servers`, `draining` and `zones` are read from the replicated state; both callbacks are called from the loop and must not wait.

        `founding` is for the empty directory of a mesh's first server, and for nobody else. `after_doubt` makes the
        command with which a sole voter goes on although its last frame may be lost; what `adds_work` a full disk refuses;
        a server that `lacks_history` that the leader has does not become a voter.
        """
        self._directory = directory
        self._mesh = mesh
        self._lineage = lineage
        self._after_doubt = after_doubt
        self._adds_work = adds_work
        self._lacks_history = lacks_history
        self._me = me
        self._machine = machine
        self._transport = transport
        self._servers = servers
        self._draining = draining
        self._zones = zones
        self._is_founding = founding
        self._settings = settings or RaftSettings()
        self._on_applied = on_applied
        self._on_leadership = on_leadership
        self._clocks = clocks
        self._random = random or Random()  # noqa: S311 - spreads elections and redials
        self._server: Server | None = None
        self._disk: Disk
        self._journal: Journal
        self._wire: Wire
        self._turns: Turns
        self._nursery: trio.Nursery
        self._disk_thread: DiskThread
        self._disk_since_s: float | None = None
        """Since when a turn has waited for the disk."""
        self._disk_used = trio.Event()
        self._woken = trio.Event()
        self._moved = trio.Event()
        self._told: tuple[int, bool, VoterId | None] = (0, False, None)
        self._failure: MeshError | None = None
        self.why_refused = ""
        """A peer remembers a later life of this journal, which must never speak again; empty when none does."""

    # --- what the node asks -------------------------------------------------------------------------------------------

    async def propose(self, origin: NodeId, command: bytes, *, timeout_s: float) -> ProposeResult:
        """Through the leader, wherever it is. `origin` is the authenticated proposer. Raises InvalidRequest, TooLarge."""
        if len(command) > codec.COMMAND_BYTES_MAX:
            raise TooLarge(f"command of {len(command)} bytes is over the limit of {codec.COMMAND_BYTES_MAX}")
        if not is_readable(command):
            raise InvalidRequest("a command must be one msgpack value, and not nested deeply")
        deadline = trio.current_time() + timeout_s
        while True:
            result = await self._propose_once(origin, command, deadline)
            if not isinstance(result, NotCommitted) or result.code:
                return result
            # Certainly not done: whoever leads next gets it.
            await self._wait_moved(deadline)
            if trio.current_time() >= deadline:
                return result

    async def _propose_once(self, origin: NodeId, command: bytes, deadline: float) -> ProposeResult:
        if (server := self._server) is None:
            return NotCommitted("the log is not running on this node")
        answer = _Answer()
        proposal = server.submit(origin, command, answer.came)
        if proposal is None:
            return NotCommitted("no server leads")
        self._woken.set()
        # Only this scope may end the wait: one around it would swallow whether the command is in the log.
        result = await answer.until(deadline)
        if result is None:
            server.forget(proposal)
            return Unknown("no answer in time") if proposal.is_batched else NotCommitted("the leader was too busy")
        return result

    async def barrier(self, *, timeout_s: float) -> int:
        """After it, everything that was acknowledged before the call is applied here. Raises Unavailable."""
        with trio.move_on_after(timeout_s):
            while True:
                if position := await self._read_position():
                    while self._running().engine.applied < position:
                        await self._moved.wait()
                    return position
                await self._wait_moved()
        raise Unavailable(f"no leader confirmed that it leads within {timeout_s:g} s", hint="see `mesh cluster status`")

    async def _read_position(self) -> int:
        answered = trio.Event()
        positions: list[int] = []

        def answer(position: int) -> None:
            positions.append(position)
            answered.set()

        self._running().reads.ask(answer)
        self._woken.set()
        await answered.wait()
        return positions[0]

    def leads(self) -> bool:
        """In contact with a quorum now, and everything of earlier leaders applied."""
        return self._server is not None and self._server.engine.leads()

    @property
    def leader(self) -> NodeId | None:
        leader = None if self._server is None else self._server.engine.leader
        return None if leader is None else node_of(leader)

    @property
    def term(self) -> int:
        return 0 if self._server is None else self._server.engine.term

    @property
    def voters(self) -> tuple[NodeId, ...]:
        return () if self._server is None else tuple(node_of(voter) for voter in self._server.engine.voters)

    @property
    def me(self) -> VoterId | None:
        """This life of the server; None while the log does not run."""
        return None if self._server is None else self._server.engine.me

    @property
    def voter_ids(self) -> tuple[VoterId, ...]:
        return () if self._server is None else tuple(self._server.engine.voters)

    @property
    def is_voter(self) -> bool:
        return self._server is not None and self._server.engine.is_voter

    @property
    def position(self) -> int:
        """The last entry that is applied here."""
        return 0 if self._server is None else self._server.engine.applied

    def status(self) -> RaftStatus:
        """Raises Unavailable while the log is not running."""
        server = self._running()
        engine = server.engine
        rows = [self._row(server, voter, is_voter=True) for voter in engine.voters]
        rows += [self._row(server, peer, is_voter=False) for peer in engine.progress if peer not in engine.voters]
        reached = {*self._wire.connected(), engine.me}
        answering = sum(
            (row.silent_ms is not None and row.silent_ms <= 1000) if engine.is_leader else voter in reached
            for voter, row in zip(engine.voters, rows, strict=False)
            if not row.is_in_doubt
        )
        return RaftStatus(
            me=self._me,
            term=engine.term,
            leader=self.leader,
            leads=engine.leads(),
            servers=tuple(rows),
            failures_survived=max(0, answering - len(engine.voters) // 2 - 1),
            commit=engine.commit,
            applied=engine.applied,
            first=engine.first,
            last=engine.last,
            journal_bytes=self._journal.bytes_on_disk,
            is_clock_refused=server.own_clock.is_refused,
            doubt=self._journal.doubt if engine.is_in_doubt or server.went_on_alone else "",
            full=tuple(node_of(voter) for voter in server.fullness.full_voters()),
            clock_ahead_ms=server.clock_ahead_ms(),
            disputed=engine.disputed,
        )

    def newest(self) -> Newest:
        """Raises Unavailable while the log is not running."""
        engine = self._running().engine
        return Newest(engine.term_at(engine.last), engine.last, engine.is_voter, engine.leads())

    async def hand_over(self) -> None:
        """Let another voter lead; returns when this server leads no more. Raises Unavailable."""
        server = self._running()
        with trio.move_on_after(HAND_OVER_S):
            while server.engine.is_leader and server.steering.hand_over():
                self._woken.set()
                await self._wait_moved()
        if server.engine.is_leader:
            raise Unavailable("no other voter could take over", hint="see `mesh cluster status`")

    def _row(self, server: Server, voter: VoterId, *, is_voter: bool) -> VoterStatus:
        engine, (node, _, incarnation) = server.engine, voter.partition("/")
        if voter == engine.me:
            return VoterStatus(self._me, incarnation, is_voter, engine.last, 0, 0, engine.is_in_doubt)
        progress = engine.progress.get(voter)
        if progress is None:
            return VoterStatus(NodeId(node), incarnation, is_voter, 0, 0, None)
        silent_ms = None if progress.heard_s == -inf else server.steering.silent_ms(progress.heard_s)
        lag = engine.last - progress.match
        return VoterStatus(NodeId(node), incarnation, is_voter, progress.match, lag, silent_ms, progress.is_in_doubt)

    async def _wait_moved(self, deadline: float = inf) -> None:
        with trio.move_on_at(min(deadline, trio.current_time() + RETRY_S)):
            await self._moved.wait()

    def _running(self) -> Server:
        if self._server is None:
            raise Unavailable("the log is not running on this node")
        return self._server

    # --- its own task -------------------------------------------------------------------------------------------------

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled. Raises Corrupt or StartRefused at start, Corrupt when the disk fails later."""
        image = await trio.to_thread.run_sync(self._open)
        self._durable_term = self._journal.getCurrentTerm()
        self._disk_thread = DiskThread()
        try:
            self._wire = Wire(
                self._transport,
                self._greeting,
                self._random,
                self._woken_by_wire,
                acquaintances=self._acquaintances,
                on_refused=self._was_refused,
            )
            self._server = server = Server(
                node=self._me,
                journal=self._journal,
                image=image,
                machine=self._machine,
                links=self._wire,
                servers=self._servers,
                draining=self._draining,
                zones=self._zones,
                settings=self._settings,
                clocks=self._clocks,
                random=self._random,
                packed=lambda: self._turns.packed(),
                report=lambda event, fields: log.info(event, **fields),
                after_doubt=self._after_doubt,
                adds_work=self._adds_work,
                lacks_history=self._lacks_history,
            )
            self._turns = Turns(server, self._journal, self._disk, self._mesh, self._machine, self._wire.flush)
            self._told = (server.engine.applied, False, None)
            async with trio.open_nursery() as self._nursery:
                await self._nursery.start(self._wire.serve)
                self._nursery.start_soon(self._keep_acquaintances)
                self._nursery.start_soon(self._keep_pulse, server)
                task_status.started()
                self._failure = await self._run(server)
                self._nursery.cancel_scope.cancel()
            raise self._failure
        finally:
            if self._server is not None:
                self._server.stop()
            self._server = None
            self._moved.set()
            self._disk_thread.close()
            self._journal.close()
            if isinstance(self._disk, DirectoryDisk):
                self._disk.close()

    def _open(self) -> Image | None:
        self._disk = DirectoryDisk(self._directory) if isinstance(self._directory, Path) else self._directory
        self._journal, image = open_log(
            self._disk,
            mesh=self._mesh,
            lineage=self._lineage,
            me=self._me,
            is_founding=self._is_founding,
            random=secrets.token_hex(16),
            incarnation=secrets.token_hex(8),
            sizes=self._settings.journal,
        )
        if image is not None:
            self._machine.unpack(image.state)()
        self._acquaintances = load_acquaintances(self._disk)
        return image

    def _greeting(self) -> Greeting:
        header = self._journal.header
        return Greeting(
            self._mesh, self._lineage, header.incarnation, header.start, header.random, self._durable_term,
            bool(self._journal.doubt),
        )  # fmt: skip

    def _was_refused(self, peer: NodeId, why: str) -> None:
        self.why_refused = f"this directory is an older copy: server {peer} remembers that {why}"
        self._failure = StartRefused(
            self.why_refused, hint="`meshd rejoin` lets this server join again, as the same node"
        )
        self._woken.set()

    async def _keep_acquaintances(self) -> None:
        """Write down what is remembered of others, not too often, and never in the way of a turn."""
        saved = self._acquaintances.changes
        while True:
            await trio.sleep(REMEMBER_S)
            if self._acquaintances.changes == saved:
                continue
            saved, packed = self._acquaintances.changes, self._acquaintances.packed()
            try:
                await trio.to_thread.run_sync(save_acquaintances, self._disk, packed)
            except OSError as error:
                log.warning("raft.acquaintances_not_saved", error=str(error))

    async def _run(self, server: Server) -> MeshError:
        """Turn until something fails that nobody here can repair."""
        while True:
            if server.has_work or self._wire.has_incidents or self._turns.has_finished:
                await trio.lowlevel.checkpoint()
            else:
                due_s = server.next_due_s()
                with trio.move_on_after(inf if due_s is None else max(0.0, due_s - self._clocks.now_s())):
                    await self._woken.wait()
            self._woken = trio.Event()
            try:
                await self._turn(server)
            except MeshError as error:
                return error
            if self._failure is not None:
                return self._failure

    async def _turn(self, server: Server) -> None:
        for work in self._turns.turn():
            self._disk_since_s = self._clocks.now_s()
            self._disk_used.set()
            try:
                await self._disk_thread.do(work)
            finally:
                self._disk_since_s = None
            if not self._journal.is_vote_staged:
                # Before anything leaves that is said in it: peers remember what they hear.
                self._durable_term = self._journal.getCurrentTerm()
        if (beside := self._turns.beside()) is not None:
            self._nursery.start_soon(self._do_beside, beside)
        self._tell(server)

    async def _keep_pulse(self, server: Server) -> None:
        """While a turn waits for its disk, say what needs no disk."""
        while True:
            await self._disk_used.wait()
            self._disk_used = trio.Event()
            await trio.sleep(PULSE_S)
            since_s, looked_at = self._disk_since_s, 0
            while since_s is not None and since_s == self._disk_since_s:
                waited_s = self._clocks.now_s() - since_s
                if waited_s >= PULSE_S and server.engine.term == self._durable_term:
                    unread = self._wire.unread(looked_at)
                    looked_at += len(unread)
                    mail = [(each.peer, each.message) for each in unread if isinstance(each, Mail)]
                    server.engine.pulse.beat(mail, waited_s, self._wire.send_at_once)
                    self._tell(server)
                await trio.sleep(PULSE_S)

    async def _do_beside(self, work: Work) -> None:
        try:
            await trio.to_thread.run_sync(work)
        except MeshError as error:
            self._failure = error
        finally:
            self._woken.set()

    def _woken_by_wire(self) -> None:
        self._woken.set()

    def _tell(self, server: Server) -> None:
        """The node learns what changed; waiters look again."""
        engine = server.engine
        applied, did_lead, _ = before = self._told
        leads = engine.leads()
        self._told = (engine.applied, leads, engine.leader)
        if engine.applied != applied:
            self._on_applied(engine.applied)
        if leads != did_lead:
            log.info("raft.leads" if leads else "raft.leads_no_more", term=engine.term)
            self._on_leadership(leads)
        if self._told != before:
            self._moved.set()
            self._moved = trio.Event()


class _Answer:
    """What became of one proposal, for the one task that waits. An event would do; it costs twice as much, 20,000 times a second."""

    __slots__ = ("_result", "_task")

    def __init__(self) -> None:
        self._result: ProposeResult | None = None
        self._task: trio.lowlevel.Task | None = None

    def came(self, result: ProposeResult) -> None:
        self._result = result
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def until(self, deadline: float) -> ProposeResult | None:
        """None: nothing came before the deadline."""
        with trio.CancelScope(deadline=deadline):
            if self._result is None:
                self._task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._give_up)
        return self._result

    def _give_up(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
