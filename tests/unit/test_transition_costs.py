"""What one transition of the agreed state costs, against pure Python that runs beside it (python -m bench.transitions).

Each bound is twice what was measured when it was set: a change that makes `apply` twice as slow is seen here, the
machine that the test runs on is not. CPU of this thread counts, the best of some runs: the rest is noise.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.transitions import as_a_whole, calibrate, jobs_to_the_end, runs_to_the_end, singles_to_the_end

TASKS = 5_000
JOBS = 2_000
RUNS = 5


def units(measured: Callable[[], float]) -> float:
    return min(measured() / calibrate() for _ in range(RUNS))


@pytest.mark.parametrize(
    ("measured", "most"),
    [
        (lambda: runs_to_the_end(TASKS, 1), 2 * 2.1),
        (lambda: runs_to_the_end(TASKS, 10), 2 * 1.8),
        (lambda: singles_to_the_end(TASKS, 1), 2 * 92.0),
        (lambda: jobs_to_the_end(JOBS, 10)[1], 2 * 480.0),
    ],
    ids=["in runs", "in runs on ten nodes", "each with its outcome", "each a job with output"],
)
def test_a_lease_and_its_end_cost_what_they_did(measured: Callable[[], float], most: float) -> None:
    assert units(measured) < most


def test_a_submission_costs_what_it_did() -> None:
    assert units(lambda: jobs_to_the_end(JOBS, 10)[0]) < 2 * 120.0


def test_a_task_of_a_large_array_costs_what_one_of_a_small_array_does() -> None:
    small, large = (units(lambda tasks=tasks: runs_to_the_end(tasks, 1)) for tasks in (10_000, 100_000))  # type: ignore[misc]

    assert large < 1.5 * small


def test_a_job_of_a_million_tasks_is_submitted_asked_for_and_cancelled_like_a_small_one() -> None:
    """In seconds of the slowest machine: what is bounded is that nothing looks at each of the million."""
    assert {step: took_s for step, took_s in as_a_whole(1_000_000) if took_s >= 0.1} == {}
