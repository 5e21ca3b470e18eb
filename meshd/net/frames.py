"""The messages of calls, and the frames in which many of them share a stream.

A frame is a 4-byte length and msgpack. It costs the transport about 0.3 ms of CPU whatever its size,
so the one task that writes a stream takes all that is pending, and reads are large.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import trio
from msgspec import Meta, Struct

from meshd import codec
from meshd.errors import InvalidRequest, MeshError, PeerFault, from_code
from meshd.ports import Stream

T = TypeVar("T")

BODY_BYTES_MAX = codec.FRAME_BYTES_MAX - 1024
"""The frame adds id, method and lengths."""

GREETING_FRAME_BYTES_MAX = 17 << 10
"""From somebody who is not admitted yet: a greeting of 16 KiB and what is around it, or a refusal."""

WRITE_BYTES_MAX = 1 << 20
"""One write to the stream; it must go through in the transport's 30 s, also over 300 kbit/s."""

READ_BYTES_MAX = 256 << 10
"""One read from the stream: few reads for many small frames."""

GREETING_ID = 0
PING_ID = 0


class Request(Struct, frozen=True, array_like=True, gc=False):
    id: Annotated[int, Meta(ge=0, le=2**53)]
    method: Annotated[str, Meta(max_length=128)]
    timeout_ms: Annotated[int, Meta(ge=0, le=2**40)]
    """How long the caller waits, so that the answerer does not work for nobody."""
    body: bytes


class Answer(Struct, frozen=True, array_like=True, gc=False):
    """Also the form of both greetings."""

    id: Annotated[int, Meta(ge=0, le=2**53)]
    is_ok: bool
    body: bytes
    """Of the method; or an encoded `Fault`."""


class Fault(Struct, frozen=True, array_like=True, gc=False):
    """A MeshError on its way."""

    code: str
    message: str
    hint: str


class Malformed(PeerFault):
    """The peer's bytes are no frame or no message: its stream is over."""


@dataclass(slots=True, eq=False)
class Call:
    """One of ours, until it is answered."""

    done: trio.Event = field(default_factory=trio.Event)
    is_sent: bool = False
    is_given_up: bool = False
    answer: bytes | None = None
    failure: MeshError | None = None


class Room:
    """For so many bytes at a time; who finds too little waits in line."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes_held = 0
        self._line = trio.Lock()
        self._freed = trio.Event()

    @property
    def waiting(self) -> int:
        return self._line.statistics().tasks_waiting

    async def take(self, size: int) -> None:
        async with self._line:
            while self._bytes_held + size > self._bytes_max:
                await self._freed.wait()
            self._bytes_held += size

    def give_back(self, size: int) -> None:
        self._bytes_held -= size
        self._freed.set()
        self._freed = trio.Event()


class Outbox:
    """Frames that wait for the one task that writes the stream."""

    def __init__(self) -> None:
        self.bytes_pending = 0
        self.pinged_at: float | None = None
        self._crowded = trio.lowlevel.ParkingLot()
        self._frames: deque[tuple[bytes, Call | None]] = deque()
        self._filled = trio.Event()

    def put(self, frame: bytes, call: Call | None = None) -> None:
        self._frames.append((frame, call))
        self.bytes_pending += len(frame)
        self._filled.set()

    def ping(self) -> None:
        # Not another one behind a ping that is still on its way: its answer would be taken for this one's.
        if self.pinged_at is None:
            self.pinged_at = trio.current_time()
            self.put(framed(Request(PING_ID, "", 0, b"")))

    async def wait_room(self, bytes_max: int) -> None:
        """Until no more than that is pending."""
        while self.bytes_pending > bytes_max:
            await self._crowded.park()

    async def write_to(self, stream: Stream) -> None:
        while True:
            await self._filled.wait()
            await stream.write(self._take())
            if not self._frames:
                self._filled = trio.Event()

    def _take(self) -> bytes:
        taken: list[bytes] = []
        size = 0
        while self._frames and size < WRITE_BYTES_MAX:
            frame, call = self._frames.popleft()
            self.bytes_pending -= len(frame)
            if call is not None:
                if call.is_given_up:
                    continue
                call.is_sent = True
            taken.append(frame)
            size += len(frame)
        if self._crowded:
            self._crowded.unpark_all()
        return b"".join(taken)


class FrameReader:
    """Frames out of a stream, read in large pieces; a frame's length is judged before its bytes are kept."""

    def __init__(self, stream: Stream) -> None:
        self.heard_at = trio.current_time()
        """When the last bytes arrived, of whatever size: a large frame on a slow wire is not silence."""
        self._stream = stream
        self._bytes = bytearray()
        self._at = 0

    async def next(self, bytes_max: int = codec.FRAME_BYTES_MAX) -> bytes | None:
        """None at the end. Raises Malformed (too large, or ends within a frame), Unavailable."""
        while (frame := self._pop(bytes_max)) is None:
            del self._bytes[: self._at]
            self._at = 0
            data = await self._stream.read(READ_BYTES_MAX)
            if not data:
                if self._bytes:
                    raise Malformed(f"the stream ended within a frame, after {len(self._bytes)} bytes of it")
                return None
            self.heard_at = trio.current_time()
            self._bytes += data
        return frame

    def _pop(self, bytes_max: int) -> bytes | None:
        start = self._at + 4
        if len(self._bytes) < start:
            return None
        size = int.from_bytes(self._bytes[self._at : start], "big")
        if size > bytes_max:
            raise Malformed(f"frame of {size} bytes is over the limit of {bytes_max}")
        if len(self._bytes) < start + size:
            return None
        self._at = start + size
        return bytes(memoryview(self._bytes)[start : self._at])


def framed(message: Request | Answer) -> bytes:
    payload = codec.encode(message)
    return len(payload).to_bytes(4, "big") + payload


def parse(frame: bytes, kind: type[T]) -> T:
    try:
        return codec.decode(frame, kind)
    except InvalidRequest as error:
        raise Malformed(error.message) from error


def fault_of(error: MeshError) -> bytes:
    return codec.encode(Fault(error.code, error.message[:4096], error.hint[:1024]))


def error_of(body: bytes) -> MeshError:
    fault = parse(body, Fault)
    return from_code(fault.code, fault.message, fault.hint)


def copy_of(error: MeshError) -> MeshError:
    # Many calls fail by one loss; an exception raised twice would gather the tracebacks of both.
    return from_code(error.code, error.message, error.hint)
