"""Who counts as another disk."""

from __future__ import annotations

from meshd.model import NodeId
from meshd.neighbours import takers_of

ONE, TWO = NodeId("one"), NodeId("two")


def test_the_dead_take_no_copies_while_somebody_lives() -> None:
    assert takers_of([ONE, TWO], {ONE}.__contains__, holds_log_alone=False) == (TWO,)


def test_who_thinks_all_others_dead_is_cut_off_and_goes_on_asking_them() -> None:
    assert takers_of([ONE, TWO], {ONE, TWO}.__contains__, holds_log_alone=False) == (ONE, TWO)


def test_the_only_voter_goes_on_alone_when_all_others_are_dead() -> None:
    assert takers_of([ONE], {ONE}.__contains__, holds_log_alone=True) == ()


def test_the_only_member_has_nobody_to_ask() -> None:
    assert takers_of([], set().__contains__, holds_log_alone=False) == ()
