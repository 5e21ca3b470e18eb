"""How rough a simulated world is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Faults:
    """Probabilities per message, counts per run, times in milliseconds."""

    servers: tuple[int, ...] = (3,)
    """How many the mesh begins with: one of these."""
    workers: tuple[int, ...] = (0, 1, 2)
    """… and so many nodes without the log: what they propose goes through the network, and comes late or twice."""
    lasts_ms: int = 40_000

    # messages and connections
    lose: float = 0
    double: float = 0
    latency_ms: tuple[float, float] = (0.5, 8.0)
    late: float = 0
    late_ms: tuple[float, float] = (100.0, 4_000.0)
    stream_stall: float = 0
    """How often frames of a stream, and all behind them, are late by `stream_stall_ms`."""
    stream_stall_ms: tuple[float, float] = (200.0, 3_000.0)
    stream_break: float = 0
    """How often a connection breaks instead of taking another frame."""
    cuts: int = 0
    """One node is cut off from all others, or they from it."""
    cuts_hit_servers: bool = True
    """Else the log goes on meanwhile."""
    cut_ms: tuple[float, float] = (2_000.0, 40_000.0)
    cut_breaks: float = 0.3
    """How many cuts are seen at once, as connections that break; else their silence has to be noticed."""
    splits: int = 0
    """Two halves do not hear each other; perhaps one node hears both."""
    split_ms: tuple[float, float] = (500.0, 15_000.0)

    entries_at_once: int = 512
    """That a leader puts into one message: with few, a follower is often between two that belong together."""

    snapshot_entries: tuple[int, ...] = (20, 40, 60)
    """Servers write their state down at different moments, one of these apart: what one still needs another has trimmed."""

    # disks
    slow_disk: float = 0.05
    """How often a sync takes up to `slow_ms` instead of six."""
    slow_ms: float = 300.0
    disk_hangs: int = 0
    """Nothing that a disk was asked for is done for a while."""
    hang_ms: tuple[float, float] = (500.0, 15_000.0)
    failed_syncs: int = 0
    full_disks: int = 0
    full_ms: tuple[float, float] = (1_000.0, 15_000.0)

    # machines and processes
    crashes: int = 0
    power_loss: float = 0.3
    """How many crashes take the machine with them: nobody says that its connections are gone."""
    restart_ms: tuple[tuple[float, float], ...] = ((100.0, 2_000.0), (2_000.0, 9_000.0), (9_000.0, 30_000.0))
    """Each crash draws one of these."""
    blackouts: int = 0
    """All machines lose power at once, each in the middle of what its disk is at."""
    power_cuts: int = 0
    """Followers lose power in the middle of a write, the leader a moment later; it is away while they are back."""
    rots: int = 0
    """Bits of a server's log or snapshot turn over while it is down; of one server at a time."""
    hunts: int = 0
    """The leader of the moment hands over, is cut off, killed or frozen, under commands and reads; perhaps the next too."""
    blinks: int = 0
    """A follower is killed with commands on their way, and is back before they are answered."""
    freezes: int = 0
    freezes_then_cuts: int = 0
    clock_jumps: int = 0
    """One node's wall clock is wrong for a while."""

    # what people do
    transfers: int = 0
    offers: int = 0
    drains: float = 0
    hands_over: float = 0.5
    comes_back: float = 0
    """How many drained nodes are taken back into service."""
    grows: int = 0
    """Servers that join while all this happens …"""
    guests: int = 0
    """… and nodes without the log."""
    copies: int = 0
    """Disks of a machine that is at work are copied, and the copy starts elsewhere."""
    dies_for_good: float = 0


CALM = Faults(lasts_ms=0)
