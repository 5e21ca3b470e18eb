"""A leader answers on the stream of today what the process of yesterday has asked (seed 78 of the simulated mesh)."""

from __future__ import annotations

from meshd.model import NodeId
from meshd.ports import Committed, ProposeResult
from meshd.raft.messages import Proposed, voter_id
from meshd.raft.proposals import Forwarded, Proposal, first_request
from meshd.raft.reads import Reads

ME, LEADER = NodeId("me"), voter_id(NodeId("leader"), "aa")


def test_an_answer_to_the_process_before_is_not_taken_for_ours() -> None:
    results: list[ProposeResult] = []
    before, now = Forwarded(first_request(1)), Forwarded(first_request(2))
    older = before.add(LEADER, Proposal(ME, b"a", lambda result: None))
    ours = now.add(LEADER, Proposal(ME, b"b", results.append))

    now.answered(LEADER, Proposed(older, "committed", b"answer to a", 7))
    assert results == []

    now.answered(LEADER, Proposed(ours, "committed", b"answer to b", 8))
    assert results == [Committed(b"answer to b", 8)]


def test_a_position_told_to_the_process_before_serves_no_reader_of_ours() -> None:
    positions: list[int] = []
    before, now = Reads(first_request(1)), Reads(first_request(2))
    older = before.begin_remote(LEADER)
    now.ask(positions.append)
    ours = now.begin_remote(LEADER)

    now.answered(LEADER, older, 7)
    assert positions == []

    now.answered(LEADER, ours, 8)
    assert positions == [8]


def test_every_start_has_numbers_of_its_own_that_fit_a_frame() -> None:
    assert first_request(1) + (1 << 32) <= first_request(2)
    assert first_request(0xFFFFF) + (1 << 32) <= 1 << 53
