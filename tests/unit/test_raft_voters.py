"""Who votes, step by step; and what time a batch says it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.model import NodeId
from meshd.raft.messages import VoterId, node_of
from meshd.raft.stamp import OwnClock, agreed_wall_ms
from meshd.raft.voters import Add, Decision, HandOver, Peer, Remove, View, decide, learners, seats_taken, voters_wanted

HERE = Peer(lag=0, silent_ms=50)
BEHIND = Peer(lag=5000, silent_ms=50)
SILENT = Peer(lag=0, silent_ms=11_000)
GONE = Peer(lag=0, silent_ms=13_000)


def v(name: str) -> VoterId:
    return VoterId(name if "/" in name else f"{name}/1")


def view(
    voters: str, *, leading_ms: int = 60_000, servers: str = "", draining: str = "", zones: str = "", **peers: Peer
) -> View:
    """`voters` leads with the leader; peers are given by name, `c_2` is c's second incarnation."""
    named = {v(name.replace("_", "/")): peer for name, peer in peers.items()}
    ids = tuple(v(name) for name in voters.split())
    nodes = servers.split() or sorted({node_of(voter) for voter in [*ids, *named]})
    return View(
        me=ids[0],
        voters=ids,
        peers=named,
        servers=[NodeId(node) for node in nodes],
        draining=[NodeId(node) for node in draining.split()],
        leading_ms=leading_ms,
        zones={NodeId(node): zone for node, zone in (each.split("=") for each in zones.split())},
    )


@pytest.mark.parametrize(("servers", "voters"), [(1, 1), (2, 1), (3, 3), (6, 3), (7, 5), (50, 5)])
def test_how_many_vote(servers: int, voters: int) -> None:
    assert voters_wanted(servers) == voters


@pytest.mark.parametrize(
    ("what", "given_", "decision"),
    [
        ("alone", view("a"), None),
        ("two servers, one voter", view("a", b=HERE), None),
        ("both newcomers are ready", view("a", b=HERE, c=HERE), Add(v("b"))),
        ("the second follows at once", view("a b", b=HERE, c=HERE), Add(v("c"))),
        ("one is not ready: no even size", view("a", b=HERE, c=BEHIND), None),
        ("one has said nothing lately", view("a", b=HERE, c=Peer(0, 300)), None),
        ("three of four", view("a b c", b=HERE, c=HERE, d=HERE), None),
        ("seven servers want two more", view("a b c", b=HERE, c=HERE, d=HERE, e=HERE, f=HERE, g=HERE), Add(v("d"))),
        ("seven servers, one more is there", view("a b c", servers="a b c d e f g", b=HERE, c=HERE, d=HERE), None),
        ("a voter left the mesh", view("a b c", servers="a b d", b=HERE, c=HERE, d=HERE), Remove(v("c"))),
        ("… but the quorum would break", view("a b c", servers="a b", b=SILENT, c=SILENT), None),
        ("a silent voter waits for a successor", view("a b c", b=HERE, c=SILENT), None),
        ("… who comes first", view("a b c", b=HERE, c=SILENT, d=HERE), Add(v("d"))),
        ("… and then it goes", view("a b c d", b=HERE, c=SILENT, d=HERE), Remove(v("c"))),
        ("nobody is silent to a new leader", view("a b c", leading_ms=100, b=HERE, c=SILENT, d=HERE), None),
        ("a draining voter is replaced", view("a b c", draining="c", b=HERE, c=HERE, d=HERE), Add(v("d"))),
        ("a draining leader hands over", view("a b c d", draining="a", b=HERE, c=HERE, d=HERE), HandOver(v("b"))),
        ("two servers are left: one votes", view("a b c", draining="c", b=HERE, c=HERE), Remove(v("c"))),
        ("… and that is the leader", view("a b", servers="a b", b=HERE), Remove(v("b"))),
        ("a lost journal is superseded", view("a b c", b=HERE, c=GONE, c_2=HERE), Remove(v("c"))),
        ("… unless a voter that answers heard it", view("a b c", b=HERE, c=Peer(0, 60_000, 11_000), c_2=HERE), None),
        ("… or had long ago", view("a b c", b=HERE, c=Peer(0, 60_000, 12_000), c_2=HERE), Remove(v("c"))),
        ("… not so soon", view("a b c", leading_ms=11_000, b=HERE, c=GONE, c_2=HERE), None),
        ("… then the new one votes", view("a b", servers="a b c", b=HERE, c_2=HERE), Add(v("c/2"))),
        ("one of two dead voters of five", view("a b c d e", b=HERE, c=HERE, d=SILENT, e=SILENT, f=HERE, g=SILENT), Add(v("f"))),
        ("growth broke off: odd again", view("a b c d", servers="a b c d e f g", b=HERE, c=HERE, d=SILENT), Remove(v("d"))),
        ("two of three servers stay two", view("a b", servers="a b c", b=HERE), None),
        ("all voters have left the mesh", view("a b", servers="c", b=HERE, c=HERE), Remove(v("b"))),
        ("a newcomer from an empty zone", view("a", zones="a=x b=x c=y d=z", b=HERE, c=HERE, d=HERE), Add(v("c"))),
        ("two voters of one zone", view("a b c", zones="a=x b=y c=y d=z", b=HERE, c=HERE, d=HERE), Add(v("d"))),
        ("… and one of that zone goes", view("a b c d", zones="a=x b=y c=y d=z", b=HERE, c=HERE, d=HERE), Remove(v("c"))),
        ("… unless the newcomer fell silent", view("a b c d", zones="a=x b=y c=y d=z", b=HERE, c=HERE, d=Peer(0, 1500)), Remove(v("d"))),
        ("no zone gains by a swap", view("a b c", zones="a=x b=y c=y d=x", b=HERE, c=HERE, d=HERE), None),
        ("a new leader moves nobody yet", view("a b c", leading_ms=9000, zones="a=x b=y c=y d=z", b=HERE, c=HERE, d=HERE), None),
        ("one is silent: first things first", view("a b c", zones="a=x b=y c=y d=z", b=HERE, c=Peer(0, 5000), d=HERE), None),
        ("without a label it is its own zone", view("a b c", zones="a=x b=x c=y", b=HERE, c=HERE, d=HERE), Add(v("d"))),
    ],
)  # fmt: skip
def test_the_next_step(what: str, given_: View, decision: Decision) -> None:
    assert decide(given_) == decision, what


