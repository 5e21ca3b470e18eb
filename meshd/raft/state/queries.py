"""What the state says to each query of `meshd.views`: pure, paged, bounded, and never a change.

Jobs are found by id, by a prefix of it, by name, or as `last`. Ids are UUIDv7, so the
order of ids is the order of submission, and pages are cut out of a sorted list of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge, nsmallest
from typing import Any, assert_never

from meshd import codec
from meshd.errors import Conflict, InvalidRequest, NotFound
from meshd.model import BackendOffer, JobId, Member, Outcome, TaskState
from meshd.placement import Demand, passing_lacks, permanent_lacks, resources_of
from meshd.raft.state.jobs import BARE_OUTCOME, Job, Row
from meshd.raft.state.matching import Matching, Node
from meshd.raft.state.members import Members
from meshd.raft.state.moment import Moment
from meshd.raft.state.queue import Queue
from meshd.raft.state.ranges import Ranges
from meshd.views import (
    PAGE_MAX,
    AnyQuery,
    CheckToken,
    Counts,
    Explain,
    Explanation,
    GetInvites,
    GetJob,
    GetMembers,
    GetSummary,
    GetTokens,
    InvitesView,
    InviteView,
    JobPage,
    JobView,
    Lack,
    ListJobs,
    ListTasks,
    MembersView,
    MemberView,
    Summary,
    TaskPage,
    TaskView,
    TokensView,
    TokenView,
)

PREFIX_CHARS_MIN = 4

SCAN_MAX = 10_000
"""Jobs or rows looked at for one page: about 10 ms. A page may be short, or empty, and still have a `next`."""

TASKS_LOOKED_AT = 100_000
"""… and tasks, for a row each, where a job has more rows than that."""

PAGE_BYTES = 2 << 20
"""A page ends with the row that reaches this: a row is at most as large as a command, a message twice as large as this."""

ROW_BYTES = 1 << 10
"""What a row is taken for beside a job's spec or a task's outcome, which alone can be large."""

LEASES_SHOWN = 20_000
"""Of all nodes together, about 1 MB: at 1,000 nodes as many of each as people are shown."""


@dataclass(frozen=True, slots=True)
class State:
    """What there is to ask, borrowed for one answer."""

    moment: Moment
    members: Members
    matching: Matching
    queue: Queue
    digest: Callable[[], str]


def answer(
    query: AnyQuery, moment: Moment, members: Members, matching: Matching, queue: Queue, digest: Callable[[], str]
) -> Any:
    """The query's view. Raises NotFound, Conflict, InvalidRequest."""
    state = State(moment, members, matching, queue, digest)
    match query:
        case GetJob(selector):
            return job_view(_select(state, selector), moment.position)
        case ListJobs():
            return _list_jobs(state, query)
        case ListTasks():
            return _list_tasks(state, query)
        case GetMembers():
            return _members_view(state)
        case GetTokens():
            return TokensView(tuple(TokenView(it.name, it.role, it.created_wall_ms) for it in members.tokens.values()))
        case CheckToken(secret_hash):
            token = members.tokens.get(secret_hash)
            if token is None:
                raise NotFound("this mesh knows no such token")
            return TokenView(token.name, token.role, token.created_wall_ms)
        case GetInvites():
            return InvitesView(
                tuple(
                    InviteView(secret_hash, invite.roles, invite.uses_left, invite.expires_wall_ms)
                    for secret_hash, invite in members.invites.items()
                    if members.is_open(invite)
                )
            )
        case Explain():
            return _explain(state, query)
        case GetSummary():
            return _summary(state)
        case _:
            assert_never(query)


# --- jobs ------------------------------------------------------------------------------------------------------------


def _select(state: State, selector: str) -> Job:
    job = find_job(state.queue, selector)
    if job is None:
        raise no_such_job(selector)
    return job


def no_such_job(selector: str) -> NotFound:
    if selector == "last":
        return NotFound("there is no job yet")
    return NotFound(f"no job {selector}", hint="it may be too old; see `mesh ps`")


def find_job(queue: Queue, selector: str) -> Job | None:
    """Of those in the core. Raises Conflict when several begin with it."""
    job = queue.jobs.get(JobId(selector))
    if job is not None:
        return job
    if selector == "last":
        return queue.jobs[next(reversed(queue.jobs))] if queue.jobs else None
    named = queue.names.get(selector)
    if named:
        return queue.jobs[next(reversed(named))]
    if len(selector) < PREFIX_CHARS_MIN:
        return None
    at = bisect_left(queue.ordered, selector)
    found = [job_id for job_id in queue.ordered[at : at + 2] if job_id.startswith(selector)]
    if len(found) > 1:
        raise several_jobs(selector)
    return queue.jobs[found[0]] if found else None


