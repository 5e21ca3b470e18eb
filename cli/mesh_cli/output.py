"""Data on stdout, in the form that was asked for. Tables are for people, everything else is for programs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import msgspec

from mesh_cli.session import Session

Row = Any


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    value: Callable[[Row], str]
    is_wide: bool = False
    """Shown only with -o wide."""


_COLOURS = {
    "done": "green", "alive": "green", "live": "green", "running": "cyan", "leased": "cyan", "ready": "yellow",
    "waiting": "yellow", "held": "yellow", "suspect": "yellow", "failed": "red", "timed_out": "red", "dead": "red",
    "cancelled": "magenta", "ended": "red",
}  # fmt: skip


def print_rows(session: Session, rows: Iterable[Row], columns: Sequence[Column], name: Callable[[Row], str]) -> None:
    match session.form:
        case "json":
            _write(msgspec.json.format(msgspec.json.encode(list(rows)), indent=2) + b"\n")
        case "jsonl":
            for row in rows:
                _write(msgspec.json.encode(row) + b"\n")
        case "yaml":
            _write(_yaml(list(rows)))
        case "name":
            for row in rows:
                click.echo(plain(name(row)))
        case form:
            shown = [column for column in columns if form == "wide" or not column.is_wide]
            _print_table([column.title for column in shown], [[c.value(row) for c in shown] for row in rows])


def print_one(session: Session, value: Row, lines: Callable[[], Iterable[str]], name: Callable[[], str]) -> None:
    match session.form:
        case "json":
            _write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
        case "jsonl":
            _write(msgspec.json.encode(value) + b"\n")
        case "yaml":
            _write(_yaml(value))
        case "name":
            click.echo(plain(name()))
        case _:
            for line in lines():
                click.echo(line if isinstance(line, Painted) else plain(line))


class Painted(str):
    """A line that is plain already: the colours in it are ours."""

    __slots__ = ()


def facts(*pairs: tuple[str, object]) -> list[Painted]:
    """Aligned `key  value` lines; what is empty is left out."""
    shown = [(key, plain(str(value))) for key, value in pairs if value not in ("", None, (), [])]
    width = max((len(key) for key, _ in shown), default=0)
    return [Painted(f"{key:<{width}}  {coloured(value)}") for key, value in shown]


def plain(text: str) -> str:
    """What others wrote, without what would move the cursor or recolour the terminal: workers may lie (names, reasons)."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def coloured(text: str) -> str:
    """A state's own colour; only on a terminal and never under NO_COLOR."""
    colour = _COLOURS.get(text.split(" ", 1)[0])
    return click.style(text, fg=colour) if colour and may_colour() else text


def may_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def age(wall_ms: int | None) -> str:
    from meshd.units import format_duration

    if not wall_ms:
        return "-"
    seconds = max(int(time.time()) - wall_ms // 1000, 0)
    return f"{seconds}s" if seconds < 60 else format_duration(seconds * 1000)


def _print_table(titles: list[str], rows: list[list[str]]) -> None:
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    click.echo(_line(titles, widths, paint=False))
    for row in rows:
        click.echo(_line(row, widths, paint=True))


def _line(cells: list[str], widths: list[int], *, paint: bool) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    padded[-1] = padded[-1].rstrip()
    return "  ".join(coloured(cell) if paint else cell for cell in padded).rstrip()


def _yaml(value: object) -> bytes:
    import yaml

    builtins = msgspec.json.decode(msgspec.json.encode(value))
    return yaml.safe_dump(builtins, sort_keys=False, allow_unicode=True).encode()


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
