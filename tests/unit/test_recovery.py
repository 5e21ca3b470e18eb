"""Who follows a recovery, who was left behind by it, and where a mesh may be recovered (protocol.md 10)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from msgspec import Raw
from msgspec.structs import replace

from meshd import codec
from meshd.admission import certificates
from meshd.admission.home import Home, KnownPeer, MeshFile
from meshd.errors import Busy, Conflict, Corrupt, InvalidRequest, NotAllowed, StartRefused, Unavailable
from meshd.mediator import Mediator
from meshd.model import Member, NodeId, Role
from meshd.net.identity_key import KeyPair, verify
from meshd.raft.log import Newest
from meshd.raft.messages import VoterId
from meshd.raft.state.commands import Batch, Found, Stamped
from meshd.raft.state.lineage import RECOVERIES_MAX, name_of, since
from meshd.raft.storage.disk import DirectoryDisk
from meshd.raft.storage.frames import LocalHeader
from meshd.raft.storage.journal import create_journal
from meshd.raft.storage.opening import open_log
from meshd.raft.storage.recovery import as_entry
from meshd.recovery.allegiance import Allegiance, kept_lineage, open_epochs
from meshd.recovery.epochs import FOUNDED, EpochFile, Epochs, Follow, Torn, certify_epoch, choose
from meshd.recovery.recover import Asked, Recovery, Refusal, judge
from meshd.recovery.rejoin import rejoin

MESH_KEY = KeyPair.generate()
MESH = certificates.mesh_id(MESH_KEY.public_bytes)
ME, PEER = KeyPair.generate(), NodeId("peer")


def epoch(*lineage: str, key: KeyPair = MESH_KEY):
    return certify_epoch(key.sign, MESH, lineage)


def epochs(*lineage: str, heard=()) -> tuple[Epochs, list[int]]:
    news: list[int] = []
    file = EpochFile(epoch(*lineage), heard)
    return Epochs(MESH, MESH_KEY.public_bytes, verify, file, on_news=lambda: news.append(1)), news


# --- which epoch to follow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "own", "heard", "goes"),
    [
        ("nothing was heard", (), [], None),
        ("a recovery of its own epoch", (), [("a",)], ("a",)),
        ("two in a row", (), [("a",), ("a", "b")], ("a", "b")),
        ("two in a row, the newer only", ("a",), [("a", "b", "c")], ("a", "b", "c")),
        ("never back", ("a",), [(), ("b",)], None),
        ("nor aside", ("a",), [("b", "c")], None),
    ],
)
def test_a_node_follows_the_newest_that_its_own_epoch_led_to(what, own, heard, goes) -> None:
    decision = choose(own, [epoch(*lineage) for lineage in heard])
    assert decision == (None if goes is None else Follow(epoch(*goes))), what


def test_between_two_recoveries_of_one_epoch_a_node_stays() -> None:
    heard = [epoch("b"), epoch("a"), epoch("a", "c")]
    assert choose((), heard) == Torn((epoch("a", "c"), epoch("b")))
    assert choose(("a",), heard) == Follow(epoch("a", "c"))


def test_a_member_of_the_same_epoch_or_an_older_one_is_met_as_always() -> None:
    ours, news = epochs("a", "b")
    for theirs in (epoch("a", "b"), epoch("a"), FOUNDED):
        ours.meet(PEER, theirs)
    assert not news and ours.decide() is None


def test_a_member_of_a_later_epoch_is_news_and_one_beside_it_is_refused() -> None:
    ours, news = epochs("a")
    with pytest.raises(Unavailable, match="still of 1-a"):
        ours.meet(PEER, epoch("a", "b"))
    with pytest.raises(Unavailable, match="two recoveries of one mesh"):
        ours.meet(PEER, epoch("c"))
    with pytest.raises(Unavailable):
        ours.meet(PEER, epoch("a", "b"))
    assert len(news) == 2 and ours.decide() == Follow(epoch("a", "b"))
    ours.belong(epoch("a", "b"))
    assert ours.lineage == ("a", "b") and ours.file() == EpochFile(epoch("a", "b"))


@pytest.mark.parametrize(
    "forged",
    [
        epoch("a", key=KeyPair.generate()),
        replace(epoch("a"), lineage=("b",)),
        epoch(*[str(number) for number in range(RECOVERIES_MAX + 1)]),
    ],
)
def test_nobody_follows_what_the_meshs_key_does_not_vouch_for(forged) -> None:
    ours, news = epochs()
    with pytest.raises(NotAllowed):
        ours.meet(PEER, forged)
    assert not news and ours.decide() is None


# --- what a directory remembers --------------------------------------------------------------------------------------


def home_of(path, *roles: Role, journal: tuple[str, ...] | None = (), **fields) -> Home:
    home = Home(path)
    roles = roles or (Role.SERVER, Role.WORKER)
    certificate = certificates.certify(MESH_KEY.sign, MESH, ME.node_id, roles, 1)
    home.write_mesh(MeshFile(MESH, MESH_KEY.public_bytes.hex(), "", certificate, "me", **fields))
    MESH_KEY.save(home.mesh_key)
    if journal is not None:
        disk = DirectoryDisk(home.raft)
        create_journal(disk, LocalHeader(MESH, "01", 1, "aa", lineage=journal)).close()
        disk.close()
    return home


def with_another_server(home: Home) -> Home:
    certificate = certificates.certify(MESH_KEY.sign, MESH, PEER, (Role.SERVER,), 1)
    home.write_peers((KnownPeer(PEER, "peer", (), certificate=certificate),))
    return home


async def test_a_worker_follows_and_its_directory_says_so_first(tmp_path) -> None:
    home = home_of(tmp_path, Role.WORKER, journal=None)
    ours, _ = epochs(heard=(epoch("a"),))
    assert await Allegiance(home, ours, holds_log=lambda: False).settle()
    assert ours.lineage == ("a",) and home.epochs() == EpochFile(epoch("a"))
    assert not await Allegiance(home, ours, holds_log=lambda: False).settle()


async def test_a_worker_follows_when_its_disk_has_room_to_say_so(tmp_path, monkeypatch) -> None:
    home = home_of(tmp_path, Role.WORKER, journal=None)
    ours, _ = epochs(heard=(epoch("a"),))
    with monkeypatch.context() as full:
        full.setattr(home, "write_epochs", refuse_for_want_of_room)
        for _ in range(2):
            with pytest.raises(Busy):
                await Allegiance(home, ours, holds_log=lambda: False).settle()
    assert await Allegiance(home, ours, holds_log=lambda: False).settle()
    assert ours.lineage == ("a",) and home.epochs() == EpochFile(epoch("a"))


async def test_a_server_that_was_left_behind_stops_also_on_a_full_disk(tmp_path, monkeypatch) -> None:
    home = home_of(tmp_path, has_journal=True)
    monkeypatch.setattr(home, "write_epochs", refuse_for_want_of_room)
    ours, _ = epochs(heard=(epoch("a"),))
    with pytest.raises(StartRefused, match="recovered without this server"):
        await Allegiance(home, ours, holds_log=lambda: True).settle()


@pytest.mark.usefixtures("autojump_clock")
async def test_a_full_disk_ends_no_node_that_hears_of_a_recovery() -> None:
    ends: list[Any] = [Busy("no room"), Busy("no room"), True]
    begun: list[int] = []

    class Settling:
        async def settle(self) -> bool:
            if isinstance(end := ends.pop(0), Busy):
                raise end
            return end

    directory: Any = SimpleNamespace(begin_epoch=lambda: begun.append(1), members=lambda: ())
    async with trio.open_nursery() as work:
        given: Any = {"standing": None, "lineage": tuple, "fail": None}
        mediator = Mediator(me=ME.node_id, directory=directory, is_server=True, work=work, **given)
        mediator.allegiance, mediator.rpc = cast(Any, Settling()), cast(Any, SimpleNamespace())
        mediator.is_settling = False
        mediator.epoch_heard()
    assert begun == [1] and not ends


def refuse_for_want_of_room(file: EpochFile) -> None:
    raise Busy("there is no room for recovery.json: the disk is full")


async def test_a_worker_between_two_stays_and_remembers_both(tmp_path) -> None:
    home = home_of(tmp_path, Role.WORKER, journal=None)
    ours, _ = epochs(heard=(epoch("a"), epoch("b")))
    assert not await Allegiance(home, ours, holds_log=lambda: False).settle()
    assert ours.lineage == () and set(home.epochs().heard) == {epoch("a"), epoch("b")}
    # Its operator decides.
    assert rejoin(home, recovery=name_of(("b",))) is None
    assert home.epochs() == EpochFile(epoch("b"))
    with pytest.raises(InvalidRequest, match="heard of no recovery 1-x"):
        rejoin(home, recovery="1-x")


async def test_a_server_that_was_left_behind_stops_and_is_refused_at_every_start_until_it_rejoins(tmp_path) -> None:
    home = with_another_server(home_of(tmp_path, has_journal=True, is_founder=True))
    ours, _ = epochs(heard=(epoch("a"),))
    with pytest.raises(StartRefused) as refused:
        await Allegiance(home, ours, holds_log=lambda: True).settle()
    assert "meshd rejoin" in refused.value.hint
    with pytest.raises(StartRefused, match="recovered without this server"):
        open_epochs(home, MESH)

    aside = rejoin(home)
    assert aside is not None and any(aside.iterdir()) and not home.has_journal()
    assert open_epochs(home, MESH).own == epoch("a")
    mesh = home.mesh()
    assert mesh is not None and not mesh.has_journal and not mesh.is_founder


async def test_a_server_between_two_recoveries_stops_too_and_names_both(tmp_path) -> None:
    home = with_another_server(home_of(tmp_path, has_journal=True))
    ours, _ = epochs(heard=(epoch("a"), epoch("b")))
    with pytest.raises(StartRefused, match="1-a and 1-b"):
        await Allegiance(home, ours, holds_log=lambda: True).settle()
    with pytest.raises(StartRefused, match="1-a and 1-b"):
        open_epochs(home, MESH)
    rejoin(home, recovery="1-b")
    assert open_epochs(home, MESH).own == epoch("b")


async def test_a_server_of_one_recovery_that_meets_the_other_goes_on_and_can_be_brought_over(tmp_path) -> None:
    home = with_another_server(home_of(tmp_path, has_journal=True, journal=("a",)))
    file = open_epochs(home, MESH)
    ours = Epochs(MESH, MESH_KEY.public_bytes, verify, file, on_news=lambda: None)
    with pytest.raises(Unavailable, match="two recoveries of one mesh"):
        ours.meet(PEER, epoch("b"))
    assert not await Allegiance(home, ours, holds_log=lambda: True).settle()
    torn = ours.torn()
    assert torn is not None and "1-a here and as 1-b elsewhere" in torn.message and "--recovery" in torn.hint
    assert open_epochs(home, MESH).own == epoch("a")
    ours.meet(PEER, epoch("a"))
    assert ours.torn() is None, "it was brought over"
    rejoin(home, recovery="1-b")
    assert open_epochs(home, MESH) == EpochFile(epoch("b"))


def test_a_server_signs_its_epoch_with_the_key_that_the_mesh_has_now(tmp_path) -> None:
    home = home_of(tmp_path, has_journal=True, journal=("a",))
    home.write_epochs(EpochFile(epoch("a")))
    rotated = KeyPair.generate()
    home.mesh_key.unlink()
    rotated.save(home.mesh_key)
    assert open_epochs(home, MESH).own == epoch("a", key=rotated)


def test_a_rejoin_that_was_cut_short_is_done_again(tmp_path) -> None:
    home = with_another_server(home_of(tmp_path, has_journal=True, is_founder=True))
    home.put_journal_aside()
    assert rejoin(home) is None
    mesh = home.mesh()
    assert mesh is not None and not mesh.has_journal and not mesh.is_founder


def test_a_recovery_that_was_cut_short_after_the_journal_is_completed_at_the_next_start(tmp_path) -> None:
    home = home_of(tmp_path, has_journal=True, journal=("a",))
    assert open_epochs(home, MESH) == EpochFile(epoch("a"))
    assert home.epochs().own == epoch("a")


def test_rejoining_again_keeps_every_old_journal_and_a_lost_one_is_no_obstacle(tmp_path) -> None:
    home = with_another_server(home_of(tmp_path, has_journal=True, refused="an older copy"))
    first = rejoin(home)
    assert rejoin(home) is None
    home.raft.mkdir()
    (home.raft / "journal-1").touch()
    second = rejoin(home)
    assert first is not None and second is not None and first != second
    mesh = home.mesh()
    assert mesh is not None and mesh.refused == ""


def test_the_only_server_does_not_give_up_the_only_journal(tmp_path) -> None:
    home = home_of(tmp_path, has_journal=True)
    with pytest.raises(StartRefused) as refused:
        rejoin(home)
    assert "meshd recover" in refused.value.hint and home.has_journal()


def test_a_worker_has_no_journal_to_give_up_and_a_stranger_no_mesh(tmp_path) -> None:
    with pytest.raises(StartRefused, match="of a worker"):
        rejoin(home_of(tmp_path / "worker", Role.WORKER, journal=None))
    with pytest.raises(StartRefused, match="no mesh yet"):
        rejoin(Home(tmp_path / "nobody"))


# --- where to recover ------------------------------------------------------------------------------------------------

A, B, C, D = (NodeId(name) for name in "abcd")
VOTERS = [VoterId(f"{node}/1") for node in (A, B, C)]


def asked(node: NodeId, term: int, index: int, *, votes: bool = True, leads: bool = False) -> Asked:
    return Asked(node, f"name-{node}", Newest(term, index, votes, leads))


SILENT = Asked(C, "name-c", None, "no answer")


@pytest.mark.parametrize(
    ("what", "voters", "others", "why", "hint"),
    [
        ("nobody answers", VOTERS, [SILENT], "", ""),
        ("the only voter is gone, and this is a learner", [VoterId("b/1")], [], "", ""),
        ("the only voter is there", [VoterId("b/1")], [asked(B, 3, 9)], "1 of 1 voters are there", "start this server"),
        ("the only voter is this one", [VoterId("a/1")], [], "1 of 1 voters are there", "start this server"),
        ("… and damaged: nobody can mend it", [VoterId("a/1")], [], "", ""),
        ("damaged, and one that could mend it answers", VOTERS, [asked(B, 3, 9)], "another voter answers", "stop it"),
        ("a quorum is there", VOTERS, [asked(B, 3, 9), SILENT], "2 of 3 voters are there", "start this server"),
        ("somebody leads", VOTERS, [asked(B, 3, 9, leads=True)], "name-b leads it", "start this server"),
        ("a voter has more", [*VOTERS, VoterId("d/1"), VoterId("e/1")], [asked(B, 3, 11)], "name-b has more", "recover there: stop the agent of name-b"),
        ("… by its term", [*VOTERS, VoterId("d/1"), VoterId("e/1")], [asked(B, 4, 2)], "name-b has more", "recover there"),
        ("the one with most is named", [*VOTERS, VoterId("e/1"), VoterId("f/1")], [asked(B, 3, 11), asked(D, 4, 1)], "name-d has more", "name-d"),
        ("a learner has more", VOTERS, [asked(D, 3, 11, votes=False)], "name-d has more", "recover there"),
        ("a learner has less", VOTERS, [asked(D, 3, 9, votes=False)], "", ""),
        ("a voter has the same", [*VOTERS, VoterId("d/1"), VoterId("e/1")], [asked(B, 3, 10)], "another voter answers", "--force"),
        ("it votes by its own log only", VOTERS, [asked(D, 3, 9)], "another voter answers", "--force"),
    ],
)  # fmt: skip
def test_a_mesh_is_not_recovered_where_it_lives_or_where_another_has_more(what, voters, others, why, hint) -> None:
    refusal = judge(A, (3, 10), voters, others, is_damaged="damaged" in what)
    if not why:
        assert refusal is None, what
    else:
        assert isinstance(refusal, Refusal) and why in refusal.why and hint in refusal.hint, (what, refusal)


# --- the command itself, with nobody to ask --------------------------------------------------------------------------


def alone_home(path) -> Home:
    """A server whose log knows it as the only member."""
    home = home_of(path, has_journal=True, journal=None)
    ME.save(home.identity_key)
    disk = DirectoryDisk(home.raft)
    journal = create_journal(disk, LocalHeader(MESH, "01", 1, "aa", founding=(VoterId(f"{ME.node_id}/01"),)))
    member = Member(ME.node_id, "me", (Role.SERVER, Role.WORKER))
    found = Stamped(ME.node_id, Raw(codec.encode(Found(MESH, member))))
    journal.add(as_entry(codec.encode(Batch(0, 1, (found,)))), 2, 1)
    journal.commit()
    journal.close()
    disk.close()
    return home


async def recover(home: Home, *, is_forced: bool = False, is_agreed: bool = True) -> list[str]:
    said: list[str] = []
    await Recovery(home).run(is_forced=is_forced, say=said.append, is_agreed=lambda: is_agreed)
    return said


async def test_nothing_is_changed_unless_the_operator_agrees(tmp_path) -> None:
    home = alone_home(tmp_path)
    with pytest.raises(Conflict, match="1 of 1 voters are there"):
        await recover(home)
    before = {path: path.read_bytes() for path in home.raft.iterdir()}
    with pytest.raises(Conflict, match="nothing was changed"):
        await recover(home, is_forced=True, is_agreed=False)
    assert {path: path.read_bytes() for path in home.raft.iterdir()} == before and home.epochs() == EpochFile()
    said = await recover(home, is_forced=True)
    [random] = kept_lineage(home) or ()
    assert home.epochs() == EpochFile(epoch(random)) and any(name_of((random,)) in line for line in said)


async def test_the_only_voter_goes_on_with_what_a_damaged_disk_has_left(tmp_path) -> None:
    home = alone_home(tmp_path)
    disk = DirectoryDisk(home.raft)
    again, _ = open_log(disk, mesh=MESH, lineage=(), me=ME.node_id, is_founding=False, random="bb", incarnation="")
    for index in (3, 4):
        again.add(as_entry(codec.encode(Batch(0, 1))), index, 1)
        again.commit()
    again.close()
    disk.close()
    [*_, newest] = sorted(home.raft.glob("journal-*"))
    content = bytearray(newest.read_bytes())
    content[content.index(as_entry(codec.encode(Batch(0, 1))))] ^= 1  # the first of the two
    newest.write_bytes(content)
    disk = DirectoryDisk(home.raft)
    with pytest.raises(Corrupt) as stopped:
        open_log(disk, mesh=MESH, lineage=(), me=ME.node_id, is_founding=False, random="cc", incarnation="")
    assert "meshd recover" in stopped.value.hint
    disk.close()

    before = {path: path.read_bytes() for path in home.raft.iterdir()}
    with pytest.raises(Conflict, match="nothing was changed"):
        await recover(home, is_agreed=False)
    assert {path: path.read_bytes() for path in home.raft.iterdir()} == before
    said = await recover(home)
    assert any("lost on this disk" in line for line in said) and len(kept_lineage(home) or ()) == 1


async def test_an_older_copy_that_is_all_there_is_may_be_recovered_from(tmp_path) -> None:
    home = alone_home(tmp_path)
    mesh = home.mesh()
    assert mesh is not None
    home.write_mesh(replace(mesh, refused="an older copy"))
    await recover(home, is_forced=True)
    mesh = home.mesh()
    assert mesh is not None and mesh.refused == ""


async def test_a_server_that_was_left_behind_recovers_only_when_forced(tmp_path) -> None:
    home = alone_home(tmp_path)
    home.write_epochs(EpochFile(epoch("a")))
    with pytest.raises(Conflict, match="recovered already") as refused:
        await recover(home)
    assert "meshd rejoin" in refused.value.hint
    await recover(home, is_forced=True)
    lineage = kept_lineage(home)
    assert lineage is not None and len(lineage) == 1 and lineage != ("a",)
    assert open_epochs(home, MESH).own.lineage == lineage


async def test_only_a_member_that_is_a_server_recovers(tmp_path) -> None:
    with pytest.raises(StartRefused, match="no server of the mesh"):
        await recover(home_of(tmp_path / "stranger", has_journal=True))
    with pytest.raises(StartRefused, match="of a worker"):
        Recovery(home_of(tmp_path / "worker", Role.WORKER, journal=None))
    keyless = alone_home(tmp_path / "keyless")
    keyless.mesh_key.unlink()
    with pytest.raises(StartRefused, match="mesh's key"):
        await recover(keyless)


def test_terms_and_positions_of_a_recovered_mesh_are_told_as_later_than_all_before() -> None:
    assert since((), 2**40) < since(("a",), 1) < since(("a", "b"), 0) < 2**53
