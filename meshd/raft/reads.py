"""Readers who wait for the barrier: one round serves all that came before it (protocol.md 2)."""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshd.raft.messages import VoterId


class _Group:
    """Readers who share a round."""

    def __init__(self) -> None:
        self.position = 0
        """0: no leader confirmed that it leads."""
        self.ended = trio.Event()
        self.is_asked = False

    def end(self, position: int | None) -> None:
        self.position = position or 0
        self.ended.set()


class Reads:
    def __init__(self) -> None:
        self._new = _Group()
        self._remote: dict[int, tuple[VoterId, _Group]] = {}
        self._requests = 0

    @property
    def has_new(self) -> bool:
        return self._new.is_asked

    async def position(self, wake: Callable[[], None]) -> int:
        """Join the next round; how far a reader must have applied, or 0."""
        group = self._new
        group.is_asked = True
        wake()
        await group.ended.wait()
        return group.position

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
