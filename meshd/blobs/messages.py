"""What nodes say to each other about blobs.

RPC     blob.get    small blobs, whole, many at a time        Names    -> Contents
        blob.have   who has these, and how large are they?    Names    -> Sizes
        blob.pull   fetch these and make them durable         Pull     -> Presence
        blob.list   a page of all that a node has             ListFrom -> Page
        blob.remove take it off this node                     Name     -> Presence
Stream  /meshd/blob/1: any number of Want, each answered by Coming and that many bytes,
        or by Refusal and the end. Messages have a 4-byte length before them.
"""

from __future__ import annotations

from typing import Annotated, Any

import trio
from msgspec import Meta, Struct

from meshd import codec
from meshd.errors import InvalidRequest, PeerFault, Unavailable
from meshd.model import BlobRef
from meshd.ports import Stream

PROTOCOL = "/meshd/blob/1"

SMALL_BYTES_MAX = 64 << 10
"""Up to here a blob travels whole in a call: one round trip, and it does not hold up other calls for long."""

CALL_BYTES_MAX = 1 << 20
"""Blob bytes in one call. A larger answer would delay the heartbeats that share its stream."""

NAMES_MAX = 1024
"""Blobs named in one call: 72 KiB of names."""

PAGE_MAX = 4096
"""Blobs in one page of a list: 320 KiB."""

MESSAGE_BYTES_MAX = 4096
"""On a blob stream; anything longer is no message of ours."""

BlobName = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Meta(ge=0, le=2**53)]
SmallBytes = Annotated[bytes, Meta(max_length=SMALL_BYTES_MAX)]


class Name(Struct, frozen=True):
    blob: BlobName


class Names(Struct, frozen=True):
    blobs: Annotated[tuple[BlobName, ...], Meta(max_length=NAMES_MAX)]


class Contents(Struct, frozen=True):
    """In the order of the names; None for what is not here, is not small, or no longer fits the answer."""

    datas: Annotated[tuple[SmallBytes | None, ...], Meta(max_length=NAMES_MAX)]


class Sizes(Struct, frozen=True):
    """In bytes, in the order of the names; None for what is not here."""

    sizes: Annotated[tuple[Size | None, ...], Meta(max_length=NAMES_MAX)]


class Presence(Struct, frozen=True):
    """In the order of the names: is it durable here (for blob.remove: was it here)?"""

    here: Annotated[tuple[bool, ...], Meta(max_length=NAMES_MAX)]
    why: Annotated[str, Meta(max_length=1024)] = ""
    """Of the first that is not, for people."""


class Pull(Struct, frozen=True):
    """Some with their bytes, to save the way back."""

    refs: Annotated[tuple[BlobRef, ...], Meta(max_length=NAMES_MAX)]
    datas: Annotated[tuple[SmallBytes | None, ...], Meta(max_length=NAMES_MAX)]
    timeout_ms: Annotated[int, Meta(ge=0, le=86_400_000)]


class ListFrom(Struct, frozen=True):
    after: Annotated[str, Meta(max_length=64)] = ""
    """The last name of the page before."""


class Page(Struct, frozen=True):
    blobs: Annotated[tuple[BlobRef, ...], Meta(max_length=PAGE_MAX)]
    is_last: bool


class Want(Struct, frozen=True, array_like=True):
    blob: BlobName
    offset: Size
    length: Annotated[int, Meta(ge=1, le=CALL_BYTES_MAX)]


class Coming(Struct, frozen=True, tag=True):
    """`length` bytes follow."""

    size: Size
    """Of the whole blob."""
    length: Annotated[int, Meta(ge=1, le=CALL_BYTES_MAX)]


class Refusal(Struct, frozen=True, tag=True):
    code: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=1024)]


Reply = Coming | Refusal


class Wire:
    """Messages and runs of bytes on one blob stream. Raises Unavailable when the peer is silent for too long."""

    def __init__(self, stream: Stream, *, silence_s: float) -> None:
        self.silence_s = silence_s
        self._stream = stream
        self._buffer = bytearray()

    async def send(self, message: Struct, data: bytes = b"") -> None:
        body = codec.encode(message)
        await self._stream.write(len(body).to_bytes(4, "big") + body + data)

    async def receive(self, kind: Any) -> Any:
        """One message of `kind`; None when the peer has no more. Raises PeerFault for what is none."""
        if not self._buffer and not await self._fill():
            return None
        length = int.from_bytes(await self.read_exactly(4), "big")
        if length > MESSAGE_BYTES_MAX:
            raise PeerFault(f"{self._stream.peer} sent a message of {length} bytes on a blob stream")
        try:
            return codec.decode(await self.read_exactly(length), kind)
        except InvalidRequest as error:
            raise PeerFault(f"{self._stream.peer} sent nonsense on a blob stream: {error.message}") from error

    async def read_exactly(self, length: int) -> bytes:
        """Raises Unavailable when the stream ends before."""
        while len(self._buffer) < length:
            if not await self._fill():
                raise Unavailable(f"{self._stream.peer} ended a blob stream in the middle")
        data = bytes(memoryview(self._buffer)[:length])
        del self._buffer[:length]
        return data

    async def _fill(self) -> bool:
        with trio.move_on_after(self.silence_s) as patience:
            data = await self._stream.read(CALL_BYTES_MAX)
            self._buffer += data
        if patience.cancelled_caught:
            raise Unavailable(f"{self._stream.peer} was silent on a blob stream for {self.silence_s:g} s")
        return bool(data)
