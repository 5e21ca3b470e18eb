"""`mesh job …` and `mesh ps`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mesh_cli.selectors import UNFINISHED, Selection, complete_jobs, not_run_again, parse_labels, parse_selector, select
from mesh_cli.session import Session, output_options, say, stale_option, target_options

if TYPE_CHECKING:
    from meshd.client.client import Client
    from meshd.views import JobView, TaskView

SHORT_ID_CHARS = 18
"""Of a UUIDv7: its millisecond and twelve random bits."""
TASKS_SHOWN = 20

_jobs_argument = click.argument("jobs", nargs=-1, metavar="[JOB]...", shell_complete=complete_jobs)
_job_argument = click.argument("selector", metavar="JOB[:TASK]", shell_complete=complete_jobs)
_label_option = click.option("--label", "-l", multiple=True, metavar="K=V", help="Every job with this label.")


@click.group()
@target_options
def job() -> None:
    """Jobs: look at them, wait for them, stop them, run them again.

    JOB is an id, the beginning of one, a name, or `last`; JOB:7 and JOB:1-10 are tasks of it.
    """


@click.command("ls")
@output_options
@click.option("--state", "-s", multiple=True, help="Only those in this state.")
@click.option("--name", help="Only those of this name.")
@_label_option
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="At most so many.")
@stale_option
@click.pass_obj
def list_jobs(session: Session, state: tuple[str, ...], name: str | None, label: tuple[str, ...], limit: int) -> None:
    """List jobs, the newest first."""
    from mesh_cli.output import Column, age, print_rows

    columns = [
        Column("ID", lambda it: it.id[:SHORT_ID_CHARS] if session.form == "table" else it.id),
        Column("NAME", lambda it: it.name or _command(it)[:30]),
        Column("STATE", lambda it: it.state.value),
        Column("TASKS", _progress),
        Column("AGE", lambda it: age(it.submitted_wall_ms)),
        Column("TOOK", _took),
        Column("OWNER", lambda it: it.owner, is_wide=True),
        Column("BACKEND", lambda it: ",".join(it.spec.backend), is_wide=True),
        Column("COMMAND", _command, is_wide=True),
    ]
    with session.client() as client:
        found = client.jobs(states=state, name=name or "", labels=parse_labels(label), limit=limit)
        rows = found if session.form in ("jsonl", "name") else list(found)
        print_rows(session, rows, columns, lambda it: it.id)
    if session.is_stale and isinstance(rows, list) and rows:
        _say_position(rows[0])


@job.command()
@output_options
@_job_argument
@stale_option
@click.pass_obj
def show(session: Session, selector: str) -> None:
    """A job, or one task of it, in detail."""
    from mesh_cli.output import print_one

    chosen = parse_selector(selector)
    with session.client() as client:
        view = client.job(chosen.job)
        if chosen.tasks is not None:
            task = client.task(view.id, chosen.first_task())
            print_one(session, task, lambda: _task_lines(task, _names(client)), lambda: f"{task.job}:{task.task}")
        else:
            print_one(session, view, lambda: _job_lines(client, view), lambda: view.id)
        if session.is_stale:
            _say_position(view)


@job.command()
@output_options
@_job_argument
@click.option("--state", "-s", multiple=True, help="Only those in this state.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@stale_option
@click.pass_obj
def tasks(session: Session, selector: str, state: tuple[str, ...], limit: int) -> None:
    """The tasks of a job."""
    from itertools import islice

    from mesh_cli.output import print_rows

    chosen = parse_selector(selector)
    with session.client() as client:
        ranges: Iterable[tuple[int, int | None]] = chosen.tasks or ((0, None),)
        rows = (row for start, stop in ranges for row in client.tasks(chosen.job, states=state, start=start, stop=stop))
        names = _names(client) if session.form in ("table", "wide") else {}
        print_rows(session, islice(rows, limit), _task_columns(names), lambda it: f"{it.job}:{it.task}")
        if next(rows, None) is not None:
            click.echo(f"only the first {limit} tasks; --limit shows more", err=True)


@job.command()
@target_options
@_jobs_argument
@_label_option
@click.option("--timeout", metavar="DURATION", help="Then exit 124; the job goes on.")
@click.pass_obj
def wait(session: Session, jobs: tuple[str, ...], label: tuple[str, ...], timeout: str | None) -> int:
    """Wait for jobs to end. Exit 0 if all are done, 5 if one ended badly."""
    import time

    from mesh_cli.run import exit_code_of, wait_with_bar
    from meshd.units import parse_duration_ms

    ends_s = time.monotonic() + parse_duration_ms(timeout) / 1000 if timeout else None
    code = 0
    with session.client() as client:
        for chosen in select(client, jobs, label):
            left_s = None if ends_s is None else max(ends_s - time.monotonic(), 0.0)
            code = max(code, exit_code_of(wait_with_bar(client, chosen.job, left_s)))
    return code


@job.command()
@target_options
@_job_argument
@click.option("--follow", "-f", is_flag=True, help="Go on as it writes, until it ends.")
@click.option("--stream", type=click.Choice(["both", "stdout", "stderr"]), default="both", show_default=True)
@stale_option
@click.pass_obj
def logs(session: Session, selector: str, follow: bool, stream: str) -> None:
    """What a job wrote: stdout here on stdout, stderr on stderr. JOB:TASK is one task of an array."""
    from mesh_cli.run import written
    from meshd.errors import NotFound

    chosen = parse_selector(selector)
    streams: Any = ("stdout", "stderr") if stream == "both" else (stream,)
    targets = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    with session.client() as client:
        view = client.job(chosen.job)
        for start, stop in chosen.tasks or ((0, view.tasks),):
            if stop > view.tasks:
                raise NotFound(f"job {view.id} has no task {stop - 1}", hint=f"its tasks are 0 to {view.tasks - 1}")
            for task in client.tasks(view.id, start=start, stop=stop):
                if follow and not task.state.is_final:
                    for piece in client.follow(view.id, task.task, streams=streams):
                        targets[piece.stream].write(piece.data)
                        targets[piece.stream].flush()
                    continue
                for name in streams:
                    for chunk in written(client, task, name):
                        targets[name].write(chunk)
                    targets[name].flush()


@job.command()
@output_options
@_jobs_argument
@_label_option
@click.pass_obj
def cancel(session: Session, jobs: tuple[str, ...], label: tuple[str, ...]) -> None:
    """Stop jobs, or tasks of them (JOB:1-10). What has ended stays as it is."""
    from mesh_cli.output import print_one

    def one(client: Client, chosen: Selection) -> None:
        view = client.cancel(chosen.job, chosen.tasks)
        if view.is_final:
            now = view.state.value
        else:
            now = "is being cancelled" if chosen.tasks is None else f"{view.state}; those tasks are being cancelled"
        print_one(session, view, lambda: [f"{view.id} {now}"], lambda: view.id)

    with session.client() as client:
        _each(client, select(client, jobs, label, UNFINISHED), one)


@job.command()
@output_options
@_jobs_argument
@_label_option
@click.pass_obj
def release(session: Session, jobs: tuple[str, ...], label: tuple[str, ...]) -> None:
    """Let jobs go on that `meshd recover` holds. Make sure first that nothing of them runs any more."""
    from mesh_cli.output import print_one

    def one(client: Client, chosen: Selection) -> None:
        view = client.release(chosen.job)
        print_one(session, view, lambda: [f"{view.id} {view.state.value}"], lambda: view.id)

    with session.client() as client:
        _each(client, select(client, jobs, label, UNFINISHED), one)


@job.command()
@output_options
@_jobs_argument
@_label_option
@click.pass_obj
def retry(session: Session, jobs: tuple[str, ...], label: tuple[str, ...]) -> None:
    """Run failed, cancelled and timed-out tasks again, as a new job. Prints its id.

    By -l: of each job that ended badly and was not run again yet.
    """
    from mesh_cli.output import print_one

    def one(client: Client, chosen: Selection) -> None:
        new = client.retry(chosen.job)
        print_one(session, {"id": new, "retry_of": chosen.job}, lambda: [new], lambda: new)

    with session.client() as client:
        _each(client, select(client, jobs, label, choose=not_run_again), one)


@job.command()
@output_options
@_job_argument
@stale_option
@click.pass_obj
def explain(session: Session, selector: str) -> int:
    """Why a task is where it is, and what each node lacks. Exit 4 if no node can ever run it."""
    from mesh_cli.output import print_one
    from meshd.errors import Unplaceable

    chosen = parse_selector(selector)
    with session.client() as client:
        found = client.explain(chosen.job, chosen.first_task())

    def lines() -> Iterable[str]:
        yield f"task {found.task} of job {found.job} is {found.state.value}: {found.summary}"
        for node in found.nodes:
            lasts = " (waiting will not help)" if node.is_permanent else ""
            yield f"  {node.name}: {', '.join(node.lacks) or 'could take it'}{lasts}"

    print_one(session, found, lines, lambda: found.job)
    return 0 if found.can_ever_run or found.state.is_final else Unplaceable.exit_code


@job.command()
@output_options
@_job_argument
@click.option("--save", metavar="DIR", type=click.Path(file_okay=False), help="Put the files that it left there.")
@stale_option
@click.pass_obj
def result(session: Session, selector: str, save: str | None) -> int:
    """How a job or task ended, and the files it left. Exit 5 if it did not end well."""
    from mesh_cli.output import print_one
    from meshd.errors import JobFailed

    chosen = parse_selector(selector)
    with session.client() as client:
        view = client.job(chosen.job)
        if chosen.tasks is None and view.tasks > 1:
            if not view.is_final:
                client.result(view.id)
            print_one(session, view, lambda: _job_lines(client, view), lambda: view.id)
            is_good = view.state == "done"
        else:
            found = client.result(view.id, chosen.first_task())
            print_one(
                session, found, lambda: _task_lines(found.task, _names(client)), lambda: f"{view.id}:{found.task.task}"
            )
            is_good = found.task.state == "done"
        if save is not None:
            count = _save(client, view, chosen.first_task() if chosen.tasks else None, Path(save))
            say(f"{count} files in {save}")
    return 0 if is_good else JobFailed.exit_code


def _each(client: Client, selections: Iterable[Selection], act: Callable[[Client, Selection], None]) -> None:
    """All of them, also when one is refused; then raises, with every refusal said."""
    from meshd.errors import Conflict, InvalidRequest, MeshError, NotFound

    refused: MeshError | None = None
    for chosen in selections:
        try:
            act(client, chosen)
        except (InvalidRequest, NotFound, Conflict) as error:
            if refused is not None:
                say(f"error: {refused.message}")
            refused = error
    if refused is not None:
        raise refused


def _save(client: Client, view: JobView, task: int | None, target: Path) -> int:
    """One task's files as they were named; a whole job's below the number of their task."""
    if task is None and view.tasks > 1:
        return client.get_directory(client.outputs(view.id).blob.hash, target)
    outcome = client.task(view.id, task or 0).outcome
    outputs = outcome.outputs if outcome is not None else None
    if outputs is None:
        return 0
    return client.save_outputs(outputs, target)


def _say_position(view: JobView) -> None:
    say(f"as of log position {view.position}, perhaps not the newest (--stale)")


def _job_lines(client: Client, view: JobView) -> Iterable[str]:
    from mesh_cli.output import age, facts
    from mesh_cli.run import counted

    yield from facts(
        ("job", view.id),
        ("name", view.name),
        ("state", view.state.value),
        ("tasks", counted(view)),
        ("runs", _command(view)),
        ("backend", ", ".join(view.spec.backend)),
        ("submitted", f"{age(view.submitted_wall_ms)} ago by {view.owner or 'nobody'}"),
        ("took", _took(view) if view.ended_wall_ms else ""),
        ("labels", ", ".join(f"{key}={value}" for key, value in view.spec.labels)),
        ("retry of", view.retry_of),
    )
    if view.reason:
        yield view.reason
    if view.tasks == 1:
        yield from _task_lines(client.task(view.id), _names(client), is_part=True)
    elif view.counts.failed + view.counts.timed_out:
        from itertools import islice

        yield "not done:"
        for task in islice(client.tasks(view.id, states=("failed", "timed_out")), TASKS_SHOWN):
            yield f"  {view.id[:SHORT_ID_CHARS]}:{task.task}  {task.state.value}  {_ending(task)}"
    if not view.is_final and view.counts.waiting + view.counts.ready == view.tasks:
        yield f"why it waits: mesh job explain {view.id}"


def _task_lines(task: TaskView, names: Mapping[str, str], *, is_part: bool = False) -> Iterable[str]:
    from mesh_cli.output import facts
    from meshd.model import TreeRef
    from meshd.units import format_duration

    outcome = task.outcome
    outputs = outcome.outputs if outcome is not None else None
    kept = f"tree:{outputs.blob.hash} ({outputs.files} files)" if isinstance(outputs, TreeRef) else "inline"
    return facts(
        *(() if is_part else (("task", f"{task.job}:{task.task}"), ("state", task.state.value))),
        ("attempt", f"{task.attempt}, fence {task.fence}" if task.attempt else ""),
        ("node", names.get(task.node, task.node) if task.node else ""),
        ("lost", task.losses or ""),
        ("ended", _ending(task)),
        ("ran", format_duration(outcome.run_ms) if outcome is not None and outcome.run_ms else ""),
        ("outputs", kept if outputs is not None else ""),
        ("reason", task.reason),
    )


def _names(client: Client) -> dict[str, str]:
    """The members' names by their ids, as `mesh node ls` shows them."""
    return {row.member.node: row.member.name for row in client.nodes().members}


