"""`meshd`: the agent's own command. What people do with a running mesh is `mesh` (cli/mesh_cli)."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from meshd.errors import MeshError

STOPPED_BY_SIGNAL = 130
FILES_MAX = 65_536


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="meshd", message="%(package)s %(version)s")
def main() -> None:
    """The agent of a worker mesh: the same on every machine."""


@main.command()
@click.option("--join", "invite", metavar="INVITE", envvar="MESHD_JOIN", help="Join the mesh of this invite.")
@click.option("--resume", is_flag=True, help="Only resume; never found a new mesh (for service units).")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML file with any of these settings.")
@click.option("--data-dir", help="Where this agent keeps everything.  [/var/lib/meshd, or ~/.local/share/meshd]")
@click.option("--name", help="This node's name, for people.  [the host's name]")
@click.option("--listen", metavar="HOST:PORT", help="Where peers connect.  [0.0.0.0:7373]")
@click.option("--advertise", metavar="HOST:PORT", multiple=True, help="Where others find this node, if elsewhere.")
@click.option("--api", metavar="HOST:PORT", help="Serve the HTTPS API here, besides the local socket.")
@click.option("--role", "roles", type=click.Choice(["server", "worker"]), multiple=True, help="Of a founder.  [both]")
@click.option("--label", "labels", metavar="KEY=VALUE", multiple=True, help="For placement.")
@click.option("--backend", "backends", multiple=True, help="Offer only these backends.")
@click.option("--slots", type=int, help="Attempts held at a time; 0 takes no work.  [four for each core]")
@click.option("--cpu", type=float, help="Cores offered.  [all]")
@click.option("--memory", help="Memory offered, as 4Gi.  [nine tenths]")
@click.option(
    "--disk-free", help="No new work when less of its disk is free, as 4Gi.  [1Gi, or a twentieth of the disk]"
)
@click.option("--resource", "custom", metavar="NAME=AMOUNT", multiple=True, help="Further resources, as gpu=1.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def up(invite: str | None, resume: bool, config_file: Path | None, **flags: Any) -> None:
    """Start this machine's agent: found a new mesh, join one, or resume.

    On an empty data directory without --join this founds a new mesh and prints the line that joins others.
    """
    _exit_with(lambda: _up(invite, resume, config_file, flags))


@main.command()
@click.option("--data-dir", help="Where this agent keeps everything.  [/var/lib/meshd, or ~/.local/share/meshd]")
@click.option("--force", is_flag=True, help="Also where another voter answers, or has more: what it has is given up.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def recover(data_dir: str | None, force: bool, yes: bool) -> None:
    """Go on from this stopped server's data when the mesh has lost most of its voters for good.

    Asks all other servers that it can reach first, and says what may be lost. See docs/recovery.md.
    """
    _exit_with(lambda: _recover(_home_of(data_dir), force, yes))


@main.command()
@click.option("--data-dir", help="Where this agent keeps everything.  [/var/lib/meshd, or ~/.local/share/meshd]")
@click.option("--recovery", default="", metavar="NAME", help="After several recoveries: the one to belong to.")
def rejoin(data_dir: str | None, recovery: str) -> None:
    """Let this stopped server join its mesh again with a new journal; the old one is put aside, never deleted.

    After restoring a backup or an image of its disk, after a lost journal, and after a recovery without it.
    """
    _exit_with(lambda: _rejoin(_home_of(data_dir), recovery))


@main.command()
@click.option("--nodes", type=click.IntRange(1, 9), default=3, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Keep the mesh here.  [a temporary directory]")
def dev(nodes: int, data_dir: Path | None) -> None:
    """A whole mesh on loopback, for trying and testing; gone when you stop it."""
    from meshd.dev import run_dev

    _exit_with(lambda: run_dev(nodes, data_dir))


def _up(invite_text: str | None, is_resume: bool, config_file: Path | None, flags: dict[str, Any]) -> None:
    from meshd import config
    from meshd.admission import invites

    settings = config.load(flags, os.environ, config_file)
    invite = invites.parse(invite_text) if invite_text else None
    _set_up_logging(settings.log_level)

    import trio

    from meshd import daemon, interpreter

    _allow_files()

    async def serve() -> None:
        stop = trio.Event()
        async with trio.open_nursery() as signals:
            signals.start_soon(_stop_on_signal, stop, signals.cancel_scope)
            async with trio.open_nursery() as agents:
                run = partial(daemon.run, settings, invite=invite, may_found=not is_resume, stop=stop)
                await _announce(await agents.start(run), settings.home)
                interpreter.settle()
            signals.cancel_scope.cancel()

    interpreter.prepare()
    try:
        trio.run(serve)
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _home_of(data_dir: str | None) -> Path:
    from meshd import config

    return config.load({"data_dir": data_dir}, os.environ, None).home


def _recover(path: Path, is_forced: bool, is_agreed: bool) -> None:
    import trio

    from meshd.admission.home import Home
    from meshd.recovery.recover import Recovery

    _set_up_logging("error")
    home = Home(path)
    try:
        recovery = Recovery(home)
        trio.run(partial(recovery.run, is_forced=is_forced, say=click.echo, is_agreed=lambda: is_agreed or _agrees()))
    except BaseExceptionGroup as group:
        raise _first(group) from group
    finally:
        home.close()


def _agrees() -> bool:
    try:
        return click.confirm("go on?", err=True)
    except click.Abort:
        return False


def _rejoin(path: Path, recovery: str) -> None:
    from meshd.admission.home import Home
    from meshd.recovery.rejoin import rejoin

    home = Home(path)
    try:
        aside = rejoin(home, recovery=recovery)
    finally:
        home.close()
    if aside is not None:
        click.echo(f"the old journal lies in {aside}; delete it when you are sure that nobody needs it")
    click.echo("start it with `meshd up`: it joins again as the same node, and votes when it has caught up")


def _allow_files() -> None:
    """As many open files as this user may have: connections, blobs and attempts all need some."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, FILES_MAX), hard))


