"""Submit, lease, report: the ordinary life of tasks, and who may finish one."""

from __future__ import annotations

from meshd.model import Array, TaskState
from meshd.raft.commands import Reported
from tests.scene import BAD, GOOD, A, B, Scene, spec


def test_a_job_is_leased_in_the_entry_that_brings_it():
    scene = Scene(A)
    job = scene.submit()
    [key] = scene.leases(A)
    assert scene.state(job) is TaskState.LEASED
    assert scene.notices() == [key]
    assert key.attempt == 1


def test_a_finished_task_gives_its_slot_to_the_next():
    scene = Scene(A)
    first, second = scene.submit(), scene.submit()
    assert scene.finish(A) == Reported()
    assert scene.job(first).state is TaskState.DONE and scene.job(first).is_final
    assert scene.state(second) is TaskState.LEASED
