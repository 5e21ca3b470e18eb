"""What every command shares: which mesh it speaks to, and how it answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from meshd.client import Client

F = TypeVar("F", bound=Callable[..., Any])

FORMATS = ("table", "wide", "json", "jsonl", "yaml", "name")


@dataclass(slots=True)
class Session:
    nodes: tuple[str, ...] = ()
    context: str = ""
    format: str = "table"
    is_quiet: bool = False
    is_stale: bool = False

    @property
    def form(self) -> str:
        return "name" if self.is_quiet else self.format

    @contextmanager
    def client(self) -> Iterator[Client]:
        """The mesh that flags, environment or the saved context name; else this machine's agent."""
        from mesh_cli.progress import Progress
        from meshd.client import Client
        from meshd.client.context import find_mesh

        if self.nodes and self.context:
            raise click.UsageError("--node and --context each name a mesh: give one of them")
        with Progress() as progress:
            mesh = find_mesh(self.nodes, self.context)
            with Client(
                mesh.nodes,
                token=mesh.token,
                ca_pem=mesh.ca_pem,
                is_stale_ok=self.is_stale,
                on_progress=progress.bytes,
            ) as client:
                yield client


def is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


def say(message: str) -> None:
    """Talk, on stderr: never data."""
    from mesh_cli.output import plain

    click.echo(plain(message), err=True)


def _set(field: str, parse: Callable[[Any], Any] = lambda value: value) -> Callable[..., None]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value in (None, (), False):
            return
        session = context.ensure_object(Session)
        # The same option stands at the front and at the end of a line; a flag at either beats the environment.
        is_flag = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if is_flag or getattr(session, field) == getattr(Session(), field):
            setattr(session, field, parse(value))

    return callback


def _split(text: str) -> tuple[str, ...]:
    from meshd.client.context import split_nodes

    return split_nodes(text)


def target_options(command: F) -> F:
    """--node and --context, at the front or at the end of a line. Where neither stands, `find_mesh` reads the environment."""
    command = click.option(
        "--node", "-n", metavar="HOST:PORT", allow_from_autoenv=False, expose_value=False, callback=_set("nodes", _split),
        help="Ask this node (several: comma). unix:PATH is a local agent.",
    )(command)  # fmt: skip
    return click.option(
        "--context", "-c", metavar="NAME", allow_from_autoenv=False, expose_value=False, callback=_set("context"),
        help="Ask this saved mesh; see `mesh context`.",
    )(command)  # fmt: skip


def stale_option(command: F) -> F:
    """--stale, wherever the queue is read."""
    return click.option(
        "--stale", is_flag=True, expose_value=False, callback=_set("is_stale"),
        help="Whatever the node knows at once, perhaps a little old; also without a majority of the voters.",
    )(command)  # fmt: skip


def output_options(command: F) -> F:
    """-o and -q, wherever there is something to print."""
    command = click.option(
        "--output-format", "-o", "format", type=click.Choice(FORMATS), envvar="MESH_OUTPUT", expose_value=False,
        callback=_set("format"), help="How to print it.",
    )(command)  # fmt: skip
    return target_options(
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_set("is_quiet"), help="Only ids.")(
            command
        )
    )
