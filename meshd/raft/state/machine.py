"""The replicated state: what `apply` does with each log entry, the same at every voter.

    entry = Batch(elapsed, wall, commands) → add the time → fire what is due → each command in turn → answers

`apply` is deterministic and total. It reads no clock, draws nothing at random, iterates
no set; whatever arrives, it answers, because a command in the log cannot be taken back
and an exception would stop every voter at once. Rules live in `members`, `sessions` and
`queue`; this module decides who may say what, and when time passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, assert_never

from blake3 import blake3

from meshd import codec
from meshd.errors import InvalidRequest, MeshError, NotAllowed
from meshd.model import AttemptKey, AttemptRun, JobId, JobSpec, KeyLink, Member, NodeId, TaskState
from meshd.raft.state import queries, snapshot_state
from meshd.raft.state.commands import (
    BATCH_COMMANDS_MAX,
    Accepted,
    AnyAnswer,
    AnyCommand,
    Batch,
    Cancel,
    Claim,
    ClockSet,
    CreateInvite,
    CreateToken,
    Drop,
    EndSession,
    Event,
    Found,
    Join,
    OpenSession,
    RaiseFences,
    Reason,
    Reconcile,
    Recovered,
    Rejected,
    ReleaseJob,
    RemoveMember,
    Report,
    Restored,
    RetryJob,
    RevokeInvite,
    RevokeToken,
    Seal,
    SetDraining,
    Stored,
    Submit,
    UpdateMember,
)
from meshd.raft.state.fingerprint import fingerprint
from meshd.raft.state.history import History
from meshd.raft.state.jobs import Job
from meshd.raft.state.leases import Leases
from meshd.raft.state.lineage import Lineage
from meshd.raft.state.matching import Matching, Node
from meshd.raft.state.members import Members
from meshd.raft.state.moment import Moment
from meshd.raft.state.queue import Queue
from meshd.raft.state.recovery import Recovery
from meshd.raft.state.sessions import Sessions
from meshd.raft.state.submissions import Submissions
from meshd.views import AnyQuery

BATCH_BYTES_MAX = BATCH_COMMANDS_MAX * codec.COMMAND_BYTES_MAX

RECORD_ROWS_MAX = 64
"""Jobs with at most so many rows get their snapshot record at once, so that a capture finds it ready."""

_REASONS = {reason.value: reason for reason in Reason}


class Machine:
    """One replica. Everything is synchronous; `capture` hands out work for a thread, `unpack` may itself be called in one."""

    def __init__(self) -> None:
        self._moment = Moment()
        self._matching = Matching()
        self._members = Members(self._moment)
        self._queue = Queue(self._moment, self._matching)
        self._submissions = Submissions(self._moment, self._matching, self._queue)
        self._leases = Leases(self._moment, self._matching, self._queue)
        self._sessions = Sessions(self._moment, self._matching, self._queue, self._leases)
        self._recovery = Recovery(self._moment, self._matching, self._queue)
        self._history = History(self._moment, self._queue)
        self._digest = b""
        self.faults = 0
        """Commands that hit a bug of ours; they were answered, and the state is the same everywhere."""

    # --- the log's side

    def apply(self, index: int, batch: bytes) -> list[bytes]:
        """One entry in, encoded answers out, one for each command. An entry that is no Batch changes nothing."""
        try:
            entry = codec.decode(batch, Batch, bytes_max=BATCH_BYTES_MAX)
        except InvalidRequest:
            return []
        moment, queue, leases = self._moment, self._queue, self._leases
        before = len(moment.events)
        moment.advance(index, entry.elapsed_ms, entry.wall_ms)
        leases.begin()
        queue.seen.forget_before(moment.wall_ms)
        queue.fire_due()
        leases.fill()
        answers = []
        for stamped in entry.commands:
            answers.append(self._answer_to(stamped.origin, bytes(stamped.body)))
            leases.fill()
        leases.end()
        self._conclude(answers, before)
        return answers

    def capture(self) -> Callable[[], bytes]:
        """The state as it is now; the returned function packs it, in any thread, while `apply` goes on."""
        return snapshot_state.capture(
            self._moment, self._members, self._matching, self._queue, self._history, self._digest
        )

    def unpack(self, data: bytes) -> Callable[[], Callable[[], None]]:
        """What was captured, in any thread, while `apply` goes on; the returned function makes it the state at once. Raises Corrupt.

        That one returns what takes the replaced state apart, again for any thread.
        """
        fresh = Machine()
        fresh._digest = snapshot_state.restore(
            data, fresh._moment, fresh._members, fresh._matching, fresh._queue, fresh._history
        )

        def replace() -> Callable[[], None]:
            self.__dict__, fresh.__dict__ = fresh.__dict__, self.__dict__
            self._moment.events.append(Restored())
            return partial(snapshot_state.take_apart, fresh._matching, fresh._queue)

        return replace

    def restore(self, data: bytes) -> None:
        """Become what was captured. Raises Corrupt, and is then as it was."""
        self.unpack(data)()

    def next_timer_ms(self) -> int | None:
        """In how many milliseconds of state time something is due, counted from the last entry; None: nothing."""
        due_ms = self._queue.next_timer_ms()
        return None if due_ms is None else max(due_ms - self._moment.now_ms, 0)

    @property
    def wall_ms(self) -> int:
        return self._moment.wall_ms

    @property
    def position(self) -> int:
        """The index of the last entry applied."""
        return self._moment.position

    def digest(self) -> str:
        """Equal at replicas that applied the same entries the same way: of all that each entry did, and of what is now.

        What an entry did stays in it for good; a part of the state that differs shows when it is looked at (fingerprint.py).
        """
        now = fingerprint(self._moment, self._members, self._matching, self._queue, self._history)
        return blake3(self._digest + now).hexdigest()

    def take_events(self) -> list[Event]:
        """What was done since this was last asked, in order. Whoever applies takes them after each entry."""
        events, self._moment.events = self._moment.events, []
        return events

    # --- what the rest of a server asks

    def answer(self, query: AnyQuery) -> Any:
        """The query's view. Raises its MeshError."""
        return queries.answer(query, self._moment, self._members, self._matching, self._queue, self.digest)

    def find(self, selector: str) -> Job | None:
        """A job of the core, not to be changed. Raises Conflict when several begin with the selector."""
        return queries.find_job(self._queue, selector)

    def members(self) -> Mapping[NodeId, Member]:
        return MappingProxyType({node: record.member for node, record in self._members.records.items()})

    def revoked(self) -> Mapping[NodeId, None]:
        """Those removed for good."""
        return MappingProxyType(self._members.revoked)

    @property
    def mesh(self) -> str:
        return self._members.mesh

    def server_ids(self) -> tuple[NodeId, ...]:
        return self._members.server_ids()

    def zones(self) -> dict[NodeId, str]:
        """Of the servers that have told theirs."""
        records = self._members.records.items()
        return {node: record.member.zone for node, record in records if record.member.is_server and record.member.zone}

    def is_draining(self, node: NodeId) -> bool:
        member = self._members.get(node)
        return member is not None and member.is_draining

    def sessions_live(self) -> list[tuple[NodeId, int]]:
        return [(node.id, node.epoch) for node in self._matching.nodes.values() if node.is_live]

    def leases_of(self, node: NodeId, epoch: int) -> tuple[AttemptKey, ...]:
        """What is leased to the session, by fence; nothing when it is not live."""
        return self._sessions.leases_of(node, epoch)

    def still_leased(self, node: NodeId, epoch: int, attempts: AttemptRun) -> tuple[AttemptRun, ...]:
        """Which of these are leased to the session, as they were."""
        return self._sessions.still_leased(node, epoch, attempts)

    def stops_of(self, node: NodeId, epoch: int) -> tuple[AttemptKey, ...]:
        """Which of these are cancelled or timed out: tell the node again while they stand."""
        return self._sessions.stops_of(node, epoch)

    def state_of(self, job: JobId) -> TaskState | None:
        """What the job as a whole is doing; None when it is forgotten."""
        found = self._queue.jobs.get(job)
        return None if found is None else found.state

    def spec_of(self, job: JobId) -> JobSpec | None:
        found = self._queue.jobs.get(job)
        return None if found is None else found.spec

    @property
    def lineage(self) -> Lineage:
        """The recoveries that this state has been through."""
        return self._queue.lineage

    @property
    def history(self) -> History:
        """What has left the core, to be read; the object is another one after a snapshot took the state's place."""
        return self._history

    @property
    def fence(self) -> int:
        """The newest fence given out."""
        return self._queue.fence

    # --- who may say what

    def _answer_to(self, origin: NodeId, body: bytes) -> bytes:
        try:
            command: AnyCommand = codec.decode(body, AnyCommand, bytes_max=codec.COMMAND_BYTES_MAX)
            answer = self._perform(origin, command)
        except MeshError as error:
            answer = Rejected(_REASONS.get(error.code, Reason.INVALID_REQUEST), error.message, error.hint)
        except Exception as error:
            # The last net: the same bug strikes every replica at the same entry, so they stay equal. A
            # voter that raised here would raise again at each start, and the mesh would be gone for good.
            self.faults += 1
            answer = Rejected(Reason.INVALID_REQUEST, f"internal error: {type(error).__name__}")
        return answer if isinstance(answer, bytes) else codec.encode(answer)

    def _perform(self, origin: NodeId, command: AnyCommand) -> AnyAnswer | bytes:
        members = self._members
        if isinstance(command, Found):
            founded = members.found(origin, command)
            self._enlist(origin)
            return founded
        me = members.get(origin)
        if me is None:
            raise NotAllowed(f"{origin[:64]} is not a member of this mesh")
        match command:
            case Join():
                joined = members.join(origin, command)
                self._enlist(joined.member.node)
                return joined
            case CreateInvite():
                return members.create_invite(origin, command)
            case RevokeInvite():
                return members.revoke_invite(command)
            case UpdateMember():
                return members.update(origin, command)
            case SetDraining(node, is_draining):
                members.set_draining(origin, node, is_draining=is_draining)
                self._enlist(node)
                return Accepted()
            case RemoveMember(node, links):
                return self._remove(origin, node, links)
            case CreateToken():
                return members.create_token(origin, command)
            case RevokeToken():
                return members.revoke_token(origin, command)
            case Submit():
                return self._submissions.submit(command)
            case Cancel():
                return self._queue.cancel(command)
            case RetryJob():
                return self._submissions.retry(command)
            case ReleaseJob():
                return self._recovery.release(command)
            case Recovered():
                return self._recover(me, command)
            case RaiseFences(above):
                if not me.is_server:
                    raise NotAllowed("only a server raises fences")
                return self._recovery.raise_fences(above)
            case ClockSet():
                return self._set_clock(origin, command)
            case Seal():
                self._members.check_server(origin, "seals history")
                return self._history.seal(command)
            case Stored():
                self._members.check_server(origin, "stores history")
                return self._history.stored(origin, command)
            case Drop():
                self._members.check_server(origin, "drops what is in the history")
                return self._history.drop(command)
            case EndSession(node, _):
                if not me.is_server:
                    raise NotAllowed("only a server ends sessions")
                ended = self._matching.nodes.get(node)
                return Accepted() if ended is None else self._sessions.end(ended, command)
            case OpenSession():
                return self._sessions.open(self._matching.nodes[origin], command)
            case Claim() | Report():
                return self._sessions.numbered(self._matching.nodes[origin], command)
            case Reconcile():
                return self._sessions.reconcile(self._matching.nodes[origin], command)
            case _:
                assert_never(command)

    def _enlist(self, node_id: NodeId) -> None:
        """The member as a place to run: made at its first mention, and told whether it may take work."""
        member = self._members.get(node_id)
        assert member is not None
        may_work = member.is_worker and not member.is_draining
        node = self._matching.nodes.get(node_id)
        if node is None:
            self._matching.nodes[node_id] = Node(node_id, may_work)
        elif node.may_work != may_work:
            node.may_work = may_work
            self._matching.changed(node)

    def _remove(self, origin: NodeId, node_id: NodeId, links: tuple[KeyLink, ...]) -> Accepted:
        """Whoever removes a member promises that it is dead: nothing waits for it any longer."""
        if node_id in self._members.revoked:
            return Accepted()
        self._members.remove(origin, node_id, links)
        self._history.held.pop(node_id, None)
        node = self._matching.nodes[node_id]
        if node.is_live:
            self._sessions.lapse(node)
        self._leases.lose_held(node, "its node was removed from the mesh")
        self._matching.removed(node)
        return Accepted()

    def _recover(self, me: Member, command: Recovered) -> Accepted:
        """Every session ends: what its node has done since then is in no log, so it has to open another."""
        if not me.is_server:
            raise NotAllowed("only a server recovers a mesh")
        before = self._queue.lineage
        accepted = self._recovery.recover(command)
        if self._queue.lineage != before:
            for node in self._matching.nodes.values():
                if node.is_live:
                    self._sessions.lapse(node)
        return accepted

    def _set_clock(self, origin: NodeId, command: ClockSet) -> Accepted:
        """What dates decide stays decided: no id is accepted again, no invite lives longer or comes back to life."""
        self._members.check_server(origin, "sets the mesh's clock")
        before_ms = self._moment.wall_ms
        if self._moment.set_wall(origin, command):
            self._members.clock_moved(before_ms)
            self._submissions.clock_moved()
        return Accepted()

    def _conclude(self, answers: list[bytes], events_before: int) -> None:
        done = self._moment.events[events_before:]  # who leases what, above all
        changed = self._queue.announce_touched()
        self._history.forget()
        moment = self._moment
        trace = (
            moment.position,
            moment.now_ms,
            moment.wall_ms,
            self._queue.fence,
            answers,
            done,
            [(job.id, job.active, job.unfinished, job.is_final) for job in changed],
            len(self._members.records),
        )
        self._digest = blake3(self._digest + codec.encode(trace)).digest()
        for job in changed:
            _keep_record(job)


def _keep_record(job: Job) -> None:
    if len(job.rows) + len(job.results) <= RECORD_ROWS_MAX:
        job.recorded()