def test_a_newcomer_is_told_while_the_older_journal_of_its_node_is_heard() -> None:
    both = [(v("c/2"), v("c"))]
    assert seats_taken(view("a b c", b=HERE, c=HERE, c_2=HERE)) == both
    assert seats_taken(view("a b c", b=HERE, c=Peer(0, 60_000, 500), c_2=HERE)) == both
    assert seats_taken(view("a b c", b=HERE, c=Peer(0, 5_000), c_2=HERE)) == []
    assert seats_taken(view("a b", b=HERE, c_2=HERE)) == []


def test_whom_a_leader_feeds_beyond_the_voters() -> None:
    assert learners(view("a", b=HERE, c=HERE, d=HERE, e=HERE)) == (v("b"), v("c"), v("d"))
    assert learners(view("a b c", b=HERE, c=HERE, d=HERE, e=HERE)) == (v("d"),)
    assert learners(view("a", b=HERE)) == (v("b"),)
    assert learners(view("a b c", b=HERE, c=GONE, c_2=HERE)) == ()
    assert learners(view("a b c", zones="a=x b=x c=x d=x e=y", b=HERE, c=HERE, d=HERE, e=BEHIND)) == (v("d"), v("e"))


peers = st.builds(Peer, lag=st.sampled_from([0, 10, 5000]), silent_ms=st.sampled_from([0, 150, 900, 11_000, 99_000]))


@given(
    voters=st.sets(st.sampled_from("abcdefg"), min_size=1, max_size=7),
    known=st.dictionaries(st.sampled_from("abcdefgh"), peers),
    servers=st.sets(st.sampled_from("abcdefgh")),
    draining=st.sets(st.sampled_from("abcdefgh")),
    leading_ms=st.sampled_from([0, 5_000, 60_000]),
)
def test_a_step_changes_one_server_and_leaves_a_majority_that_answers(
    voters: set[str], known: dict[str, Peer], servers: set[str], draining: set[str], leading_ms: int
) -> None:
    me = min(voters)
    given_ = View(
        me=v(me),
        voters=tuple(v(name) for name in sorted(voters)),
        peers={v(name): peer for name, peer in known.items() if name != me},
        servers=[NodeId(name) for name in servers],
        draining=[NodeId(name) for name in draining],
        leading_ms=leading_ms,
    )
    match decide(given_):
        case Add(voter):
            assert voter not in given_.voters and node_of(voter) in servers and node_of(voter) not in draining
        case Remove(voter):
            rest = [other for other in given_.voters if other != voter]
            answering = [
                other for other in rest if other == given_.me or given_.peers.get(other, GONE).silent_ms <= 1000
            ]
            assert voter in given_.voters and voter != given_.me and len(answering) > len(rest) / 2
        case HandOver(to):
            assert to in given_.voters and to != given_.me
        case None:
            pass


