"""The replicated log at a server: one task that turns the engine, and what the rest of the node asks of it.

A turn is: read the mail, let the engine decide, sync the journal in a thread, let the
frames leave that depended on it. The task sleeps until something happens or a timer is
due. What was proposed while the last batch was being committed becomes the next one, so
an idle log answers at once and a busy one writes large entries.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Protocol, assert_never

import structlog
import trio
from msgspec import Struct

from meshd import codec
from meshd.errors import Corrupt, InvalidRequest, MeshError, PeerFault, StartRefused, TooLarge, Unavailable
from meshd.model import NodeId
from meshd.ports import NotCommitted, ProposeResult, Transport, Unknown
from meshd.raft.commands import Batch
from meshd.raft.disk import DirectoryDisk, Disk
from meshd.raft.engine import Arrived, Engine, RaftSettings
from meshd.raft.journal import Journal, LocalHeader, create_journal, journal_names, open_journal
from meshd.raft.messages import Propose, Proposed, Read, ReadAt, VoterId, node_of, voter_id
from meshd.raft.proposals import Forwarded, Pending, Proposal, as_message, is_one_value, resolver, stamped
from meshd.raft.reads import Reads
from meshd.raft.snapshot import Image, Packed, load, pack_image, save, unpack_image
from meshd.raft.stamp import OwnClock, agreed_wall_ms
from meshd.raft.voters import Add, HandOver, Peer, Remove, View, decide, learners
from meshd.raft.wire import Down, Greeting, Mail, Up, Wire

MAIL_SLICE_S = 0.005
"""Reading mail stops after so long, and the turn goes on."""
STEER_S = 0.05
"""The autopilot looks no more often …"""
STEER_IDLE_S = 1.0
"""… and no less often while leading."""
WITNESS_S = 0.1
"""So long after the last frame an empty one proves it (protocol.md 9)."""
TICK_MS_MIN = 10
"""Between ticks, whatever the state machine says."""
TICK_MS_MAX = 60_000
"""One entry counts at most a minute, so while something is pending there is one each minute."""
HAND_OVER_S = 3.0

log = structlog.get_logger()


def boottime_s() -> float:
    """Also counts while the machine sleeps; nobody can set it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall_clock_ms() -> int:
    return int(time.time() * 1000)


class StateMachine(Protocol):
    """What is replicated."""

    wall_ms: int
    """The state's wall time."""

    def apply(self, index: int, batch: bytes) -> list[bytes]:
        """Encoded answers, one for each command. Total and deterministic."""
        ...

    def capture(self) -> Callable[[], bytes]:
        """Cheap and consistent; the packer it returns may run in a thread."""
        ...

    def restore(self, data: bytes) -> None: ...

    def next_timer_ms(self) -> int | None:
        """State time until something timed is due; None: no ticks are needed."""
        ...


class VoterStatus(Struct, frozen=True):
    node: NodeId
    incarnation: str
    is_voter: bool
    match: int
    """Known to be on its disk; only the leader knows of others."""
    lag: int
    silent_ms: int | None
    """Since it last answered the leader; None: never, or this is not the leader."""


