"""How rough a simulated world is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Faults:
    """Probabilities per message, counts per run, times in milliseconds."""

    lasts_ms: int = 40_000
    lose: float = 0
    double: float = 0
    latency_ms: tuple[float, float] = (0.5, 8.0)
    late: float = 0
    late_ms: tuple[float, float] = (100.0, 4_000.0)
    slow_disk: float = 0.1
    """How often a commit takes up to `slow_ms` instead of 30."""
    slow_ms: float = 300.0
    crashes: int = 0
    power_loss: float = 0.3
    """How many crashes take the machine with them: nobody says that its connections are gone."""
    restart_ms: tuple[tuple[float, float], ...] = ((100.0, 2_000.0), (2_000.0, 9_000.0), (9_000.0, 30_000.0))
    """Each crash draws one of these."""
    freezes: int = 0
    cuts: int = 0
    cut_ms: tuple[float, float] = (2_000.0, 40_000.0)
    cut_breaks: float = 0.3
    """How many cuts are seen at once, as connections that break; else their silence has to be noticed."""
    transfers: int = 0
    offers: int = 0
    drains: float = 0
    hands_over: float = 0.5
    freezes_then_cuts: int = 0
    dies_for_good: float = 0


CALM = Faults(lasts_ms=0)
