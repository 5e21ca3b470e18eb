"""Which range from whom: nobody is blamed without proof, nobody who lied stays."""

from __future__ import annotations

from meshd.blobs.plan import RANGE_BYTES, Plan, Range
from meshd.model import NodeId

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def give(plan: Plan, source: NodeId, digest: str, count: int = 99) -> None:
    for _ in range(count):
        if (wanted := plan.take(source)) is None:
            return
        plan.arrived(source, wanted.index, digest)


def test_ranges_cover_the_blob_once_in_order() -> None:
    plan = Plan(2 * RANGE_BYTES + 1)
    assert [plan.take(source) for source in (A, B, A, B)] == [
        Range(0, 0, RANGE_BYTES),
        Range(1, RANGE_BYTES, RANGE_BYTES),
        Range(2, 2 * RANGE_BYTES, 1),
        None,
    ]


def test_what_a_lost_source_was_asked_for_comes_next_and_what_it_gave_stays() -> None:
    plan = Plan(4 * RANGE_BYTES)
    give(plan, A, "right", 1)
    plan.take(A)
    plan.take(A)
    plan.lost(A)
    assert plan.bytes_given == RANGE_BYTES
    assert plan.take(B) == Range(1, RANGE_BYTES, RANGE_BYTES)


def test_one_source_of_a_wrong_whole_is_a_liar() -> None:
    plan = Plan(3 * RANGE_BYTES)
    give(plan, A, "wrong")
    assert plan.judge(is_right=False) == {A}
    plan.begin([B])
    give(plan, B, "right")
    assert plan.is_complete and plan.judge(is_right=True) == set()


def test_several_sources_of_a_wrong_whole_are_judged_by_the_right_one() -> None:
    plan = Plan(4 * RANGE_BYTES)
    give(plan, A, "wrong", 1)
    give(plan, B, "right", 1)
    give(plan, C, "right")
    assert plan.judge(is_right=False) == set()
    plan.begin([A, B, C])
    assert plan.take(A) is None and plan.take(B) is None  # C, who gave most, gives the rest alone
    give(plan, C, "right")
    assert plan.is_complete and plan.judge(is_right=True) == {A}


def test_who_has_to_give_all_and_is_gone_is_replaced() -> None:
    plan = Plan(4 * RANGE_BYTES)
    give(plan, A, "wrong", 1)
    give(plan, C, "right")
    plan.judge(is_right=False)
    plan.begin([A, B])
    assert plan.take(B) == Range(0, 0, RANGE_BYTES)
    assert plan.take(A) is None
    plan.lost(B)
    assert plan.take(A) == Range(0, 0, RANGE_BYTES)
