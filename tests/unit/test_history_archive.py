"""The archive of a server with a sole voter's log: what it answers is what the core would have, had it kept everything."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from msgspec.structs import replace

from meshd import codec
from meshd.blobs.store import Store
from meshd.errors import Conflict, Corrupt, MeshError, NotFound, Unavailable
from meshd.history import archive as archive_module
from meshd.history.archive import Archive
from meshd.history.index import Index
from meshd.history.segment import entries, pack
from meshd.model import Array, BlobRef, EndReason, Inline, ItemsInline, NodeId, Offer, Outcome, Resources, TaskState
from meshd.net.frames import BODY_BYTES_MAX
from meshd.ports import Committed, ProposeResult
from meshd.raft.state import history
from meshd.raft.state.commands import AnyCommand, Cancel, Command
from meshd.raft.state.history import Tail
from meshd.raft.state.jobs import JobRecord
from meshd.views import Explain, GetJob, GetSummary, ListJobs, ListTasks
from tests.scene import OFFER, A, Scene, spec

ME = "node-a/1"


class SoleLog:
    """Commits what is proposed at once."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.me = ME
        self.voter_ids = (ME,)
        self.is_leading = True

    def leads(self) -> bool:
        return self.is_leading

    async def propose(self, origin: NodeId, command: bytes, *, timeout_s: float) -> ProposeResult:
        await trio.lowlevel.checkpoint()
        decoded: Command = codec.decode(command, AnyCommand)
        return Committed(codec.encode(self.scene.do(origin, decoded)), self.scene.index)


async def nobody_has(ref: BlobRef) -> None:
    await trio.lowlevel.checkpoint()
    raise NotFound(f"nobody has {ref.hash}")


@asynccontextmanager
async def serving(
    scene: Scene, directory: Path, fetch: Callable[[BlobRef], Any] = nobody_has
) -> AsyncIterator[tuple[Archive, Store]]:
    store = await Store.open(directory / "blobs", free_bytes_min=0)
    archive = Archive(A, scene.machine, SoleLog(scene), directory / "index.sqlite", tail=EAGER)
    async with trio.open_nursery() as nursery:
        await nursery.start(archive.serve, store, fetch)
        yield archive, store
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], archive: Archive) -> None:
    with trio.fail_after(20):
        while not condition():
            archive.applied()
            await trio.sleep(0.01)


EAGER = Tail(jobs=5, batch=1, segment_jobs=7)


def some_work(scene: Scene, seed: int, jobs: int) -> list[str]:
    """Jobs of all kinds, nearly all of them over; the clock moves on, so that ids differ early."""
    rng = random.Random(seed)
    ids: list[str] = []
    for number in range(jobs):
        labels = tuple(sorted({("team", rng.choice("ab")), ("n", str(number % 4))}))
        ids.append(
            scene.submit(spec(count=rng.choice((1, 1, 3, 700)), name=rng.choice(("", "build", "test")), labels=labels))
        )
        scene.tick(rng.choice((1, 70_000)))
        for _ in range(rng.choice((2, 5))):
            if scene.leases(A):
                says = Inline(f"task {number}".encode()) if rng.random() < 0.5 else None
                scene.finish(A, Outcome(EndReason.EXIT, exit_code=rng.choice((0, 0, 1)), stdout=says))
        if rng.random() < 0.3:
            scene.do(A, Cancel(rng.choice(ids)))
    while scene.leases(A) and rng.random() < 0.999:
        scene.finish(A)
    return ids


def questions(ids: list[str]) -> list[Any]:
    asked: list[Any] = [
        GetJob("last"),
        GetJob("build"),
        GetJob("test"),
        GetJob("nothing"),
        GetJob(ids[0][:9]),
        GetSummary(),
    ]
    for job in ids:
        asked += [
            GetJob(job),
            ListTasks(job),
            ListTasks(job, states=(TaskState.FAILED, TaskState.DONE), start=1, limit=3),
        ]
        asked += [GetJob(job[:34]), ListTasks(job, start=250, stop=300, limit=1000)]
    for states in ((), (TaskState.DONE,), (TaskState.FAILED, TaskState.CANCELLED), (TaskState.RUNNING,)):
        for name in ("", "build"):
            for labels in ((), (("team", "a"),), (("team", "b"), ("n", "1"))):
                asked.append(ListJobs(states, name, labels, limit=1000))
    return asked


async def said(answer: Callable[[Any], Any], query: Any) -> Any:
    try:
        return await answer(query)
    except MeshError as error:
        return type(error), error.message


