"""`mesh completion SHELL`."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script, which knows live jobs, nodes and blobs.

    \b
    bash:  eval "$(mesh completion bash)"          in ~/.bashrc
    zsh:   eval "$(mesh completion zsh)"           in ~/.zshrc
    fish:  mesh completion fish > ~/.config/fish/completions/mesh.fish
    """
    from click.shell_completion import get_completion_class

    from mesh_cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "mesh", "_MESH_COMPLETE").source())
