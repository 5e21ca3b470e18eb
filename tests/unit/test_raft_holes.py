"""The holes of PySyncObj 0.3.17 (research numbers F1 …): each is shown on stock, and shown closed here.

If a test of stock fails after an upgrade of PySyncObj, the hole may have been closed there.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from pysyncobj import SyncObj, SyncObjConf, replicated, serializer, syncobj
from pysyncobj import pickle as stock_serialization
from pysyncobj.journal import MemoryJournal
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from meshd import codec
from meshd.errors import Corrupt, PeerFault
from meshd.raft.applying import ApplyFailed
from meshd.raft.configurations import as_command
from meshd.raft.messages import (
    REPLICATED,
    Append,
    Appended,
    Chunk,
    RaftMessage,
    Received,
    TimeoutNow,
    Vote,
    Voted,
    VoterId,
)
from meshd.raft.storage.frames import LocalHeader
from meshd.raft.storage.journal import create_journal
from meshd.raft.storage.reopening import Found, open_journal
from meshd.raft.storage.snapshot import Image, unpack_image
from meshd.testing.raft_disk import MemoryDisk
from tests.unit.lone_voter import LoneVoter

A, B, C, D, E = (VoterId(f"{name}/01") for name in "abcde")
NO_OP = b"\x01"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(syncobj, "monotonicTime", clock)
    return clock


# --- stock -----------------------------------------------------------------------------------------------------------


class Post(Transport):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(None, None, None)
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        self.sent.append((node.id, message))
        return True

    def receive(self, peer: str, **message: Any) -> None:
        self._onMessageReceived(Node(peer), message)


class Stock(SyncObj):  # type: ignore[misc]
    def __init__(self, *others: str) -> None:
        self.post = Post()
        conf = SyncObjConf(autoTick=False, journalFile=MemoryJournal(), dynamicMembershipChange=True)
        super().__init__(Node("A"), [Node(other) for other in others], conf, nodeClass=Node, transport=self.post)
        for other in others:
            self.post._onNodeConnected(Node(other))
        self.runs = 0

    @replicated  # type: ignore[untyped-decorator]
    def poison(self, _: bytes) -> None:
        self.runs += 1
        raise ValueError("poison")

    @replicated  # type: ignore[untyped-decorator]
    def count(self, _: bytes) -> None:
        self.runs += 1

    @property
    def last(self) -> int:
        return int(self._SyncObj__raftLog[-1][1])

    def append(self, term: int, prev: tuple[int, int], entries: list[tuple[int, int]], commit: int) -> None:
        self.post.receive(
            "B", type="append_entries", term=term, prevLogIdx=prev[0], prevLogTerm=prev[1], commit_index=commit,
            entries=[(NO_OP, index, entry_term) for index, entry_term in entries],
        )  # fmt: skip

    def be_elected(self, clock: Clock) -> None:
        clock.now_s += 5
        self.doTick(0.0)
        for other in sorted(node.id for node in self.otherNodes)[: len(self.otherNodes) // 2 + 1]:
            self.post.receive(other, type="response_vote", term=self.raftCurrentTerm)
        assert self._isLeader()


# --- ours ------------------------------------------------------------------------------------------------------------


class Ours(LoneVoter):
    def __init__(
        self, clock: Clock, *voters: VoterId, apply: Callable[[int, bytes], list[bytes]] = lambda index, batch: []
    ) -> None:
        super().__init__(A, voters, apply=apply, now=clock)

    def hear(self, term: int, prev: tuple[int, int], entries: list[tuple[int, int]], commit: int) -> None:
        told = tuple((NO_OP, index, entry_term) for index, entry_term in entries)
        self.receive(B, Append(term, 1, 100_000, commit, *prev, told))
        self.turn()

    def be_elected(self, clock: Clock) -> None:
        """A trial, then the vote. Late by no more than a tick, or it would read its mail first."""
        clock.now_s = self.next_deadline() or clock.now_s
        self.turn()
        others = [voter for voter in self.voters if voter != A][: len(self.voters) // 2]
        for is_trial in (True, False):
            for other in others:
                self.receive(other, Voted(self.term, self.term + is_trial, True, is_trial))
        self.turn()
        assert self.is_leader

    def acknowledge(self, peer: VoterId, next_index: int, *, round_: int = 1, sent_s: float = 0.0) -> None:
        self.receive(peer, Appended(self.term, round_, int(sent_s * 1000), True, next_index))
        self.turn()

    def answer(self) -> RaftMessage:
        return self.sent[-1][1]


# --- F1: a repeated, older message ---------------------------------------------------------------------------------------


def test_stock_forgets_acknowledged_entries_when_an_older_message_is_repeated(clock: Clock) -> None:
    stock = Stock("B", "C")
    stock.append(1, (1, 0), [(2, 1), (3, 1), (4, 1)], 1)
    stock.append(1, (1, 0), [(2, 1)], 1)
    assert stock.last == 2


def test_f1_an_older_message_takes_nothing_away(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.hear(1, (1, 0), [(2, 1), (3, 1), (4, 1)], 1)
    ours.hear(1, (1, 0), [(2, 1)], 1)
    assert ours.last == 4


def test_f1_a_true_conflict_is_cut(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.hear(1, (1, 0), [(2, 1), (3, 1), (4, 1)], 2)
    ours.hear(2, (2, 1), [(3, 2)], 2)
    assert [entry[1:] for entry in ours.journal[:]] == [(1, 0), (2, 1), (3, 2)]


def test_f1_a_conflict_with_what_is_committed_stops_the_server(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.hear(1, (1, 0), [(2, 1), (3, 1)], 3)
    with pytest.raises(Corrupt, match="contradicts entry 3"):
        ours.hear(2, (2, 1), [(3, 2)], 3)


# --- F2: commit ----------------------------------------------------------------------------------------------------------


def test_stock_commits_its_own_unverified_suffix(clock: Clock) -> None:
    stock = Stock("B", "C")
    stock.append(1, (1, 0), [(2, 1), (3, 1), (4, 1)], 1)
    stock.post.receive("B", type="append_entries", term=2, commit_index=4, serialized=None)
    assert stock.raftCommitIndex == 4


def test_f2_only_what_the_message_verified_is_committed(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.hear(1, (1, 0), [(2, 1), (3, 1), (4, 1)], 1)
    ours.hear(2, (2, 1), [], 4)
    assert ours.commit == 2
    ours.receive(B, Append(2, 2, 100_000, 4, 0, 0))
    assert ours.commit == 2


# --- F3: a log that does not join ------------------------------------------------------------------------------------------


def test_stock_goes_back_one_entry_for_each_round_trip(clock: Clock) -> None:
    stock = Stock("B", "C")
    stock.append(1, (1, 0), [(index, 1) for index in range(2, 50)], 1)
    stock.append(2, (49, 2), [], 1)
    assert stock.post.sent[-1][1]["next_node_idx"] == 49


def test_f3_a_follower_says_at_once_from_where_its_log_is_surely_the_leaders(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.hear(1, (1, 0), [(index, 1) for index in range(2, 50)], 7)
    ours.hear(2, (49, 2), [], 7)
    answer = ours.answer()
    assert isinstance(answer, Appended) and (answer.is_ok, answer.next) == (False, 8)


# --- F5: what is on its way -------------------------------------------------------------------------------------------------


def test_stock_sends_again_what_is_on_its_way_after_each_success(clock: Clock) -> None:
    stock = Stock("B", "C")
    stock.be_elected(clock)
    for index in range(3, 13):
        stock._SyncObj__raftLog.add(NO_OP, index, 1)
    stock._SyncObj__sendAppendEntries()
    assert stock._SyncObj__raftNextIndex[Node("B")] == 13
    stock.post.receive("B", type="next_node_idx", next_node_idx=3, reset=False, success=True)
    assert stock._SyncObj__raftNextIndex[Node("B")] == 3


def test_f5_a_success_sends_nothing_again(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3)
    for _ in range(4):
        ours.propose(b"batch", lambda *_: None)
        ours.turn()
    ours.sent.clear()
    ours.acknowledge(B, 4)
    told = [entry[1] for peer, m in ours.sent if peer == B and isinstance(m, Append) for entry in m.entries]
    assert (ours.progress[B].next, told) == (7, [])


# --- F4: answers of another term -----------------------------------------------------------------------------------------


def test_stock_counts_an_answer_of_an_older_term(clock: Clock) -> None:
    stock = Stock("B", "C")
    stock.be_elected(clock)
    stock.post.receive("B", type="next_node_idx", next_node_idx=3, reset=False, success=True)  # it has no term
    stock.doTick(0.0)
    assert stock.raftCommitIndex == stock.last == 2


def test_f4_an_answer_of_an_older_term_counts_for_nothing(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.receive(B, Appended(ours.term - 1, 1, 100_000, True, 3))
    ours.turn()
    assert (ours.commit, ours.progress[B].match) == (1, 0)
    ours.acknowledge(B, 3)
    assert ours.commit == 2


def test_f4_a_newer_term_in_an_answer_deposes(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.receive(B, Appended(ours.term + 3, 1, 100_000, False, 0))
    assert not ours.is_leader and ours.term == 4


def test_f4_a_refusal_never_takes_back_what_is_known_to_be_there(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3)
    ours.receive(B, Appended(ours.term, 1, 100_000, False, 1))
    assert (ours.progress[B].match, ours.progress[B].next) == (2, 3)


def test_a_leader_counts_itself_only_when_it_has_synced(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3)
    ours.propose(b"batch", lambda *_: None)
    ours.receive(B, Appended(ours.term, 1, 100_000, True, 4))
    ours.doTick(0.0)
    assert ours.commit == 2
    ours.journal.commit()
    ours.synced()
    assert ours.commit == 3


def test_an_entry_of_an_older_term_is_committed_only_with_one_of_the_own(clock: Clock) -> None:
    """Raft's figure 8: a majority may hold it, and another leader still overwrite it."""
    ours = Ours(clock, A, B, C)
    ours.hear(1, (1, 0), [(2, 1)], 1)
    ours.be_elected(clock)
    ours.acknowledge(B, 3)
    assert (ours.term, ours.last, ours.commit) == (2, 3, 1)
    ours.acknowledge(B, 4)
    assert ours.commit == 3


