"""`mesh cluster status`, `mesh cluster set-clock` and `mesh version`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import click

from mesh_cli.session import Session, output_options, say, target_options

if TYPE_CHECKING:
    from meshd.views import ClockMove


@click.group()
@target_options
def cluster() -> None:
    """The mesh as a whole."""


@cluster.command()
@output_options
@click.pass_obj
def status(session: Session) -> None:
    """Who leads, who votes, which nodes are well, how many failures the mesh survives."""
    from mesh_cli.output import facts, print_one

    with session.client() as client:
        view = client.cluster()
    names: dict[str, str] = {it.node: it.name for it in view.nodes}

    def lines() -> Iterable[str]:
        plural = "" if view.failures_survived == 1 else "s"
        yield from facts(
            ("mesh", view.mesh),
            ("recovery", view.recovery),
            ("leader", names.get(view.leader, view.leader) if view.leader else "none is known"),
            ("voters", ", ".join(names.get(voter, voter) for voter in view.voters)),
            ("survives", f"{view.failures_survived} failure{plural}"),
            ("advice", view.advice),
            ("position", f"{view.position} in term {view.term}"),
        )
        for it in view.nodes:
            marks = [mark for mark, is_so in (("leader", it.is_leader), ("voter", it.is_voter), ("draining", it.is_draining)) if is_so]  # fmt: skip
            clock = f"  clock {it.clock_offset_ms / 1000:+.1f}s" if it.clock_offset_ms and abs(it.clock_offset_ms) >= 1000 else ""  # fmt: skip
            yield f"  {it.name}  {it.health}  {','.join([*it.roles, *marks])}  {it.version}{clock}"
        for move in view.clock_moves:
            yield f"clock: {_jump(move, names)}"
        for warning in view.warnings:
            yield f"warning: {warning}"

    print_one(session, view, lines, lambda: view.mesh)


@cluster.command("set-clock")
@output_options
@click.option("--to", metavar="TIME", help="As 2027-01-31T12:00:00Z; else the clock of the node that is asked.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def set_clock(session: Session, to: str | None, yes: bool) -> None:
    """Set the mesh's time, forward or back, when its servers' clocks have led it astray. Set those first."""
    from mesh_cli.output import print_one

    to_ms = None if to is None else _parse_time_ms(to)
    if not yes and sys.stdin.isatty():
        click.confirm(f"Set the mesh's time to {to or 'the clock of the node that is asked'}?", abort=True, err=True)
    with session.client() as client:
        move = client.set_clock(to_ms)
    print_one(session, move, lambda: [_jump(move, {})], lambda: _date(move.to_ms))


def _jump(move: ClockMove, names: Mapping[str, str]) -> str:
    from meshd.units import format_duration

    by_ms = move.to_ms - move.from_ms
    how = f"{'forward' if by_ms >= 0 else 'back'} by {format_duration(abs(by_ms))}, to {_date(move.to_ms)}"
    return f"{how}; set by an operator at {names.get(move.by, move.by)}" if move.by else f"{how}; so its clocks agreed"


def _date(wall_ms: int) -> str:
    from datetime import UTC, datetime

    try:
        return datetime.fromtimestamp(wall_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError):
        return f"{wall_ms} ms after 1970"


def _parse_time_ms(text: str) -> int:
    from datetime import datetime

    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise click.UsageError(f"--to {text!r} is not a time with its zone, as 2027-01-31T12:00:00Z")
    return int(at.timestamp() * 1000)


@click.command()
@output_options
@click.pass_obj
def version(session: Session) -> None:
    """Versions of this command and of the node that it talks to, where there is one."""
    from importlib import metadata

    from mesh_cli.output import print_one
    from meshd.errors import MeshError

    try:
        mine = metadata.version("meshd")
    except metadata.PackageNotFoundError:
        mine = "unknown (not installed)"
    try:
        with session.client() as client:
            me = client.me()
        node = {"version": me.version, "name": me.name, "node": me.node, "mesh": me.mesh}
    except MeshError as error:
        node = {}
        say(f"no node: {error.message}")
    lines = [f"mesh {mine}"] + ([f"node {node['version']} ({node['name']}, mesh {node['mesh']})"] if node else [])
    print_one(session, {"mesh": mine, "node": node or None}, lambda: lines, lambda: mine)
