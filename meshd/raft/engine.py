"""Raft: PySyncObj 0.3.17 as a library, with everything replaced that was seen to lose or double a command.

Stock keeps what is sound: the log and its helpers, term, vote and state, the replicated
call and its table of waiting callbacks (pysyncobj_state.py). Messages, elections,
commitment and sending are ours. The holes F1 … F21 that stock has, and where each is closed:

    F1  a follower cut its log on every message         following._merge: only at a true conflict; below the commit: stop
    F2  it committed what nobody had verified           following.on_append: bounded by the last verified entry
    F3  one step back for each round trip               following._merge: answers commit + 1 at once
    F4  answers of an older term counted                Engine._on_answer: by term; newer ones depose
    F5  resend storms                                   progress.py, flow.py: probe, window; resent is what an answer shows missing
    F6  an exception stopped applying for ever          applying.go_on: total, the index always moves
    F7  … and so did one in a caller's callback         applying._resolve
    F8  a paused process campaigned on waking           election.ask_when_due: reads its mail first, once
    F9  anybody could forge terms, votes, entries       Engine.receive: each kind of message by who may send it
    F10 no pre-vote                                     election._ask_trial, on_vote: a term rises only when a majority would vote
    F11 a snapshot erased the log behind it             pysyncobj_state.begin_at, replay.entries_after: a tail that agrees is kept
    F12 a snapshot's message committed unseen entries   arrival.install: up to its own index only, never backwards
    F13 callbacks swallowed by a snapshot never came    Engine.install: answered as unknown (applying.nobody_will_know)
    F14 an unreadable snapshot was skipped              opening.py: set aside, and what it covered is asked for again
    F15 two membership changes at once                  leading.change_voters: one, after an own committed entry
    F16 two votes of one node counted twice             election.on_voted: a set of voters
    F17 a cut-off leader went on for 30 s               election.check_contact: 1 s
    F18 method ids by position                          Engine.apply_batch: one replicated method, bytes in
    F19 forwarded commands were lost with a link        not used: log.py forwards, with timeouts
    F20 a full pipe raised although it had queued       Engine._applyCommand: appended at once, no queue
    F21 each compaction began all transfers anew        pinning.py: a snapshot on its way stays, with what follows it

The engine neither waits nor does I/O: it stages messages and journal records, and its
owner (log.py, or a simulator) syncs the journal before any message leaves. Roles are our
own switch: who is not in its own configuration follows, answers votes, and never asks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from random import Random
from typing import Any

from pysyncobj import replicated, syncobj

from meshd.model import NodeId
from meshd.raft.applying import ApplyFailed, Applying
from meshd.raft.arrival import Arrival, Arrived
from meshd.raft.election import Elections
from meshd.raft.following import Following
from meshd.raft.leading import Leadership
from meshd.raft.messages import (
    REPLICATED,
    Append,
    Appended,
    Chunk,
    Fetch,
    Fetched,
    RaftMessage,
    Received,
    TimeoutNow,
    Vote,
    Voted,
    VoterId,
)
from meshd.raft.progress import Progress
from meshd.raft.pulse import Pulse
from meshd.raft.pysyncobj_state import RaftState
from meshd.raft.settings import RaftSettings
from meshd.raft.storage.journal import Journal
from meshd.raft.storage.snapshot import Image, Packed
from meshd.raft.witnesses import on_fetch


class Engine(RaftState):
    """One server's Raft. Call `check_contact`, then `receive` all mail, then `doTick(0)`; sync; `synced`; send."""

    def __init__(
        self,
        *,
        me: VoterId,
        voters: Sequence[VoterId],
        journal: Journal,
        apply: Callable[[int, bytes], list[bytes]],
        digest: Callable[[], str],
        send: Callable[[VoterId, RaftMessage], bool],
        snapshot: Callable[[], Packed | None],
        now: Callable[[], float],
        wall_ms: Callable[[], int],
        random: Random,
        settings: RaftSettings,
        on_bug: Callable[[int, BaseException], None],
        servers: Callable[[], Collection[NodeId]] = tuple,
    ) -> None:
        """`voters` is the configuration at the journal's first item; `snapshot` gives one to send, or None while it is fetched.

        `digest` is a hash, in hex, of the state and of how it came about. `send` stages a message, or refuses it; `now` is CLOCK_BOOTTIME in seconds.
        """
        self._apply = apply
        # Before PySyncObj's constructor, which already looks at every property below.
        self._elections = Elections(self, servers)
        self._following = Following(self, self._elections)
        self._arrival = Arrival(self, self._elections)
        self.pulse = Pulse(self, self._elections)
        self._applying = Applying(self, digest, on_bug)
        super().__init__(
            me=me, voters=voters, journal=journal, send=send, snapshot=snapshot, now=now, wall_ms=wall_ms,
            random=random, settings=settings,
        )  # fmt: skip
        self._elections.begin()

    # --- PySyncObj's own methods, replaced ----------------------------------------------------------------------------

    @replicated  # type: ignore[untyped-decorator]
    def apply_batch(self, payload: bytes) -> list[bytes]:
        """The one replicated method: called through PySyncObj, it is appended; once committed, it runs at every server."""
        return self._apply(self.applied + 1, payload)

    def _applyCommand(self, command: bytes, callback: Any, commandType: int | None = None) -> None:
        """Where PySyncObj's replicated calls arrive."""
        assert self.is_leader and commandType == 0
        index = self.append(REPLICATED + command)
        self.received_s = self.now()
        self.waiting[index].append((self.term, callback))

    def _onTick(self, timeToWait: float = 0.0) -> None:
        if self.is_leader:
            self._advance_commit()
        else:
            self._elections.ask_when_due()
        self._SyncObj__applyLogEntries()
        self._SyncObj__sendAppendEntries()

    def _SyncObj__applyLogEntries(self) -> None:
        self._applying.go_on()

    def _SyncObj__sendAppendEntries(self) -> None:
        if (leading := self._elections.leading) is not None:
            leading.speak()

    def _SyncObj__onBecomeLeader(self) -> None:
        self._elections.lead()

    def _SyncObj__generateRaftTimeout(self) -> float:
        return self._elections.timeout_s()  # stock's constructor asks before anything else does

    # --- turns --------------------------------------------------------------------------------------------------------

    def check_contact(self) -> None:
        """F17: before mail is read, so that a leader that was paused does not believe old answers."""
        self._elections.check_contact()

    def receive(self, peer: VoterId, message: RaftMessage) -> None:
        """One message of an authenticated server. Raises PeerFault when it breaks the rules, Corrupt when logs disagree."""
        if self.now() < self._elections.silent_until_s:
            return
        match message:
            case Append():
                self._following.on_append(peer, message)
            case Appended() | Received():
                self._on_answer(peer, message)
            case Vote():
                self._elections.on_vote(peer, message)
            case Voted():
                self._elections.on_voted(peer, message)
            case Chunk():
                self._arrival.on_chunk(peer, message)
            case TimeoutNow():
                self._elections.on_timeout_now(peer, message)
            case Fetch():
                on_fetch(self, peer, message)
            case Fetched():
                self._elections.witnesses.on_fetched(peer, message)

    def _on_answer(self, peer: VoterId, m: Appended | Received) -> None:
        """F4, F9: only those whom this leader feeds may answer or depose it, and only in its own term."""
        leading = self._elections.leading
        if leading is None or peer not in leading.progress or m.term < self.term:
            return
        if m.term > self.term:
            self._elections.adopt_term(m.term)
        elif isinstance(m, Appended):
            leading.on_appended(peer, m)
        else:
            leading.on_received(peer, m)

    def peer_up(self, peer: VoterId) -> None:
        self.connected.add(peer)
        self._following.peer_up()
        if (leading := self._elections.leading) is not None:
            leading.peer_up(peer)

    def peer_down(self, peer: VoterId) -> None:
        self.connected.discard(peer)
        if (leading := self._elections.leading) is not None:
            leading.peer_down(peer)

    def synced(self) -> None:
        """The journal is durable: only now does the leader count itself."""
        if self.is_leader:
            self._advance_commit()
            self._SyncObj__applyLogEntries()
        self._SyncObj__sendAppendEntries()

    def _advance_commit(self) -> None:
        if (leading := self._elections.leading) is not None:
            leading.advance_commit()
            if leading.has_removed_itself():
                self._elections.step_down(None)

    def stop(self) -> None:
        """Nobody will turn this engine again: what is in the log may yet be committed by others."""
        self._elections.step_down(None)
        self._applying.nobody_will_know()

    # --- what the owner asks ------------------------------------------------------------------------------------------

    @property
    def has_more_to_apply(self) -> bool:
        return self.applied < self.commit

    @property
    def awaits_witness(self) -> bool:
        """A configuration may not leave before the frame behind it is synced: write that at once, not when idle."""
        return self.is_leader and self.sendable < self.last

    def next_deadline(self) -> float | None:
        """When a turn is due although nothing arrives; None: never."""
        if (leading := self._elections.leading) is not None:
            return min(self.heartbeat_at, leading.news_due_s) if leading.progress else None
        return self.election_at if self.is_voter else None

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

    # --- leading ------------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> Mapping[VoterId, Progress]:
        """Of each peer that this leader feeds; empty elsewhere."""
        return {} if (leading := self._elections.leading) is None else leading.progress

    def in_contact(self) -> bool:
        """A quorum has answered a round that was sent less than a second ago in this term."""
        return (leading := self._elections.leading) is not None and leading.in_contact()

    def leads(self) -> bool:
        """In contact, and the own first entry of this term is applied: what is read here now is not stale."""
        return self.in_contact() and self.is_settled()

    @property
    def leading_s(self) -> float:
        """Since its election; 0 elsewhere."""
        return 0.0 if (leading := self._elections.leading) is None else self.now() - leading.elected_s

    def is_settled(self) -> bool:
        """Leader, everything of earlier leaders applied, and no dispute about it: batches may be stamped."""
        return (leading := self._elections.leading) is not None and leading.is_settled()

    @property
    def disputed(self) -> int:
        """The entry at which the voters' states differ, none with a majority: nobody applies further. 0: none."""
        return self.checkpoints.disputed if (leading := self._elections.leading) is None else leading.disputed

    def barrier(self, answer: Callable[[int | None], None]) -> None:
        """`answer(position)` once a round sent after this call is answered; None when leadership is lost first."""
        leading = self._elections.leading
        if leading is None or not leading.is_settled():
            answer(None)
        else:
            leading.barrier(answer)

    def may_change_voters(self) -> bool:
        """F15: the own first entry of the term, and every earlier change, must be committed."""
        return (leading := self._elections.leading) is not None and leading.may_change_voters()

    def change_voters(self, voters: Sequence[VoterId]) -> None:
        """Append a configuration that differs from the present one by one server."""
        self._leadership().change_voters(voters)

    def write_rate(self) -> float:
        """Bytes of commands a second that the log may grow by, so that a peer that is far behind comes level."""
        return inf if (leading := self._elections.leading) is None else leading.write_rate()

    def set_learners(self, learners: Sequence[VoterId]) -> None:
        """Whom to feed beyond the voters; not counted."""
        if self.learners != (wanted := frozenset(learners)):
            self.learners = wanted
            self._reconfigure()

    def transfer_to(self, voter: VoterId) -> bool:
        """Ask a voter that has everything to take over at once."""
        return (leading := self._elections.leading) is not None and leading.transfer_to(voter)

    def _leadership(self) -> Leadership:
        assert self._elections.leading is not None
        return self._elections.leading

    def _reconfigure(self) -> None:
        if (leading := self._elections.leading) is not None:
            leading.reconfigure()

    # --- snapshots ----------------------------------------------------------------------------------------------------

    @property
    def is_sending_snapshot(self) -> bool:
        return any(progress.transfer is not None for progress in self.progress.values())

    @property
    def arrived(self) -> Arrived | None:
        """A whole snapshot of the leader's, to be verified and installed."""
        return self._arrival.arrived

    def install(self, image: Image, restore: Callable[[], None]) -> None:
        """A snapshot that is verified and durable here takes the place of what it covers; `restore` puts its state in place."""
        arrived = self._arrival.arrived
        if self._arrival.install(image, restore):
            self._reconfigure()
            self.checkpoints.forget()
            self._applying.nobody_will_know(image.index)
        if arrived is not None:
            self._arrival.acknowledge(arrived.peer, image.index)

    def discard_arrived(self) -> None:
        """It was not what its digest says: let it come again."""
        self._arrival.discard()

    def compact(self, index: int) -> None:
        """A durable snapshot covers up to `index`: forget what nobody needs any more."""
        pinned = None if (leading := self._elections.leading) is None else leading.pinned()
        kept = index - self.settings.retain_entries
        until = kept if pinned is None else min(kept, pinned)
        if until > self.first:
            self.forget_to(until)
