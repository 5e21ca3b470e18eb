"""`mesh node …`: the machines of the mesh."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from mesh_cli.selectors import complete_nodes
from mesh_cli.session import Session, output_options, say, stale_option, target_options

if TYPE_CHECKING:
    from meshd.views import MemberView

_node_argument = click.argument("node_name", metavar="NODE", shell_complete=complete_nodes)


@click.group()
@target_options
def node() -> None:
    """Machines: who they are and what they offer; inviting, draining, removing.

    NODE is a name, an id, the end of one, or `self`.
    """


@node.command("ls")
@output_options
@stale_option
@click.pass_obj
def list_nodes(session: Session) -> None:
    """List the members of the mesh."""
    from mesh_cli.output import Column, age, print_rows

    with session.client() as client:
        view = client.nodes()
        status = {it.node: it for it in client.cluster().nodes}

    def health(row: MemberView) -> str:
        found = status.get(row.member.node)
        return found.health if found is not None else "unknown"

    columns = [
        Column("NAME", lambda it: it.member.name),
        Column("ID", lambda it: it.member.node if session.form == "wide" else it.member.node[-12:]),
        Column("HEALTH", health),
        Column("ROLES", lambda it: ",".join(it.member.roles)),
        Column("WORK", _work),
        Column("CPU", lambda it: _amounts(it)[0]),
        Column("MEMORY", lambda it: _amounts(it)[1]),
        Column("BACKENDS", lambda it: ",".join(one.name for one in it.offer.backends) if it.offer else ""),
        Column("JOINED", lambda it: age(it.member.joined_wall_ms), is_wide=True),
        Column("SESSION", lambda it: it.session, is_wide=True),
        Column("API", lambda it: it.member.api_address, is_wide=True),
        Column("LABELS", lambda it: ",".join(f"{k}={v}" for k, v in it.offer.labels) if it.offer else "", is_wide=True),
    ]
    print_rows(session, view.members, columns, lambda it: it.member.node)


@node.command()
@output_options
@_node_argument
@stale_option
@click.pass_obj
def show(session: Session, node_name: str) -> None:
    """One member in detail: what it offers, what it lacks and why."""
    from mesh_cli.output import age, facts, print_one

    with session.client() as client:
        view = client.node(node_name)

    def lines() -> Iterable[str]:
        member, offer = view.member, view.offer
        yield from facts(
            ("node", member.node),
            ("name", member.name),
            ("roles", ", ".join(member.roles)),
            ("zone", member.zone),
            ("work", _work(view)),
            ("cpu", _amounts(view)[0]),
            ("memory", _amounts(view)[1]),
            ("addresses", ", ".join(member.addresses)),
            ("api", member.api_address),
            ("joined", f"{age(member.joined_wall_ms)} ago"),
            ("session", f"{view.session}, epoch {view.epoch}"),
        )
        if offer is not None:
            yield from facts(
                ("version", offer.version),
                ("labels", ", ".join(f"{key}={value}" for key, value in offer.labels)),
                ("backends", ", ".join(f"{it.name} {it.version}".strip() for it in offer.backends)),
            )
            for name, reason in offer.missing:
                yield f"no {name}: {reason}"
        for key in view.leased[:20]:
            yield f"runs {key.job}:{key.task} (attempt {key.attempt})"

    print_one(session, view, lines, lambda: view.member.node)


@node.command()
@target_options
@click.option("--role", default="server,worker", show_default=True, help="server, worker or both.")
@click.option(
    "--uses", type=click.IntRange(1, 1_000_000), default=1, show_default=True, help="How many may join by it."
)
@click.option("--expires", default="1h", show_default=True, metavar="DURATION", help="How long it is good for.")
@click.pass_obj
def invite(session: Session, role: str, uses: int, expires: str) -> None:
    """Print an invite: another machine joins with `meshd up --join INVITE`."""
    from meshd.units import parse_duration_ms

    roles = [part.strip() for part in role.split(",") if part.strip()]
    if not roles or not set(roles) <= {"server", "worker"}:
        raise click.UsageError(f"--role {role!r} is not server, worker or server,worker")
    with session.client() as client:
        text = client.invite(roles, uses=uses, lifetime_ms=parse_duration_ms(expires))
    click.echo(text)
    if sys.stdout.isatty():
        say(f"on the other machine: meshd up --join {text[:24]}…  (good for {expires}, {uses} use{'s' * (uses > 1)})")


@node.command()
@output_options
@click.pass_obj
def invites(session: Session) -> None:
    """List open invites, without their secrets."""
    from mesh_cli.output import Column, print_rows

    columns = [
        Column("HASH", lambda it: it.secret_hash[:16]),
        Column("ROLES", lambda it: ",".join(it.roles)),
        Column("USES LEFT", lambda it: str(it.uses_left)),
        Column("EXPIRES", lambda it: _in(it.expires_wall_ms)),
    ]
    with session.client() as client:
        print_rows(session, client.invites().invites, columns, lambda it: it.secret_hash)


@node.command()
@target_options
@_node_argument
@click.option("--deadline", metavar="DURATION", help="Then running work is handed over to other nodes.")
@click.option("--cancel", is_flag=True, help="Let it take work again.")
@click.pass_obj
def drain(session: Session, node_name: str, deadline: str | None, cancel: bool) -> int:
    """Give a node no more work, and wait until it can be stopped with nothing lost."""
    from meshd.units import parse_duration_ms

    with session.client() as client:
        if cancel:
            client.undrain(node_name)
            say(f"{node_name} takes work again")
            return 0
        last = None
        try:
            for view in client.drain(node_name, deadline_ms=parse_duration_ms(deadline) if deadline else None):
                if view.message != last:
                    say(f"{view.phase}: {view.message}")
                last = view.message
                if view.is_safe:
                    return 0
        except KeyboardInterrupt:
            say(f"\n{node_name} goes on draining; `mesh node drain --cancel {node_name}` ends it")
            return 130
    say("error: the drain was not seen to its end")
    say(f"try: mesh node drain {node_name}")
    return 8


@node.command()
@target_options
@_node_argument
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def remove(session: Session, node_name: str, yes: bool) -> None:
    """Remove a node for good. You promise that it is dead, or drained and stopped."""
    with session.client() as client:
        if not yes and sys.stdin.isatty():
            click.confirm(f"{node_name} will never come back without a new invite. Remove it?", abort=True, err=True)
        client.remove_node(node_name)
    say(f"{node_name} is removed")


def _work(row: MemberView) -> str:
    if row.member.is_draining:
        return "draining"
    return f"{row.leases}/{row.slots}" if row.session == "live" else row.session


def _amounts(row: MemberView) -> tuple[str, str]:
    """Used of offered."""
    from meshd.units import format_size

    if row.offer is None:
        return "", ""
    used, all_of_it = row.used, row.offer.resources
    cpu = f"{used.cpu_milli / 1000:g}/{all_of_it.cpu_milli / 1000:g}"
    return cpu, f"{format_size(used.memory)}/{format_size(all_of_it.memory)}"


def _in(wall_ms: int) -> str:
    import time

    from meshd.units import format_duration

    left_ms = wall_ms - int(time.time() * 1000)
    return f"in {format_duration(left_ms)}" if left_ms > 0 else "over"
