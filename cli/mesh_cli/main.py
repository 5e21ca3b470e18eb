"""`mesh`: the user's command. Verbs on nouns; data on stdout, talk on stderr, an exit code for each kind of error.

Only click is imported here. Each command's module is imported when it is called, and what
it needs of the client then: `mesh --help` and a completion must not feel like a start.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from mesh_cli.session import Session, target_options

INTERRUPTED = 130

COMMANDS = {
    "run": ("mesh_cli.run:run", "Run a job somewhere in the mesh and stream its output."),
    "submit": ("mesh_cli.run:submit", "Submit a job and print its id."),
    "ps": ("mesh_cli.job:list_jobs", "List jobs; the same as `mesh job ls`."),
    "job": ("mesh_cli.job:job", "Look at jobs, wait for them, stop them, run them again."),
    "node": ("mesh_cli.node:node", "The machines of the mesh: invite, drain, remove."),
    "blob": ("mesh_cli.blob:blob", "Files and directories kept in the mesh."),
    "cluster": ("mesh_cli.cluster:cluster", "Is the mesh well?"),
    "token": ("mesh_cli.token:token", "Tokens for users of the API over the network."),
    "context": ("mesh_cli.context:context", "Saved meshes to talk to from this machine."),
    "completion": ("mesh_cli.completion:completion", "Print the completion script of a shell."),
    "version": ("mesh_cli.cluster:version", "Versions of this command and of the node it talks to."),
}


ELSEWHERE = {
    "attach": "job logs -f", "cancel": "job cancel", "create": "submit", "delete": "job cancel", "describe": "job show",
    "exec": "run", "get": "ps", "info": "cluster status", "inspect": "job show", "jobs": "ps",
    "kill": "job cancel", "list": "ps", "ls": "ps", "nodes": "node ls", "queue": "ps", "rm": "job cancel",
    "status": "cluster status", "stop": "job cancel", "top": "node ls",
}  # fmt: skip
"""What people type who know docker, kubectl, nomad or a batch system, and what it is called here."""


class _Commands(click.Group):
    """Commands that are imported when they are called."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        import importlib

        module, _, attribute = COMMANDS[name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS:
            raise click.UsageError(f"there is no command {name!r}{self._meant(context, name)}", context)
        return name, self.get_command(context, name), args[1:]

    def _meant(self, context: click.Context, word: str) -> str:
        """One of another tool, of a group, or nearly one."""
        from difflib import get_close_matches

        known = ELSEWHERE | {name: name for name in COMMANDS}
        for name in COMMANDS:
            command = self.get_command(context, name)
            for part in command.commands if isinstance(command, click.Group) else ():
                known.setdefault(part, f"{name} {part}")
        # A slip is taken for one of ours first: `rum` is near to `rm` as well, which cancels.
        close = [word] if word in known else get_close_matches(word, COMMANDS, 1) or get_close_matches(word, known, 1)
        return f"; did you mean `mesh {known[close[0]]}`?" if close else ""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MESH"})
@target_options
def cli() -> None:
    """Run things on a mesh of machines, from any of them.

    \b
    mesh run -- echo hello          run a command somewhere, see its output
    mesh ps                         what runs and what ran
    mesh cluster status             is the mesh well?

    Without --node, --context or a saved context it talks to this machine's agent.
    Every flag has an environment variable: MESH_NODE, MESH_RUN_CPU, MESH_JOB_LS_LIMIT …
    """


def main() -> NoReturn:
    # msgspec asks for it, takes `typing` where there is none, and it alone costs a quarter of a command's start.
    sys.modules.setdefault("typing_extensions", None)  # type: ignore[arg-type]
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """The exit code."""
    try:
        code = cli.main(args, prog_name="mesh", standalone_mode=False, obj=Session())
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "mesh"
        hint = "" if "did you mean" in error.format_message().lower() else f"{command} --help"
        return _fail(error.format_message()[:1].lower() + error.format_message()[1:], hint, 2)
    except click.ClickException as error:
        return _fail(error.format_message(), "", 2)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever reads us has seen enough. Python would complain once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", "", 1)
    except Exception as error:
        from meshd.errors import MeshError

        if not isinstance(error, MeshError):
            raise
        return _fail(error.message, error.hint, error.exit_code)


def _fail(message: str, hint: str, code: int) -> int:
    from mesh_cli.output import plain

    message, hint = plain(message), plain(hint)
    is_coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    click.echo(f"{click.style('error:', fg='red') if is_coloured else 'error:'} {message}", err=True)
    if hint:
        is_command = hint.count("`") == 2 and hint[0] == hint[-1] == "`"
        click.echo(f"try: {hint.strip('`') if is_command else hint}", err=True)
    return code


if __name__ == "__main__":
    main()
