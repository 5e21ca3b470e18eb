"""What a run says at its end: a table by kind of fault, one line, and the same as JSON."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from torture.checker import Verdict
from torture.plan import PARTITIONS, Cycle

SHOWN_MAX = 20
"""Violations printed; the file has all."""


class Done(Struct, frozen=True):
    """A cycle, as it went."""

    number: int
    faults: tuple[str, ...]
    victims: tuple[str, ...]
    what: str
    silence_s: float
    """The longest time from the kill on in which no write was acknowledged."""
    seconds: float

    @classmethod
    def of(cls, cycle: Cycle, victims: Sequence[str], what: str, silence_s: float, seconds: float) -> Done:
        return cls(cycle.number, cycle.faults, tuple(victims), what, round(silence_s, 3), round(seconds, 3))


class Report(Struct):
    engine: str
    nodes: int
    seed: int
    command: str
    commit: str
    date: str
    load: str
    seconds: float
    cycles: int
    partitions: int
    acknowledged: int
    lost: int
    doubled: int
    stuck: int
    refused: int
    ended_by_themselves: list[str]
    client_calls: int
    """Of `meshd.client`, knowing all nodes, in a drill."""
    client_errors: list[str]
    client_slowest_s: float
    violations: dict[str, list[str]]
    done: list[Done]

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.doubled or self.stuck)

    @property
    def line(self) -> str:
        return (
            f"cycles {self.cycles} partitions {self.partitions} acknowledged {self.acknowledged} "
            f"lost {self.lost} doubled {self.doubled} stuck {self.stuck}"
        )

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.engine}-{self.date.replace(':', '')}-seed{self.seed}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        return path


def make(
    verdict: Verdict,
    done: Sequence[Done],
    *,
    engine: str,
    nodes: int,
    seed: int,
    command: str,
    date: str,
    load: str,
    seconds: float,
    ended: Sequence[str],
    client_calls: int,
    client_errors: Sequence[str],
    client_slowest_s: float,
) -> Report:
    return Report(
        engine=engine,
        nodes=nodes,
        seed=seed,
        command=command,
        commit=commit(),
        date=date,
        load=load,
        seconds=round(seconds, 1),
        cycles=len(done),
        partitions=sum(1 for each in done if PARTITIONS & set(each.faults)),
        acknowledged=verdict.acknowledged,
        lost=len(verdict.lost),
        doubled=len(verdict.doubled),
        stuck=len(verdict.stuck),
        refused=len(verdict.refused),
        ended_by_themselves=list(ended),
        client_calls=client_calls,
        client_errors=list(client_errors),
        client_slowest_s=round(client_slowest_s, 3),
        violations={name: getattr(verdict, name) for name in ("lost", "doubled", "stuck", "refused")},
        done=list(done),
    )


def table(report: Report) -> str:
    """By kind of fault: how often, and how long no write was acknowledged after the kill."""
    rows: list[tuple[str, ...]] = [("fault", "cycles", "silence p50", "p95", "max")]
    for kind in sorted({fault for each in report.done for fault in each.faults}):
        silences = [each.silence_s for each in report.done if kind in each.faults]
        rows.append((kind, str(len(silences)), *(f"{quantile(silences, q):.2f} s" for q in (0.5, 0.95, 1.0))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    told = [f"{name}: {what}" for name, found in report.violations.items() for what in found[:SHOWN_MAX]]
    told += [f"ended by itself: {what}" for what in report.ended_by_themselves[:SHOWN_MAX]]
    if report.client_calls:
        told.append(
            f"clients that know all nodes: {report.client_calls} calls, {len(report.client_errors)} errors, "
            f"the slowest took {report.client_slowest_s:.2f} s"
        )
        told += report.client_errors[:SHOWN_MAX]
    return "\n".join([*lines, "", *told, *([""] if told else [])])


def quantile(values: Iterable[float], q: float) -> float:
    """The smallest of the values that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else 0.0


def commit() -> str:
    """Of the tree that runs, with `+` when it was changed since."""
    here = Path(__file__).parents[1]
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip()
