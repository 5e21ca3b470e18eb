"""What can be asked: selectors, pages, explanations."""

from __future__ import annotations

from collections import UserList
from typing import Any

import pytest

from meshd import codec
from meshd.errors import Conflict, InvalidRequest, NotFound
from meshd.model import (
    Array,
    EndReason,
    Inline,
    ItemsInline,
    JobId,
    Needs,
    NodeId,
    Offer,
    OnLost,
    Outcome,
    Resources,
    TaskState,
)
from meshd.net.frames import BODY_BYTES_MAX
from meshd.raft.state import queries
from meshd.raft.state.commands import Cancel, Submit
from meshd.raft.state.ranges import Ranges
from meshd.views import Explain, GetJob, GetMembers, GetSummary, ListJobs, ListTasks
from tests.scene import BAD, GOOD, OFFER, WALL_MS, A, B, Scene, job_id, spec


def test_a_job_is_found_by_id_prefix_name_and_last():
    scene = Scene(A)
    first = scene.submit(spec(name="build"))
    second = scene.submit(spec(name="build"))
    third = scene.submit()
    assert scene.job(first).id == first
    assert scene.job("build").id == second
    assert scene.job("last").id == third
    assert scene.job(third[:36]).id == third
    with pytest.raises(Conflict):
        scene.job(first[:8])
    for nothing in ("nope", "abc", ""):
        with pytest.raises(NotFound):
            scene.job(nothing)


def test_a_unique_prefix_is_enough():
    scene = Scene(A)
    early = job_id(1, WALL_MS - 3_000_000)
    scene.do(A, Submit(early, spec()))
    scene.submit()
    assert scene.job(early[:8]).id == early


def test_jobs_are_paged_newest_first():
    scene = Scene(A)
    jobs = [scene.submit(spec(name=f"n{number % 2}", labels=(("team", str(number)),))) for number in range(5)]
    page = scene.machine.answer(ListJobs(limit=2))
    assert [view.id for view in page.jobs] == jobs[:2:-1] and page.next == jobs[3]
    rest = scene.machine.answer(ListJobs(limit=10, before=page.next))
    assert [view.id for view in rest.jobs] == jobs[2::-1] and rest.next is None
    assert [view.id for view in scene.machine.answer(ListJobs(name="n1")).jobs] == [jobs[3], jobs[1]]
    assert [view.id for view in scene.machine.answer(ListJobs(labels=(("team", "2"),))).jobs] == [jobs[2]]
    assert [view.id for view in scene.machine.answer(ListJobs(states=(TaskState.RUNNING,))).jobs] == [jobs[0]]
    with pytest.raises(InvalidRequest):
        scene.machine.answer(ListJobs(limit=0))


def test_tasks_are_paged_in_order_and_filtered_by_state():
    scene = Scene(A, slots=2)
    job = scene.submit(spec(count=1_000_000))
    scene.finish(A, BAD)
    scene.finish(A, GOOD)
    page = scene.machine.answer(ListTasks(job, limit=3))
    assert [(view.task, view.state) for view in page.tasks] == [
        (0, TaskState.FAILED),
        (1, TaskState.DONE),
        (2, TaskState.LEASED),
    ]
    assert page.next == 3
    found = scene.machine.answer(ListTasks(job, states=(TaskState.LEASED, TaskState.FAILED)))
    assert [view.task for view in found.tasks] == [0, 2, 3] and found.next is None
    ready = scene.machine.answer(ListTasks(job, states=(TaskState.READY,), start=500, limit=2))
    assert [view.task for view in ready.tasks] == [500, 501] and ready.next == 502


def test_a_page_of_a_job_looks_at_no_more_of_it_than_is_in_the_page():
    """Whose every other task failed: half a million ranges."""
    looked = 0

    class Bounds(UserList[int]):
        def __getitem__(self, at: Any) -> Any:
            nonlocal looked
            looked += 1
            return super().__getitem__(at)

    scene = Scene(A)
    job = scene.submit(spec(count=1_000_000))
    scene.machine._queue.jobs[job].ended[TaskState.FAILED] = Ranges(Bounds(range(1_000_000)), 500_000)
    for start in (0, 500_000):
        page = scene.machine.answer(ListTasks(job, states=(TaskState.FAILED, TaskState.SKIPPED), start=start))
        assert [view.task for view in page.tasks] == list(range(start, start + 200, 2)) and page.next == start + 200
    assert looked < 2_000


def jobs_with_many_items(scene: Scene, jobs: int) -> list[JobId]:
    """Each with a spec of 90 KB."""
    items = ItemsInline(tuple("x" * 90 for _ in range(1000)))
    return [scene.submit(spec(array=Array(count=1000, items=items))) for _ in range(jobs)]


