"""Raft's own rules, each with a way to take it out: what a plausible engine or journal without it would do.

Most are holes that stock PySyncObj has (engine.py lists them) or that sketches of a cure had.
`tests/sim/test_ablations.py` names a seed for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meshd.raft import server, turn
from meshd.raft.configurations import Configurations
from meshd.raft.messages import VoterId
from meshd.raft.proposals import Proposal
from meshd.raft.server import Capture, Server
from meshd.raft.storage.snapshot import Packed

Patch = tuple[Any, str, Any]
"""Where, which name, and what to put there."""


def wrapped(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Patch:
    return owner, name, make(vars(owner)[name])


def _installs_before_it_saves(self: turn.Turns, packed: Packed) -> int:
    return 0


def _captures_one_entry_less(original: Callable[..., Capture | None]) -> Callable[..., Capture | None]:
    def capture(self: Server) -> Capture | None:
        made = original(self)
        return None if made is None else Capture(made.index - 1, made.term, made.voters, made.pack)

    return capture


def _one_is_enough(self: Configurations, of: Callable[[VoterId], Any]) -> Any:
    return max(of(voter) for voter in self.voters)


def _names_an_older_position(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolver(batch: list[Proposal]) -> Callable[[list[bytes] | None, int, str], None]:
        resolve = original(batch)
        return lambda answers, index, why: resolve(answers, max(index - 3, 1) if answers is not None else index, why)

    return resolver


RAFT_RULES: dict[str, tuple[Patch, ...]] = {
    "a snapshot is durable before it replaces anything": ((turn.Turns, "_saved_on_disk", _installs_before_it_saves),),
    "a snapshot says what it covers": (wrapped(Server, "capture", _captures_one_entry_less),),
    "a majority decides": ((Configurations, "reached", _one_is_enough),),
    "an answer says where it stands": (wrapped(server, "resolver", _names_an_older_position),),
    "an answer belongs to the start that asked": ((server, "first_request", lambda start: 0),),
}
