"""What time a batch says it is: elapsed milliseconds, and a wall clock that one wrong machine cannot move.

Elapsed time is the leader's own CLOCK_BOOTTIME since the last entry. The wall time is the
state's last one plus that, or later when a quorum of clocks agrees that it is later; a
sole voter believes its own clock while that runs with CLOCK_BOOTTIME, and again when the
two agree, as they do after an operator has set one of them (protocol.md 3).
"""

from __future__ import annotations

from collections.abc import Sequence

AGREE_MS = 5_000
"""Clocks of a quorum within so much of each other are believed."""
DRIFT_MS = 60_000
"""A sole voter's clock that moves by more against CLOCK_BOOTTIME has been set, perhaps wrongly."""
JUMP_MS_MAX = 30 * 86_400_000
"""Over a start, a sole voter's clock may be ahead by less than this: the time it was switched off."""


def agreed_wall_ms(now_ms: int, offsets_ms: Sequence[int], voters: int) -> int | None:
    """The lowest clock of a quorum that agrees; None when none does. Offsets are wall minus CLOCK_BOOTTIME."""
    quorum = voters // 2 + 1
    ordered = sorted(offsets_ms)
    for lowest, highest in zip(ordered, ordered[quorum - 1 :], strict=False):
        if highest - lowest <= AGREE_MS:
            return now_ms + lowest
    return None


class OwnClock:
    """A sole voter's clock: believed at first under conditions, then for as long as it is steady."""

    def __init__(self) -> None:
        self._offset_ms: int | None = None
        self.is_refused = False
        """An operator must set the clock; the state's time goes on by elapsed time alone."""

    def wall_ms(self, *, now_ms: int, own_ms: int, expected_ms: int, is_founding: bool, is_synchronised: bool) -> int:
        """What to stamp. `expected_ms` is the state's last wall time plus what has elapsed."""
        offset, jump = own_ms - now_ms, own_ms - expected_ms
        if jump < -DRIFT_MS:
            # The mesh is ahead, perhaps by an operator's word: waiting for this clock would stop its time.
            is_believed = False
        elif self._offset_ms is None:
            is_believed = is_founding or is_synchronised or jump < JUMP_MS_MAX
        else:
            is_believed = abs(offset - self._offset_ms) <= DRIFT_MS or jump <= DRIFT_MS
        self.is_refused = not is_believed
        if not is_believed:
            return expected_ms
        self._offset_ms = offset
        return own_ms
