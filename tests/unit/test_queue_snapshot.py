"""Snapshots: consistent though packed later, whole after a restore, refused when they are not; and the same everywhere."""

from __future__ import annotations

import pytest

from meshd.errors import Corrupt
from meshd.model import BackendOffer, EndReason, Inline, Needs, NodeId, Offer, Outcome, Resources
from meshd.raft.state import leases
from meshd.raft.state.commands import Cancel, Command, OpenSession, Report, Submit
from meshd.raft.state.machine import Machine
from tests.scene import BAD, GOOD, OFFER, A, B, C, Scene, job_id, spec

TOLD = Outcome(reason=EndReason.EXIT, exit_code=0, stdout=Inline(b"said"))


def test_what_was_captured_does_not_change_while_it_waits_to_be_packed():
    scene = Scene(A, slots=200)
    job = scene.submit(spec(count=300, attempts=2))
    for outcome in (GOOD, BAD, TOLD):
        scene.finish(A, outcome)
    at_once = scene.machine.capture()()
    later = scene.machine.capture()
    scene.report(A, *((key, TOLD) for key in scene.leases(A)))
    scene.submit()
    scene.do(A, Cancel(job))
    assert later() == at_once
    assert scene.machine.capture()() != at_once


def test_a_restored_replica_goes_on_as_the_others_do():
    scene = Scene(A, B, slots=40)
    scene.submit(spec(count=5000, attempts=2))
    for _ in range(60):
        scene.report(A, *((key, TOLD) for key in scene.leases(A)))
        scene.report(B, *((key, BAD) for key in scene.leases(B)))
    restored = Machine()
    restored.restore(scene.machine.capture()())
    assert restored.digest() == scene.machine.digest()
    position = scene.index
    scene.finish(A, GOOD)
    scene.end(B)
    scene.tick(100)
    for at in range(position, scene.index):
        restored.apply(at + 1, scene.entries[at])
    assert restored.digest() == scene.machine.digest()
    assert restored.capture()() == scene.machine.capture()()


def test_a_bad_snapshot_is_refused_and_changes_nothing():
    scene = Scene(A)
    scene.submit(spec(count=200))
    data = scene.machine.capture()()
    for bad in (b"", b"\x90", data[:-1], data[: len(data) // 2], b"\xc1" + data):
        with pytest.raises(Corrupt):
            scene.machine.restore(bad)
    assert scene.machine.capture()() == data


def test_a_replica_that_did_something_else_is_told_by_its_digest():
    one, other = Scene(A), Scene(A)
    one.submit()
    other.submit(spec(count=2))
    assert one.machine.digest() != other.machine.digest()


def test_a_lease_that_a_wrong_report_has_told_apart_is_the_same_in_a_snapshot():
    scene = Scene(A, B)
    job = scene.submit()
    [key] = scene.leases(A)
    scene.report(B, (key, TOLD))
    copy = Machine()
    copy.restore(scene.machine.capture()())
    assert copy.digest() == scene.machine.digest() and scene.job(job).counts.leased == 1


def test_a_replica_restored_between_two_entries_leases_what_was_left_as_the_others_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leases, "LEASES_PER_ENTRY_MAX", 1)
    scene = Scene(A, B, C, slots=0)
    jobs = [scene.submit(spec(count=3, priority=priority)) for priority in (10, 30, 20)]
    ahead = tuple((job, 1) for job in jobs)
    commands: list[tuple[NodeId, Command]] = []
    for node in (B, A, C):
        commands += [(node, OpenSession(1, (), 2, OFFER)), (node, Report(1, 1, ahead=ahead))]
    scene.batch(*commands)
    entries = 0
    while scene.machine.next_timer_ms() == 0:
        copy = Machine()
        copy.restore(scene.machine.capture()())
        scene.batch()
        copy.apply(scene.index, scene.entries[-1])
        assert copy.digest() == scene.machine.digest()
        assert [copy.leases_of(node, 1) for node in (A, B, C)] == [scene.leases(node) for node in (A, B, C)]
        entries += 1
    assert entries > 3 and sum(len(scene.leases(node)) for node in (A, B, C)) == 9


def test_what_one_entry_brought_and_could_not_lease_comes_in_the_same_order_to_a_restored_replica(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(leases, "LEASES_PER_ENTRY_MAX", 1)
    scene = Scene(A, B, C, slots=2)
    kinds = [spec(priority=priority, needs=Needs(Resources(memory=priority))) for priority in (10, 40, 20, 50, 30)]
    scene.batch(*[(A, Submit(job_id(number), kind)) for number, kind in enumerate(kinds, 1)])
    while scene.machine.next_timer_ms() == 0:
        copy = Machine()
        copy.restore(scene.machine.capture()())
        scene.batch()
        copy.apply(scene.index, scene.entries[-1])
        assert copy.digest() == scene.machine.digest()
    assert [scene.task(job_id(number)).fence for number in (1, 4, 2, 5, 3)] == [1, 2, 3, 4, 5]


def test_what_woke_is_the_same_to_a_replica_that_was_restored_after_the_first_job_of_a_kind_had_ended(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(leases, "LEASES_PER_ENTRY_MAX", 1)
    offer = Offer((BackendOffer("wasm"), BackendOffer("process")), OFFER.resources)
    one, other = spec(backend=("wasm", "process")), spec(backend=("process", "wasm"))
    scene = Scene(A, B, slots=0)
    for kind in (one, other, other, other, one, one):
        scene.submit(kind)
    scene.open(B, 1, slots=1, offer=offer)
    scene.finish(B)
    copy = Machine()
    copy.restore(scene.machine.capture()())
    scene.open(A, 1, slots=4, offer=offer)
    while scene.machine.next_timer_ms() == 0:
        copy.apply(scene.index, scene.entries[-1])
        assert copy.digest() == scene.machine.digest()
        assert copy.capture()() == scene.machine.capture()()
        scene.batch()
    assert len(scene.leases(A)) == 4


def test_an_entry_that_leased_just_as_much_as_it_may_has_nothing_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leases, "LEASES_PER_ENTRY_MAX", 2)
    scene = Scene(A, B, C)
    scene.submit(spec(count=2))
    assert scene.machine.next_timer_ms() is None
    copy = Machine()
    copy.restore(scene.machine.capture()())
    assert copy.digest() == scene.machine.digest()
