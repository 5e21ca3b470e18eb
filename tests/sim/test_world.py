"""Whole meshes on the real Raft, each from one number (see meshd.testing.sim); as many as CI has time for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from meshd.model import JobSpec, Run
from meshd.testing.campaign import CI_SEEDS, how_to_repeat, run_seed
from meshd.testing.sim import Sim

CHUNK = 20
"""Seeds in one test, so that all cores have some."""

LONG = JobSpec(backend=("process",), run=Run(args=("work", "30000", "0")))


@pytest.mark.parametrize("first", range(0, CI_SEEDS, CHUNK))
def test_every_acknowledged_job_finishes_and_no_rule_is_broken_whatever_goes_wrong(first: int) -> None:
    failed = [verdict for seed in range(first, first + CHUNK) if (verdict := run_seed(seed)).breach]

    assert not failed, "\n".join(f"{verdict}\n    {how_to_repeat(verdict, None)}" for verdict in failed)


def test_a_seed_is_a_complete_description_of_a_run() -> None:
    one, again, other = (Sim(seed).run().world.heap.digest() for seed in (7, 7, 19))

    assert one == again != other


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_seed_means_the_same_in_another_process(hash_seed: str) -> None:
    here = Sim(7).run().world.heap.digest()

    told = subprocess.run(
        [sys.executable, "-m", "meshd.testing.sim", "--seed", "7"],
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )

    assert here in told.stdout


@pytest.mark.parametrize("seed", range(10))
def test_a_node_restarted_within_two_seconds_loses_no_task_to_a_stale_lease(seed: int) -> None:
    sim = Sim(16 * seed)  # calm, but for this
    world = sim.world
    world.found(servers=3, workers=0)
    jobs = []
    world.heap.after(4_000, lambda: jobs.append(sim.client.submit(LONG)))
    world.heap.run(6_000, is_over=lambda: False)
    [task] = world.checks.tasks_of(jobs[0])
    node = world.nodes[task.node] if task.node is not None else None
    assert node is not None and node.runner.is_busy

    node.crash()
    world.heap.after(1_500, node.start)
    # Twelve seconds would be the end of the stale session; an election, at most 3 s, may come first.
    world.heap.run(world.heap.now_ms + 6_000, is_over=lambda: False)

    [again] = world.checks.tasks_of(jobs[0])
    assert (again.attempt, again.losses) == (2, 1)
    assert any(each.runner.is_busy for each in world.nodes.values())
