"""How many calls make one task. A task costs a process start and its way through the log; a call may take a microsecond.

Nobody says beforehand how long a function takes, so the first groups of it are guesses with a budget: a task that
has spent its budget hands back the calls that it has not begun. Pure.
"""

from __future__ import annotations

from math import ceil

TASK_S = 0.5
"""Work worth a task: its process costs a tenth of that, and whoever waits for the first result waits not much longer."""
BUDGET_S = 1.0
"""After so long a task that groups calls begins no further one."""
WORTH_S = 0.05
"""Less work than this is not split over several processes: each takes as long to start."""
SHARE = 2
"""Tasks for each core when there are few calls: with one each, the slower half would be waited for alone."""
GUESS_MAX = 1000
"""Calls in a task while nobody knows how long one takes."""
CALLS_MAX = 20_000
"""Calls in one task: what is lost with its node is done again whole."""
MEMORY = 0.5
"""How much of the older measurements a new one leaves."""


class Pace:
    """Seconds that one call of a function takes, as far as it is known."""

    def __init__(self) -> None:
        self.call_s: float | None = None

    def learn(self, calls: int, seconds: float) -> None:
        if calls:
            measured = seconds / calls
            self.call_s = measured if self.call_s is None else MEMORY * self.call_s + (1 - MEMORY) * measured


def group_size(waiting: int, call_s: float | None, cores: int) -> int:
    """Calls for each task when so many wait: long ones alone, short ones together, but all cores are given some."""
    fair = ceil(waiting / (SHARE * max(cores, 1)))
    if call_s is None:
        return max(1, min(fair, GUESS_MAX))
    call_s = max(call_s, 1e-9)
    least, most = int(WORTH_S / call_s), int(TASK_S / call_s)
    return max(1, min(max(fair, least), most, CALLS_MAX))
