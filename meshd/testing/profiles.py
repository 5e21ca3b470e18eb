"""What a seed stands for: which faults, and which load."""

from __future__ import annotations

from random import Random

from meshd.model import OnLost
from meshd.testing.faults import CALM, Faults
from meshd.testing.load import Load

BUSY = Load(jobs=(10, 20), lengths_ms=(20, 300, 2_000, 8_000), stdin_bytes=(0, 0, 1_000, 4_000))
"""So that there is always something on its way into the log."""


def profile_of(seed: int) -> tuple[Faults, Load]:
    """Two of sixteen seeds get a bit of everything; the others press on one spot, where a general mix seldom hits."""
    match seed % 16:
        case 0:
            return CALM, Load()
        case 1:  # long absences from jobs that may run once at a time, and copies of who runs them; a quorum stays, and gives them to others
            promised = Load(
                jobs=(8, 11),
                on_lost=(OnLost.RERUN, OnLost.WAIT),
                lost_after_ms=(30_000, 35_000),
                lengths_ms=(25_000, 90_000),
                counts=(1,),
            )
            return Faults(workers=(2, 3, 4), cuts=2, cut_ms=(60_000, 100_000), copies=3), promised
        case 2:  # claims that change all the time, doubled and late
            return Faults(workers=(2, 3, 4), double=0.5, late=0.4, offers=40), Load(
                jobs=(15, 25), lengths_ms=(20, 300), counts=(3, 6)
            )
        case 3:  # many leaders, each of which tells again what is leased; nodes come and go meanwhile
            careful = Load(
                jobs=(4, 7),
                on_lost=(OnLost.FAIL, OnLost.WAIT),
                lost_after_ms=(45_000,),
                lengths_ms=(25_000,),
                counts=(1, 3),
            )
            return Faults(
                lasts_ms=70_000,
                late=0.4,
                late_ms=(1_000, 12_000),
                transfers=40,
                cuts=8,
                cut_ms=(11_000, 15_000),
                cut_breaks=0,
            ), careful
        case 4:  # nodes that leave and hand back what they have
            return Faults(drains=1, hands_over=1), Load(
                jobs=(6, 9),
                on_lost=(OnLost.RERUN, OnLost.WAIT, OnLost.FAIL, OnLost.FAIL),
                lengths_ms=(8_000, 25_000),
                counts=(2, 4),
            )
        case 5:  # a bad link: much is lost, or comes late or twice; and sleepers that wake to old answers
            return Faults(
                workers=(2, 3, 4),
                lose=0.35,
                double=0.3,
                late=0.3,
                late_ms=(1_000, 8_000),
                freezes_then_cuts=2,
                cut_breaks=0,
                offers=10,
            ), Load(
                jobs=(8, 12),
                on_lost=(OnLost.RERUN, OnLost.WAIT, OnLost.FAIL, OnLost.FAIL),
                lost_after_ms=(0, 0, 5_000),
                lengths_ms=(300, 2_000, 8_000, 25_000),
            )
        case 6:  # absences about as long as it takes to be called dead, far away, so that an end takes a while
            return Faults(
                workers=(4, 5),
                latency_ms=(60, 220),
                cuts=14,
                cuts_hit_servers=False,
                cut_ms=(5_500, 7_200),
                cut_breaks=1,
                slow_disk=0,
            ), Load()
        case 7:  # quick restarts, and reports of the life before that arrive in the next
            return Faults(late=0.4, late_ms=(1_000, 12_000), crashes=10, restart_ms=((100, 2_000),)), Load(
                jobs=(15, 25), lengths_ms=(300, 2_000), counts=(3, 6)
            )
        case 8:  # nodes with more than they can run, which lose it while they are away
            crowd = Load(jobs=(8, 10), on_lost=(OnLost.RERUN,), lost_after_ms=(0,), lengths_ms=(25_000,), counts=(3,))
            return Faults(cuts=5, cut_ms=(12_500, 20_000), cut_breaks=1), crowd
        case 9:  # power that goes in the middle of a write, everywhere at once too
            return Faults(
                crashes=4, power_loss=1, restart_ms=((100, 2_000),), blackouts=3, power_cuts=6, slow_disk=0.2, entries_at_once=2,
                stream_break=0.002,
            ), BUSY  # fmt: skip
        case 10:  # disks that hang, fail, fill up and rot; servers that are back before their commands are answered
            return Faults(
                disk_hangs=3, failed_syncs=6, full_disks=3, crashes=5, power_loss=0.7, rots=2, slow_disk=0.2, blinks=4
            ), BUSY
        case 11:  # servers that come and go
            return Faults(
                servers=(3, 4, 5, 6), grows=3, drains=1, comes_back=0.7, dies_for_good=0.5, crashes=3, transfers=3,
                lose=0.02, stream_break=0.002,
            ), BUSY  # fmt: skip
        case (
            12
        ):  # halves that do not hear each other, one-way cuts, leaders that come back late; newcomers; clocks that lie
            return Faults(
                servers=(3, 5), splits=6, cuts=4, cut_ms=(500, 12_000), clock_jumps=6, stream_stall=0.005,
                stream_break=0.002, freezes=3, guests=2,
            ), BUSY  # fmt: skip
        case 13:  # leaders that are hunted, over slow networks and slow disks: many elections, votes that split
            return Faults(
                servers=(3, 5, 5), hunts=12, latency_ms=(5.0, 60.0), slow_disk=0.3, slow_ms=150, stream_break=0.01,
                entries_at_once=1, snapshot_entries=(6, 12, 40),
            ), BUSY  # fmt: skip
        case _:
            return _mixed(Random(f"profile {seed}")), Load()  # noqa: S311 - a simulation


def _mixed(random: Random) -> Faults:
    return Faults(
        lose=random.choice((0, 0.02, 0.1)),
        double=random.choice((0, 0.05, 0.4)),
        late=random.choice((0, 0.05, 0.3)),
        late_ms=(100.0, random.choice((1_000.0, 4_000.0, 12_000.0))),
        crashes=random.randint(0, 4),
        freezes=random.randint(0, 2),
        cuts=random.randint(0, 3),
        transfers=random.randint(0, 3),
        offers=random.choice((0, 3, 15)),
        drains=0.3,
        freezes_then_cuts=random.randint(0, 2),
        cut_breaks=random.choice((0, 0.3, 1)),
        dies_for_good=0.15,
        servers=(3, 3, 4, 5),
        stream_stall=random.choice((0, 0.002, 0.01)),
        stream_break=random.choice((0, 0.001, 0.005)),
        splits=random.randint(0, 3),
        disk_hangs=random.randint(0, 2),
        failed_syncs=random.randint(0, 1),
        full_disks=random.randint(0, 1),
        blackouts=random.choice((0, 0, 1)),
        grows=random.choice((0, 0, 1, 2)),
        comes_back=0.5,
        slow_disk=random.choice((0.02, 0.1, 0.3)),
        power_cuts=random.choice((0, 0, 2)),
        rots=random.choice((0, 0, 1)),
        hunts=random.choice((0, 0, 3)),
        guests=random.choice((0, 0, 1)),
        blinks=random.choice((0, 0, 2)),
        copies=random.choice((0, 0, 1)),
    )
