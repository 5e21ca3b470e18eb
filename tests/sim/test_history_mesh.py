"""The mesh with a history of which nearly all finished work becomes a part, on disks that lose power, fill up, rot and are lost.

`python -m meshd.testing.sim --history --seed N --trace` shows one seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from meshd.history import keeping
from meshd.raft.state import history
from meshd.testing import archives
from meshd.testing.archives import Archive
from meshd.testing.checks import Breach
from meshd.testing.sim import Sim

SEEDS = (0, 2, 5, 7, 9, 10, 11, 14)
"""Without faults; doubled and late messages; bad links; restarts; power cuts; bad disks; servers that come and go; all of it."""


@pytest.mark.parametrize("seed", SEEDS)
def test_finished_work_stays_what_it_was_wherever_it_is(seed: int) -> None:
    sim = Sim(seed, has_history=True).run()

    assert sim.world.checks.oracle.history.dropped > 2, "nothing has left the core: this tests nothing"


def _is_always_safe(self: history.History, segment: int, voters: tuple[str, ...]) -> bool:
    return True


def _tells_before_it_syncs(original: Callable[..., Any]) -> Callable[..., Any]:
    def go_on(self: Archive, segment: Any, steps: list[Callable[[], None]]) -> None:
        if len(steps) == 3:
            write = steps[0]

            def write_and_tell() -> None:
                write()
                self._disk.rename(segment.hash + archives.NEW, segment.hash)
                self._take_in(segment.hash)
                self._is_busy = False

            steps = [write_and_tell]
        original(self, segment, steps)

    return go_on


def _fetches_nothing(original: Callable[..., Any]) -> Callable[..., Any]:
    def work_of(*arguments: Any, **options: Any) -> keeping.Work:
        work = original(*arguments, **options)
        return keeping.Work(work.upto, work.write, (), work.tell, work.drop, work.may_seal)

    return work_of


def _answers_with_what_it_has(original: Callable[..., Any]) -> Callable[..., Any]:
    def dropped(self: Archive) -> Any:
        try:
            return original(self)
        except archives.NotHere:
            return {}

    return dropped


def _packs_as_it_comes(original: Callable[..., Any]) -> Callable[..., Any]:
    packed = 0

    def pack(number: int, records: Any) -> Any:
        nonlocal packed
        packed += 1
        return original(number, records if packed % 2 else records[::-1])

    return pack


FAILS = {
    "a Drop waits for a quorum": (30, "what is dropped lies on a quorum of disks", history.History, "is_safe", _is_always_safe),
    "what is stored is synced": (
        9, "what is dropped lies on a quorum of disks", Archive, "_go_on", _tells_before_it_syncs(Archive._go_on),
    ),
    "what is missing is fetched": (
        10, "finished work can be read everywhere", archives, "work_of", _fetches_nothing(keeping.work_of),
    ),
    "a read waits for the history": (
        42, "reads show what the log made", Archive, "_dropped", _answers_with_what_it_has(Archive._dropped),
    ),
    "a segment has one order": (
        2, "segments are the same everywhere", archives, "pack", _packs_as_it_comes(archives.pack),
    ),
}  # fmt: skip
"""By rule: the seed, what it breaks without the rule, and how the rule is taken out."""


@pytest.mark.parametrize("rule", FAILS)
def test_without_the_rule_the_seed_fails(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, check, owner, name, replacement = FAILS[rule]
    monkeypatch.setattr(owner, name, replacement)

    with pytest.raises(Breach, match=check):
        Sim(seed, has_history=True).run()
