"""Jobs over HTTP: submit, look, wait, read the output, cancel, run again, explain."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Annotated, Any

from msgspec import Meta, Struct

from meshd import codec
from meshd.api.endpoint import PROPOSE_S, QUERY_S, Call, Endpoint, ReadQuery, Rights
from meshd.api.face import LogStream
from meshd.api.references import collect_refs, outputs_tree, resolve
from meshd.api.streams import ByteStream, EventStream, format_event
from meshd.errors import Conflict, InvalidRequest, NotFound, TooLarge
from meshd.ids import is_job_id, new_job_id
from meshd.model import Count, JobId, TaskState, TreeRef
from meshd.raft.state.commands import RETRY_RANGES_MAX, Cancel, ReleaseJob, RetryJob, Submit, Submitted
from meshd.spec import parse_job
from meshd.views import (
    PAGE_MAX,
    EventView,
    Explain,
    Explanation,
    GetJob,
    JobPage,
    JobView,
    ListJobs,
    ListTasks,
    LogView,
    TaskPage,
    TaskView,
)

SPEC_BYTES_MAX = 1 << 20
"""A document; what it becomes has to fit a command (512 KiB). Long lists and files are blobs."""
WAIT_S_MAX = 60.0
"""One long poll; the client asks again."""

State = Annotated[str, Meta(description="Task states, separated by commas")]


class SubmitBody(Struct, forbid_unknown_fields=True):
    spec: Annotated[Any, Meta(description="The job as in a job file; files by reference: blob:HASH[:SIZE], tree:HASH")]
    id: Annotated[JobId | None, Meta(description="A fresh UUIDv7: resending with it is safe. Made here when absent")] = None  # fmt: skip


class SubmitAnswer(Struct, frozen=True):
    id: JobId
    is_new: bool
    """False: this id was submitted before, and the job stands as it was then."""


class JobsQuery(ReadQuery):
    state: State = ""
    name: str = ""
    label: Annotated[str, Meta(description="key=value, several separated by commas")] = ""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 50
    before: Annotated[str, Meta(description="The `next` of the page before")] = ""


class TasksQuery(ReadQuery):
    state: State = ""
    start: Annotated[int, Meta(ge=0, le=10**7)] = 0
    stop: Annotated[int, Meta(ge=0, le=10**7)] | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class WaitQuery(Struct, forbid_unknown_fields=True):
    after: Annotated[Count, Meta(description="Answer when the job's version is above this, or it is final")] = 0
    timeout: Annotated[float, Meta(ge=0, le=WAIT_S_MAX, description="Seconds; then the job as it is")] = 30.0


class CancelBody(Struct, forbid_unknown_fields=True):
    tasks: Annotated[tuple[tuple[Count, Count], ...] | None, Meta(description="Half-open ranges; absent means all")] = (
        None
    )


class RetryBody(Struct, forbid_unknown_fields=True):
    id: Annotated[JobId | None, Meta(description="The new job's id, a fresh UUIDv7")] = None


class TaskQuery(ReadQuery):
    task: Annotated[int, Meta(ge=0, le=10**7)] = 0


class ResultView(Struct, frozen=True):
    job: JobView
    task: TaskView


class LogQuery(ReadQuery):
    stream: Annotated[str, Meta(pattern="^(stdout|stderr|both)$", description="`both` only as events")] = "stdout"
    offset: Annotated[int, Meta(ge=0, le=2**53)] = 0
    follow: bool = False


async def submit(call: Call) -> SubmitAnswer:
    """Inputs are on enough disks before the job is agreed; it is agreed before this answers."""
    body = await call.body(SubmitBody, bytes_max=SPEC_BYTES_MAX)
    spec = parse_job(await resolve(call.face, body.spec))
    command = Submit(body.id or _fresh_id(), spec, call.caller.name[:256])
    size = len(codec.encode(command))
    if size > codec.COMMAND_BYTES_MAX:
        raise TooLarge(
            f"job of {size} bytes is over the limit of {codec.COMMAND_BYTES_MAX}",
            hint="put long lists and texts into files: array.each_line, inputs",
        )
    await call.face.ensure_blobs(await collect_refs(call.face, spec), replicas=spec.replicas)
    try:
        answer = await call.face.propose(command, timeout_s=PROPOSE_S)
    except InvalidRequest:
        # The core remembers ids for an hour, the history its jobs for longer: a late resend finds its job there.
        if body.id is None or not await _is_submitted(call, body.id):
            raise
        return SubmitAnswer(body.id, is_new=False)
    assert isinstance(answer, Submitted)
    return SubmitAnswer(answer.job, answer.is_new)


async def _is_submitted(call: Call, job: JobId) -> bool:
    if not is_job_id(job):
        return False
    try:
        found = await call.face.query(GetJob(job), JobView, timeout_s=QUERY_S)
    except NotFound:
        return False
    return found.id == job


async def list_jobs(call: Call) -> JobPage:
    asked = call.query(JobsQuery)
    query = ListJobs(
        states=_states(asked.state),
        name=asked.name[:256],
        labels=_labels(asked.label),
        limit=asked.limit,
        before=JobId(asked.before) if asked.before else None,
    )
    return await call.face.query(query, JobPage, timeout_s=QUERY_S, is_stale_ok=asked.stale)


async def show_job(call: Call) -> JobView:
    return await call.job(is_stale_ok=call.query(ReadQuery).stale)


async def list_tasks(call: Call) -> TaskPage:
    asked = call.query(TasksQuery)
    job = await call.job_id(is_stale_ok=asked.stale)
    query = ListTasks(job, _states(asked.state), asked.start, asked.stop, asked.limit)
    return await call.face.query(query, TaskPage, timeout_s=QUERY_S, is_stale_ok=asked.stale)


async def wait(call: Call) -> JobView:
    asked = call.query(WaitQuery)
    return await call.face.wait_job(await call.job_id(), asked.after, timeout_s=asked.timeout)


async def cancel(call: Call) -> JobView:
    body = await call.body(CancelBody)
    job = await call.job_id()
    for start, stop in body.tasks or ():
        if not 0 <= start < stop:
            raise InvalidRequest(f"tasks [{start}, {stop}) is not a range")
    with suppress(NotFound):  # of the core: in the history it has ended, and there is nothing to cancel
        await call.face.propose(Cancel(job, body.tasks), timeout_s=PROPOSE_S)
    return await call.job()


async def release(call: Call) -> JobView:
    job = await call.job_id()
    with suppress(NotFound):
        await call.face.propose(ReleaseJob(job), timeout_s=PROPOSE_S)
    return await call.job()


async def retry(call: Call) -> SubmitAnswer:
    body = await call.body(RetryBody)
    command = RetryJob(await call.job_id(), body.id or _fresh_id())
    try:
        answer = await call.face.propose(command, timeout_s=PROPOSE_S)
    except NotFound:
        answer = await call.face.propose(await _with_history(call, command), timeout_s=PROPOSE_S)
    return SubmitAnswer(command.new, answer.is_new if isinstance(answer, Submitted) else True)


async def _with_history(call: Call, command: RetryJob) -> RetryJob:
    """The core has no such job: what the history knows of it. Raises NotFound, TooLarge."""
    job = await call.job()
    again: list[tuple[int, int]] = []
    start: int | None = 0
    while start is not None:
        query = ListTasks(job.id, (TaskState.FAILED, TaskState.CANCELLED, TaskState.TIMED_OUT), start, None, PAGE_MAX)
        page = await call.face.query(query, TaskPage, timeout_s=QUERY_S)
        for task in page.tasks:
            if again and again[-1][1] == task.task:
                again[-1] = (again[-1][0], task.task + 1)
            else:
                again.append((task.task, task.task + 1))
        if len(again) > RETRY_RANGES_MAX:
            raise TooLarge(
                f"over {RETRY_RANGES_MAX} separate tasks of job {job.id} failed", hint="submit it again as a new job"
            )
        start = page.next
    return RetryJob(command.job, command.new, job.spec, job.owner, tuple(again))


async def explain(call: Call) -> Explanation:
    asked = call.query(TaskQuery)
    query = Explain(await call.job_id(is_stale_ok=asked.stale), asked.task)
    return await call.face.query(query, Explanation, timeout_s=QUERY_S, is_stale_ok=asked.stale)


async def result(call: Call) -> ResultView:
    asked = call.query(TaskQuery)
    job = await call.job(is_stale_ok=asked.stale)
    task = await _task(call, job.id, asked.task, is_stale_ok=asked.stale)
    if not task.state.is_final:
        raise Conflict(
            f"task {task.task} of job {job.id} has no result yet: it is {task.state}",
            hint=f"mesh job wait {job.id}",
        )
    return ResultView(job, task)


async def outputs(call: Call) -> TreeRef:
    return await outputs_tree(call.face, await call.job())


async def show_task(call: Call) -> TaskView:
    is_stale_ok = call.query(ReadQuery).stale
    return await _task(call, await call.job_id(is_stale_ok=is_stale_ok), call.task(), is_stale_ok=is_stale_ok)


async def logs(call: Call) -> EventStream | ByteStream:
    """Plain bytes of one stream; or, asked as text/event-stream, events `stdout` and `stderr` with a LogView."""
    asked = call.query(LogQuery)
    job, number = await call.job_id(is_stale_ok=asked.stale), call.task()
    if "text/event-stream" in call.request.headers.get("accept", ""):
        await _task(call, job, number, is_stale_ok=asked.stale)  # while an error can still be an answer of its own
        wanted: tuple[LogStream, ...] = ("stdout", "stderr") if asked.stream == "both" else (_log_stream(asked.stream),)
        sources = [_log(call, job, number, stream, asked, partial(format_event, stream)) for stream in wanted]
        return EventStream(*sources, farewell=format_event("end", {}))
    if asked.stream == "both":
        raise InvalidRequest("stream=both is served as events only", hint="ask with Accept: text/event-stream")
    stream = _log_stream(asked.stream)
    return ByteStream(_log(call, job, number, stream, asked, lambda piece: piece.data))


async def events(call: Call) -> EventStream:
    """Resumes after `Last-Event-ID`, as browsers do by themselves."""
    last = call.request.headers.get("last-event-id", "")
    if last and not (last.isdecimal() and len(last) < 19):
        raise InvalidRequest(f"Last-Event-ID {last[:40]!r} is not a position")

    async def source() -> AsyncGenerator[bytes, None]:
        async with aclosing(call.face.events(int(last) if last else None)) as happenings:
            async for event in happenings:
                yield format_event(event.kind, event, event.position)

    return EventStream(source())


async def _log(
    call: Call, job: JobId, task: int, stream: LogStream, asked: LogQuery, form: Callable[[LogView], bytes]
) -> AsyncGenerator[bytes, None]:
    source = call.face.follow_log(job, task, stream, offset=asked.offset, follow=asked.follow, is_stale_ok=asked.stale)
    async with aclosing(source) as pieces:
        async for piece in pieces:
            yield form(piece)


def _log_stream(text: str) -> LogStream:
    return "stderr" if text == "stderr" else "stdout"


async def _task(call: Call, job: JobId, number: int, *, is_stale_ok: bool) -> TaskView:
    query = ListTasks(job, (), number, number + 1, 1)
    page = await call.face.query(query, TaskPage, timeout_s=QUERY_S, is_stale_ok=is_stale_ok)
    if not page.tasks:
        raise NotFound(f"job {job} has no task {number}", hint=f"see `mesh job show {job}`")
    return page.tasks[0]


def _states(text: str) -> tuple[TaskState, ...]:
    states = tuple(part for part in text.split(",") if part)
    for state in states:
        if state not in list(TaskState):
            raise InvalidRequest(f"there is no state {state[:80]!r}", hint=f"there are: {', '.join(TaskState)}")
    return tuple(map(TaskState, states))


def _labels(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not (key and separator) for key, separator, _ in pairs):
        raise InvalidRequest(f"label: {text[:80]!r} is not key=value")
    return tuple((key[:256], value[:256]) for key, _, value in pairs)


def _fresh_id() -> JobId:
    return new_job_id(time.time_ns() // 1_000_000, os.urandom(10))


_EVENTS = "text/event-stream"
ENDPOINTS = (
    Endpoint("POST", "/v1/jobs", submit, "Submit a job", Rights.OPERATOR, SubmitAnswer, body=SubmitBody, status=201),
    Endpoint("GET", "/v1/jobs", list_jobs, "Jobs, newest first", Rights.VIEWER, JobPage, JobsQuery),
    Endpoint("GET", "/v1/jobs/{job}", show_job, "One job", Rights.VIEWER, JobView, ReadQuery),
    Endpoint("GET", "/v1/jobs/{job}/wait", wait, "The job, when it changes or ends", Rights.VIEWER, JobView, WaitQuery),
    Endpoint("GET", "/v1/jobs/{job}/tasks", list_tasks, "Its tasks", Rights.VIEWER, TaskPage, TasksQuery),
    Endpoint("GET", "/v1/jobs/{job}/tasks/{task}", show_task, "One task", Rights.VIEWER, TaskView, ReadQuery),
    Endpoint(
        "GET",
        "/v1/jobs/{job}/tasks/{task}/logs",
        logs,
        "What a task wrote, or writes",
        Rights.VIEWER,
        "application/octet-stream",
        LogQuery,
        event=LogView,
    ),
    Endpoint("GET", "/v1/jobs/{job}/result", result, "How a task ended", Rights.VIEWER, ResultView, TaskQuery),
    Endpoint(
        "GET",
        "/v1/jobs/{job}/outputs",
        outputs,
        "All files it left, as one directory: task k's under k/",
        Rights.VIEWER,
        TreeRef,
    ),
    Endpoint(
        "GET", "/v1/jobs/{job}/explain", explain, "Why a task is where it is", Rights.VIEWER, Explanation, TaskQuery
    ),
    Endpoint(
        "POST",
        "/v1/jobs/{job}/cancel",
        cancel,
        "Cancel it, or some of its tasks",
        Rights.OPERATOR,
        JobView,
        body=CancelBody,
    ),
    Endpoint(
        "POST",
        "/v1/jobs/{job}/release",
        release,
        "Let it go on after a recovery held it",
        Rights.OPERATOR,
        JobView,
    ),
    Endpoint(
        "POST",
        "/v1/jobs/{job}/retry",
        retry,
        "Run failed tasks again, as a new job",
        Rights.OPERATOR,
        SubmitAnswer,
        body=RetryBody,
        status=201,
    ),
    Endpoint("GET", "/v1/events", events, "What happens in the mesh, live", Rights.VIEWER, _EVENTS, event=EventView),
)
