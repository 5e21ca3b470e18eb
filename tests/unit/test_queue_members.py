"""Founding, invites, joining, removing, tokens; and who may say what."""

from __future__ import annotations

from meshd.model import Member, NodeId, Role
from meshd.raft.state.commands import (
    Accepted,
    CreateInvite,
    CreateToken,
    EndSession,
    Found,
    Join,
    Joined,
    Reason,
    RemoveMember,
    RevokeInvite,
    RevokeToken,
    SetDraining,
    Submit,
    UpdateMember,
)
from meshd.views import CheckToken, GetInvites, GetMembers, GetTokens
from tests.scene import A, B, C, Scene, job_id, spec

BOTH = (Role.SERVER, Role.WORKER)
INVITE = "e" * 64


def worker(node: NodeId) -> Member:
    return Member(node, f"name of {node}", (Role.WORKER,))


def test_a_mesh_is_founded_once_by_a_server():
    scene = Scene()
    assert scene.do(A, Found("m", worker(A))).reason is Reason.INVALID_REQUEST
    assert scene.do(A, Found("m", Member(B, "b", BOTH))).reason is Reason.INVALID_REQUEST
    founded = scene.do(A, Found("m", Member(A, "a", BOTH)))
    assert isinstance(founded, Joined) and scene.do(A, Found("m", Member(A, "a", BOTH))) == founded
    assert scene.do(B, Found("other", Member(B, "b", BOTH))).reason is Reason.CONFLICT


def test_a_stranger_is_told_so_whatever_it_says():
    scene = Scene(A)
    for command in (Submit(job_id(1), spec()), CreateInvite(INVITE, BOTH, 1, 1000), EndSession(A, 1)):
        assert scene.do(C, command).reason is Reason.NOT_ALLOWED


def test_an_invite_is_counted_and_joining_again_costs_no_use():
    scene = Scene(A)
    scene.do(A, CreateInvite(INVITE, (Role.WORKER,), 1, 60_000))
    joined = scene.do(A, Join(INVITE, worker(B)))
    assert joined.member.joined_wall_ms == scene.machine.wall_ms
    assert scene.do(A, Join(INVITE, worker(B))) == joined
    assert "used up" in scene.do(A, Join(INVITE, worker(C))).message


def test_each_bad_invite_says_what_is_wrong():
    scene = Scene(A)
    scene.do(A, CreateInvite(INVITE, (Role.WORKER,), 5, 1000))
    scene.do(A, CreateInvite("f" * 64, (Role.WORKER,), 5, 60_000))
    assert "no such invite" in scene.do(A, Join("0" * 64, worker(B))).message
    assert "grants worker" in scene.do(A, Join(INVITE, Member(B, "b", BOTH))).message
    scene.do(A, RevokeInvite("f" * 64))
    assert "revoked" in scene.do(A, Join("f" * 64, worker(B))).message
    scene.tick(1000)
    assert "expired" in scene.do(A, Join(INVITE, worker(B))).message
    assert B not in scene.machine.members()


def test_open_invites_are_listed_without_secrets():
    scene = Scene(A)
    scene.do(A, CreateInvite(INVITE, BOTH, 2, 1000))
    assert [invite.uses_left for invite in scene.machine.answer(GetInvites()).invites] == [1000, 2]
    scene.tick(1000)
    assert len(scene.machine.answer(GetInvites()).invites) == 1


def test_a_removed_member_is_gone_for_good():
    scene = Scene(A, B)
    assert scene.do(A, RemoveMember(B)) == scene.do(A, RemoveMember(B)) == Accepted()
    view = scene.machine.answer(GetMembers())
    assert view.revoked == (B,) and [it.member.node for it in view.members] == [A]
    scene.do(A, CreateInvite(INVITE, BOTH, 1, 1000))
    assert "removed" in scene.do(A, Join(INVITE, Member(B, "b", BOTH))).message
    assert scene.do(A, RemoveMember(C)).reason is Reason.NOT_FOUND


def test_the_last_server_cannot_be_removed():
    scene = Scene(A)
    assert scene.do(A, RemoveMember(A)).reason is Reason.CONFLICT