def without_position(view: Any) -> Any:
    plain = codec.unpack(codec.encode(view)) if not isinstance(view, tuple) else view

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(each) for key, each in value.items() if key not in ("position", "state_digest")}
        return [strip(each) for each in value] if isinstance(value, list | tuple) else value

    return strip(plain)


@pytest.mark.parametrize("seed", range(4))
async def test_one_answer_over_core_and_history(tmp_path: Path, seed: int):
    kept, moved = Scene(A, slots=2), Scene(A, slots=2)
    ids = some_work(kept, seed, 60)
    assert some_work(moved, seed, 60) == ids
    async with serving(moved, tmp_path) as (archive, _):
        await until(lambda: len(moved.machine._queue.finished) <= 5, archive)
        assert moved.machine.history.dropped > 1

        async def ask(query: Any) -> Any:
            return await archive.answer(query, timeout_s=5)

        async def ask_core(query: Any) -> Any:
            return kept.machine.answer(query)

        for query in questions(ids):
            mine, expected = await said(ask, query), await said(ask_core, query)
            assert without_position(mine) == without_position(expected), query
        for labels in ((), (("team", "a"),)):
            paged, before = [], None
            while True:
                page = await archive.answer(ListJobs(labels=labels, limit=4, before=before), timeout_s=5)
                paged += [view.id for view in page.jobs]
                if (before := page.next) is None:
                    break
            whole = kept.machine.answer(ListJobs(labels=labels, limit=1000)).jobs
            assert paged == [view.id for view in whole]
        gone = next(job for job in ids if moved.machine.find(job) is None)
        shown = await archive.answer(Explain(gone, 0), timeout_s=5)
        assert shown.state is kept.task(gone).state and gone not in (None, "")


async def test_pages_over_core_and_history_fit_a_message_and_lead_to_the_end(tmp_path: Path):
    scene = Scene(A, slots=1000, offer=Offer(OFFER.backends, Resources(cpu_milli=10**9)))
    told = scene.submit(spec(count=1000))
    keys = scene.leases(A)
    for at in range(0, 1000, 100):
        outcome = Outcome(EndReason.EXIT, exit_code=0, outputs=Inline(b"x" * 4096))
        scene.report(A, *((key, outcome) for key in keys[at : at + 100]))
    items = ItemsInline(tuple("x" * 90 for _ in range(1000)))
    jobs = [told, *(scene.submit(spec(array=Array(count=1000, items=items), backend=("none",))) for _ in range(110))]
    for job in jobs[1:60]:
        scene.do(A, Cancel(job))
    async with serving(scene, tmp_path) as (archive, _):
        await until(lambda: len(scene.machine._queue.finished) <= 5, archive)
        listed: list[str] = []
        before = None
        while len(listed) < len(jobs):
            page = await archive.answer(ListJobs(limit=1000, before=before), timeout_s=5)
            assert page.jobs and len(codec.encode(page)) < BODY_BYTES_MAX
            listed += [view.id for view in page.jobs]
            before = page.next
        assert listed == jobs[::-1] and before is None
        tasks: list[int] = []
        start: int | None = 0
        while start is not None:
            found = await archive.answer(ListTasks(told, start=start, limit=1000), timeout_s=5)
            assert found.tasks and len(codec.encode(found)) < BODY_BYTES_MAX
            tasks += [view.task for view in found.tasks]
            start = found.next
        assert tasks == list(range(1000)) and scene.machine.find(told) is None


async def test_a_lost_index_is_made_from_the_segments_and_a_damaged_one_too(tmp_path: Path):
    scene = Scene(A, slots=2)
    some_work(scene, 1, 40)
    async with serving(scene, tmp_path) as (archive, _):
        await until(lambda: len(scene.machine._queue.finished) <= 5, archive)
        before = await archive.answer(ListJobs(limit=1000), timeout_s=5)
    index = tmp_path / "index.sqlite"
    for damage in (b"", b"no database at all" * 1000):
        for each in tmp_path.glob("index.sqlite-*"):
            each.unlink()
        index.write_bytes(damage)
        async with serving(scene, tmp_path) as (archive, _):
            after = await archive.answer(ListJobs(limit=1000), timeout_s=5)
            assert [view.id for view in after.jobs] == [view.id for view in before.jobs]


