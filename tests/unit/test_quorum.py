"""What people are told when voters are missing, and when a voter cannot be done without."""

from __future__ import annotations

import pytest

from meshd.errors import Conflict
from meshd.quorum import check_without, describe_stop


@pytest.mark.parametrize(
    ("others", "heirs"),
    [
        ({"b": True, "c": True}, 0),
        ({"b": True, "c": False}, 1),  # a standby takes the seat
        ({}, 1),  # a sole voter, and another server
        ({"b": True, "c": True, "d": True, "e": False}, 0),
    ],
)
def test_a_voter_may_go_when_the_others_can_decide(others: dict[str, bool], heirs: int) -> None:
    check_without("a", others, heirs=heirs)


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"b": True, "c": False}, "1 is alive (b) of the other 2 voters, and 2 are needed"),
        ({"b": True, "c": True, "d": False, "e": False}, "2 are alive (b, c) of the other 4 voters, and 3 are needed"),
        ({"b": False, "c": False}, "none is alive of the other 2 voters"),
        ({}, "a is the only voter"),
    ],
)
def test_else_it_is_said_who_is_alive_and_how_many_are_needed(others: dict[str, bool], says: str) -> None:
    with pytest.raises(Conflict) as caught:
        check_without("a", others, heirs=0)
    assert says in caught.value.message
    assert all(name in caught.value.hint for name, is_alive in others.items() if not is_alive)


@pytest.mark.parametrize(
    ("voters", "says"),
    [
        ({}, ""),
        ({"a": True}, ""),
        ({"a": True, "b": True, "c": False}, ""),
        ({"a": True, "b": False, "c": False}, "1 is alive (a) of 3 voters, and 2 are needed: bring back b or c"),
        ({"a": True, "b": False}, "1 is alive (a) of 2 voters, and 2 are needed: bring back b"),
    ],
)
def test_why_nothing_is_decided(voters: dict[str, bool], says: str) -> None:
    told = describe_stop(voters)
    assert told.startswith(says) and bool(told) == bool(says)
