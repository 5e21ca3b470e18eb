from __future__ import annotations

import pytest
import trio
from msgspec.structs import replace

from meshd import codec
from meshd.admission import certificates, invites
from meshd.admission.certificates import Greeting
from meshd.admission.greetings import Greetings
from meshd.admission.home import KnownPeer
from meshd.admission.invites import Door, Invite
from meshd.admission.join import JoinDesk, JoinRequest, knock
from meshd.directory import BLOB_PROTOCOL, JOIN_PROTOCOL, RAFT_PROTOCOL, RPC_PROTOCOL, Directory
from meshd.errors import Conflict, InvalidRequest, MeshError, NotAllowed, Unavailable
from meshd.model import Member, NodeId, Role
from meshd.net.identity_key import KeyPair, verify
from meshd.net.memory import MemoryNetwork
from meshd.raft.state.commands import Join, Joined
from meshd.recovery.epochs import FOUNDED, EpochFile, Epochs, certify_epoch
from meshd.views import MembersView, MemberView

MESH_KEY = KeyPair.generate()
MESH = certificates.mesh_id(MESH_KEY.public_bytes)
ALICE, BOB = KeyPair.generate(), KeyPair.generate()
BOTH = (Role.SERVER, Role.WORKER)


def certificate(key=ALICE, roles=BOTH, version=1, mesh_key=MESH_KEY, mesh=MESH):
    return certificates.certify(mesh_key.sign, mesh, key.node_id, roles, version)


def greeting(key=ALICE, *, start=1, random=b"r1", wall_ms=0, **kind):
    return Greeting(certificate(key, **kind), start, random, wall_ms, "alice", ("/ip4/1.2.3.4/tcp/1",), "", "0")


def epochs(lineage=(), heard=()):
    file = EpochFile(epoch(*lineage), heard)
    return Epochs(MESH, MESH_KEY.public_bytes, verify, file, on_news=lambda: None)


def epoch(*lineage, mesh_key=MESH_KEY):
    return certify_epoch(mesh_key.sign, MESH, lineage)


def directory(*known):
    return Directory(BOB.node_id, MESH, MESH_KEY.public_bytes, verify, known)


# --- certificates ----------------------------------------------------------------------------------------------------


def test_the_meshs_key_vouches_for_exactly_one_node_and_its_roles():
    good = certificate()
    certificates.check(good, MESH, MESH_KEY.public_bytes, ALICE.node_id, verify)
    for forged in (
        replace(good, roles=(Role.SERVER,)),
        replace(good, version=2),
        replace(good, node=BOB.node_id),
        replace(good, signature=b"x" * 64),
        certificate(mesh_key=KeyPair.generate()),
        certificate(mesh="another"),
    ):
        with pytest.raises(NotAllowed):
            certificates.check(forged, MESH, MESH_KEY.public_bytes, ALICE.node_id, verify)


def test_a_certificate_is_worth_nothing_in_another_hand():
    with pytest.raises(NotAllowed, match="showed the certificate of"):
        certificates.check(certificate(), MESH, MESH_KEY.public_bytes, BOB.node_id, verify)


# --- invites ---------------------------------------------------------------------------------------------------------

INVITE = Invite(MESH, b"s" * invites.SECRET_BYTES, BOTH, (Door(ALICE.node_id, ("/ip4/1.2.3.4/tcp/7373",)),))


def test_an_invite_survives_being_pasted_over_several_lines():
    text = str(INVITE)
    assert invites.parse(f"  {text[:40]}\n{text[40:]} ") == INVITE


@pytest.mark.parametrize(
    "text",
    ["", "hello", "meshd1-", "meshd1-####", str(INVITE)[:-9], str(INVITE)[:-5] + "AAAAA", "meshd1-" + "A" * 9000],
)
def test_what_is_no_invite_is_refused_with_a_hint(text):
    with pytest.raises(InvalidRequest) as caught:
        invites.parse(text)
    assert caught.value.hint


# --- directory -------------------------------------------------------------------------------------------------------


def test_strangers_speak_only_the_join_protocol_and_calls_only_up_to_the_greeting():
    known = directory()
    assert known.gate(ALICE.node_id, JOIN_PROTOCOL) and known.gate(ALICE.node_id, RPC_PROTOCOL)
    assert not known.gate(ALICE.node_id, RAFT_PROTOCOL) and not known.gate(ALICE.node_id, BLOB_PROTOCOL)


