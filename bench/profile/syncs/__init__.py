"""When agents wait for their disk: every sync of theirs, and what share of a job's time that is.

An agent started with `environment` times its own syncs (sitecustomize.py) and leaves the moments when it ends.
"""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Span = tuple[float, float]
"""Beginning and end, seconds of the monotonic clock."""


@dataclass(frozen=True, slots=True)
class Synced:
    """What syncs had to do with a number of jobs, one after the other."""

    a_job: float
    p50_ms: float
    p99_ms: float
    covered_p50_ms: float
    """Of a job's time, during which at least one of them ran."""


def environment(directory: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).parent), "PROFILE_SYNCS": str(directory)}


def syncs_of(directory: Path, pid: int) -> list[Span]:
    """Of an agent that has ended."""
    moments = array("d", Path(directory, str(pid)).read_bytes())
    return list(zip(moments[::2], moments[1::2], strict=True))


def synced(jobs: Sequence[Span], syncs: Sequence[Span]) -> Synced:
    """`jobs` do not overlap. Syncs that began during one of them count, and of others what lies within."""
    ordered = sorted(syncs)
    within = [clipped(ordered, job) for job in jobs]
    took_ms = [(end - began) * 1000 for began, end in ordered if any(job[0] <= began < job[1] for job in jobs)]
    hundredths = statistics.quantiles(took_ms, n=100)
    covered = [sum(end - began for began, end in united(spans)) for spans in within]
    return Synced(len(took_ms) / len(jobs), hundredths[49], hundredths[98], statistics.median(covered) * 1000)


def clipped(spans: Sequence[Span], to: Span) -> list[Span]:
    """What of them lies within."""
    return [(max(began, to[0]), min(end, to[1])) for began, end in spans if began < to[1] and end > to[0]]


def united(spans: Sequence[Span]) -> list[Span]:
    """The same moments without overlaps; `spans` are sorted."""
    result: list[Span] = []
    for began, end in spans:
        if result and began <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((began, end))
    return result