async def test_an_index_that_goes_bad_while_it_is_used_is_made_anew(tmp_path: Path):
    scene = Scene(A, slots=2)
    some_work(scene, 1, 40)
    async with serving(scene, tmp_path) as (archive, _):
        await until(lambda: len(scene.machine._queue.finished) <= 5, archive)
        before = await archive.answer(ListJobs(limit=1000), timeout_s=5)
        archive._index._writer.execute("DROP TABLE labels")
        archive._index._writer.commit()
        with pytest.raises(Unavailable):
            await archive.answer(ListJobs(labels=(("team", "a"),)), timeout_s=5)
        with trio.fail_after(20):
            while True:
                try:
                    await archive.answer(ListJobs(labels=(("team", "a"),)), timeout_s=5)
                    break
                except Unavailable:
                    await trio.sleep(0.02)
        after = await archive.answer(ListJobs(limit=1000), timeout_s=5)
        assert [view.id for view in after.jobs] == [view.id for view in before.jobs]


async def test_segments_that_are_gone_or_damaged_are_fetched_and_told_as_missing_until_then(tmp_path: Path):
    scene = Scene(A, slots=2)
    ids = some_work(scene, 2, 40)
    copies: dict[str, bytes] = {}
    async with serving(scene, tmp_path) as (archive, store):
        await until(lambda: len(scene.machine._queue.finished) <= 5, archive)
        last = scene.machine.history.last
        for segment in scene.machine.history.segments.values():
            copies[segment.hash] = store.path(segment.hash).read_bytes()
        with pytest.raises(Conflict):
            await store_remove_guarded(store, archive, next(iter(copies)))
        before = [await said(lambda q: archive.answer(q, timeout_s=5), ListTasks(job)) for job in ids]
        first, second = list(copies)[:2]
        store.keeps = lambda blob: False
        damaged = store.path(second)
    damaged.chmod(0o600)
    damaged.write_bytes(copies[second][:200] + b"\xff" + copies[second][201:])
    (tmp_path / "index.sqlite").unlink()
    for each in tmp_path.rglob(first):
        each.unlink()
    is_fetching_allowed = False

    async def fetch(ref: BlobRef) -> None:
        if not is_fetching_allowed:
            await nobody_has(ref)
        await new_store.put_bytes(copies[ref.hash])

    async with serving(scene, tmp_path, fetch) as (archive, new_store):
        await until(lambda: scene.machine.history.upto(A) == 0, archive)
        with pytest.raises(Unavailable):
            await archive.answer(ListJobs(), timeout_s=0.1)
        assert await archive.answer(ListJobs(), timeout_s=0.1, is_stale_ok=True)
        is_fetching_allowed = True
        archive._later.clear()
        await until(lambda: scene.machine.history.upto(A) == last, archive)
        after = [await said(lambda q: archive.answer(q, timeout_s=5), ListTasks(job)) for job in ids]
        assert [without_position(view) for view in after] == [without_position(view) for view in before]


async def store_remove_guarded(store: Store, archive: Archive, blob: str) -> None:
    store.keeps = archive.names
    await store.remove(blob)


async def test_a_bit_that_turned_over_is_found_by_who_reads_the_task(tmp_path: Path):
    scene = Scene(A, slots=2)
    job = scene.submit(spec(count=600))
    while scene.leases(A):
        scene.finish(A, Outcome(EndReason.EXIT, exit_code=0, stdout=Inline(b"said")))
    some_work(scene, 3, 30)
    async with serving(scene, tmp_path) as (archive, store):
        await until(lambda: len(scene.machine._queue.finished) <= 5, archive)
        segment = scene.machine.history.segments[1]
        good = store.path(segment.hash).read_bytes()

        async def fetch(ref: BlobRef) -> None:
            await store.put_bytes(good)

        archive._fetch = fetch
        path = store.path(segment.hash)
        path.chmod(0o600)
        at = good.index(b"said")
        path.write_bytes(good[:at] + b"paid" + good[at + 4 :])
        with pytest.raises(Unavailable):
            await archive.answer(ListTasks(job, start=0, stop=2), timeout_s=5)
        await until(lambda: store.has(segment.hash), archive)
        page = await archive.answer(ListTasks(job, start=0, stop=2), timeout_s=5)
        assert [view.outcome.stdout for view in page.tasks] == [Inline(b"said")] * 2