def test_raft_frames_are_for_servers_only():
    known = directory()
    known.greet(ALICE.node_id, greeting(roles=(Role.WORKER,)))
    assert known.gate(ALICE.node_id, BLOB_PROTOCOL) and not known.gate(ALICE.node_id, RAFT_PROTOCOL)
    known.greet(ALICE.node_id, greeting(version=2))
    assert known.gate(ALICE.node_id, RAFT_PROTOCOL)


def test_a_removed_member_gets_no_further_than_the_greeting_which_tells_it():
    known = directory()
    known.greet(ALICE.node_id, greeting())
    known.learn_members(MembersView(MESH, (), (ALICE.node_id,), 5, 0))
    assert not any(known.gate(ALICE.node_id, each) for each in (RAFT_PROTOCOL, BLOB_PROTOCOL))
    with pytest.raises(NotAllowed, match="was removed"):
        known.greet(ALICE.node_id, greeting())


def test_an_older_list_of_members_changes_nothing():
    known = directory()
    row = MemberView(Member(ALICE.node_id, "alice", BOTH), "live", 1, 1, None, None, ())  # type: ignore[arg-type]
    known.learn_members(MembersView(MESH, (row,), (), 9, 0))
    known.learn_members(MembersView(MESH, (), (ALICE.node_id,), 5, 0))
    assert known.members() == (ALICE.node_id,)


def test_a_list_from_before_a_greeting_does_not_shut_the_greeted_out():
    """A joiner replays the log from its beginning; it once forgot who had greeted it, and refused their Raft frames."""
    known = directory()
    known.greet(ALICE.node_id, greeting())
    known.learn_members(MembersView(MESH, (), (), 3, 0))
    assert known.gate(ALICE.node_id, RAFT_PROTOCOL) and known.members() == (ALICE.node_id,)


def test_a_member_by_the_state_may_speak_before_its_certificate_was_seen():
    known = directory()
    row = MemberView(Member(ALICE.node_id, "alice", (Role.WORKER,)), "live", 1, 1, None, None, ())  # type: ignore[arg-type]
    known.learn_members(MembersView(MESH, (row,), (), 9, 0))
    assert known.gate(ALICE.node_id, BLOB_PROTOCOL) and not known.gate(ALICE.node_id, RAFT_PROTOCOL)


def test_present_addresses_come_first_and_old_ones_are_kept_as_a_last_resort():
    known = directory(KnownPeer(ALICE.node_id, "alice", ("/ip4/9.9.9.9/tcp/1",)))
    known.greet(ALICE.node_id, greeting())
    assert known.book(ALICE.node_id) == ("/ip4/1.2.3.4/tcp/1", "/ip4/9.9.9.9/tcp/1")


# --- greetings -------------------------------------------------------------------------------------------------------


def greetings(known, heard, now_ms=0):
    return Greetings(
        directory=known,
        greeting=lambda: greeting(BOB),
        hears=lambda peer: peer in heard,
        wall_ms=lambda: now_ms,
        meet_epoch=epochs().meet,
    )


async def test_a_second_start_of_a_live_identity_is_refused_and_a_restart_is_not():
    heard = {ALICE.node_id}
    door = greetings(directory(), heard)
    await door.admit(ALICE.node_id, codec.encode(greeting(random=b"r1")))
    await door.admit(ALICE.node_id, codec.encode(greeting(random=b"r1")))
    with pytest.raises(Conflict, match="running twice"):
        await door.admit(ALICE.node_id, codec.encode(greeting(start=2, random=b"r2")))
    heard.clear()  # the first one is gone
    await door.admit(ALICE.node_id, codec.encode(greeting(start=2, random=b"r2")))


async def test_a_clock_far_off_is_known_and_not_refused():
    door = greetings(directory(), set(), now_ms=100_000)
    await door.admit(ALICE.node_id, codec.encode(greeting(wall_ms=3_700_000)))
    assert door.offset_ms(ALICE.node_id) == 3_600_000


