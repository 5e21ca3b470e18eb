"""Virtual time: one heap of what happens next, one random source. Both follow from the seed alone."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from hashlib import blake2b
from itertools import count
from random import Random

STEPS_MAX = 2_000_000
"""A rough run of two minutes takes about a tenth of this."""

STEPS_PER_LOOK = 256
"""Whether all is over is asked so seldom, since asking looks at every task."""


class Heap:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)  # noqa: S311 - a simulation, not a secret
        self.now_ms = 0
        self.history: list[str] = []
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()

    def after(self, delay_ms: float, action: Callable[[], None]) -> None:
        at_ms = self.now_ms + max(0, int(delay_ms))
        heapq.heappush(self._heap, (at_ms, next(self._order), action))

    def run(self, until_ms: int, *, is_over: Callable[[], bool], looks_often: bool = False) -> None:
        """Raises RuntimeError when so much happens that nothing else can: something answers itself for ever."""
        steps, steps_per_look = 0, 1 if looks_often else STEPS_PER_LOOK
        while self._heap and self._heap[0][0] <= until_ms:
            if steps % steps_per_look == 0 and is_over():
                return
            steps += 1
            if steps > STEPS_MAX:
                raise RuntimeError(f"{STEPS_MAX} steps and still busy at {self.now_ms / 1000:.3f} s")
            self.now_ms, _, action = heapq.heappop(self._heap)
            action()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def between(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def note(self, line: str) -> None:
        self.history.append(f"{self.now_ms / 1000:9.3f} {line}")

    def digest(self) -> str:
        """Equal exactly for equal runs."""
        return blake2b("\n".join(self.history).encode(), digest_size=8).hexdigest()
