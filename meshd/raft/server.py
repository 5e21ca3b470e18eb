"""One server's log between two syncs: everything that a turn does and that does not wait.

    begin    contact is checked, mail is read, the autopilot steers, a batch is written
    (early)  a leader's frames may leave: it counts itself only when it has synced
    sync     the owner writes the journal
    finish   what is now durable counts: commit, apply, answer
    flush    the owner lets the frames leave

`log.py` turns it under trio, with threads for the disk; the simulator turns it on virtual
time, on a disk that loses power.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import assert_never

from meshd import codec
from meshd.errors import Corrupt, MeshError
from meshd.model import NodeId
from meshd.ports import NotCommitted, ProposeResult
from meshd.raft.engine import Engine
from meshd.raft.fullness import Fullness
from meshd.raft.messages import (
    AnyMessage,
    Heard,
    Propose,
    Proposed,
    Read,
    ReadAt,
    SeatTaken,
    VoterId,
    voter_id,
)
from meshd.raft.proposals import (
    BATCH_BYTES_MAX,
    Forwarded,
    Pending,
    Proposal,
    Resolve,
    as_message,
    first_request,
    is_readable,
    resolver,
    stamped,
)
from meshd.raft.reads import Reads
from meshd.raft.settings import RaftSettings
from meshd.raft.stamp import OwnClock, agreed_wall_ms
from meshd.raft.state.commands import Batch
from meshd.raft.steering import Steering
from meshd.raft.storage.disk import Room
from meshd.raft.storage.journal import Journal
from meshd.raft.storage.snapshot import Image, Packed
from meshd.raft.surroundings import Clocks, Down, Links, Mail, Report, StateMachine, Up

MAIL_SLICE_S = 0.005
"""Reading mail stops after so long, and the turn goes on."""
WITNESS_S = 0.1
"""So long after the last frame an empty one proves it (protocol.md 9)."""
TICK_MS_MIN = 10
"""Between ticks, whatever the state machine says."""
TICK_MS_MAX = 60_000
"""One entry counts at most a minute, so while something is pending there is one each minute."""
SLOWED_S = 0.5
"""While a peer that is far behind slows the log down there is a batch so often, of as much as may be written in that time."""
SNAPSHOT_BYTES_MIN = 8 << 20
"""A small state is written down after so many bytes of entries, so that a start has few to apply again."""
DISPUTED = "the voters' states differ and none has a majority; see `mesh cluster status`"


@dataclass(frozen=True, slots=True)
class Capture:
    """A state to be written down: packing and writing may take their time in a thread."""

    index: int
    term: int
    voters: tuple[VoterId, ...]
    pack: Callable[[], bytes]


class Server:
    def __init__(
        self,
        *,
        node: NodeId,
        journal: Journal,
        image: Image | None,
        machine: StateMachine,
        links: Links,
        servers: Callable[[], Sequence[NodeId]],
        draining: Callable[[], Collection[NodeId]],
        zones: Callable[[], Mapping[NodeId, str]],
        settings: RaftSettings,
        clocks: Clocks,
        random: Random,
        packed: Callable[[], Packed | None],
        report: Report,
        after_doubt: Callable[[], bytes] | None = None,
        adds_work: Callable[[bytes], bool] = lambda command: False,
        lacks_history: Callable[[VoterId], bool] = lambda voter: False,
    ) -> None:
        """`image` is the newest snapshot, already the machine's state; `packed` gives it as bytes to send, or None while it is fetched.

        `after_doubt` makes the command with which a sole voter goes on although its last frame may be lost.
        """
        self._journal = journal
        self._machine = machine
        self._links = links
        self._settings = settings
        self._clocks = clocks
        self._now = self.now_s = clocks.now_s
        self.report = report
        self.engine = Engine(
            me=voter_id(node, journal.header.incarnation),
            voters=journal.header.founding if image is None else image.voters,
            journal=journal,
            apply=self._apply,
            digest=machine.digest,
            send=links.send,
            snapshot=packed,
            now=clocks.now_s,
            wall_ms=clocks.wall_ms,
            random=random,
            settings=settings,
            on_bug=lambda index, error: report("raft.bug", {"index": index, "error": repr(error)}),
            servers=servers,
        )
        self._node = node
        self._after_doubt = after_doubt
        self._was_in_doubt = False
        self.went_on_alone = False
        """A sole voter, although its last frame may be lost."""
        self.fullness = Fullness(self.engine, settings.disk_free_min, adds_work)
        self.reads = Reads(first_request(journal.header.start))
        self.own_clock = OwnClock()
        self.steering = Steering(
            self.engine, links, self.fullness, servers=servers, draining=draining, zones=zones,
            lacks_history=lacks_history, now=clocks.now_s, report=report,
        )  # fmt: skip
        self._pending = Pending()
        self._forwarded = Forwarded(first_request(journal.header.start))
        self._batch_at = (0, 0)
        self._batched_s, self._batched_bytes = float("-inf"), 0
        self._written_s = float("-inf")
        self._saved_index = self.engine.applied
        self._bytes_since_saved = 0
        self._snapshot_size = 0
        """Of the newest one that was written or installed here; 0: not known since the start."""
        self._disputed = 0

    # --- a turn -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Raises Corrupt when this server must stop."""
        self.engine.check_contact()
        self._read_mail()
        if not self.engine.is_leader:
            self._pending.refuse_all("this server does not lead any more")
        elif self.engine.disputed:
            self._pending.refuse_all(DISPUTED)
        if self._disputed != self.engine.disputed:
            self._disputed = self.engine.disputed
            self.report("raft.states_differ" if self._disputed else "raft.states_agree", {"index": self._disputed})
        self.steering.steer()
        self._trim()
        self._serve_reads()
        self._propose_batch()
        self._tell_doubt()
        self.engine.doTick(0.0)

    @property
    def wants_look_at_disk(self) -> bool:
        return self._now() >= self.fullness.next_look_s()

    def looked_at_disk(self, room: Room) -> None:
        if change := self.fullness.looked(room, self._now()):
            self.report("raft.disk_full" if self.fullness.is_full else "raft.disk_has_room", {"why": change})

    @property
    def may_send_early(self) -> bool:
        return self.engine.is_leader and not self._journal.is_vote_staged

    @property
    def wants_sync(self) -> bool:
        is_witness_due = self.engine.awaits_witness or self._now() >= self._written_s + WITNESS_S
        return self._journal.is_dirty or (self._journal.wants_witness and is_witness_due)

    def synced(self) -> None:
        self._written_s = self._now()

    def finish(self) -> None:
        self.engine.synced()

    @property
    def has_work(self) -> bool:
        """Another turn is due at once."""
        engine = self.engine
        has_batch = bool(self._pending) or (engine.is_leader and engine.is_in_doubt)
        return engine.has_more_to_apply or engine.awaits_witness or (has_batch and self._may_batch())

    def next_due_s(self) -> float | None:
        """When a turn is due although nothing happens."""
        due = [self.engine.next_deadline(), self._tick_due_s()]
        if self.engine.is_leader:
            due.append(self.steering.next_due_s())
        if self._pending and (free_s := self._may_batch_s()) > self._now():
            due.append(free_s)
        if self._journal.wants_witness:
            due.append(self._written_s + WITNESS_S)
        if self.fullness.is_full:
            due.append(self.fullness.next_look_s())
        return min((at for at in due if at is not None), default=None)

    def stop(self) -> None:
        """Everybody who waits for an answer gets the one that is left."""
        self._pending.refuse_all("this server stops")
        self._forwarded.lost(None)
        self.engine.stop()

    # --- mail ---------------------------------------------------------------------------------------------------------

    def _read_mail(self) -> None:
        until = self._now() + MAIL_SLICE_S
        while (incident := self._links.take()) is not None:
            match incident:
                case Up(peer):
                    self.engine.peer_up(peer)
                case Down(peer):
                    self.engine.peer_down(peer)
                    self._forwarded.lost(peer)
                    self.reads.lost(peer)
                case Mail(peer, message):
                    self.steering.tell_heard(peer)
                    try:
                        self._read(peer, message)
                    except Corrupt:
                        raise
                    except MeshError as error:
                        self.report("raft.bad_message", {"peer": peer, "why": str(error)})
                case _:
                    assert_never(incident)
            if self._now() >= until:
                break

    def _read(self, peer: VoterId, message: AnyMessage) -> None:
        match message:
            case Propose(request, _, command) if not is_readable(command):
                self._answer_proposal(peer, request, NotCommitted("malformed command"))
            case Propose(request, origin, command):
                self._admit(Proposal(origin, command, lambda result: self._answer_proposal(peer, request, result)))
            case Proposed():
                self._forwarded.answered(peer, message)
            case Read(request):
                self.engine.barrier(lambda position: self._answer_read(peer, request, position))
            case ReadAt(request, position):
                self.reads.answered(peer, request, position)
            case Heard(voter):
                self.steering.on_heard(peer, voter)
            case SeatTaken(voter):
                self.steering.on_seat_taken(peer, voter)
            case _:
                self.engine.receive(peer, message)

    # --- batches ------------------------------------------------------------------------------------------------------

    def submit(self, origin: NodeId, command: bytes, resolve: Resolve) -> Proposal | None:
        """Queued here or sent to the leader; None when nobody is known to lead. `resolve` may be called at once.

        The command `is_readable`.
        """
        leader = self.engine.leader
        if leader is None:
            return None
        proposal = Proposal(origin, command, resolve)
        if leader == self.engine.me:
            self._admit(proposal)
            return proposal
        request = self._forwarded.add(leader, proposal)
        if self._links.send(leader, Propose(request, origin, command)):
            proposal.is_batched = True  # from here on only the leader knows
        else:
            self._forwarded.forget(request)
            proposal.end(NotCommitted(f"the leader {leader} cannot be reached"))
        return proposal

    def forget(self, proposal: Proposal) -> None:
        """Nobody waits for it any more; if it is still queued it will not be written."""
        proposal.is_over = True
        self._forwarded.forget_proposal(proposal)

    def _admit(self, proposal: Proposal) -> None:
        if not self.engine.is_leader:
            proposal.end(NotCommitted("this server does not lead"))
        elif (refusal := self.fullness.refusal(proposal.command)) is not None:
            proposal.end(refusal)
        elif not self._pending.add(proposal):
            proposal.end(NotCommitted("the leader's queue is full"))

    def _answer_proposal(self, peer: VoterId, request: int, result: ProposeResult) -> None:
        self._links.send(peer, as_message(request, result))

    def _may_batch(self) -> bool:
        """One batch at a time: what arrives meanwhile makes the next one larger."""
        term, index = self._batch_at
        is_free = term != self.engine.term or self.engine.applied >= index
        has_room = self.engine.has_room_for(min(self._pending.bytes, BATCH_BYTES_MAX))
        return self.engine.is_settled() and is_free and has_room and self._now() >= self._may_batch_s()

    def _may_batch_s(self) -> float:
        """When the next batch may be written, if nothing else is in its way."""
        pause_s = min(SLOWED_S, self._batched_bytes / self.engine.write_rate())
        return max(self.steering.paused_until_s, self._batched_s + pause_s)

    def _propose_batch(self) -> None:
        """What arrived while the last batch was being committed; or a tick, when something timed is due."""
        if not self._may_batch():
            return
        batch = self._pending.take_batch(int(min(BATCH_BYTES_MAX, SLOWED_S * self.engine.write_rate())))
        if goes_on_alone := self.engine.is_in_doubt:
            # Only a sole voter leads in doubt, and its first entry ends that: both are in one frame (protocol.md 9).
            self._journal.end_doubt()
            self.went_on_alone = True
            if self._after_doubt is not None:
                batch.insert(0, Proposal(self._node, self._after_doubt(), lambda result: None))
        tick_s = self._tick_due_s()
        if not (batch or goes_on_alone) and (tick_s is None or tick_s > self._now()):
            return
        now_s = self._now()
        now_ms = int(now_s * 1000)
        elapsed_ms = max(0, now_ms - int(self.engine.received_s * 1000))
        entry = Batch(elapsed_ms, self._stamp_wall(now_ms, elapsed_ms), stamped(batch))
        self._batch_at = (self.engine.term, self.engine.last + 1)
        self._batched_s, self._batched_bytes = now_s, sum(len(proposal.command) for proposal in batch)
        self.engine.propose(codec.encode(entry), resolver(batch))
        # What it took to write this one belongs to the next one's time.
        self.engine.received_s = now_s

    def _tell_doubt(self) -> None:
        if self._was_in_doubt != (is_in_doubt := self.engine.is_in_doubt):
            self._was_in_doubt = is_in_doubt
            self.report("raft.in_doubt" if is_in_doubt else "raft.in_doubt_no_more", {"why": self._journal.doubt})

    def _tick_due_s(self) -> float | None:
        """When an empty batch is due; None while nothing timed is pending, or a batch is on its way."""
        if not self._may_batch() or (timer_ms := self._machine.next_timer_ms()) is None:
            return None
        return self.engine.received_s + min(max(timer_ms, TICK_MS_MIN), TICK_MS_MAX) / 1000

    def _stamp_wall(self, now_ms: int, elapsed_ms: int) -> int:
        engine, state_ms, own_ms = self.engine, self._machine.wall_ms, self._clocks.wall_ms()
        expected_ms = state_ms + elapsed_ms
        if engine.voters == (engine.me,):
            was_refused = self.own_clock.is_refused
            stamp_ms = self.own_clock.wall_ms(
                now_ms=now_ms,
                own_ms=own_ms,
                expected_ms=expected_ms,
                is_founding=state_ms == 0,
                is_synchronised=self._clocks.is_synchronised(),
            )
            if self.own_clock.is_refused and not was_refused:
                self.report("raft.clock_refused", {"ahead_s": (own_ms - expected_ms) // 1000})
            return max(state_ms, stamp_ms)
        offsets = [
            progress.clock_offset_ms
            for peer, progress in engine.progress.items()
            if peer in engine.voters and progress.clock_offset_ms is not None
        ]
        agreed_ms = agreed_wall_ms(now_ms, [own_ms - now_ms, *offsets], len(engine.voters))
        return expected_ms if agreed_ms is None else max(expected_ms, agreed_ms)

    def clock_ahead_ms(self) -> int:
        """The mesh's time, had an entry been written now, less this server's clock."""
        elapsed_ms = int((self._now() - self.engine.received_s) * 1000)
        return self._machine.wall_ms + max(0, elapsed_ms) - self._clocks.wall_ms()

    def _apply(self, index: int, batch: bytes) -> list[bytes]:
        self._bytes_since_saved += len(batch)
        return self._machine.apply(index, batch)

    # --- reads --------------------------------------------------------------------------------------------------------

    def _serve_reads(self) -> None:
        """One round, or one question to the leader, for all that asked since the last turn."""
        if not self.reads.has_new:
            return
        leader = self.engine.leader
        if leader is None or leader == self.engine.me:
            self.engine.barrier(self.reads.begin())
            return
        request = self.reads.begin_remote(leader)
        if not self._links.send(leader, Read(request)):
            self.reads.answered(leader, request, 0)

    def _answer_read(self, peer: VoterId, request: int, position: int | None) -> None:
        self._links.send(peer, ReadAt(request, position or 0))

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def capture(self) -> Capture | None:
        """The state, when enough was applied since it was last written down."""
        index = self.engine.applied
        is_due = (
            index - self._saved_index >= self._settings.snapshot_entries
            or self._bytes_since_saved >= self._snapshot_bytes
        )
        if not is_due or index == self._saved_index:
            return None
        self._bytes_since_saved = 0
        return Capture(index, self.engine.term_at(index), self.engine.voters_at(index), self._machine.capture())

    def write_down_again(self) -> None:
        """The newest snapshot is not to be used: another is due now."""
        self._saved_index = 0
        self._bytes_since_saved = self._settings.snapshot_bytes

    @property
    def _snapshot_bytes(self) -> int:
        """As much of the log as the state is large: writing it down costs no more than the log did."""
        return min(max(self._snapshot_size, SNAPSHOT_BYTES_MIN), self._settings.snapshot_bytes)

    def saved(self, index: int, size: int = 0) -> None:
        """A snapshot of so many bytes at `index` is durable."""
        self._snapshot_size = size
        self._saved_index = max(self._saved_index, index)
        self._trim()

    def _trim(self) -> None:
        """What is saved goes, but for what a peer needs; also later, when none does any more."""
        if self._saved_index - self._settings.retain_entries > self.engine.first:
            self.engine.compact(self._saved_index)

    def install(self, image: Image, restore: Callable[[], None]) -> None:
        """A leader's snapshot is verified and durable here; `restore` is what the machine unpacked it to."""
        self.engine.install(image, restore)
        self._saved_index = max(self._saved_index, image.index)
        self._snapshot_size = len(image.state)
        self._bytes_since_saved = 0