class RaftStatus(Struct, frozen=True):
    me: NodeId
    term: int
    leader: NodeId | None
    leads: bool
    """Of this server, in contact with a quorum now."""
    servers: tuple[VoterStatus, ...]
    """Voters, then learners."""
    failures_survived: int
    """How many more voters may fail now; known at the leader, an estimate elsewhere."""
    commit: int
    applied: int
    first: int
    last: int
    journal_bytes: int
    is_clock_refused: bool
    """This sole voter's clock jumped; the mesh's dates go on by elapsed time until an operator sets it."""

    @property
    def voters(self) -> tuple[NodeId, ...]:
        return tuple(server.node for server in self.servers if server.is_voter)


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
        now: Callable[[], float] = boottime_s,
        wall_ms: Callable[[], int] = wall_clock_ms,
        is_clock_synchronised: Callable[[], bool] = lambda: False,
        random: Random | None = None,
        recovery: int = 0,
    ) -> None:
        """`servers` and `draining` are read from the replicated state; both callbacks are called from the loop and must not wait.

        `founding` is for the empty directory of a mesh's first server, and for nobody else.
        """
        self._directory = directory
        self._mesh = mesh
        self._recovery = recovery
        self._me = me
        self._machine = machine
        self._transport = transport
        self._servers = servers
        self._draining = draining
        self._is_founding = founding
        self._settings = settings or RaftSettings()
        self._on_applied = on_applied
        self._on_leadership = on_leadership
        self._now = now
        self._wall_ms = wall_ms
        self._is_clock_synchronised = is_clock_synchronised
        self._random = random or Random()  # noqa: S311 - spreads elections and redials
        self._own_clock = OwnClock()

        self._disk: Disk
        self._journal: Journal
        self._wire: Wire
        self._engine: Engine | None = None
        self._nursery: trio.Nursery
        self._woken = trio.Event()
        self._moved = trio.Event()
        self._pending = Pending()
        self._forwarded = Forwarded()
        self._reads = Reads()
        self._batch_index = 0
        self._was_leading = False
        self._was_applied = 0
        self._steered_s = float("-inf")
        self._written_s = float("-inf")
        self._handing_over_until_s = float("-inf")
        self._snapshot_index = 0
        self._bytes_since_snapshot = 0
        self._is_saving = False
        self._release_to: int | None = None
        self._packed: Packed | None = None
        self._is_loading = False
        self._installable: Image | None = None
        self._was_leader: VoterId | None = None
        self._failure: MeshError | None = None

    # --- what the node asks -------------------------------------------------------------------------------------------

    async def propose(self, origin: NodeId, command: bytes, *, timeout_s: float) -> ProposeResult:
        """Through the leader, wherever it is. `origin` is the authenticated proposer. Raises InvalidRequest, TooLarge."""
        if len(command) > codec.COMMAND_BYTES_MAX:
            raise TooLarge(f"command of {len(command)} bytes is over the limit of {codec.COMMAND_BYTES_MAX}")
        if not is_one_value(command):
            raise InvalidRequest("a command must be one msgpack value")
        result: ProposeResult = NotCommitted("no server leads")
        with trio.move_on_after(timeout_s):
            while True:
                moved = self._moved
                engine = self._running()
                result = NotCommitted("no server leads")
                if engine.leader is not None:
                    result = Unknown("no answer in time")
                    proposal, ended = self._submit(engine, engine.leader, origin, command)
                    try:
                        result = await ended.wait()
                    finally:
                        if not proposal.is_over:
                            if not proposal.is_batched:
                                result = NotCommitted("it was still waiting when the time was up")
                            proposal.is_over = True
                    if not isinstance(result, NotCommitted):
                        return result
                # Certainly not done: the next leader gets it as soon as there is one.
                with trio.move_on_after(0.05):
                    await moved.wait()
        return result

    async def barrier(self, *, timeout_s: float) -> int:
        """After it, everything that was acknowledged before the call is applied here. Raises Unavailable."""
        with trio.move_on_after(timeout_s):
            while True:
                moved = self._moved
                position = await self._reads.position(self._wake)
                if position:
                    while self._running().applied < position:
                        await self._moved.wait()
                    return position
                with trio.move_on_after(0.05):
                    await moved.wait()
        raise Unavailable(f"no leader confirmed that it leads within {timeout_s:g} s", hint="see `mesh cluster status`")

    def leads(self) -> bool:
        """In contact with a quorum now, and everything of earlier leaders applied."""
        return self._engine is not None and self._engine.leads()

    @property
    def leader(self) -> NodeId | None:
        if self._engine is None or self._engine.leader is None:
            return None
        return node_of(self._engine.leader)

    @property
    def term(self) -> int:
        return 0 if self._engine is None else self._engine.term

    @property
    def voters(self) -> tuple[NodeId, ...]:
        return () if self._engine is None else tuple(node_of(voter) for voter in self._engine.voters)

    @property
    def is_voter(self) -> bool:
        return self._engine is not None and self._engine.is_voter

    @property
    def position(self) -> int:
        """The last entry that is applied here."""
        return 0 if self._engine is None else self._engine.applied

    def status(self) -> RaftStatus:
        engine = self._running()
        rows = [self._row(engine, voter, is_voter=True) for voter in engine.voters]
        rows += [self._row(engine, peer, is_voter=False) for peer in engine.progress if peer not in engine.voters]
        reached = {*self._wire.connected(), engine.me}
        answering = sum(
            voter in reached and (not engine.is_leader or (row.silent_ms or 0) <= 1000)
            for voter, row in zip(engine.voters, rows, strict=False)
        )
        quorum = len(engine.voters) // 2 + 1
        return RaftStatus(
            me=self._me,
            term=engine.term,
            leader=self.leader,
            leads=engine.leads(),
            servers=tuple(rows),
            failures_survived=max(0, answering - quorum) if engine.voters else 0,
            commit=engine.commit,
            applied=engine.applied,
            first=engine.first,
            last=engine.last,
            journal_bytes=self._journal.bytes_on_disk,
            is_clock_refused=self._own_clock.is_refused,
        )

    async def hand_over(self) -> None:
        """Let another voter lead. Returns when one was asked and this server leads no more. Raises Unavailable."""
        engine = self._running()
        with trio.move_on_after(HAND_OVER_S):
            while engine.is_leader:
                moved = self._moved
                best = max(
                    (voter for voter in engine.voters if voter in engine.progress),
                    key=lambda voter: (engine.progress[voter].is_connected, engine.progress[voter].match),
                    default=None,
                )
                if best is None:
                    break
                self._handing_over_until_s = self._now() + 1.0
                engine.transfer_to(best)
                self._wake()
                with trio.move_on_after(0.1):
                    await moved.wait()
        if engine.is_leader:
            raise Unavailable("no other voter could take over", hint="see `mesh cluster status`")

    # --- starting -----------------------------------------------------------------------------------------------------

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled. Raises Corrupt or StartRefused at start, Corrupt when the disk fails later."""
        image = await trio.to_thread.run_sync(self._open)
        header = self._journal.header
        try:
            me = voter_id(self._me, header.incarnation)
            self._wire = Wire(
                self._transport,
                Greeting(self._mesh, self._recovery, header.incarnation, header.start, header.random),
                self._random,
                self._wake,
            )
            if image is not None:
                self._machine.restore(image.state)
            self._engine = Engine(
                me=me,
                voters=header.founding if image is None else image.voters,
                journal=self._journal,
                apply=self._apply,
                send=self._wire.send,
                snapshot=self._snapshot_to_send,
                now=self._now,
                wall_ms=self._wall_ms,
                random=self._random,
                settings=self._settings,
                on_bug=lambda index, error: log.error("raft.bug", index=index, exc_info=error),
            )
            self._was_applied = self._snapshot_index = self._engine.applied
            async with trio.open_nursery() as self._nursery:
                await self._nursery.start(self._wire.serve)
                self._wire.reach([node_of(voter) for voter in self._engine.voters])
                task_status.started()
                self._failure = await self._run(self._engine)
                self._nursery.cancel_scope.cancel()
            if self._failure is not None:
                raise self._failure
        finally:
            self._engine = None
            self._pending.refuse_all("this server stops")
            self._moved.set()
            self._journal.close()
            if isinstance(self._disk, DirectoryDisk):
                self._disk.close()

    def _open(self) -> Image | None:
        self._disk = DirectoryDisk(self._directory) if isinstance(self._directory, Path) else self._directory
        random = secrets.token_hex(16)
        if journal_names(self._disk):
            if self._is_founding:
                raise StartRefused("a mesh is founded in an empty directory, and this one has a journal")
            newest = load(self._disk, mesh=self._mesh)
            at = None if newest is None else (newest[0].index, newest[0].term)
            self._journal = open_journal(
                self._disk, mesh=self._mesh, recovery=self._recovery, random=random, snapshot=at
            )
            return None if newest is None else newest[0]
        if load(self._disk, mesh=self._mesh) is not None:
            raise Corrupt("there is a snapshot here and no journal", hint="move the directory aside and start again")
        incarnation = secrets.token_hex(8)
        founding = (voter_id(self._me, incarnation),) if self._is_founding else ()
        header = LocalHeader(self._mesh, self._recovery, incarnation, 1, random, founding=founding)
        self._journal = create_journal(self._disk, header)
        return None

    # --- turning ------------------------------------------------------------------------------------------------------

    async def _run(self, engine: Engine) -> MeshError:
        """Turn until something fails that nobody here can repair."""
        while True:
            woken = self._woken
            if not self._has_work(engine):
                due_s = self._next_due_s(engine)
                if due_s is None:
                    await woken.wait()
                else:
                    with trio.move_on_after(max(0.0, due_s - self._now())):
                        await woken.wait()
            self._woken = trio.Event()
            try:
                await self._turn(engine)
            except MeshError as error:
                return error
            if self._failure is not None:
                return self._failure
            await trio.lowlevel.checkpoint()

    async def _turn(self, engine: Engine) -> None:
        engine.check_contact()
        self._read_mail(engine)
        if self._installable is not None:
            image, self._installable = self._installable, None
            engine.install(image, self._machine.restore)
            self._snapshot_index = self._release_to = max(self._snapshot_index, image.index)
            self._bytes_since_snapshot = 0
        if engine.arrived is not None and not self._is_saving:
            self._is_saving = True
            self._nursery.start_soon(self._verify, engine, engine.arrived)
        self._steer(engine)
        self._serve_reads(engine)
        self._propose_batch(engine)
        engine.doTick(0.0)
        if engine.is_leader and not self._journal.is_vote_staged:
            # A leader counts itself only when it has synced, so its entries may be on their way meanwhile.
            self._wire.flush()
        if self._journal.is_dirty or (self._journal.wants_witness and self._now() - self._written_s >= WITNESS_S):
            await trio.to_thread.run_sync(self._journal.commit)
            self._written_s = self._now()
        engine.synced()
        self._wire.flush()
        if self._release_to is not None and not self._journal.is_dirty:
            index, self._release_to = self._release_to, None
            await trio.to_thread.run_sync(self._journal.release, index)
        self._maybe_save(engine)
        self._tell(engine)

    def _has_work(self, engine: Engine) -> bool:
        return (
            self._wire.has_incidents
            or engine.has_more_to_apply
            or self._failure is not None
            or (bool(self._pending) and self._may_batch(engine))
        )

    def _next_due_s(self, engine: Engine) -> float | None:
        due = [engine.next_deadline(), self._tick_due_s(engine)]
        if engine.is_leader:
            due.append(self._steered_s + STEER_IDLE_S)
        if self._journal.wants_witness:
            due.append(self._written_s + WITNESS_S)
        return min((at for at in due if at is not None), default=None)

    def _wake(self) -> None:
        self._woken.set()

    def _read_mail(self, engine: Engine) -> None:
        until = self._now() + MAIL_SLICE_S
        while (incident := self._wire.take()) is not None:
            match incident:
                case Up(peer):
                    engine.peer_up(peer)
                case Down(peer):
                    engine.peer_down(peer)
                    self._forwarded.lost(peer)
                    self._reads.lost(peer)
                case Mail(peer, message):
                    try:
                        self._read(engine, peer, message)
                    except Corrupt:
                        raise
                    except MeshError as error:
                        log.warning("raft.bad_message", peer=peer, why=str(error))
            if self._now() >= until:
                break

    def _read(self, engine: Engine, peer: VoterId, message: object) -> None:
        match message:
            case Propose(request, origin, command):
                proposal = Proposal(origin, command, lambda result: self._answer_proposal(peer, request, result))
                self._admit(engine, proposal)
            case Proposed():
                self._forwarded.answered(peer, message)
            case Read(request):
                engine.barrier(lambda position: self._answer_read(peer, request, position))
            case ReadAt(request, position):
                self._reads.answered(peer, request, position)
            case _:
                engine.receive(peer, message)  # type: ignore[arg-type]

    def _tell(self, engine: Engine) -> None:
        """The node learns what changed; waiters look again."""
        if not engine.is_leader:
            self._pending.refuse_all("this server does not lead any more")
        leads = engine.leads()
        has_moved = engine.applied != self._was_applied or leads != self._was_leading
        if engine.applied != self._was_applied:
            self._was_applied = engine.applied
            self._on_applied(engine.applied)
        if leads != self._was_leading:
            self._was_leading = leads
            log.info("raft.leads" if leads else "raft.leads_no_more", term=engine.term)
            self._on_leadership(leads)
        if has_moved or engine.leader != self._was_leader:
            self._was_leader = engine.leader
            self._moved.set()
            self._moved = trio.Event()

    def _running(self) -> Engine:
        if self._engine is None:
            raise Unavailable("the log is not running here")
        return self._engine

    # --- batches ------------------------------------------------------------------------------------------------------

    def _submit(self, engine: Engine, leader: VoterId, origin: NodeId, command: bytes) -> tuple[Proposal, _Ended]:
        """To the own queue, or over the wire; the proposal ends when its outcome is known."""
        ended = _Ended()
        proposal = Proposal(origin, command, ended.set)
        if leader == engine.me:
            self._admit(engine, proposal)
        else:
            request = self._forwarded.add(leader, proposal)
            if self._wire.send(leader, Propose(request, origin, command)):
                proposal.is_batched = True  # from here on only the leader knows
            else:
                self._forwarded.forget(request)
                proposal.end(NotCommitted(f"the leader {leader} cannot be reached"))
        self._wake()
        return proposal, ended

    def _admit(self, engine: Engine, proposal: Proposal) -> None:
        if not engine.is_leader:
            proposal.end(NotCommitted("this server does not lead"))
        elif not is_one_value(proposal.command):
            proposal.end(NotCommitted("malformed command"))
        elif not self._pending.add(proposal):
            proposal.end(NotCommitted("the leader's queue is full"))

    def _answer_proposal(self, peer: VoterId, request: int, result: ProposeResult) -> None:
        self._wire.send(peer, as_message(request, result))

    def _may_batch(self, engine: Engine) -> bool:
        return engine.is_settled() and engine.applied >= self._batch_index and self._now() >= self._handing_over_until_s

    def _propose_batch(self, engine: Engine) -> None:
        """What arrived while the last batch was being committed; or a tick, when something timed is due."""
        if not engine.is_leader or not self._may_batch(engine):
            return
        batch = self._pending.take_batch()
        tick_s = self._tick_due_s(engine)
        if not batch and (tick_s is None or tick_s > self._now()):
            return
        now_ms = int(self._now() * 1000)
        elapsed_ms = max(0, now_ms - int(engine.received_s * 1000))
        entry = Batch(elapsed_ms, self._stamp_wall(engine, now_ms, elapsed_ms), stamped(batch))
        self._batch_index = engine.last + 1
        engine.propose(codec.encode(entry), resolver(batch))

    def _stamp_wall(self, engine: Engine, now_ms: int, elapsed_ms: int) -> int:
        expected_ms = self._machine.wall_ms + elapsed_ms
        own_ms = self._wall_ms()
        if engine.voters == (engine.me,):
            is_founding = self._machine.wall_ms == 0
            wall_ms = self._own_clock.wall_ms(
                now_ms=now_ms,
                own_ms=own_ms,
                expected_ms=expected_ms,
                is_founding=is_founding,
                is_synchronised=self._is_clock_synchronised(),
            )
            return max(self._machine.wall_ms, wall_ms)
        offsets = [
            progress.clock_offset_ms
            for peer, progress in engine.progress.items()
            if peer in engine.voters and progress.clock_offset_ms is not None
        ]
        agreed_ms = agreed_wall_ms(now_ms, [own_ms - now_ms, *offsets], len(engine.voters))
        return expected_ms if agreed_ms is None else max(expected_ms, agreed_ms)

    def _tick_due_s(self, engine: Engine) -> float | None:
        """When an empty batch is due; None while nothing timed is pending, or a batch is on its way."""
        if not self._may_batch(engine) or (timer_ms := self._machine.next_timer_ms()) is None:
            return None
        return engine.received_s + min(max(timer_ms, TICK_MS_MIN), TICK_MS_MAX) / 1000

    def _apply(self, index: int, batch: bytes) -> list[bytes]:
        self._bytes_since_snapshot += len(batch)
        return self._machine.apply(index, batch)

    # --- reads --------------------------------------------------------------------------------------------------------

    def _serve_reads(self, engine: Engine) -> None:
        """One round, or one question to the leader, for all that asked since the last turn."""
        if not self._reads.has_new:
            return
        if engine.is_leader:
            engine.barrier(self._reads.begin())
        elif engine.leader is not None:
            request = self._reads.begin_remote(engine.leader)
            if not self._wire.send(engine.leader, Read(request)):
                self._reads.answered(engine.leader, request, 0)
        else:
            self._reads.begin()(None)

    def _answer_read(self, peer: VoterId, request: int, position: int | None) -> None:
        self._wire.send(peer, ReadAt(request, position or 0))

    # --- who votes ----------------------------------------------------------------------------------------------------

    def _steer(self, engine: Engine) -> None:
        now = self._now()
        if not engine.is_leader:
            self._wire.reach([node_of(voter) for voter in engine.voters] if engine.is_voter else [])
            return
        if now - self._steered_s < STEER_S:
            return
        self._steered_s = now
        servers = self._servers()
        self._wire.reach({*servers, *(node_of(voter) for voter in engine.voters)})
        peers = {voter: self._peer(engine, voter) for voter in {*self._wire.connected(), *engine.progress}}
        view = View(
            me=engine.me,
            voters=engine.voters,
            peers=peers,
            servers=servers,
            draining=self._draining(),
            leading_ms=int(engine.leading_s * 1000),
        )
        engine.set_learners(learners(view))
        if not engine.may_change_voters() or not engine.leads():
            return
        match decision := decide(view):
            case Add(voter):
                log.info("raft.voter_added", voter=voter)
                engine.change_voters([*engine.voters, voter])
            case Remove(voter):
                log.info("raft.voter_removed", voter=voter)
                engine.change_voters([other for other in engine.voters if other != voter])
            case HandOver(to):
                self._handing_over_until_s = now + 0.5
                engine.transfer_to(to)
            case None:
                pass
            case _:
                assert_never(decision)

    def _peer(self, engine: Engine, voter: VoterId) -> Peer:
        progress = engine.progress.get(voter)
        if progress is None:
            return Peer(lag=engine.last, silent_ms=1 << 40)
        return Peer(lag=engine.last - progress.match, silent_ms=_ago_ms(self._now(), progress.contact_s))

    def _row(self, engine: Engine, voter: VoterId, *, is_voter: bool) -> VoterStatus:
        node, _, incarnation = voter.partition("/")
        progress = engine.progress.get(voter)
        if voter == engine.me:
            return VoterStatus(self._me, incarnation, is_voter, engine.last, 0, 0)
        if progress is None:
            return VoterStatus(NodeId(node), incarnation, is_voter, 0, 0, None)
        has_answered = progress.contact_s > float("-inf")
        silent_ms = _ago_ms(self._now(), progress.contact_s) if has_answered else None
        return VoterStatus(NodeId(node), incarnation, is_voter, progress.match, engine.last - progress.match, silent_ms)

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def _maybe_save(self, engine: Engine) -> None:
        entries = engine.applied - self._snapshot_index
        is_due = (
            entries >= self._settings.snapshot_entries or self._bytes_since_snapshot >= self._settings.snapshot_bytes
        )
        if not is_due or entries == 0 or self._is_saving:
            return
        self._is_saving = True
        self._bytes_since_snapshot = 0
        self._nursery.start_soon(self._save, engine, engine.applied, self._machine.capture())

    async def _save(self, engine: Engine, index: int, pack: Callable[[], bytes]) -> None:
        """Write the state as of `index` in a thread, then let the log behind it go."""
        term, voters = engine.term_at(index), engine.voters_at(index)

        def write() -> None:
            save(self._disk, pack_image(Image(self._mesh, index, term, voters, pack())), self._journal.header)

        try:
            await trio.to_thread.run_sync(write)
            self._packed = None
            if index > engine.first:
                engine.compact(index)
            self._snapshot_index = max(self._snapshot_index, index)
            self._release_to = self._snapshot_index
            log.info("raft.snapshot_saved", index=index)
        except MeshError as error:
            self._failure = error
        finally:
            self._is_saving = False
            self._wake()

    async def _verify(self, engine: Engine, arrived: Arrived) -> None:
        """Verify and write what a leader sent, in a thread; only then may it replace anything."""

        def write() -> Image:
            image = unpack_image(arrived.data, digest=arrived.digest, mesh=self._mesh)
            save(self._disk, Packed(image.index, image.term, arrived.data, arrived.digest), self._journal.header)
            return image

        try:
            self._installable = await trio.to_thread.run_sync(write)
            log.info("raft.snapshot_received", peer=arrived.peer, index=self._installable.index)
        except PeerFault as error:
            log.warning("raft.snapshot_refused", peer=arrived.peer, why=str(error))
            engine.discard_arrived()
        except MeshError as error:
            self._failure = error
        finally:
            self._is_saving = False
            self._wake()

    def _snapshot_to_send(self) -> Packed | None:
        if self._packed is None and not self._is_loading:
            self._is_loading = True
            self._nursery.start_soon(self._load_to_send)
        return self._packed

    async def _load_to_send(self) -> None:
        try:
            newest = await trio.to_thread.run_sync(partial(load, self._disk, mesh=self._mesh))
            self._packed = None if newest is None else newest[1]
        except MeshError as error:
            self._failure = error
        finally:
            self._is_loading = False
            self._wake()


class _Ended:
    """An outcome that somebody waits for."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._result: ProposeResult | None = None

    def set(self, result: ProposeResult) -> None:
        self._result = result
        self._event.set()

    async def wait(self) -> ProposeResult:
        await self._event.wait()
        assert self._result is not None
        return self._result


def _ago_ms(now_s: float, then_s: float) -> int:
    return 1 << 40 if then_s == float("-inf") else max(0, int((now_s - then_s) * 1000))