def several_jobs(selector: str) -> Conflict:
    return Conflict(f"several jobs begin with {selector}", hint="give more of the id: see `mesh ps`")


def job_view(job: Job, position: int) -> JobView:
    return JobView(
        id=job.id,
        name=job.spec.name,
        state=job.state,
        is_final=job.is_final,
        tasks=job.spec.array.count,
        counts=_counts(job),
        spec=job.spec,
        submitted_wall_ms=job.submitted_wall_ms,
        ended_wall_ms=job.ended_wall_ms,
        version=job.version,
        position=position,
        owner=job.owner,
        retry_of=job.retry_of,
        reason=_why_held(job) if job.hold and not job.is_final else "",
    )


def _counts(job: Job) -> Counts:
    waiting, ready, held = job.waiting, len(job.ready), job.held
    if job.hold:
        # Nothing of it is ready: it is held, whatever it will be afterwards.
        waiting, ready, held = 0, 0, waiting + ready + held
    ended = {state.value: len(tasks) for state, tasks in job.ended.items()}
    return Counts(waiting, ready, job.leased, job.running, held, **ended)


def _shown(job: Job, state: TaskState) -> TaskState:
    """Nothing of a held job is ready: it is held, whatever it will be afterwards."""
    return TaskState.HELD if job.hold and state in (TaskState.READY, TaskState.WAITING) else state


def _why_held(job: Job) -> str:
    return (
        f"held by recovery {job.hold} (on_lost: {job.spec.on_lost}): the log that was lost may have begun it; "
        f"if nothing of it runs any more: `mesh job release {job.id}`"
    )


def _list_jobs(state: State, query: ListJobs) -> JobPage:
    ordered = state.queue.ordered
    limit = page_limit(query.limit)
    at = len(ordered) if query.before is None else bisect_left(ordered, query.before)
    stop = max(at - SCAN_MAX, 0)
    found: list[JobView] = []
    size = 0
    last: JobId | None = None
    while at > stop and len(found) < limit and size < PAGE_BYTES:
        at -= 1
        last = ordered[at]
        job = state.queue.jobs[last]
        if _matches(job, query):
            found.append(job_view(job, state.moment.position))
            size += ROW_BYTES + job.spec_bytes
    return JobPage(tuple(found), last if at > 0 else None, state.moment.position)


def _matches(job: Job, query: ListJobs) -> bool:
    return (
        (not query.states or job.state in query.states)
        and (not query.name or job.spec.name == query.name)
        and (not query.labels or set(query.labels) <= set(job.spec.labels))
    )


# --- tasks -----------------------------------------------------------------------------------------------------------


def _list_tasks(state: State, query: ListTasks) -> TaskPage:
    job = _select(state, query.job)
    return task_page(job, *choose_tasks(job, query), state.moment.position)


def choose_tasks(job: Job, query: ListTasks) -> tuple[list[tuple[int, TaskState]], int | None]:
    """The tasks of one page with their states, and where the next one starts."""
    count = job.spec.array.count
    stop = count if query.stop is None else min(query.stop, count)
    limit = page_limit(query.limit)
    has_many_rows = len(job.rows) > SCAN_MAX and not all(state.is_final for state in query.states)
    end = min(stop, query.start + TASKS_LOOKED_AT) if has_many_rows else stop
    chosen: list[tuple[int, TaskState]] = []
    for task, task_state in _tasks(job, query.states, query.start, end):
        if len(chosen) >= limit:
            return chosen, task
        chosen.append((task, task_state))
    return chosen, end if end < stop else None


def _tasks(job: Job, states: tuple[TaskState, ...], start: int, stop: int) -> Iterator[tuple[int, TaskState]]:
    """The tasks of [start, stop) in order, with their states; only what is asked for is looked at, as it is asked for."""
    if not states:
        for task in range(start, stop):
            yield task, _shown(job, job.state_of(task))
        return
    states = tuple(state for state in TaskState if _shown(job, state) in states)
    sets = [(state, job.ready if state is TaskState.READY else job.ended.get(state)) for state in states]
    spans = [_spans(tasks, state, start, stop) for state, tasks in sets if tasks is not None]
    if TaskState.LEASED in states:
        spans.append((run.start, run.stop, TaskState.LEASED) for run in job.runs.within(start, stop))
    spans.append(_rows(job, states, start, stop))
    for low, high, task_state in merge(*spans):
        for task in range(low, high):
            yield task, _shown(job, task_state)


