"""Raft: PySyncObj 0.3.17 as a library, with everything replaced that was seen to lose or double a command.

Stock keeps what is sound: the log and its helpers, term, vote and state, the replicated
call and its table of waiting callbacks. Messages, elections, commitment and sending are
ours. The holes F1 … F20 that stock has, and where each is closed:

    F1  a follower cut its log on every message         _merge: only at a true conflict; below the commit: stop
    F2  it committed what nobody had verified           _on_append: bounded by the last verified entry
    F3  one step back for each round trip               _merge: answers commit + 1 at once
    F4  answers of an older term counted                _on_appended: by term; newer ones depose
    F5  resend storms                                   progress.py: probe, window, resend after a silence
    F6  an exception stopped applying for ever          _SyncObj__applyLogEntries: total, the index always moves
    F7  … and so did one in a caller's callback         _resolve
    F8  a paused process campaigned on waking           _follow: reads its mail first, once
    F9  anybody could forge terms, votes, entries       receive: each kind of message by who may send it
    F10 no pre-vote                                     _ask_trial, _on_vote: a term rises only when a majority would vote
    F11 a snapshot erased the log behind it             install, journal.entries_after: a tail that agrees is kept
    F12 a snapshot's message committed unseen entries   install: up to its own index only, never backwards
    F13 callbacks swallowed by a snapshot never came    install: answered as unknown
    F14 an unreadable snapshot was skipped              snapshot.load: stops
    F15 two membership changes at once                  change_voters: one, after an own committed entry
    F16 two votes of one node counted twice             _on_voted: a set of voters
    F17 a cut-off leader went on for 30 s               check_contact: 1 s
    F18 method ids by position                          one replicated method, bytes in
    F19 forwarded commands were lost with a link        not used: log.py forwards, with timeouts
    F20 a full pipe raised although it had queued       _applyCommand: appended at once, no queue

The engine neither waits nor does I/O: it stages messages and journal records, and its
owner (log.py, or a simulator) syncs the journal before any message leaves. Roles are our
own switch: who is not in its own configuration follows, answers votes, and never asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from pysyncobj import SyncObj, SyncObjConf, replicated, serializer, syncobj
from pysyncobj.node import Node
from pysyncobj.transport import Transport as StockTransport

from meshd import codec
from meshd.errors import Corrupt, PeerFault
from meshd.raft.journal import Journal
from meshd.raft.messages import (
    SNAPSHOT_BYTES_MAX,
    Append,
    Appended,
    Chunk,
    Entry,
    RaftMessage,
    Received,
    TimeoutNow,
    Vote,
    Voted,
    VoterId,
)
from meshd.raft.progress import CHUNK_BYTES, CHUNKS_AHEAD, Progress, Transfer
from meshd.raft.snapshot import Image, Packed

assert syncobj.VERSION == "0.3.17", "the private names below are those of 0.3.17"

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2
_REPLICATED, _NO_OP, _MEMBERSHIP = b"\x00", b"\x01", b"\x02"

LATE_S = 0.25
"""A turn so long after its deadline means that this process stood still: it reads its mail before it judges."""

APPEND_BYTES_MAX = 256 << 10
"""Entries in one message, unless a single one is larger."""

APPEND_ENTRIES_MAX = 512

VOTERS_MAX = 9
"""A configuration with more is refused; the autopilot stops at five."""


class _Msgpack:
    """In place of pickle: commands come from disk and from peers."""

    dumps = staticmethod(codec.pack)
    loads = staticmethod(codec.unpack)


syncobj.pickle = _Msgpack
serializer.pickle = _Msgpack
# The constructor asks this module-level function for its journal; ours is passed in place of the file's name.
syncobj.createJournal = lambda journal: journal


@dataclass(frozen=True, slots=True)
class RaftSettings:
    """Seconds. Elections well above what a loaded loop stalls for; heartbeats four to the shortest of them."""

    election_min_s: float = 0.8
    election_max_s: float = 1.6
    heartbeat_s: float = 0.15
    contact_s: float = 1.0
    apply_slice_s: float = 0.008
    """Applying stops after so long and goes on in the next turn."""
    snapshot_entries: int = 20_000
    """Applied entries after which the state is written down and the log trimmed …"""
    snapshot_bytes: int = 64 << 20
    """… or bytes of them, whichever comes first."""
    retain_entries: int = 1_000
    """Kept behind a snapshot, so that a peer that blinked needs no snapshot."""


@dataclass(slots=True)
class _Incoming:
    """A snapshot that arrives."""

    index: int
    term: int
    size: int
    digest: bytes
    data: bytearray


@dataclass(frozen=True, slots=True)
class Arrived:
    """A whole snapshot, not yet verified: the owner verifies it, writes it, and calls `install`."""

    peer: VoterId
    data: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Barrier:
    round: int
    position: int
    answer: Callable[[int | None], None]


class ApplyFailed(Exception):
    """`apply` raised: a bug in the state machine. The entry stands; its answers are unknown."""


class _NoTransport(StockTransport):  # type: ignore[misc]
    """Stock demands one; messages go through the engine's own `send`."""

    def __init__(self) -> None:
        super().__init__(None, None, None)

    def send(self, node: Node, message: Any) -> bool:
        raise AssertionError("stock sends nothing here")