async def test_what_is_too_old_leaves_disk_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scene = Scene(A, slots=2)
    ids = some_work(scene, 5, 40)
    async with serving(scene, tmp_path) as (archive, store):
        await until(lambda: len(scene.machine._queue.finished) <= 5, archive)
        first = scene.machine.history.segments[1]
        monkeypatch.setattr(history, "HISTORY_JOBS_MAX", scene.machine._queue.archived_jobs - 1)
        scene.tick(1)
        assert scene.machine.history.oldest == 2
        await until(lambda: not store.has(first.hash) and 1 not in archive._indexed, archive)
        with pytest.raises(NotFound):
            await archive.answer(GetJob(ids[0]), timeout_s=5)
        with pytest.raises(NotFound):
            await archive.answer(GetJob(first.last), timeout_s=5)


async def test_what_is_too_old_leaves_the_disk_also_when_it_could_not_be_removed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scene = Scene(A, slots=2)
    some_work(scene, 5, 40)
    async with serving(scene, tmp_path) as (archive, store):
        await until(lambda: len(scene.machine._queue.finished) <= 5, archive)
        first = scene.machine.history.segments[1]
        remove, failures = store.remove, [Unavailable("the disk does not answer")]

        async def fails_once(blob: str) -> bool:
            if failures:
                raise failures.pop()
            return await remove(blob)

        monkeypatch.setattr(store, "remove", fails_once)
        monkeypatch.setattr(history, "HISTORY_JOBS_MAX", scene.machine._queue.archived_jobs - 1)
        scene.tick(1)
        await until(lambda: not store.has(first.hash) and 1 not in archive._indexed, archive)


async def test_a_segment_too_large_for_the_index_keeps_no_other_job_from_being_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scene = Scene(A, slots=2)
    small, large = scene.submit(), scene.submit(spec(count=20))
    after = [scene.submit() for _ in range(10)]
    while scene.leases(A):
        scene.finish(A, Outcome(EndReason.EXIT, exit_code=0, stdout=Inline(random.Random(1).randbytes(4000))))
    monkeypatch.setattr(archive_module, "SEGMENT_BYTES_MAX", 40_000)
    monkeypatch.setattr(history, "SEGMENT_ROWS_MAX", 5)
    async with serving(scene, tmp_path) as (archive, _):
        await until(lambda: len(scene.machine._queue.finished) <= 5, archive)
        page = await archive.answer(ListJobs(), timeout_s=5)
        assert {job.id for job in page.jobs} == {small, *after}
        with pytest.raises(NotFound):
            await archive.answer(GetJob(large), timeout_s=5)


async def test_what_became_too_old_while_it_was_fetched_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scene = Scene(A, slots=2)
    some_work(scene, 5, 40)
    async with serving(scene, tmp_path) as (archive, store):
        await until(lambda: len(scene.machine._queue.finished) <= 5, archive)
        first = scene.machine.history.segments[1]
        data = store.path(first.hash).read_bytes()
        store.keeps = lambda blob: False
        await store.remove(first.hash)
    (tmp_path / "index.sqlite").unlink()
    is_open, came = trio.Event(), trio.Event()

    async def fetch(ref: BlobRef) -> None:
        await is_open.wait()
        monkeypatch.setattr(history, "HISTORY_JOBS_MAX", scene.machine._queue.archived_jobs - 1)
        scene.tick(1)
        await new_store.put_bytes(data)
        came.set()

    async with serving(scene, tmp_path, fetch) as (archive, new_store):
        is_open.set()
        with trio.fail_after(20):
            await came.wait()
        await until(lambda: not new_store.has(first.hash), archive)


async def test_nobody_seals_who_does_not_lead(tmp_path: Path):
    scene = Scene(A, slots=2)
    some_work(scene, 1, 30)
    async with serving(scene, tmp_path) as (archive, _):
        archive._log.is_leading = False
        await trio.sleep(0.2)
        assert scene.machine.history.last <= 1, "what was under way when it stopped leading"


def test_a_segment_has_the_same_bytes_whatever_the_order_of_the_rows():
    scene = Scene(A, slots=3)
    job = scene.submit(spec(count=3))
    while scene.leases(A):
        scene.finish(A, Outcome(EndReason.EXIT, exit_code=1, message="no"))
    record: JobRecord = scene.machine.find(job).recorded()
    turned = replace(record, results=dict(reversed(record.results.items())), ended=record.ended[::-1])
    assert b"".join(pack(1, [record])) == b"".join(pack(1, [turned]))
    [(_, entry)] = entries(1, b"".join(pack(1, [record])))
    assert entry.record.id == job and [piece.first for piece in entry.pieces] == [0]


def test_an_index_of_another_version_is_not_read(tmp_path: Path):
    with sqlite3.connect(tmp_path / "i") as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(Corrupt):
        Index(tmp_path / "i").open()
