"""Every command that a page, a help text or a hint names is there, with the options that it is given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from mesh_cli.main import cli

from meshd.main import main

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, click.Command] = {"mesh": cli, "meshd": main}
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("meshd/**/*.py"), *ROOT.glob("cli/**/*.py")]
NAMED = re.compile(
    r"`((?:mesh|meshd) [^`\n]+)`"  # in a sentence
    r"|^ *(?:\$ )?((?:mesh|meshd) (?:[a-z]+ )*--?[a-z].*)$"  # on a line of its own
    r"|(?:: |=f?\")((?:mesh|meshd) [a-z][^\"`\n]*)\"",  # at the end of a hint
    re.MULTILINE,
)


def named(text: str) -> Iterator[str]:
    for found in NAMED.findall(text):
        yield next(filter(None, found))


def missing(line: str) -> str:
    """The word of it that no command knows; empty when all is there."""
    words = line.split()
    command: click.Command = COMMANDS[words.pop(0)]
    known = {"-h", "--help", *_options(command)}
    while isinstance(command, click.Group) and words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
        sub = command.get_command(click.Context(command), words[0])
        if sub is None:
            return words[0]
        command = sub
        known |= _options(command)
        words.pop(0)
    for word in words:
        if word == "--":
            break
        option = re.match(r"--?[a-z][a-z-]*", word)
        if option is not None and option[0] not in known:
            return option[0]
    return ""


def _options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def test_the_commands_that_texts_name_are_there() -> None:
    lines = [(path.relative_to(ROOT), line) for path in TEXTS for line in named(path.read_text())]
    assert len(lines) > 150
    assert [(str(path), line, word) for path, line in lines if (word := missing(line))] == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("do `mesh node vanish NAME`", "vanish"),
        ("$ meshd up --found", "--found"),
        ('hint="revoke some: mesh node invite --revoke")', "--revoke"),
        ("`mesh run --array 1-3 -- ./x --revoke`", ""),
    ],
)
def test_one_that_is_not_there_is_seen(text: str, word: str) -> None:
    assert [missing(line) for line in named(text)] == [word]
