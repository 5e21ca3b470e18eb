"""Whether the voters can decide, and whether they still could without one of them: in words, with names and numbers.

For people; it counts who is alive as gossip at the node asked sees it. What guards the log
itself is `raft/voters.py`, which removes nobody whose leaving would stop it.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshd.errors import Conflict

Voters = Mapping[str, bool]
"""Names, and whether each is alive."""


def check_without(name: str, others: Voters, *, heirs: int) -> None:
    """Raises Conflict when the other voters, with `heirs` that could take the seat, could not decide without this one."""
    alive, needed = sum(others.values()), len(others) // 2 + 1
    if alive + heirs >= needed:
        return
    if not others:
        raise Conflict(
            f"{name} is the only voter, and no other server is alive to take its place",
            hint="bring another server back, or join one: `mesh node invite --role server`",
        )
    down = ", ".join(other for other, is_alive in others.items() if not is_alive)
    raise Conflict(
        f"without {name} the mesh could decide nothing: {_alive(others)} of the other {len(others)} voters, "
        f"and {needed} are needed",
        hint=f"bring back {down} first; what will never come back goes by `mesh node remove NAME`",
    )


def describe_stop(voters: Voters) -> str:
    """Why nothing can be decided now. Empty when a majority is alive, or nobody here knows who votes."""
    needed = len(voters) // 2 + 1
    if not voters or sum(voters.values()) >= needed:
        return ""
    down = " or ".join(voter for voter, is_alive in voters.items() if not is_alive)
    lost = "; if none of them ever comes back: `meshd recover` on a server that is left"
    return f"{_alive(voters)} of {len(voters)} voters, and {needed} are needed: bring back {down}{lost}"


def _alive(voters: Voters) -> str:
    names = [voter for voter, is_alive in voters.items() if is_alive]
    if not names:
        return "none is alive"
    return f"{len(names)} {'is' if len(names) == 1 else 'are'} alive ({', '.join(names)})"
