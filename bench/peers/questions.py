"""What is asked of each contender. A question is started once for each; its figures are the median of its runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bench.peers.contenders import Contender
from bench.peers.driven import Driven, Failed, Missing

CELL_S = 40.0
"""After so long no further run of a cell is begun, once there were RUNS_MIN."""
RUNS_MIN = 3
ASK_S = 300.0
"""Bound for one measurement."""
TASK_S = 0.1
EFFICIENCY_TASKS_PER_SLOT = 80
LATENCY_TASKS = 200
IN_FLIGHT = 64
IN_FLIGHT_TASKS = 640
WARM_TASKS = 20
SETTLE_S = 5.0
IDLE_S = 15.0
MILLION = 1_000_000
GROWTH = (1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class Plan:
    runs: int
    cores: int
    sizes: tuple[int, ...]
    patience_s: float
    """A size that would take longer once, by the rate at the size before, is left out."""


Figures = dict[str, float]
"""By column; what is not there was not measured."""


@dataclass(frozen=True, slots=True)
class Question:
    name: str
    sentence: str
    ask: Callable[[Driven, Contender, Plan], Figures]
    about: str = ""
    """Only contenders of this package."""


def noop(driven: Driven, contender: Contender, plan: Plan) -> Figures:
    found: Figures = {}
    rate = 0.0
    for size in plan.sizes:
        is_ours = contender.package == "meshd"
        if size > contender.tasks_max or (rate and size / rate > plan.patience_s):
            continue
        runs = _repeat(plan.runs, lambda size=size: driven.ask("noop", count=size, within_s=ASK_S))  # type: ignore[misc]
        seconds = statistics.median(run["seconds"] for run in runs)
        rate = size / seconds
        found[f"{size:,}: tasks/s"] = rate
        found[f"{size:,}: us a task"] = seconds / size * 1e6
        if is_ours:
            found[f"{size:,}: agents' CPU us a task"] = (
                statistics.median(it["agents_cpu_s"] for it in runs) / size * 1e6
            )
    return found


def efficiency(driven: Driven, contender: Contender, plan: Plan) -> Figures:
    # Agents on one machine have a slot for each of its cores each; a task that sleeps does not mind.
    slots = plan.cores * contender.options.get("nodes", 1)
    count = EFFICIENCY_TASKS_PER_SLOT * slots
    ideal_s = count * TASK_S / slots
    driven.ask("sleep", count=slots, task_s=TASK_S, within_s=ASK_S)  # whatever has to be loaded or started once
    runs = _repeat(plan.runs, lambda: driven.ask("sleep", count=count, task_s=TASK_S, within_s=ASK_S))
    took_s = statistics.median(run["seconds"] for run in runs)
    return {"seconds": took_s, "% of ideal": ideal_s / took_s * 100}


def latency(driven: Driven, contender: Contender, plan: Plan) -> Figures:
    found: Figures = {}
    driven.ask("latency", count=WARM_TASKS, in_flight=1, within_s=ASK_S)
    for label, count, in_flight in (("1", LATENCY_TASKS, 1), (f"{IN_FLIGHT}", IN_FLIGHT_TASKS, IN_FLIGHT)):
        answer = driven.ask("latency", count=count, in_flight=in_flight, within_s=ASK_S)
        for what in ("submit", "result"):
            hundredths = statistics.quantiles(answer[f"{what}_s"], n=100)
            found[f"{label}: {what} p50 ms"] = hundredths[49] * 1e3
            found[f"{label}: {what} p99 ms"] = hundredths[98] * 1e3
    return found


def starts(driven: Driven, contender: Contender, plan: Plan) -> Figures:
    warm = driven.ask("latency", count=WARM_TASKS * 2, in_flight=1, within_s=ASK_S)["result_s"][WARM_TASKS:]
    found = {"warm p50 ms": statistics.median(warm) * 1e3}
    with suppress(Missing):
        fresh = [driven.ask("new_code", within_s=ASK_S)["seconds"] for _ in range(max(plan.runs, RUNS_MIN))]
        found["new module p50 ms"] = statistics.median(fresh) * 1e3
    return found


def million(driven: Driven, contender: Contender, plan: Plan) -> Figures:
    answer = driven.ask("many", count=MILLION, within_s=ASK_S)
    memory = {"memory MB": answer.pop("memory_bytes") / 1e6} if "memory_bytes" in answer else {}
    return {f"{name.removesuffix('_s').replace('_', ' ')} ms": s * 1e3 for name, s in answer.items()} | memory


def idle(driven: Driven, contender: Contender, plan: Plan) -> Figures:
    time.sleep(SETTLE_S)
    before_s, _ = driven.cost()
    began = time.monotonic()
    time.sleep(IDLE_S)
    after_s, resident = driven.cost()
    return {"CPU %": (after_s - before_s) / (time.monotonic() - began) * 100, "resident MB": resident / 1e6}


def growth(driven: Driven, contender: Contender, plan: Plan) -> Figures:
    found: Figures = {}
    rate = 0.0
    for size in GROWTH:
        if size > contender.tasks_max or (rate and size / rate > plan.patience_s):
            break
        answer = driven.ask("noop", count=size, within_s=ASK_S)
        rate = size / answer["seconds"]
        found[f"{size:,}: agents' CPU us a task"] = answer["agents_cpu_s"] / size * 1e6
    return found


QUESTIONS = {
    question.name: question
    for question in (
        Question("noop", "tasks that do nothing, submitted together: rate, and what one costs", noop),
        Question("efficiency", f"tasks of {TASK_S * 1000:.0f} ms, {EFFICIENCY_TASKS_PER_SLOT} for each slot", efficiency),
        Question("latency", f"one task at a time, and {IN_FLIGHT} at a time: submitted, and until its result", latency),
        Question("starts", "a task whose code is warm, and one whose code was never seen", starts),
        Question("million", "an array of a million tasks: submit, look, cancel", million),
        Question("idle", f"all its processes for {IDLE_S:.0f} s without work", idle),
        Question("growth", "what control costs as the array grows, one run of each", growth, about="meshd"),
    )
}  # fmt: skip


def _repeat(runs: int, measure: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """So many times, fewer when it takes long."""
    began = time.monotonic()
    found: list[dict[str, Any]] = []
    while len(found) < runs and (len(found) < min(RUNS_MIN, runs) or time.monotonic() - began < CELL_S):
        found.append(measure())
    return found


__all__ = ["QUESTIONS", "Failed", "Figures", "Missing", "Plan", "Question"]
