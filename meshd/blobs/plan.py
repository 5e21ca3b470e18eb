"""Which range of a blob from whom next.

    todo ──take──▶ asked ──arrived──▶ given ──judge(right)──▶ done
     ▲               │ lost             │ judge(wrong)
     └───────────────┴──────────────────┘

The name of a blob checks only the whole, so a range counts as given, not as right.
When a whole made by several sources is wrong nobody is blamed yet: one source alone
then gives all of it. If that is wrong too, the source is a liar; if it is right, so
is everyone whose range differed. Each judgement finds a liar or leaves one source,
so it ends.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass

from meshd.model import NodeId

RANGE_BYTES = 1 << 20
"""One range: a second on a 10 Mbit/s line, a few milliseconds of work on a fast one."""


@dataclass(frozen=True, slots=True)
class Range:
    index: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Given:
    source: NodeId
    digest: str


class Plan:
    """For one blob. Sources come and go; what they gave stays, so a fetch goes on where the last one stopped."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = -(-size // RANGE_BYTES)
        self._todo = deque(range(self.count))
        self._asked: dict[int, NodeId] = {}
        self._given: dict[int, _Given] = {}
        self._disputed: list[tuple[int, _Given]] = []
        """What was given for a whole that was wrong; judged by the whole that is right."""
        self._is_doubted = False
        self._only: NodeId | None = None

    @property
    def is_complete(self) -> bool:
        return len(self._given) == self.count

    @property
    def bytes_given(self) -> int:
        return sum(self._range(index).length for index in self._given)

    def begin(self, sources: Collection[NodeId]) -> None:
        """These are to be asked from now on. Whoever had to give all and is not among them no longer has to."""
        if self._only is not None and self._only not in sources:
            self._only = None
            self._start_over(keep=None)

    def take(self, source: NodeId) -> Range | None:
        """The next range to ask this source for; None when there is nothing for it now."""
        if self._is_doubted and self._only is None:
            self._only = source
        if not self._todo or (self._is_doubted and source != self._only):
            return None
        index = self._todo.popleft()
        self._asked[index] = source
        return self._range(index)

    def arrived(self, source: NodeId, index: int, digest: str) -> None:
        assert self._asked[index] == source
        del self._asked[index]
        self._given[index] = _Given(source, digest)

    def lost(self, source: NodeId) -> None:
        """It will not answer: what it was asked for is to do again. What it gave stays, unless it had to give all."""
        again = sorted(index for index, asked in self._asked.items() if asked == source)
        for index in again:
            del self._asked[index]
        self._todo.extendleft(reversed(again))
        if self._only == source and not self.is_complete:
            self._only = None
            self._start_over(keep=None)

    def judge(self, *, is_right: bool) -> frozenset[NodeId]:
        """All is given and the whole was hashed: who lied? If it was wrong, there is something to take again."""
        assert self.is_complete
        if is_right:
            return frozenset(
                given.source for index, given in self._disputed if given.digest != self._given[index].digest
            )
        gave = Counter(given.source for given in self._given.values())
        if len(gave) == 1:
            liars = frozenset(gave)
            self._only = None
            self._start_over(keep=None)
            return liars
        self._is_doubted = True
        self._only = gave.most_common(1)[0][0]
        self._disputed += self._given.items()
        self._start_over(keep=self._only)
        return frozenset()

    def _start_over(self, *, keep: NodeId | None) -> None:
        self._given = {index: given for index, given in self._given.items() if given.source == keep}
        self._todo = deque(
            index for index in range(self.count) if index not in self._given and index not in self._asked
        )

    def _range(self, index: int) -> Range:
        offset = index * RANGE_BYTES
        return Range(index, offset, min(RANGE_BYTES, self.size - offset))
