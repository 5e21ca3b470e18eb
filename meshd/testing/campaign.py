"""Many seeds on several cores: what became of each, and the command that repeats one."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from meshd.testing.ablations import without
from meshd.testing.checks import Breach
from meshd.testing.sim import Sim

CI_SEEDS = 300
"""In `make test`, every fault on: at least 300 …"""
CI_MINUTES = 8
"""… in at most so long on two cores."""


@dataclass(frozen=True, slots=True)
class Verdict:
    seed: int
    breach: str
    """Empty when everything held."""
    check: str
    """Which one saw it; empty also when something else was raised."""
    digest: str
    virtual_s: float
    cpu_s: float

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.breach or 'holds'} ({self.virtual_s:.0f} s, {self.digest})"


def run_seed(seed: int, rule: str | None = None, *, has_history: bool = False) -> Verdict:
    began = time.process_time()
    breach = check = ""
    with without(rule), _without_collector():
        sim = Sim(seed, has_history=has_history)
        try:
            sim.run()
        except Breach as error:
            breach, check = str(error), error.check
        except Exception:
            breach = traceback.format_exc()
        heap = sim.world.heap
        return Verdict(seed, breach, check, heap.digest(), heap.now_ms / 1000, time.process_time() - began)


@contextmanager
def _without_collector() -> Iterator[None]:
    """One run leaves some 30 MB; to look for them again and again meanwhile is an eighth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        gc.collect()


def run_seeds(
    seeds: Iterable[int], *, jobs: int, rule: str | None = None, has_history: bool = False
) -> Generator[Verdict]:
    """In their order. Whoever has seen enough closes it, and no further seed is begun."""
    run = partial(run_seed, rule=rule, has_history=has_history)
    if jobs == 1:
        yield from map(run, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(run, seeds)
        finally:
            pool.shutdown(cancel_futures=True)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def how_to_repeat(verdict: Verdict, rule: str | None, *, has_history: bool = False) -> str:
    option = (" --history" if has_history else "") + (f" --without '{rule}'" if rule else "")
    return f"python -m meshd.testing.sim --seed {verdict.seed}{option} --trace"
