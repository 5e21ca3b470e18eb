"""A snapshot file on disk, an image that a leader sends, and the state in it.

May be raised: Corrupt by what is read from disk, PeerFault by what a leader sent. Whether a state that could be read is
a right one is another matter: servers are trusted to crash, not to lie, and disks are found out by digests.
The first byte of a frame says which; 1 and 2 give the right digest, 3 is a state alone, 4 the pieces of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3
from msgspec import Raw

from fuzz.inputs import join, split
from fuzz.targets import machine as commands
from meshd import codec
from meshd.errors import Corrupt, MeshError, PeerFault
from meshd.model import Needs
from meshd.raft.state.commands import Batch, Stamped, Submit
from meshd.raft.state.machine import Machine
from meshd.raft.storage.frames import LocalHeader
from meshd.raft.storage.snapshot import Image, load, newest_readable, pack_image, save, unpack_image
from meshd.testing.raft_disk import MemoryDisk

FRAMED = True
MESH = "mesh"
_HEAD = b"meshdsn1"


def fuzz(data: bytes) -> None:
    for frame in split(data):
        kind, body = (frame[0] % 5 if frame else 0), frame[1:]
        match kind:
            case 0 | 1:
                if kind == 1:
                    body = _HEAD + (0).to_bytes(4, "little") + len(body).to_bytes(4, "little") + body
                    body += blake3(body).digest()
                _load(body)
            case 2:
                with suppress(PeerFault):
                    unpack_image(body, digest=blake3(body).digest(), mesh=MESH)
            case 3:
                _restore(body)
            case _:
                with suppress(MeshError):
                    _restore(codec.encode(codec.decode(body, list[bytes])))


def _load(content: bytes) -> None:
    disk = MemoryDisk()
    disk.open(f"snapshot-{7:020d}").write_at(0, content)
    image, damaged = newest_readable(disk, mesh=MESH)
    if image is None:
        assert damaged
        with suppress(Corrupt):
            load(disk, mesh=MESH)
        return
    save(disk, pack_image(image), LocalHeader(MESH, "01", 1, "aa"))
    _restore(image.state)


def _restore(state: bytes) -> None:
    with suppress(Corrupt):
        Machine().restore(state)


# --- seeds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _State:
    state: bytes

    @property
    def image(self) -> Image:
        return Image(MESH, 7, 1, (), self.state)


def _states() -> Iterator[_State]:
    """What the machine's own seeds lead to."""
    for data in commands.seeds():
        yield _State(_state_after(data))


def _state_after(data: bytes) -> bytes:
    machine = Machine()
    for index, frame in enumerate(split(join(commands._prologue()) + data)):
        if frame and not frame[0] & 0x80 and len(frame) < 1000:
            origin = commands.ORIGINS[(frame[0] & 15) % len(commands.ORIGINS)]
            stamped = Stamped(origin, Raw(frame[1:]))
            machine.apply(index + 1, codec.encode(Batch(1000, commands.WALL_MS + index, (stamped,))))
    return machine.capture()()


def seeds() -> Iterator[bytes]:
    for number, made in enumerate(_states()):
        yield join([bytes([3 + number % 2]) + made.state])
        if number % 4 == 0:
            yield join([b"\x01" + codec.encode(made.image)])
            yield join([b"\x02" + codec.encode(made.image)])
    disk = MemoryDisk()
    save(disk, pack_image(Image(MESH, 7, 1, ("a/01",), Machine().capture()())), LocalHeader(MESH, "01", 1, "aa"))  # type: ignore[arg-type]
    yield join([b"\x00" + disk.read(f"snapshot-{7:020d}")])
    # A job whose selector nobody can read, in a state that is right otherwise.
    submit = Submit(commands.job_id(1), commands._spec(needs=Needs(labels="zone in (a)")))
    selective = join([commands._frame(0, submit)])
    yield join([b"\x03" + _state_after(selective).replace(b"zone in (a)", b"zone ni (a)")])
    yield join([b"\x00", b"\x00" + _HEAD + b"\xff" * 60, b"\x03", b"\x03\x90", b"\x03\xdd\xff\xff\xff\xff"])