def _stock(name: str) -> Any:
    """One of PySyncObj's private attributes, under a readable name."""
    # Stock's constructor looks at every attribute of the object, also before it has set this one.
    return property(lambda self: self.__dict__.get(name), lambda self, value: self.__dict__.__setitem__(name, value))


class Engine(SyncObj):  # type: ignore[misc]
    """One server's Raft. Call `check_contact`, then `receive` all mail, then `doTick(0)`; sync; `synced`; send."""

    _state = _stock("_SyncObj__raftState")
    _term = _stock("_SyncObj__raftCurrentTerm")
    _voted_for = _stock("_SyncObj__votedForNodeId")
    _leader = _stock("_SyncObj__raftLeader")
    _log = _stock("_SyncObj__raftLog")
    _commit = _stock("_SyncObj__raftCommitIndex")
    _applied = _stock("_SyncObj__raftLastApplied")
    _waiting = _stock("_SyncObj__commandsWaitingCommit")
    _deadline = _stock("_SyncObj__raftElectionDeadline")
    _heartbeat_at = _stock("_SyncObj__newAppendEntriesTime")
    _own_first = _stock("_SyncObj__noopIDx")

    def __init__(
        self,
        *,
        me: VoterId,
        voters: Sequence[VoterId],
        journal: Journal,
        apply: Callable[[int, bytes], list[bytes]],
        send: Callable[[VoterId, RaftMessage], bool],
        snapshot: Callable[[], Packed | None],
        now: Callable[[], float],
        wall_ms: Callable[[], int],
        random: Random,
        settings: RaftSettings,
        on_bug: Callable[[int, BaseException], None],
    ) -> None:
        """`voters` is the configuration at the journal's first item; `snapshot` gives one to send, or None while it is fetched.

        `send` stages a message, or refuses it; `now` is CLOCK_BOOTTIME in seconds.
        """
        self.me = me
        self._settings = settings
        self._now = now
        self._wall_ms = wall_ms
        self._random = random
        self._send = send
        self._snapshot = snapshot
        self._apply = apply
        self._on_bug = on_bug
        self._connected: set[VoterId] = set()
        self._learners: frozenset[VoterId] = frozenset()
        self._owed: dict[VoterId, int] = {}
        """Who does not vote any more and must still learn it, from the entry at this index."""
        self._progress: dict[VoterId, Progress] = {}
        self._votes: set[VoterId] = set()
        self._trial_term = 0
        self._heard_s = float("-inf")
        self._was_late = False
        self._elected_s = 0.0
        self._round = 0
        self._barriers_new: list[Callable[[int | None], None]] = []
        self._barriers: list[_Barrier] = []
        self._incoming: _Incoming | None = None
        self.arrived: Arrived | None = None
        self.received_s = now()
        """When the last entry of the log was received, read at the start, or written here as a batch."""
        base = journal[0][1]
        self._configurations: list[tuple[int, tuple[VoterId, ...]]] = [(base, tuple(voters))]
        conf = SyncObjConf(autoTick=False, journalFile=journal, dynamicMembershipChange=True)
        super().__init__(Node(me), [], conf, nodeClass=Node, transport=_NoTransport())
        self._applied = self._commit = base
        for entry in journal[1:]:
            self._note_configuration(entry)
        self._reconfigure()
        # A sole voter needs nobody's vote, so it need not wait for anybody to lead.
        self._deadline = now() if self.voters == (me,) else now() + self._election_timeout()

    # --- what the owner asks ------------------------------------------------------------------------------------------

    @property
    def term(self) -> int:
        return int(self._term)

    @property
    def leader(self) -> VoterId | None:
        return None if self._leader is None else VoterId(self._leader.id)

    @property
    def is_leader(self) -> bool:
        return bool(self._state == LEADER)

    @property
    def voters(self) -> tuple[VoterId, ...]:
        """The newest configuration, committed or not."""
        return self._configurations[-1][1]

    @property
    def is_voter(self) -> bool:
        return self.me in self.voters

    @property
    def commit(self) -> int:
        return int(self._commit)

    @property
    def applied(self) -> int:
        return int(self._applied)

    @property
    def first(self) -> int:
        """The index that a snapshot covers; the log goes on after it."""
        return int(self._log[0][1])

    @property
    def last(self) -> int:
        return int(self._log[-1][1])

    @property
    def progress(self) -> dict[VoterId, Progress]:
        """Of each peer that this leader feeds; empty elsewhere."""
        return self._progress

    @property
    def has_more_to_apply(self) -> bool:
        return bool(self._applied < self._commit)

    def in_contact(self) -> bool:
        """A quorum has answered a round that was sent less than a second ago in this term."""
        return self.is_leader and self._now() - self._contact_s() < self._settings.contact_s

    def leads(self) -> bool:
        """In contact, and the own first entry of this term is applied: what is read here now is not stale."""
        return self.in_contact() and self._applied >= self._own_first

    @property
    def leading_s(self) -> float:
        """Since its election; 0 elsewhere."""
        return self._now() - self._elected_s if self.is_leader else 0.0

    def is_settled(self) -> bool:
        """Leader, and everything of earlier leaders is applied: batches may be stamped."""
        return bool(self.is_leader and self._applied >= self._own_first)

    def next_deadline(self) -> float | None:
        """When a turn is due although nothing arrives; None: never."""
        if self.is_leader:
            return float(self._heartbeat_at) if self._progress else None
        return float(self._deadline) if self.is_voter else None

    def voters_at(self, index: int) -> tuple[VoterId, ...]:
        return next(voters for at, voters in reversed(self._configurations) if at <= index)

    def term_at(self, index: int) -> int:
        return int(self._log[index - self.first][2])

    def propose(self, payload: bytes, answer: Callable[[list[bytes] | None, int, str], None]) -> None:
        """Append one batch. `answer(answers, index, "")`, or (None, 0, why): certainly not in the log.

        It may never be called; and (None, index, why) means that nobody knows.
        """
        assert self.is_leader
        index = self.last + 1

        def resolved(result: Any, failure: int) -> None:
            if failure == syncobj.FAIL_REASON.SUCCESS and not isinstance(result, ApplyFailed):
                answer(result, index, "")
            elif failure == syncobj.FAIL_REASON.DISCARDED:
                answer(None, 0, "another leader's entry took its place")
            else:
                answer(
                    None, index, "the state machine failed" if result is not None else "its outcome was not seen here"
                )

        self.apply_batch(payload, callback=resolved)

    def barrier(self, answer: Callable[[int | None], None]) -> None:
        """`answer(position)` once a round sent after this call is answered; None when leadership is lost first."""
        if self.is_settled():
            self._barriers_new.append(answer)
        else:
            answer(None)

    def may_change_voters(self) -> bool:
        """F15: the own first entry of the term, and every earlier change, must be committed."""
        return bool(self.is_leader and self._commit >= self._own_first and self._configurations[-1][0] <= self._commit)

    def change_voters(self, voters: Sequence[VoterId]) -> None:
        """Append a configuration that differs from the present one by one server."""
        voters = tuple(sorted(voters))
        assert self.may_change_voters() and len(set(voters) ^ set(self.voters)) == 1 and 1 <= len(voters) <= VOTERS_MAX
        for voter in set(self.voters) - set(voters) - {self.me}:
            self._owed[voter] = self.last + 1
        self._append(_MEMBERSHIP + codec.pack(voters))

    def set_learners(self, learners: Sequence[VoterId]) -> None:
        """Whom to feed beyond the voters; not counted."""
        if self._learners != (wanted := frozenset(learners)):
            self._learners = wanted
            self._reconfigure()

    def transfer_to(self, voter: VoterId) -> bool:
        """Ask a voter that has everything to take over at once."""
        progress = self._progress.get(voter)
        if not self.is_leader or voter not in self.voters or progress is None or progress.match != self.last:
            return False
        return self._send(voter, TimeoutNow(self._term))

    # --- turns --------------------------------------------------------------------------------------------------------

    def check_contact(self) -> None:
        """F17: before mail is read, so that a leader that was paused does not believe old answers."""
        if self.is_leader:
            since = max(self._elected_s, self._contact_s())
            if self._now() - since >= self._settings.contact_s:
                self._step_down(None)

    def receive(self, peer: VoterId, message: RaftMessage) -> None:
        """One message of an authenticated server. Raises PeerFault when it breaks the rules, Corrupt when logs disagree."""
        match message:
            case Append():
                self._on_append(peer, message)
            case Appended():
                self._on_appended(peer, message)
            case Vote():
                self._on_vote(peer, message)
            case Voted():
                self._on_voted(peer, message)
            case Chunk():
                self._on_chunk(peer, message)
            case Received():
                self._on_received(peer, message)
            case TimeoutNow():
                if self.leader == peer and message.term == self._term and self.is_voter and not self.is_leader:
                    self._campaign()

    def peer_up(self, peer: VoterId) -> None:
        self._connected.add(peer)
        if (progress := self._progress.get(peer)) is not None:
            progress.is_connected = True
            progress.restart(progress.match + 1 if progress.match else self.last + 1)

    def peer_down(self, peer: VoterId) -> None:
        self._connected.discard(peer)
        if (progress := self._progress.get(peer)) is not None:
            progress.is_connected = False

    def synced(self) -> None:
        """The journal is durable: only now does the leader count itself."""
        if self.is_leader:
            self._advance_commit()
            self._SyncObj__applyLogEntries()
        if self.is_leader:
            self._SyncObj__sendAppendEntries()  # followers learn of the commit at once

    def _onTick(self, timeToWait: float = 0.0) -> None:
        if self.is_leader:
            self._advance_commit()
        else:
            self._follow()
        self._SyncObj__applyLogEntries()
        if self.is_leader:
            self._SyncObj__sendAppendEntries()

    def stop(self) -> None:
        """Nobody will turn this engine again: what is in the log may yet be committed by others."""
        self._step_down(None)
        for index in list(self._waiting):
            for _, callback in self._waiting.pop(index):
                self._resolve(callback, None, syncobj.FAIL_REASON.UNKNOWN_OUTCOME)

    # --- elections ----------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        now = self._now()
        if not self.is_voter or now < self._deadline:
            return
        if now - self._deadline > LATE_S and not self._was_late:
            self._was_late = True
            self._deadline = now + self._election_timeout()
            return
        self._ask_trial()

    def _ask_trial(self) -> None:
        """Would a majority vote for us? Nothing changes until it would; the term least of all."""
        self._deadline = self._now() + self._election_timeout()
        self._SyncObj__setState(FOLLOWER)
        self._leader = None
        self._trial_term = self._term + 1
        self._votes = {self.me}
        self._ask_votes(self._trial_term, is_trial=True)
        if self._is_quorum(self._votes):
            self._campaign()

    def _campaign(self) -> None:
        self._deadline = self._now() + self._election_timeout()
        self._leader = None
        self._SyncObj__setState(CANDIDATE)
        self._SyncObj__setCurrentTerm(self._term + 1, self.me)
        self._trial_term = 0
        self._votes = {self.me}
        self._ask_votes(self._term, is_trial=False)
        if self._is_quorum(self._votes):
            self._SyncObj__onBecomeLeader()

    def _ask_votes(self, term: int, *, is_trial: bool) -> None:
        question = Vote(term, self.last, self._log[-1][2], is_trial)
        for voter in self.voters:
            if voter != self.me:
                self._send(voter, question)

    def _on_vote(self, peer: VoterId, m: Vote) -> None:
        """Any server may ask and is answered: the candidate's configuration decides whether it counts."""
        is_newer = (m.last_term, m.last_index) >= (self._log[-1][2], self.last)
        if m.is_trial:
            has_leader = (
                self.in_contact() if self.is_leader else self._now() - self._heard_s < self._settings.election_min_s
            )
            self._send(peer, Voted(self._term, m.term, is_newer and m.term > self._term and not has_leader, True))
            if self.is_leader and peer not in self._progress:
                self._owed[peer] = self._configurations[-1][0]  # it was away when it was removed
                self._reconfigure()
            return
        if m.term > self._term:
            self._adopt_term(m.term)
        is_granted = (
            m.term == self._term
            and is_newer
            and not self.is_leader
            and (self._voted_for == peer or self._voted_for is None)
        )
        if is_granted:
            self._SyncObj__setCurrentTerm(self._term, peer)
            self._deadline = self._now() + self._election_timeout()
        self._send(peer, Voted(self._term, m.term, is_granted, False))

    def _on_voted(self, peer: VoterId, m: Voted) -> None:
        if peer not in self.voters:
            return
        if m.term > self._term:
            self._adopt_term(m.term)
        elif m.is_granted and m.is_trial and self._state == FOLLOWER and m.asked == self._trial_term == self._term + 1:
            self._votes.add(peer)
            if self._is_quorum(self._votes):
                self._campaign()
        elif m.is_granted and not m.is_trial and self._state == CANDIDATE and m.asked == self._term:
            self._votes.add(peer)
            if self._is_quorum(self._votes):
                self._SyncObj__onBecomeLeader()

    def _SyncObj__onBecomeLeader(self) -> None:
        now = self._now()
        self._SyncObj__setState(LEADER)
        self._leader = Node(self.me)
        self._elected_s = now
        self._round = 0
        self._progress = {}
        self._reconfigure()
        self._own_first = self._append(_NO_OP)
        self._heartbeat_at = now

    def _step_down(self, leader: VoterId | None) -> None:
        """Stop leading or asking. Batches in the log stay there: they may yet be committed, so nobody is answered."""
        self._SyncObj__setState(FOLLOWER)
        self._leader = None if leader is None else Node(leader)
        self._trial_term = 0
        self._progress = {}
        self._owed = {}
        self._deadline = self._now() + self._election_timeout()
        waiting = [barrier.answer for barrier in self._barriers] + self._barriers_new
        self._barriers, self._barriers_new = [], []
        for answer in waiting:
            answer(None)

    def _adopt_term(self, term: int) -> None:
        self._SyncObj__setCurrentTerm(term, None)
        self._step_down(None)

    def _is_quorum(self, servers: set[VoterId]) -> bool:
        return sum(voter in servers for voter in self.voters) > len(self.voters) // 2

    def _contact_s(self) -> float:
        """When the newest round was sent that a quorum has answered; a leader answers its own at once."""
        sent = sorted((self._now() if v == self.me else self._contact_of(v) for v in self.voters), reverse=True)
        return sent[len(self.voters) // 2]

    def _contact_of(self, voter: VoterId) -> float:
        progress = self._progress.get(voter)
        return float("-inf") if progress is None else progress.contact_s

    def _election_timeout(self) -> float:
        return self._random.uniform(self._settings.election_min_s, self._settings.election_max_s)

    def _SyncObj__generateRaftTimeout(self) -> float:
        return self._election_timeout()  # stock's constructor asks before anything else does

    # --- following ----------------------------------------------------------------------------------------------------

    def _hear(self, peer: VoterId, term: int) -> None:
        """A leader of this or a newer term speaks. It may be unknown to our old configuration, so it need not be in it."""
        if term == self._term and self.is_leader:
            raise Corrupt(f"two leaders in term {term}: {peer} and this server")
        if term > self._term:
            self._SyncObj__setCurrentTerm(term, None)
        if self._state != FOLLOWER or self.leader != peer:
            self._step_down(peer)
        self._was_late = False
        self._heard_s = self._now()
        self._deadline = self._heard_s + self._election_timeout()

    def _on_append(self, peer: VoterId, m: Append) -> None:
        if any(e[1] != m.prev_index + k or not m.prev_term <= e[2] <= m.term for k, e in enumerate(m.entries, 1)):
            raise PeerFault(f"{peer} sent entries out of order after {m.prev_index}")
        if m.term < self._term:
            self._send(peer, Appended(self._term, m.round, m.sent_ms, False, 0))
            return
        self._hear(peer, m.term)
        is_ok, next_index = self._merge(peer, m) if m.prev_index else (False, 0)
        if is_ok:
            # F2: entries behind those of this message may be ours alone.
            self._commit = max(self._commit, min(m.commit, next_index - 1))
        self._send(peer, Appended(self._term, m.round, m.sent_ms, is_ok, next_index, self._wall_ms()))

    def _merge(self, peer: VoterId, m: Append) -> tuple[bool, int]:
        """(whether our log now agrees with this message, the next entry to send)."""
        log, first = self._log, self.first
        prev_index, prev_term, entries = m.prev_index, m.prev_term, m.entries
        if prev_index < first:
            # What a snapshot covers is committed, so it is the leader's own.
            covered = first - prev_index
            if len(entries) < covered:
                return False, self._commit + 1
            prev_index, prev_term, entries = first, entries[covered - 1][2], entries[covered:]
        if prev_index > self.last:
            return False, self.last + 1
        if log[prev_index - first][2] != prev_term:
            if prev_index <= self._commit:
                raise Corrupt(f"{peer} contradicts entry {prev_index}, which is committed here")
            return False, self._commit + 1
        agreed = 0
        for _, index, term in entries:
            if index > self.last or log[index - first][2] != term:
                break
            agreed += 1
        fresh = entries[agreed:]
        if fresh and fresh[0][1] <= self.last:
            if fresh[0][1] <= self._commit:
                raise Corrupt(f"{peer} contradicts entry {fresh[0][1]}, which is committed here")
            self._truncate(fresh[0][1])
        for entry in fresh:
            log.add(*entry)
            self._note_configuration(entry)
        if fresh:
            self.received_s = self._now()
            self._reconfigure()
        return True, prev_index + len(entries) + 1

    def _truncate(self, index: int) -> None:
        self._SyncObj__deleteEntriesFrom(index)
        while self._configurations[-1][0] >= index:
            self._configurations.pop()
        self._reconfigure()

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def _on_chunk(self, peer: VoterId, m: Chunk) -> None:
        if m.offset + len(m.data) > m.size or len(m.data) > CHUNK_BYTES:
            raise PeerFault(f"{peer} sent a range outside of its snapshot")
        if m.term < self._term:
            self._send(peer, Appended(self._term, m.round, m.sent_ms, False, 0))
            return
        self._hear(peer, m.term)
        if m.index <= self._commit:
            self._send(peer, Appended(self._term, m.round, m.sent_ms, True, m.index + 1, self._wall_ms()))
            return
        incoming = self._incoming
        if incoming is None or (incoming.index, incoming.digest) != (m.index, m.digest):
            if self.arrived is None:
                incoming = self._incoming = _Incoming(m.index, m.snapshot_term, m.size, m.digest, bytearray())
            else:
                incoming = None  # one that is being verified comes first; this one is asked for again
        has = 0
        if incoming is not None:
            if m.offset == len(incoming.data) < incoming.size:
                incoming.data += m.data
                if len(incoming.data) == incoming.size:
                    self.arrived = Arrived(peer, bytes(incoming.data), incoming.digest)
            has = len(incoming.data)
        self._send(peer, Received(self._term, m.round, m.sent_ms, m.index, has))

    def install(self, image: Image, restore: Callable[[bytes], None]) -> None:
        """A snapshot that is verified and durable here takes the place of what it covers."""
        self._incoming = None
        peer = self.arrived.peer if self.arrived is not None else None
        self.arrived = None
        if image.index > self._commit:
            is_prefix = image.index <= self.last and self.term_at(image.index) == image.term
            if is_prefix:
                self._SyncObj__deleteEntriesTo(image.index)
            else:
                self._log.reset(image.index, image.term)
            self._configurations = [(image.index, image.voters)]
            for entry in self._log[1:]:
                self._note_configuration(entry)
            self._commit = self._applied = image.index
            restore(image.state)
            self.received_s = self._now()
            self._reconfigure()
            for index in [index for index in self._waiting if index <= image.index]:
                for _, callback in self._waiting.pop(index):
                    self._resolve(callback, None, syncobj.FAIL_REASON.UNKNOWN_OUTCOME)
        if peer is not None and peer == self.leader:
            self._send(peer, Appended(self._term, 0, 0, True, image.index + 1, self._wall_ms()))

    def discard_arrived(self) -> None:
        """It was not what its digest says: let it come again."""
        self.arrived = self._incoming = None

    def compact(self, index: int) -> None:
        """A durable snapshot covers up to `index`: forget what nobody needs any more."""
        pinned = [p.transfer.index for p in self._progress.values() if p.transfer is not None]
        keep_from = max(self.first, min([index - self._settings.retain_entries, *pinned]))
        self._SyncObj__deleteEntriesTo(keep_from)
        while len(self._configurations) > 1 and self._configurations[1][0] <= keep_from:
            self._configurations.pop(0)

    # --- leading ------------------------------------------------------------------------------------------------------

    def _on_appended(self, peer: VoterId, m: Appended) -> None:
        progress = self._answer_of(peer, m)
        if progress is None:
            return
        if m.wall_ms:
            progress.clock_offset_ms = m.wall_ms - int(self._now() * 1000)
        if m.is_ok:
            if m.next > self.last + 1:
                raise PeerFault(f"{peer} acknowledged entry {m.next - 1}, which does not exist")
            if progress.transfer is not None and m.next > progress.transfer.index:
                progress.transfer = None
                progress.restart(m.next)
            progress.succeeded(m.next, self._now())
        elif m.next and progress.transfer is None:
            progress.refused(m.next)

    def _on_received(self, peer: VoterId, m: Received) -> None:
        progress = self._answer_of(peer, m)
        if progress is None or progress.transfer is None or progress.transfer.index != m.index:
            return
        transfer = progress.transfer
        if m.offset < transfer.acked:
            transfer.sent = m.offset  # the peer started anew
        if m.offset != transfer.acked:
            progress.moved_s = self._now()
        transfer.acked = m.offset
        transfer.sent = max(transfer.sent, m.offset)

    def _answer_of(self, peer: VoterId, m: Appended | Received) -> Progress | None:
        """F4, F9: only those whom this leader feeds may answer or depose it, and only in its own term."""
        progress = self._progress.get(peer)
        if progress is None:
            return None
        if m.term > self._term:
            self._adopt_term(m.term)
            return None
        if m.term < self._term:
            return None
        progress.answered(m.round, m.sent_ms / 1000, self._now())
        return progress

    def _advance_commit(self) -> None:
        """The newest entry of this term that a quorum has on disk; the leader counts itself when it has synced."""
        stored = sorted((self._stored(voter) for voter in self.voters), reverse=True)
        index = stored[len(self.voters) // 2]
        if index > self._commit and self.term_at(index) == self._term:
            self._commit = index
        if self._configurations[-1][0] <= self._commit and not self.is_voter:
            self._step_down(None)  # its own removal is committed

    def _stored(self, voter: VoterId) -> int:
        if voter == self.me:
            return int(self._log.durable_index)
        progress = self._progress.get(voter)
        return 0 if progress is None else progress.match

    def _SyncObj__sendAppendEntries(self) -> None:
        now = self._now()
        is_round = now >= self._heartbeat_at or bool(self._barriers_new)
        if is_round:
            self._round += 1
            self._heartbeat_at = now + self._settings.heartbeat_s
            self._barriers += [_Barrier(self._round, self.commit, answer) for answer in self._barriers_new]
            self._barriers_new = []
            self._settle_debts()
        for peer, progress in self._progress.items():
            if progress.is_connected:
                self._feed(peer, progress, now, is_round)
        if self._barriers:
            self._answer_barriers()

    def _settle_debts(self) -> None:
        """Who has the entry that removed it, and was told that it is committed, is fed no longer."""
        for peer, index in list(self._owed.items()):
            progress = self._progress[peer]
            if not progress.is_connected or min(progress.match, progress.commit_told) >= index:
                del self._owed[peer]
                self._reconfigure()

    def _answer_barriers(self) -> None:
        rounds = sorted((self._round_of(voter) for voter in self.voters), reverse=True)
        answered = rounds[len(self.voters) // 2]
        done = [barrier for barrier in self._barriers if barrier.round <= answered]
        self._barriers = [barrier for barrier in self._barriers if barrier.round > answered]
        for barrier in done:
            barrier.answer(barrier.position)

    def _round_of(self, voter: VoterId) -> int:
        if voter == self.me:
            return self._round
        progress = self._progress.get(voter)
        return 0 if progress is None else progress.round

    def _feed(self, peer: VoterId, progress: Progress, now: float, is_round: bool) -> None:
        if progress.has_gone_silent(now):
            progress.restart(progress.match + 1 if progress.match else progress.next)
            progress.moved_s = now
            if (transfer := progress.transfer) is not None and transfer.sent == len(transfer.data):
                # It has everything, yet its last word was lost or its disk is slow.
                self._send_chunk(peer, transfer, now)
        if progress.transfer is not None or progress.next <= self.first:
            self._feed_snapshot(peer, progress, now, is_round)
            return
        has_sent = False
        while progress.next <= self.last and progress.may_send():
            entries, size = self._entries_from(progress.next)
            if not self._send_append(peer, progress, entries, now):
                return
            progress.sent(entries[-1][1], size, now)
            has_sent = True
        if not has_sent and (is_round or progress.commit_told < self._commit):
            self._send_append(peer, progress, (), now)

    def _send_append(self, peer: VoterId, progress: Progress, entries: tuple[Entry, ...], now: float) -> bool:
        prev = progress.next - 1
        message = Append(self._term, self._round, int(now * 1000), self._commit, prev, self.term_at(prev), entries)
        if not self._send(peer, message):
            return False
        progress.commit_told = self._commit
        return True

    def _entries_from(self, index: int) -> tuple[tuple[Entry, ...], int]:
        start, size = index - self.first, 0
        entries: list[Entry] = []
        for entry in self._log[start : start + APPEND_ENTRIES_MAX]:
            if entries and size + len(entry[0]) > APPEND_BYTES_MAX:
                break
            entries.append(entry)
            size += len(entry[0])
        return tuple(entries), size

    def _feed_snapshot(self, peer: VoterId, progress: Progress, now: float, is_round: bool) -> None:
        if progress.transfer is None and (packed := self._snapshot()) is not None:
            assert len(packed.data) <= SNAPSHOT_BYTES_MAX
            progress.transfer = Transfer(packed.index, packed.term, packed.data, packed.digest)
            progress.moved_s = now
        has_sent = False
        if (transfer := progress.transfer) is not None:
            while transfer.sent < len(transfer.data) and transfer.sent - transfer.acked < CHUNKS_AHEAD * CHUNK_BYTES:
                if not self._send_chunk(peer, transfer, now):
                    return
                has_sent = True
        if is_round and not has_sent:
            self._send(peer, Append(self._term, self._round, int(now * 1000), 0, 0, 0))

    def _send_chunk(self, peer: VoterId, transfer: Transfer, now: float) -> bool:
        """The next range; at the end an empty one, which asks how far the peer is."""
        data = transfer.data[transfer.sent : transfer.sent + CHUNK_BYTES]
        chunk = Chunk(
            self._term, self._round, int(now * 1000), transfer.index, transfer.term,
            len(transfer.data), transfer.digest, transfer.sent, data,
        )  # fmt: skip
        if not self._send(peer, chunk):
            return False
        transfer.sent += len(data)
        return True

    # --- the log and its configurations ---------------------------------------------------------------------------------

    def _append(self, command: bytes) -> int:
        index = self.last + 1
        self._log.add(command, index, self._term)
        self._note_configuration(self._log[-1])
        if command[:1] == _MEMBERSHIP:
            self._reconfigure()
        return index

    def _note_configuration(self, entry: Entry) -> None:
        """A configuration counts from the moment it is in the log."""
        if entry[0][:1] == _MEMBERSHIP:
            voters = codec.unpack(entry[0][1:])
            assert isinstance(voters, tuple) and all(isinstance(voter, str) for voter in voters)
            self._configurations.append((entry[1], voters))

    def _reconfigure(self) -> None:
        """Bring PySyncObj's own set of nodes, and whom a leader feeds, up to the newest configuration."""
        peers = sorted({*self.voters, *self._learners, *self._owed} - {self.me})
        self._SyncObj__otherNodes = {Node(voter) for voter in self.voters if voter != self.me}
        if self.is_leader:
            kept = self._progress
            self._progress = {
                peer: kept.get(peer) or Progress(next=self.last + 1, is_connected=peer in self._connected)
                for peer in peers
            }

    # --- applying -----------------------------------------------------------------------------------------------------

    @replicated  # type: ignore[untyped-decorator]
    def apply_batch(self, payload: bytes) -> list[bytes]:
        return self._apply(self._applied + 1, payload)

    def _applyCommand(self, command: bytes, callback: Any, commandType: int | None = None) -> None:
        """Where PySyncObj's replicated calls arrive."""
        assert self.is_leader and commandType == 0
        index = self._append(_REPLICATED + command)
        self.received_s = self._now()
        self._waiting[index].append((self._term, callback))

    def _SyncObj__applyLogEntries(self) -> None:
        until = self._now() + self._settings.apply_slice_s
        while self._applied < self._commit:
            command, index, term = self._log[self._applied + 1 - self.first]
            waiting = self._waiting.pop(index, [])
            result = self._apply_one(index, command)
            self._applied = index
            for waiting_term, callback in waiting:
                failure = syncobj.FAIL_REASON.SUCCESS if waiting_term == term else syncobj.FAIL_REASON.DISCARDED
                self._resolve(callback, result, failure)
            if self._now() >= until:
                break

    def _apply_one(self, index: int, command: bytes) -> Any:
        if command[:1] != _REPLICATED:
            return None  # no-ops; configurations count from when they are appended
        try:
            return self._SyncObj__doApplyCommand(command)
        except Exception as error:  # the same on every replica: going on is what keeps them equal
            self._on_bug(index, error)
            return ApplyFailed(repr(error))

    def _resolve(self, callback: Any, result: Any, failure: int) -> None:
        try:
            callback(result, failure)
        except Exception as error:  # a caller's fault must not touch what is applied
            self._on_bug(self._applied, error)