def test_a_page_of_jobs_with_large_specs_fits_a_message():
    scene = Scene(A)
    jobs = jobs_with_many_items(scene, 60)
    found: list[JobId] = []
    before: JobId | None = None
    while len(found) < len(jobs):
        page = scene.machine.answer(ListJobs(before=before))
        assert page.jobs and len(codec.encode(page)) < BODY_BYTES_MAX
        found += [view.id for view in page.jobs]
        before = page.next
    assert found == jobs[::-1] and before is None


def test_a_page_of_tasks_with_large_outputs_fits_a_message():
    scene = Scene(A, slots=1000, offer=Offer(OFFER.backends, Resources(cpu_milli=10**9)))
    job = scene.submit(spec(count=1000))
    told = Outcome(EndReason.EXIT, exit_code=0, outputs=Inline(b"x" * 4096))
    keys = scene.leases(A)
    for at in range(0, 1000, 100):
        scene.report(A, *((key, told) for key in keys[at : at + 100]))
    found: list[int] = []
    start: int | None = 0
    while start is not None:
        page = scene.machine.answer(ListTasks(job, start=start, limit=1000))
        assert page.tasks and len(codec.encode(page)) < BODY_BYTES_MAX
        found += [view.task for view in page.tasks]
        start = page.next
    assert found == list(range(1000))


def test_of_many_nodes_fewer_leases_are_shown_each_and_all_are_counted():
    nodes = [A, *(NodeId(f"12D3KooW{number:044d}") for number in range(99))]
    scene = Scene(*nodes, slots=1000, offer=Offer(OFFER.backends, Resources(cpu_milli=10**9)))
    scene.submit(spec(count=100_000))
    view = scene.machine.answer(GetMembers())
    assert len(codec.encode(view)) < BODY_BYTES_MAX
    assert {(len(row.leased), row.leases) for row in view.members} == {(200, 1000)}
    [first] = [row for row in view.members if row.member.node == A]
    assert first.leased == scene.leases(A)[:200]


def test_a_job_with_many_rows_is_looked_through_part_by_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queries, "SCAN_MAX", 4)
    monkeypatch.setattr(queries, "TASKS_LOOKED_AT", 3)
    scene = Scene(A, slots=10)
    job = scene.submit(spec(count=10))
    keys = scene.leases(A)
    scene.report(A, running=(keys[8], keys[1], keys[5], keys[2], keys[9]))
    found: list[int] = []
    start: int | None = 0
    pages = 0
    while start is not None:
        page = scene.machine.answer(ListTasks(job, states=(TaskState.RUNNING,), start=start))
        found += [view.task for view in page.tasks]
        start, pages = page.next, pages + 1
    assert (found, pages) == ([1, 2, 5, 8, 9], 4)


def test_explain_names_what_each_node_lacks():
    scene = Scene(A, B, slots=0)
    scene.open(A, 1, slots=1)
    job = scene.submit(spec(needs=Needs(resources=Resources(gpu=1), labels="zone=eu")))
    found = scene.explain(job)
    assert found.nodes[0].lacks == ("label zone=eu", "gpu 1 (has gpu 0)") and found.nodes[0].is_permanent
    assert "never said" in found.nodes[1].lacks[0]
    assert not found.can_ever_run and "cannot run" in found.summary


def test_explain_tells_busy_from_impossible():
    scene = Scene(A)
    scene.submit()
    job = scene.submit()
    found = scene.explain(job)
    assert found.can_ever_run and found.nodes[0].lacks == ("a slot (1 of 1 taken)",)
    assert "become free" in found.summary
    with pytest.raises(NotFound):
        scene.machine.answer(Explain(job, 1))


def test_explain_tells_a_taken_resource():
    scene = Scene(A, slots=9, offer=Offer(OFFER.backends, Resources(cpu_milli=1500)))
    scene.submit()
    assert scene.explain(scene.submit()).nodes[0].lacks == ("cpu 1 (free cpu 0.5)",)


def test_the_summary_counts_the_whole_queue():
    scene = Scene(A)
    scene.submit(spec(count=10))
    job = scene.submit(spec(on_lost=OnLost.WAIT))
    scene.do(A, Cancel(job))
    summary = scene.machine.answer(GetSummary())
    assert (summary.jobs, summary.live_jobs) == (2, 1)
    assert (summary.counts.ready, summary.counts.leased, summary.counts.cancelled) == (9, 1, 1)
    assert summary.state_digest == scene.machine.digest()
    assert [backend.name for backend in summary.backends] == ["wasm"]


def test_members_are_shown_with_their_sessions():
    scene = Scene(A, B)
    job = scene.submit()
    scene.end(B)
    first, second = scene.machine.answer(GetMembers()).members
    assert (first.session, first.used.cpu_milli, [key.job for key in first.leased]) == ("live", 1000, [job])
    assert (second.session, second.epoch) == ("ended", 1)


def test_an_answer_says_its_position():
    scene = Scene(A)
    job = scene.submit()
    scene.tick(1)
    view = scene.machine.answer(GetJob(job))
    assert (view.version, view.position) == (scene.index - 1, scene.index)
