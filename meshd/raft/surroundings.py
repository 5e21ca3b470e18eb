"""What one server's log needs of the world around it: what is replicated, streams to other servers, clocks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from meshd.model import NodeId
from meshd.raft.messages import AnyMessage, VoterId

Report = Callable[[str, dict[str, object]], None]
"""What happened, and its particulars."""
Restore = Callable[[], Callable[[], None] | None]
"""Puts an unpacked state in place. What it returns, if anything, takes the replaced one apart, in a thread: it may be large."""


class StateMachine(Protocol):
    """What is replicated."""

    @property
    def wall_ms(self) -> int:
        """The state's wall time."""
        ...

    def apply(self, index: int, batch: bytes) -> list[bytes]:
        """Encoded answers, one for each command. Total and deterministic."""
        ...

    def digest(self) -> str:
        """A hash, in hex, of the state and of all before it: once different, different for good."""
        ...

    def capture(self) -> Callable[[], bytes]:
        """Cheap and consistent; the packer it returns may run in a thread."""
        ...

    def unpack(self, data: bytes) -> Restore:
        """Touches nothing of the present state, and may run in a thread; the function it returns replaces it, at once."""
        ...

    def next_timer_ms(self) -> int | None:
        """State time until something timed is due; None: no ticks are needed."""
        ...


@dataclass(frozen=True, slots=True)
class Up:
    """Frames can be sent to it from now on; nothing that was sent before is on its way."""

    peer: VoterId


@dataclass(frozen=True, slots=True)
class Down:
    peer: VoterId


@dataclass(frozen=True, slots=True)
class Mail:
    peer: VoterId
    message: AnyMessage
    size: int = 0


Incident = Up | Down | Mail


class Links(Protocol):
    """The streams to other servers, as far as a turn needs them."""

    def send(self, peer: VoterId, message: AnyMessage) -> bool:
        """Stage a frame for the next flush; False when it cannot be."""
        ...

    def take(self) -> Incident | None: ...
    def connected(self) -> list[VoterId]: ...
    def reach(self, peers: Collection[NodeId]) -> None: ...


@dataclass(frozen=True, slots=True)
class Clocks:
    now_s: Callable[[], float]
    """CLOCK_BOOTTIME."""
    wall_ms: Callable[[], int]
    is_synchronised: Callable[[], bool]
    """The kernel calls the wall clock synchronised."""
