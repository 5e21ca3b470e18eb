"""The mesh's key is changed when a server leaves: who follows, who is refused, and who still gets in by an older one."""

from __future__ import annotations

import pytest

from meshd.admission import certificates
from meshd.admission.certificates import Greeting, certify, mesh_id
from meshd.admission.home import KnownPeer
from meshd.admission.keyring import LINKS_SHOWN, KeyRing, make_link
from meshd.directory import RAFT_PROTOCOL, Directory
from meshd.errors import NotAllowed, Unavailable
from meshd.model import KeyLink, Member, Role
from meshd.net.identity_key import KeyPair, verify
from meshd.raft.state.commands import Join, Reason, RemoveMember
from meshd.views import GetMembers, MembersView, MemberView
from tests.scene import SECRET, A, B, C, Scene

KEYS = [KeyPair.generate() for _ in range(4)]
FIRST = KEYS[0]
MESH = mesh_id(FIRST.public_bytes)
ME, ALICE, ROGUE = (KeyPair.generate() for _ in range(3))
BOTH = (Role.SERVER, Role.WORKER)


def link(serial: int, *, by: KeyPair | None = None, to: KeyPair | None = None) -> KeyLink:
    return make_link((by or KEYS[serial - 1]).sign, MESH, serial, (to or KEYS[serial]).public_bytes)


LINKS = tuple(link(serial) for serial in (1, 2, 3))


def ring(links=()):
    return KeyRing(MESH, FIRST.public_bytes, verify, links)


def greeting(key=ALICE, *, by=FIRST, links=(), roles=BOTH):
    return Greeting(certify(by.sign, MESH, key.node_id, roles, 1), 1, b"r", 0, "name", (), "", "0", links=links)


def directory(links=(), known=()):
    return Directory(ME.node_id, MESH, FIRST.public_bytes, verify, known, links)


def listed(*nodes: KeyPair, links=(), revoked=(), position=1, roles=BOTH) -> MembersView:
    rows = [MemberView(Member(node.node_id, "m", roles), "none", 0, 0, None, None, ()) for node in nodes]
    return MembersView(MESH, tuple(rows), tuple(node.node_id for node in revoked), position, 0, key_links=tuple(links))


# --- the chain -----------------------------------------------------------------------------------------------------------


def test_a_chain_is_followed_from_the_key_that_is_known():
    known = ring(LINKS[:1])
    assert known.learn(LINKS) and known.newest == KEYS[3].public_bytes
    assert not known.learn(LINKS[1:]) and known.serial == 3


@pytest.mark.parametrize(
    "forged",
    [
        (link(1, by=ROGUE),),
        (LINKS[0], link(2, by=FIRST)),  # who has only the first key cannot go on from the second
        (KeyLink(1, KEYS[2].public_bytes, LINKS[0].signature),),
        (KeyLink(2, *LINKS[0].__struct_fields__[:0], KEYS[1].public_bytes, LINKS[0].signature),),
        (LINKS[1],),
    ],
    ids=["by a stranger", "by the key before", "another key", "another number", "a gap"],
)
def test_what_does_not_follow_is_refused_and_nothing_of_it_is_kept(forged):
    known = ring()
    with pytest.raises(NotAllowed):
        known.learn(forged)
    assert known.serial == 0


def test_two_branches_are_refused_and_the_state_says_which_one_holds():
    """A removed server still has the key of its time: it can sign another successor to that one."""
    branch = (link(1, to=ROGUE),)
    known = ring(LINKS[:1])
    with pytest.raises(NotAllowed, match="two ways"):
        known.learn(branch)
    # Who was away may have followed the wrong one first; the replicated state puts it right.
    misled = ring()
    assert misled.learn(branch)
    assert misled.take(LINKS) and misled.newest == KEYS[3].public_bytes
    assert not misled.take(LINKS[:2]), "a list that is merely older changes nothing"


def test_a_greeting_shows_the_last_changes_only():
    keys = [KeyPair.generate() for _ in range(LINKS_SHOWN + 3)]
    chain = [make_link(by.sign, MESH, n + 1, to.public_bytes) for n, (by, to) in enumerate(zip([FIRST, *keys], keys, strict=False))]  # fmt: skip
    whole = ring(chain)
    assert len(whole.shown()) == LINKS_SHOWN
    behind = ring(chain[:3])
    assert behind.learn(whole.shown()) and behind.newest == whole.newest


# --- who gets in ---------------------------------------------------------------------------------------------------------


def test_whoever_was_away_learns_the_new_key_from_a_greeting():
    mine = directory()
    told = []
    mine.on_new_key = lambda: told.append(mine.keys.serial)
    mine.greet(ALICE.node_id, greeting(by=KEYS[1], links=LINKS[:1]))
    assert told == [1] and mine.gate(ALICE.node_id, RAFT_PROTOCOL)