# --- time ------------------------------------------------------------------------------------------------------------

DAY_MS = 86_400_000


def test_a_quorum_of_clocks_is_believed_and_one_wrong_clock_is_not() -> None:
    assert agreed_wall_ms(1000, [0, 2, 10 * 365 * DAY_MS], 3) == 1000
    assert agreed_wall_ms(1000, [-DAY_MS, 7, 5], 3) == 1005
    assert agreed_wall_ms(1000, [0, DAY_MS], 3) is None
    assert agreed_wall_ms(1000, [3], 3) is None


@given(st.lists(st.integers(-DAY_MS, DAY_MS), min_size=1, max_size=5), st.integers(1, 5))
def test_no_minority_moves_the_time_beyond_every_other_clock(offsets: list[int], voters: int) -> None:
    agreed = agreed_wall_ms(0, offsets, voters)
    if agreed is not None:
        assert sum(agreed <= offset <= agreed + 5000 for offset in offsets) >= voters // 2 + 1


def stamp(clock: OwnClock, own_ms: int, *, now_ms: int = 0, expected_ms: int = 0, **kind: bool) -> int:
    told = {"is_founding": False, "is_synchronised": False, **kind}
    return clock.wall_ms(now_ms=now_ms, own_ms=own_ms, expected_ms=expected_ms, **told)


def test_a_sole_voter_believes_its_own_clock_while_it_is_steady() -> None:
    clock = OwnClock()
    assert stamp(clock, 50 * 365 * DAY_MS, is_founding=True) == 50 * 365 * DAY_MS
    assert stamp(clock, 50 * 365 * DAY_MS + 90_000, now_ms=60_000) == 50 * 365 * DAY_MS + 90_000
    assert stamp(clock, 60 * 365 * DAY_MS, now_ms=70_000, expected_ms=77) == 77
    assert clock.is_refused


def test_a_sole_voter_believes_its_clock_again_once_an_operator_has_set_it_or_the_meshs() -> None:
    clock = OwnClock()
    stamp(clock, DAY_MS, is_founding=True)
    assert stamp(clock, 9 * DAY_MS, now_ms=1000, expected_ms=DAY_MS + 1000) == DAY_MS + 1000 and clock.is_refused
    # The mesh's time was set to what the clock says …
    assert stamp(clock, 9 * DAY_MS + 2000, now_ms=3000, expected_ms=9 * DAY_MS + 40_000) == 9 * DAY_MS + 2000
    assert not clock.is_refused
    # … which goes on where the mesh is ahead, as an operator may have wanted …
    assert stamp(clock, 9 * DAY_MS + 3000, now_ms=4000, expected_ms=30 * DAY_MS) == 30 * DAY_MS and clock.is_refused
    # … or the clock to what the mesh says.
    assert stamp(clock, DAY_MS, now_ms=4000, expected_ms=9 * DAY_MS) == 9 * DAY_MS and clock.is_refused
    assert stamp(clock, 9 * DAY_MS + 5, now_ms=4005, expected_ms=9 * DAY_MS + 5) == 9 * DAY_MS + 5


def test_after_a_start_a_small_jump_forward_is_believed_and_a_large_one_is_not() -> None:
    assert stamp(OwnClock(), 29 * DAY_MS) == 29 * DAY_MS
    assert stamp(OwnClock(), 31 * DAY_MS, expected_ms=5) == 5
    assert stamp(OwnClock(), 31 * DAY_MS, expected_ms=5, is_synchronised=True) == 31 * DAY_MS
    assert stamp(OwnClock(), 1, expected_ms=DAY_MS) == DAY_MS
