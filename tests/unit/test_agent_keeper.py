"""The leader's side of sessions (protocol.md 4)."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshd.model import AttemptKey, AttemptRun, JobId, JobSpec, NodeId, Run, runs_of
from meshd.raft.state.commands import EndSession, Leased, SessionChanged, StopWanted
from meshd.work.keeper import (
    AnswerRenew,
    Applied,
    EndProposed,
    Keeper,
    KeeperEffect,
    LeaderTick,
    NoticeEnded,
    PeerGone,
    RenewArrived,
    SendNotice,
)
from meshd.work.session_messages import Granted, Notice, Refusal, Refused, Renew, digest_of
from meshd.work.worker import Propose

JOB = JobId("018f0000-0000-7000-8000-000000000001")
SPEC = JobSpec(backend=("process",), run=Run(args=("true",)))
NODE = NodeId("node")
T0 = 1_000_000


def key(fence: int) -> AttemptKey:
    return AttemptKey(JOB, task=fence, attempt=1, fence=fence)


def run(fence: int, count: int = 1) -> AttemptRun:
    return AttemptRun(JOB, task=fence, attempt=1, fence=fence, count=count)


@dataclass
class Leases:
    """The replicated state as the keeper sees it: one node with one live session."""

    epoch: int = 3
    leased: list[AttemptKey] = field(default_factory=list)
    stops: list[AttemptKey] = field(default_factory=list)
    fence: int = 77

    def sessions_live(self) -> list[tuple[NodeId, int]]:
        return [(NODE, self.epoch)]

    def leases_of(self, node: NodeId, epoch: int) -> list[AttemptKey]:
        return self.leased if epoch == self.epoch else []

    def stops_of(self, node: NodeId, epoch: int) -> list[AttemptKey]:
        return self.stops

    def still_leased(self, node: NodeId, epoch: int, attempts: AttemptRun) -> tuple[AttemptRun, ...]:
        return runs_of(key for key in attempts.each() if key in self.leases_of(node, epoch))

    def spec_of(self, job: JobId) -> JobSpec | None:
        return SPEC


def leading(leases: Leases) -> Keeper:
    keeper = Keeper(leases)
    keeper.handle(LeaderTick(term=1), T0)
    return keeper


def renew(keeper: Keeper, now_ms: int, *held: int, epoch: int = 3, term: int | None = 1) -> object:
    message = Renew(epoch, digest_of(map(key, held)))
    [answer] = [
        effect.answer
        for effect in keeper.handle(RenewArrived(9, NODE, message, term), now_ms)
        if isinstance(effect, AnswerRenew)
    ]
    return answer


def ticks(keeper: Keeper, start_ms: int, stop_ms: int, *, term: int | None = 1) -> dict[int, KeeperEffect]:
    return {
        at_ms: effect for at_ms in range(start_ms, stop_ms, 100) for effect in keeper.handle(LeaderTick(term), at_ms)
    }


END = Propose(EndSession(NODE, 3))


def test_only_a_leader_grants() -> None:
    keeper = Keeper(Leases())

    assert renew(keeper, T0, term=None) == Refused(Refusal.NOT_LEADING)
    assert renew(keeper, T0, term=1) == Granted()
    assert renew(keeper, T0, term=None) == Refused(Refusal.NOT_LEADING)


def test_another_epoch_is_over() -> None:
    assert renew(leading(Leases()), T0, epoch=2) == Refused(Refusal.OVER)


def test_a_session_is_ended_twelve_seconds_after_its_last_grant() -> None:
    keeper = leading(Leases())
    renew(keeper, T0 + 5_000)

    assert ticks(keeper, T0, T0 + 17_000) == {}
    assert list(ticks(keeper, T0 + 17_000, T0 + 20_000).values()) == [END]


def test_a_new_leader_waits_as_long_since_another_may_have_granted() -> None:
    keeper = leading(Leases())
    ticks(keeper, T0, T0 + 11_000)

    keeper.handle(LeaderTick(term=2), T0 + 11_000)

    assert ticks(keeper, T0 + 11_000, T0 + 23_000, term=2) == {}
    assert list(ticks(keeper, T0 + 23_000, T0 + 24_000, term=2).values()) == [END]


def test_a_node_that_is_agreed_to_be_dead_is_ended_after_five_seconds() -> None:
    keeper = leading(Leases())
    keeper.handle(PeerGone(NODE, True), T0 + 1_000)

    assert ticks(keeper, T0, T0 + 5_000) == {}
    assert list(ticks(keeper, T0 + 5_000, T0 + 6_000).values()) == [END]


def test_a_leader_that_was_paused_ends_nothing_before_it_knows_whether_it_still_leads() -> None:
    keeper = Keeper(Leases(leased=[key(1)]))
    [sent] = keeper.handle(LeaderTick(1), T0)
    assert isinstance(sent, SendNotice)
    woke_ms = T0 + 27_000

    news = (
        PeerGone(NODE, is_gone=True),
        NoticeEnded(NODE, sent.notice, has_arrived=False),
        EndProposed(EndSession(NODE, 3), None),
    )

    assert [keeper.handle(event, woke_ms) for event in news] == [[], [], []]
    assert keeper.handle(LeaderTick(None), woke_ms) == []


def test_nothing_is_granted_once_the_end_is_proposed_and_the_end_is_proposed_until_it_is_known() -> None:
    keeper = leading(Leases())
    ticks(keeper, T0, T0 + 12_600)

    assert renew(keeper, T0 + 12_600) == Refused(Refusal.OVER)
    keeper.handle(EndProposed(EndSession(NODE, 3), None), T0 + 12_700)
    assert list(ticks(keeper, T0 + 12_700, T0 + 14_000).values()) == [END]


def test_a_digest_that_differs_twice_asks_for_the_list_as_of_the_newest_fence() -> None:
    keeper = leading(Leases(leased=[key(1)]))

    assert [renew(keeper, T0, 2), renew(keeper, T0, 2)] == [Granted(), Granted(list_fence=77)]
    assert [renew(keeper, T0, 2), renew(keeper, T0, 1), renew(keeper, T0, 2)] == [Granted()] * 3


def test_leases_of_one_entry_go_out_in_one_notice_with_the_spec_once() -> None:
    leases = Leases()
    keeper = leading(leases)
    leases.leased = [key(1), key(2)]

    [effect] = keeper.handle(Applied([Leased(NODE, 3, run(1)), Leased(NODE, 3, run(2))], 1), T0)

    assert effect == SendNotice(NODE, Notice(3, (run(1), run(2)), ((JOB, SPEC),)))


def test_a_notice_that_did_not_arrive_is_sent_again_with_what_is_still_true() -> None:
    leases = Leases(leased=[key(1), key(2)])
    keeper = Keeper(leases)
    [sent] = keeper.handle(LeaderTick(1), T0)
    assert isinstance(sent, SendNotice)
    leases.leased = [key(2)]
    keeper.handle(NoticeEnded(NODE, sent.notice, has_arrived=False), T0)

    assert keeper.handle(LeaderTick(1), T0 + 900) == []
    [again] = keeper.handle(LeaderTick(1), T0 + 1_000)

    assert again == SendNotice(NODE, Notice(3, (run(2),), ((JOB, SPEC),)))
    assert isinstance(again, SendNotice)
    assert keeper.handle(NoticeEnded(NODE, again.notice, has_arrived=True), T0 + 1_001) == []
    assert keeper.handle(LeaderTick(1), T0 + 3_000) == []


def test_a_new_leader_tells_again_what_is_leased_and_what_is_unwanted() -> None:
    leases = Leases(leased=[key(1), key(2)], stops=[key(2)])
    keeper = Keeper(leases)

    [sent] = keeper.handle(LeaderTick(1), T0)

    assert sent == SendNotice(NODE, Notice(3, (run(1, 2),), ((JOB, SPEC),), (key(2),)))


def test_a_stop_is_told_while_the_attempt_is_leased() -> None:
    leases = Leases()
    keeper = leading(leases)
    assert keeper.handle(Applied([StopWanted(NODE, 3, key(1))], 1), T0) == []
    leases.leased = leases.stops = [key(1)]

    [sent] = keeper.handle(Applied([StopWanted(NODE, 3, key(1))], 1), T0)

    assert sent == SendNotice(NODE, Notice(3, stops=(key(1),)))


def test_a_session_that_was_followed_by_another_is_over() -> None:
    leases = Leases()
    keeper = leading(leases)
    leases.epoch = 4
    keeper.handle(Applied([SessionChanged(NODE, 3, False), SessionChanged(NODE, 4, True)], 1), T0)

    assert [renew(keeper, T0, epoch=3), renew(keeper, T0, epoch=4)] == [Refused(Refusal.OVER), Granted()]
