"""`mesh run` and `mesh submit`: the same job, waited for or not."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mesh_cli.document import job_options, make_document
from mesh_cli.session import Session, output_options, say, target_options

if TYPE_CHECKING:
    from meshd.client.client import Client, LogStream
    from meshd.views import JobView, TaskView

INTERRUPTED = 130
UNPLACED_S = 3.0
"""A job without a node for so long is asked about: a node that is about to join has had its time."""
STARTED_POLL_S = 2.0
SHOWN_TASKS_MAX = 1000
"""Whose output `mesh run` prints after an array."""


@click.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@target_options
@job_options
@click.option("--detach", "-d", is_flag=True, help="Print the job's id and leave it running, as `mesh submit` does.")
@click.pass_obj
def run(session: Session, /, detach: bool, **flags: Any) -> int:
    """Run a job somewhere in the mesh, stream its output, exit with its exit code.

    \b
    mesh run -- echo hello
    mesh run wordcount.wasm < book.txt
    mesh run --array 1-100 --cpu 2 --input simulate.sh=simulate.sh -- ./simulate.sh
    mesh run --file job.yaml

    Ctrl-C leaves the job running and says how to come back to it.
    """
    with session.client() as client:
        job = _submit(client, flags, reads_stdin=not detach)
        if detach:
            click.echo(job)
            return 0
        try:
            return attend(client, job)
        except KeyboardInterrupt:
            say(f"\njob {job} goes on without you")
            say(f"try: mesh job logs -f {job} | mesh job wait {job} | mesh job cancel {job}")
            return INTERRUPTED


@click.command(context_settings={"allow_interspersed_args": False})
@output_options
@job_options
@click.option("--wait", "-w", is_flag=True, help="Wait for the end; exit 5 if it is not a good one.")
@click.pass_obj
def submit(session: Session, /, wait: bool, **flags: Any) -> int:
    """Submit a job and print its id: it is then agreed, and will run even if this machine goes away."""
    from mesh_cli.output import print_one

    with session.client() as client:
        job = _submit(client, flags, reads_stdin=False)
        if not wait:
            print_one(session, {"id": job}, lambda: [job], lambda: job)
            return 0
        click.echo(job)
        return exit_code_of(client.wait(job))


def attend(client: Client, job: str) -> int:
    """Stay with the job to its end, showing what it writes. Its exit code."""
    view = _wait_for_start(client, job)
    if view.tasks == 1:
        out, err = sys.stdout.buffer, sys.stderr.buffer
        for piece in client.follow(view.id):
            target = out if piece.stream == "stdout" else err
            target.write(piece.data)
            target.flush()
        return exit_code_of(client.wait(view.id), client)
    view = wait_with_bar(client, view.id)
    shown = min(view.tasks, SHOWN_TASKS_MAX)
    for task in client.tasks(view.id, stop=shown):
        for chunk in written(client, task, "stdout"):
            sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()
    if shown < view.tasks:
        say(f"output of the other {view.tasks - shown} tasks: mesh job logs {view.id}:TASK")
    return exit_code_of(view, client)


def written(client: Client, task: TaskView, stream: LogStream) -> Iterator[bytes]:
    """What a listed task wrote until now. Only what the list does not say is asked for: an array can have millions."""
    from meshd.model import Inline

    if task.outcome is not None and task.state.is_final:
        content = task.outcome.stdout if stream == "stdout" else task.outcome.stderr
        if content is None:
            return
        if isinstance(content, Inline):
            yield content.data
            return
    elif task.node is None:
        return
    yield from client.output_chunks(task.job, task.task, stream)


def wait_with_bar(client: Client, job: str, timeout_s: float | None = None) -> JobView:
    from mesh_cli.progress import Progress

    with Progress() as progress:

        def show(view: JobView) -> None:
            counts = view.counts
            done = counts.done + counts.failed + counts.cancelled + counts.timed_out + counts.skipped
            progress.tasks(view.name or "tasks", done, view.tasks)

        return client.wait(job, timeout_s=timeout_s, on_change=show)


def exit_code_of(view: JobView, client: Client | None = None) -> int:
    """0, the exit code of a single task, or 5; on stderr why, where the job did not say it itself."""
    from meshd.errors import JobFailed
    from meshd.model import TaskState

    if view.state is TaskState.DONE:
        return 0
    if view.tasks > 1 or client is None:
        failed = view.counts.failed + view.counts.timed_out
        if view.tasks == 1:
            say(f"job {view.id}: {view.state.value}")
        elif failed:
            say(f"job {view.id}: {failed} of {view.tasks} tasks failed")
        else:
            say(f"job {view.id}: {view.state.value}: {counted(view)}")
        again = "" if view.state is TaskState.CANCELLED else f" | mesh job retry {view.id}"
        say(f"try: mesh job show {view.id}{again}")
        return JobFailed.exit_code
    task = client.task(view.id)
    outcome = task.outcome
    if outcome is not None and outcome.reason == "exit" and outcome.exit_code:
        return outcome.exit_code
    if outcome is not None and outcome.reason == "signal" and outcome.exit_code:
        return outcome.exit_code if outcome.exit_code > 0 else 128 - outcome.exit_code
    why = (outcome.message or outcome.reason.value) if outcome is not None else ""
    say(f"error: job {view.id} {view.state}: {why or task.reason or 'it gave no reason'}")
    say(f"try: mesh job show {view.id}")
    return JobFailed.exit_code


def counted(view: JobView) -> str:
    """`733 done, 267 cancelled`."""
    counts = ((getattr(view.counts, state), state) for state in view.counts.__struct_fields__)
    return ", ".join(f"{count} {state}" for count, state in counts if count)


def _wait_for_start(client: Client, job: str) -> JobView:
    """When some of it runs or is over. Raises Unplaceable when no node could ever run it."""
    from meshd.client.client import cannot_run
    from meshd.errors import WaitTimeout

    asked_s = time.monotonic() + UNPLACED_S
    is_told = False
    while True:
        try:
            return client.wait(job, timeout_s=0)
        except WaitTimeout:
            view = client.job(job)
        waiting = view.counts.waiting + view.counts.ready
        if waiting < view.tasks:
            return view
        if time.monotonic() >= asked_s:
            found = client.explain(job)
            if not found.can_ever_run:
                raise cannot_run(found)
            if not is_told:
                say(f"waiting: {found.summary}")
                is_told = True
        client.wait_change(job, view.version, STARTED_POLL_S)


def _submit(client: Client, flags: dict[str, Any], *, reads_stdin: bool) -> str:
    from meshd.client.files import content_of

    job_id = flags.pop("job_id") or ""
    if flags["interactive"] and flags["stdin"]:
        raise click.UsageError("--interactive and --stdin exclude each other")
    document, base = make_document(flags)
    if (command := flags["command"][:1]) and (how := _how_to_send(command[0], document)):
        say(f"{command[0]} is not on the nodes unless you send it: add --input {how}")
    if flags["interactive"] or (reads_stdin and not flags["stdin"] and _is_file(0) and "stdin" not in document["run"]):
        with tempfile.NamedTemporaryFile(prefix="mesh-stdin-") as spool:
            while piece := sys.stdin.buffer.read(1 << 18):
                spool.write(piece)
            spool.flush()
            document["run"]["stdin"] = content_of(Path(spool.name), client)
    return client.submit(document, job_id=job_id, base=base)


def _how_to_send(command: str, document: dict[str, Any]) -> str:
    """A command that lies here and that a task, which starts in an empty directory, will not find; else nothing."""
    if "module" in document["run"] or "/" not in command or os.path.isabs(command) or not os.path.isfile(command):
        return ""
    name = os.path.normpath(command)
    inputs = document.get("inputs")
    sent = [os.path.normpath(str(path)) for path in inputs] if isinstance(inputs, dict) else []
    if any(path in (".", name) or name.startswith(f"{path}/") for path in sent):
        return ""
    name = os.path.basename(name) if name.startswith("../") else name
    return f"{name}={command} -- ./{name}"


def _is_file(descriptor: int) -> bool:
    """`mesh run x < file`: passed on without asking. A pipe is not: it may be one that nobody ever closes; see -i."""
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return False
