"""Each rule of protocol.md 4-7, of placement and of gossip is needed: without it, the named seed breaks an invariant.

To see it: `python -m meshd.testing.sim --seed N --without RULE --trace`.
"""

from __future__ import annotations

import pytest

from meshd.testing.ablations import RULES, without
from meshd.testing.checks import Breach
from meshd.testing.sim import Sim

FAILS = {
    "an epoch is synced before use": (19, "fail starts once"),
    "an older or ended epoch opens nothing": (3, "what starts is leased"),
    "the open's answer names what is kept": (20, "what starts is leased"),
    "strays are seen dead first": (80, "a machine runs what it has room for"),
    "notices of another epoch are not obeyed": (3, "what starts is leased"),
    "no notice is obeyed while opening": (7, "what starts is leased"),
    "exactly the next seq is applied": (38, "leases fit the slots"),
    "the view counts from the sending": (101, "a session outlives its views"),
    "a late answer opens nothing": (19, "a session outlives its views"),
    "a view that has ended never revives": (13, "a session outlives its views"),
    "attempts start only under a live view": (44, "starts need a view"),
    "grants only while leading": (1, "only a leader grants"),
    "no grant after the end is proposed": (126, "no grant after the end is proposed"),
    "a new leader waits before it ends": (3, "a session outlives its views"),
    "digests are compared": (28, "everything finishes"),
    "the floor": (2, "what starts is leased"),
    "Reconcile frees up to F only": (2, "fail starts once"),
    "what has ended stays listed": (2, "fail starts once"),
    "once per attempt": (2, "what starts is leased"),
    "once per attempt over all epochs": (171, "what starts is leased"),
    "only the current lease completes": (27, "fail starts once"),
    "who comes back is adopted": (3, "who comes back keeps its work"),
    "the listed are adopted before on_lost": (9, "who comes back keeps its work"),
    "a cut-off node stops what was promised": (181, "one at a time"),
    "cut off counts from the last view": (181, "one at a time"),
    "what it stopped stays held as lost": (16, "fail starts once"),
    "only what fits is leased": (0, "what runs fits"),
    "what is leased is taken from the offer": (12, "leases fit the offer"),
    "who thinks all others dead is cut off": (3, "results lie on two disks"),
    "ids outlive their jobs": (2, "a resend never doubles"),
    "the accused objects": (1, "facts converge"),
    "an incarnation rises with every start": (33, "facts converge"),
    "suspicion ends in death": (0, "a death is seen within 5 s"),
    "whose roots differ compare": (0, "who comes back is whole within 5 s"),
}
"""By rule: the seed, and what it breaks."""


def test_every_rule_has_a_seed() -> None:
    assert set(FAILS) == set(RULES)


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
