"""`mesh context …`: saved meshes, so that `--node` and a token need not be given each time."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from mesh_cli.session import say

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

NODES_MAX = 8
"""Remembered of a mesh: enough that one of them answers."""


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from meshd.client.context import load_contexts

    return [CompletionItem(name) for name in sorted(load_contexts().saved) if name.startswith(incomplete)]


@click.group()
def context() -> None:
    """Saved meshes. The current one is asked where neither --node nor --context is given."""


@context.command()
@click.argument("name")
@click.argument("nodes", nargs=-1, required=True, metavar="HOST:PORT...")
def add(name: str, nodes: tuple[str, ...]) -> None:
    """Save a mesh under NAME and make it the current one.

    The token comes from MESH_TOKEN, or is asked for, so that it stands in no command line. The mesh's
    certificate is learned now, checked against the token; so are the addresses of its other nodes.
    """
    from meshd.client import Client
    from meshd.client.context import Context, Contexts, load_contexts, save_contexts

    is_remote = not all(node.startswith(("unix:", "/")) for node in nodes)
    token = os.environ.get("MESH_TOKEN", "")
    if is_remote and not token:
        is_asked = sys.stdin.isatty()
        token = (click.prompt("token", hide_input=True, err=True) if is_asked else sys.stdin.readline()).strip()
    with Client(nodes, token=token) as client:
        me = client.me()
        others = [row.member.api_address for row in client.nodes().members if row.member.api_address] if is_remote else []  # fmt: skip
        known = tuple(dict.fromkeys([*nodes, *others]))[:NODES_MAX]
        contexts = load_contexts()
        saved = {**contexts.saved, name: Context(known, token, client.ca_pem)}
        save_contexts(Contexts(name, saved))
    say(f"{name}: mesh {me.mesh}, you are {me.caller} ({me.role}), {len(known)} node{'s' * (len(known) != 1)} known")


@context.command("ls")
def list_contexts() -> None:
    """List saved meshes; the current one has a star."""
    from meshd.client.context import load_contexts

    contexts = load_contexts()
    for name, saved in sorted(contexts.saved.items()):
        click.echo(f"{'*' if name == contexts.current else ' '} {name}  {', '.join(saved.nodes)}")


@context.command()
@click.argument("name", shell_complete=_complete)
def use(name: str) -> None:
    """Make NAME the current one; - is this machine's agent."""
    from meshd.client.context import load_contexts, save_contexts

    contexts = load_contexts()
    if name != "-":
        contexts.get(name)
    save_contexts(replace(contexts, current="" if name == "-" else name))


@context.command()
@click.argument("name", shell_complete=_complete)
def rm(name: str) -> None:
    """Forget NAME, its token with it."""
    from meshd.client.context import load_contexts, save_contexts

    contexts = load_contexts()
    contexts.get(name)
    saved = {key: value for key, value in contexts.saved.items() if key != name}
    save_contexts(replace(contexts, current="" if contexts.current == name else contexts.current, saved=saved))
