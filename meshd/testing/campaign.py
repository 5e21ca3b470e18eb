"""Many seeds on several cores: what became of each, and the command that repeats one."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from meshd.testing.ablations import without
from meshd.testing.checks import Breach
from meshd.testing.sim import Sim

CI_SEEDS = 320
"""In `make test`, every fault on: at least 300 …"""
CI_MINUTES = 8
"""… in at most so long on two cores."""


@dataclass(frozen=True, slots=True)
class Verdict:
    seed: int
    breach: str
    """Empty when everything held."""
    digest: str
    virtual_s: float
    cpu_s: float

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.breach or 'holds'} ({self.virtual_s:.0f} s, {self.digest})"


def run_seed(seed: int, rule: str | None = None, *, has_history: bool = False) -> Verdict:
    began = time.process_time()
    with without(rule):
        sim = Sim(seed, has_history=has_history)
        try:
            sim.run()
            breach = ""
        except Breach as error:
            breach = str(error)
        except Exception:
            breach = traceback.format_exc()
    heap = sim.world.heap
    return Verdict(seed, breach, heap.digest(), heap.now_ms / 1000, time.process_time() - began)


def run_seeds(
    seeds: Iterable[int], *, jobs: int, rule: str | None = None, has_history: bool = False
) -> Iterator[Verdict]:
    """In whatever order they end."""
    run = partial(run_seed, rule=rule, has_history=has_history)
    if jobs == 1:
        yield from map(run, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(run, seeds)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def how_to_repeat(verdict: Verdict, rule: str | None, *, has_history: bool = False) -> str:
    option = (" --history" if has_history else "") + (f" --without '{rule}'" if rule else "")
    return f"python -m meshd.testing.sim --seed {verdict.seed}{option} --trace"