def _spans(tasks: Ranges, state: TaskState, start: int, stop: int) -> Iterator[tuple[int, int, TaskState]]:
    return ((low, high, state) for low, high in tasks.within(start, stop))


def _rows(job: Job, states: tuple[TaskState, ...], start: int, stop: int) -> Iterator[tuple[int, int, TaskState]]:
    """Of live tasks; those that are ready are in ranges as well. Rows are in no order."""
    rows = job.rows
    live = [state for state in states if not state.is_final and state is not TaskState.READY]
    if not live:
        return
    for task in range(start, stop) if len(rows) > SCAN_MAX else sorted(rows):
        row = rows.get(task)
        if row is not None and row.state in live and start <= task < stop:
            yield task, task + 1, row.state


def task_page(job: Job, chosen: Sequence[tuple[int, TaskState]], after: int | None, position: int) -> TaskPage:
    """These, or the first of them: what is left begins the next page."""
    views: list[TaskView] = []
    size = 0
    for task, task_state in chosen:
        if size >= PAGE_BYTES:
            return TaskPage(tuple(views), task, position)
        row = job.row(task)
        views.append(_task_view(job, row, task, task_state))
        size += ROW_BYTES if row is None or row.outcome is None else ROW_BYTES + len(row.outcome)
    return TaskPage(tuple(views), after, position)


def _task_view(job: Job, row: Row | None, task: int, task_state: TaskState) -> TaskView:
    if row is None:
        is_done = task_state is TaskState.DONE
        reasons = {
            TaskState.SKIPPED: "it ended well in the job that this one retries",
            TaskState.HELD: f"recovery {job.hold} holds its job",
        }
        reason = reasons.get(task_state, "")
        return TaskView(
            job=job.id, task=task, state=task_state, attempt=int(is_done), tries=int(is_done), losses=0, fence=0,
            node=None, outcome=BARE_OUTCOME if is_done else None, reason=reason,
        )  # fmt: skip
    return TaskView(
        job=job.id,
        task=task,
        state=task_state,
        attempt=row.attempt,
        tries=row.tries,
        losses=row.losses,
        fence=row.fence,
        node=None if row.state in (TaskState.READY, TaskState.WAITING) else row.node,
        outcome=_outcome(row),
        reason=row.reason,
    )


def _outcome(row: Row) -> Outcome | None:
    if row.outcome is None:
        return BARE_OUTCOME if row.state is TaskState.DONE else None
    outcome: Outcome = codec.decode(row.outcome, Outcome)
    return outcome


# --- nodes -----------------------------------------------------------------------------------------------------------


