"""Which life of the mesh's log: the recoveries that it has been through (protocol.md 10).

    ()  ──recover──▶  (a,)  ──recover──▶  (a, b)
     └───recover──▶  (c,)                 two recoveries of one log: neither descends from the other

A lineage names each recovery by its random, oldest first; its length is the number of the
recovery epoch. Servers share a log only when their lineages are equal; whoever is at a
beginning of a lineage can follow it, and never goes back.
"""

from __future__ import annotations

Lineage = tuple[str, ...]

RECOVERIES_MAX = 31
"""A fence is the number times 2**48 plus a counter (protocol.md 5), and has to stay below 2**53."""

NUMBER_BITS = 48
"""Terms, positions and the counter in a fence stay below."""
RANDOM_BYTES = 8


def descends(lineage: Lineage, parent: Lineage) -> bool:
    """Did a recovery of `parent`, or several, lead to this one?"""
    return len(lineage) > len(parent) and lineage[: len(parent)] == parent


def is_next(lineage: Lineage, parent: Lineage) -> bool:
    return descends(lineage, parent) and len(parent) + 1 == len(lineage) <= RECOVERIES_MAX


def name_of(lineage: Lineage) -> str:
    """For people: the number, and enough of the random to tell two of the same number apart."""
    return f"{len(lineage)}-{lineage[-1][:8]}" if lineage else "0"


def since(lineage: Lineage, number: int) -> int:
    """A term, a log position, a fence's counter, so that those of a later recovery are larger: all begin lower than some that are lost."""
    return (len(lineage) << NUMBER_BITS) + number
