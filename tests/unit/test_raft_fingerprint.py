"""What replicas compare shows also what no answer has shown yet."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from meshd.model import TaskState
from meshd.raft.state.fingerprint import STRIDE
from meshd.raft.state.machine import Machine
from tests.scene import A, B, Scene, spec

JOBS = 100


def twins() -> tuple[Scene, Machine]:
    """A replica, and one that was restored from its snapshot."""
    scene = Scene(A, B, slots=4)
    for number in range(JOBS):
        scene.submit(spec(count=1 + number % 3))
    twin = Machine()
    twin.restore(scene.machine.capture()())
    assert twin.digest() == scene.machine.digest()
    return scene, twin


@pytest.mark.parametrize(
    "tamper",
    [
        lambda machine: setattr(machine._matching.nodes[B], "seq", 7),
        lambda machine: setattr(machine._matching.nodes[A], "slots", 5),
        lambda machine: setattr(machine._queue, "outcome_bytes", 1),
        lambda machine: machine._queue.totals.update({TaskState.READY: 1}),
        lambda machine: machine._members.revoked.update({B: None}),
        lambda machine: machine._queue.seen.remember(1),
        lambda machine: setattr(machine._queue, "lineage", ("r1",)),
        lambda machine: setattr(machine._queue, "recovered_wall_ms", 1),
        lambda machine: setattr(next(iter(machine._queue.jobs.values())), "hold", 1),
    ],
)
def test_sums_and_sessions_show_at_once(tamper: Callable[[Machine], None]) -> None:
    scene, twin = twins()
    tamper(twin)
    assert twin.digest() != scene.machine.digest()


def test_every_job_is_looked_at_in_turn() -> None:
    scene, twin = twins()
    for job in twin._queue.jobs.values():
        owner, job.owner = job.owner, "somebody else"
        found = set()
        for checkpoint in range(JOBS):
            scene.machine._moment.position = twin._moment.position = checkpoint * STRIDE
            found.add(twin.digest() != scene.machine.digest())
        assert found == {True, False}
        job.owner = owner


def test_who_leases_what_stays_in_the_hash_for_good() -> None:
    """Two nodes could run it: which of them does changes no answer to the submitter."""
    digests = set()
    for has_room, has_none in ((A, B), (B, A)):
        scene = Scene(A, B, slots=0)
        scene.open(has_room, 1, slots=1)
        scene.open(has_none, 1, slots=0)
        scene.machine._digest = b""
        scene.submit()
        digests.add(scene.machine._digest)
    assert len(digests) == 2
