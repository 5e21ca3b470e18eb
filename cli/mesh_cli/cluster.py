"""`mesh cluster status` and `mesh version`."""

from __future__ import annotations

from collections.abc import Iterable

import click

from mesh_cli.session import Session, output_options, say, target_options


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
    names = {it.node: it.name for it in view.nodes}

    def lines() -> Iterable[str]:
        plural = "" if view.failures_survived == 1 else "s"
        yield from facts(
            ("mesh", view.mesh),
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
        for warning in view.warnings:
            yield f"warning: {warning}"

    print_one(session, view, lines, lambda: view.mesh)


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