def test_a_certificate_by_an_old_key_lets_in_only_whom_the_state_names():
    mine = directory(LINKS[:1])
    with pytest.raises(Unavailable):
        mine.greet(ALICE.node_id, greeting())  # before anything is known: perhaps, later
    mine.learn_members(listed(ALICE, links=LINKS[:1]))
    mine.greet(ALICE.node_id, greeting())
    with pytest.raises(NotAllowed, match="changed since"):
        mine.greet(ROGUE.node_id, greeting(ROGUE))
    assert not mine.gate(ROGUE.node_id, RAFT_PROTOCOL)


def test_an_old_certificate_gives_no_role_that_the_state_does_not():
    mine = directory(LINKS[:1])
    mine.learn_members(listed(ALICE, links=LINKS[:1], roles=(Role.WORKER,)))
    mine.greet(ALICE.node_id, greeting(roles=BOTH))
    assert not mine.gate(ALICE.node_id, RAFT_PROTOCOL)


def test_what_an_old_key_had_vouched_for_is_dropped_when_the_key_changes():
    """Before it was removed a server may have made up members."""
    made_up = KnownPeer(ROGUE.node_id, "made up", (), "", certify(FIRST.sign, MESH, ROGUE.node_id, BOTH, 9))
    mine = directory(known=[made_up])
    assert mine.gate(ROGUE.node_id, RAFT_PROTOCOL)
    mine.learn_members(listed(ALICE, links=LINKS[:1]))
    assert not mine.gate(ROGUE.node_id, RAFT_PROTOCOL) and mine.gate(ALICE.node_id, RAFT_PROTOCOL)
    assert not directory(LINKS[:1], [made_up]).gate(ROGUE.node_id, RAFT_PROTOCOL), "nor at a later start"


def test_a_removed_server_cannot_lead_away_those_who_know_that_it_was_removed():
    mine = directory()
    mine.learn_members(listed(ALICE, links=LINKS[:1], revoked=[ROGUE]))
    with pytest.raises(NotAllowed, match="removed"):
        mine.greet(ROGUE.node_id, greeting(ROGUE, by=FIRST, links=(link(1, to=ROGUE),)))
    with pytest.raises(NotAllowed, match="two ways"):
        mine.greet(ALICE.node_id, greeting(by=ROGUE, links=(link(1, to=ROGUE),)))
    assert mine.keys.newest == KEYS[1].public_bytes


# --- the state -----------------------------------------------------------------------------------------------------------


def links_of(scene: Scene):
    return scene.machine.answer(GetMembers()).key_links


def test_removing_a_server_names_the_next_key_once():
    scene = Scene(A, B, C)
    scene.do(A, RemoveMember(B, LINKS[:1]))
    scene.do(A, RemoveMember(B, LINKS[:1]))  # resent
    assert links_of(scene) == LINKS[:1]
    for other in (LINKS[:1], (link(1, to=ROGUE), LINKS[1])):
        refused = scene.do(A, RemoveMember(C, other))
        assert refused.reason is Reason.CONFLICT and C in scene.machine.members(), (
            "another change came first: try again"
        )
    scene.do(A, RemoveMember(C, LINKS[:2]))
    assert links_of(scene) == LINKS[:2]
    data = scene.machine.capture()()
    scene.machine.restore(data)
    assert links_of(scene) == LINKS[:2]


def test_a_change_that_a_recovery_lost_comes_back_with_the_next_one():
    scene = Scene(A, B, C)
    scene.do(A, RemoveMember(B, LINKS))
    assert links_of(scene) == LINKS


def test_a_worker_takes_no_key_with_it():
    scene = Scene(A)
    scene.do(A, Join(SECRET, Member(B, "b", (Role.WORKER,))))
    scene.do(A, RemoveMember(B, LINKS[:1]))
    assert links_of(scene) == () and B not in scene.machine.members()


def test_names_of_the_certificate_are_still_checked():
    with pytest.raises(NotAllowed, match="belongs to mesh"):
        ring(LINKS).check(certify(KEYS[3].sign, "another", ALICE.node_id, BOTH, 1), ALICE.node_id)
    with pytest.raises(NotAllowed, match="showed the certificate of"):
        ring(LINKS).check(certify(KEYS[3].sign, MESH, ALICE.node_id, BOTH, 1), ME.node_id)
    assert certificates.is_signed_by(KEYS[3].public_bytes, certify(KEYS[3].sign, MESH, ME.node_id, BOTH, 1), verify)
