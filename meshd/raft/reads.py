"""Readers who wait for the barrier: one round serves all that came before it (protocol.md 2)."""

from __future__ import annotations

from collections.abc import Callable

from meshd.raft.messages import VoterId

Answer = Callable[[int], None]
"""Up to where the reader must have applied; 0: no leader confirmed that it leads."""


class _Group:
    """Readers who share a round."""

    def __init__(self) -> None:
        self.waiting: list[Answer] = []

    def end(self, position: int | None) -> None:
        waiting, self.waiting = self.waiting, []
        for answer in waiting:
            answer(position or 0)


class Reads:
    def __init__(self, first: int = 0) -> None:
        """`first` is `proposals.first_request` of this start: an older one's answer may be from before what is asked."""
        self._new = _Group()
        self._remote: dict[int, tuple[VoterId, _Group]] = {}
        self._requests = first

    @property
    def has_new(self) -> bool:
        return bool(self._new.waiting)

    def ask(self, answer: Answer) -> None:
        """Join the next round."""
        self._new.waiting.append(answer)

    def begin(self) -> Callable[[int | None], None]:
        """A round begins for everybody who has asked; later ones wait for the next."""
        group, self._new = self._new, _Group()
        return group.end

    def begin_remote(self, leader: VoterId) -> int:
        self._requests += 1
        self._remote[self._requests] = (leader, self._new)
        self._new = _Group()
        return self._requests

    def answered(self, peer: VoterId, request: int, position: int) -> None:
        leader, group = self._remote.get(request, (None, None))
        if group is not None and leader == peer:
            del self._remote[request]
            group.end(position)

    def lost(self, peer: VoterId) -> None:
        for request in [request for request, (leader, _) in self._remote.items() if leader == peer]:
            self._remote.pop(request)[1].end(None)
