"""The nodes' disks: small ones in memory that can be filled, and files that can be damaged while nobody uses them.

HOME/node1/          a tmpfs where its disk is to be filled, else a directory
HOME/node1/data/     the agent's data directory
HOME/node1/ballast   what fills the disk
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

from torture.network import PREFIX

DISK_BYTES = 1280 << 20
"""An agent calls a disk full that has less than 1 GiB left; the ballast takes memory only while it lies there."""
PAGE = 4096


def data_dir(home: Path, node: str) -> Path:
    return home / node / "data"


def remove_stale() -> list[str]:
    """Mounts of harnesses that are no more."""
    removed = []
    for line in Path("/proc/mounts").read_text().splitlines():
        source, target = line.split()[:2]
        found = re.fullmatch(rf"{PREFIX}-(\d+)", source)
        if found and not Path(f"/proc/{found[1]}").exists():
            subprocess.run(["umount", "--lazy", target], check=True)
            removed.append(target)
    return removed


class Disks:
    def __init__(self, home: Path, nodes: Sequence[str], *, small: Sequence[str]) -> None:
        self._home = home
        self._nodes = list(nodes)
        self.small = list(small)
        self._full: set[str] = set()

    def __enter__(self) -> Disks:
        for node in self._nodes:
            (self._home / node).mkdir(mode=0o700)
            if node in self.small:
                source = f"{PREFIX}-{os.getpid()}"
                command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", source, str(self._home / node)]
                subprocess.run(command, check=True)
        return self

    def __exit__(self, *error: object) -> None:
        """What a failed run left on a disk in memory is moved beside it."""
        for node in self.small:
            self._ballast(node).unlink(missing_ok=True)
            kept = self._home / f"{node}-disk"
            subprocess.run(["cp", "-a", str(self._home / node), str(kept)], check=False)
            subprocess.run(["umount", "--lazy", str(self._home / node)], check=True)

    def fill(self, node: str, leave_bytes: int) -> None:
        """So much is left, or nothing."""
        status = os.statvfs(self._home / node)
        size = max(0, status.f_bavail * status.f_frsize - leave_bytes)
        descriptor = os.open(self._ballast(node), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            # The agent may take what is left in between.
            with suppress(OSError):
                os.posix_fallocate(descriptor, 0, size)
            if leave_bytes == 0:
                _write_until_full(descriptor)
        finally:
            os.close(descriptor)
        self._full.add(node)

    def free(self) -> None:
        for node in self._full:
            self._ballast(node).unlink(missing_ok=True)
        self._full.clear()

    def flip(self, node: str, rng: Random) -> str:
        """One bit of its journal or a snapshot, where something was written; the node must not run."""
        directory = data_dir(self._home, node) / "raft"
        files = sorted(
            path
            for path in directory.iterdir()
            if path.name.startswith(("journal-", "snapshot")) and ".bad" not in path.name
        )
        path = rng.choice(files)
        data = path.read_bytes()
        written = [page for page in range(0, len(data), PAGE) if any(data[page : page + PAGE])]
        if not written:
            return f"{path.name} is empty"
        page = rng.choice(written)
        content = [at for at in range(page, min(page + PAGE, len(data))) if data[at]]
        at, bit = rng.choice(content), rng.randrange(8)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([data[at] ^ 1 << bit]))
        return f"bit {bit} of byte {at} of {path.name} ({len(data)} bytes)"

    def _ballast(self, node: str) -> Path:
        return self._home / node / "ballast"


def _write_until_full(descriptor: int) -> None:
    os.lseek(descriptor, 0, os.SEEK_END)
    for size in (1 << 20, PAGE, 1):
        with suppress(OSError):
            while True:
                os.write(descriptor, bytes(size))
