"""Each rule of protocol.md 4-7, of placement and of gossip is needed: without it, the named seed breaks an invariant.

To see it: `python -m meshd.testing.sim --seed N --without RULE --trace`.
"""

from __future__ import annotations

import pytest

from meshd.testing.ablations import RULES, without
from meshd.testing.checks import Breach
from meshd.testing.sim import Sim

FAILS = {
    "an epoch is synced before use": (7, "a session outlives its views"),
    "the open's answer names what is kept": (40, "what starts is leased"),
    "notices of another epoch are not obeyed": (3, "what starts is leased"),
    "no notice is obeyed while opening": (23, "what starts is leased"),
    "a view that has ended never revives": (5, "a session outlives its views"),
    "attempts start only under a live view": (181, "starts need a view"),
    "a new leader waits before it ends": (17, "a session outlives its views"),
    "the floor": (2, "what starts is leased"),
    "Reconcile frees up to F only": (2, "fail starts once"),
    "once per attempt over all epochs": (35, "what starts is leased"),
    "grants only while leading": (3, "only a leader grants"),
    "what has ended stays listed": (2, "fail starts once"),
    "only what fits is leased": (0, "what runs fits"),
    "ids outlive their jobs": (2, "a resend never doubles"),
    "suspicion ends in death": (0, "a death is seen within 5 s"),
    "once per attempt": (2, "what starts is leased"),
    "who comes back is adopted": (3, "who comes back keeps its work"),
    "what is leased is taken from the offer": (8, "leases fit the offer"),
    "the accused objects": (1, "facts converge"),
    "whose roots differ compare": (0, "facts converge"),
    "an older or ended epoch opens nothing": (87, "what starts is leased"),
    "strays are seen dead first": (72, "a machine runs what it has room for"),
    "exactly the next seq is applied": (162, "leases fit the slots"),
    "the view counts from the sending": (53, "a session outlives its views"),
    "a late answer opens nothing": (5, "a session outlives its views"),
    "digests are compared": (68, "everything finishes"),
    "only the current lease completes": (83, "fail starts once"),
    "the listed are adopted before on_lost": (133, "who comes back keeps its work"),
    "a cut-off node stops what was promised": (1, "one at a time"),
    "cut off counts from the last view": (1, "one at a time"),
    "what it stopped stays held as lost": (37, "fail starts once"),
    "who thinks all others dead is cut off": (97, "results lie on two disks"),
    "an incarnation rises with every start": (23, "facts converge"),
    "no grant after the end is proposed": (134, "no grant after the end is proposed"),
    "a majority decides": (12, "nobody can lead without what is committed"),
    "a read waits for a round": (45, "reads see what was told before"),
    "a snapshot is durable before it replaces anything": (75, "everything finishes"),
    "a snapshot says what it covers": (9, "replicas agree"),
    "an answer says where it stands": (0, "writes come after what was told before"),
    "entries are durable before they are acknowledged": (9, "nobody can lead without what is committed"),
    "the leader counts itself once it has synced": (9, "nobody can lead without what is committed"),
    "a vote is durable before it is given": (9, "what was said is remembered"),
    "a term rises after a trial": (9, "a term rises when a majority would vote"),
    "a follower commits what it has compared": (13, "no server contradicts another"),
    "votes go to the newest log": (25, "a leader has all that is committed"),
    "a majority elects": (13, "one leader a term"),
    "an answer belongs to the start that asked": (78, "a good job is taken"),
}
"""By rule: the seed, and what it breaks."""


SEEDS_WANTED = {
    "a failed sync stops the server",
    "a leader commits by its own term",
    "a log is cut only where it contradicts",
    "a quorum of clocks makes the date",
    "a snapshot keeps the tail that agrees",
    "one change of voters at a time",
    "one vote a term",
    "who got a snapshot looks at the state anew",
}
"""Rules whose seeds are to be found again, now that the log beneath is the real one."""


def test_every_rule_has_a_seed_or_is_known_to_want_one() -> None:
    assert set(FAILS) | SEEDS_WANTED == set(RULES) and not set(FAILS) & SEEDS_WANTED


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
