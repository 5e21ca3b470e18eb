"""Files and directories that outlive a loss of power: what is synced is lost all the same where its name is not."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def sync_directory(path: Path) -> None:
    """What was made, renamed and removed in it is durable when this returns. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """It is there, private where it is new, and durable with the parents that were missing. Raises OSError."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Also where it is there already: it may be from a start that was killed before this.
    for directory in (path, *missing):
        with suppress(PermissionError):  # one that this user may not even list was made by somebody else
            sync_directory(directory.parent)


def replace_file(path: Path, data: bytes) -> None:
    """This user's alone, and durable when this returns; cut short, or on a full disk, it is what it was. Raises OSError."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_directory(path.parent)
