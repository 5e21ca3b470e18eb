"""Whatever keeps what must not be lost is in directories whose names are on the disk too."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshd.admission.home import Home
from meshd.blobs.disk import Disk
from meshd.raft.storage.disk import DirectoryDisk


@pytest.mark.parametrize(
    "begin",
    [Home, DirectoryDisk, lambda path: Disk(path, checkpoint=lambda: None).open()],
    ids=["data directory", "log", "blobs"],
)
def test_a_directory_is_durable_before_anything_rests_on_it(
    begin: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    begin(tmp_path / "a" / "b")
    assert {str(tmp_path), str(tmp_path / "a")} <= {*synced}
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "b").mkdir()
    synced.clear()
    begin(tmp_path / "killed" / "b")
    assert str(tmp_path / "killed") in synced, "a start that was killed had made it"