def _task_columns(names: Mapping[str, str]) -> list[Any]:
    from mesh_cli.output import Column

    return [
        Column("TASK", lambda it: str(it.task)),
        Column("STATE", lambda it: it.state.value),
        Column("ATTEMPT", lambda it: str(it.attempt)),
        Column("NODE", lambda it: names.get(it.node) or (it.node or "-")[-12:]),
        Column("ENDED", _ending),
        Column("NODE ID", lambda it: it.node or "-", is_wide=True),
        Column("FENCE", lambda it: str(it.fence), is_wide=True),
        Column("LOST", lambda it: str(it.losses), is_wide=True),
        Column("REASON", lambda it: it.reason, is_wide=True),
    ]


def _ending(task: TaskView) -> str:
    outcome = task.outcome
    if outcome is None:
        return ""
    what = f"exit {outcome.exit_code}" if outcome.reason == "exit" else outcome.reason.value
    return f"{what}: {outcome.message}" if outcome.message else what


def _progress(view: JobView) -> str:
    return f"{view.counts.done}/{view.tasks}"


def _took(view: JobView) -> str:
    from meshd.units import format_duration

    return format_duration(max(view.ended_wall_ms - view.submitted_wall_ms, 0)) if view.ended_wall_ms else ""


def _command(view: JobView) -> str:
    from shlex import join

    run = view.spec.run
    module = [f"blob:{run.module.hash[:12]}"] if run.module is not None else []
    return join([*module, *run.args])[:200]


job.add_command(list_jobs)
