"""`mesh token …`: who may use the API over the network."""

from __future__ import annotations

import click

from mesh_cli.session import Session, output_options, say, target_options


@click.group()
@target_options
def token() -> None:
    """Tokens for the API over the network. The mesh keeps only their hashes."""


@token.command()
@target_options
@click.argument("name")
@click.option("--role", type=click.Choice(["viewer", "operator", "admin"]), default="operator", show_default=True)
@click.pass_obj
def create(session: Session, name: str, role: str) -> None:
    """Print a new token: it can be seen only now."""
    with session.client() as client:
        text = client.create_token(name, role)
    click.echo(text)
    say("elsewhere: `mesh context add NAME HOST:PORT` asks for it; or put it into MESH_TOKEN")


@token.command("ls")
@output_options
@click.pass_obj
def list_tokens(session: Session) -> None:
    """List tokens, without their secrets."""
    from mesh_cli.output import Column, age, print_rows

    columns = [
        Column("NAME", lambda it: it.name),
        Column("ROLE", lambda it: it.role),
        Column("AGE", lambda it: age(it.created_wall_ms)),
    ]
    with session.client() as client:
        print_rows(session, client.tokens().tokens, columns, lambda it: it.name)


@token.command()
@target_options
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.pass_obj
def revoke(session: Session, names: tuple[str, ...]) -> None:
    """Revoke tokens; within seconds no node takes them any more."""
    with session.client() as client:
        for name in names:
            client.revoke_token(name)
