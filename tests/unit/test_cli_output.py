"""What the command line prints of what others wrote."""

from __future__ import annotations

import click
from mesh_cli.output import facts, plain, print_one
from mesh_cli.progress import Progress
from mesh_cli.session import Session


def test_a_lying_worker_cannot_steer_the_terminal():
    assert plain("\x1b[2J\x1b]0;owned\x07 naïve → fine\n\tnext") == "\\x1b[2J\\x1b]0;owned\\x07 naïve → fine\n\tnext"
    assert plain("\u202egnp.exe") == "\\u202egnp.exe"
    assert facts(("reason", "\x1b[31mdone")) == ["reason  \\x1b[31mdone"]


def test_of_the_colours_in_a_line_only_ours_reach_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr("mesh_cli.output.may_colour", lambda: True)
    with click.Context(click.Command("show")) as context:
        context.color = True
        print_one(Session(), {}, lambda: [*facts(("state", "done")), "why: \x1b[31mfailed\x1b[2J"], lambda: "")
    assert capsys.readouterr().out == "state  \x1b[32mdone\x1b[0m\nwhy: \\x1b[31mfailed\\x1b[2J\n"


def test_a_bar_shows_a_name_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr("mesh_cli.progress.is_terminal", lambda: True)
    monkeypatch.setattr("mesh_cli.progress.PATIENCE_S", 0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress() as progress:
        progress.tasks("[/bold]\x1b]0;owned", 0, 2)
    assert "[/bold]\\x1b]0;owned" in capsys.readouterr().err
