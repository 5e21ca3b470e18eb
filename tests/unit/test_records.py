"""What a node writes down of itself, and what a start makes of it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing
from msgspec.structs import replace

from meshd.admission.founding import Founding, Joining, Resuming, how_to_begin
from meshd.admission.home import Counters, Home, MeshFile
from meshd.admission.invites import Invite
from meshd.admission.records import Records
from meshd.errors import StartRefused
from meshd.model import Certificate, NodeId, Role

HOME = Path("/var/lib/meshd")
MESH_FILE = MeshFile("mesh-a", "", "", Certificate("mesh-a", NodeId("me"), (Role.SERVER,), 1, b""), "me")


async def test_no_epoch_is_used_before_it_is_on_the_disk_nor_an_older_one_written_over_it() -> None:
    may_write, written = threading.Event(), []

    def write_counters(counters: Counters) -> None:
        if counters.epoch == 5:
            assert may_write.wait(10)
        written.append(counters.epoch)

    records = Records(cast(Home, SimpleNamespace(write_counters=write_counters)), MESH_FILE)
    records.counters = Counters(2, 4)
    used: list[tuple[int, list[int]]] = []

    async def open_session(epoch: int) -> None:
        await records.save_epoch(epoch)
        used.append((epoch, written.copy()))

    async with trio.open_nursery() as nursery:
        for epoch in (5, 5, 6):
            nursery.start_soon(open_session, epoch)
            await trio.testing.wait_all_tasks_blocked(0.01)
        may_write.set()
    assert written == [5, 6] and all(epoch in on_disk for epoch, on_disk in used), used


def invite(mesh: str) -> Invite:
    return Invite(mesh, b"secret", (Role.WORKER,), ())


def begin(mesh_file: MeshFile | None, by: Invite | None = None, *, may_found: bool = True, has_journal: bool = True):
    return how_to_begin(HOME, mesh_file, by, may_found=may_found, has_journal=has_journal)


def test_an_empty_directory_founds_a_mesh_or_joins_the_one_it_is_invited_to() -> None:
    assert begin(None) == Founding()
    assert begin(None, invite("mesh-a")) == Joining(invite("mesh-a"))


def test_a_directory_of_a_mesh_goes_on_there_also_with_the_invite_that_it_came_by() -> None:
    assert begin(MESH_FILE) == begin(MESH_FILE, invite("mesh-a")) == Resuming(MESH_FILE)


@pytest.mark.parametrize(
    ("mesh_file", "options", "why"),
    [
        (None, {"may_found": False}, "belongs to no mesh yet"),
        (MESH_FILE, {"by": invite("mesh-b")}, "belongs to mesh mesh-a, the invite is for mesh-b"),
        (replace(MESH_FILE, has_journal=True), {"has_journal": False}, "has lost its journal"),
        (replace(MESH_FILE, refused="an older copy"), {}, "an older copy"),
    ],
)
def test_what_could_go_wrong_only_later_does_not_start(
    mesh_file: MeshFile | None, options: dict[str, object], why: str
) -> None:
    with pytest.raises(StartRefused, match=why) as refused:
        begin(mesh_file, **options)  # type: ignore[arg-type]
    assert refused.value.hint
