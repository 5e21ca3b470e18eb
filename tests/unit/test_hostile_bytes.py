"""What fuzzing found, one sentence each: bytes of a member, or of a stranger, that hurt more than whoever sent them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import trio
from msgspec import Raw

from fuzz.targets import raft
from meshd import codec
from meshd.errors import PeerFault, Unavailable
from meshd.gossip.facts import GONE_MAX, Facts, Merged
from meshd.gossip.messages import Chunk as FactsChunk
from meshd.gossip.messages import SignedChunk
from meshd.model import Array, BackendOffer, Needs, NodeId, Offer, Resources, TaskState
from meshd.net.identity_key import KeyPair
from meshd.net.libp2p.transport import Libp2pTransport
from meshd.raft.configurations import as_command
from meshd.raft.messages import NO_OP, Append, Appended, Chunk, VoterId
from meshd.raft.proposals import NESTING_MAX, is_readable
from meshd.raft.state.commands import AnyAnswer, Batch, Cancel, Claim, Rejected, RevokeToken, Stamped, Submit
from meshd.raft.state.machine import Machine
from meshd.raft.storage.snapshot import Image, pack_image
from meshd.raft.surroundings import Mail
from meshd.views import GetMembers, MembersView
from tests.scene import WALL_MS, A, B, Scene, job_id, spec


def at_depth(depth: int, work: Callable[[], object]) -> object:
    return work() if depth == 0 else at_depth(depth - 1, work)


def nested(depth: int) -> bytes:
    """A command with a field of a later version, nested so deep."""
    body = codec.encode(RevokeToken("x"))
    return bytes([body[0] + 1]) + body[1:] + b"\x91" * depth + b"\xc0"


def test_a_command_that_only_some_replicas_could_read_is_not_let_in() -> None:
    """A decoder recurses: where it gives up depends on the stack below it, and replicas apply at different depths."""
    entry = codec.encode(Batch(0, WALL_MS, (Stamped(A, Raw(nested(850))),)))
    near, far = Machine(), Machine()
    near.apply(1, entry)
    at_depth(400, lambda: far.apply(1, entry))
    assert near.digest() != far.digest(), "if this fails, decoding does not recurse any more: the bound may go"
    assert not is_readable(nested(850))


def test_what_is_let_in_every_replica_can_read() -> None:
    command = nested(NESTING_MAX - 1)
    assert is_readable(command) and not is_readable(nested(NESTING_MAX))
    entry = codec.encode(Batch(0, WALL_MS, (Stamped(A, Raw(command)),)))
    near, far = Machine(), Machine()
    near.apply(1, entry)
    at_depth(400, lambda: far.apply(1, entry))
    assert near.digest() == far.digest()


@pytest.mark.parametrize("wide", [b"\x90", b"\xc0", b"\xa0"])
def test_a_long_command_of_another_version_is_read_as_far_as_time_allows(wide: bytes) -> None:
    body = codec.encode(RevokeToken("x"))

    def widened(count: int) -> bytes:
        return bytes([body[0] + 1]) + body[1:] + b"\xdc" + count.to_bytes(2, "big") + wide * count

    assert is_readable(widened(1000))
    assert is_readable(codec.encode(Submit(job_id(1), spec(array=Array(count=1000))))), "of this version: any length"


def test_amounts_named_twice_never_hide_the_list_of_members() -> None:
    """What is used of a total of over 2^53 is no number that a view can say: no node could read the members again."""
    scene = Scene(A, B)
    huge = Resources(cpu_milli=0, custom=(("x", 2**53), ("x", 2**53)))
    scene.do(B, Claim(1, 1, 8, Offer((BackendOffer("wasm"),), huge)))
    scene.do(A, Submit(job_id(1), spec(needs=Needs(huge))))
    view = codec.decode(codec.encode(scene.machine.answer(GetMembers())), MembersView)
    assert [row.used.custom for row in view.members if row.used.custom] == [(("x", 2**53),)]


def test_nonsense_between_two_honest_commands_costs_only_itself() -> None:
    scene = Scene(A, B)
    honest = Stamped(A, Raw(codec.encode(RevokeToken("nobody"))))
    entry = codec.encode(Batch(0, WALL_MS, (honest, Stamped(B, Raw(b"\x93\xa5Joinx\x01\x02")), honest)))
    answers = [codec.decode(answer, AnyAnswer) for answer in scene.machine.apply(scene.index + 1, entry)]
    assert len(answers) == 3 and all(isinstance(answer, Rejected) for answer in answers)


# --- a server that lies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nonsense",
    [b"\x02", b"\x02\x05", b"\x02\x90", b"\x02\x91\x01", b"\x02\xc1", as_command((raft.B, raft.B)), as_command([VoterId(f"{k}/1") for k in range(10)])],
)  # fmt: skip
def test_a_configuration_that_is_none_is_the_senders_fault_and_changes_nothing(nonsense: bytes) -> None:
    world = raft.World(is_alone=False)
    entries = ((NO_OP, 2, 1), (nonsense, 3, 1))
    with pytest.raises(PeerFault, match="configuration"):
        world.server.engine.receive(raft.B, Append(1, 1, 100_000, 3, 1, 0, entries))
    assert world.server.engine.last == 1 and world.server.engine.voters == (raft.ME, raft.B, raft.C)


@pytest.mark.parametrize(
    ("index", "state"),
    [(5, b"\x90"), (5, b"nonsense"), (2**53, raft.empty_state())],
    ids=["empty", "nonsense", "beyond"],
)
def test_a_snapshot_that_is_none_stops_nobody(index: int, state: bytes) -> None:
    """It was taken for a damaged disk, and a number past all numbers made messages that no peer could read."""
    world = raft.World(is_alone=False)
    packed = pack_image(Image("mesh", index, 1, (), state))
    chunk = Chunk(1, 1, 100_000, index, 1, len(packed.data), packed.digest, 0, packed.data)
    world.links.inbox.append(Mail(raft.B, chunk))
    world.turn()
    assert world.server.engine.commit == 1 and world.server.engine.arrived is None


def test_a_peer_that_wants_the_log_from_before_its_beginning_is_not_looked_up_again_and_again() -> None:
    """There is no snapshot of that: the server asked its disk for one in every turn, without end."""
    world = raft.World(is_alone=False)
    for frame in raft.elected():
        world.obey(frame)
        world.turn()
    assert world.server.engine.is_leader
    world.links.inbox.append(Mail(raft.B, Appended(1, 1, 100_000, False, 1)))
    for _ in world.turns.turn():
        world.journal.commit()
    assert world.turns.beside() is None


# --- time that a few bytes may take ------------------------------------------------------------------------------------


def test_a_cancel_of_a_thousand_ranges_looks_at_each_task_once() -> None:
    """Ranges times tasks: one command of a few KiB held every voter for seconds."""

    class Counted(dict[int, object]):
        looks = 0

        def __iter__(self) -> Iterator[int]:
            Counted.looks += len(self)
            return super().__iter__()

        def items(self):  # type: ignore[no-untyped-def]
            Counted.looks += len(self)
            return super().items()

    scene = Scene(A, slots=50)
    scene.do(A, Submit(job_id(1), spec(count=3000)))
    job = scene.machine._queue.jobs[job_id(1)]
    job.rows = Counted(job.rows)  # type: ignore[assignment]
    scene.do(A, Cancel(job_id(1), tuple((3 * k, 3 * k + 2) for k in range(1000))))
    assert Counted.looks <= 10 * 50
    assert job.count(TaskState.CANCELLED) == 2000 - sum(row.stop is not None for row in job.rows.values())


def test_keys_taken_back_behind_a_gap_do_not_pile_up() -> None:
    """Chunk 1 never comes, and each later one takes more keys back: 32 of them in a message took seconds."""
    me, other = NodeId("me"), NodeId("other")
    facts = Facts(me, 1, lambda payload: b"s" * 64, lambda *_: True)
    facts.set_members([me, other])
    results = []
    for number in range(2, 200):
        keys = tuple((f"{number}.{key}", None) for key in range(1000))
        body = codec.encode(FactsChunk(other, 3, number, 1, keys))
        results.append(facts.merge(SignedChunk(body, b"s" * 64))[0])
    assert results.count(Merged.NEW) <= GONE_MAX // 1000 and Merged.OVER_LIMIT in results


@pytest.mark.parametrize("host", ["a" * 70, "...", "a..b", "x" * 250, "℀.example", "a\0b"])
async def test_an_address_that_no_resolver_takes_is_a_node_that_is_not_there(host: str) -> None:
    """Any member tells where it is; whoever dialled such a name lost the task that dialled, and the agent with it."""
    key, peer = KeyPair.generate(), KeyPair.generate().node_id
    events = SimpleNamespace(peer_up=lambda peer: None, peer_down=lambda peer: None)
    transport = Libp2pTransport(key, [], gate=lambda *_: True, book=lambda peer: (f"/dns/{host}/tcp/1",), events=events)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.serve)
        with pytest.raises(Unavailable, match="cannot reach"):
            await transport.open_stream(peer, "/meshd/raft/1", timeout_s=20)
        nursery.cancel_scope.cancel()
