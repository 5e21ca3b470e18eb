"""meshd beside its peers: `python -m bench.peers [--question NAME …] [--contenders WORD …] [--runs N] [--json FILE]`.

The same work on the same cores in one run, each contender at the settings that `contenders.py` and the page on
performance write down, one after the other, each in an environment of its own under build/peers (made when it is
missing). Without --question: `noop`, the main table, in about ten minutes. Exits with 1 when a contender failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.mesh import load
from bench.peers.contenders import CONTENDERS, Contender
from bench.peers.driven import Failed, Missing, driven
from bench.peers.questions import QUESTIONS, Figures, Plan, Question
from bench.peers.setup import prepare

SIZES = (1_000, 10_000, 100_000)


@dataclass(slots=True)
class Row:
    contender: str
    unit: str
    durable: str
    version: str = ""
    figures: Figures = field(default_factory=dict)
    failure: str = ""


def measure(question: Question, contender: Contender, plan: Plan) -> Row:
    row = Row(contender.name, contender.unit, contender.durable)
    try:
        with driven(contender, plan.cores) as driver:
            row.version = driver.version
            row.figures = question.ask(driver, contender, plan)
    except Missing:
        row.failure = "has no such thing"
    except Failed as error:
        row.failure = str(error)
    return row


def print_table(rows: list[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row.figures))
    widths = [max(len(name), 9) for name in columns]
    print("".join([f"{'':<26}", *(f"  {name:>{width}}" for name, width in zip(columns, widths, strict=True))]))
    for row in rows:
        if row.failure:
            print(f"{row.contender:<26}  {row.failure[:160]}")
            continue
        cells = [f"  {_short(row.figures.get(name)):>{width}}" for name, width in zip(columns, widths, strict=True)]
        print("".join([f"{row.contender:<26}", *cells]))


def print_markdown(rows: list[Row]) -> None:
    """As the page on performance has it."""
    columns = list(dict.fromkeys(name for row in rows for name in row.figures))
    print("| | " + " | ".join(["durable", *columns]) + " |")
    print("|" + "---|" * (len(columns) + 2))
    for row in rows:
        cells = [row.failure] if row.failure else [_short(row.figures.get(name)) for name in columns]
        print(f"| {row.contender} | " + " | ".join([row.durable, *cells]) + " |")


def _short(figure: float | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 1 else f"{figure:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", nargs="+", choices=[*QUESTIONS, "all"], default=["noop"], metavar="NAME", help=", ".join([*QUESTIONS, "all"]))  # fmt: skip
    parser.add_argument("--contenders", nargs="+", default=[""], metavar="WORD", help="only those whose names contain one of these")  # fmt: skip
    parser.add_argument("--runs", type=int, default=5, help="the median of so many; fewer where one takes long")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="tasks, for the question noop")
    parser.add_argument("--patience", type=float, default=60.0, metavar="S", help="a size that would take longer once is left out")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="tables as documents have them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    # Stopped in the middle it ends its contender first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [it for it in CONTENDERS if any(word.lower() in it.name.lower() for word in options.contenders)]
    for package in dict.fromkeys(it.package for it in chosen):
        prepare(package)  # what is missing is said, or installed, before anything is measured
    names = list(QUESTIONS) if "all" in options.question else options.question
    plan = Plan(options.runs, len(os.sched_getaffinity(0)), tuple(options.sizes), options.patience)
    found: dict[str, object] = {"cores": plan.cores, "runs": plan.runs, "load before": load()}
    has_failed = False
    for name in names:
        question = QUESTIONS[name]
        print(f"\n{question.sentence}; {load()}", flush=True)
        began = time.monotonic()
        rows = []
        for contender in chosen:
            if question.about in ("", contender.package):
                print(f"  … {contender.name}", file=sys.stderr, flush=True)
                rows.append(measure(question, contender, plan))
        (print_markdown if options.markdown else print_table)(rows)
        print(f"{time.monotonic() - began:.0f} s; {load()}", flush=True)
        has_failed |= any(row.failure and row.failure != "has no such thing" for row in rows)
        found[name] = {
            "load after": load(),
            "rows": [{slot: getattr(row, slot) for slot in Row.__slots__} for row in rows],
        }
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
