"""Each rule of protocol.md 4-7, of placement, gossip and Raft is needed: without it a seed breaks an invariant.

And each check is needed: there is a bug that this one catches. To see it: `python -m meshd.testing.sim --seed N --without RULE --trace`;
to find a seed anew: `python -m meshd.testing.sim --seeds 200 --without RULE --find CHECK`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meshd import testing
from meshd.testing.ablations import RULES
from meshd.testing.campaign import run_seed
from tests.sim import test_history_mesh

FAILS = {
    "an epoch is synced before use": (23, "a session outlives its views"),
    "the open's answer names what is kept": (184, "what starts is leased"),
    "notices of another epoch are not obeyed": (3, "what starts is leased"),
    "no notice is obeyed while opening": (23, "what starts is leased"),
    "a view that has ended never revives": (5, "a session outlives its views"),
    "attempts start only under a live view": (165, "starts need a view"),
    "a new leader waits before it ends": (145, "a session outlives its views"),
    "the floor": (2, "what starts is leased"),
    "Reconcile frees up to F only": (18, "fail starts once"),
    "once per attempt over all epochs": (51, "what starts is leased"),
    "grants only while leading": (3, "only a leader grants"),
    "what has ended stays listed": (2, "fail starts once"),
    "only what fits is leased": (0, "what runs fits"),
    "ids outlive their jobs": (2, "a resend never doubles"),
    "suspicion ends in death": (0, "a death is seen within 5 s"),
    "once per attempt": (2, "what starts is leased"),
    "who comes back is adopted": (3, "who comes back keeps its work"),
    "what is leased is taken from the offer": (24, "leases fit the offer"),
    "the accused objects": (1, "facts converge"),
    "whose roots differ compare": (0, "facts converge"),
    "an older or ended epoch opens nothing": (39, "what starts is leased"),
    "strays are seen dead first": (152, "a machine runs what it has room for"),
    "exactly the next seq is applied": (2, "leases fit the slots"),
    "the view counts from the sending": (5, "a session outlives its views"),
    "a late answer opens nothing": (5, "a session outlives its views"),
    "digests are compared": (85, "everything finishes"),
    "only the current lease completes": (87, "only the current lease finishes"),
    "the listed are adopted before on_lost": (37, "who comes back keeps its work"),
    "a cut-off node stops what was promised": (49, "one at a time"),
    "cut off counts from the last view": (49, "one at a time"),
    "what it stopped stays held as lost": (5, "fail starts once"),
    "who thinks all others dead is cut off": (129, "results lie on two disks"),
    "an incarnation rises with every start": (39, "facts converge"),
    "no grant after the end is proposed": (278, "no grant after the end is proposed"),
    "a majority decides": (12, "nobody can lead without what is committed"),
    "a read waits for a round": (29, "reads see what was told before"),
    "a snapshot is durable before it replaces anything": (109, "only rot loses what was synced"),
    "a snapshot says what it covers": (25, "replicas agree"),
    "an answer says where it stands": (0, "writes come after what was told before"),
    "entries are durable before they are acknowledged": (9, "nobody can lead without what is committed"),
    "the leader counts itself once it has synced": (9, "nobody can lead without what is committed"),
    "a vote is durable before it is given": (9, "what was said is remembered"),
    "a term rises after a trial": (9, "a term rises when a majority would vote"),
    "a follower commits what it has compared": (29, "no server contradicts another"),
    "votes go to the newest log": (9, "a leader has all that is committed"),
    "a majority elects": (13, "one leader a term"),
    "a quorum of clocks makes the date": (44, "one wrong clock moves no date"),
    "a leader commits by its own term": (13, "a leader commits by its own term"),
    "one vote a term": (61, "one vote a term"),
    "a follower commits what its leader has": (8, "one entry at each index"),
    "a follower acknowledges what it has": (9, "what is acknowledged stays while its term lasts"),
    "an answer goes to whose command it was": (9, "nothing raises while entries are applied"),
    "what is refused is answered": (9, "apply is total"),
    "a log is cut only where it contradicts": (13, "what is committed stays where it is"),
    "a leader sends what follows": (9, "servers speak as agreed"),
    "the date never goes back": (28, "time is monotonic"),
    "a view says as of when it is": (13, "reads show what the log made"),
    "a failed sync stops the server": (42, "only rot loses what was synced"),
    "a snapshot that has arrived is installed": (153, "what is acknowledged stays while its term lasts"),
    "one change of voters at a time": (11, "two majorities share a voter"),
    "an answer belongs to the start that asked": (154, "an answer is to what was asked"),
    "a snapshot keeps the tail that agrees": (125, "a snapshot takes nothing back"),
    "who got a snapshot looks at the state anew": (60, "facts converge"),
    "as many vote as shall": (0, "a mesh forms"),
    "to join twice is to join once": (43, "a stranger with an invite may join"),
    "to remove twice is to remove once": (43, "a dead member can be removed"),
    "to submit twice is to submit once": (3, "a good job is taken"),
    "another boot waits": (17, "one at a time"),
    "another boot is let in after a while": (0, "everybody is let in"),
    "a lease that was never started counts": (2, "attempts and fences only rise"),
    "a second attempt has a fence of its own": (2, "fences rise over all jobs"),
    "what has finished is not cancelled": (2, "finished never moves"),
    "the log remembers who holds what": (11, "results outlive a machine"),
    "why a job waits is said": (0, "explain says what each node lacks"),
    "what is held is not begun again": (10, "once per attempt"),
    "what does not fit now waits": (0, "no work is thrown away"),
    "a peer has time to answer": (0, "the living are not called dead"),
    "what a node says outbids what it said before its start": (0, "who comes back is whole within 5 s"),
    "a leader goes back to where its follower is": (28, "every voter has everything"),
    "a torn end is cut": (57, "what was written can be read"),
}
"""By rule: the seed, and the check that catches it there."""


SEEDS = 300
"""Every planted bug is caught within these."""
PROFILES = 16
"""Seeds that differ by so many meet the same kind of faults."""

NAMES = re.compile(r'(?:breach|broken|knows_the_same)\(\s*"([^"]+)"')


def test_every_check_was_seen_to_fail() -> None:
    sources = Path(testing.__file__).parent.glob("*.py")
    names = {name for source in sources for name in NAMES.findall(source.read_text())}

    seen = {check for _, check in FAILS.values()} | {check for _, check, *_ in test_history_mesh.FAILS.values()}

    assert names == seen


def test_every_rule_has_a_seed() -> None:
    assert set(FAILS) == set(RULES)


@pytest.mark.parametrize("rule", FAILS)
def test_without_the_rule_its_check_fails(rule: str) -> None:
    """The named seed first. A change elsewhere may have moved what it meets: then one of its kind, or any of the others."""
    named, check = FAILS[rule]
    alike = range(named % PROFILES, SEEDS, PROFILES)

    seed = next((seed for seed in (named, *alike, *range(SEEDS)) if run_seed(seed, rule).check == check), None)

    assert seed is not None, "taking this rule out goes unnoticed"
    assert not run_seed(seed).breach
