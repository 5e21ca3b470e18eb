"""The clocks of this machine: one that nobody can set, one that people read, and whether the kernel trusts that one."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from meshd.raft.surroundings import Clocks

_TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised."""
_TIMEX_BYTES = 512
"""More than struct timex has on any machine; all zero it asks and changes nothing."""

# Looked up once: each batch of the log asks, and looking it up takes ten times as long as the answer.
_adjtimex: Callable[[object], int] | None
try:
    _adjtimex = ctypes.CDLL(None).adjtimex
except (OSError, AttributeError):
    _adjtimex = None


def boottime_s() -> float:
    """Also counts while the machine sleeps; nobody can set it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boottime_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def wall_clock_ms() -> int:
    return int(time.time() * 1000)


def is_synchronised() -> bool:
    """The kernel says that something (chrony, ntpd, a hypervisor) keeps the clock; no, where it may not be asked."""
    return _adjtimex is not None and 0 <= _adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)) < _TIME_ERROR


CLOCKS = Clocks(boottime_s, wall_clock_ms, is_synchronised)
