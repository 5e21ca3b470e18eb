"""How much of a disk new work leaves free: what ends work, and the log, live on the rest (protocol.md 9)."""

from __future__ import annotations

FREE_BYTES_MIN = 1 << 30
"""Completions, snapshots and a day's log of a busy mesh fit into it."""
_SHARE = 20
"""Or a twentieth of the disk, where that is more: file systems get slow in their last percents."""
_AGAIN = 1.1
"""So much more has to be free again: else what one answer frees, the next one takes."""


def soft_mark(total: int, bytes_min: int) -> int:
    """Below so many free bytes no new work is taken."""
    return max(total // _SHARE, bytes_min)


def is_full(free: int, total: int, bytes_min: int, *, was_full: bool) -> bool:
    mark = soft_mark(total, bytes_min)
    return free < (mark * _AGAIN if was_full else mark)