async def _announce(started: Any, home: Path) -> None:
    from meshd.model import Role

    verb = "founded mesh" if started.is_founded else "in mesh"
    lines = [f"node {started.name} ({started.me}) {verb} {started.mesh}", f"peers  {', '.join(started.addresses)}"]
    if started.api_port is not None:
        lines.append(f"api    https port {started.api_port}")
    lines.append(f"local  {home / 'api.sock'}")
    if started.is_founded:
        invite = await started.node.create_invite([Role.SERVER, Role.WORKER], 10, 3_600_000)
        lines += [
            "",
            "Join other machines within the hour (10 of them; more: `mesh node invite`):",
            f"  meshd up --join {invite}",
        ]
    elif started.is_alone:
        lines += ["", "nobody else is in this mesh yet: `mesh node invite` prints what lets other machines join"]
    click.echo("\n".join(lines))
    click.echo("ready")
    sys.stdout.flush()


async def _stop_on_signal(stop: Any, scope: Any) -> None:
    """The first one asks the agent to leave in order, the second one cuts it off."""
    import trio

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            if stop.is_set():
                scope.cancel()
            stop.set()


def _set_up_logging(level: str) -> None:
    import structlog

    from meshd.tally import Throttle

    # Before libp2p is imported: its modules log to the root logger, which would otherwise be configured by accident.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    structlog.configure(
        processors=[
            Throttle(time.monotonic),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that says why, out of what several tasks raised: one of ours before all others."""
    ours = group.subgroup(MeshError)
    error: BaseException = ours if ours is not None else group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _exit_with(run: Any) -> None:
    try:
        run()
    except MeshError as error:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"try:   {error.hint}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(STOPPED_BY_SIGNAL)


if __name__ == "__main__":
    main()
