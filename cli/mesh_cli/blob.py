"""`mesh blob …`: files and directories kept in the mesh, by the hash of their content."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mesh_cli.selectors import complete_blobs
from mesh_cli.session import Session, output_options, say, target_options

if TYPE_CHECKING:
    from meshd.client.client import Client

_blob_argument = click.argument("name", metavar="BLOB", shell_complete=complete_blobs)


@click.group()
@target_options
def blob() -> None:
    """Files and directories in the mesh. A blob's name is the BLAKE3 of its bytes, as `b3sum` prints."""


@blob.command()
@output_options
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path())
@click.option("--replicas", type=click.IntRange(1, 16), default=2, show_default=True, help="On how many nodes.")
@click.pass_obj
def put(session: Session, paths: tuple[str, ...], replicas: int) -> None:
    """Store files (- is stdin) or directories. Prints what to name them by in a job."""
    from mesh_cli.output import print_one
    from meshd.errors import NotFound
    from meshd.spec import write_blob, write_tree

    with session.client() as client:
        for text in paths:
            path = Path(text)
            if text != "-" and not path.exists():
                raise NotFound(f"there is no file {text}")
            if path.is_dir():
                tree = client.put_directory(path, replicas=replicas)
                name, value, digest = write_tree(tree), tree, tree.blob.hash
                print_one(session, value, lambda name=name: [name], lambda digest=digest: digest)  # type: ignore[misc]
            else:
                ref = client.put_stream(sys.stdin.buffer, replicas=replicas) if text == "-" else client.put_file(path, replicas=replicas)  # fmt: skip
                print_one(session, ref, lambda ref=ref: [write_blob(ref)], lambda ref=ref: ref.hash)  # type: ignore[misc]


@blob.command()
@target_options
@_blob_argument
@click.argument("target", required=False, type=click.Path())
@click.pass_obj
def get(session: Session, name: str, target: str | None) -> None:
    """Fetch a blob to a file, or stdout. tree:HASH… fetches a directory."""
    digest = _digest(name)
    with session.client() as client:
        if name.startswith("tree:"):
            if target is None:
                raise click.UsageError("say where the directory goes: mesh blob get tree:HASH DIR")
            say(f"{client.get_directory(digest, target)} files in {target}")
        elif target is None or target == "-":
            client.get_blob(digest, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            _save(client, digest, Path(target))


def _digest(name: str) -> str:
    """Of `blob:HASH:SIZE`, `tree:HASH:…`, or a bare hash or prefix."""
    kind, colon, rest = name.partition(":")
    return rest.split(":")[0] if colon and kind in ("blob", "tree") else name


def _save(client: Client, digest: str, target: Path) -> None:
    """Whole or not at all: written beside and renamed."""
    if target.is_dir():
        target = target / digest
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            client.get_blob(digest, file)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


@blob.command("ls")
@output_options
@click.pass_obj
def list_blobs(session: Session) -> None:
    """List the blobs on the disk of the node that is asked."""
    from mesh_cli.output import Column, print_rows
    from meshd.units import format_size

    columns = [
        Column("BLOB", lambda it: it.hash),
        Column("SIZE", lambda it: str(it.size) if session.form == "wide" else format_size(it.size)),
        Column("NODES", lambda it: str(len(it.holders))),
        Column("HOLDERS", lambda it: ",".join(holder[-12:] for holder in it.holders), is_wide=True),
    ]
    with session.client() as client:
        print_rows(session, client.blobs(), columns, lambda it: it.hash)


@blob.command()
@output_options
@_blob_argument
@click.pass_obj
def where(session: Session, name: str) -> None:
    """Which nodes have a blob."""
    from mesh_cli.output import print_one

    with session.client() as client:
        view = client.blob_where(_digest(name))
        names = {row.member.node: row.member.name for row in client.nodes().members}

    def lines() -> list[str]:
        return [f"{holder}  {names.get(holder, '')}".rstrip() for holder in view.holders]

    print_one(session, view, lines, lambda: "\n".join(view.holders))


@blob.command()
@target_options
@click.argument("names", nargs=-1, required=True, metavar="BLOB...", shell_complete=complete_blobs)
@click.pass_obj
def rm(session: Session, names: tuple[str, ...]) -> None:
    """Remove blobs from all nodes. Refused while unfinished work needs one."""
    with session.client() as client:
        for name in names:
            client.remove_blob(_digest(name))
