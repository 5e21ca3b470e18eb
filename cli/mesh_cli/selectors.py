"""How jobs and tasks are named on the command line: id, unique prefix, name, `last`, `JOB:TASKS`, and -l key=value."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import click

from mesh_cli.session import say
from meshd.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from meshd.client.client import Client
    from meshd.views import JobView

_TASKS = re.compile(r"(?P<job>[^:]+)(?::(?P<tasks>[0-9,:-]+))?")
COMPLETED_MAX = 50
JOBS_MAX = 10_000
UNFINISHED = ("waiting", "ready", "leased", "running", "held")
BAD = ("failed", "cancelled", "timed_out")


@dataclass(frozen=True, slots=True)
class Selection:
    job: str
    tasks: tuple[tuple[int, int], ...] | None
    """Half-open ranges; None is all of them."""

    def first_task(self) -> int:
        return self.tasks[0][0] if self.tasks else 0


def parse_selector(text: str) -> Selection:
    """`last`, `5f3c`, `resize:7`, `resize:1-10,20`. Raises InvalidRequest."""
    from meshd.units import parse_range

    match = _TASKS.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{text!r} does not name a job", hint="JOB or JOB:TASKS, as last, 01a2 or resize:1-10")
    if match["tasks"] is None:
        return Selection(match["job"], None)
    ranges: list[tuple[int, int]] = []
    for part in match["tasks"].split(","):
        first, last, step = parse_range(part)
        ranges += [(first, last + 1)] if step == 1 else [(task, task + 1) for task in range(first, last + 1, step)]
    return Selection(match["job"], tuple(ranges))


Choice = Callable[["Sequence[JobView]"], "list[JobView]"]
"""Which jobs of a list, the newest first, it is about."""


def select(
    client: Client, selectors: Sequence[str], labels: Sequence[str], states: Sequence[str] = (), choose: Choice = list
) -> list[Selection]:
    """What was named, and of the jobs with all these labels those in these states that are chosen.

    Raises InvalidRequest when nothing was asked for, NotFound when no job has the labels.
    """
    found = [parse_selector(text) for text in selectors]
    if not found and not labels:
        raise InvalidRequest("which job?", hint="name one, as `last`, or several by -l key=value; `mesh ps` lists them")
    if labels:
        wanted, named = parse_labels(labels), " and ".join(labels)
        jobs = list(client.jobs(states=states, labels=wanted, limit=JOBS_MAX + 1))
        chosen = choose(jobs[:JOBS_MAX])
        if len(jobs) > JOBS_MAX:
            say(f"only the newest {JOBS_MAX} jobs with the label {named} were looked at")
        elif not chosen and not found:
            if not jobs and not any(client.jobs(labels=wanted, limit=1)):
                raise NotFound(f"no job has the label {named}", hint="mesh ps")
            say(f"nothing to do for the jobs with the label {named}")
        found += [Selection(job.id, None) for job in chosen]
    return found


def not_run_again(jobs: Sequence[JobView]) -> list[JobView]:
    """Those that ended badly and have no retry. One is newer than what it retries, and has its labels: it is in the list."""
    retried = {job.retry_of for job in jobs}
    return [job for job in jobs if job.state in BAD and job.id not in retried]


def parse_labels(labels: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in labels]
    for (key, separator, _), text in zip(pairs, labels, strict=True):
        if not key or not separator or "," in text:
            raise InvalidRequest(f"-l {text!r} is not key=value")
    return {key: value for key, _, value in pairs}


# --- completion with live names: silent and quick, whatever happens ---


def complete_jobs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _complete(context, incomplete, lambda client: [
        (str(job.id), f"{job.name or ' '.join(job.spec.run.args[:3])} {job.state}") for job in client.jobs(limit=COMPLETED_MAX)
    ])  # fmt: skip


def complete_nodes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _complete(context, incomplete, lambda client: [
        (row.member.name, row.session) for row in client.nodes().members
    ])  # fmt: skip


def complete_blobs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _complete(context, incomplete, lambda client: [
        (blob.hash, str(blob.size)) for blob in islice(client.blobs(prefix=incomplete), COMPLETED_MAX)
    ])  # fmt: skip


def _complete(context: click.Context, incomplete: str, ask: object) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from mesh_cli.session import Session
    from meshd.errors import MeshError

    assert callable(ask)
    try:
        with context.ensure_object(Session).client() as client:
            found = ask(client)
    except (MeshError, OSError):
        return []
    return [CompletionItem(value, help=text) for value, text in found if value.startswith(incomplete)]
