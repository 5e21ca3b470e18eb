"""Each rule of protocol.md 4-7, of placement and of gossip is needed: without it, the named seed breaks an invariant.

To see it: `python -m meshd.testing.sim --seed N --without RULE --trace`.
"""

from __future__ import annotations

import pytest

from meshd.testing.ablations import RULES, without
from meshd.testing.checks import Breach
from meshd.testing.sim import Sim

FAILS = {
    "an epoch is synced before use": (7, "what starts is leased"),
    "the open's answer names what is kept": (38, "what starts is leased"),
    "notices of another epoch are not obeyed": (3, "what starts is leased"),
    "no notice is obeyed while opening": (23, "what starts is leased"),
    "a view that has ended never revives": (5, "a session outlives its views"),
    "attempts start only under a live view": (5, "starts need a view"),
    "a new leader waits before it ends": (1, "a session outlives its views"),
    "the floor": (2, "what starts is leased"),
    "Reconcile frees up to F only": (2, "what starts is leased"),
}
"""By rule: the seed, and what it breaks."""


def test_rules_are_named_as_they_are() -> None:
    assert set(FAILS) <= set(RULES)


@pytest.mark.parametrize("rule", FAILS)
def test_without_the_rule_a_seed_breaks_an_invariant(rule: str) -> None:
    """The named seed first. A change elsewhere may have moved what it meets: then any of the two hundred will do."""
    named, _ = FAILS[rule]

    seed = next((seed for seed in (named, *range(200)) if _breaks(seed, rule)), None)

    assert seed is not None, "taking this rule out goes unnoticed"
    Sim(seed).run()


def _breaks(seed: int, rule: str) -> bool:
    with without(rule):
        try:
            Sim(seed).run()
        except Breach:
            return True
    return False