# --- F6, F7: exceptions --------------------------------------------------------------------------------------------------


def test_stock_runs_a_poisoned_command_again_and_again(clock: Clock) -> None:
    stock = Stock()
    clock.now_s += 5
    stock.doTick(0.0)
    stock.poison(b"x")
    for _ in range(5):
        with suppress(ValueError):
            stock.doTick(0.0)
    assert stock.runs > 1


def test_f6_a_state_machine_that_raises_is_run_once_and_its_callers_told(clock: Clock) -> None:
    runs, outcomes = [], []

    def apply(index: int, batch: bytes) -> list[bytes]:
        runs.append(index)
        raise ValueError("poison")

    ours = Ours(clock, A, apply=apply)
    ours.be_elected(clock)
    ours.propose(b"x", lambda *outcome: outcomes.append(outcome))
    for _ in range(5):
        ours.turn()
    assert (runs, ours.bugs, ours.applied) == ([3], [3], 3)
    assert outcomes == [(None, 3, "the state machine failed")]
    assert ApplyFailed


def test_stock_runs_a_command_again_when_its_caller_raises(clock: Clock) -> None:
    stock = Stock()
    clock.now_s += 5
    stock.doTick(0.0)

    def answer(*_: object) -> None:
        raise ValueError("the caller's fault")

    stock.count(b"x", callback=answer)
    for _ in range(5):
        with suppress(ValueError):
            stock.doTick(0.0)
    assert stock.runs > 1


