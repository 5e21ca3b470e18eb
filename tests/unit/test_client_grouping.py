"""How calls become tasks: long ones alone, short ones together, every core with something to do."""

from __future__ import annotations

import pytest

from meshd.client.grouping import CALLS_MAX, GUESS_MAX, TASK_S, WORTH_S, Pace, group_size


@pytest.mark.parametrize("waiting", [1, 7, 10_000])
def test_a_long_call_goes_alone(waiting: int) -> None:
    assert group_size(waiting, TASK_S, cores=2) == 1
    assert group_size(waiting, 3600.0, cores=2) == 1


def test_calls_of_a_microsecond_share_a_task() -> None:
    assert group_size(100_000, 1e-6, cores=2) >= 10_000
    assert group_size(10**7, 0.0, cores=1) == CALLS_MAX


def test_few_calls_of_some_length_are_spread_over_all_cores() -> None:
    assert group_size(16, 0.1, cores=8) == 1
    assert group_size(64, 0.1, cores=8) == 4


def test_work_too_small_to_split_is_one_task() -> None:
    assert group_size(100, WORTH_S / 200, cores=8) >= 100


def test_a_group_holds_no_more_work_than_a_task_is_worth() -> None:
    assert group_size(10**6, 0.01, cores=2) == int(TASK_S / 0.01)


def test_what_nobody_knows_is_guessed_within_a_bound() -> None:
    assert group_size(1, None, cores=4) == 1
    assert group_size(8, None, cores=4) == 1
    assert group_size(10**6, None, cores=1) == GUESS_MAX


def test_a_pace_follows_what_is_measured() -> None:
    pace = Pace()
    assert pace.call_s is None
    pace.learn(0, 1.0)
    assert pace.call_s is None
    pace.learn(10, 1.0)
    assert pace.call_s == pytest.approx(0.1)
    for _ in range(20):
        pace.learn(1, 2.0)
    assert pace.call_s == pytest.approx(2.0, rel=0.01)
