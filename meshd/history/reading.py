"""One answer over the core and the index: pure, from what each of them says of the same moment."""

from __future__ import annotations

from collections.abc import Sequence

from meshd import codec
from meshd.errors import NotFound
from meshd.history.segment import Piece
from meshd.model import JobId, TaskState
from meshd.raft.state.jobs import Job, Row
from meshd.raft.state.queries import PAGE_BYTES, ROW_BYTES, task_page
from meshd.views import Explain, Explanation, JobPage, JobView, TaskPage


def one_page(core: JobPage, archived: Sequence[JobView], next_archived: JobId | None, limit: int) -> JobPage:
    """Newest first. Each side is whole down to where its next page begins, so both are down to the newer of these."""
    floors = [at for at in (core.next, next_archived) if at is not None]
    floor = max(floors, default=None)
    jobs = sorted((*core.jobs, *archived), key=lambda job: job.id, reverse=True)
    if floor is not None:
        jobs = [job for job in jobs if job.id >= floor]
    shown, size = 0, 0
    while shown < min(len(jobs), limit) and size < PAGE_BYTES:
        size += ROW_BYTES + len(codec.encode(jobs[shown].spec))
        shown += 1
    if shown < len(jobs):
        jobs, floor = jobs[:shown], jobs[shown - 1].id
    return JobPage(tuple(jobs), floor, core.position)


def pieces_of(pieces: Sequence[Piece], tasks: Sequence[int]) -> list[Piece]:
    """Those in which these tasks may have a row; both are in order of tasks."""
    wanted: list[Piece] = []
    at = 0
    for piece in pieces:
        while at < len(tasks) and tasks[at] < piece.first:
            at += 1
        if at < len(tasks) and tasks[at] <= piece.last:
            wanted.append(piece)
    return wanted


def tasks_page(
    job: Job, chosen: Sequence[tuple[int, TaskState]], after: int | None, rows: dict[int, Row], position: int
) -> TaskPage:
    job.results = rows
    return task_page(job, chosen, after, position)


def explanation(job: Job, query: Explain, row: Row | None) -> Explanation:
    """Of a task that has ended: no node lacks anything any more. Raises NotFound."""
    if query.task >= job.spec.array.count:
        raise NotFound(f"job {job.id} has {job.spec.array.count} tasks", hint="tasks are numbered from 0")
    state = job.state_of(query.task) if row is None else row.state
    summary = f"{state.value}: {row.reason}" if row is not None and row.reason else state.value
    return Explanation(job.id, query.task, state, summary, (), can_ever_run=True)
