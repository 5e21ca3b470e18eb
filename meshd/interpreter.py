"""What an agent asks of its interpreter, so that neither the garbage collector nor another thread holds up the loop."""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.001
"""A thread that computes gives way after so long. Python's 5 ms are paid by the loop each time that it waits for the network
while a snapshot is packed: it was 26 ms late in the median on a busy machine, and is 1-14."""


def prepare() -> None:
    """Before the loop starts. What the modules hold lives as long as the process: a full collection looked at it for 40 ms."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_S)


def settle() -> None:
    """When the agent is ready. The queue's tables were read in and stay: to look through 100,000 jobs takes 20 ms."""
    gc.freeze()
