"""An agent's data directory: who it is and what it must never forget. One agent at a time holds its lock.

identity.key   the node's Ed25519 key, 0600; made once
mesh.json      which mesh this node belongs to, and the certificate that says so; the last file of founding or joining
mesh.key       the mesh's own key, at servers only, 0600
counters.json  starts and session epochs: raised and synced before they are used
recovery.json  which recovery epoch of the mesh this directory belongs to
peers.json     where members were last seen: where to dial, never who votes
reserve        room for these files on a full disk
raft/ blobs/ backends/ attempts/ api.sock lock
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from meshd.durable import make_directory, sync_directory
from meshd.errors import Busy, Corrupt, StartRefused
from meshd.model import Certificate, KeyLink, NodeId
from meshd.recovery.epochs import EpochFile

T = TypeVar("T")

RESERVE_BYTES = 64 << 10
"""Room kept for the files below, so that an agent starts and opens sessions on a full disk too."""


class MeshFile(Struct, frozen=True):
    """mesh.json: this node's place in a mesh."""

    mesh: str
    public_key: str
    """Hex of the mesh's Ed25519 public key."""
    ca_pem: str
    certificate: Certificate
    name: str
    is_founder: bool = False
    has_journal: bool = False
    """Set once this server's journal has been written: from then on a missing journal is an error, not a beginning."""
    key_links: tuple[KeyLink, ...] = ()
    """From that key to the present one."""
    refused: str = ""
    """Why this server's journal may not be started any more; `meshd rejoin` makes a new one."""


class Counters(Struct, frozen=True):
    starts: int = 0
    epoch: int = 0


class KnownPeer(Struct, frozen=True):
    """A member, as this node last saw it."""

    node: NodeId
    name: str
    addresses: tuple[str, ...]
    api_address: str = ""
    certificate: Certificate | None = None


class PeersFile(Struct, frozen=True):
    peers: tuple[KnownPeer, ...] = ()


class Home:
    """Raises StartRefused when the directory cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity_key = path / "identity.key"
        self.mesh_key = path / "mesh.key"
        self.raft = path / "raft"
        self.blobs = path / "blobs"
        self.history_index = path / "history" / "index.sqlite"
        self.backends = path / "backends"
        self.attempts = path / "attempts"
        self.socket = path / "api.sock"
        try:
            make_directory(path)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartRefused(
                f"cannot use data directory {path}: {error.strerror}",
                hint="choose another with --data-dir, or give this user rights to it",
            ) from error
        self._take_lock()
        self._reserve = path / "reserve"
        self._turn = threading.Lock()
        self._keep_reserve()

    def later_key(self, public_key: bytes) -> Path:
        """Where a key is that the mesh's was changed to. `mesh_key` is the first one and stays."""
        return self.path / f"mesh.key.{public_key.hex()[:16]}"

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "?"
            os.close(self._lock)
            raise StartRefused(
                f"data directory {self.path} is in use by agent with pid {holder}",
                hint="one agent per directory: stop that one, or give this one its own --data-dir",
            ) from error
        with suppress(OSError):  # on a full disk others are not told the pid
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def close(self) -> None:
        os.close(self._lock)

    # --- files -------------------------------------------------------------------------------------------------------

    def mesh(self) -> MeshFile | None:
        return self._read("mesh.json", MeshFile)

    def write_mesh(self, mesh: MeshFile) -> None:
        self._write("mesh.json", mesh)

    def counters(self) -> Counters:
        return self._read("counters.json", Counters) or Counters()

    def write_counters(self, counters: Counters) -> None:
        self._write("counters.json", counters)

    def epochs(self) -> EpochFile:
        return self._read("recovery.json", EpochFile) or EpochFile()

    def write_epochs(self, epochs: EpochFile) -> None:
        self._write("recovery.json", epochs)

    def peers(self) -> tuple[KnownPeer, ...]:
        """Only hints: an unreadable file is an empty one."""
        try:
            found = self._read("peers.json", PeersFile)
        except Corrupt:
            return ()
        return found.peers if found else ()

    def write_peers(self, peers: tuple[KnownPeer, ...]) -> None:
        self._write("peers.json", PeersFile(peers), is_synced=False)

    def has_journal(self) -> bool:
        """Not what was only begun (.new), nor what was set aside (.bad-N)."""
        return self.raft.is_dir() and any(not path.suffix for path in self.raft.glob("journal-*"))

    def put_journal_aside(self) -> Path | None:
        """Renamed, never deleted, and durable when this returns; None when there is none."""
        if not self.raft.exists():
            return None
        number = 1
        while (aside := self.path / f"raft.old-{number}").exists():
            number += 1
        self.raft.rename(aside)
        sync_directory(self.path)
        return aside

    def _read(self, name: str, kind: type[T]) -> T | None:
        path = self.path / name
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StartRefused(f"cannot read {path}: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Corrupt(f"{path} is damaged: {error}", hint="restore it from a backup, or join anew") from error

    def _write(self, name: str, value: Struct, *, is_synced: bool = True) -> None:
        """Replaced in one step, and durable when this returns (unless it is only a hint). Raises Busy on a full disk, Corrupt."""
        with self._turn:  # called in threads, and two may have news for one file
            self._replace(name, value, is_synced=is_synced)

    def _replace(self, name: str, value: Struct, *, is_synced: bool) -> None:
        target, temporary = self.path / name, self.path / f".{name}.new"
        data = msgspec.json.format(msgspec.json.encode(value), indent=1)
        try:
            temporary.unlink(missing_ok=True)
            try:
                _put(temporary, data, is_synced=is_synced)
            except OSError as error:
                if not _is_full(error) or len(data) > RESERVE_BYTES or not self._reserve.exists():
                    raise
                # Its room is taken already, and nobody else can have had it in between.
                self._reserve.rename(temporary)
                _put(temporary, data, is_synced=is_synced)
            temporary.rename(target)
            if is_synced:
                sync_directory(self.path)
        except OSError as error:
            if not _is_full(error):
                raise Corrupt(f"cannot write {target}: {error}", hint="check the disk, then start again") from error
            raise Busy(f"there is no room for {target}: the disk is full", hint="free some space on it") from error
        self._keep_reserve()

    def _keep_reserve(self) -> None:
        """Where it is used up, as soon as there is room: usually at once, in that of the file that was replaced."""
        if self._reserve.exists():
            return
        beside = self.path / ".reserve.new"
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            finally:
                os.close(descriptor)
            beside.rename(self._reserve)
        except OSError:
            beside.unlink(missing_ok=True)


def _put(path: Path, data: bytes, *, is_synced: bool) -> None:
    """In the room that the file has, where there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.ftruncate(descriptor, len(data))
        if is_synced:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
