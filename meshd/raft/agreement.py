"""Whether replicas that applied the same entries have the same state: hashes of it, compared every few hundred entries.

    each replica   keeps the hashes at its last checkpoints and tells the leader the newest with each answer
    the leader     more than half of the voters have one hash: it is agreed, and told with each message
                   two differ and none has a majority: disputed, and nothing more is committed until one has
    each replica   that has another hash than the agreed one stops, the leader too

A difference is a bug in `apply` or a fault of memory: the log is the same everywhere, what
was made of it is not. Hashes are chained, so a difference never goes away by itself, and
an old one shows at the next checkpoint (protocol.md 9).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping

from meshd.errors import Corrupt
from meshd.raft.messages import VoterId

CHECKPOINTS_KEPT = 64
"""A replica that lags by more of them is compared when it has caught up."""
HASH_BYTES = 16
"""Told with every answer; chance does not make two of these equal, and nobody forges them."""


class Diverged(Corrupt):
    """This replica's state is not that of the majority: it must not answer, and must not keep it."""


class Checkpoints:
    """The hashes of this replica, and the one that it should have."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._own: dict[int, bytes] = {}
        self._agreed = (0, b"")
        self.disputed = 0
        """Where the voters' states differ, none with a majority, as the leader tells it; 0: nowhere."""

    @property
    def newest(self) -> tuple[int, bytes]:
        """(index, hash); index 0: none since the start or the last snapshot."""
        return next(reversed(self._own.items()), (0, b""))

    def at(self, index: int) -> bytes | None:
        return self._own.get(index)

    def applied(self, index: int, digest: Callable[[], str]) -> None:
        """Raises Diverged when this entry should have led to another state."""
        if index % self._every:
            return
        self._own[index] = bytes.fromhex(digest())[:HASH_BYTES]
        if len(self._own) > CHECKPOINTS_KEPT:
            del self._own[next(iter(self._own))]
        self._compare()

    def hear(self, index: int, state: bytes) -> None:
        """What a leader tells of the voters. Raises Diverged."""
        self.disputed = 0 if state else index
        if state:
            self.agree(index, state)

    def agree(self, index: int, state: bytes) -> None:
        """What the majority has, as the leader tells it. Raises Diverged when it is not what is here."""
        if index > self._agreed[0]:
            self._agreed = (index, state)
            self._compare()

    def forget(self) -> None:
        """A snapshot of the leader's took the place of the state."""
        self._own.clear()

    def _compare(self) -> None:
        index, state = self._agreed
        own = self._own.get(index)
        if own is not None and own != state:
            raise Diverged(
                f"this replica's state at entry {index} is {own.hex()}, the majority's is {state.hex()}:"
                " the same commands gave another result here",
                hint="its snapshots are set aside and it gets the state anew when it starts; please report this as a bug",
            )


class Comparison:
    """A leader's, for as long as it leads: what the others have told."""

    def __init__(self, me: VoterId, own: Checkpoints) -> None:
        self._me = me
        self._own = own
        self._told: dict[int, dict[VoterId, bytes]] = {}
        self.agreed = (0, b"")
        """The newest checkpoint at which more than half of the voters have this hash."""
        self.disputed = 0
        """A checkpoint at which hashes differ and none has a majority; 0: none."""

    def told(self, peer: VoterId, index: int, state: bytes) -> None:
        if index <= self.agreed[0]:
            return  # whoever differs there hears what is agreed, and stops
        self._told.setdefault(index, {})[peer] = state
        if len(self._told) > CHECKPOINTS_KEPT:
            del self._told[min(self._told)]

    @property
    def telling(self) -> tuple[int, bytes]:
        """For everybody: where the voters agree, or the entry at which they do not."""
        return (self.disputed, b"") if self.disputed else self.agreed

    def settle(self, voters: Collection[VoterId]) -> None:
        """Judge what is known. Raises Diverged when it is this replica that differs."""
        if not self._told and self._own.newest[0] <= self.agreed[0]:
            return
        disputed = 0
        for index in sorted({*self._told, self._own.newest[0]} - {0}, reverse=True):
            hashes = dict(self._told.get(index, {}))
            if (own := self._own.at(index)) is not None:
                hashes[self._me] = own
            state, is_disputed = judge(hashes, voters)
            if state is not None and index > self.agreed[0]:
                self.agreed = (index, state)
                # Older ones are judged with it: hashes are chained.
                self._told = {later: told for later, told in self._told.items() if later > index}
                break
            if is_disputed:
                disputed = index
        self.disputed = disputed
        self._own.agree(*self.agreed)


def judge(hashes: Mapping[VoterId, bytes], voters: Collection[VoterId]) -> tuple[bytes | None, bool]:
    """(the hash of more than half of the voters, whether there are two hashes and none is that of so many)."""
    counts = Counter(state for voter, state in hashes.items() if voter in voters)
    for state, count in counts.items():
        if count > len(voters) // 2:
            return state, False
    return None, len(counts) > 1