def test_f7_a_caller_that_raises_changes_nothing_that_is_applied(clock: Clock) -> None:
    runs = []

    def apply(index: int, batch: bytes) -> list[bytes]:
        runs.append(index)
        return [b""]

    def answer(*_: object) -> None:
        raise ValueError("the caller's fault")

    ours = Ours(clock, A, apply=apply)
    ours.be_elected(clock)
    ours.propose(b"x", answer)
    for _ in range(3):
        ours.turn()
    assert (runs, ours.applied, ours.bugs) == ([3], 3, [3])


# --- F8, F10, F17: elections ---------------------------------------------------------------------------------------------


def test_stock_campaigns_on_waking_before_it_reads_its_mail(clock: Clock) -> None:
    stock = Stock("B", "C")
    stock.append(1, (1, 0), [], 1)
    clock.now_s += 60
    stock.doTick(0.0)
    assert stock.raftCurrentTerm == 2


def test_f8_a_process_that_stood_still_reads_its_mail_before_it_campaigns(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    clock.now_s += 60
    ours.turn()
    assert ours.sent == [] and ours.term == 0
    ours.hear(1, (1, 0), [], 1)
    assert ours.leader == B


def test_stock_raises_its_term_for_as_long_as_it_is_cut_off_and_deposes_the_leader_with_it(clock: Clock) -> None:
    away, leader = Stock("B", "C"), Stock("B", "C")
    for _ in range(20):
        clock.now_s += 5
        away.doTick(0.0)
    assert away.raftCurrentTerm == 20
    leader.be_elected(clock)
    leader.post.receive("C", type="request_vote", term=away.raftCurrentTerm, last_log_index=1, last_log_term=0)
    assert not leader._isLeader()


def test_f10_a_server_cut_off_raises_no_term(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    for _ in range(20):
        clock.now_s = ours.next_deadline() or 0.0
        ours.turn()
    assert ours.term == 0
    assert all(isinstance(message, Vote) and message.is_trial for _, message in ours.sent)


def test_f10_a_trial_is_refused_while_a_leader_is_heard(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.hear(1, (1, 0), [], 1)
    clock.now_s += 0.7
    ours.receive(C, Vote(2, 9, 1, True))
    assert ours.answer() == Voted(1, 2, False, True)
    clock.now_s += 0.2
    ours.receive(C, Vote(2, 9, 1, True))
    assert ours.answer() == Voted(1, 2, True, True)
    assert ours.term == 1


def test_f10_a_leader_in_contact_refuses_trials(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3, sent_s=clock.now_s)
    ours.receive(C, Vote(2, 9, 9, True))
    assert (ours.sent[-1], ours.is_leader) == ((C, Voted(1, 2, False, True)), True)


def test_stock_leads_on_for_half_a_minute_though_nobody_answers(clock: Clock) -> None:
    stock = Stock("B", "C")
    stock.be_elected(clock)
    clock.now_s += 25
    stock.doTick(0.0)
    assert stock._isLeader()


def test_f17_a_leader_that_nobody_answers_steps_down_after_a_second(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3, sent_s=clock.now_s)
    assert ours.leads()
    clock.now_s += 1.0
    assert not ours.leads()
    ours.receive(B, Appended(ours.term, 1, int((clock.now_s - 1) * 1000), True, 3))
    assert not ours.leads(), "an answer counts by when its round was sent"
    ours.check_contact()
    assert not ours.is_leader


def test_only_the_leader_of_this_term_can_hand_over(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.hear(1, (1, 0), [], 1)
    ours.receive(C, TimeoutNow(1))
    ours.receive(B, TimeoutNow(0))
    assert ours.term == 1
    ours.receive(B, TimeoutNow(1))
    assert ours.term == 2


# --- F9: who may say what ------------------------------------------------------------------------------------------------


def test_stock_takes_a_term_from_a_read_only_peer(clock: Clock) -> None:
    stock = Stock("B", "C")
    stock.be_elected(clock)
    stock.post._onReadonlyNodeConnected(Node("W"))
    stock.post.receive("W", type="append_entries", term=10**15, commit_index=1, serialized=None)
    assert not stock._isLeader()
    assert stock.raftCurrentTerm == 10**15


def test_f9_answers_of_those_who_were_not_asked_move_nothing(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    for forged in (
        Appended(10**15, 1, 0, True, 2),
        Voted(10**15, 10**15, True, False),
        Vote(10**15, 9, 9, True),
        Appended(1, 1, 0, True, 3),
        TimeoutNow(1),
    ):
        ours.receive(D, forged)
    ours.turn()
    assert (ours.is_leader, ours.term, ours.commit) == (True, 1, 1)


def test_f9_a_vote_of_one_who_is_no_voter_moves_no_term_while_there_is_a_leader(clock: Clock) -> None:
    """Whom an old configuration does not know may be elected, so it is answered; but not to depose anybody."""
    leader = Ours(clock, A, B, C)
    leader.be_elected(clock)
    leader.acknowledge(B, 3, sent_s=clock.now_s)
    follower = Ours(clock, A, B, C)
    follower.hear(1, (1, 0), [], 1)
    for ours in (leader, follower):
        ours.receive(D, Vote(10**15, 9, 9, False))
        assert (ours.term, ours.sent[-1]) == (1, (D, Voted(1, 10**15, False, False)))
    clock.now_s += 0.9
    follower.receive(D, Vote(2, 9, 9, False))
    assert follower.answer() == Voted(2, 2, True, False)


def test_f9_nobody_can_hand_over_a_ready_made_entry(clock: Clock) -> None:
    """Stock appends whatever bytes a peer sends as a command, also `remove voter B`."""
    stock = Stock("B", "C")
    stock.be_elected(clock)
    stock._SyncObj__raftLastApplied = stock.last
    stock.post._onReadonlyNodeConnected(Node("W"))
    stock.post.receive("W", type="apply_command", command=b"\x02" + codec.pack(("rem", "B", "B")))
    stock.doTick(0.0)
    assert stock.otherNodes == {Node("C")}
    removal = as_command([A, C])
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3)
    ours.propose(removal, lambda *_: None)
    ours.turn()
    assert ours.journal[-1][0][:1] == REPLICATED and ours.voters == (A, B, C)


def test_who_is_not_in_its_own_configuration_answers_votes_and_never_asks(clock: Clock) -> None:
    learner = Ours(clock)
    clock.now_s += 60
    for _ in range(3):
        learner.turn()
        clock.now_s += 60
    assert learner.next_deadline() is None and learner.sent == []
    learner.receive(B, Vote(1, 5, 1, True))
    assert learner.answer() == Voted(0, 1, True, True)
    learner.receive(B, Vote(1, 5, 1, False))
    assert learner.answer() == Voted(1, 1, True, False)
    learner.receive(C, Vote(1, 5, 1, False))
    assert learner.answer() == Voted(1, 1, False, False), "one vote in a term"


# --- F11 to F14, F21: snapshots ----------------------------------------------------------------------------------------------


@pytest.fixture
def stock_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the engine takes pickle away from stock."""
    monkeypatch.setattr(serializer, "pickle", stock_serialization)


def _receive_dump(stock: Stock, blob: bytes) -> None:
    for part in ((blob, True, False), (b"", False, True)):
        stock.post.receive("B", type="append_entries", term=1, commit_index=1, serialized=part)


def _dump(index: int) -> bytes:
    return gzip.compress(pickle.dumps((None, (NO_OP, index, 1), (NO_OP, index - 1, 1), ["A", "B", "C"])))


def test_stock_forgets_acknowledged_entries_behind_a_snapshot_and_who_waits_for_them(
    clock: Clock, stock_pickle: None
) -> None:
    stock = Stock("B", "C")
    stock.append(1, (1, 0), [(index, 1) for index in range(2, 6)], 1)
    answers: list[object] = []
    stock._SyncObj__commandsWaitingCommit[3].append((1, lambda *answer: answers.append(answer)))
    _receive_dump(stock, _dump(3))
    stock.doTick(0.0)
    assert (stock.last, answers) == (3, [])


def test_f11_a_log_that_agrees_with_a_snapshot_keeps_its_tail(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.hear(1, (1, 0), [(index, 1) for index in range(2, 6)], 1)
    ours.install(Image("m", 3, 1, (A, B, C), b""), lambda: None)
    assert (ours.first, ours.last, ours.commit, ours.applied) == (3, 5, 3, 3)


def test_f12_a_snapshot_on_its_way_commits_nothing(clock: Clock) -> None:
    """On stock any such message carries a commit index, and what the follower happens to hold is applied up to it."""
    ours = Ours(clock, A, B, C)
    ours.hear(1, (1, 0), [(2, 1), (3, 1), (4, 1)], 1)
    ours.receive(B, Chunk(2, 1, 100_000, 9, 2, 100, bytes(32), 0, bytes(50)))
    ours.turn()
    assert (ours.commit, ours.last, ours.answer()) == (1, 4, Received(2, 1, 100_000, 9, 50))


def test_f13_who_waits_for_an_entry_that_a_snapshot_covers_learns_that_nobody_knows(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    outcomes: list[object] = []
    ours.propose(b"batch", lambda *outcome: outcomes.append(outcome))
    ours.turn()
    ours.hear(2, (1, 0), [], 1)
    ours.install(Image("m", 9, 2, (A, B, C), b""), lambda: None)
    assert outcomes == [(None, 3, "its outcome was not seen here")]


def test_stock_acknowledges_a_snapshot_that_it_cannot_read(clock: Clock, stock_pickle: None) -> None:
    stock = Stock("B", "C")
    _receive_dump(stock, b"no snapshot at all")
    assert stock.post.sent[-1][1]["success"]


def test_f14_a_snapshot_that_cannot_be_read_is_an_error(clock: Clock) -> None:
    with pytest.raises(PeerFault, match="do not have its digest"):
        unpack_image(b"no snapshot at all", digest=bytes(32), mesh="m")


def test_stock_begins_every_running_transfer_anew_with_each_compaction(stock_pickle: None) -> None:
    """One cause of the stall of a server that comes back under load; ours is in tests/sim/test_raft_rejoin.py."""
    stock = serializer.Serializer(None, 4, False, None, None, None)
    for index in (1, 2):
        stock.serialize((index,), index)
        stock.checkSerializing()
        _, is_first, _ = stock.getTransmissionData("B")
        assert is_first, "though the peer has a part of it"
        assert not stock.getTransmissionData("B")[1]


# --- F18: names of methods ------------------------------------------------------------------------------------------------


def test_stock_numbers_its_methods_by_their_place_in_the_alphabet(clock: Clock) -> None:
    class Newer(Stock):
        @replicated  # type: ignore[untyped-decorator]
        def another(self, _: bytes) -> None: ...

    assert Newer()._methodToID["poison_v0"] != Stock()._methodToID["poison_v0"]


def test_f18_there_is_one_method_and_what_it_means_is_in_its_bytes(clock: Clock) -> None:
    assert list(Ours(clock, A)._methodToID.values()) == [0]


# --- F15: membership -----------------------------------------------------------------------------------------------------


def test_stock_lets_a_leader_remove_everybody_else_and_commit_alone(clock: Clock) -> None:
    stock = Stock("B", "C")
    stock.be_elected(clock)
    stock._SyncObj__raftLastApplied = stock.last  # its own first entry is committed; from here on it is cut off
    for gone in ("B", "C"):
        assert stock._SyncObj__changeCluster(["rem", gone, gone])
    assert not stock.otherNodes


def test_f15_one_change_at_a_time_and_none_before_an_own_committed_entry(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    assert not ours.may_change_voters()
    ours.acknowledge(B, 3)
    assert ours.may_change_voters()
    ours.change_voters([A, B])
    assert not ours.may_change_voters(), "that one is not committed"
    ours.turn()
    ours.acknowledge(B, 4)
    assert ours.may_change_voters()


def test_f15_two_servers_cannot_change_in_one_step(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3)
    with pytest.raises(AssertionError):
        ours.change_voters([A])


def test_a_configuration_goes_with_the_entry_that_brought_it(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3)
    ours.change_voters([A, B, C, D])
    ours.turn()
    assert ours.voters == (A, B, C, D)
    ours.hear(2, (2, 1), [(3, 2)], 2)
    assert ours.voters == (A, B, C)


def test_a_configuration_is_told_to_nobody_before_a_later_frame_proves_its_own(clock: Clock) -> None:
    """Were it damaged as the last frame, it could pass for a torn tail and be forgotten, though others knew of it."""
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3)

    def told() -> list[int]:
        return [entry[1] for _, message in ours.sent if isinstance(message, Append) for entry in message.entries]

    ours.change_voters([A, B, C, D])
    ours.propose(b"behind it", lambda *_: None)
    ours.sent.clear()
    ours.turn()
    assert (ours.journal.durable_index, told(), ours.awaits_witness) == (4, [], True)
    ours.turn()  # nothing was added: what is synced now is the witness
    assert (told(), ours.awaits_witness) == ([3, 4], False)


def test_a_configuration_that_a_start_found_in_the_last_frame_waits_too(clock: Clock) -> None:
    disk = MemoryDisk()
    journal = create_journal(disk, LocalHeader("m", "01", 1, "aa"))
    journal.add(b"\x01", 2, 1)
    journal.commit()
    journal.add(as_command([A, B]), 3, 1)
    journal.commit()
    journal = open_journal(disk, mesh="m", lineage=(), random="bb", found=Found())
    assert (journal.durable_index, journal.witnessed_index, journal.wants_witness) == (3, 1, True)
    journal.commit()
    assert (journal.witnessed_index, journal.wants_witness) == (3, False)


def test_a_leader_that_removed_itself_leads_until_that_is_committed_and_does_not_count(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3)
    ours.change_voters([B, C])
    ours.turn()
    ours.acknowledge(B, 4)
    assert ours.is_leader and ours.commit == 2
    ours.acknowledge(C, 4)
    assert (ours.commit, ours.is_leader, ours.next_deadline()) == (3, False, None)


# --- F16: votes ----------------------------------------------------------------------------------------------------------


def test_stock_counts_two_votes_of_one_node_twice(clock: Clock) -> None:
    stock = Stock("B", "C", "D", "E")
    clock.now_s += 5
    stock.doTick(0.0)
    for _ in range(2):
        stock.post.receive("B", type="response_vote", term=stock.raftCurrentTerm)
    assert stock._isLeader()


def test_f16_a_voter_counts_once(clock: Clock) -> None:
    ours = Ours(clock, A, B, C, D, E)
    clock.now_s = ours.next_deadline() or 0.0
    ours.turn()
    for _ in range(4):
        ours.receive(B, Voted(0, 1, True, True))
    assert ours.term == 0
    ours.receive(C, Voted(0, 1, True, True))
    for _ in range(4):
        ours.receive(B, Voted(1, 1, True, False))
    assert not ours.is_leader
    ours.receive(D, Voted(1, 1, True, False))
    assert ours.is_leader


# --- the read barrier ----------------------------------------------------------------------------------------------------


def test_a_read_waits_for_a_round_that_was_sent_after_it(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3, round_=1)
    answers: list[int | None] = []
    ours.barrier(answers.append)
    ours.acknowledge(B, 3, round_=1)
    assert answers == []
    ours.acknowledge(B, 3, round_=2)
    assert answers == [2]


def test_a_read_of_a_leader_that_is_deposed_is_not_answered_from_its_past(clock: Clock) -> None:
    ours = Ours(clock, A, B, C)
    ours.be_elected(clock)
    ours.acknowledge(B, 3)
    answers: list[int | None] = []
    ours.barrier(answers.append)
    ours.hear(2, (2, 1), [(3, 2)], 2)
    assert answers == [None]