@pytest.mark.parametrize("data", [b"", b"\x00" * 50, b"\x98" + b"\xc0" * 8, codec.encode(("x",) * 8), b"a" * 100_000])
async def test_a_greeting_that_is_none_is_an_error_and_nothing_more(data):
    with pytest.raises(InvalidRequest):
        await greetings(directory(), set()).admit(ALICE.node_id, data)


# --- joining ---------------------------------------------------------------------------------------------------------


DOOR = (f"/memory/{ALICE.node_id}",)


class Nobody:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


class Desk:
    """A member that answers knocks, with a mesh that lets everybody in, or raises `refusal`."""

    def __init__(self, refusal: MeshError | None = None) -> None:
        self.refusal = refusal
        self.joins: list[Join] = []
        self.network = MemoryNetwork()
        self.here = self.network.transport(ALICE.node_id, lambda p, q: q == JOIN_PROTOCOL, lambda p: (), Nobody())
        self.there = self.network.transport(BOB.node_id, lambda p, q: False, lambda p: (), Nobody())
        desk = JoinDesk(
            mesh=MESH, public_key=MESH_KEY.public_bytes, ca_pem="pem", propose=self.propose,
            certify=self.certify, members=lambda: (KnownPeer(ALICE.node_id, "alice", ()),), wall_ms=lambda: 7, epoch=lambda: FOUNDED,
        )  # fmt: skip
        self.here.handle(JOIN_PROTOCOL, desk.answer)

    async def propose(self, command):
        self.joins.append(command)
        if self.refusal is not None:
            raise self.refusal
        return Joined(replace(command.member, roles=(Role.WORKER,)), 3)

    async def certify(self, node, version):
        return certificates.certify(MESH_KEY.sign, MESH, node, (Role.WORKER,), version)

    async def knock(self, mesh=MESH, doors=None, raw=None):
        invite = replace(INVITE, doors=doors or (Door(ALICE.node_id, DOOR),))
        request = JoinRequest(mesh, invite.secret, "bob", (), "", "0", 0)
        failure: MeshError | None = None
        answer = None
        async with trio.open_nursery() as nursery:
            await nursery.start(self.here.serve)
            await nursery.start(self.there.serve)
            try:
                if raw is None:
                    answer = await knock(self.there, invite, request, timeout_s=5)
                else:
                    await self.there.connect(ALICE.node_id, DOOR, timeout_s=1)
                    stream = await self.there.open_stream(ALICE.node_id, JOIN_PROTOCOL, timeout_s=1)
                    await stream.write(raw)
                    await stream.close_write()
                    answer = await stream.read(1 << 16)
            except MeshError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return answer


async def test_a_stranger_leaves_with_the_roles_that_the_state_granted(autojump_clock):
    desk = Desk()
    welcome = await desk.knock()
    assert welcome.certificate.roles == (Role.WORKER,) and welcome.certificate.version == 3
    [join] = desk.joins
    assert join.secret_hash == INVITE.secret_hash and join.member.node == BOB.node_id and join.member.roles == ()


async def test_an_invite_for_another_mesh_is_refused_before_anything_is_proposed(autojump_clock):
    desk = Desk()
    with pytest.raises(NotAllowed, match="this node belongs to"):
        await desk.knock(mesh="elsewhere")
    assert not desk.joins


async def test_the_meshs_refusal_reaches_the_stranger_as_it_is(autojump_clock):
    with pytest.raises(NotAllowed, match="spent") as caught:
        await Desk(NotAllowed("this invite is spent", hint="make another")).knock()
    assert caught.value.hint == "make another"


async def test_a_door_that_does_not_answer_is_followed_by_the_next(autojump_clock):
    gone = Door(KeyPair.generate().node_id, ("/memory/nobody",))
    desk = Desk()
    welcome = await desk.knock(doors=(gone, Door(ALICE.node_id, DOOR)))
    assert welcome.certificate.node == BOB.node_id
    with pytest.raises(Unavailable, match="lets us in"):
        await Desk().knock(doors=(gone,))


@pytest.mark.parametrize("raw", [b"", b"garbage", b"\xff" * 20_000, codec.encode(("m", b"s", "n"))])
async def test_random_bytes_at_the_desk_get_an_answer_and_the_desk_lives(raw, autojump_clock):
    answer = codec.decode(await Desk().knock(raw=raw), object)
    assert answer[0] == "Refusal"