def test_a_member_says_its_own_name_and_addresses():
    scene = Scene(A, B)
    scene.do(B, UpdateMember("bee", ("/ip4/10.0.0.2/tcp/1",), "10.0.0.2:443"))
    assert scene.machine.members()[B].name == "bee"
    assert scene.do(B, UpdateMember("", ())).reason is Reason.INVALID_REQUEST
    assert scene.do(B, UpdateMember("b", ("x" * 300,))).reason is Reason.INVALID_REQUEST


def test_a_server_only_member_runs_nothing():
    scene = Scene(A, slots=0)
    scene.do(A, CreateInvite(INVITE, (Role.SERVER,), 1, 1000))
    scene.do(A, Join(INVITE, Member(B, "b", (Role.SERVER,))))
    scene.open(B, 1)
    job = scene.submit()
    assert scene.task(job).node is None
    assert "server only" in str(scene.explain(job).nodes)


def test_only_servers_end_sessions():
    scene = Scene(A)
    scene.do(A, CreateInvite(INVITE, (Role.WORKER,), 1, 1000))
    scene.do(A, Join(INVITE, worker(B)))
    assert scene.do(B, EndSession(A, 1)).reason is Reason.NOT_ALLOWED


def test_a_worker_gives_nobody_power_over_the_mesh():
    scene = Scene(A, C)
    scene.do(A, CreateInvite(INVITE, (Role.WORKER,), 1, 60_000))
    scene.do(A, Join(INVITE, worker(B)))
    for command in (
        CreateInvite("f" * 64, (Role.SERVER,), 1, 1000),
        CreateInvite("f" * 64, BOTH, 1, 1000),
        CreateToken("a" * 64, "mine", "admin"),
        RemoveMember(A),
        SetDraining(C, True),
    ):
        refused = scene.do(B, command)
        assert refused.reason is Reason.NOT_ALLOWED, command
        assert "only a server" in refused.message and "name of node-b is a worker only" in refused.message
        assert refused.hint
    assert scene.do(B, CreateInvite("f" * 64, (Role.WORKER,), 1, 1000)) == Accepted()
    assert scene.do(B, CreateToken("a" * 64, "mine", "operator")) == Accepted()
    assert scene.do(B, SetDraining(B, True)) == scene.do(B, RemoveMember(B)) == Accepted()


def test_a_worker_that_read_the_hash_of_an_invite_lets_no_server_in():
    scene = Scene(A)
    scene.do(A, CreateInvite(INVITE, BOTH, 5, 60_000))
    scene.do(A, Join(INVITE, Member(B, "b", (Role.WORKER,))))
    [hash_seen] = {it.secret_hash for it in scene.machine.answer(GetInvites()).invites if it.uses_left == 5 - 1}
    refused = scene.do(B, Join(hash_seen, Member(C, "c", ())))
    assert refused.reason is Reason.NOT_ALLOWED and "only a server lets a server in" in refused.message
    assert C not in scene.machine.server_ids()
    assert isinstance(scene.do(B, Join(hash_seen, worker(C))), Joined)


def test_tokens_of_administrators_are_revoked_by_servers():
    scene = Scene(A)
    scene.do(A, CreateInvite(INVITE, (Role.WORKER,), 1, 60_000))
    scene.do(A, Join(INVITE, worker(B)))
    scene.do(A, CreateToken("a" * 64, "root", "admin"))
    assert scene.do(B, RevokeToken("root")).reason is Reason.NOT_ALLOWED
    assert scene.do(A, RevokeToken("root")) == Accepted()


def test_tokens_are_known_by_the_hash_of_their_secret():
    scene = Scene(A)
    token = CreateToken("a" * 64, "ci", "operator")
    assert scene.do(A, token) == scene.do(A, token) == Accepted()
    assert scene.do(A, CreateToken("b" * 64, "ci", "viewer")).reason is Reason.CONFLICT
    assert scene.do(A, CreateToken("b" * 64, "x", "king")).reason is Reason.INVALID_REQUEST
    assert scene.machine.answer(CheckToken("a" * 64)).role == "operator"
    assert [it.name for it in scene.machine.answer(GetTokens()).tokens] == ["ci"]
    assert scene.do(A, RevokeToken("ci")) == Accepted()
    assert scene.do(A, RevokeToken("ci")).reason is Reason.NOT_FOUND
