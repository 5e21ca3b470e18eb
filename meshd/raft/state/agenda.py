"""What comes first? A heap in which every key has one rank, and keys can be moved and taken out.

Order is by `(rank, key)`, a total one, so it depends on what is in the agenda and never
on how it came there: a replica restored from a snapshot continues exactly as the others.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

K = TypeVar("K", int, tuple[int, int])

_SLACK = 64
"""Stale heap entries that are always tolerated; beyond this, at most as many as live ones."""


class Agenda(Generic[K]):
    __slots__ = ("_heap", "_ranks")

    def __init__(self) -> None:
        self._ranks: dict[K, int] = {}
        self._heap: list[tuple[int, K]] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, key: K) -> bool:
        return key in self._ranks

    def put(self, key: K, rank: int) -> None:
        """Add the key, or move it."""
        if self._ranks.get(key) == rank:
            return
        self._ranks[key] = rank
        heappush(self._heap, (rank, key))
        if len(self._heap) > 2 * len(self._ranks) + _SLACK:
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapify(self._heap)

    def drop(self, key: K) -> None:
        self._ranks.pop(key, None)

    def take_apart(self) -> None:
        """Free the keys one after the other."""
        self._ranks.clear()
        while self._heap:
            self._heap.pop()

    def first(self) -> tuple[int, K] | None:
        """(rank, key) of what comes first, still in the agenda."""
        heap, ranks = self._heap, self._ranks
        while heap:
            rank, key = heap[0]
            if ranks.get(key) == rank:
                return heap[0]
            heappop(heap)
        return None

    def take_until(self, rank: int) -> K | None:
        """Remove and return the first key if its rank is not beyond `rank`."""
        head = self.first()
        if head is None or head[0] > rank:
            return None
        del self._ranks[head[1]]
        return head[1]