def _members_view(state: State) -> MembersView:
    shown = min(LEASES_SHOWN // max(len(state.members.records), 1), PAGE_MAX)
    return MembersView(
        mesh=state.members.mesh,
        members=tuple(_member_view(state, record.member, shown) for record in state.members.records.values()),
        revoked=tuple(state.members.revoked),
        position=state.moment.position,
        wall_ms=state.moment.wall_ms,
        clock_moves=state.moment.moves,
        key_links=state.members.key_links,
    )


def _member_view(state: State, member: Member, shown: int) -> MemberView:
    node = state.matching.nodes[member.node]
    rows = sorted(node.leases.items())
    keys = [job.key(task, job.rows[task]) for _, (job, task) in rows[:shown]]
    for job, run in nsmallest(shown, node.each_run(), key=lambda each: each[1].fence):
        keys += run.attempts(job.id).part(0, min(len(run), shown)).each()
    keys.sort(key=lambda key: key.fence)
    return MemberView(
        member=member,
        session="live" if node.is_live else "ended" if node.epoch else "none",
        epoch=node.epoch,
        slots=node.slots,
        offer=node.offer,
        used=resources_of(node.used),
        leased=tuple(keys[:shown]),
        leases=node.held_in_all,
    )


def _explain(state: State, query: Explain) -> Explanation:
    job = _select(state, query.job)
    if query.task >= job.spec.array.count:
        raise NotFound(f"job {job.id} has {job.spec.array.count} tasks", hint="tasks are numbered from 0")
    task_state = _shown(job, job.state_of(query.task))
    row = job.row(query.task)
    demand = Demand.of(job.spec)
    best = state.matching.best_rank(demand)
    lacks = [_lack(state, demand, best, record.member) for record in state.members.records.values()][:PAGE_MAX]
    can_ever_run = any(not lack.is_permanent for lack in lacks)
    return Explanation(
        job=job.id,
        task=query.task,
        state=task_state,
        summary=_summary_of(state, job, row, task_state, can_ever_run, lacks),
        nodes=tuple(lacks),
        can_ever_run=can_ever_run,
    )


def _lack(state: State, demand: Demand, best: int | None, member: Member) -> Lack:
    node = state.matching.nodes[member.node]
    if not member.is_worker:
        return Lack(member.node, member.name, ("it is a server only, it runs no jobs",), is_permanent=True)
    permanent = ("it never said what it offers",) if node.offer is None else permanent_lacks(demand, node.offer)
    passing: list[str] = []
    if member.is_draining:
        passing.append("it drains")
    if not node.is_live:
        passing.append("it is not connected")
    else:
        if not node.slots:
            passing.append("it takes no work now")
        elif node.taken >= node.slots:
            passing.append(f"a slot ({node.slots} of {node.slots} taken)")
        if node.offer is not None:
            passing.extend(passing_lacks(demand, node.offer, node.used))
            passing.extend(_later_backend(state, demand, best, node))
    return Lack(member.node, member.name, permanent + tuple(passing), is_permanent=bool(permanent))


def _later_backend(state: State, demand: Demand, best: int | None, node: Node) -> tuple[str, ...]:
    """A node that has only a later alternative does not take the job while another has an earlier one."""
    if node.offer is None or len(demand.backends) == 1:
        return ()
    mine = state.matching.rank_of(node, demand)
    if mine is None or best is None or mine == best:
        return ()
    return (f"backend {demand.backends[best]}, which other nodes have and the job prefers",)


def _summary_of(
    state: State, job: Job, row: Row | None, task_state: TaskState, can_ever_run: bool, lacks: list[Lack]
) -> str:
    at_once = job.spec.array.at_once
    match task_state:
        case TaskState.READY if at_once and job.active >= at_once:
            return f"waits: {job.active} of its job's tasks run, and at_once is {at_once}"
        case TaskState.READY if not lacks:
            return "waits: the mesh has no nodes"
        case TaskState.READY if not can_ever_run:
            return "cannot run: no node has what it needs"
        case TaskState.READY if all(lack.lacks for lack in lacks):
            return "waits for a node that fits to become free"
        case TaskState.READY:
            return "waits for its turn: jobs before it take what is free"
        case TaskState.WAITING if row is not None and row.due_ms is not None:
            in_s = max(row.due_ms - state.moment.now_ms, 0) / 1000
            return f"waits {in_s:.1f} s before it is tried again; {row.reason}"
        case TaskState.HELD if job.hold:
            return _why_held(job)
        case TaskState.HELD if row is not None and row.due_ms is not None:
            in_s = max(row.due_ms - state.moment.now_ms, 0) / 1000
            return f"held: its node {row.node} is lost and may come back within {in_s:.1f} s"
        case TaskState.HELD if row is not None:
            return f"held until its node {row.node} comes back or is removed (on_lost: wait)"
        case TaskState.LEASED | TaskState.RUNNING if row is not None and row.stop is not None:
            return f"is being stopped at {row.node}: {row.reason}"
        case TaskState.LEASED | TaskState.RUNNING if row is not None:
            return f"{task_state.value} at {row.node}, attempt {row.attempt}"
        case _:
            return f"{task_state.value}: {row.reason}" if row is not None and row.reason else task_state.value


def _summary(state: State) -> Summary:
    queue = state.queue
    backends = {
        (backend.name, backend.version)
        for node in state.matching.nodes.values()
        if node.is_live and node.offer is not None
        for backend in node.offer.backends
    }
    return Summary(
        jobs=len(queue.jobs) + queue.archived_jobs,
        live_jobs=len(queue.jobs) - len(queue.finished),
        counts=_totals(queue),
        backends=tuple(BackendOffer(name, version) for name, version in sorted(backends)),
        position=state.moment.position,
        wall_ms=state.moment.wall_ms,
        state_digest=state.digest(),
    )


def _totals(queue: Queue) -> Counts:
    counted = dict(queue.totals)
    for job in queue.on_hold.values():
        for state in (TaskState.READY, TaskState.WAITING):
            counted[state] -= job.count(state)
            counted[_shown(job, state)] += job.count(state)
    return Counts(**{state.value: count for state, count in counted.items()})


def page_limit(limit: int) -> int:
    if not 1 <= limit <= PAGE_MAX:
        raise InvalidRequest(f"a page has 1 to {PAGE_MAX} rows, not {limit}")
    return limit
