"""Who votes, as the log says it: a configuration counts from the moment it is in the log, committed or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from meshd import codec
from meshd.errors import Corrupt, InvalidRequest
from meshd.raft.messages import MEMBERSHIP, Entry, VoterId

VOTERS_MAX = 9
"""A configuration with more is refused; the autopilot stops at five."""

_Reached = TypeVar("_Reached", int, float)


def as_command(voters: Sequence[VoterId]) -> bytes:
    return MEMBERSHIP + codec.pack(tuple(voters))


def voters_of(command: bytes) -> tuple[VoterId, ...] | None:
    """The configuration that this entry brings; None for all other kinds. Raises InvalidRequest."""
    if command[:1] != MEMBERSHIP:
        return None
    voters = codec.unpack(command[1:])
    if not isinstance(voters, tuple) or not all(isinstance(voter, str) for voter in voters):
        raise InvalidRequest("a configuration is a list of voters")
    if not 1 <= len(voters) <= VOTERS_MAX or len(set(voters)) != len(voters):
        raise InvalidRequest(f"a configuration names 1 to {VOTERS_MAX} voters, each once")
    return voters


class Configurations:
    def __init__(self, base: int, voters: Sequence[VoterId]) -> None:
        """`voters` is the configuration at the log's first item."""
        self._known: list[tuple[int, tuple[VoterId, ...]]] = [(base, tuple(voters))]

    @property
    def voters(self) -> tuple[VoterId, ...]:
        return self._known[-1][1]

    @property
    def since(self) -> int:
        """The index of the entry that brought the newest."""
        return self._known[-1][0]

    def at(self, index: int) -> tuple[VoterId, ...]:
        return next(voters for since, voters in reversed(self._known) if since <= index)

    def first_after(self, index: int) -> int | None:
        """The oldest entry behind this one that is a configuration."""
        return next((since for since, _ in self._known[1:] if since > index), None)

    # --- as the log changes -------------------------------------------------------------------------------------------

    def note(self, entry: Entry) -> bool:
        """Whether this entry is a configuration. Raises Corrupt: what a peer sends was looked at before it came here."""
        try:
            voters = voters_of(entry[0])
        except InvalidRequest as error:
            raise Corrupt(f"entry {entry[1]} of the log cannot be read: {error.message}") from error
        if voters is None:
            return False
        self._known.append((entry[1], voters))
        return True

    def cut_from(self, index: int) -> None:
        while self._known[-1][0] >= index:
            self._known.pop()

    def forget_to(self, index: int) -> None:
        """The one that counts at `index` stays."""
        while len(self._known) > 1 and self._known[1][0] <= index:
            self._known.pop(0)

    # --- majorities ---------------------------------------------------------------------------------------------------

    def is_majority(self, servers: set[VoterId]) -> bool:
        return sum(voter in servers for voter in self.voters) > len(self.voters) // 2

    def reached(self, of: Callable[[VoterId], _Reached]) -> _Reached:
        """What a majority of the voters has reached, when each has reached what `of` says."""
        return sorted((of(voter) for voter in self.voters), reverse=True)[len(self.voters) // 2]
